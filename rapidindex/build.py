"""The caching stage: every training example of a file to a RapidGrad in the store, batch by batch, resumable.

A build is identified by everything that changes a row: model, adapter, tokenizer, template, data, and every option of
the gradient and of the sketch. The same command again goes on where it stopped; another one is refused.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidindex.config import BuildConfig, EncodingConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.corrections import correction, estimate_second_moment, read_second_moment
from rapidindex.errors import ConfigMismatch, DataError, ModelError, ResourceError, StoreError
from rapidindex.examples import Dataset, Example, read_examples
from rapidindex.gradients import Batch, PerExampleGradients
from rapidindex.index import VectorIndex
from rapidindex.model import LoadedModel, load
from rapidindex.progress import Progress, silent
from rapidindex.rapidgrad import Compressor, RapidGrads
from rapidindex.sketch import Sketch
from rapidindex.store import Store
from rapidindex.templates import Encoding, Template


@dataclass(frozen=True)
class Request:
    """What `rapidindex build` was asked for."""

    data: str
    output: str
    model: ModelConfig
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    work: BuildConfig = field(default_factory=BuildConfig)
    limit: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a build did."""

    index: str
    examples: int
    """In the index now."""
    computed: int
    """Of these, by this run."""
    rejected: int
    """With a gradient that is not finite: listed by `rapidindex info`."""
    skipped: int
    """Rows of the data file that cannot be used: listed by `rapidindex info`."""
    truncated: int
    layers: int
    gradient_size: int
    batched: bool
    """False where the model's gradients had to be computed one example at a time."""
    seconds: float


@dataclass(frozen=True)
class Item:
    """An example on its way to a row."""

    example: Example
    encoding: Encoding

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.encoding.input_ids)


@dataclass(frozen=True)
class Job:
    """A build whose model and data have been read and found to fit together."""

    request: Request
    dataset: Dataset
    loaded: LoadedModel
    gradients: PerExampleGradients
    items: list[Item]
    skipped: list[dict[str, Any]]
    identity: dict[str, Any]


def build(request: Request, *, overwrite: bool = False, progress: Progress = silent) -> Summary:
    """Cache every example of `request.data` that the index does not hold yet; return what was done.

    Raises DataError, ModelError, StoreError or ResourceError before the work starts where it could not end well.
    """
    started = time.perf_counter()
    job = prepare(request, progress)
    store = _open_or_create(job, overwrite=overwrite)
    with store.lock():
        done = store.rows("sentence").done_ids
        todo = [item for item in job.items if item.example.id not in done]
        _check_space(request, len(todo), len(job.gradients.layers))
        if todo:
            _ensure_second_moment(job, store, progress)
            compressor = load_compressor(store, job.loaded, job.gradients)
            cache(todo, compressor, store, request.work, progress)
        rows = store.rows("sentence")
        VectorIndex.update(rows, progress=progress)
    return Summary(
        index=str(request.output),
        examples=int(rows.alive.sum()),
        computed=len(rows.done_ids - done),
        rejected=len(rows.rejected),
        skipped=len(job.skipped),
        truncated=sum(item.encoding.truncated for item in job.items),
        layers=len(job.gradients.layers),
        gradient_size=sum(layer.size for layer in job.gradients.layers),
        batched=job.gradients.batched,
        seconds=time.perf_counter() - started,
    )


def prepare(request: Request, progress: Progress = silent) -> Job:
    """Read the data and the model, and turn every example into token ids."""
    progress("read", 0, 2)
    dataset = read_examples(request.data, limit=request.limit)
    loaded = load(request.model)
    progress("read", 1, 2)
    template = Template(request.encoding.template, loaded.tokenizer, request.encoding.max_length)
    items, skipped = _encode(dataset, template)
    gradients = PerExampleGradients(loaded.model)
    identity = {
        "model": {"path": request.model.model, "fingerprint": loaded.fingerprints["model"]},
        "adapter": {"path": request.model.adapter, "fingerprint": loaded.fingerprints["adapter"]},
        "tokenizer": {"fingerprint": loaded.fingerprints["tokenizer"]},
        "quantize": request.model.quantize,
        "dtype": request.model.dtype,
        "encoding": {**asdict(request.encoding), "fingerprint": template.fingerprint},
        "gradient": asdict(request.gradient),
        "sketch": asdict(request.sketch),
        "data": {"path": request.data, "fingerprint": dataset.fingerprint},
    }
    progress("read", 2, 2)
    return Job(request, dataset, loaded, gradients, items, skipped, identity)


def plan_batches(items: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """Batches of like length, longest first, of at most `batch_tokens` padded tokens (or one example)."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-item.tokens, item.example.id)):
        if batches and batches[-1][0].tokens * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def as_batch(items: Sequence[Item], device: torch.device | str) -> Batch:
    """Examples whose loss is the mean over their response tokens."""
    masks = [item.encoding.response_mask for item in items]
    weights = [mask / mask.sum() for mask in masks]
    return Batch.of([item.encoding.input_ids for item in items], weights, device)


def cache(items: Sequence[Item], compressor: Compressor, store: Store, work: BuildConfig, progress: Progress) -> None:
    """Compute the RapidGrads of `items` and write them as shards of the locked `store`.

    What is finished when the user interrupts is written before KeyboardInterrupt goes on.
    """
    device = next(compressor.gradients.model.parameters()).device
    batches = plan_batches(items, work.batch_tokens)
    total = sum(len(batch) * batch[0].tokens for batch in batches)
    shard, done = _Shard(store, work), 0
    try:
        for batch in batches:
            progress("cache", done, total)
            shard.add(batch, compressor(as_batch(batch, device)))
            done += len(batch) * batch[0].tokens
            if shard.full:
                shard.write()
        progress("cache", done, total)
    finally:
        shard.write()


@dataclass(frozen=True)
class _Part:
    """A batch's share of a shard."""

    rows: np.ndarray
    norms: np.ndarray
    examples: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


class _Shard:
    """Rows on their way into the next shard."""

    def __init__(self, store: Store, work: BuildConfig) -> None:
        self.store, self.work = store, work
        self.rows = store.rows("sentence")
        self._begin()

    def _begin(self) -> None:
        self.parts: list[_Part] = []
        self.bytes = 0
        self.started = time.monotonic()

    def add(self, items: Sequence[Item], found: RapidGrads) -> None:
        """Take a batch; an example whose gradient is not finite is rejected."""
        rows, norms = found.rows.cpu().numpy(), found.norms.cpu().numpy()
        finite = np.isfinite(norms).all(1) & np.isfinite(rows).all(1)
        told = list(zip(items, found.losses.tolist(), finite, strict=True))
        good = [_record(item, loss) for item, loss, ok in told if ok]
        bad = [_rejection(item, loss) for item, loss, ok in told if not ok]
        self.parts.append(_Part(rows[finite], norms[finite], good, bad))  # one step: an interrupt leaves no half batch
        self.bytes += 2 * self.rows.K * len(good)

    @property
    def full(self) -> bool:
        return time.monotonic() - self.started > self.work.shard_seconds or self.bytes >= self.work.shard_bytes

    def write(self) -> None:
        """Write what there is, if anything, and begin anew."""
        if self.parts:
            rows = np.concatenate([part.rows for part in self.parts])
            name = self.rows.write_shard(
                self.rows.next_number(),
                rows=rows,
                norms=np.concatenate([part.norms for part in self.parts]),
                example=np.arange(len(rows), dtype=np.int32),
                position=np.full(len(rows), -1, np.int32),
                token=np.full(len(rows), -1, np.int32),
                examples=[record for part in self.parts for record in part.examples],
                rejected=[record for part in self.parts for record in part.rejected],
            )
            self.store.record_shard("sentence", name)
        self._begin()


def _record(item: Item, loss: float) -> dict[str, Any]:
    example = item.example
    return {
        "id": example.id,
        "line": example.line,
        "messages": [list(turn) for turn in example.messages],
        "response": example.response,
        "meta": example.meta,
        "loss": round(loss, 6),
    }


def _rejection(item: Item, loss: float) -> dict[str, Any]:
    reason = f"its gradient is not finite (loss {loss:.4g})"
    return {"id": item.example.id, "line": item.example.line, "reason": reason}


def _encode(dataset: Dataset, template: Template) -> tuple[list[Item], list[dict[str, Any]]]:
    items, skipped = [], [asdict(row) for row in dataset.skipped]
    for example in dataset.examples:
        encoding = template.encode(example)
        if encoding.response_mask.any():
            items.append(Item(example, encoding))
        else:
            reason = f"the prompt alone has {encoding.prompt_tokens} tokens, and --max-length is {template.max_length}"
            skipped.append({"line": example.line, "reason": reason})
    if not items:
        raise DataError(
            f"{dataset.path} has no example with a response left to learn from.", hint="Give a larger --max-length."
        )
    return items, skipped


def _open_or_create(job: Job, *, overwrite: bool) -> Store:
    path = Path(job.request.output)
    if overwrite and path.exists():
        Store.destroy(path)
    if (path / "manifest.json").exists():
        store = Store.open(path)
        check_identity(store.config, job.identity, path)
        return store
    layers = [{"name": layer.name, "size": layer.size} for layer in job.gradients.layers]
    versions = {name: version(name) for name in ("rapidindex", "torch", "transformers", "peft", "numpy")}
    planned = {"sentence": (job.request.sketch.K, len(job.items))}
    return Store.create(
        path, config=job.identity, layers=layers, versions=versions, skipped=job.skipped, planned=planned
    )


def check_identity(built: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Raise ConfigMismatch, naming the fields, where an index was built from something else. Paths may differ."""
    before, now = dict(_fields(built)), dict(_fields(asked))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not differing:
        return
    told = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in differing)
    hint = "Give the same options to go on with it, another -o, or --overwrite to build it anew."
    if differing == ["data.fingerprint"]:
        told = f"the data file has changed, or is another one (it was {built['data']['path']})"
        hint = f"Add its new rows with: rapidindex add {path} {asked['data']['path']}, or build anew with --overwrite."
    raise ConfigMismatch(f"The index {path} was built differently: {told}.", hint=hint)


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name != "path":
            yield f"{prefix}{name}", value


def _check_space(request: Request, examples: int, layers: int) -> None:
    """Refuse before the work what could not be stored after it."""
    needed = examples * (2 * request.sketch.K + 4 * layers + 1024)
    free = shutil.disk_usage(Path(request.output)).free
    if needed > free:
        raise ResourceError(
            f"{request.output} needs {needed / 2**20:,.0f} MiB for {examples:,} rows; {free / 2**20:,.0f} are free.",
            hint="Free some space, choose another -o, or a smaller -K.",
        )


def load_compressor(store: Store, loaded: LoadedModel, gradients: PerExampleGradients | None = None) -> Compressor:
    """What turns examples and queries into the RapidGrads of this index. StoreError if its second moment is missing."""
    gradients = gradients or PerExampleGradients(loaded.model)
    options = store.config["gradient"]
    factors = None
    if options["second_moment"] != "none":
        moment = store.second_moment()
        if moment is None:
            raise StoreError(
                f"{store.path} has no second moment yet: its build did not get far.",
                hint="Go on with it by giving its rapidindex build command again.",
            )
        factors = correction(torch.tensor(np.asarray(moment), device=loaded.device))
    size = sum(layer.size for layer in gradients.layers)
    sketch = Sketch(size, SketchConfig(**store.config["sketch"]))
    return Compressor(gradients, sketch, normalize=options["normalize"], correction=factors)


def _ensure_second_moment(job: Job, store: Store, progress: Progress) -> None:
    """Compute or read the second moment that the correction takes, unless the store holds it already."""
    how = job.request.gradient.second_moment
    if how == "none" or store.second_moment() is not None:
        return
    if how == "estimate":
        moment = estimate_second_moment(job.gradients, _sample(job, progress))
    else:
        moment = read_second_moment(how, job.loaded.model, job.gradients.layers)
    if not moment.isfinite().all():
        raise ModelError(f"The second moment ({how}) is not finite.", hint="Build with --second-moment none.")
    store.write_second_moment(moment.cpu().numpy())


def _sample(job: Job, progress: Progress) -> Iterator[Batch]:
    """The batches of the examples from which the second moment is estimated: drawn by seed, whatever their order."""
    options = job.request.gradient
    ordered = sorted(job.items, key=lambda item: item.example.id)
    drawn = np.random.default_rng(options.seed).permutation(len(ordered))[: options.moment_examples]
    batches = plan_batches([ordered[number] for number in drawn], job.request.work.batch_tokens)
    for number, batch in enumerate(batches):
        progress("second moment", number, len(batches))
        yield as_batch(batch, job.loaded.device)
    progress("second moment", len(batches), len(batches))
