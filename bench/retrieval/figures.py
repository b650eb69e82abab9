"""What the benches of retrieval wrote to bench/results/, and what follows from it."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.common import RESULTS
from rapidindex.store.shards import ROW_TYPE

AIMS = {"proponents": 0.99, "opponents": 0.98, "exact": 25, "flat": 10, "bytes_per_row": 600, "tracin": 6326}
LARGE = 100_000
DEFAULT_FACTORY, DIM = "HR,RaBitQ", 16_384
"""The index that a large store gets by default, and over which fold, where its K is no less."""

Figures = dict[str, Any]


def default(figures: Figures) -> str:
    """Under which name a store's figures hold those of its default index."""
    return f"{DEFAULT_FACTORY}@{min(DIM, figures['K'])}"


def read() -> tuple[dict[str, Figures], dict[str, Figures]]:
    """The figures of stores, smallest first, and of the other stages."""
    found = {
        path.stem.split("_", 1)[1]: json.loads(path.read_text())["figures"] for path in RESULTS.glob("retrieval_*.json")
    }
    stores = {name: figures for name, figures in found.items() if "live" in figures}
    ordered = dict(sorted(stores.items(), key=lambda item: item[1]["live"]))
    return ordered, {name: figures for name, figures in found.items() if name not in stores}


def configurations(figures: Figures) -> Iterator[Figures]:
    """What was measured of each factory over each fold."""
    for name, value in figures.items():
        if "@" in name and not name.startswith("alone"):
            yield value


def defaults(figures: Figures) -> Iterator[Figures]:
    """The default index at every size of a store, the smallest first."""
    found = [value for name, value in figures.items() if name.startswith("at ") or name == default(figures)]
    yield from sorted(found, key=lambda one: one["live"])


def latencies(stores: dict[str, Figures]) -> dict[int, list[tuple[int, Figures]]]:
    """For each K (live rows, latency on one thread) of the default index over rows as they are kept now.

    Exact scans that stood in for it are left out.
    """
    found: dict[int, list[tuple[int, Figures]]] = {}
    for figures in stores.values():
        if figures.get("row_type") != ROW_TYPE:
            continue
        measured = [(one["live"], one["latency"]["1"]) for one in defaults(figures)]
        found.setdefault(figures["K"], []).extend(pair for pair in measured if "search" in pair[1])
    return {K: sorted(pairs, key=lambda pair: pair[0]) for K, pairs in found.items()}


def fits(stores: dict[str, Figures]) -> dict[int, tuple[float, float, list[tuple[int, float]]]]:
    """For each K: (a, b, points) of seconds = a · N^b, over the latency of the default index."""
    fitted = {}
    for K, pairs in latencies(stores).items():
        points = [(n, latency["proponents"]["median"]) for n, latency in pairs]
        if len({n for n, _ in points}) > 1:
            b, log_a = np.polyfit(*np.log(np.array(points)).T, 1)
            fitted[K] = (float(np.exp(log_a)), float(b), points)
    return fitted


def worst(recall: Figures) -> float:
    """Of the kinds of query."""
    return min(value for kind, value in recall.items() if kind != "method")


def ratios(tracin: Figures, stores: dict[str, Figures]) -> Iterator[tuple]:
    for figures in stores.values():
        for threads, spent in tracin["threads"].items():
            if default(figures) in figures:
                search = figures[default(figures)]["latency"][threads]["proponents"]["median"]
                gradient = spent["query_gradient_seconds"]["whole answer"]["median"]
                seconds = figures["live"] * spent["seconds_per_row"]["tracin"]
                yield figures["live"], figures["K"], threads, gradient, search, seconds, seconds / (gradient + search)


def passes(tracin: Figures, stores: dict[str, Figures]) -> Iterator[tuple[str, float]]:
    """(threads, N) from which TracIn takes so many times as long; the search costs what it cost at the nearest N."""
    for threads, spent in tracin["threads"].items():
        told = [one for one in ratios(tracin, stores) if one[2] == threads]
        candidates = [AIMS["tracin"] * (one[3] + one[4]) / spent["seconds_per_row"]["tracin"] for one in told]
        if candidates:
            yield (
                threads,
                min(zip(candidates, told, strict=True), key=lambda pair: abs(np.log(pair[0] / pair[1][0])))[0],
            )
