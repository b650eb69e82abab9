"""What computing in bfloat16 does to the scores, and what it saves: the same rows and queries in both.

Each dtype goes the whole way by itself, its second moment included. Queries are rows that are not in the index.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import torch

from bench.peers.measuring import seconds
from bench.ways import Setting, make, open_made
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.progress import Progress

DTYPES = ("float32", "bfloat16")
QUERIES = 16
TOP = 10


def compare(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Rank correlation and overlap of the top 10 with float32, and the seconds of each, batch by batch in turn."""
    settings = {}
    for dtype in DTYPES:
        same = {"full": options.full, "dtype": dtype}
        make(options.work, options.data, **same, progress=progress)
        settings[dtype] = open_made(options.work, options.data, options.rows, options.batch_tokens, **same)
    some = settings[DTYPES[0]].items
    asked = [item.example.id for item in some[:: max(1, len(some) // QUERIES)][:QUERIES]]
    rows: dict[str, dict[str, np.ndarray]] = {dtype: {} for dtype in DTYPES}
    spent: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    batches = plan_batches(some, options.batch_tokens)
    for setting in settings.values():  # once unmeasured: maps are made, memory is taken
        setting.compressor(as_batch(batches[-1], "cpu"))
    for number, batch in enumerate(batches):
        progress("both dtypes", number, len(batches))
        for dtype in DTYPES[:: 1 if number % 2 else -1]:
            work = _into(rows[dtype], settings[dtype], batch)
            spent[dtype].append(seconds(work))
    figures = _agreement(*(_scores(rows[dtype], asked) for dtype in DTYPES))
    told = {"full": options.full, "threads": options.threads, "K": settings[DTYPES[0]].sketch.config.K}
    told |= {
        "rows": len(some) - len(asked),
        "queries": len(asked),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {**told, "seconds": {dtype: sum(spent[dtype]) for dtype in DTYPES}, **figures}


def _into(rows: dict[str, np.ndarray], setting: Setting, batch: list[Item]):
    def work() -> None:
        found = setting.compressor(as_batch(batch, "cpu")).rows.numpy()
        rows.update(zip([item.example.id for item in batch], found, strict=True))

    return work


def _scores(rows: dict[str, np.ndarray], asked: list[str]) -> np.ndarray:
    """float32 [queries, rows]."""
    others = sorted(set(rows) - set(asked))
    return np.stack([rows[id] for id in asked]) @ np.stack([rows[id] for id in others]).T


def _agreement(reference: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation and the overlap of the top 10, by query: median and lowest."""
    ranks = [np.argsort(np.argsort(some, axis=1), axis=1) for some in (reference, scores)]
    spearman = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(*ranks, strict=True)]
    top = [np.argsort(-some, axis=1)[:, :TOP] for some in (reference, scores)]
    overlap = [len(set(a) & set(b)) / TOP for a, b in zip(*top, strict=True)]
    return {
        "spearman": {"median": statistics.median(spearman), "lowest": min(spearman), "each": spearman},
        "top10_overlap": {"mean": statistics.mean(overlap), "lowest": min(overlap), "each": overlap},
    }
