"""Scores of every method on the model that was trained on all rows of the bank, and their LDS.

The LDS of a query is Spearman's correlation, over the subsets, of the sum of the scores of the rows kept with minus the
loss of the model trained on them. Figures are means over the queries; intervals are of a bootstrap that draws queries
and subsets anew, the same draws for all methods, so that differences have intervals too.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import circumstances, save, write_text
from bench.evidence.cached import Replay, example_batches
from bench.evidence.curvature import of_sample
from bench.evidence.fisher import LABEL_DRAWS, cg_scores, solved_scores
from bench.evidence.lds import BANK, Chosen, choose, load_tokenizer
from bench.evidence.measured import of_both_models
from bench.evidence.run import STAGES, Seed, Sizes, ekfac_of, indexes
from bench.evidence.sketched import Scores
from bench.evidence.tasks import Task, TaskQuery, read_jsonl, write_jsonl
from rapidindex.config import ModelConfig, SketchConfig
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.two_sided import TwoSided
from rapidindex.progress import Bars

DRAWS = 300
"""Of the bootstrap."""
DEFAULT = "K=65536/shuffles=20/estimate/unit/int8"


class Bank(Seed):
    """The bank's full model, rows and queries, for the stages of the other tasks."""

    def __init__(self, options: argparse.Namespace, bars: Bars) -> None:
        choice, self.source = options.choice, options.data
        self.full = options.work / f"full-{options.model_dtype}-{options.seed}"
        self.chosen: Chosen = choose(options.data, load_tokenizer(options.work / "model"), choice)
        sizes = Sizes(choice.rows, dtype="float32", max_length=choice.tokens[1] + 1, ekfac_rows=512)
        sizes = replace(sizes, Ks=options.Ks, recipes=options.recipes)
        task = Task("lds", lambda *_: [], lambda *_: [], lambda *_: [], ())
        super().__init__(task, options.seed, sizes, options.work / "model", options.work / "scores-of", bars, ())

    @cached_property
    def data(self) -> str:
        """The file of the rows, in the work folder alone."""
        file, lines = self.folder / "data.jsonl", read_jsonl(self.source)
        write_jsonl(file, [lines[example.line - 1] for example in self.chosen.rows])
        return str(file)

    @cached_property
    def adapter(self) -> ModelConfig:
        """The model trained on all rows."""
        return ModelConfig(self.model, str(self.full), device="cpu", dtype="float32")

    @cached_property
    def queries(self) -> list[TaskQuery]:
        """The queries' texts."""
        return [TaskQuery(e.prompt, e.response, "", None, False) for e in self.chosen.queries]

    @cached_property
    def query_batches(self) -> list[Batch]:
        """The queries as their losses are measured after each retraining, with the token that ends the response."""
        return self.chosen.query_batches

    @property
    def sketch(self) -> SketchConfig:
        """How the longest RapidGrads are made."""
        return SketchConfig(max(self.sizes.Ks), seed=self.seed)

    @property
    def drawn(self) -> list[np.ndarray]:
        """Gradients of all rows with tokens drawn from the model, float32 [rows, |v|] each."""
        batches = example_batches(self.job.items)
        return [self._drawn(number, batches) for number in range(1, LABEL_DRAWS + 1)]

    def _drawn(self, draw: int, batches: list[tuple[list[int], Batch]]) -> np.ndarray:
        seeds = (2**20 * self.seed + 2**12 * draw + number for number in range(len(batches)))
        labelled = [(numbers, one.with_drawn_labels(seed)) for (numbers, one), seed in zip(batches, seeds, strict=True)]
        return self.gradients_of(f"drawn-{draw}", labelled).rows


def score(options: argparse.Namespace, bars: Bars) -> None:
    """Compute the scores that are missing, and write `lds.json`."""
    bank = Bank(options, bars)
    if [item.example.id for item in bank.job.items] != [example.id for example in bank.chosen.rows]:
        raise SystemExit("The rows are not those of the bank, in its order.")
    for method in options.only:
        if method == "two-sided":
            bank.scores(method, lambda: two_sided_scores(bank))
        elif method == "product":
            indexes(bank)
        elif method == "fisher":
            bank.scores(method, lambda: solved_scores(bank.rows, bank.posed, bank.drawn, bank.sketch, bars))
        elif method == "cg":
            bank.scores(method, lambda: cg_scores(bank.rows, bank.posed, bank.drawn, ekfac_of(bank), bars))
        else:
            STAGES[method](bank)
        bars.say(f"written to {measure(bank.folder, options)}")


def two_sided_scores(bank: Bank) -> Scores:
    """Score rows P_out g P_inᵀ of the whole gradients on disk, as they are and corrected, at each K."""
    bases, factors, scores = of_sample(bank.drawn_sample), bank.factors, {}
    corrections: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
        "none": lambda layer, values: values,
        "estimate": lambda layer, values: values * factors[layer.start : layer.start + layer.size],
        "kronecker": lambda layer, values: bases[layer.name].solved(values, 0.5),
    }
    for name, corrected in corrections.items():
        projections = {K: TwoSided(bank.rows.layers, SketchConfig(K, seed=bank.seed)) for K in bank.sizes.Ks}
        asked, _ = projected(bank.posed, projections, corrected)
        kept, lengths = projected(bank.rows, projections, corrected)
        for K in projections:
            found = asked[K] @ kept[K].T
            scores[f"two-sided={K}/{name}/none"] = found.numpy()
            scores[f"two-sided={K}/{name}/unit"] = (found / lengths).numpy()
        bank.bars.say(f"two-sided, correction {name}")
    return scores


def projected(
    side: Replay, projections: dict[int, TwoSided], corrected: Callable[[Layer, torch.Tensor], torch.Tensor]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Return the projected gradients [n, K] by K, and the lengths [n] of the corrected gradients."""
    sums, squares = {K: one.empty(len(side)) for K, one in projections.items()}, torch.zeros(len(side))
    for layer in side.layers:
        values = torch.from_numpy(np.array(side.rows[:, layer.start : layer.start + layer.size]))
        values = corrected(layer, values)
        squares += values.square().sum(1)
        for K, projection in projections.items():
            projection.add(sums[K], layer.start, values)
    return {K: projections[K].finish(total) for K, total in sums.items()}, squares.sqrt()


def measure(folder: Path, options: argparse.Namespace) -> Path:
    """Write the LDS of all scores in `folder` by the bank's retrainings, beside those of other methods in the file.

    Those of a model of another dtype than the bank's are kept apart.
    """
    bank = json.loads((options.results_folder / f"{BANK}.json").read_text())["figures"]
    subsets, losses = outcomes(bank, options.seed, options.dtype)
    scores, seconds = of_both_models(folder)
    rows, before = lds_table(scores, subsets, losses), options.results_folder / "lds.json"
    content = json.loads(before.read_text()) if before.exists() else {}
    earlier = content.get("figures", {"methods": [], "seconds": {}, "notes": {}})
    if options.model_dtype != options.dtype:
        if not content:
            raise SystemExit(f"{before} is not there: score the bank's own model first.")
        apart = {options.model_dtype: {**circumstances(), "methods": rows, "seconds": seconds}}
        figures = earlier | {"other_models": earlier.get("other_models", {}) | apart}
        write_text(before, json.dumps({**content, "figures": figures}, indent=1) + "\n")
        return before
    new = {row["method"] for row in rows}
    figures = earlier | {
        "setting": {name: bank[name] for name in ("choice", "schedule", "template")},
        "subsets": len(subsets),
        "queries": losses.shape[1],
        "seconds": earlier["seconds"] | seconds,
        "notes": json.loads(notes.read_text()) if (notes := folder / "notes.json").exists() else earlier["notes"],
        **reliability(bank, options),
        "methods": [row for row in earlier["methods"] if row["method"] not in new] + rows,
    }
    return save("lds", figures, options)


def outcomes(bank: dict[str, Any], seed: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the subsets, bool [subsets, rows], and the losses after them, float64 [subsets, queries]."""
    runs = {r["subset"]: r["losses"] for r in bank["retrainings"] if (r["seed"], r["dtype"]) == (seed, dtype)}
    numbers = sorted(number for number in runs if number >= 0)
    packed = [np.frombuffer(bytes.fromhex(bank["subsets"][number]), np.uint8) for number in numbers]
    subsets = np.stack([np.unpackbits(bits)[: len(bank["rows"])] for bits in packed]).astype(bool)
    return subsets, np.array([runs[number] for number in numbers])


def lds_table(scores: dict[str, np.ndarray], subsets: np.ndarray, losses: np.ndarray) -> list[dict[str, Any]]:
    """Return a row a method: its mean LDS, its interval, and that of its difference from `estimate`'s."""
    predicted = {name: subsets @ values.T.astype(np.float64) for name, values in scores.items()}
    predicted = {name: values for name, values in predicted.items() if np.isfinite(values).all()}
    draws = bootstrap(predicted, losses)
    rows = []
    for name, values in predicted.items():
        each = spearman(values, -losses)
        row = {"method": name, "lds": round(float(each.mean()), 4), "interval": _interval(draws[name])}
        if DEFAULT in draws:
            row["less_estimate"] = _interval(draws[name] - draws[DEFAULT])
        rows.append(row)
    return rows


def bootstrap(predicted: dict[str, np.ndarray], losses: np.ndarray, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Return the mean LDS of each method over `draws` draws of subsets and queries with replacement."""
    draw, found = np.random.default_rng(0), {name: np.empty(draws) for name in predicted}
    for number in range(draws):
        some = draw.integers(0, len(losses), len(losses))
        asked = draw.integers(0, losses.shape[1], losses.shape[1])
        truth = _ranks(-losses[some])
        for name, values in predicted.items():
            found[name][number] = _correlation(_ranks(values[some]), truth)[asked].mean()
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each column of two arrays [subsets, queries]; 0 where it is undefined."""
    return _correlation(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values, axis=0)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a - a.mean(0), b - b.mean(0)
    lengths = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(lengths > 0, (a * b).sum(0) / np.where(lengths > 0, lengths, 1.0), 0.0)


def _interval(values: np.ndarray) -> list[float]:
    return [round(float(end), 4) for end in np.percentile(values, (2.5, 97.5))]


def reliability(bank: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return how well another seed's, and float32's, losses agree with the bank's over the same subsets."""
    kinds = {(run["seed"], run["dtype"]) for run in bank["retrainings"]}
    own = (options.seed, options.dtype)
    found = {}
    for kind in sorted(kinds - {own}):
        both = [_by_subset(bank, one) for one in (own, kind)]
        numbers = sorted((both[0].keys() & both[1].keys()) - {-1})
        if len(numbers) > 1:
            a, b = (np.array([side[number] for number in numbers]) for side in both)
            found[f"seed {kind[0]}, {kind[1]}"] = _agreement(a, b)
    a = np.array([losses for number, losses in _by_subset(bank, own).items() if number >= 0])
    return {"spread": round(float(a.std(0, ddof=1).mean()), 5), "agreement": found}


def _by_subset(bank: dict[str, Any], kind: tuple[int, str]) -> dict[int, list[float]]:
    return {run["subset"]: run["losses"] for run in bank["retrainings"] if (run["seed"], run["dtype"]) == kind}


def _agreement(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Compare losses [subsets, queries] of two kinds of retrainings."""
    each = spearman(a, b)
    draws = np.random.default_rng(0).integers(0, len(each), (DRAWS, len(each)))
    centred = (a - a.mean(0), b - b.mean(0))
    return {
        "subsets": len(a),
        "spearman": round(float(each.mean()), 4),
        "interval": _interval(each[draws].mean(1)),
        "pearson": round(float(_correlation(*centred).mean()), 4),
        "standard_deviations": [round(float(side.std(0, ddof=1).mean()), 5) for side in centred],
        "of_the_difference": round(float((centred[0] - centred[1]).std(0, ddof=1).mean()), 5),
    }
