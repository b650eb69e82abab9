"""What a build takes of disk and memory, by arithmetic from its options, and the refusal where there is less.

Everything is in bytes. Memory is what comes on top of what the process holds already, its model included.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from rapidindex.caching.activations import Activations
from rapidindex.caching.job import Job, Plan
from rapidindex.caching.shard_writer import Item, record_of
from rapidindex.errors import ResourceError
from rapidindex.gradients.sketch import LARGEST_DIVISOR, Sketch
from rapidindex.search.faiss_index import AnnIndex
from rapidindex.search.vector_index import DIM, EXACT, default_factory
from rapidindex.store.container import USER_BLOCK
from rapidindex.store.writing import encode_json

PROCESS = 450 * 2**20
"""A worker before its model: the interpreter, torch and transformers (measured with torch 2.13: 430 MiB, half of it
pages of files that others map too)."""
_HEAP = 0.5
"""What the C library's heap holds on CPUs beside the tensors that live in it, of their bytes (measured with glibc on
SmolLM2: 0.4 to 0.6; with an mmap for each tensor 0.00, and slower)."""
_ONCE = ("manifest", "second moment")  # files that several levels share
_HDF5 = 9 * 2**10  # what libhdf5 writes around a shard's eleven arrays


@dataclass(frozen=True)
class Room:
    """What a build takes, by part, in bytes."""

    disk: dict[str, int]
    memory: dict[str, int]
    """Of the machine."""
    device: dict[str, int]
    """Of the fullest GPU; empty where there is none."""


@dataclass(frozen=True)
class Free:
    """What there is, in bytes."""

    disk: int
    memory: int
    device: int


def needed_room(job: Job, plan: Plan, workers: int, activations: Activations) -> Room:
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
        parts["model"] = held_by(job.loaded.model) * (times - 1)
    memory = {name: size * workers for name, size in buffers.items()}
    if workers > 1:
        memory["processes"] = PROCESS * workers
    if on_gpu:
        return Room(_disk(job, plan, workers), memory | (shared if workers > 1 else {}), parts)
    memory["heap"] = int(_HEAP * (parts["activations"] + parts["logits"]))
    return Room(_disk(job, plan, workers), parts | memory, {})


def together(rooms: Sequence[Room]) -> Room:
    """What several levels take one after the other: disk in all, memory at most."""
    disk: dict[str, int] = {}
    for room in rooms:
        for part, size in room.disk.items():
            disk[part] = max(disk.get(part, 0), size) if part in _ONCE else disk.get(part, 0) + size
    largest = [max(rooms, key=lambda room: sum(getattr(room, what).values())) for what in ("memory", "device")]
    return Room(disk, largest[0].memory, largest[1].device)


def free_room(job: Job) -> Free:
    """What is free now; of memory also what the limits of the container leave."""
    path = Path(job.request.output).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    device = 0
    if job.device.type == "cuda":
        device = torch.cuda.mem_get_info(job.device)[0]
    return Free(shutil.disk_usage(existing).free, min(psutil.virtual_memory().available, _left_in_container()), device)


def check_room(room: Room, free: Free, output: str) -> None:
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


def held_by(model: torch.nn.Module) -> int:
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
