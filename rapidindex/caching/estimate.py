"""`--dry-run`: what a build will take, from timing a few of its batches. Writes nothing.

The time of a batch is taken to be its padded tokens times a rate that depends on its examples' length.
"""

import hashlib
import shutil
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapidindex.caching.batches import Item, as_batch, padded_tokens, plan_batches
from rapidindex.caching.job import Job, Plan, existing, left, places, prepare
from rapidindex.caching.moment import drawn
from rapidindex.caching.shard_writer import record_of
from rapidindex.config import BuildRequest
from rapidindex.errors import ResourceError
from rapidindex.gradients.eigenbases import Eigenbases, seconds_to_find
from rapidindex.gradients.losses import Batch, example_losses
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads
from rapidindex.gradients.second_moment import KRONECKER
from rapidindex.gradients.sketch import LARGEST_DIVISOR, Sketch
from rapidindex.progress import Progress, silent
from rapidindex.search.faiss_index import AnnIndex
from rapidindex.search.vector_index import DIM, EXACT, default_factory
from rapidindex.store import USER_BLOCK, encode_json, encode_rows

_LENGTHS = (16, 40, 64)


@dataclass(frozen=True)
class Activations:
    """Bytes for n examples of T tokens: `constant` + n (`linear` T + `square` T²)."""

    constant: float
    """A layer's dequantized weights, for one."""
    linear: float
    square: float
    """Of masks and eager attention."""

    def of(self, examples: int, tokens: int) -> int:
        """Bytes for a batch of examples padded to so many tokens, logits excepted."""
        return int(self.constant + examples * tokens * (self.linear + self.square * tokens))


PROCESS = 450 * 2**20
"""A worker before its model: the interpreter, torch and transformers (measured with torch 2.13: 430 MiB, half of it
pages of files that others map too)."""


_HEAP = 0.5
"""What the C library's heap holds on CPUs beside the tensors that live in it, of their bytes (measured with glibc on
SmolLM2: 0.4 to 0.6; with an mmap for each tensor 0.00, and slower)."""


_ONCE = ("manifest", "second moment")  # files that several levels share


_HDF5 = 9 * 2**10  # what libhdf5 writes around a shard's eleven arrays


@dataclass(frozen=True)
class ResourceEstimate:
    """What a build takes, by part, in bytes."""

    disk: dict[str, int]
    memory: dict[str, int]
    """Of the machine."""
    device: dict[str, int]
    """Of the fullest GPU; empty where there is none."""


@dataclass(frozen=True)
class FreeResources:
    """What there is, in bytes."""

    disk: int
    memory: int
    device: int


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


def estimate(request: BuildRequest, *, overwrite: bool = False, progress: Progress = silent) -> Estimate:
    """Read data and model, time a few batches, and predict the build of `request`. Raises as `build` does."""
    started = time.perf_counter()
    job = prepare(request, progress)
    loading = time.perf_counter() - started
    plans = _plans(job, overwrite)
    workers = [len(places(job, plan)) for plan in plans]
    activations = measure_activations(job.gradients)
    room = combine(
        [estimate_resources(job, plan, count, activations) for plan, count in zip(plans, workers, strict=True)]
    )
    free = free_resources(job)
    check_resources(room, free, request.output)
    timings = [_timed(job, plan, count, progress) for plan, count in zip(plans, workers, strict=True)]
    seconds = {"read data and model": loading}
    for timing, count in zip(timings, workers, strict=True):
        seconds |= timing.seconds(count, loading)
    room = _with_model(room, model_bytes(job.loaded.model))
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


def _with_model(room: ResourceEstimate, size: int) -> ResourceEstimate:
    """With the model that is loaded already."""
    where = room.device or room.memory
    where = {**where, "model": where.get("model", 0) + size}
    return replace(room, device=where) if room.device else replace(room, memory=where)


def estimate_resources(job: Job, plan: Plan, workers: int, activations: Activations) -> ResourceEstimate:
    """What caching a level takes by so many processes."""
    per_process, shared = _of_each_process(job, plan, activations), _of_all(job, plan.K)
    buffers = {"rows buffer": per_process.pop("rows buffer")}
    times = workers
    on_gpu = job.device.type == "cuda"
    if on_gpu:
        one_gpu = ":" in job.request.model.device
        times = workers if one_gpu else -(-workers // torch.cuda.device_count())
    parts = {name: size * times for name, size in per_process.items()}
    parts |= {name: size * (times if on_gpu else 1) for name, size in shared.items()}
    if workers > 1:  # one is held already, and is given back
        parts["model"] = model_bytes(job.loaded.model) * (times - 1)
    memory = {name: size * workers for name, size in buffers.items()}
    if workers > 1:
        memory["processes"] = PROCESS * workers
    if on_gpu:
        return ResourceEstimate(_disk(job, plan, workers), memory | (shared if workers > 1 else {}), parts)
    memory["heap"] = int(_HEAP * (parts["activations"] + parts["logits"]))
    return ResourceEstimate(_disk(job, plan, workers), parts | memory, {})


def combine(rooms: Sequence[ResourceEstimate]) -> ResourceEstimate:
    """What several levels take one after the other: disk in all, memory at most."""
    disk: dict[str, int] = {}
    for room in rooms:
        for part, size in room.disk.items():
            disk[part] = max(disk.get(part, 0), size) if part in _ONCE else disk.get(part, 0) + size
    largest = [max(rooms, key=lambda room: sum(getattr(room, what).values())) for what in ("memory", "device")]
    return ResourceEstimate(disk, largest[0].memory, largest[1].device)


def free_resources(job: Job) -> FreeResources:
    """What is free now; of memory also what the limits of the container leave."""
    path = Path(job.request.output).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    device = 0
    if job.device.type == "cuda":
        device = torch.cuda.mem_get_info(job.device)[0]
    return FreeResources(
        shutil.disk_usage(existing).free, min(psutil.virtual_memory().available, _left_in_container()), device
    )


def check_resources(room: ResourceEstimate, free: FreeResources, output: str) -> None:
    """ResourceError, with the numbers, where a build cannot fit."""
    fewer = "Use fewer --workers, a smaller --batch-tokens or -K, an adapter, or a larger machine."
    for parts, there, what, hint in (
        (room.disk, free.disk, "disk space", "Free some, choose another -o, or a smaller -K."),
        (room.memory, free.memory, "memory", fewer),
        (room.device, free.device, "GPU memory", fewer),
    ):
        if sum(parts.values()) > there:
            told = ", ".join(f"{name} {_mib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
            raise ResourceError(
                f"{output} needs {_mib(sum(parts.values()))} MiB of {what} ({told}); {_mib(there)} are free.", hint=hint
            )


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _of_all(job: Job, K: int) -> dict[str, int]:
    """What processes share: 4 bytes a gradient entry, and as many for the correction, with its eigenvectors."""
    sketch = Sketch(job.size, replace(job.request.sketch, K=K))
    candidates = np.arange(2, min(sketch.padded, LARGEST_DIVISOR) + 1)
    order = int(candidates[sketch.padded % candidates == 0].mean())  # a permutation's length, on average
    slots = 4 * job.size + 2 * job.request.sketch.shuffles * 8 * order + sketch.padded // 8
    correction = (
        {} if job.request.gradient.second_moment == "none" else {"correction": 4 * (job.size + job.eigen_entries)}
    )
    return {"map of slots": slots, **correction}


def _of_each_process(job: Job, plan: Plan, activations: Activations) -> dict[str, int]:
    work = job.request.work
    most = max(map(len, plan.batches))
    unit = max(sum(map(len, unit)) for unit in plan.units)
    buffered = 4 * plan.K * min(plan.rows, work.shard_bytes // plan.row_bytes + unit)
    each = (_of_batch(job, activations, plan.K, batch) for batch in plan.batches)
    return {
        **max(each, key=lambda parts: sum(parts.values())),
        "rows buffer": buffered + min(buffered, 64 * 2**20) + 4 * plan.K * (unit if unit > most else 0),
    }


def _of_batch(job: Job, activations: Activations, K: int, batch: Sequence[Item]) -> dict[str, int]:
    """As the backward pass begins. A model that has to be computed one example at a time keeps all gradients."""
    examples, tokens = len(batch), max(item.tokens for item in batch)
    batched, largest = job.gradients.batched, max(layer.size for layer in job.layers)
    at_once = examples if batched else 1
    predicted = max(map(_predicted, batch)) if batched else tokens
    vocabulary = job.loaded.model.config.get_text_config().vocab_size
    # A layer's as they are made and as they are added.
    entries = 2 * examples * largest if batched else (examples + 1) * job.size
    return {
        "activations": activations.of(at_once, tokens),
        "logits": 3 * 4 * at_once * predicted * vocabulary,  # log-probabilities, their gradient, and the logits'
        "per-example gradients": 4 * entries + 8 * largest,  # and the slots of a layer as int64
        "RapidGrads of a batch": 4 * examples * 4 * K,
    }


def _predicted(item: Item) -> int:
    """Tokens that are in the loss."""
    return 1 if item.position >= 0 else int(item.encoding.response_mask.sum())


def _disk(job: Job, plan: Plan, workers: int) -> dict[str, int]:
    K, layers, n = plan.K, len(job.layers), plan.rows
    texts = sum(len(encode_json(record_of(item, 1.234567))) + 20 for item in plan.examples)
    named = [{"name": layer.name, "size": layer.size} for layer in job.layers]
    description = len(encode_json({"config": job.identity, "layers": named, "skipped": job.skipped})) + 400
    shards = max(-(-plan.row_bytes * n // job.request.work.shard_bytes), min(workers, len(plan.units)))
    parts = {
        "rows": n * (plan.row_bytes + 4 + 4 * layers + 12),
        "examples": texts + 8 * len(plan.examples),
        "shards": shards * (USER_BLOCK + _HDF5 + description + 300),
        "manifest": 2 * description,
    }
    if job.lacks_moment:
        parts["second moment"] = 4 * (job.size + job.eigen_entries) + USER_BLOCK + _HDF5 // 2 + description
    factory = default_factory(n, K)
    if factory != EXACT:
        parts["search index"] = n * AnnIndex.create(factory, min(DIM, K)).bytes_per_row()
    return parts


def _left_in_container() -> int:
    """Bytes that the control group of a container leaves; a number beyond any memory where it sets no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            return int(Path(limit).read_text()) - int(Path(used).read_text())
    return 2**63


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"


class LiveTensorMeter(TorchDispatchMode):
    """While open, counts the bytes of the tensors made within that are alive (`now`), and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view is nothing new
        for storage in _storages(made):
            if storage._cdata not in given | self._known:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def measure_activations(gradients: PerExampleGradients) -> Activations:
    """From forward passes over two examples of 16, 40 and 64 tokens; the model is left as it was."""
    batches = [_made_up(gradients.model, length) for length in _LENGTHS]
    if not gradients.batched:
        batches = [batch.example(0) for batch in batches]
    terms = [(1, len(batch) * length, len(batch) * length**2) for batch, length in zip(batches, _LENGTHS, strict=True)]
    found = np.linalg.solve(np.array(terms, float), [_peak(gradients, batch) for batch in batches])
    return Activations(*np.maximum(found, 0.0).tolist())  # what grows otherwise may fit with a term below zero


def _peak(gradients: PerExampleGradients, batch: Batch) -> int:
    """Bytes alive at the fullest moment of a forward pass."""
    with LiveTensorMeter() as alive:
        if gradients.batched:
            with gradients.forward(batch, lambda number, values: None):
                return alive.peak
        with torch.enable_grad():
            example_losses(gradients.model, batch)
        return alive.peak


def _made_up(model: torch.nn.Module, length: int) -> Batch:
    """Two examples with one token each in the loss; the second is shorter, so that there is a mask, as mostly."""
    embedding = model.get_input_embeddings()
    ids = [np.arange(tokens) % embedding.num_embeddings for tokens in (length, length - 1)]
    weights = [(np.arange(len(tokens)) == len(tokens) - 1).astype(np.float32) for tokens in ids]
    return Batch.of(ids, weights, embedding.weight.device)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
