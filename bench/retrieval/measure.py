"""Measure one search index beside the exact scan and FAISS's Flat over the same fold, in the same minutes."""

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psutil

from bench.common import pin, timed
from rapidindex.progress import Progress
from rapidindex.search.exact import exact_search, to_float32
from rapidindex.search.faiss_index import AnnIndex, load_faiss
from rapidindex.search.vector_index import VectorIndex, fold
from rapidindex.store import Rows, Store

DEPTHS = (10, 100)
CURVE = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
"""Margins at which recall and latency are measured beside the one that the index chose, with a part of the queries."""
_CURVE_QUERIES, _CURVE_SINGLES, _NEARLY_ALL = 60, 20, 0.999
BATCH = 100
THREADS = (1, 2)
LARGEST = {"proponents": True, "opponents": False}
_RESERVE = 4 * 2**30  # bytes of memory for all but the indexes and the cached files
_TIES = 28
_ONE_ROUND = {"exact": 1, "flat": 2, "proponents": 10, "opponents": 5}


@dataclass(frozen=True)
class Workload:
    """A store, the queries put to it, and their exact answers."""

    store: Store
    rows: Rows
    queries: np.ndarray
    """float32 [queries, K]."""
    kinds: list[str]
    """The kind of each query."""
    rounds: int
    answers: dict[str, tuple[np.ndarray, np.ndarray]]
    """By direction: scores and row numbers [queries, n] of the best live rows."""

    @classmethod
    def of(cls, store: Store, level: str, queries: np.ndarray, kinds: list[str], rounds: int) -> "Workload":
        """Find the exact answers, some more of them than are asked for: ties for the last place count as well."""
        rows, answers = store.rows(level), {}
        for way, largest in LARGEST.items() if rounds else ():
            found = exact_search(rows, queries, DEPTHS[-1] + _TIES, largest=largest)
            answers[way] = (found.scores, found.rows)
        return cls(store, rows, queries, kinds, rounds, answers)

    @property
    def live(self) -> int:
        """Number of live rows."""
        return int(np.count_nonzero(self.rows.live_mask))

    def recall(self, numbers: np.ndarray, k: int, way: str) -> dict[str, float]:
        """Return, by kind of query, the mean share of the k best rows that are among `numbers` [queries, k]."""
        shares: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        depth = min(k, self.live)
        for kind, found, scores, best in zip(self.kinds, numbers, *self.answers[way], strict=True):
            last = scores[depth - 1]
            true = best[(scores >= last if LARGEST[way] else scores <= last) & (best >= 0)]
            shares[kind].append(min(depth, int(np.isin(true, found).sum())) / depth)
        return {kind: round(float(np.mean(share)), 5) for kind, share in shares.items()}

    def part(self, count: int) -> "Workload":
        """Return the workload with at most `count` of the queries, drawn."""
        drawn = np.random.default_rng(19).permutation(len(self.kinds))[:count]
        answers = {way: (scores[drawn], rows[drawn]) for way, (scores, rows) in self.answers.items()}
        return replace(self, queries=self.queries[drawn], kinds=[self.kinds[i] for i in drawn], answers=answers)

    def free_bytes(self) -> int:
        """Return the memory that indexes can take while the store's files stay in the cache."""
        files = len(self.rows) * self.rows.row_bytes
        return max(2**28, psutil.virtual_memory().total - files - _RESERVE)


class Flat:
    """FAISS's Flat index in float32 over the fold, nothing re-ranked; of a part of the rows where memory is short."""

    def __init__(self, workload: Workload, dim: int) -> None:
        rows, most = workload.rows, max(1, int(0.4 * workload.free_bytes()) // (4 * dim))
        self.dim, self.index = dim, load_faiss().IndexFlatIP(dim)
        self._numbers = np.flatnonzero(rows.live_mask)[:most]
        self.scale = workload.live / len(self._numbers)
        """The factor by which its times are multiplied."""
        wanted = np.zeros(len(rows), bool)
        wanted[self._numbers] = True
        for first, block, scale in rows.blocks(max(1, 2**25 // (4 * rows.K))):
            here = wanted[first : first + len(block)]
            if here.any():
                self.index.add(fold(to_float32(block, scale), dim).numpy()[here])

    def search(self, queries: np.ndarray, k: int, largest: bool = True) -> np.ndarray:
        """Return the row numbers of the k best rows [queries, k]."""
        folded = np.ascontiguousarray(fold(queries if largest else -queries, self.dim))
        return self._numbers[self.index.search(folded, min(k, len(self._numbers)))[1]]

    def figures(self, workload: Workload) -> dict[str, Any]:
        """Measure its recall, and its seconds for 100 queries at once."""
        measured = {"dim": self.dim, "rows": self.index.ntotal, "scale": self.scale, "bytes_per_row": 4 * self.dim}
        if self.scale == 1:
            found = {way: self.search(workload.queries, DEPTHS[-1], largest) for way, largest in LARGEST.items()}
            measured["recall"] = {
                way: {str(k): workload.recall(numbers[:, :k], k, way) for k in DEPTHS} for way, numbers in found.items()
            }
        spent = batch_seconds(workload, lambda queries, _: self.search(queries, 10))
        return measured | {
            "batch_seconds": {threads: [self.scale * s for s in each] for threads, each in spent.items()}
        }


def batch_seconds(
    workload: Workload, search: Callable[[np.ndarray, int], Any], repeats: int = 3
) -> dict[str, list[float]]:
    """Return, by number of threads, the seconds that `search` (queries, threads) takes for 100 queries at once."""
    queries = workload.queries[np.arange(BATCH) % len(workload.queries)]
    seconds = {}
    for threads in THREADS:
        pin(threads)
        seconds[str(threads)] = [timed(lambda t=threads: search(queries, t))[0] for _ in range(repeats)]
    return seconds


def measure(workload: Workload, factory: str, dim: int, flat: Flat, progress: Progress) -> dict[str, Any]:
    """Build the index, and measure it beside the exact scan and Flat."""
    pin(max(THREADS))
    steps: dict[str, float] = {}
    clock = _clock(steps, progress)
    with workload.store.lock():
        seconds, index = timed(lambda: VectorIndex.build(workload.rows, factory=factory, dim=dim, progress=clock))
    figures = {"factory": factory, "dim": dim, "live": workload.live, "build_seconds": seconds, "build_steps": steps}
    figures |= {"bytes_per_row": index.metadata.file_bytes / workload.live, "stated": {}, "recall": {}}
    for way, largest in LARGEST.items():
        calibration = index.metadata.calibration(largest)
        figures["stated"][way] = calibration and asdict(calibration)
        found = {k: index.search(workload.queries, k, largest=largest) for k in DEPTHS}
        recall = {str(k): workload.recall(f.rows, k, way) | {"method": f.method} for k, f in found.items()}
        figures["recall"][way] = recall
    del index
    figures["latency"] = {str(threads): _latency(workload, flat, threads) for threads in THREADS}
    opened = {threads: VectorIndex.open(workload.rows, threads=threads) for threads in THREADS}
    repeats = 3 if _has_margin(opened[1], True) else 1
    figures["batch_seconds"] = batch_seconds(workload, lambda queries, t: opened[t].search(queries, 10), repeats)
    figures["curve"] = _curve(workload.part(_CURVE_QUERIES), progress)
    pin(max(THREADS))
    return figures


def fits_memory(workload: Workload, factory: str, dim: int) -> bool:
    """Return whether the index fits into memory beside a Flat of at least a part of the rows."""
    return AnnIndex.create(factory, dim).bytes_per_row() * workload.live <= 0.6 * workload.free_bytes()


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the median, and the tenth and ninetieth percentile."""
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(seconds)}


def _has_margin(index: VectorIndex, largest: bool) -> bool:
    """Return whether the index searches candidates in this direction; else it scans all rows."""
    calibration = index.metadata.calibration(largest)
    return bool(calibration and calibration.margin is not None)


def _latency(workload: Workload, flat: Flat, threads: int) -> dict[str, Any]:
    """Return the seconds of one query for 10 rows, all methods in turn; the files are in the cache by then."""
    index = VectorIndex.open(workload.rows, threads=pin(threads))
    parts: list[tuple[float, float]] = []

    def ann(query: np.ndarray, largest: bool) -> None:
        found = index.search(query, 10, largest=largest)
        if largest and found.method == "ann":
            parts.append((found.search_seconds, found.rerank_seconds))

    methods: dict[str, Callable[[np.ndarray], Any]] = {
        "exact": lambda query: exact_search(workload.rows, query, 10, threads=threads),
        "flat": lambda query: flat.search(query, 10),
        **{way: lambda query, largest=largest: ann(query, largest) for way, largest in LARGEST.items()},
    }
    scanned = {way for way, largest in LARGEST.items() if not _has_margin(index, largest)}
    seconds, faults = _in_turn({name: method for name, method in methods.items() if name not in scanned}, workload)
    seconds |= dict.fromkeys(scanned, seconds["exact"])  # the same scan: not timed again
    seconds["flat"] = [flat.scale * spent for spent in seconds["flat"]]
    figures = {name: spread(spent) for name, spent in seconds.items()} | {"major_faults": faults}
    if parts:
        figures |= {"search": spread([a for a, _ in parts]), "rerank": spread([b for _, b in parts])}
    ours = figures["proponents"]["median"]
    return figures | {"times": {name: figures[name]["median"] / ours for name in ("exact", "flat")}}


def _in_turn(methods: dict[str, Callable], workload: Workload) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of each method, and the pages read from the disk; the first round does not count."""
    queries = itertools.cycle(np.random.default_rng(17).permutation(len(workload.queries)))

    def once(method: Callable[[np.ndarray], Any]) -> float:
        query = workload.queries[[next(queries)]]
        return timed(lambda: method(query))[0]

    def one_round() -> dict[str, list[float]]:
        return {name: [once(method) for _ in range(_ONE_ROUND[name])] for name, method in methods.items()}

    one_round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    rounds = [one_round() for _ in range(workload.rounds)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    return {name: [seconds for each in rounds for seconds in each[name]] for name in methods}, faults


def _curve(workload: Workload, progress: Progress) -> list[dict[str, Any]]:
    """Measure each margin up to the first that finds nearly all: wider ones only take longer."""
    points = []
    for number, margin in enumerate(CURVE):
        progress("recall against speed", number, len(CURVE))
        points.append(_at_margin(workload, margin))
        if all(min(recall.values()) >= _NEARLY_ALL for recall in points[-1].get("recall", {}).values()):
            break  # an index without margins has no recall here either
    return points


def _at_margin(workload: Workload, margin: float) -> dict[str, Any]:
    """Measure recall@10, and latency on one thread, with another margin than the index chose."""
    index = VectorIndex.open(workload.rows, threads=pin(1))
    metadata = index.metadata
    if any(metadata.calibration(largest) is None for largest in LARGEST.values()):
        return {"margin": margin}
    forced = {way: replace(metadata.calibration(largest), margin=margin) for way, largest in LARGEST.items()}
    index.metadata = replace(metadata, **forced)
    found = {way: index.search(workload.queries, 10, largest=largest) for way, largest in LARGEST.items()}
    recall = {way: workload.recall(result.rows, 10, way) for way, result in found.items()}
    singles = [timed(lambda q=q: index.search(q[None], 10))[0] for q in workload.queries[:_CURVE_SINGLES]]
    return {"margin": margin, "method": found["proponents"].method, "recall": recall, "seconds": spread(singles)}


def _clock(steps: dict[str, float], progress: Progress) -> Progress:
    """Return a `Progress` that also adds up the seconds of each step in `steps`."""
    last = time.perf_counter()

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        before, last = last, time.perf_counter()
        steps[stage] = steps.get(stage, 0.0) + last - before
        progress(stage, done, total, note)

    return report
