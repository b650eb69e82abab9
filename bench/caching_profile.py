"""Where ours spends its time, by clocks around its parts, beside what each part would take at the machine's own speed.

Exact on a CPU, where calls return when their work is done. The machine's speed is measured first: a matrix product for
the products, a copy between two large arrays for what only moves memory.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.peers.measuring import seconds
from bench.ways import Setting
from rapidindex.caching.batches import padded_tokens
from rapidindex.caching.shard_writer import ShardWriter
from rapidindex.gradients import per_example as gradients_module
from rapidindex.gradients.per_example import _Recorder
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.sketch import Sketch

PARTS = [
    ("forward", gradients_module, "example_losses"),
    ("hooks", _Recorder, "_came_back"),
    ("products", _Recorder, "_gradient"),
    ("consume", _Recorder, "_emit"),
    ("correct", Compressor, "_correct"),
    ("scatter", Sketch, "add"),
    ("finish", Sketch, "finish"),
    ("flush", _Recorder, "flush"),
    ("write", ShardWriter, "write"),
]


def profile(setting: Setting) -> dict[str, Any]:
    """Seconds and share of each part over all batches, the floor measured beside it, and the machine's own speed."""
    setting.floor(setting.batches[-1:])
    setting.ours(setting.batches[-1:])  # once unmeasured: maps are made, memory is taken
    floor = whole = 0.0
    spent: dict[str, float] = defaultdict(float)
    for batch in setting.batches:
        floor += seconds(lambda batch=batch: setting.floor([batch]))
        with clocks(spent):
            whole += seconds(lambda batch=batch: setting.ours([batch]))
    layers, n = setting.compressor.gradients.layers, len(setting.items)
    size, tokens = sum(layer.size for layer in layers), sum(map(padded_tokens, setting.batches))
    told = {"rows": n, "padded_tokens": tokens, "gradient_size": size, "threads": torch.get_num_threads()}
    told |= {"full": setting.loaded.config.adapter is None, "dtype": setting.loaded.config.dtype}
    parts = {part: {"seconds": s, "share": s / whole} for part, s in exclusive(spent, whole).items()}
    for part, least in least_seconds(setting, tokens, size * n, len(setting.batches) * size).items():
        parts[part]["least_seconds"] = least
    return {**told, "floor_seconds": floor, "ours_seconds": whole, "parts": parts}


@contextmanager
def clocks(spent: dict[str, float]) -> Iterator[None]:
    """While open, adds up the seconds of each of `PARTS`, one within the other counted in both."""
    with ExitStack() as stack:
        for part, owner, name in PARTS:
            original = getattr(owner, name)
            setattr(owner, name, clocked(original, part, spent))
            stack.callback(setattr, owner, name, original)
        yield


def clocked(function, part: str, spent: dict[str, float]):
    """`function`, which adds its seconds to those of `part`."""

    def call(*arguments, **named):
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[part] += time.perf_counter() - started

    return call


def exclusive(spent: dict[str, float], whole: float) -> dict[str, float]:
    """Seconds of each part without the parts within it."""
    handed = spent["consume"] - spent["correct"] - spent["scatter"]
    around = spent["hooks"] + spent["flush"] - spent["products"] - spent["consume"]
    rest = whole - spent["forward"] - spent["hooks"] - spent["finish"] - spent["flush"] - spent["write"]
    return {
        "forward": spent["forward"],
        "backward through activations, and the rest": rest,
        "per-example gradient products": spent["products"],
        "summing calls of one layer, layout": around,
        "second-moment correction": spent["correct"],
        "norms, normalisation": handed,
        "scatter-add": spent["scatter"],
        "difference of the halves": spent["finish"],
        "writing a shard a batch": spent["write"],
    }


def least_seconds(setting: Setting, tokens: int, entries: int, slots: int) -> dict[str, float]:
    """What parts would take at the measured speeds: `entries` gradient entries in all, `slots` read from the map."""
    flops, bandwidth = speeds(setting.loaded.model.dtype)
    linear = sum(p.numel() for p in setting.compressor.gradients._parameters if p.dim() == 2 and p.shape[0] < 40_000)
    return {
        "per-example gradient products": max(2 * linear * tokens / flops, 4 * entries / bandwidth),
        "second-moment correction": (8 * entries + 4 * slots) / bandwidth,
        "norms, normalisation": 4 * entries / bandwidth,
        "scatter-add": (4 * entries + 4 * slots) / bandwidth,
    }


def speeds(dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a large matrix product, and bytes a second read and written by a copy."""
    a = torch.randn(1536, 1536).to(dtype)
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    products = min(seconds(lambda: a @ a) for _ in range(5))
    copies = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * 1536**3 / products, 2 * source.nbytes / copies
