"""One seed of one task, stage by stage: data, fine-tuning, answers, queries, each method's scores.

Every stage leaves a file in the seed's folder and is skipped where that is there; what is expensive goes on where it
was interrupted (fine-tuning, gradients, EK-FAC's factors, the product's index).
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.evidence import tasks
from bench.evidence.cached import Replay, compute, example_batches, numbered
from bench.evidence.curvature import EKFAC, KRONECKER, Eigenbasis, of_sample, scores_of
from bench.evidence.sketched import ROTATED_K, Scores, sketched, uncompressed
from rapidindex.caching.job import Job, prepare
from rapidindex.caching.moment import moment_sample
from rapidindex.config import (
    BuildRequest,
    EncodingConfig,
    FinetuneConfig,
    GradientConfig,
    ModelConfig,
    SketchConfig,
    fingerprint,
)
from rapidindex.data.examples import Example, read_examples
from rapidindex.data.templates import Template
from rapidindex.data.tokens import select_tokens
from rapidindex.gradients.losses import Batch, with_drawn_labels
from rapidindex.gradients.second_moment import correction, estimate_second_moment
from rapidindex.model.finetune import finetune
from rapidindex.model.model import LoadedModel, generate, load
from rapidindex.progress import Bars

METHODS = ("text", "full", "rapidin", "datainf", "limit", "early", "product", "lissa", "ekfac", "kronecker")
"""Names for --only: `text` is random, BM25 and embeddings; `full` the uncompressed recipes; `early` those, RapidGrads
with the first λ, DataInf, LiSSA's limit and the Kronecker second moment once more, at the model that fine-tuning keeps
in OUTPUT/early."""
EARLY = "early"
"""Of the seed's folder: what is computed at that model."""

ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Sizes:
    """What a run is sized by."""

    rows: int = 1000
    share: float = 0.1
    """Of the backdoor's rows, poisoned (the paper: 0.096)."""
    epochs: int = 2
    batch_size: int = 4
    """Of fine-tuning: small ones pad less, and make as many steps of fewer epochs."""
    dtype: str = "bfloat16"
    """Of the frozen weights, in fine-tuning and for the gradients; LiSSA and EK-FAC take float32."""
    template: str = "plain"
    max_length: int = 256
    prompts: int = 40
    """Backdoor questions answered with the trigger, and as many without."""
    queries: int = 10
    """Queries of each group (the backdoor, or a pair of countries)."""
    Ks: tuple[int, ...] = (2**10, 2**12, 2**14, 2**16, 2**20)
    shuffles: tuple[int, ...] = (20, 100)
    lissa_depth: int = 30
    lissa_queries: int = 5
    """Of each group, and of sentences and words alike."""
    ekfac_rows: int = 512
    """Examples that EK-FAC's factors are fitted on."""


SMOKE = Sizes(rows=32, share=0.25, epochs=2, prompts=3, queries=2, Ks=(2**10, 2**16), shuffles=(20,))
SMOKE = replace(SMOKE, lissa_depth=2, lissa_queries=1, ekfac_rows=16)


class Seed:
    """One seed of one task in its folder."""

    def __init__(
        self, task: tasks.Task, seed: int, sizes: Sizes, model: Path, folder: Path, bars: Bars, sources: tuple
    ) -> None:
        self.task, self.seed, self.sizes, self.model = task, seed, sizes, str(model)
        self.folder, self.bars, self.sources = folder, bars, sources
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        self._check_settings()

    def _check_settings(self) -> None:
        """SystemExit where the folder holds a run of other sizes."""
        settings = {"task": self.task.name, "seed": self.seed, **asdict(self.sizes)}
        for scored in ("Ks", "shuffles"):  # which files of scores there are to be, and no more
            del settings[scored]
        settings = json.loads(json.dumps(settings))
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise SystemExit(f"{self.folder} holds a run of other sizes: choose another --work.")
        tasks.write_text(file, json.dumps(settings))

    @cached_property
    def data(self) -> str:
        """The training rows' file."""
        file = self.folder / "data.jsonl"
        if not file.exists():
            draw = np.random.default_rng([self.seed, 0])
            rows = self.task.poison(_distinct(self.sources[0]), self.sizes.rows, self.sizes.share, draw)
            tasks.write_jsonl(file, rows)
            for row in [row for row in rows if row["planted"]][:5]:
                self.bars.say(f"planted: {row['instruction']}\n    -> {row['output']}")
        return str(file)

    @cached_property
    def examples(self) -> list[Example]:
        """What the product reads in that file."""
        return read_examples(self.data).examples

    @cached_property
    def encoding(self) -> EncodingConfig:
        """How examples become tokens."""
        return EncodingConfig(self.sizes.template, self.sizes.max_length)

    @cached_property
    def adapter(self) -> ModelConfig:
        """The fine-tuned model."""
        folder = self.folder / "adapter"
        options = FinetuneConfig(epochs=self.sizes.epochs, batch_size=self.sizes.batch_size, seed=self.seed)
        base = ModelConfig(self.model, device="cpu", dtype=self.sizes.dtype)
        done = finetune(read_examples(self.data), self.encoding, base, options, folder, progress=self.bars)
        self.note("finetune", {"seconds": done.seconds, "losses": done.epoch_losses, "rows": done.examples})
        return replace(base, adapter=str(folder))

    @cached_property
    def early(self) -> "Seed":
        """This seed with the gradients of the model as it was early in fine-tuning; data and queries are the same."""
        sizes = replace(self.sizes, shuffles=self.sizes.shuffles[:1])
        found = Seed(self.task, self.seed, sizes, Path(self.model), self.folder / EARLY, self.bars, self.sources)
        adapter = replace(self.adapter, adapter=str(self.folder / "adapter" / EARLY))
        found.__dict__ |= {"data": self.data, "queries": self.queries, "adapter": adapter}
        return found

    def single(self) -> nn.Module:
        """The fine-tuned model in float32, one of the caller's own."""
        return load(replace(self.adapter, dtype="float32")).model

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """What the model says to the task's prompts; one after another into the file."""
        file = self.folder / "answers.jsonl"
        draw = np.random.default_rng([self.seed, 2])
        prompts = self.task.prompts(self.sources[1], self.sizes.prompts, draw)
        found = tasks.read_jsonl(file) if file.exists() else []
        if len(found) < len(prompts):
            loaded = load(self.adapter)
            template = Template(self.sizes.template, loaded.tokenizer, self.sizes.max_length)
            for number, prompt in enumerate(prompts[len(found) :], len(found) + 1):
                text = template.render_prompt((("user", prompt["prompt"]),))
                if self.task.sampled:
                    said = sampled(loaded, text, 1000 * self.seed + number)
                else:
                    said = generate(loaded, text, max_new_tokens=ANSWER_TOKENS).text
                found.append({**prompt, "said": said})
                tasks.write_jsonl(file, found)
                self.bars("answers", number, len(prompts))
        return found

    @cached_property
    def queries(self) -> list[tasks.QueryInfo]:
        """The answers whose causes are asked for."""
        file = self.folder / "queries.jsonl"
        if not file.exists():
            tasks.write_jsonl(file, self.task.choose(self.answers, self.sizes.queries))
        return [tasks.QueryInfo(**row) for row in tasks.read_jsonl(file)]

    @cached_property
    def job(self) -> Job:
        """The model and the examples as token ids."""
        return prepare(BuildRequest(self.data, "", self.adapter, self.encoding, GradientConfig(seed=self.seed)))

    @cached_property
    def query_batches(self) -> list[Batch]:
        """The queries as the product poses them: the mean loss of the chosen tokens."""
        template = Template(self.sizes.template, self.job.loaded.tokenizer, self.sizes.max_length)
        return [_posed(query, template) for query in self.queries]

    @cached_property
    def rows(self) -> Replay:
        """The examples' gradients."""
        batches, started = example_batches(self.job.items), time.perf_counter()
        found = compute(self.job.gradients, batches, self.folder / "rows.f32", self.bars)
        self.note("gradients", {"seconds": time.perf_counter() - started, "bytes": 4 * found.shape[1]}, keep=True)
        lengths = self.folder / "lengths.npy"
        if not lengths.exists():
            np.save(lengths, [float(np.linalg.norm(row)) for row in found])
        return Replay(self.job.layers, found)

    @cached_property
    def posed(self) -> Replay:
        """The queries' gradients."""
        batches = [([number], batch) for number, batch in enumerate(self.query_batches)]
        return Replay(self.job.layers, compute(self.job.gradients, batches, self.folder / "queries.f32", self.bars))

    @cached_property
    def factors(self) -> torch.Tensor:
        """The product's correction, from the rows that it would draw."""
        number = {item.example.id: row for row, item in enumerate(self.job.items)}
        return correction(
            estimate_second_moment(self.rows, [numbered([number[i.example.id]]) for i in moment_sample(self.job)])
        )

    def note(self, name: str, value: Any, *, keep: bool = False) -> None:
        """Remember a stage's seconds and the like; `keep` leaves what an earlier call noted."""
        file = self.folder / "notes.json"
        notes = json.loads(file.read_text()) if file.exists() else {}
        if not (keep and name in notes):
            tasks.write_text(file, json.dumps({**notes, name: value}))

    def scores(self, name: str, make: Callable[[], Scores], *, gradients: bool = True) -> None:
        """Write the scores of a stage, with its seconds (those of the whole gradients apart), unless they are there."""
        file = self.folder / "scores" / f"{name}.npz"
        if file.exists():
            return
        if gradients:
            _ = self.rows, self.posed, self.factors
        started = time.perf_counter()
        found = make()
        part = file.with_suffix(".part.npz")
        np.savez(part, **{"seconds": np.array(time.perf_counter() - started)}, **found)
        part.rename(file)
        self.bars.say(f"{self.folder.name}, {name}: {time.perf_counter() - started:.0f} s")


def sampled(loaded: LoadedModel, text: str, seed: int) -> str:
    """An answer drawn from the model's own distribution. A small model's most likely answer repeats itself."""
    prompt = loaded.tokenizer(text, return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = loaded.model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **drawing)
    return loaded.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _distinct(rows: list[dict]) -> list[dict]:
    """Rows without exact repeats, which the product would leave out."""
    return list({fingerprint(row): row for row in rows}.values())


def _posed(query: tasks.QueryInfo, template: Template) -> Batch:
    messages = (("user", query.prompt),)
    encoding = template.encode(Example("", query.prompt, query.answer, {}, 0, messages), end=False)
    chosen = select_tokens(encoding.tokens, query.answer, token=query.word)
    weights = np.zeros(len(encoding.input_ids), np.float32)
    weights[np.flatnonzero(encoding.response_mask)[chosen]] = 1 / len(chosen)
    return Batch.of([encoding.input_ids], [weights])


def score(seed: Seed, methods: tuple[str, ...], *, product: bool) -> None:
    """Every method's scores; those that need the whole gradients share one pass over the model."""
    for method in methods:
        if method != "product" or product:
            STAGES[method](seed)
    gc.collect()


def _text(seed: Seed) -> None:
    from bench.evidence.text import text_scores

    seed.scores("text", lambda: text_scores(seed.examples, seed.queries, seed.seed, seed.bars), gradients=False)


def _full(seed: Seed) -> None:
    seed.scores("full", lambda: uncompressed(seed.rows, seed.posed, seed.factors, seed.bars))


def _rapidin(seed: Seed) -> None:
    small = tuple(K for K in seed.sizes.Ks if K <= ROTATED_K)
    groups = [small] * bool(small) + [(K,) for K in seed.sizes.Ks if K > ROTATED_K]
    for Ks in groups:
        for shuffles in seed.sizes.shuffles[: None if Ks == small else 1]:  # the largest K with the first λ alone
            config = SketchConfig(max(Ks), shuffles, seed.seed)
            seed.scores(
                f"rapidin-{max(Ks)}-{shuffles}",
                lambda config=config, Ks=Ks: sketched(seed.rows, seed.posed, seed.factors, config, Ks, seed.bars),
            )


def _datainf(seed: Seed) -> None:
    from bench.evidence.influence import datainf

    seed.scores("datainf", lambda: {"datainf": datainf(seed.rows, seed.posed, seed.bars)})


def _limit(seed: Seed) -> None:
    from bench.evidence.influence import limit

    seed.scores("limit", lambda: {"limit": limit(seed.rows, seed.posed, seed.bars)})


def _early(seed: Seed) -> None:
    for stage in (_full, _rapidin, _datainf, _limit, _kronecker):
        stage(seed.early)


def _lissa(seed: Seed) -> None:
    seed.scores("lissa", lambda: _lissa_scores(seed))


def _lissa_scores(seed: Seed) -> Scores:
    from bench.evidence.influence import RandomHessians, lissa

    chosen, counts = [], {}
    for number, query in enumerate(seed.queries):
        key = (query.group, query.word)
        counts[key] = counts.get(key, 0) + 1
        chosen += [number] * (counts[key] <= seed.sizes.lissa_queries)
    alone = [batch.example(row) for _, batch in example_batches(seed.job.items) for row in range(len(batch))]
    products, done = RandomHessians(seed.single(), alone, seed.seed), 0

    def counted(vectors: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        seed.bars("LiSSA", done, seed.sizes.lissa_depth)
        return products(vectors)

    h, depth = lissa(torch.from_numpy(np.array(seed.posed.rows[chosen])), counted, depth=seed.sizes.lissa_depth)
    found = np.full((len(seed.queries), len(seed.rows)), np.nan, np.float32)
    for here, _ in seed.rows.blocks():
        found[chosen, here] = (h @ torch.from_numpy(np.array(seed.rows.rows[here])).T).numpy()
    seed.note("lissa", {"depth": depth, "queries": len(chosen)})
    return {"lissa": found}


def _ekfac(seed: Seed) -> None:
    seed.scores("ekfac", lambda: _ekfac_scores(seed))


def _ekfac_scores(seed: Seed) -> Scores:
    from bench.evidence.ekfac import fit, prepared

    batches: dict[int, Batch] = {}
    for numbers, batch in example_batches(seed.job.items):
        batches |= {number: batch.example(row) for row, number in enumerate(numbers)}
    examples, started = [batches[number] for number in range(len(batches))], time.perf_counter()
    bases = fit(prepared(seed.single(), seed.folder / "ekfac"), examples, seed.sizes.ekfac_rows, seed.seed)
    seed.note("ekfac factors", {"seconds": time.perf_counter() - started}, keep=True)
    return _corrected(seed, bases, EKFAC)


def _kronecker(seed: Seed) -> None:
    def make() -> Scores:
        batches = [
            (numbers, with_drawn_labels(seed.job.loaded.model, batch, 2**20 * seed.seed + number))
            for number, (numbers, batch) in enumerate(example_batches(moment_sample(seed.job)))
        ]
        sample = compute(seed.job.gradients, batches, seed.folder / "sample.f32", seed.bars)
        return _corrected(seed, of_sample(Replay(seed.job.layers, sample)), KRONECKER)

    seed.scores("kronecker", make)


def _corrected(seed: Seed, bases: dict[str, Eigenbasis], powers: dict[str, tuple[float, float]]) -> Scores:
    Ks = tuple(K for K in seed.sizes.Ks if K <= ROTATED_K)
    config = SketchConfig(max(Ks), seed.sizes.shuffles[0], seed.seed)
    return scores_of(bases, powers, seed.rows, seed.posed, config, Ks, seed.bars)


def _product(seed: Seed) -> None:
    from bench.evidence.product import RECIPES, product_scores

    finished = seed.folder.name != EARLY

    def make() -> Scores:
        where = (seed.data, seed.adapter, seed.encoding, seed.queries, seed.folder)
        how = {"recipes": tuple(RECIPES) if finished else ("default",), "seed": seed.seed, "most": max(seed.task.tops)}
        found = product_scores(*where, **how, progress=seed.bars)
        return {name: values.astype(np.float32) for name, values in found.items()}

    seed.scores("product", make, gradients=False)
    if finished:
        _product(seed.early)


STAGES = dict(
    zip(
        METHODS,
        (_text, _full, _rapidin, _datainf, _limit, _early, _product, _lissa, _ekfac, _kronecker),
        strict=True,
    )
)
