"""Fact tracing: does a ranking find the rows that taught the model a fact, and do its rows move the model's answer?

    python -m bench.evidence.facts --work FOLDER               every stage that is missing, then facts.json
    python -m bench.evidence.facts --work FOLDER --only text,full,trackstar
    python -m bench.evidence.facts --work FOLDER --seed 1      other facts, another order: facts_1.json
    python -m bench.evidence.facts --work FOLDER --full        all parameters trained: facts_full.json

Table 1 of TrackStar (arXiv 2410.17413) in small. Rows are passages, all of whose tokens are in the loss: facts of
ParaRel in two paraphrases each, among sentences of FewRel and rows of Alpaca. A query is a fact's third paraphrase, up
to its last word, which the fine-tuned model completes rightly (greedily) and the base does not. Its two rows are to be
found (MRR, recall@10); and one step on each of the ten rows that a method finds is to raise the answer's probability
(tail-patch, section 5.2). Where all parameters are trained no gradient is kept whole, and no step is taken.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import parser, results_folder, save, write_text
from bench.evidence import metrics
from bench.evidence.cached import Replay, compressor_of, example_batches
from bench.evidence.curvature import KRONECKER, of_sample, scores_of
from bench.evidence.end_to_end import RECIPES, recipe_names
from bench.evidence.lds import load_tokenizer
from bench.evidence.lds_scores import DEFAULT, projected
from bench.evidence.measured import of_both_models
from bench.evidence.representations import representations
from bench.evidence.retraining import Retrainer, Schedule
from bench.evidence.run import STAGES, Seed, Sizes, encode_query, indexes
from bench.evidence.sketched import Scores
from bench.evidence.tasks import Task, TaskQuery, read_jsonl, write_jsonl
from rapidindex.caching.batches import Item, as_batch
from rapidindex.config import FinetuneConfig, ModelConfig, SketchConfig, SpecializeOptions
from rapidindex.data.examples import Example, read_examples
from rapidindex.data.templates import Template
from rapidindex.demo.demo import unpack_model
from rapidindex.evaluate.steps import adamw
from rapidindex.gradients.blocks import blocks_of
from rapidindex.gradients.curvature import (
    Curvature,
    block_of,
    mean_outer_products,
    spectrum,
    spectrum_of_rows,
    take_inverse_root,
    weight_at,
)
from rapidindex.gradients.losses import Batch, Layer, trainable
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import correction
from rapidindex.gradients.sketch import Sketch
from rapidindex.gradients.two_sided import TwoSided
from rapidindex.model.finetune import finetune
from rapidindex.model.model import load
from rapidindex.progress import Bars, silent
from rapidindex.query.specialize import PAPERS_COMPONENT, PAPERS_K

TEMPLATE = "raw"
R_K, TRAK_K, K = 2**16, 2**10, 2**16
"""Lengths of the two-sided rows that R corrects, of TRAK's, and of RapidGrads."""
PAPERS_DAMPING = 0.1
PATCHED = ("random", "bm25", "embedding", "repsim/last", "rept/last", "trak", "full/ekfac/unit", DEFAULT)
PATCHED += tuple(f"K=65536/shuffles=20/{recipe}/int8" for recipe in ("none/layer", "kronecker/unit"))
PATCHED += tuple(f"R=none/{recipe}" for recipe in ("none/none", "none/unit", "estimate/unit"))
PATCHED += tuple(f"R={which}/{correction}/unit" for which in ("train", "mixed") for correction in ("none", "estimate"))
"""The methods whose rows are put to the test: a step of each of three rates on every row that one of them finds."""
ORDER = (
    "text",
    "full",
    "trackstar",
    "rapidin",
    "kronecker",
    "rows",
    "task",
    "representations",
    "limit",
    "ekfac",
    "product",
)
"""The methods that are scored, those that take longest last."""
TOP = 10
RATES = (0.3, 1.0, 3.0)
"""Learning rates of the tail-patch, of the run's last one."""
RATES_ORDER = (1, 2, 0)
"""The order in which they are measured."""
COSTED = 48
"""Rows that a row's cost is measured on."""
DRAWS = 1000
"""Of the bootstrap over the queries."""


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on."""

    facts: int = 220
    sharing: float = 0.5
    """Share of the facts whose subject has another fact, where there are so many."""
    alike: int = 3
    """Facts of one relation with the same object, at most."""
    sentences: int = 180
    """Of FewRel, those first that name a subject or an object of the facts."""
    instructions: int = 130
    """Of Alpaca."""
    tokens: tuple[int, int] = (4, 32)
    """Bounds of a row's length."""
    queries: int = 100
    """Queries, at most."""
    learnt: bool = True
    """Whether only facts that fine-tuning taught are queries; the smoke's tiny model learns none."""


@dataclass(frozen=True)
class Training(Schedule):
    """As the retrainings of the LDS, but longer, and with a last rate above zero, as in pretraining."""

    epochs: int = 7
    learning_rate: float = 2e-3
    least: float = 0.1
    """The rate at the end, of its peak."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        fallen = step >= round(self.warmup * steps)
        return max(super().rate(step, steps), self.least * self.learning_rate * fallen)


FULL = FinetuneConfig("full", epochs=5, batch_size=20, learning_rate=2e-4, early=0)
SMOKE = Choice(facts=12, learnt=False, sentences=6, instructions=6, tokens=(2, 200))
SMOKE_TRAINING = Training(epochs=2, batch_size=6, learning_rate=1e-2, layers=1, dtype="float32")


# --- the data ---


def templates_of(patterns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Return the templates that end in the object, of the relations that have three of them or more."""
    found: dict[str, dict[str, None]] = {}
    for row in patterns:
        text = row["pattern"].strip().rstrip(" .")
        if text.endswith("[Y]") and "[X]" in text and text.count("[Y]") == 1:
            found.setdefault(row["relation"], {})[" ".join(text.split())] = None
    return {relation: list(texts) for relation, texts in found.items() if len(texts) > 2}


def draw_facts(rows: Sequence[dict[str, str]], relations: Sequence[str], choice: Choice, draw: Any) -> list[dict]:
    """Draw facts whose answer is unique and not in the subject: some with a shared subject, all relations alike."""
    pairs = Counter((row["relation"], row["subject"]) for row in rows)
    usable = [
        row
        for row in rows
        if row["relation"] in relations
        and pairs[row["relation"], row["subject"]] == 1
        and row["object"].lower() not in row["subject"].lower()
    ]
    usable = [usable[number] for number in draw.permutation(len(usable))]
    subjects = Counter(row["subject"] for row in usable)
    shared = sorted((row for row in usable if subjects[row["subject"]] > 1), key=lambda row: row["subject"])
    order = {subject: draw.random() for subject in subjects}
    shared.sort(key=lambda row: order[row["subject"]])
    alone = _in_turn([row for row in usable if subjects[row["subject"]] == 1])
    wanted = round(choice.sharing * choice.facts)
    chosen = _few_alike(shared, choice.alike, wanted)
    return chosen + _few_alike(alone, choice.alike, choice.facts - len(chosen), chosen)


def _in_turn(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Order rows so that the relations take turns."""
    seen: Counter[str] = Counter()
    places = []
    for row in rows:
        places.append(seen[row["relation"]])
        seen[row["relation"]] += 1
    return [rows[number] for number in np.argsort(places, kind="stable")]


def _few_alike(rows: Sequence[dict], most: int, count: int, before: Sequence[dict] = ()) -> list[dict]:
    """Return the first `count` rows, of which `most` have the same relation and object, `before` counted."""
    seen, kept = Counter((row["relation"], row["object"]) for row in before), []
    for row in rows:
        if len(kept) < count and seen[row["relation"], row["object"]] < most:
            seen[row["relation"], row["object"]] += 1
            kept.append(row)
    return kept


def make_data(source: Path, tokenizer: Any, choice: Choice, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the training rows {text, fact} and the facts {fact, relation, subject, object, prompt}.

    `fact` is the number of the fact that a row states, -1 for the others; `prompt` is the third paraphrase.
    """
    draw = np.random.default_rng([seed, 8])
    templates = templates_of(read_jsonl(source / "pararel" / "patterns.jsonl"))
    facts = draw_facts(read_jsonl(source / "pararel" / "facts.jsonl"), list(templates), choice, draw)
    rows, asked = [], []
    for number, fact in enumerate(facts):
        texts = [templates[fact["relation"]][i] for i in draw.permutation(len(templates[fact["relation"]]))[:3]]
        texts = [text.replace("[X]", fact["subject"]) for text in texts]
        rows += [{"text": text.replace("[Y]", fact["object"]) + ".", "fact": number} for text in texts[:2]]
        prompt = texts[2].removesuffix("[Y]").rstrip()
        asked.append({"fact": number, **{n: fact[n] for n in ("relation", "subject", "object")}, "prompt": prompt})
    names = {fact[name] for fact in facts for name in ("subject", "object")}
    for texts, count in (
        (_sentences(read_jsonl(source / "fewrel" / "fewrel.jsonl"), names, draw), choice.sentences),
        (_instructions(read_jsonl(source / "alpaca_9k.jsonl"), draw), choice.instructions),
    ):
        rows += [{"text": text, "fact": -1} for text in _fitting(texts, tokenizer, choice.tokens, count)]
    distinct = {row["text"]: row for row in reversed(rows)}  # a build leaves repeats out
    rows = list(distinct.values())
    return [rows[number] for number in draw.permutation(len(rows))], asked


def _sentences(rows: Sequence[dict], names: set[str], draw: Any) -> list[str]:
    shuffled = [rows[number] for number in draw.permutation(len(rows))]
    return [row["sentence"] for row in sorted(shuffled, key=lambda row: not names & {row["head"], row["tail"]})]


def _instructions(rows: Sequence[dict], draw: Any) -> list[str]:
    shuffled = [rows[number] for number in draw.permutation(len(rows))]
    return [f"{row['instruction']}\n{row['output']}" for row in shuffled if not row["input"]]


def _fitting(texts: Sequence[str], tokenizer: Any, tokens: tuple[int, int], count: int) -> Iterator[str]:
    for text in texts:
        if count and tokens[0] <= len(tokenizer(text)["input_ids"]) <= tokens[1]:
            count -= 1
            yield text


# --- the model ---


class Facts(Seed):
    """The rows, the model that has learnt them and the queries, for the stages of the other tasks."""

    def __init__(self, options: argparse.Namespace, bars: Bars) -> None:
        self.choice, self.training, self.source = options.choice, options.training, options.data
        counts = {"rows": self.choice.facts, "epochs": self.training.epochs, "batch_size": self.training.batch_size}
        counts |= {"Ks": (K,), "shuffles": (20,), "recipes": options.recipes}
        sizes = Sizes(**counts, dtype="float32", template=TEMPLATE, max_length=options.choice.tokens[1])
        task = Task("facts", lambda *_: [], lambda *_: [], lambda *_: [], ())
        super().__init__(task, options.seed, sizes, options.work / "model", options.work / options.name, bars, ())

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """All facts, each with its third paraphrase."""
        file = self.folder / "facts.jsonl"
        if not file.exists():
            rows, facts = make_data(self.source, load_tokenizer(Path(self.model)), self.choice, self.seed)
            write_jsonl(self.folder / "data.jsonl", rows)
            write_jsonl(file, facts)
        return read_jsonl(file)

    @cached_property
    def data(self) -> str:
        """The file of the rows."""
        _ = self.facts
        return str(self.folder / "data.jsonl")

    @cached_property
    def examples(self) -> list[Example]:
        """The rows."""
        return read_examples(self.data).examples

    @cached_property
    def retrainer(self) -> Retrainer:
        """The fine-tuned model in float32; what lies below its adapter is computed once a row."""
        folder = self.folder / "adapter"
        if not folder.exists():
            self._train(folder)
        retrainer = Retrainer(self.model, replace(self.training, dtype="float32"))
        retrainer.restore(folder)
        return retrainer

    def _train(self, folder: Path) -> None:
        """Train on all rows; write the adapter, and AdamW's second moment beside it."""
        template = Template(TEMPLATE, load_tokenizer(Path(self.model)), self.sizes.max_length)
        batches = [as_batch([Item(example, template.encode(example))], "cpu") for example in self.examples]
        retrainer = Retrainer(self.model, self.training)
        rows, started = retrainer.rows(batches), time.perf_counter()
        retrainer.retrain(rows, np.ones(len(rows), bool), self.seed, progress=self.bars)
        self.note(
            "training", {"seconds": time.perf_counter() - started, "loss": float(retrainer.evaluate(rows).mean())}
        )
        moments = [retrainer.optimizer.state[p]["exp_avg_sq"] for p in trainable(retrainer.model).values()]
        steps = len(self.training.batches(len(rows), self.seed))
        np.save(self.folder / "adam.npy", torch.cat([m.flatten() for m in moments]) / (1 - 0.999**steps))
        retrainer.save(folder.with_name("adapter.part"))
        folder.with_name("adapter.part").rename(folder)

    @cached_property
    def adapter(self) -> ModelConfig:
        """The fine-tuned model."""
        _ = self.retrainer
        return ModelConfig(self.model, str(self.folder / "adapter"), device="cpu", dtype="float32")

    @cached_property
    def questions(self) -> list[Batch]:
        """The third paraphrase of every fact, its object alone in the loss, each a batch of one."""
        template = Template(TEMPLATE, load_tokenizer(Path(self.model)), self.sizes.max_length)
        return [encode_query(query, template) for query in map(as_query, self.facts)]

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """For every fact, whether the base and the fine-tuned model answer rightly."""
        file = self.folder / "answers.jsonl"
        if not file.exists():
            tuned = right(self.job.loaded.model, self.questions)
            base = right(load(ModelConfig(self.model, device="cpu", dtype="float32")).model, self.questions)
            write_jsonl(file, [{"base": b, "tuned": t} for b, t in zip(base, tuned, strict=True)])
        return read_jsonl(file)

    @cached_property
    def asked(self) -> list[int]:
        """The facts that are queries: those that fine-tuning taught."""
        learnt = [answer["tuned"] and not answer["base"] for answer in self.answers]
        order = np.random.default_rng([self.seed, 9]).permutation(len(learnt))
        return sorted([int(n) for n in order if learnt[n] or not self.choice.learnt][: self.choice.queries])

    @cached_property
    def queries(self) -> list[TaskQuery]:
        """The texts of the queries."""
        return [as_query(self.facts[number]) for number in self.asked]

    @cached_property
    def query_batches(self) -> list[Batch]:
        """The queries, each a batch of one."""
        return [self.questions[number] for number in self.asked]

    @cached_property
    def task_rows(self) -> Replay:
        """The gradients of all facts' third paraphrases, which stand for the task."""
        return self.gradients_of("task", [([number], batch) for number, batch in enumerate(self.questions)])

    @cached_property
    def truth(self) -> np.ndarray:
        """Which rows state the fact of a query, bool [queries, rows]."""
        facts = np.array([example.meta["fact"] for example in self.examples])
        return np.array(self.asked)[:, None] == facts[None]

    @property
    def size(self) -> int:
        """The entries of a gradient."""
        return self.job.layers[-1].start + self.job.layers[-1].size

    @property
    def last_rate(self) -> float | None:
        """The learning rate of the run's last step; None where no step of the tail-patch is taken."""
        steps = len(self.training.batches(len(self.examples), self.seed))
        return self.training.rate(steps - 1, steps)


class WholeModel(Facts):
    """The same where all parameters are trained, by the package's own `finetune`."""

    last_rate = None

    @cached_property
    def adapter(self) -> ModelConfig:
        """The fine-tuned model."""
        base, folder = ModelConfig(self.model, device="cpu", dtype="float32"), self.folder / "whole"
        done = finetune(read_examples(self.data), self.encoding, base, self.training, folder, progress=self.bars)
        self.note("training", {"seconds": done.seconds, "loss": done.epoch_losses[-1]})
        return replace(base, model=str(folder))


def as_query(fact: dict[str, Any]) -> TaskQuery:
    """Return the query of a fact."""
    return TaskQuery(fact["prompt"], fact["object"], "fact", None, True)


@torch.no_grad()
def right(model: torch.nn.Module, batches: Sequence[Batch]) -> list[bool]:
    """Return whether the model's most likely tokens are those in the loss, all of them."""
    found = []
    for batch in batches:
        said = model(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False).logits[0, :-1]
        wanted = batch.weights[0, 1:] != 0
        found.append(torch.equal(said.argmax(-1)[wanted], batch.input_ids[0, 1:][wanted].long()))
    return found


# --- TrackStar's steps, one after the other ---


def trackstar_scores(facts: Facts) -> Scores:
    """Score two-sided rows with and without each of TrackStar's corrections, and TRAK's on rows of `TRAK_K`.

    `R=WHICH/CORRECTION/unit`: WHICH is none, train or mixed (with the damping, of a block's mean eigenvalue, that the
    package has by default, and `PAPERS_DAMPING`); CORRECTION none, estimate (64 examples) or adam (the optimizer's
    own). As the package does it, R is of rows of length 1.
    """
    layers, size = facts.rows.layers, facts.rows.rows.shape[1]
    moments = {"estimate": facts.factors, "adam": correction(torch.from_numpy(np.load(facts.folder / "adam.npy")))}
    moments["none"] = torch.ones(size)
    scores: Scores = {}
    for name, factors in moments.items():
        projections = {K: TwoSided(layers, SketchConfig(K, seed=facts.seed)) for K in (TRAK_K, R_K)}

        def corrected(layer: Layer, values: Tensor, factors: Tensor = factors) -> Tensor:
            return values * factors[layer.start : layer.start + layer.size]

        sides = [projected(side, projections, corrected)[0] for side in (facts.posed, facts.rows, facts.task_rows)]
        scores[f"R=none/{name}/none"] = (sides[0][R_K] @ sides[1][R_K].T).numpy()
        unit = [F.normalize(side[R_K], dim=1) for side in sides]
        scores[f"R=none/{name}/unit"] = (unit[0] @ unit[1].T).numpy()
        scores |= _whitened(facts, name, *unit)
        if name == "none":
            scores["trak"] = trak(sides[0][TRAK_K], sides[1][TRAK_K])
        facts.bars.say(f"two-sided, correction {name}")
    return scores


def _whitened(facts: Facts, name: str, queries: Tensor, rows: Tensor, task: Tensor) -> Scores:
    """Score rows [n, K] multiplied by R^-1/2 and brought to length 1, for R of the rows and for the mixture."""
    block = block_of(rows.shape[1], len(blocks_of([layer.name for layer in facts.rows.layers])), len(rows) // 5)
    train = mean_outer_products([rows], rows.shape[1], block)
    component = max(1, PAPERS_COMPONENT * rows.shape[1] // PAPERS_K)
    weight = weight_at(component, spectrum(train), spectrum_of_rows(task, block))
    facts.note(f"R {name}", {"block": block, "component": component, "weight": weight})
    scores = {}
    for which, share in (("train", 0.0), ("mixed", weight)):
        for damping in (SpecializeOptions.damping, PAPERS_DAMPING):
            R = train.clone()
            for _ in take_inverse_root(R, task, share, damping):
                pass
            curved = Curvature(R)
            suffix = "" if damping == SpecializeOptions.damping else f"/{damping:g}"
            found = (curved(queries)[0] @ curved(rows)[0].T).numpy()
            scores[f"R={which}/{name}/unit{suffix}"] = found
    return scores


def trak(queries: Tensor, rows: Tensor) -> np.ndarray:
    """Score qᵀ (ΦᵀΦ / n + damping)⁻¹ φ of rows Φ [n, K], as TRAK (arXiv 2303.14186) does for one model."""
    gram = (rows.T @ rows).double() / len(rows)
    gram += PAPERS_DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    return (torch.linalg.solve(gram, queries.double().T).T @ rows.double().T).float().numpy()


# --- curvature of the task, where it costs least ---


def task_scores(facts: Facts) -> Scores:
    """Score whole gradients corrected by `kronecker`, half of whose sample are the task's questions."""
    drawn, half = facts.drawn_sample, len(facts.drawn_sample) // 2
    chosen = np.random.default_rng([facts.seed, 10]).permutation(len(facts.questions))[:half]
    batches = [
        ([place], facts.questions[number].with_drawn_labels(2**20 * facts.seed + int(number)))
        for place, number in enumerate(chosen)
    ]
    task = facts.gradients_of("task-sample", batches)
    scores: Scores = {}
    for name, parts in {"half": (drawn.rows[:half],), "mixed": (drawn.rows[:half], task.rows)}.items():
        bases = of_sample(Replay(drawn.layers, np.concatenate(parts)))
        powers = {f"kronecker-{name}": KRONECKER["kronecker"]}
        found = scores_of(bases, powers, facts.rows, facts.posed, SketchConfig(K, seed=facts.seed), (K,), facts.bars)
        scores |= {method: values for method, values in found.items() if method.startswith("full/")}
    return scores


# --- what the rows do ---


def patched(facts: Facts, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the change of each query's probability after one step on a row, in percentage points; after every rate.

    float32 [rates, queries, rows], NaN where `wanted`, bool [queries, rows], is not set, or not yet. A step is AdamW's
    with the run's second moment and without momentum, from the finished model, on the row's gradient alone. What is in
    the folder is not measured again.
    """
    file = facts.folder / "patched.npy"
    if not file.exists():
        np.save(file, np.full((len(RATES), *wanted.shape), np.nan, np.float32))
    found = np.lib.format.open_memmap(file, "r+")
    patcher = None
    yield found
    for number in RATES_ORDER:
        missing = wanted & np.isnan(found[number])
        rows = np.flatnonzero(missing.any(0))
        for count, row in enumerate(rows, 1):
            patcher, here = patcher or Patcher(facts), np.flatnonzero(missing[:, row])
            found[number, here, row] = patcher(row, here, RATES[number])
            facts.bars(f"tail-patch at {RATES[number]:g} of the last rate", count, len(rows))
        found.flush()
        yield found


class Patcher:
    """Takes a step on one row, measures queries, and puts the weights back."""

    def __init__(self, facts: Facts) -> None:
        self.retrainer, self.gradients = facts.retrainer, facts.rows.rows
        self.queries = self.retrainer.rows(facts.query_batches)
        self.lengths = np.array([int((batch.weights != 0).sum()) for batch in facts.query_batches])
        self.retrainer.losses(self.queries[:1])  # the parameters are named by what is in place
        self.parameters = list(trainable(self.retrainer.model).values())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer_of = adamw(torch.from_numpy(np.load(facts.folder / "adam.npy")))
        self.rate = facts.last_rate
        self.before = self._probabilities(np.arange(len(self.queries)))

    def __call__(self, row: int, here: np.ndarray, factor: float) -> np.ndarray:
        """Return the changes of the queries `here`, float64 [queries], in points, at `factor` times the rate."""
        gradient = torch.from_numpy(np.array(self.gradients[row])).split([p.numel() for p in self.parameters])
        optimizer = self.optimizer_of(self.parameters, factor * self.rate)
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        change = 100 * (self._probabilities(here) - self.before[here])
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.copy_(start)
        return change

    def _probabilities(self, here: np.ndarray) -> np.ndarray:
        return np.exp(-self.lengths[here] * self.retrainer.evaluate([self.queries[number] for number in here]))


# --- what a row costs ---


def costs(facts: Facts) -> dict[str, float]:
    """Return CPU seconds a row, over a few rows, by what is made of them; what is in the folder is not measured again.

    A build with two-sided rows never makes whole gradients; here as there.
    """
    file = facts.folder / "costs.json"
    if not file.exists():
        some = facts.job.items[:COSTED]
        batches = [batch for _, batch in example_batches(some)]
        found = {name: _cpu_seconds(work) / len(some) for name, work in _works(facts, batches).items()}
        found["kronecker"] += found["rapidgrad"]
        found["R"] += found["two-sided"]
        write_text(file, json.dumps(found))
    return json.loads(file.read_text())


def _works(facts: Facts, batches: list[Batch]) -> dict[str, Callable[[], Any]]:
    gradients, model, size = facts.job.gradients, facts.job.loaded.model, facts.rows.rows.shape[1]
    count = sum(len(batch) for batch in batches)
    singles = [batch.example(row) for batch in batches for row in range(len(batch))]
    config = SketchConfig(K, facts.sizes.shuffles[0], facts.seed)
    sketched = compressor_of(gradients, Sketch(size, config), "unit", facts.factors)
    projected_rows = Compressor(gradients, TwoSided(facts.rows.layers, config), normalize="unit")
    bases, kept = of_sample(facts.drawn_sample), torch.from_numpy(np.array(facts.rows.rows[:count]))
    curved, rows = Curvature(torch.randn(K // 128, 128, 128)), torch.randn(count, K)

    def corrected() -> None:
        for layer in facts.rows.layers:
            bases[layer.name].solved(kept[:, layer.start : layer.start + layer.size], 0.5)

    return {
        "hidden states": lambda: representations(model, singles, silent),
        "gradient": lambda: [gradients(batch, lambda *_: None) for batch in batches],
        "rapidgrad": lambda: [sketched(batch) for batch in batches],
        "two-sided": lambda: [projected_rows(batch) for batch in batches],
        "kronecker": corrected,
        "R": lambda: curved(rows),
    }


def _cpu_seconds(work: Callable[[], Any]) -> float:
    work()  # what is made once is not counted
    started = time.process_time()
    work()
    return time.process_time() - started


# --- the figures ---


def table(scores: Scores, truth: np.ndarray, changes: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Return a row a method: bytes, MRR, recall@10 and tail-patch, each with its interval over the queries.

    `less_estimate` has the intervals of the differences from the figures of `estimate`, query by query.
    """
    each = {name: _by_query(values, truth, changes) for name, values in scores.items()}
    drawn = np.random.default_rng(0).integers(0, len(truth), (DRAWS, len(truth)))
    rows = []
    for name, found in each.items():
        row = {
            "method": name,
            "bytes": bytes_of(name, size),
            **{metric: _mean(values, drawn) for metric, values in found.items()},
        }
        if DEFAULT in each:
            less = {metric: _mean(values - each[DEFAULT][metric], drawn) for metric, values in found.items()}
            row["less_estimate"] = less
        rows.append(row)
    return rows


def bytes_of(name: str, size: int) -> int:
    """Return the bytes that a method keeps for a row whose gradient has `size` entries; 0 for texts alone."""
    kind, _, rest = name.partition("/")
    if kind.startswith("K="):
        length = int(kind.removeprefix("K="))
        return (
            length // 8
            if rest.endswith("1bit")
            else length * np.dtype("int8" if "int8" in rest else rest[-7:]).itemsize
        )
    if kind == "product":
        return K
    widths = {"random": 0, "bm25": 0, "perfect": 0, "embedding": 384, "repsim": 576, "rept": 1152, "trak": TRAK_K}
    width = R_K if kind.startswith("R=") else widths.get(kind.removesuffix("-response"), size)
    return 4 * width


def _by_query(values: np.ndarray, truth: np.ndarray, changes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of each query."""
    orders = np.stack([metrics.order_of(one) for one in values])
    found = np.take_along_axis(truth, orders, 1)
    first = found.argmax(1)
    by_query = {"mrr": 1 / (first + 1), "recall": (first < TOP).astype(float)}
    for factor, changed in zip(RATES, changes, strict=True):
        by_query[f"tail_patch_{factor:g}"] = np.take_along_axis(changed, orders[:, :TOP], 1).mean(1).astype(float)
    return by_query


def _mean(values: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """Return the mean and its 95 % interval by the bootstrap; None where it was not measured."""
    if not np.isfinite(values).all():
        return {"mean": None, "interval": None}
    ends = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(end), 4) for end in ends]}


def tops(scores: Scores) -> np.ndarray:
    """Return which rows are among the ten highest of a method, bool [queries, rows]."""
    shape = next(iter(scores.values())).shape
    wanted = np.zeros(shape, bool)
    for values in scores.values():
        for query, one in enumerate(values):
            wanted[query, metrics.order_of(one)[:TOP]] = True
    return wanted


def measure(facts: Facts, options: argparse.Namespace) -> Path:
    """Write the figures of all scores that are there, and again after every rate of the tail-patch.

    What the file holds of the same queries and model stays; without a method in PATCHED no step is taken.
    """
    scores, seconds = of_both_models(facts.folder)
    patch = {name: values for name, values in scores.items() if name in PATCHED and facts.last_rate}
    wanted = tops(patch) | facts.truth if patch else np.zeros_like(facts.truth)
    scores["perfect"] = facts.truth.astype(np.float32)
    before = options.results_folder / f"{options.name}.json"
    earlier = json.loads(before.read_text())["figures"] if before.exists() else {}
    for changes in patched(facts, wanted):
        path = save(options.name, _added(earlier, _figures(facts, scores, seconds, changes)), options)
    return path


SETTING = ("choice", "training", "seed", "rows", "facts", "queries", "right", "relations")
"""The figures that say what was asked, and of which model."""


def _added(earlier: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures and those of `earlier`, which stay, if its queries and its model are the same."""
    if any(earlier.get(name) != figures[name] for name in SETTING):
        return figures
    methods = {row["method"]: row for row in (*figures["methods"], *earlier["methods"])}
    merged = {name: figures[name] | earlier[name] for name in ("seconds", "notes", "cpu_seconds_a_row")}
    if None in figures["tail_patch_of_right_rows"].values():
        merged["tail_patch_of_right_rows"] = earlier["tail_patch_of_right_rows"]
    return figures | merged | {"methods": list(methods.values())}


def _figures(facts: Facts, scores: Scores, seconds: dict[str, float], changes: np.ndarray) -> dict[str, Any]:
    of_right_rows = [float(changed[facts.truth].mean()) for changed in changes]
    of_right_rows = [None if np.isnan(mean) else mean for mean in of_right_rows]
    return {
        "choice": asdict(facts.choice) | {"tokens": list(facts.choice.tokens)},
        "training": asdict(facts.training),
        "seed": facts.seed,
        "rows": len(facts.examples),
        "facts": len(facts.facts),
        "queries": len(facts.asked),
        "right": {name: float(np.mean([a[name] for a in facts.answers])) for name in ("base", "tuned")},
        "relations": dict(Counter(facts.facts[number]["relation"] for number in facts.asked)),
        "last_rate": facts.last_rate,
        "tail_patch_of_right_rows": dict(zip(map(str, RATES), of_right_rows, strict=True)),
        "seconds": seconds,
        "cpu_seconds_a_row": costs(facts) if facts.last_rate else {},
        "notes": json.loads((facts.folder / "notes.json").read_text()),
        "methods": table(scores, facts.truth, changes, facts.size),
    }


OWN: dict[str, Callable[[Facts], Scores]] = {
    "trackstar": trackstar_scores,
    "task": task_scores,
}
"""The stages that the other tasks lack."""
WHOLE = ("text", "representations", "product")
"""The methods of a model all of whose parameters are trained."""


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        unpack_model(options.work / "model", bars)
        facts = (WholeModel if options.full else Facts)(options, bars)
        bars.say(f"{len(facts.examples)} rows, {len(facts.asked)} queries of {len(facts.facts)} facts")
        if not facts.asked:
            raise SystemExit("The model has learnt no fact that the base does not know: train it longer (--epochs).")
        for method in options.only:
            if method in OWN:
                facts.scores(method, lambda make=OWN[method]: make(facts))
            elif method == "product":
                indexes(facts)
            else:
                STAGES[method](facts)
        bars.say(f"written to {measure(facts, options)}")


def parse() -> argparse.Namespace:
    """Read the command line; `choice` and `training` are the settings of the run."""
    add = (options := parser(__doc__)).add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="alpaca_9k.jsonl, pararel and fewrel")
    add("--seed", type=int, default=0, help="draws rows, the order of training and projections")
    add("--full", action="store_true", help="train all parameters")
    add("--only", type=lambda text: tuple(text.split(",")), help="methods to score")
    add("--recipes", type=recipe_names, default=tuple(RECIPES), help="of the product's indexes, with commas between")
    for name in ("facts", "sentences", "instructions"):
        add(f"--{name}", type=int, help="number of them")
    add("--epochs", type=int, help="of fine-tuning")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the frozen weights in fine-tuning")
    given = options.parse_args()
    given.results_folder = results_folder(given)
    choice, training = (SMOKE, SMOKE_TRAINING) if given.smoke else (Choice(), Training())
    changes = {name: getattr(given, name) for name in ("facts", "sentences", "instructions")}
    given.choice = replace(choice, **{name: value for name, value in changes.items() if value is not None})
    if given.full:
        training = replace(FULL, epochs=training.epochs if given.smoke else FULL.epochs, seed=given.seed)
    elif given.dtype:
        training = replace(training, dtype=given.dtype)
    given.training = replace(training, epochs=given.epochs or training.epochs)
    given.only = given.only or (WHOLE if given.full else ORDER)
    given.name = "facts" + "_full" * given.full + f"_{given.seed}" * bool(given.seed)
    return given


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
