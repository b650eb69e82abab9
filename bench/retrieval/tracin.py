"""A whole retrieval, from a prompt to its matches, beside TracIn, which computes every training gradient again.

TracIn gets the same checkpoint, batches of like length and per-example gradients, and the norms that caching has
computed; it takes one query's inner product with each gradient, uncompressed. Its result is the uncompressed influence.
It is measured on a part of the rows and multiplied up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import pin, timed
from bench.retrieval.measure import THREADS, spread
from bench.retrieval.queries import KINDS, query_batches
from rapidindex import Index
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.data.examples import Example
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.progress import Progress

BATCH_TOKENS = 1024


def items_of(index: Index, numbers: Sequence[int] | np.ndarray) -> list[Item]:
    """Return the training examples of these rows, as they were encoded when their gradients were computed."""
    rows = index.rows_of("sentence")
    examples = [Example.from_record(rows.record(int(rows.example[number]))) for number in numbers]
    return [Item(example, index.template.encode(example)) for example in examples]


def influences(compressor: Compressor, batch: Batch, directions: Tensor, norms: Tensor) -> Tensor:
    """Return the uncompressed influence of each example on each query, float32 [examples, queries].

    `directions` [queries, |v|] are those of the queries (`Compressor.direction`), `norms` [examples, layers] the
    lengths of the examples' corrected layers (`RapidGrads.norms`).
    """
    layers = compressor.gradients.layers
    parts = torch.zeros(len(layers), len(batch), len(directions))

    def consume(number: int, values: Tensor) -> None:
        layer = layers[number]
        parts[number] = values @ directions[:, layer.start : layer.start + layer.size].T

    compressor.gradients(batch, consume)
    norms = norms.clamp(min=1e-30)
    if compressor.normalize == "layer":
        parts /= norms.T.unsqueeze(2)
    whole = parts.sum(0)
    return whole / norms.norm(dim=1, keepdim=True) if compressor.normalize == "unit" else whole


def against_tracin(index: Index, data: Path, count: int, progress: Progress) -> dict[str, Any]:
    """Return, by threads, the seconds a row of TracIn and of caching, and the seconds of a query's gradient."""
    rows = index.rows_of("sentence")
    numbers = np.random.default_rng(23).choice(len(rows), min(count, len(rows)), replace=False)
    batches = [as_batch(items, "cpu") for items in plan_batches(items_of(index, numbers), BATCH_TOKENS)]
    queries = query_batches(index, data, 16)
    trained = sum(layer["size"] for layer in index.store.layers)
    frozen = sum(p.numel() for p in index.loaded.model.parameters() if not p.requires_grad)  # 0 without an adapter
    return {
        "rows": len(rows),
        "rows_measured": len(numbers),
        "padded_tokens": sum(batch.input_ids.numel() for batch in batches),
        "K": rows.K,
        "recipe": index.store.config["gradient"],
        "gradient_size": trained,
        "all_parameters": frozen or trained,
        "threads": {str(threads): _timings(index, batches, queries, threads, progress) for threads in THREADS},
    }


def _timings(
    index: Index, batches: list[Batch], queries: list[Batch], threads: int, progress: Progress
) -> dict[str, Any]:
    pin(threads)
    compressor = index.compressor_of("sentence")
    compressor(batches[-1])  # once unmeasured: the map of slots is made
    direction_seconds, direction = timed(lambda: compressor.direction(queries[0])[None])
    spent, examples = {"tracin": 0.0, "caching": 0.0}, sum(map(len, batches))
    for done, batch in enumerate(batches):
        progress(f"TracIn, {threads} threads", done, len(batches))
        seconds, cached = timed(lambda batch=batch: compressor(batch))
        spent["caching"] += seconds
        spent["tracin"] += timed(lambda b=batch, n=cached.norms: influences(compressor, b, direction, n))[0]
    gradients = [timed(lambda batch=batch: compressor(batch))[0] for batch in queries]
    return {
        "seconds_per_row": {name: total / examples for name, total in spent.items()},
        "direction_seconds": direction_seconds,
        "query_gradient_seconds": {kind: spread(gradients[i :: len(KINDS)]) for i, kind in enumerate(KINDS)},
    }
