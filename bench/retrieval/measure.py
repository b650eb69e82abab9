"""One way of searching, measured beside the exact scan and FAISS's Flat over the same fold, in the same minutes."""

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch

from rapidindex.progress import Progress
from rapidindex.search.exact import exact_search, live_scores, to_float32, top
from rapidindex.search.faiss_index import AnnIndex, load_faiss
from rapidindex.search.vector_index import VectorIndex, fold
from rapidindex.store import Store
from rapidindex.store.rows import Rows

DEPTHS = (10, 100)
CURVE = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
"""Margins at which recall and latency are measured, whatever the index chose, with a part of the queries."""
_CURVE_QUERIES, _CURVE_SINGLES, _NEARLY_ALL = 60, 20, 0.999
BATCH = 100
THREADS = (1, 2)
_RESERVE = 4 * 2**30  # of memory, for all that is neither an index nor the cached files
_TIES = 28
_DIRECTIONS = {"proponents": True, "opponents": False}
_ONE_ROUND = {"exact": 1, "flat": 2, "proponents": 10, "opponents": 5}


@dataclass(frozen=True)
class Bed:
    """A store, the queries put to it, and their exact answers."""

    store: Store
    rows: Rows
    queries: np.ndarray
    """float32 [queries, K]."""
    kinds: list[str]
    answers: dict[bool, list[tuple[np.ndarray, np.ndarray]]]
    """For True (proponents) and False (opponents), a query: scores and numbers of the best live rows."""
    rounds: int

    @classmethod
    def of(cls, store: Store, level: str, queries: np.ndarray, kinds: list[str], rounds: int) -> "Bed":
        """Finds the answers: one pass over the rows."""
        rows = store.rows(level)
        live, answers = np.flatnonzero(rows.live_mask), {True: [], False: []}
        for scores in live_scores(rows, queries):
            for largest, so_far in answers.items():
                best = top(scores, DEPTHS[-1] + _TIES, largest)
                so_far.append((scores[best], live[best]))
        return cls(store, rows, queries, kinds, answers, rounds)

    @property
    def live(self) -> int:
        return int(np.count_nonzero(self.rows.live_mask))

    def recall(self, found: np.ndarray, k: int, largest: bool) -> dict[str, float]:
        """Of each kind of query the mean share of the k best among `found` [queries, k]; ties for the last count."""
        shares: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        for kind, numbers, (scores, best) in zip(self.kinds, found, self.answers[largest], strict=True):
            depth = min(k, len(best))
            true = best[scores >= scores[depth - 1] if largest else scores <= scores[depth - 1]]
            shares[kind].append(min(depth, int(np.isin(true, numbers).sum())) / depth)
        return {kind: round(float(np.mean(share)), 5) for kind, share in shares.items()}

    def part(self, count: int) -> "Bed":
        """With about so many of the queries, drawn."""
        drawn = np.random.default_rng(19).permutation(len(self.kinds))[:count].tolist()
        answers = {largest: [each[i] for i in drawn] for largest, each in self.answers.items()}
        return replace(self, queries=self.queries[drawn], kinds=[self.kinds[i] for i in drawn], answers=answers)

    def room(self) -> int:
        """Bytes of memory that indexes can take while the store's files stay in the cache."""
        files = len(self.rows) * self.rows.row_bytes
        return max(2**28, psutil.virtual_memory().total - files - _RESERVE)


class Flat:
    """FAISS's Flat index in float32 over the fold, nothing re-ranked; of a part of the rows where memory is short."""

    def __init__(self, bed: Bed, dim: int, room: int) -> None:
        self._faiss, self.dim = load_faiss(), dim
        self.index = self._faiss.IndexFlatIP(dim)
        self._numbers = np.flatnonzero(bed.rows.live_mask)[: max(1, room // (4 * dim))]
        self.scale = bed.live / len(self._numbers)
        """What its times are multiplied by."""
        wanted = np.zeros(len(bed.rows), bool)
        wanted[self._numbers] = True
        for first, block, scale in bed.rows.blocks(max(1, 2**25 // (4 * bed.rows.K))):
            here = wanted[first : first + len(block)]
            if here.any():
                self.index.add(fold(to_float32(block, scale), dim).numpy()[here])

    def search(self, queries: np.ndarray, k: int, largest: bool = True) -> np.ndarray:
        folded = np.ascontiguousarray(fold(queries if largest else -queries, self.dim))
        return self._numbers[self.index.search(folded, min(k, len(self._numbers)))[1]]


def baselines(bed: Bed, dim: int, flat: Flat) -> dict[str, Any]:
    """Flat's own recall, and what 100 queries at once take Flat."""
    found = {largest: flat.search(bed.queries, DEPTHS[-1], largest) for largest in (True, False)}
    measured = {"dim": dim, "rows": flat.index.ntotal, "scale": flat.scale, "bytes_per_row": 4 * dim}
    if flat.scale == 1:
        measured["recall"] = {
            _direction(largest): {str(k): bed.recall(numbers[:, :k], k, largest) for k in DEPTHS}
            for largest, numbers in found.items()
        }
    return measured | {"batch_seconds": batches(bed, lambda queries, _: flat.search(queries, 10), flat.scale)}


def batches(
    bed: Bed, search: Callable[[np.ndarray, int], Any], scale: float = 1.0, repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds that `search` (queries, threads) takes for 100 queries at once, by threads."""
    together = bed.queries[np.arange(BATCH) % len(bed.queries)]
    seconds = {}
    for threads in THREADS:
        pin(threads)
        seconds[str(threads)] = [scale * timed(lambda t=threads: search(together, t))[0] for _ in range(repeats)]
    return seconds


def measure(bed: Bed, factory: str, dim: int, flat: Flat, progress: Progress) -> dict[str, Any]:
    """Build the index, and measure it beside the exact scan and Flat."""
    pin(max(THREADS))
    steps: dict[str, float] = {}
    with bed.store.lock():
        seconds, index = timed(
            lambda: VectorIndex.build(bed.rows, factory=factory, dim=dim, progress=_clock(steps, progress))
        )
    card = index.metadata
    figures = {"factory": factory, "dim": dim, "live": bed.live, "build_seconds": seconds, "build_steps": steps}
    figures |= {"bytes_per_row": card.file_bytes / bed.live, "stated": {}, "recall": {}}
    for largest in (True, False):
        calibration = card.calibration(largest)
        figures["stated"][_direction(largest)] = calibration and asdict(calibration)
        figures["recall"][_direction(largest)] = _recalls(bed, index, largest)
    del index
    figures["latency"] = {str(t): _latency(bed, flat, t) for t in THREADS}
    opened = {t: VectorIndex.open(bed.rows, threads=t) for t in THREADS}
    repeats = 3 if _searches(opened[1], True) else 1
    figures["batch_seconds"] = batches(bed, lambda queries, t: opened[t].search(queries, 10), repeats=repeats)
    figures["curve"] = _curve(bed.part(_CURVE_QUERIES), progress)
    pin(max(THREADS))
    return figures


def fits(bed: Bed, factory: str, dim: int) -> bool:
    """Whether the index has room in memory beside a Flat of at least a part of the rows."""
    return AnnIndex.create(factory, dim).bytes_per_row() * bed.live <= 0.6 * bed.room()


def pin(threads: int) -> int:
    """Let torch and FAISS use so many threads."""
    torch.set_num_threads(threads)
    load_faiss().omp_set_num_threads(threads)
    return threads


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile."""
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(seconds)}


def _searches(index: VectorIndex | None, largest: bool) -> bool:
    """Whether it searches candidates in this direction, or scans all rows."""
    calibration = index and index.metadata.calibration(largest)
    return bool(calibration and calibration.margin is not None)


def _recalls(bed: Bed, index: VectorIndex, largest: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for k in DEPTHS:
        found = index.search(bed.queries, k, largest=largest)
        figures[str(k)] = bed.recall(found.rows, k, largest) | {"method": found.method}
    return figures


def _latency(bed: Bed, flat: Flat, threads: int) -> dict[str, Any]:
    """Seconds of one query for 10 rows, all ways in turn; the files are in the cache after the first round."""
    pin(threads)
    index = VectorIndex.open(bed.rows, threads=threads)
    parts: list[tuple[float, float]] = []

    def ann(query: np.ndarray, largest: bool) -> None:
        found = index.search(query, 10, largest=largest)
        if largest and found.method == "ann":
            parts.append((found.search_seconds, found.rerank_seconds))

    ways = {
        "exact": lambda query: exact_search(bed.rows, query, 10, threads=threads),
        "flat": lambda query: flat.search(query, 10),
        "proponents": lambda query: ann(query, True),
        "opponents": lambda query: ann(query, False),
    }
    scanned = {name for name, largest in _DIRECTIONS.items() if not _searches(index, largest)}
    seconds, faults = _in_turn({name: way for name, way in ways.items() if name not in scanned}, bed)
    seconds |= dict.fromkeys(scanned, seconds["exact"])  # the same scan: not timed again
    seconds["flat"] = [flat.scale * each for each in seconds["flat"]]
    figures = {name: spread(each) for name, each in seconds.items()} | {"major_faults": faults}
    if parts:
        figures |= {"search": spread([a for a, _ in parts]), "rerank": spread([b for _, b in parts])}
    ours = figures["proponents"]["median"]
    return figures | {"times": {name: figures[name]["median"] / ours for name in ("exact", "flat")}}


def _in_turn(ways: dict[str, Callable[[np.ndarray], None]], bed: Bed) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way, and how many pages were read from the disk; the first round is not counted."""
    queries = itertools.cycle(np.random.default_rng(17).permutation(len(bed.queries)))

    def timed_once(way: Callable[[np.ndarray], None]) -> float:
        query = bed.queries[[next(queries)]]
        return timed(lambda: way(query))[0]

    def one_round() -> dict[str, list[float]]:
        return {name: [timed_once(way) for _ in range(_ONE_ROUND[name])] for name, way in ways.items()}

    one_round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    rounds = [one_round() for _ in range(bed.rounds)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
    return {name: [seconds for one in rounds for seconds in one[name]] for name in ways}, faults


def _curve(bed: Bed, progress: Progress) -> list[dict[str, Any]]:
    """What each margin finds, up to the first that finds nearly all: wider ones only take longer."""
    points = []
    for margin in CURVE:
        points.append(_at(bed, margin, progress))
        if all(min(found.values()) >= _NEARLY_ALL for found in points[-1].get("recall", {0: {0: 1.0}}).values()):
            break
    return points


def _at(bed: Bed, margin: float, progress: Progress) -> dict[str, Any]:
    """Recall@10 and latency on one thread with another margin than the index chose."""
    progress("recall against speed", CURVE.index(margin), len(CURVE))
    index = VectorIndex.open(bed.rows, threads=pin(1))
    card = index.metadata
    if card.proponents is None or card.opponents is None:
        return {"margin": margin}
    forced = {name: replace(getattr(card, name), margin=margin) for name in ("proponents", "opponents")}
    index.metadata = replace(card, **forced)
    found = {largest: index.search(bed.queries, 10, largest=largest) for largest in (True, False)}
    recall = {_direction(largest): bed.recall(result.rows, 10, largest) for largest, result in found.items()}
    some = bed.queries[:_CURVE_SINGLES]
    singles = [timed(lambda q=q: index.search(q[None], 10))[0] for q in some]
    return {"margin": margin, "method": found[True].method, "recall": recall, "seconds": spread(singles)}


def _clock(steps: dict[str, float], progress: Progress) -> Progress:
    """A `Progress` that also adds up the seconds of each step."""
    last = [time.perf_counter()]

    def told(stage: str, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        steps[stage] = steps.get(stage, 0.0) + (now - last[0])
        last[0] = now
        progress(stage, done, total, note)

    return told


def _direction(largest: bool) -> str:
    return next(name for name, way in _DIRECTIONS.items() if way == largest)
