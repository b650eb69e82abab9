"""`--dry-run`: what a build will take, from timing a few of its batches. Writes nothing.

The time of a batch is taken to be its padded tokens times a rate that depends on its examples' length.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil
import torch

from rapidindex.caching.activations import measure_activations
from rapidindex.caching.build import existing, left, places
from rapidindex.caching.job import Job, Plan, Request, drawn, prepare
from rapidindex.caching.room import Room, check_room, free_room, held_by, needed_room, together
from rapidindex.caching.shard_writer import Item, as_batch, padded_tokens, plan_batches
from rapidindex.errors import ResourceError
from rapidindex.gradients.eigenbases import Eigenbases, seconds_to_find
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads
from rapidindex.gradients.second_moment import KRONECKER
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress, silent
from rapidindex.store.shards import encode_rows

_PICKS = 5
"""Batches that are timed, from the longest examples to the shortest."""
_REPEATS = 2
_IMPORTS = 4.0
"""Seconds until a worker can load its model (torch and transformers, from a warm disk; two cores)."""


@dataclass(frozen=True)
class Estimate:
    """What a build will take: seconds and bytes, by part."""

    index: str
    examples: int
    """To compute: those that the index does not hold yet."""
    rows: int
    """RapidGrads of these: one an example, one for each of its tokens, or both."""
    tokens: int
    """That the model computes, padding included."""
    workers: int
    seconds: dict[str, float]
    disk: dict[str, int]
    memory: dict[str, int]
    device_memory: dict[str, int]
    """Of the fullest GPU; empty where there is none."""
    free: dict[str, int]
    total_seconds: float
    total_disk: int
    total_memory: int


def estimate(request: Request, *, overwrite: bool = False, progress: Progress = silent) -> Estimate:
    """Read data and model, time a few batches, and predict the build of `request`. Raises as `build` does."""
    started = time.perf_counter()
    job = prepare(request, progress)
    loading = time.perf_counter() - started
    plans = _plans(job, overwrite)
    workers = [len(places(job, plan)) for plan in plans]
    activations = measure_activations(job.gradients)
    room = together([needed_room(job, plan, count, activations) for plan, count in zip(plans, workers, strict=True)])
    free = free_room(job)
    check_room(room, free, request.output)
    timings = [_timed(job, plan, count, progress) for plan, count in zip(plans, workers, strict=True)]
    seconds = {"read data and model": loading}
    for timing, count in zip(timings, workers, strict=True):
        seconds |= timing.seconds(count, loading)
    room = _with_model(room, held_by(job.loaded.model))
    return Estimate(
        index=request.output,
        examples=len({item.example.id for plan in plans for item in plan.examples}),
        rows=sum(plan.rows for plan in plans),
        tokens=sum(plan.tokens for plan in plans),
        workers=max(workers),
        seconds=seconds,
        disk=room.disk,
        memory=room.memory,
        device_memory=room.device,
        free=asdict(free),
        total_seconds=sum(seconds.values()),
        total_disk=sum(room.disk.values()),
        total_memory=sum(room.memory.values()),
    )


def _plans(job: Job, overwrite: bool) -> list[Plan]:
    """What the index does not hold yet, level by level."""
    store = None if overwrite else existing(job)
    todo = {level: left(job, level, store) for level in job.request.levels}
    if not any(todo.values()):
        raise ResourceError(f"{job.request.output} holds all that is asked for already: nothing is left to do.")
    return [job.plan(level, examples) for level, examples in todo.items() if examples]


def _timed(job: Job, plan: Plan, workers: int, progress: Progress) -> "_Timing":
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        return _Timing(job, plan, progress)
    finally:
        torch.set_num_threads(threads)


class _Timing:
    """Seconds of a few batches of a plan, each by its part."""

    def __init__(self, job: Job, plan: Plan, progress: Progress) -> None:
        self.job, self.level = job, plan.level
        self.batches = sorted(plan.batches, key=lambda batch: -batch[0].tokens)
        batches, config = self.batches, replace(job.request.sketch, K=plan.K)
        corrected = job.request.gradient.second_moment != "none"
        factors = torch.ones(job.size, device=job.loaded.device) if corrected else None
        began = time.perf_counter()
        slots = Sketch(job.size, config).slots(0, job.size).to(job.loaded.device)
        self.map = time.perf_counter() - began
        sketch = Sketch(job.size, config, slots)
        bases = None
        if job.eigen_entries:
            bases = Eigenbases(job.layers, torch.zeros(job.eigen_entries, device=job.loaded.device))
        normalize = job.request.gradient.normalize
        self.compressor = Compressor(job.gradients, sketch, normalize=normalize, correction=factors, eigenbases=bases)
        began = time.perf_counter()
        self._compress(batches[0])
        self.first = time.perf_counter() - began  # also compares batched gradients with autograd's
        picks = sorted({round(at) for at in np.linspace(0, len(batches) - 1, _PICKS)})
        self.lengths, self.rates, writing = [], [], []
        for number, pick in enumerate(picks):
            progress("time", number, len(picks))
            cached, written = self._time(batches[pick])
            self.lengths.append(batches[pick][0].tokens)
            self.rates.append(cached / padded_tokens(batches[pick]))
            writing.append(written / len(batches[pick]))
        progress("time", len(picks), len(picks))
        self.writing = float(np.mean(writing))

    def seconds(self, workers: int, loading: float) -> dict[str, float]:
        """By part of the build, after its data and model are read."""
        job, level, parts = self.job, self.level, {}
        passes = {"estimate": 1, KRONECKER: 2}.get(job.request.gradient.second_moment, 0)
        if job.lacks_moment and passes and level == job.request.levels[0]:
            sample = plan_batches(drawn(job), job.request.work.batch_tokens)
            parts["second moment"] = passes * self._of(sample)
            if job.eigen_entries:
                parts["eigenvectors"] = seconds_to_find(job.layers)
        if workers > 1:
            parts[f"start workers, {level}"] = _IMPORTS * max(1, workers / (psutil.cpu_count() or 1)) + loading
        parts[f"map of slots, {level}"] = self.map
        first = max(0.0, self.first - self._of(self.batches[:1]))
        parts[f"cache, {level}"] = self._of(self.batches) / workers + first
        parts[f"write, {level}"] = self.writing * sum(map(len, self.batches)) / workers
        return parts

    def _of(self, batches: Sequence[list[Item]]) -> float:
        order = np.argsort(self.lengths, kind="stable")
        lengths, rates = np.array(self.lengths)[order], np.array(self.rates)[order]
        return sum(padded_tokens(batch) * float(np.interp(batch[0].tokens, lengths, rates)) for batch in batches)

    def _compress(self, batch: list[Item]) -> RapidGrads:
        found = self.compressor(as_batch(batch, self.job.loaded.device))
        found.norms.cpu()  # waits for a GPU
        return found

    def _time(self, batch: list[Item]) -> tuple[float, float]:
        """Seconds for the RapidGrads of a batch, and for its rows' bytes and their checksum."""
        began = time.perf_counter()
        for _ in range(_REPEATS):
            found = self._compress(batch)
        cached = (time.perf_counter() - began) / _REPEATS
        rows = np.nan_to_num(found.rows.cpu().numpy())
        began = time.perf_counter()
        hashlib.sha256(encode_rows(rows)[0].tobytes())
        return cached, time.perf_counter() - began


def _with_model(room: Room, size: int) -> Room:
    """With the model that is loaded already."""
    where = room.device or room.memory
    where = {**where, "model": where.get("model", 0) + size}
    return replace(room, device=where) if room.device else replace(room, memory=where)
