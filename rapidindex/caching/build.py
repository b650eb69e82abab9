"""The caching stage: the RapidGrad of every training example, stored; resumable and extensible.

The same command again goes on where it stopped; one with another recipe is refused. `shard_writer.py` is the work of
one process, `workers.py` that of several, `estimate.py` predicts what a build takes.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from rapidindex.caching.actors import RayPool, on_cluster
from rapidindex.caching.batches import Item, padded_tokens
from rapidindex.caching.estimate import check_resources, free_resources, resources_of
from rapidindex.caching.job import (
    Job,
    LevelPlan,
    check_recipe,
    check_tokens,
    map_of_slots,
    plan_levels,
    prepare,
    read_existing,
    same_day,
)
from rapidindex.caching.moment import ensure_second_moment
from rapidindex.caching.shard_writer import STAGES, ShardWriter, cache
from rapidindex.caching.units import Units, worker_specs
from rapidindex.caching.workers import Shared, WorkerPool, compute_with
from rapidindex.config import BuildRequest
from rapidindex.encoder.embed import copy_recipe
from rapidindex.errors import IndexBusy, StoreError, UsageError
from rapidindex.gradients.second_moment import preconditioner_of
from rapidindex.progress import Progress, silent
from rapidindex.recipe import Recipe
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import GRADIENTS, Rows, Store

_PATIENCE = 4 * 3600.0
"""Seconds that a job of several waits for another one to make what they share."""
_PAUSE = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class BuildSummary:
    """What a build did, and what the index holds now."""

    index: str
    examples: int
    """Examples in the index."""
    computed: int
    """Examples that this run computed."""
    tokens: int | None
    """Response tokens with a row of their own; None for a run without token rows."""
    without_tokens: list[str]
    """Data files that were added, and whose examples have no token rows."""
    rejected: int
    """Examples whose gradient is not finite: `rapidindex info` lists them."""
    skipped: int
    """Rows of the data that cannot be used: `rapidindex info` lists them."""
    truncated: list[int]
    """Lines of the data whose example was cut to --max-length."""
    layers: int
    gradient_size: int
    batched: bool
    """False where the model's gradients had to be computed one example at a time."""
    seconds: float
    restored: int = 0
    """Examples that had been removed, and are back."""
    at_work: str = ""
    """The jobs of this build that have not ended: the last one lists what all have written."""
    data: str = ""
    """What was read: of a saved `DatasetDict` the folder of its train split."""


def build(request: BuildRequest, *, overwrite: bool = False, progress: Progress = silent) -> BuildSummary:
    """Cache every example of `request.data` that the index lacks.

    Raises DataError, ModelError, StoreError or ResourceError before the work starts where it could not end well.
    """
    started = time.perf_counter()
    if request.work.part:
        return _build_part(request, request.work.part, overwrite, progress)
    with on_cluster(request) as request:
        return _build(request, started, overwrite, progress)


def _build(request: BuildRequest, started: float, overwrite: bool, progress: Progress) -> BuildSummary:
    store = None if overwrite else read_existing(request)
    with store.lock() if store else nullcontext():  # damaged, busy or read-only is said before the model is loaded
        job = prepare(same_day(request, store), progress)
        if store:
            check_recipe(job, store)
            check_tokens(job, store)
        plans = plan_levels(job, store)
        check_resources(resources_of(job, plans, store), free_resources(job), request.output)
        store = store or _create(job, plans, overwrite=overwrite)
        return cache_levels(store, job, plans, started, progress)


def cache_levels(
    store: Store, job: Job, plans: list[LevelPlan], started: float, progress: Progress, restored: int = 0
) -> BuildSummary:
    """Do the work of `plans`, and bring the search indexes of `store` up to date.

    `started` is the run's start on the clock of `time.perf_counter`; `restored` counts examples put back before.
    """
    with store.lock():
        _make_ready(store, job, plans, progress)
        before = {plan.level: store.rows(plan.level).done_ids for plan in plans}
        batched = [cache_level(store, job, plan, progress) for plan in plans if plan.examples]
        for level in store.levels:
            VectorIndex.update(store.rows(level), progress=progress)
        return _summary(store, job, before, batched, started, restored)


def _build_part(request: BuildRequest, part: tuple[int, int], overwrite: bool, progress: Progress) -> BuildSummary:
    """Do the share of job I of N, `part`, beside the others; the job that ends last lists all shards."""
    started = time.perf_counter()
    if overwrite:
        raise UsageError(
            "--overwrite would delete what the other jobs write.", hint=f"Delete {request.output} before the first job."
        )
    store = read_existing(request)
    if store:
        store.refuse_job(part[0] - 1, part[1])
    job = prepare(same_day(request, store), progress)
    store = _waiting(lambda: _open_ready(job, progress), progress)
    with _waiting(lambda: _joined(store, part), progress):
        mine = replace(job, items=[item for item in job.items if int(item.example.id[:8], 16) % part[1] == part[0] - 1])
        plans = plan_levels(mine, store)
        check_resources(resources_of(mine, plans, store), free_resources(mine), request.output)
        batched = [cache_level(store, mine, plan, progress) for plan in plans if plan.examples]
    before = {plan.level: store.rows(plan.level).done_ids for plan in plans}
    try:
        with store.lock():
            if all(map(store.complete, store.levels)):
                for level in store.levels:
                    VectorIndex.update(store.rows(level), progress=progress)
            at_work = ""
    except IndexBusy as error:
        at_work = error.message
    summary = _summary(store, job, before, batched, started, 0)
    computed = len({item.example.id for plan in plans for item in plan.examples})
    return replace(summary, computed=computed, at_work=at_work)


def _open_ready(job: Job, progress: Progress) -> Store:
    """Open the index, with all that its jobs have in common: one of them makes it. IndexBusy while another one does."""
    store = read_existing(job.request)
    plans = plan_levels(job, store)
    if store is None:
        check_resources(resources_of(job, plans, store), free_resources(job), job.request.output)
        try:
            store = _create(job, plans, overwrite=False)
        except StoreError:
            if not Store.exists(job.request.output):
                raise
            store = Store.open(job.request.output)  # another job was faster
    check_recipe(job, store)
    check_tokens(job, store)
    has_levels = all(plan.level in store.levels and plan.planned <= store.planned(plan.level) for plan in plans)
    if has_levels and not _lacks_common(job, store):
        with suppress(IndexBusy), store.lock():  # lists what jobs have left that were killed, unless others are at work
            return store
        return store
    with store.lock():
        _make_ready(store, job, plans, progress)
    return store


def _lacks_common(job: Job, store: Store) -> bool:
    """Return whether the second moment is missing; of embeddings, the recipe and second moment of their encoder."""
    if not job.embeds:
        return job.request.gradient.second_moment != "none" and store.second_moment() is None
    wanted, path = job.loaded.gradients.second_moment(), store.path / GRADIENTS
    return not Store.exists(path) or (wanted is not None and Store.open(path).second_moment() is None)


def _joined(store: Store, part: tuple[int, int]) -> ExitStack:
    """Be job I of N of `store` until the returned context ends. Raise as `Store.join`."""
    with ExitStack() as stack:
        stack.enter_context(store.join(part[0] - 1, part[1]))
        return stack.pop_all()


def _waiting(attempt: Callable[[], T], progress: Progress) -> T:
    """Return what `attempt` returns, once no other process holds the lock. IndexBusy where that takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return attempt()
        except IndexBusy:
            if time.monotonic() > deadline:
                raise
            progress("wait for another job", 0, 1)
            time.sleep(_PAUSE)


def _make_ready(store: Store, job: Job, plans: list[LevelPlan], progress: Progress) -> None:
    """Give the locked `store` what all rows have in common: the second moment, and the levels of `plans`."""
    if job.embeds:
        copy_recipe(job.loaded.gradients, store.path / GRADIENTS)
    else:
        ensure_second_moment(job, store, progress)
    _extend_levels(store, job, plans)


def cache_level(store: Store, job: Job, plan: LevelPlan, progress: Progress) -> bool:
    """Compute the rows of `plan` into the locked `store`, which has its second moment, by one process or several.

    Return whether gradients were computed in batches. Several processes release the job's model.
    """
    if job.request.work.ray:
        return _cache_on_cluster(store, job, plan, progress)
    if len(plan.devices) > 1:
        return _cache_with_workers(store, job, plan, progress)
    rows, total, done = store.rows(plan.level), plan.tokens, 0

    def report(batch: list[Item]) -> None:
        nonlocal done
        done += padded_tokens(batch)
        progress(STAGES[plan.level], done, total)

    progress(STAGES[plan.level], 0, total)
    moment = {"v": store.second_moment(), "vectors": store.eigenvectors(), "roots": store.roots()}
    compressor = job.model.compressor(job.recipe, **moment, K=plan.K)
    part, parts = store.part
    numbers = itertools.count(rows.next_number(part, parts), parts)
    writer = ShardWriter(
        rows, job.request.work, numbers, lambda name: store.record_shard(plan.level, name), capacity=plan.rows
    )
    cache(plan.units, compressor, writer, report)
    return job.gradients.batched


def _cache_on_cluster(store: Store, job: Job, plan: LevelPlan, progress: Progress) -> bool:
    progress("map", 0, 1)
    shared = {name: tensor.numpy() for name, tensor in _shared_by_workers(store, job, plan).items()}
    job.model.release()
    progress("map", 1, 1)
    specs = worker_specs(plan, store, job.model.config, job.request.work)
    return compute_with(RayPool(Units(plan, store, progress), specs, shared))


def _shared_by_workers(store: Store, job: Job, plan: LevelPlan) -> dict[str, torch.Tensor]:
    """Return the map of the sketch and the factors of the correction, where there are such, as `units.Worker` does."""
    slots, v = map_of_slots(job, plan.K), store.second_moment()
    shared = {} if slots is None else {"slots": slots}
    if v is not None:
        shared["factors"] = preconditioner_of(job.recipe).factors_of(torch.tensor(v), job.layers)
    return shared


def _cache_with_workers(store: Store, job: Job, plan: LevelPlan, progress: Progress) -> bool:
    progress("map", 0, 1)
    job.model.release()
    shared: dict[str, Shared] = {}
    try:
        for name, tensor in _shared_by_workers(store, job, plan).items():
            shared[name] = Shared.copy(tensor)
        progress("map", 1, 1)
        specs = worker_specs(plan, store, job.model.config, job.request.work)
        return compute_with(WorkerPool(Units(plan, store, progress), specs, shared))
    finally:
        for tensor in shared.values():
            tensor.close()


def _create(job: Job, plans: list[LevelPlan], *, overwrite: bool) -> Store:
    path = Path(job.request.output)
    if overwrite and path.exists():
        Store.destroy(path)
    layers = [{"name": layer.name, "size": layer.size} for layer in job.layers]
    versions = {name: version(name) for name in ("rapidindex", "torch", "transformers", "tokenizers", "peft", "numpy")}
    planned = {plan.level: (plan.K, plan.planned) for plan in plans}
    config = job.recipe.to_manifest()
    return Store.create(path, config=config, layers=layers, versions=versions, skipped=job.skipped, planned=planned)


def _extend_levels(store: Store, job: Job, plans: list[LevelPlan]) -> None:
    """Add the levels of `plans` to the locked `store`, and the examples that they are to hold."""
    built = Recipe.from_manifest(store.config)
    if job.recipe.token is not None:
        of = "all" if "all" in (built.tokens_of, job.recipe.tokens_of) else "listed"
        wanted = replace(built, token=job.recipe.token, tokens_of=of)
        if wanted != built:
            store.update_config(wanted.to_manifest())  # first: token rows are never without their options
    for plan in plans:
        if plan.level not in store.levels or plan.planned > store.planned(plan.level):
            store.set_planned(plan.level, plan.planned, K=plan.K)


def _summary(
    store: Store, job: Job, before: dict[str, frozenset[str]], batched: list[bool], started: float, restored: int
) -> BuildSummary:
    rows = {level: store.rows(level) for level in before}
    main = next(iter(rows.values()))
    return BuildSummary(
        index=str(store.path),
        examples=len(main.live_examples),
        computed=len({id for level in rows for id in rows[level].done_ids - before[level]}),
        tokens=int(rows["token"].live_mask.sum()) if "token" in rows else None,
        without_tokens=_without_tokens(store, job, rows),
        rejected=len({record["id"] for level in rows for record in rows[level].rejected}),
        skipped=len(job.skipped),
        truncated=[item.example.line for item in job.items if item.encoding.truncated],
        layers=len(job.layers),
        gradient_size=job.size,
        batched=all(batched) if batched else job.gradients.batched,
        seconds=time.perf_counter() - started,
        restored=restored,
        data=job.recipe.data.path,
    )


def _without_tokens(store: Store, job: Job, rows: dict[str, Rows]) -> list[str]:
    if "token" not in rows or "sentence" not in store.levels or job.request.token_examples is not None:
        return []
    here = {item.example.id for item in job.items}
    lacking = set(store.rows("sentence").ids) - rows["token"].done_ids - store.removed - here
    added: list[dict[str, Any]] = store.config.get("added", [])
    return [source["path"] for source in added] if lacking else []
