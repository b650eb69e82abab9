"""The caching stage: every training example of a file to a RapidGrad in the store, resumable and extensible.

The same command again goes on where it stopped; one with other options is refused (`jobs.py`). What one process
computes is in `caching.py`, several of them in `workers.py`, what a build will take in `room.py` and `estimate.py`.
"""

import itertools
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.caching.batches import Item, padded_tokens
from rapidindex.caching.estimate import (
    check_resources,
    combine,
    estimate_resources,
    free_resources,
    measure_activations,
)
from rapidindex.caching.job import Job, Plan, existing, left, places, prepare
from rapidindex.caching.moment import ensure_second_moment
from rapidindex.caching.shard_writer import STAGES, ShardWriter, cache, load_compressor, load_factors
from rapidindex.caching.workers import Shared, cache_with_workers
from rapidindex.config import BuildRequest
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress, silent
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store


@dataclass(frozen=True)
class BuildSummary:
    """What a build did."""

    index: str
    examples: int
    """In the index now."""
    computed: int
    """Of these, by this run."""
    tokens: int | None
    """Response tokens with a row of their own in the index now; None where none were asked for."""
    without_tokens: list[str]
    """Files of data that were added, and whose examples have rows here but their tokens none."""
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


def build(request: BuildRequest, *, overwrite: bool = False, progress: Progress = silent) -> BuildSummary:
    """Cache every example of `request.data` that the index does not hold yet; return what was done.

    Raises DataError, ModelError, StoreError or ResourceError before the work starts where it could not end well.
    """
    started = time.perf_counter()
    path = Path(request.output)
    if not overwrite and Store.exists(path):
        with Store.open(path).lock():
            pass  # damaged, busy or read-only: better said now than after the model is loaded
    job = prepare(request, progress)
    store = None if overwrite else existing(job)
    check_fits(job, {level: left(job, level, store) for level in request.levels})
    store = store or _create(job, overwrite=overwrite)
    with store.lock():
        widen_levels(store, job)
        return cache_levels(store, job, started, progress)


def widen_levels(store: Store, job: Job) -> None:
    """Make room in the locked `store` for the levels asked for, and for what they are to hold more than before."""
    told = _tokens_told(job.request, store.config.get("tokens_of"))
    if {name: store.config.get(name) for name in told} != told:
        store.update_config(told)  # first: rows of tokens are never without what says which
    for level in job.request.levels:
        known = store.rows(level).done_ids if level in store.levels else frozenset()
        before = store.planned(level) if level in store.levels else -1
        planned = len(known) + len(left(job, level, store))
        if planned > before:
            store.set_planned(level, planned, K=job.request.K(level))


def _tokens_told(request: BuildRequest, before: str | None = None) -> dict[str, Any]:
    """What an index keeps of which tokens it holds, and whether those of all examples or of listed ones."""
    if "token" not in request.levels:
        return {}
    all_of_them = request.token_examples is None or before == "all"
    return {"token": asdict(request.token), "tokens_of": "all" if all_of_them else "listed"}


def cache_levels(store: Store, job: Job, started: float, progress: Progress, restored: int = 0) -> BuildSummary:
    """Compute what the locked `store` lacks, and bring its search indexes up to date; what was done since `started`."""
    before = {level: store.rows(level).done_ids for level in job.request.levels}
    batched = job.gradients.batched
    for level in job.request.levels:
        todo = left(job, level, store)
        if todo:
            batched = fill(store, job, job.plan(level, todo), progress) and batched
    for level in store.levels:
        VectorIndex.update(store.rows(level), progress=progress)
    return _summary(store, job, before, batched, started, restored)


def check_fits(job: Job, todo: dict[str, list[Item]]) -> None:
    """ResourceError, with the numbers, where disk or memory cannot hold what caching `todo`, by level, takes."""
    plans = [job.plan(level, examples) for level, examples in todo.items() if examples]
    if plans:
        activations = measure_activations(job.gradients)
        room = combine([estimate_resources(job, plan, len(places(job, plan)), activations) for plan in plans])
        check_resources(room, free_resources(job), job.request.output)


def fill(store: Store, job: Job, plan: Plan, progress: Progress) -> bool:
    """Compute the rows of `plan` into the locked `store`, by one process or several; whether it was done in batches.

    Several processes release the job's model. Raises as `build` does; `check_fits` comes first.
    """
    ensure_second_moment(job, store, progress)
    where = places(job, plan)
    if len(where) > 1:
        return _fill_with_workers(store, job, plan, where, progress)
    rows, total, done = store.rows(plan.level), plan.tokens, 0

    def cached(batch: list[Item]) -> None:
        nonlocal done
        done += padded_tokens(batch)
        progress(STAGES[plan.level], done, total)

    def finished(name: str) -> None:
        store.record_shard(plan.level, name)

    progress(STAGES[plan.level], 0, total)
    job.hold_model()
    compressor = load_compressor(store, job.loaded, job.gradients, K=plan.K)
    writer = ShardWriter(rows, job.request.work, itertools.count(rows.next_number()), finished, capacity=plan.rows)
    cache(plan.units, compressor, writer, cached)
    return job.gradients.batched


def _fill_with_workers(store: Store, job: Job, plan: Plan, where: list[str], progress: Progress) -> bool:
    progress("map", 0, 1)
    job.release_model()
    slots = Shared.copy(Sketch(job.size, replace(job.request.sketch, K=plan.K)).slots(0, job.size))
    factors = load_factors(store)
    shared_factors = None if factors is None else Shared.copy(factors)
    del factors
    progress("map", 1, 1)
    try:
        request = job.request
        return cache_with_workers(plan, store, request.model, where, request.work, slots, shared_factors, progress)
    finally:
        slots.close()
        if shared_factors is not None:
            shared_factors.close()


def _summary(
    store: Store, job: Job, before: dict[str, frozenset[str]], batched: bool, started: float, restored: int
) -> BuildSummary:
    """What was done since `started` (of `time.perf_counter`), when the levels held `before`."""
    rows = {level: store.rows(level) for level in before}
    main = rows[next(iter(rows))]
    return BuildSummary(
        index=str(store.path),
        examples=len(np.unique(main.example[main.live_mask])),
        computed=len({id for level in rows for id in rows[level].done_ids - before[level]}),
        tokens=int(rows["token"].live_mask.sum()) if "token" in rows else None,
        without_tokens=_without_tokens(store, job),
        rejected=len({record["id"] for level in rows for record in rows[level].rejected}),
        skipped=len(job.skipped),
        truncated=[item.example.line for item in job.items if item.encoding.truncated],
        layers=len(job.layers),
        gradient_size=job.size,
        batched=batched,
        seconds=time.perf_counter() - started,
        restored=restored,
    )


def _without_tokens(store: Store, job: Job) -> list[str]:
    if "token" not in job.request.levels or "sentence" not in store.levels or job.request.token_examples is not None:
        return []
    here = {item.example.id for item in job.items}
    lacking = set(store.rows("sentence").ids) - store.rows("token").done_ids - store.removed - here
    return [source["path"] for source in store.config.get("added", [])] if lacking else []


def _create(job: Job, *, overwrite: bool) -> Store:
    path = Path(job.request.output)
    if overwrite and path.exists():
        Store.destroy(path)
    layers = [{"name": layer.name, "size": layer.size} for layer in job.layers]
    versions = {name: version(name) for name in ("rapidindex", "torch", "transformers", "peft", "numpy")}
    config = {**job.identity, **_tokens_told(job.request)}
    planned = {level: (job.request.K(level), len(job.wanted(level))) for level in job.request.levels}
    return Store.create(path, config=config, layers=layers, versions=versions, skipped=job.skipped, planned=planned)
