"""The caching stage: every training example of a file to a RapidGrad in the store, resumable and extensible.

The same command again goes on where it stopped; one with other options is refused (`jobs.py`). What one process
computes is in `caching.py`, several of them in `workers.py`, what a build will take in `room.py` and `estimate.py`.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rapidindex.caching import (
    Item,
    ShardWriter,
    as_batch,
    cache,
    load_compressor,
    load_factors,
    padded_tokens,
    plan_batches,
)
from rapidindex.corrections import estimate_second_moment, read_second_moment
from rapidindex.errors import ModelError
from rapidindex.gradients import Batch
from rapidindex.index import VectorIndex
from rapidindex.jobs import Job, Request, check_identity, drawn, prepare
from rapidindex.progress import Progress, silent
from rapidindex.room import check_room, free_room, needed_room
from rapidindex.sketch import Sketch
from rapidindex.store import Store
from rapidindex.workers import Shared, cache_with_workers, devices

__all__ = [
    "Item",
    "Job",
    "Request",
    "Summary",
    "as_batch",
    "build",
    "check_fits",
    "check_identity",
    "fill",
    "load_compressor",
    "plan_batches",
    "prepare",
]


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
    truncated: list[int]
    """Lines of the data file whose example was cut to --max-length."""
    layers: int
    gradient_size: int
    batched: bool
    """False where the model's gradients had to be computed one example at a time."""
    seconds: float
    restored: int = 0
    """Examples that had been removed, and are back."""


def build(request: Request, *, overwrite: bool = False, progress: Progress = silent) -> Summary:
    """Cache every example of `request.data` that the index does not hold yet; return what was done.

    Raises DataError, ModelError, StoreError or ResourceError before the work starts where it could not end well.
    """
    started = time.perf_counter()
    path = Path(request.output)
    if not overwrite and (path / "manifest.json").exists():
        with Store.open(path).lock():
            pass  # damaged, busy or read-only: better said now than after the model is loaded
    job = prepare(request, progress)
    batched = job.gradients.batched
    store = None if overwrite or not (path / "manifest.json").exists() else _matching(job)
    held = store.rows("sentence").done_ids if store else frozenset()
    check_fits(job, [item for item in job.items if item.example.id not in held])
    store = store or _create(job, overwrite=overwrite)
    with store.lock():
        done = store.rows("sentence").done_ids
        todo = [item for item in job.items if item.example.id not in done]
        if todo:
            batched = fill(store, job, todo, progress)
        VectorIndex.update(store.rows("sentence"), progress=progress)
        return summary(store, job, done, batched, started)


def check_fits(job: Job, todo: Sequence[Item]) -> None:
    """ResourceError, with the numbers, where disk or memory cannot hold what caching `todo` takes."""
    if todo:
        batches = plan_batches(todo, job.request.work.batch_tokens)
        check_room(needed_room(job, todo, batches, len(_places(job, batches))), free_room(job), job.request.output)


def _places(job: Job, batches: Sequence[list[Item]]) -> list[str]:
    """The device of each process: no more of them than there are batches."""
    return devices(job.loaded.device, job.request.model.device, min(job.request.work.workers, len(batches)))


def fill(store: Store, job: Job, todo: Sequence[Item], progress: Progress) -> bool:
    """Compute the rows of `todo` into the locked `store`, by one process or several; whether it was done in batches.

    Several processes release the job's model. Raises as `build` does; `check_fits` comes first.
    """
    work = job.request.work
    batches = plan_batches(todo, work.batch_tokens)
    places = _places(job, batches)
    _ensure_second_moment(job, store, progress)
    if len(places) > 1:
        return _fill_with_workers(store, job, batches, places, progress)
    rows, total, done = store.rows("sentence"), sum(map(padded_tokens, batches)), 0

    def cached(batch: list[Item]) -> None:
        nonlocal done
        done += padded_tokens(batch)
        progress("cache", done, total)

    def finished(name: str) -> None:
        store.record_shard("sentence", name)

    progress("cache", 0, total)
    compressor = load_compressor(store, job.loaded, job.gradients)
    writer = ShardWriter(rows, work, itertools.count(rows.next_number()), finished, capacity=len(todo))
    cache(batches, compressor, writer, cached)
    return job.gradients.batched


def _fill_with_workers(
    store: Store, job: Job, batches: list[list[Item]], places: list[str], progress: Progress
) -> bool:
    progress("map", 0, 1)
    job.release_model()
    slots = Shared.copy(Sketch(job.size, job.request.sketch).slots(0, job.size))
    factors = load_factors(store)
    shared_factors = None if factors is None else Shared.copy(factors)
    del factors
    progress("map", 1, 1)
    try:
        request = job.request
        return cache_with_workers(batches, store, request.model, places, request.work, slots, shared_factors, progress)
    finally:
        slots.close()
        if shared_factors is not None:
            shared_factors.close()


def summary(
    store: Store, job: Job, done_before: frozenset[str], batched: bool, started: float, restored: int = 0
) -> Summary:
    """What was done since `started` (of `time.perf_counter`), when the store held `done_before`."""
    rows = store.rows("sentence")
    return Summary(
        index=str(store.path),
        examples=int(rows.alive.sum()),
        computed=len(rows.done_ids - done_before),
        rejected=len(rows.rejected),
        skipped=len(job.skipped),
        truncated=[item.example.line for item in job.items if item.encoding.truncated],
        layers=len(job.layers),
        gradient_size=job.size,
        batched=batched,
        seconds=time.perf_counter() - started,
        restored=restored,
    )


def _matching(job: Job) -> Store:
    """The index that is there already; ConfigMismatch where it was built from something else."""
    store = Store.open(job.request.output)
    check_identity(store.config, job.identity, store.path)
    return store


def _create(job: Job, *, overwrite: bool) -> Store:
    path = Path(job.request.output)
    if overwrite and path.exists():
        Store.destroy(path)
    layers = [{"name": layer.name, "size": layer.size} for layer in job.layers]
    versions = {name: version(name) for name in ("rapidindex", "torch", "transformers", "peft", "numpy")}
    planned = {"sentence": (job.request.sketch.K, len(job.items))}
    return Store.create(
        path, config=job.identity, layers=layers, versions=versions, skipped=job.skipped, planned=planned
    )


def _ensure_second_moment(job: Job, store: Store, progress: Progress) -> None:
    """Compute or read the second moment that the correction takes, unless the store holds it already."""
    how = job.request.gradient.second_moment
    if how == "none" or store.second_moment() is not None:
        return
    if how == "estimate":
        moment = estimate_second_moment(job.gradients, _sample(job, progress))
    else:
        moment = read_second_moment(how, job.loaded.model, job.layers)
    if not moment.isfinite().all():
        raise ModelError(f"The second moment ({how}) is not finite.", hint="Build with --second-moment none.")
    store.write_second_moment(moment.cpu().numpy())


def _sample(job: Job, progress: Progress) -> Iterator[Batch]:
    """The batches of the examples from which the second moment is estimated."""
    batches = plan_batches(drawn(job), job.request.work.batch_tokens)
    for number, batch in enumerate(batches):
        progress("second moment", number, len(batches))
        yield as_batch(batch, job.loaded.device)
    progress("second moment", len(batches), len(batches))
