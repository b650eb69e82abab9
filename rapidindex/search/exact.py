"""The exact scan: inner products of queries with every stored row, block by block. Every faster search is tested
against it.

Rows are mapped, not loaded. Each thread takes the next block of a few MiB and multiplies it by all queries, with one
inner thread: a product as narrow as one query gains nothing from more. Of 8-bit rows the scan's scores are near enough
for a summary; those that decide the answer are computed exactly. To a GPU all blocks go in turn, and all scores are
exact. Knows vectors, not text, and nothing of FAISS.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from rapidindex.errors import DamagedIndex, QueryError, UsageError
from rapidindex.results import HISTOGRAM_BINS, ScoreSummary
from rapidindex.search.products import (
    Block,
    Multiply,
    products_with,
    products_with_each,
    rough_products_with,
    streamed_scores,
)
from rapidindex.store import Rows, damaged

SCORES_BYTES = 2**30
"""Scores held at once, in bytes of float32; more queries than fit take another pass over the rows."""
_BLOCK_BYTES = 2**24
"""A block as it is stored: its rows are multiplied several times while they are in the cache."""
_BLOCK_BYTES_GPU = 2**26
_ROUGH = 0.03
"""One 8-bit vector of a query is tried where it leaves scores off by less than this, in products of the two lengths."""
_TRIED, _LONG = 4, 1.0
"""Blocks of rows, and seconds, that finding out the faster device takes."""
_GROUP = 64
"""Scores of which the largest is looked at first."""
_WIDE = 1e30
"""Scores that lie farther apart, or nearer than its inverse, are summed up in float64."""
_FEW, _NEAR = 1000, 1 / 16
"""Rows, and the share of all, that may be scored a second time after that; more cost as much as a second vector."""


@dataclass(frozen=True)
class SearchResult:
    """The k best rows for each query, best first. Where there are fewer than k live rows, row -1 fills the rest."""

    scores: Float32[np.ndarray, "queries k"]
    """Inner products at full K; beside row -1 the worst score: -inf (opponents: +inf)."""
    rows: Int64[np.ndarray, "queries k"]
    """Row numbers."""
    n: int
    """Live rows that were searched."""
    largest: bool
    """True for proponents, False for opponents."""
    method: str
    """`exact` or `ann`."""
    recall: float | None
    """1.0 for `exact`; for `ann` the recall measured for this direction when the index was built."""
    search_seconds: float
    rerank_seconds: float
    summaries: tuple[ScoreSummary, ...] | None
    """The distribution of each query's scores over all live rows; None for `ann`, which does not compute them."""
    device: str = "cpu"
    """Where rows were scanned, or FAISS searched, as torch names it."""

    def percentiles(self) -> Float32[np.ndarray, "queries k"]:
        """Return the percentage of live rows that score lower, computed from the rank; NaN beside row -1."""
        rank = np.arange(self.rows.shape[1], dtype=np.float32)
        lower = self.n - 1 - rank if self.largest else rank
        return np.where(self.rows >= 0, 100 * lower / max(self.n, 1), np.float32(np.nan)).astype(np.float32)


def exact_search(
    rows: Rows,
    queries: np.ndarray,
    k: int,
    *,
    largest: bool = True,
    device: str = "cpu",
    threads: int | None = None,
) -> SearchResult:
    """Find the k live rows with the largest (or smallest) inner product with each query.

    `queries` are floats [queries, K] of any precision, converted to float32. Of rows with equal scores the lower number
    comes first. `device` is a torch device; `threads` is torch's number of threads, by default its current setting.
    Raises UsageError for queries of another shape or k < 1, QueryError for queries that are not finite, DamagedIndex
    for stored rows that are not.
    """
    started = time.perf_counter()
    queries = checked_queries(queries, rows.K, k)
    live = np.flatnonzero(rows.live_mask)
    if device == "cpu":
        each = _scores_of_all(rows, queries, k, largest, threads)
    else:
        each = live_scores(rows, queries, device=device)
    return ranked(live, each, len(queries), k, largest=largest, started=started, device=device)


def ranked(
    live: Int64[np.ndarray, " live"],
    each: Iterable[Float32[np.ndarray, " live"]],
    queries: int,
    k: int,
    *,
    largest: bool,
    started: float,
    device: str,
) -> SearchResult:
    """Return the k best rows of the numbers `live`, by the scores that each of the queries gives them.

    `started` is when the search began, by `time.perf_counter`; `device` is where it ran.
    """
    scores, numbers = padding(queries, k, largest)
    summaries = []
    for query, all_scores in enumerate(each):
        best = top(all_scores, k, largest)
        scores[query, : len(best)], numbers[query, : len(best)] = all_scores[best], live[best]
        summaries.append(_summary(all_scores))
    seconds = time.perf_counter() - started
    return SearchResult(scores, numbers, len(live), largest, "exact", 1.0, seconds, 0.0, tuple(summaries), device)


def scores_of(
    rows: Rows, numbers: Int64[np.ndarray, " n"], query: Float32[np.ndarray, " K"], *, device: str = "cpu"
) -> Float32[np.ndarray, " n"]:
    """Return the inner products of one query with the n rows of these numbers, computed on `device`.

    Raises QueryError or DamagedIndex as `check_finite` does. A few rows at a time are copied side by side, and
    multiplied together.
    """
    blocks = _gathered(rows, numbers)
    if device == "cpu":
        scores = _multiplied(blocks, len(numbers), 1, products_with(query[None], rows.row_type), threads=1)[0]
    else:
        scores = streamed_scores(query[None], blocks, len(numbers), device)[0]
    check_finite(scores, rows, numbers)
    return scores


def checked_queries(queries: np.ndarray, K: int, k: int) -> Float32[np.ndarray, "queries K"]:
    """Convert `queries` [queries, K] to contiguous float32.

    Raises UsageError for another shape or k < 1, QueryError for values that float32 does not hold as finite numbers.
    """
    if k < 1:
        raise UsageError(f"k must be at least 1, not {k}.")
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != K:
        raise UsageError(
            f"Queries must have the shape [queries, {K}], not {list(queries.shape)}.",
            hint="Compress them as the index was: the same model, -K, --shuffles and seed.",
        )
    with np.errstate(over="ignore"):  # an overflow becomes infinite, and is reported below
        queries = np.ascontiguousarray(queries, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise QueryError(
            f"The gradient of query {bad[0]} holds values that are not finite numbers.",
            hint="Its loss may have overflowed: try --dtype float32.",
        )
    return queries


def live_scores(
    rows: Rows,
    queries: Float32[np.ndarray, "queries K"],
    *,
    device: str = "cpu",
    threads: int | None = None,
    scores_bytes: int = SCORES_BYTES,
    block_bytes: int | None = None,
) -> Iterator[Float32[np.ndarray, " live"]]:
    """Yield for each query its inner products with all live rows, in the order of the rows.

    Scores take at most `scores_bytes` of memory, which decides the number of passes over the rows; a block of stored
    rows takes `block_bytes`, by default what suits the device. Raises QueryError or DamagedIndex as `check_finite`.
    """
    if device == "cpu":
        multiply_with = partial(products_with, row_type=rows.row_type)
        score = partial(_all_scores, rows, multiply_with=multiply_with, threads=threads, block_bytes=block_bytes)
    else:
        score = partial(_streamed, rows, device=device, block_bytes=block_bytes)
    return _scanned(rows, queries, score, scores_bytes)


def faster_device(rows: Rows, device: str, *, threads: int | None = None) -> str:
    """Return where the rows are scanned sooner, `device` or `cpu`: measured, with one query and 64 MiB of them."""
    query = np.random.default_rng(0).standard_normal((1, rows.K), np.float32)
    some = list(islice(_blocks(rows, _BLOCK_BYTES), _TRIED))
    n = sum(len(entries) for entries, _ in some)
    multiply = rough_products_with(query, rows.row_type, parts=1)[0]
    return faster(
        {
            "cpu": lambda: _multiplied(iter(some), n, 1, multiply, threads or torch.get_num_threads()),
            device: lambda: streamed_scores(query, some, n, device),
        }
    )


def faster(ways: dict[str, Callable[[], object]]) -> str:
    """Return the name of the fastest way, by the least of three times; what takes long is timed once."""

    def seconds(name: str) -> float:
        spent: list[float] = []
        while len(spent) < 3 and sum(spent) < _LONG:
            started = time.perf_counter()
            ways[name]()
            spent.append(time.perf_counter() - started)
        return min(spent)

    return min(ways, key=seconds)


def check_finite(scores: Float32[np.ndarray, " n"], rows: Rows, numbers: Int64[np.ndarray, " n"]) -> None:
    """Check that a query's scores with the rows of these numbers are finite.

    Raises DamagedIndex where a stored row is not finite, QueryError where the query makes the scores overflow.
    """
    finite = np.isfinite(scores)
    if finite.all():
        return
    row = int(numbers[np.argmin(finite)])
    if np.isfinite(rows.take([row])).all():
        raise QueryError("The query's gradient is so large that its scores overflow.", hint="Scale the query down.")
    raise not_finite(rows, row)


def not_finite(rows: Rows, row: int) -> DamagedIndex:
    """Return the error for a stored row that holds NaN or infinity."""
    return damaged(rows.path, f"row {row} holds values that are not finite numbers")


def padding(
    queries: int, k: int, largest: bool
) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
    """Return the scores and row numbers of an empty result: the worst score and row -1 everywhere."""
    scores = np.full((queries, k), -np.inf if largest else np.inf, np.float32)
    return scores, np.full((queries, k), -1, np.int64)


def top(scores: Float32[np.ndarray, " n"], k: int, largest: bool) -> Int64[np.ndarray, " best"]:
    """Return the positions of the min(k, n) best scores, best first; of equal scores the lower position first."""
    signed = scores if largest else -scores
    reach = np.flatnonzero(signed >= _reached(signed, k)) if k < len(signed) else np.arange(len(signed))
    return reach[np.argsort(-signed[reach], kind="stable")[:k]]


def to_float32(
    block: np.ndarray, scale: Float32[np.ndarray, " m"], device: torch.device | str = "cpu"
) -> Float32[Tensor, "m K"]:
    """Convert a block of stored entries [m, K] and the rows' scales, from `Rows.blocks`, to float32 on `device`."""
    return torch.from_numpy(block).to(device, torch.float32).mul_(torch.tensor(scale, device=device)[:, None])


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the `with` block; None keeps the current setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scores_of_all(
    rows: Rows,
    queries: Float32[np.ndarray, "queries K"],
    k: int,
    largest: bool,
    threads: int | None,
    parts: int = 1,
) -> Iterator[Float32[np.ndarray, " live"]]:
    """Yield each query's scores of all live rows: exact where a row may be one of the k best, or the worst, else rough.

    A rough score, of `parts` 8-bit vectors of the query, is off by the row's length times an error at most. Where that
    leaves too many rows, the query is scanned again, with two vectors.
    """
    live = np.flatnonzero(rows.live_mask)
    lengths = rows.lengths[live]
    _, errors = rough_products_with(queries, rows.row_type, parts=parts)
    with np.errstate(over="ignore", invalid="ignore"):
        typical = np.linalg.norm(queries, axis=1) * np.median(lengths) if len(live) else 0
        if parts == 1 and (errors * lengths.max(initial=0) > _ROUGH * typical).any():
            yield from _scores_of_all(rows, queries, k, largest, threads, parts=2)
            return
    rough = partial(rough_products_with, row_type=rows.row_type, parts=parts)
    score = partial(_all_scores, rows, multiply_with=lambda some: rough(some)[0], threads=threads)
    exactly = products_with_each(queries, rows.row_type)
    each = zip(queries, errors, exactly, _scanned(rows, queries, score), strict=True)
    for query, error, multiply, scores in each:
        if error and len(live):
            near = _near(scores if largest else -scores, error, lengths, k)
            if parts == 1 and len(near) > max(_FEW, len(live) * _NEAR):
                yield from _scores_of_all(rows, query[None], k, largest, threads, parts=2)
                continue
            numbers = live[near]
            scores[near] = _multiplied(_gathered(rows, numbers), len(near), 1, multiply, threads=1)[0]
            check_finite(scores[near], rows, numbers)
        yield scores


def _near(
    scores: Float32[np.ndarray, " n"], error: np.float32, lengths: Float32[np.ndarray, " n"], k: int
) -> Int64[np.ndarray, " near"]:
    """Return the rows that may be among the k best, or be the worst, where each may be off by its length times `error`.

    They are looked for among a few: twice the largest such slack holds them all, and three times, whatever is rounded.
    """
    with np.errstate(over="ignore"):
        far = 3 * error * lengths.max()
        some = np.flatnonzero((scores >= _reached(scores, k) - far) | (scores <= scores.min() + far))
        slack = error * lengths[some]
        least, most = scores[some] - slack, scores[some] + slack
    place = max(len(some) - k, 0)
    return some[(most >= np.partition(least, place)[place]) | (least <= most.min())]


def _reached(scores: Float32[np.ndarray, " n"], k: int) -> np.float32:
    """Return a score that k of the scores reach, or all where they are fewer, and not many more do.

    It is the k-th largest of the maxima of groups of scores.
    """
    groups = len(scores) // _GROUP
    if groups > k:
        scores = scores[: groups * _GROUP].reshape(_GROUP, groups).max(0)
    place = max(len(scores) - k, 0)
    return np.partition(scores, place)[place]


def _scanned(
    rows: Rows,
    queries: Float32[np.ndarray, "queries K"],
    score: Callable[[np.ndarray], np.ndarray],
    scores_bytes: int = SCORES_BYTES,
) -> Iterator[Float32[np.ndarray, " live"]]:
    """Yield for each query its scores of all live rows; `score` gives those of some queries and all rows."""
    live = np.flatnonzero(rows.live_mask)
    per_pass = max(1, scores_bytes // (4 * max(1, len(rows))))
    for first in range(0, len(queries), per_pass):
        for scores in score(queries[first : first + per_pass]):
            of_live = scores if len(live) == len(scores) else scores[live]
            check_finite(of_live, rows, live)
            yield of_live


def _streamed(
    rows: Rows, queries: Float32[np.ndarray, "queries K"], *, device: str, block_bytes: int | None
) -> Float32[np.ndarray, "queries rows"]:
    return streamed_scores(queries, _blocks(rows, block_bytes or _BLOCK_BYTES_GPU), len(rows), device)


def _all_scores(
    rows: Rows,
    queries: Float32[np.ndarray, "queries K"],
    *,
    multiply_with: Callable[[np.ndarray], Multiply],
    threads: int | None,
    block_bytes: int | None = None,
) -> Float32[np.ndarray, "queries rows"]:
    blocks = _blocks(rows, block_bytes or _BLOCK_BYTES)
    return _multiplied(blocks, len(rows), len(queries), multiply_with(queries), threads or torch.get_num_threads())


def _gathered(rows: Rows, numbers: Int64[np.ndarray, " n"]) -> Iterator[Block]:
    """Yield copies of the rows of these numbers, a few together."""
    together = max(1, _BLOCK_BYTES // rows.row_bytes)
    return (rows.gather(numbers[first : first + together]) for first in range(0, len(numbers), together))


def _blocks(rows: Rows, size: int) -> Iterator[Block]:
    """Yield all rows, in blocks of at most `size` bytes."""
    return ((entries, scale) for _, entries, scale in rows.blocks(max(1, size // rows.row_bytes)))


def _multiplied(
    blocks: Iterator[Block], n: int, queries: int, multiply: Multiply, threads: int
) -> Float32[np.ndarray, "queries n"]:
    """Return the scores of the n rows of `blocks`; each thread takes the next block."""
    scores, first, turn = np.empty((queries, n), np.float32), 0, threading.Lock()

    def multiply_blocks() -> None:
        nonlocal first
        while True:
            with turn:
                entries, scale = next(blocks, (None, None))
                if entries is None:
                    return
                there = slice(first, first + len(entries))
                first = there.stop
            np.multiply(multiply(entries), scale, out=scores[:, there])

    with torch_threads(1):  # here alone: threads that each set and restore the number leave each other's behind
        if threads == 1:
            multiply_blocks()
            return scores
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(multiply_blocks) for _ in range(threads)]:
                done.result()
    return scores


def _summary(scores: Float32[np.ndarray, " n"]) -> ScoreSummary:
    if not len(scores):
        return ScoreSummary(0, 0.0, 0.0, 0.0, 0.0, [0] * HISTOGRAM_BINS)
    lowest, highest = float(scores.min()), float(scores.max())
    width = highest - lowest or 1.0
    places = np.subtract(scores, lowest, dtype=np.float32 if 1 / _WIDE < width < _WIDE else np.float64)
    places *= HISTOGRAM_BINS / width
    counts = torch.bincount(torch.from_numpy(places.astype(np.int32)), minlength=HISTOGRAM_BINS + 1).tolist()
    counts[HISTOGRAM_BINS - 1] += counts.pop()  # the highest score
    mean = float(places.mean())
    places -= mean
    std = float(np.dot(places, places) / len(places)) ** 0.5
    unit = width / HISTOGRAM_BINS
    return ScoreSummary(len(scores), lowest, highest, lowest + unit * mean, unit * std, counts)
