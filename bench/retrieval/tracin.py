"""A whole retrieval, from a prompt to its matches, beside TracIn, which computes every training gradient again.

TracIn is given what this index spares it nothing of: the same checkpoint, the same batches of like length, the same
per-example gradients, corrections and norms; and one query's inner product with each, uncompressed. What it computes is
the uncompressed influence. It is measured on a part of the rows and multiplied up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.retrieval.measure import THREADS, pin, spread, timed
from bench.retrieval.queries import KINDS, posed
from rapidindex import Index
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.data.examples import read_examples
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.progress import Progress
from rapidindex.query.index import example_of
from rapidindex.store.rows import Rows

BATCH_TOKENS = 1024


def items_of(index: Index, rows: Rows, numbers: Sequence[int] | np.ndarray) -> list[Item]:
    """The training examples of these rows, as they were when their gradients were computed."""
    examples = [example_of(rows.record(rows.example_of(int(number)))) for number in numbers]
    return [Item(example, index.template.encode(example)) for example in examples]


def influences(compressor: Compressor, batch: Batch, directions: torch.Tensor) -> torch.Tensor:
    """Uncompressed influence of each example on each query, float32 [examples, queries].

    `directions` [queries, |v|] are the corrected, normalised query gradients, corrected once more for the other side
    (`Compressor.direction`). The examples' own norms are computed here, as they were for their rows.
    """
    layers = compressor.gradients.layers
    parts = torch.zeros(len(layers), len(batch), len(directions))
    norms = torch.zeros(len(layers), len(batch))

    def consume(number: int, values: torch.Tensor) -> None:
        here = slice(layers[number].start, layers[number].start + layers[number].size)
        parts[number] = values @ directions[:, here].T
        compressor.correct(number, values)
        norms[number] = values.norm(dim=1)

    compressor.gradients(batch, consume)
    if compressor.normalize == "layer":
        parts /= norms.clamp(min=1e-30).unsqueeze(2)
    whole = parts.sum(0)
    return whole / norms.norm(dim=0).clamp(min=1e-30).unsqueeze(1) if compressor.normalize == "unit" else whole


def directions_of(index: Index, batches: Sequence[Batch]) -> torch.Tensor:
    """`Compressor.direction` of each query, float32 [queries, |v|]."""
    return torch.stack([index.compressor.direction(batch) for batch in batches])


def query_batches(index: Index, data: Path, count: int) -> list[Batch]:
    """The first `count` of the real queries as batches of one."""
    batches = []
    for asked, encoding in posed(index, read_examples(data).examples, count):
        weights = np.zeros(len(encoding.input_ids), np.float32)
        chosen = [int(asked.span)] if asked.span else list(range(len(encoding.tokens)))
        weights[np.flatnonzero(encoding.response_mask)[chosen]] = 1 / len(chosen)
        batches.append(Batch.of([encoding.input_ids], [weights]))
    return batches[:count]


def against_tracin(index: Index, data: Path, rows: int, progress: Progress) -> dict[str, Any]:
    """Seconds a row of TracIn and of caching, and seconds of a query's gradient, by threads."""
    stored = index.store.rows("sentence")
    numbers = np.random.default_rng(23).choice(len(stored), min(rows, len(stored)), replace=False)
    batches = [as_batch(items, "cpu") for items in plan_batches(items_of(index, stored, numbers), BATCH_TOKENS)]
    asked = query_batches(index, data, 16)
    trained = sum(layer["size"] for layer in index.store.layers)
    frozen = sum(p.numel() for p in index.loaded.model.parameters() if not p.requires_grad)  # 0 without an adapter
    timings = {str(threads): _timings(index, batches, asked, threads, progress) for threads in THREADS}
    return {
        "rows": len(stored),
        "rows_measured": len(numbers),
        "padded_tokens": sum(batch.input_ids.numel() for batch in batches),
        "K": stored.K,
        "recipe": index.store.config["gradient"],
        "gradient_size": trained,
        "all_parameters": frozen or trained,
        "threads": timings,
    }


def _timings(
    index: Index, batches: list[Batch], asked: list[Batch], threads: int, progress: Progress
) -> dict[str, Any]:
    pin(threads)
    index.compressor(batches[-1])  # once unmeasured: the map of slots is made
    direction_seconds, directions = timed(lambda: directions_of(index, asked[:1]))
    spent, examples = {"tracin": 0.0, "caching": 0.0}, sum(map(len, batches))
    ways = {"tracin": lambda batch: influences(index.compressor, batch, directions), "caching": index.compressor}
    for done, batch in enumerate(batches):
        progress(f"TracIn, {threads} threads", done, len(batches))
        for name, way in ways.items():
            spent[name] += timed(lambda way=way, batch=batch: way(batch))[0]
    gradients = [timed(lambda batch=batch: index.compressor(batch))[0] for batch in asked]
    return {
        "seconds_per_row": {name: total / examples for name, total in spent.items()},
        "direction_seconds": direction_seconds,
        "query_gradient_seconds": {kind: spread(gradients[i :: len(KINDS)]) for i, kind in enumerate(KINDS)},
    }
