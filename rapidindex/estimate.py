"""`--dry-run`: what a build will take, from timing a few of its batches. Writes nothing.

The time of a batch is taken to be its padded tokens times a rate that depends on its examples' length.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from rapidindex.caching import Item, as_batch, padded_tokens, plan_batches
from rapidindex.errors import ResourceError
from rapidindex.jobs import Job, Request, check_identity, drawn, prepare
from rapidindex.progress import Progress, silent
from rapidindex.rapidgrad import Compressor, RapidGrads
from rapidindex.room import Free, Room, check_room, free_room, held_by, needed_room
from rapidindex.sketch import Sketch
from rapidindex.store import Store
from rapidindex.store.shards import encode_rows
from rapidindex.workers import devices

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
    tokens: int
    """Of these, padding included."""
    workers: int
    seconds: dict[str, float]
    disk: dict[str, int]
    memory: dict[str, int]
    device_memory: dict[str, int]
    """Of the fullest GPU; empty where there is none."""
    free: dict[str, int]
    loaded: int
    """Bytes of the model, held already when the free memory was counted."""
    total_seconds: float
    total_disk: int
    total_memory: int

    def check(self) -> None:
        """ResourceError, with the numbers, where the build would not fit."""
        on_top = _with_model(Room(self.disk, self.memory, self.device_memory), -self.loaded)
        check_room(on_top, Free(**self.free), self.index)


def estimate(request: Request, *, overwrite: bool = False, progress: Progress = silent) -> Estimate:
    """Read data and model, time a few batches, and predict the build of `request`. Raises as `build` does."""
    started = time.perf_counter()
    job = prepare(request, progress)
    loading = time.perf_counter() - started
    todo = job.items if overwrite else _left(job)
    batches = plan_batches(todo, request.work.batch_tokens)
    places = devices(job.loaded.device, request.model.device, max(1, min(request.work.workers, len(batches))))
    room, free = needed_room(job, todo, batches, len(places)), free_room(job)
    check_room(room, free, request.output)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // len(places)))
    try:
        timing = _Timing(job, batches, progress)
    finally:
        torch.set_num_threads(threads)
    seconds = {"read data and model": loading, **timing.seconds(len(places), loading)}
    loaded = held_by(job.loaded.model)
    room = _with_model(_with_activations(room, timing.activations, len(places)), loaded)
    return Estimate(
        index=request.output,
        examples=len(todo),
        tokens=sum(map(padded_tokens, batches)),
        workers=len(places),
        seconds=seconds,
        disk=room.disk,
        memory=room.memory,
        device_memory=room.device,
        free=asdict(free),
        loaded=loaded,
        total_seconds=sum(seconds.values()),
        total_disk=sum(room.disk.values()),
        total_memory=sum(room.memory.values()),
    )


def _left(job: Job) -> list[Item]:
    """The examples that the index does not hold yet."""
    path = Path(job.request.output)
    if not (path / "manifest.json").exists():
        return job.items
    store = Store.open(path)
    check_identity(store.config, job.identity, path)
    done = store.rows("sentence").done_ids
    left = [item for item in job.items if item.example.id not in done]
    if not left:
        raise ResourceError(f"{path} holds every example already: nothing is left to do.")
    return left


class _Timing:
    """Seconds of a few batches of a job, each by its part, and the memory that the longest one took."""

    def __init__(self, job: Job, batches: Sequence[list[Item]], progress: Progress) -> None:
        self.job, self.batches = job, batches
        corrected = job.request.gradient.second_moment != "none"
        factors = torch.ones(job.size, device=job.loaded.device) if corrected else None
        began = time.perf_counter()
        slots = Sketch(job.size, job.request.sketch).slots(0, job.size).to(job.loaded.device)
        self.map = time.perf_counter() - began
        sketch = Sketch(job.size, job.request.sketch, slots)
        self.compressor = Compressor(
            job.gradients, sketch, normalize=job.request.gradient.normalize, correction=factors
        )
        began = time.perf_counter()
        self.activations = _peak(lambda: self._compress(batches[0]), job.loaded.device)
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
        job, parts = self.job, {}
        if job.request.gradient.second_moment == "estimate":
            sample = plan_batches(drawn(job), job.request.work.batch_tokens)
            parts["second moment"] = self._of(sample)
        if workers > 1:
            parts["start workers"] = _IMPORTS * max(1, workers / (psutil.cpu_count() or 1)) + loading
        parts["map of slots"] = self.map
        parts["cache"] = self._of(self.batches) / workers + max(0.0, self.first - self._of(self.batches[:1]))
        parts["write"] = self.writing * sum(map(len, self.batches)) / workers
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


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` took at its peak; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = psutil.Process().memory_info().rss
        work()
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return max(0, peak - before)
    work()
    return 0


def _with_activations(room: Room, measured: int, workers: int) -> Room:
    """The measured peak of one process holds the gradients of a layer and the RapidGrads of the batch too."""
    where = room.device or room.memory
    known = where["per-example gradients"] + where["RapidGrads of a batch"]
    return _changed(room, "activations", max(0, measured * workers - known))


def _with_model(room: Room, size: int) -> Room:
    return _changed(room, "model", (room.device or room.memory).get("model", 0) + size)


def _changed(room: Room, part: str, size: int) -> Room:
    if room.device:
        return replace(room, device={**room.device, part: size})
    return replace(room, memory={**room.memory, part: size})
