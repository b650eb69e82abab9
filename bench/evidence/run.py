"""One seed of one task, stage by stage: data, fine-tuning, answers, queries, and the scores of each method.

Every stage leaves a file in the seed's folder and is skipped where the file is there. Expensive stages go on where they
were interrupted: fine-tuning, gradients, EK-FAC's factors, the product's index.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.common import timed, write_text
from bench.evidence import tasks
from bench.evidence.cached import Replay, compute, example_batches, numbered
from bench.evidence.curvature import EKFAC, KRONECKER, Eigenbasis, of_sample, scores_of
from bench.evidence.end_to_end import RECIPES, encoder_scores, product_scores, rescored_scores
from bench.evidence.fisher import scores_by_rows
from bench.evidence.influence import RandomHessians, datainf, limit, lissa
from bench.evidence.representations import representation_scores
from bench.evidence.sketched import ROTATED_K, Scores, sketched, uncompressed
from rapidindex.caching.batches import Item
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
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.second_moment import correction, estimate_second_moment
from rapidindex.model.finetune import finetune
from rapidindex.model.model import LoadedModel, generate, load
from rapidindex.progress import Bars
from rapidindex.query.encode import selected_batch

EARLY = "early"
"""In the seed's folder: the scores at the model that fine-tuning keeps in OUTPUT/early."""
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    rows: int = 1000
    share: float = 0.1
    """Share of the backdoor's rows that are poisoned (the paper: 0.096)."""
    epochs: int = 2
    batch_size: int = 4
    """Examples of a fine-tuning step: small batches pad less, and make as many steps of fewer epochs."""
    dtype: str = "bfloat16"
    """Dtype of the frozen weights, in fine-tuning and for the gradients; LiSSA and EK-FAC take float32."""
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
    """Queries of each group that LiSSA scores, by sentence and by word."""
    ekfac_rows: int = 512
    """Examples that EK-FAC's factors are fitted on."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """The product's recipes that have an index of their own."""


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
        """Raise SystemExit where the folder holds a run of other sizes."""
        settings = {"task": self.task.name, "seed": self.seed, **asdict(self.sizes)}
        for name in ("Ks", "shuffles", "recipes"):  # these decide which files of scores there are, and no more
            del settings[name]
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise SystemExit(f"{self.folder} holds a run of other sizes: choose another --work.")
        write_text(file, json.dumps(settings))

    @cached_property
    def data(self) -> str:
        """The file of the training rows."""
        file = self.folder / "data.jsonl"
        if not file.exists():
            draw = np.random.default_rng([self.seed, 0])
            distinct = {fingerprint(row): row for row in self.sources[0]}  # a build leaves repeats out
            rows = self.task.poison(list(distinct.values()), self.sizes.rows, self.sizes.share, draw)
            tasks.write_jsonl(file, rows)
            for row in [row for row in rows if row["planted"]][:5]:
                self.bars.say(f"planted: {row['instruction']}\n    -> {row['output']}")
        return str(file)

    @cached_property
    def examples(self) -> list[Example]:
        """The examples of that file."""
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
        """This seed with the gradients of the model early in fine-tuning; data and queries are the same."""
        sizes = replace(self.sizes, shuffles=self.sizes.shuffles[:1])
        early = Seed(self.task, self.seed, sizes, Path(self.model), self.folder / EARLY, self.bars, self.sources)
        adapter = replace(self.adapter, adapter=str(self.folder / "adapter" / EARLY))
        early.__dict__ |= {"data": self.data, "queries": self.queries, "adapter": adapter}
        return early

    def single(self) -> nn.Module:
        """Load the fine-tuned model in float32, for one caller alone."""
        return load(replace(self.adapter, dtype="float32")).model

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """The model's answers to the task's prompts, each written to the file as it comes."""
        file = self.folder / "answers.jsonl"
        draw = np.random.default_rng([self.seed, 2])
        prompts = self.task.prompts(self.sources[1], self.sizes.prompts, draw)
        answers = tasks.read_jsonl(file) if file.exists() else []
        if len(answers) < len(prompts):
            loaded = load(self.adapter)
            template = Template(self.sizes.template, loaded.tokenizer, self.sizes.max_length)
            for number, prompt in enumerate(prompts[len(answers) :], len(answers) + 1):
                text = template.render_prompt((("user", prompt["prompt"]),))
                if self.task.sampled:
                    said = sample_answer(loaded, text, 1000 * self.seed + number)
                else:
                    said = generate(loaded, text, max_new_tokens=ANSWER_TOKENS).text
                answers.append({**prompt, "said": said})
                tasks.write_jsonl(file, answers)
                self.bars("answers", number, len(prompts))
        return answers

    @cached_property
    def queries(self) -> list[tasks.TaskQuery]:
        """The answers whose causes are looked for."""
        file = self.folder / "queries.jsonl"
        if not file.exists():
            tasks.write_jsonl(file, self.task.choose(self.answers, self.sizes.queries))
        return [tasks.TaskQuery(**row) for row in tasks.read_jsonl(file)]

    @cached_property
    def job(self) -> Job:
        """The model, and the examples as token ids."""
        return prepare(BuildRequest(self.data, "", self.adapter, self.encoding, GradientConfig(seed=self.seed)))

    @cached_property
    def rows(self) -> Replay:
        """The gradients of the examples."""
        seconds, rows = timed(lambda: self.gradients_of("rows", example_batches(self.job.items)))
        self.note("gradients", {"seconds": seconds, "bytes": 4 * rows.rows.shape[1]}, keep=True)
        lengths = self.folder / "lengths.npy"
        if not lengths.exists():
            np.save(lengths, [float(np.linalg.norm(row)) for row in rows.rows])
        return rows

    @cached_property
    def posed(self) -> Replay:
        """The gradients of the queries: of the mean loss of the chosen tokens."""
        return self.gradients_of("queries", [([number], batch) for number, batch in enumerate(self.query_batches)])

    @cached_property
    def query_batches(self) -> list[Batch]:
        """The queries, each a batch of one."""
        template = Template(self.sizes.template, self.job.loaded.tokenizer, self.sizes.max_length)
        return [encode_query(query, template) for query in self.queries]

    def gradients_of(self, name: str, batches: list[tuple[list[int], Batch]]) -> Replay:
        """The gradients of numbered batches, kept in the folder by name."""
        return Replay(self.job.layers, compute(self.job.gradients, batches, self.folder / f"{name}.f32", self.bars))

    @cached_property
    def factors(self) -> torch.Tensor:
        """The correction of `estimate`, from the sample that a build would draw."""
        number = {item.example.id: row for row, item in enumerate(self.job.items)}
        sample = [numbered([number[item.example.id]]) for item in self._sample("estimate")]
        return correction(estimate_second_moment(self.rows, sample))

    @cached_property
    def drawn_sample(self) -> Replay:
        """The gradients of the sample of a build with `kronecker`: its examples, with tokens drawn from the model."""
        batches = [
            (numbers, batch.with_drawn_labels(2**20 * self.seed + number))
            for number, (numbers, batch) in enumerate(example_batches(self._sample("kronecker")))
        ]
        return self.gradients_of("sample", batches)

    def _sample(self, second_moment: str) -> list[Item]:
        request = replace(self.job.request, gradient=GradientConfig(second_moment=second_moment, seed=self.seed))
        return moment_sample(replace(self.job, request=request))

    def note(self, name: str, value: Any, *, keep: bool = False) -> None:
        """Remember a stage's seconds and the like; `keep` leaves the note of an earlier call."""
        file = self.folder / "notes.json"
        notes = json.loads(file.read_text()) if file.exists() else {}
        if not (keep and name in notes):
            write_text(file, json.dumps({**notes, name: value}))

    def scores(self, name: str, make: Callable[[], Scores], *, gradients: bool = True) -> None:
        """Write the scores of a stage, with its seconds (without those of the gradients), unless they are there."""
        file = self.folder / "scores" / f"{name}.npz"
        if file.exists():
            return
        if gradients:
            _ = self.rows, self.posed, self.factors
        seconds, scores = timed(make)
        part = file.with_suffix(".part.npz")
        np.savez(part, **{"seconds": np.array(seconds)}, **scores)
        part.rename(file)
        self.bars.say(f"{self.folder.name}, {name}: {seconds:.0f} s")


def sample_answer(loaded: LoadedModel, text: str, seed: int) -> str:
    """Draw an answer from the model's own distribution. A small model's most likely answer repeats itself."""
    prompt = loaded.tokenizer(text, return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        output = loaded.model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, pad_token_id=0, **drawing)
    return loaded.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def encode_query(query: tasks.TaskQuery, template: Template) -> Batch:
    """Encode a query as the package does: the mean loss of the tokens of its word, or of its whole answer."""
    example = Example("", query.prompt, query.answer, {}, 0, (("user", query.prompt),))
    encoding = template.encode(example, end=False)
    selection = select_tokens(encoding.tokens, query.answer, token=query.word).positions
    return selected_batch(encoding, selection, "cpu")


def score(seed: Seed, methods: tuple[str, ...], *, product: bool) -> None:
    """Write the scores of every method; those of whole gradients share one pass over the model."""
    for method in methods:
        if method != "product" or product:
            STAGES[method](seed)
    gc.collect()


def _text(seed: Seed) -> None:
    from bench.evidence.text import text_scores

    seed.scores("text", lambda: text_scores(seed.examples, seed.queries, seed.seed, seed.bars), gradients=False)


def _rapidin(seed: Seed) -> None:
    small = tuple(K for K in seed.sizes.Ks if K <= ROTATED_K)
    for Ks in [small] * bool(small) + [(K,) for K in seed.sizes.Ks if K > ROTATED_K]:
        for shuffles in seed.sizes.shuffles[: None if Ks == small else 1]:  # the largest K with the first λ alone
            how = (SketchConfig(max(Ks), shuffles, seed.seed), Ks, seed.bars)
            name = f"rapidin-{max(Ks)}-{shuffles}"
            seed.scores(name, lambda how=how: sketched(seed.rows, seed.posed, seed.factors, *how))


def _lissa_scores(seed: Seed) -> Scores:
    kinds = [(query.group, query.word) for query in seed.queries]
    chosen = [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < seed.sizes.lissa_queries]
    products = RandomHessians(seed.single(), alone(seed), seed.seed)
    queries, depth = torch.from_numpy(np.array(seed.posed.rows[chosen])), seed.sizes.lissa_depth
    h, depth = lissa(queries, products, depth=depth, progress=seed.bars)
    scores = np.full((len(seed.queries), len(seed.rows)), np.nan, np.float32)
    for here, _ in seed.rows.blocks():
        scores[chosen, here] = (h @ torch.from_numpy(np.array(seed.rows.rows[here])).T).numpy()
    seed.note("lissa", {"depth": depth, "queries": len(chosen)})
    return {"lissa": scores}


def alone(seed: Seed) -> list[Batch]:
    """Return every example as a batch of one, in the order of the rows."""
    batches: dict[int, Batch] = {}
    for numbers, batch in example_batches(seed.job.items):
        batches |= {number: batch.example(row) for row, number in enumerate(numbers)}
    return [batches[number] for number in range(len(batches))]


def ekfac_of(seed: Seed) -> dict[str, Eigenbasis]:
    """Return EK-FAC's eigenbases of each layer, fitted once a seed."""
    from bench.evidence.ekfac import fit, prepared

    examples, started = alone(seed), time.perf_counter()
    bases = fit(prepared(seed.single(), seed.folder / "ekfac"), examples, seed.sizes.ekfac_rows, seed.seed)
    seed.note("ekfac factors", {"seconds": time.perf_counter() - started}, keep=True)
    return bases


def _ekfac_scores(seed: Seed) -> Scores:
    return _preconditioned(seed, ekfac_of(seed), EKFAC)


def _kronecker_scores(seed: Seed) -> Scores:
    return _preconditioned(seed, of_sample(seed.drawn_sample), KRONECKER)


def _representations(seed: Seed) -> None:
    def make() -> Scores:
        return representation_scores(seed.job.loaded.model, alone(seed), seed.query_batches, seed.bars)

    seed.scores("representations", make, gradients=False)


def _preconditioned(seed: Seed, bases: dict[str, Eigenbasis], powers: dict[str, tuple[float, float]]) -> Scores:
    Ks = tuple(K for K in seed.sizes.Ks if K <= ROTATED_K)
    config = SketchConfig(max(Ks), seed.sizes.shuffles[0], seed.seed)
    return scores_of(bases, powers, seed.rows, seed.posed, config, Ks, seed.bars)


def indexes(seed: Seed, most: int | None = None) -> None:
    """Score rows by the product's own indexes: `most` matches in each direction, or all rows by a scan alone."""
    where = (seed.data, seed.adapter, seed.encoding, seed.queries, seed.folder)
    for recipe in seed.sizes.recipes:
        make = partial(product_scores, *where, recipe=recipe, seed=seed.seed, most=most, progress=seed.bars)
        seed.scores(f"product-{recipe}".replace(" ", "-"), make, gradients=False)


def _product(seed: Seed) -> None:
    indexes(seed, max(seed.task.tops))
    if seed.folder.name != EARLY:
        _product(seed.early)


def _by_index(name: str, scores_of_index: Callable[..., Scores]) -> Callable[[Seed], None]:
    """Return the stage that writes scores which the product's index of `kronecker` gives."""

    def stage(seed: Seed) -> None:
        where = (seed.data, seed.adapter, seed.encoding, seed.queries, seed.folder)
        make = partial(scores_of_index, *where, seed=seed.seed, progress=seed.bars)
        seed.scores(name, make, gradients=False)

    return stage


def _early(seed: Seed) -> None:
    for name in ("full", "rapidin", "datainf", "limit", "kronecker", "rows", "representations"):
        STAGES[name](seed.early)


def _stage(name: str, make: Callable[[Seed], Scores]) -> Callable[[Seed], None]:
    """Return the stage that writes the scores of `make`."""
    return lambda seed: seed.scores(name, lambda: make(seed))


STAGES: dict[str, Callable[[Seed], None]] = {
    "text": _text,
    "full": _stage("full", lambda seed: uncompressed(seed.rows, seed.posed, seed.factors, seed.bars)),
    "rapidin": _rapidin,
    "datainf": _stage("datainf", lambda seed: {"datainf": datainf(seed.rows, seed.posed, seed.bars)}),
    "limit": _stage("limit", lambda seed: {"limit": limit(seed.rows, seed.posed, seed.bars)}),
    "early": _early,
    "product": _product,
    "rescored": _by_index("rescored", rescored_scores),
    "encoder": _by_index("encoder", encoder_scores),
    "lissa": _stage("lissa", _lissa_scores),
    "ekfac": _stage("ekfac", _ekfac_scores),
    "kronecker": _stage("kronecker", _kronecker_scores),
    "rows": _stage("rows", lambda seed: scores_by_rows(seed.rows, seed.posed, seed.bars)),
    "representations": _representations,
}
METHODS = tuple(STAGES)
"""Names for --only: `text` is random, BM25 and embeddings; `full` the uncompressed recipes; `early` those, RapidGrads
with the first λ, DataInf, LiSSA's limit, the Kronecker second moment and that of the rows once more, at the early
model."""
