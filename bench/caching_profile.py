"""Where the time of caching goes: seconds of each part, beside what the machine's own speed would allow.

Exact on a CPU, where a call returns when its work is done. The clocks sit around public calls: the gradients and the
sketch of the compressor, and the shard writer. The products alone are timed inside the hooks of `per_example`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.common import seconds
from bench.setting import Setting
from rapidindex.caching.batches import padded_tokens
from rapidindex.caching.shard_writer import ShardWriter
from rapidindex.gradients import per_example
from rapidindex.gradients.sketch import Sketch

PARTS = [
    ("gradients", per_example.PerExampleGradients, "__call__"),
    ("forward", per_example, "example_losses"),
    ("products", per_example._Recorder, "_gradient"),
    ("scatter", Sketch, "add"),
    ("finish", Sketch, "finish"),
    ("write", ShardWriter, "write"),
]


def profile(setting: Setting) -> dict[str, Any]:
    """Return the seconds and share of each part over all batches, those of the floor, and the machine's own speed."""
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
    figures = {"rows": n, "padded_tokens": tokens, "gradient_size": size, "threads": torch.get_num_threads()}
    figures |= {"full": setting.index.loaded.config.adapter is None, "dtype": setting.index.loaded.config.dtype}
    parts = {part: {"seconds": s, "share": s / whole} for part, s in exclusive(spent, whole).items()}
    for part, least in least_seconds(setting, tokens, size * n, len(setting.batches) * size).items():
        parts[part]["least_seconds"] = least
    return {**figures, "floor_seconds": floor, "ours_seconds": whole, "parts": parts}


@contextmanager
def clocks(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of each of `PARTS` while open; a part within another counts in both."""
    with ExitStack() as stack:
        for part, owner, name in PARTS:
            original = getattr(owner, name)
            setattr(owner, name, clocked(original, part, spent))
            stack.callback(setattr, owner, name, original)
        yield


def clocked(function: Callable, part: str, spent: dict[str, float]) -> Callable:
    """Wrap `function` so that its seconds are added to those of `part`, and those of its `consume` to "consume"."""

    def call(*arguments, **named):
        if part == "gradients":  # (gradients, batch, consume)
            arguments = (*arguments[:2], clocked(arguments[2], "consume", spent))
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spent[part] += time.perf_counter() - started

    return call


def exclusive(spent: dict[str, float], whole: float) -> dict[str, float]:
    """Return the seconds of each part without those of the parts within it."""
    backward = spent["gradients"] - spent["forward"] - spent["products"] - spent["consume"]
    return {
        "forward": spent["forward"],
        "backward through activations": backward,
        "per-example gradient products": spent["products"],
        "correction, norms, normalisation": spent["consume"] - spent["scatter"],
        "scatter-add": spent["scatter"],
        "difference of the halves": spent["finish"],
        "writing a shard a batch": spent["write"],
        "the rest": whole - spent["gradients"] - spent["finish"] - spent["write"],
    }


def least_seconds(setting: Setting, tokens: int, entries: int, slots: int) -> dict[str, float]:
    """Return what parts would take at the measured speeds: `entries` gradient entries, `slots` read from the map."""
    flops, bandwidth = speeds(setting.model.dtype)
    matrices = (layer.shape for layer in setting.compressor.gradients.layers if len(layer.shape) == 2)
    linear = sum(rows * columns for rows, columns in matrices if rows < 40_000)  # embeddings are looked up
    return {
        "per-example gradient products": max(2 * linear * tokens / flops, 4 * entries / bandwidth),
        "correction, norms, normalisation": (12 * entries + 4 * slots) / bandwidth,
        "scatter-add": (4 * entries + 4 * slots) / bandwidth,
    }


def speeds(dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations a second of a large matrix product, and the bytes a second that a copy reads and writes."""
    a = torch.randn(1536, 1536).to(dtype)
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    products = min(seconds(lambda: a @ a) for _ in range(5))
    copies = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * 1536**3 / products, 2 * source.nbytes / copies
