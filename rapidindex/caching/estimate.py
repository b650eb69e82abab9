"""What a build takes: disk by arithmetic, time and memory from a few of its batches (`--dry-run`). Writes nothing.

The time of a batch is its padded tokens times a rate that depends on its examples' length. The memory of a process is
its measured peak while it computes the longest batch and that of most examples. Before a build starts,
`check_resources` compares what can be known without computing anything; a batch that then does not fit is halved
(`shard_writer.py`). All sizes are in bytes.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from rapidindex.caching.actors import on_cluster
from rapidindex.caching.batches import Item, as_batch, most_items, padded_tokens, plan_batches
from rapidindex.caching.job import (
    Job,
    LevelPlan,
    check_recipe,
    map_of_slots,
    plan_levels,
    prepare,
    read_existing,
    same_day,
)
from rapidindex.caching.moment import ESTIMATES, moment_sample
from rapidindex.config import BuildRequest
from rapidindex.errors import ResourceError
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads
from rapidindex.gradients.second_moment import preconditioner_of
from rapidindex.progress import Progress, silent
from rapidindex.search.vector_index import search_index_bytes
from rapidindex.store import Store, disk_bytes, encode_rows

PROCESS_BYTES = 450 * 2**20
"""A worker before its model: the interpreter, torch and transformers (430 MiB with torch 2.13, half of it pages of
files that other processes map too)."""
_IMPORT_SECONDS = 4.0
"""Until a worker can load its model: importing torch and transformers from a warm disk, on two cores."""
_TIMED_BATCHES = 5
"""Batches that are timed, from the longest examples to the shortest."""
_REPEATS = 2
_SHARED_FILES = ("manifest", "second moment")  # one file for all levels


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes that a build takes, by part."""

    disk: dict[str, int]
    memory: dict[str, int]
    """Main memory of all processes."""
    device: dict[str, int]
    """Memory of the fullest GPU; empty where there is none."""


@dataclass(frozen=True)
class FreeResources:
    """Bytes that are free."""

    disk: int
    memory: int
    device: int


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes that a build takes, by part."""

    index: str
    examples: int
    """Examples that the index lacks."""
    rows: int
    """RapidGrads to compute: one for each of these examples, for each of its tokens, or both."""
    tokens: int
    """Tokens that the model computes, padding included."""
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


def estimate(request: BuildRequest, *, overwrite: bool = False, progress: Progress = silent) -> Estimate:
    """Read data and model, time a few batches, and predict the build of `request`. Raises as `build` does."""
    with on_cluster(request) as request:
        return _estimate(request, overwrite, progress)


def _estimate(request: BuildRequest, overwrite: bool, progress: Progress) -> Estimate:
    started = time.perf_counter()
    store = None if overwrite else read_existing(request)
    job = prepare(same_day(request, store), progress)
    loading = time.perf_counter() - started
    if store:
        check_recipe(job, store)
    plans = [plan for plan in plan_levels(job, store) if plan.examples]
    if not plans:
        raise ResourceError(f"{request.output} holds all that is asked for already: nothing is left to do.")
    free = free_resources(job)
    least = resources_of(job, plans, store)
    check_resources(least, free, request.output)
    timings = [_Timing(job, plan, progress) for plan in plans]
    needed = replace(_combine([_measured(job, timing, store) for timing in timings]), disk=least.disk)
    check_resources(_beyond_this_process(job, needed), free, request.output)
    seconds = {"read data and model": loading}
    for timing in timings:
        seconds |= timing.seconds(loading, lacks_moment=timing is timings[0] and _lacks_moment(job, store))
    return Estimate(
        index=request.output,
        examples=len({item.example.id for plan in plans for item in plan.examples}),
        rows=sum(plan.rows for plan in plans),
        tokens=sum(plan.tokens for plan in plans),
        workers=max(len(plan.devices) for plan in plans),
        seconds=seconds,
        disk=needed.disk,
        memory=needed.memory,
        device_memory=needed.device,
        free=asdict(free),
        total_seconds=sum(seconds.values()),
        total_disk=sum(needed.disk.values()),
        total_memory=sum(needed.memory.values()),
    )


def resources_of(job: Job, plans: Sequence[LevelPlan], store: Store | None) -> ResourceEstimate:
    """Return the bytes that `plans` take at least, beyond what this process holds: known without computing anything.

    `store` is the index that exists, if any.
    """
    return _combine([_least(job, plan, store) for plan in plans if plan.examples])


def free_resources(job: Job) -> FreeResources:
    """Return what is free on the output's disk, in memory (within the container's limit) and on the job's GPU."""
    path = Path(job.request.output).absolute()
    folder = next(folder for folder in (path, *path.parents) if folder.exists())
    device = torch.cuda.mem_get_info(job.device)[0] if job.device.type == "cuda" else 0
    memory = min(psutil.virtual_memory().available, _free_in_container())
    return FreeResources(shutil.disk_usage(folder).free, memory, device)


def check_resources(needed: ResourceEstimate, free: FreeResources, output: str) -> None:
    """Raise ResourceError, with the sizes of the parts, where `needed` is more than `free`."""
    fewer = "Use fewer --workers, a smaller --batch-tokens or -K, an adapter, or a larger machine."
    for parts, available, resource, hint in (
        (needed.disk, free.disk, "disk space", "Free some, choose another -o, or a smaller -K."),
        (needed.memory, free.memory, "memory", fewer),
        (needed.device, free.device, "GPU memory", fewer),
    ):
        if sum(parts.values()) > available:
            sizes = ", ".join(f"{name} {_mib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
            raise ResourceError(
                f"{output} needs {_mib(sum(parts.values()))} MiB of {resource} ({sizes}); {_mib(available)} are free.",
                hint=hint,
            )


def model_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _combine(parts: Sequence[ResourceEstimate]) -> ResourceEstimate:
    """Combine levels that are cached one after the other: the sum of their disk space, the most of their memory."""
    disk: dict[str, int] = {}
    for part in parts:
        for name, size in part.disk.items():
            disk[name] = max(disk.get(name, 0), size) if name in _SHARED_FILES else disk.get(name, 0) + size
    memory, device = (
        max((getattr(part, name) for part in parts), key=lambda sizes: sum(sizes.values()), default={})
        for name in ("memory", "device")
    )
    return ResourceEstimate(disk, memory, device)


def _least(job: Job, plan: LevelPlan, store: Store | None) -> ResourceEstimate:
    devices, on_gpu = _devices_here(job, plan), job.device.type == "cuda"
    workers = len(devices)
    memory = {"rows buffer": workers * _buffer_bytes(job, plan)}
    arrays = _array_bytes(job)
    if workers > 1:
        memory["processes"] = workers * PROCESS_BYTES
    copies = workers if not on_gpu else max(map(devices.count, devices))
    if workers > 1:  # the parent's own model is given back
        arrays["model"] = model_bytes(job.loaded.model) * (copies - 1)
    if on_gpu:
        return ResourceEstimate(_disk_bytes(job, plan, store), memory, arrays)
    return ResourceEstimate(_disk_bytes(job, plan, store), memory | arrays, {})


def _devices_here(job: Job, plan: LevelPlan) -> list[str]:
    """Return the devices of the processes whose memory is that of this machine: on a cluster, of one of them."""
    return plan.devices[:1] if job.request.work.ray else plan.devices


def _measured(job: Job, timing: "_Timing", store: Store | None) -> ResourceEstimate:
    """Return the memory of all processes, from the measured peak of one."""
    plan, devices = timing.plan, _devices_here(job, timing.plan)
    workers = len(devices)
    memory = {"largest batch, model and libraries": timing.peak, "rows buffer": workers * _buffer_bytes(job, plan)}
    device = {}
    if _lacks_moment(job, store):
        sample = preconditioner_of(job.recipe).sample_bytes(job.layers, len(moment_sample(job)))
        memory |= {"sample of the second moment": sample} if sample else {}
    if job.device.type == "cuda":
        device = {"largest batch and model": timing.device_peak * max(map(devices.count, devices))}
    if workers > 1:
        memory["other workers"] = (workers - 1) * max(0, timing.peak - sum(_array_bytes(job).values()))
    return ResourceEstimate({}, memory, device)


def _beyond_this_process(job: Job, needed: ResourceEstimate) -> ResourceEstimate:
    """Subtract what this process holds already from the memory of all processes."""
    held = psutil.Process().memory_info().rss
    memory = {"processes": max(0, sum(needed.memory.values()) - held)}
    device = {name: max(0, size - torch.cuda.memory_reserved(job.device)) for name, size in needed.device.items()}
    return replace(needed, memory=memory, device=device)


def _array_bytes(job: Job) -> dict[str, int]:
    """Return the sizes of the arrays that processes share: the sketch's map, and the correction with its vectors."""
    if job.embeds:
        return {}
    kind = preconditioner_of(job.recipe)
    arrays = {"map of slots": 4 * job.size} if job.recipe.sketch.projection == "rapidgrad" else {}
    if entries := kind.moment_entries(job.layers) + kind.vector_entries(job.layers):
        arrays["correction"] = 4 * entries
    return arrays


def _buffer_bytes(job: Job, plan: LevelPlan) -> int:
    """Return the bytes of the rows that a process holds until it writes a shard."""
    unit = max(sum(map(len, unit)) for unit in plan.units)
    return 4 * plan.K * min(plan.rows, job.request.work.shard_bytes // plan.row_bytes + unit)


def _lacks_moment(job: Job, store: Store | None) -> bool:
    return (
        not job.embeds
        and job.recipe.gradient.second_moment != "none"
        and (store is None or store.second_moment() is None)
    )


def _disk_bytes(job: Job, plan: LevelPlan, store: Store | None) -> dict[str, int]:
    layers = [{"name": layer.name, "size": layer.size} for layer in job.layers]
    kind = preconditioner_of(job.recipe)
    moment = kind.moment_entries(job.layers) + kind.vector_entries(job.layers) if _lacks_moment(job, store) else 0
    parts = disk_bytes(
        row_bytes=plan.row_bytes,
        rows=plan.rows,
        records=[item.to_record(1.234567) for item in plan.examples],
        shards=max(-(-plan.row_bytes * plan.rows // job.request.work.shard_bytes), len(plan.devices)),
        description={"config": job.recipe.to_manifest(), "layers": layers, "skipped": job.skipped},
        moment_entries=moment,
    )
    return parts | {"search index": search_index_bytes(plan.rows, plan.K)}


class _Timing:
    """The seconds of a few batches of a plan, and the peak memory of the longest and of that with most examples."""

    def __init__(self, job: Job, plan: LevelPlan, progress: Progress) -> None:
        self.job, self.plan = job, plan
        self.batches = sorted(plan.batches, key=lambda batch: -batch[0].tokens)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // len(plan.devices)))
        try:
            self._measure(progress)
        finally:
            torch.set_num_threads(threads)

    def _measure(self, progress: Progress) -> None:
        started = time.perf_counter()
        self.compressor = _stand_in(self.job, self.plan)
        self.map_seconds = time.perf_counter() - started
        with _PeakMemory(self.job.device) as peak:
            started = time.perf_counter()
            self._compress(self.batches[0])
            self.first_seconds = time.perf_counter() - started  # also compares batched gradients with autograd's
            self._compress(max(self.batches, key=len))  # layers' gradients grow with the examples, not with tokens
        self.peak, self.device_peak = peak.memory, peak.device
        picks = sorted({round(at) for at in np.linspace(0, len(self.batches) - 1, _TIMED_BATCHES)})
        self.lengths, self.rates, writing = [], [], []
        for number, pick in enumerate(picks):
            progress("time", number, len(picks))
            batch = self.batches[pick]
            caching_seconds, writing_seconds = self._time(batch)
            self.lengths.append(batch[0].tokens)
            self.rates.append(caching_seconds / padded_tokens(batch))
            writing.append(writing_seconds / len(batch))
        progress("time", len(picks), len(picks))
        self.writing_seconds = float(np.mean(writing))

    def seconds(self, loading: float, *, lacks_moment: bool) -> dict[str, float]:
        """Return the seconds of each part of caching the level, once data and model are read."""
        job, level, workers = self.job, self.plan.level, len(self.plan.devices)
        parts = {}
        kind = preconditioner_of(job.recipe)
        if lacks_moment and job.recipe.gradient.second_moment in ESTIMATES:
            most_tokens = job.request.work.batch_tokens
            sample = plan_batches(moment_sample(job), most_tokens, most_items(job.layers))
            passes = kind.sample_passes(job.layers, sum(map(len, sample)))
            parts["second moment"] = passes * self._caching_seconds(sample)
        if workers > 1:
            starting = _IMPORT_SECONDS * max(1, workers / (psutil.cpu_count() or 1)) + loading
            parts[f"start workers, {level}"] = starting
        if job.recipe.sketch.projection == "rapidgrad":
            parts[f"map of slots, {level}"] = self.map_seconds
        check = max(0.0, self.first_seconds - self._caching_seconds(self.batches[:1]))
        parts[f"cache, {level}"] = self._caching_seconds(self.batches) / workers + check
        parts[f"write, {level}"] = self.writing_seconds * self.plan.rows / workers
        return parts

    def _caching_seconds(self, batches: Sequence[list[Item]]) -> float:
        order = np.argsort(self.lengths, kind="stable")
        lengths, rates = np.array(self.lengths)[order], np.array(self.rates)[order]
        return sum(padded_tokens(batch) * float(np.interp(batch[0].tokens, lengths, rates)) for batch in batches)

    def _compress(self, batch: list[Item]) -> RapidGrads:
        rapidgrads = self.compressor(as_batch(batch, self.job.device))
        rapidgrads.norms.cpu()  # waits for a GPU
        return rapidgrads

    def _time(self, batch: list[Item]) -> tuple[float, float]:
        """Return the seconds of a batch's RapidGrads, and of encoding and hashing its rows."""
        started = time.perf_counter()
        for _ in range(_REPEATS):
            rapidgrads = self._compress(batch)
        caching = (time.perf_counter() - started) / _REPEATS
        rows = np.nan_to_num(rapidgrads.rows.cpu().numpy())
        started = time.perf_counter()
        hashlib.sha256(encode_rows(rows)[0].tobytes())
        return caching, time.perf_counter() - started


def _stand_in(job: Job, plan: LevelPlan) -> Compressor:
    """Return a compressor that takes the time and memory of the build's own, whose second moment is not known yet."""
    if job.embeds:
        return job.loaded
    kind = preconditioner_of(job.recipe)
    v, vectors = np.ones(kind.moment_entries(job.layers), "f4"), np.zeros(kind.vector_entries(job.layers), "f4")
    return Compressor.of(job.recipe, job.gradients, v=v, vectors=vectors, K=plan.K, slots=map_of_slots(job, plan.K))


class _PeakMemory:
    """The largest memory of this process, and of its GPU, while the block runs."""

    def __init__(self, device: torch.device) -> None:
        self.on, self.memory, self.device = device, 0, 0

    def __enter__(self) -> "_PeakMemory":
        with suppress(OSError):  # elsewhere than on Linux the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")
        if self.on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.on)
        return self

    def __exit__(self, *exception: object) -> None:
        self.memory = _peak_bytes()
        if self.on.type == "cuda":
            self.device = torch.cuda.max_memory_reserved(self.on)


def _peak_bytes() -> int:
    """Return the largest resident size of this process since `clear_refs`, or since it began."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _free_in_container() -> int:
    """Return the bytes that the control group of a container leaves; 2⁶³ where it sets no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            return int(Path(limit).read_text()) - int(Path(used).read_text())
    return 2**63


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"
