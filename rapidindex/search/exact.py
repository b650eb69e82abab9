"""The exact scan: inner products of queries with every stored row, streamed. The oracle of every faster search.

Rows stay 8-bit on disk and are mapped, not loaded: a few MiB at a time become float32 and meet all queries in one
matrix product. Knows vectors, not text, and nothing of FAISS.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from rapidindex.errors import DamagedIndex, QueryError, UsageError
from rapidindex.results import HISTOGRAM_BINS, ScoreSummary
from rapidindex.store import Rows, damaged

_BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**28}
"""float32 bytes of a block. On a CPU 4 to 8 MiB stay in the cache between conversion and product: 12.5 GB/s of float16
with one query and one thread, against 6 GB/s at 64 MiB (20,000 rows, K = 16,384, an EPYC with 32 MiB of L3). A row of
65,536 takes 10.5 us with 8 bits an entry, where float16 took 20 (bench/README.md)."""
_GROUP_BYTES = 2**22
"""float32 bytes of single rows that meet a query together."""
_SCORES_BYTES = 2**30
"""float32 bytes of scores held at once; more queries than that take another pass over the rows."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found, best first. Where k is more than the live rows, the rest is row -1 with the worst score."""

    scores: Float32[np.ndarray, "queries k"]
    """Inner products at full K; -inf (opponents: +inf) beside row -1."""
    rows: Int64[np.ndarray, "queries k"]
    n: int
    """Live rows searched among."""
    largest: bool
    """True for proponents, False for opponents."""
    method: str
    """`exact` or `ann`."""
    recall: float | None
    """1.0 for `exact`; for `ann` what was measured for this direction when the index was built."""
    search_seconds: float
    rerank_seconds: float
    summaries: tuple[ScoreSummary, ...] | None
    """One a query, of all its scores; None for `ann`, which does not compute them."""

    def percentiles(self) -> Float32[np.ndarray, "queries k"]:
        """Percent of the live rows that score lower, taken from the rank; NaN beside row -1."""
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
    """The k live rows of the largest (or smallest) inner product with each query; equal scores: lower row first.

    `queries` are floats [queries, K] of any precision, computed with as float32. `device` is a torch device; `threads`
    are torch's, its own setting where None. Raises UsageError for queries of another shape or k < 1, QueryError for
    values that are not finite, DamagedIndex where a stored row's are not.
    """
    started = time.perf_counter()
    queries = checked_queries(queries, rows.K, k)
    live = np.flatnonzero(rows.live_mask)
    scores, found = padding(len(queries), k, largest)
    summaries = []
    for query, of_live in enumerate(live_scores(rows, queries, device=device, threads=threads)):
        best = top(of_live, k, largest)
        scores[query, : len(best)], found[query, : len(best)] = of_live[best], live[best]
        summaries.append(_summary(of_live))
    seconds = time.perf_counter() - started
    return SearchResult(scores, found, len(live), largest, "exact", 1.0, seconds, 0.0, tuple(summaries))


def scores_of(
    rows: Rows, numbers: Int64[np.ndarray, " n"], query: Float32[np.ndarray, " K"]
) -> Float32[np.ndarray, " n"]:
    """One query's inner products with the rows of these numbers.

    A few rows at a time go from their files into a buffer that stays in the cache, and meet the query together: 22 us a
    row of float16 at K = 65,536, of which 14 were its conversion, where one product a row took 34 (one thread).
    """
    scores, on_torch = np.empty(len(numbers), np.float32), torch.from_numpy(query)
    buffer = torch.empty(max(1, _GROUP_BYTES // (4 * rows.K)), rows.K)
    each = rows.each(numbers)
    while group := list(islice(each, len(buffer))):
        for row, (_, numbers_of_row, _) in zip(buffer, group, strict=False):
            row.copy_(torch.from_numpy(numbers_of_row))
        scale = np.array([scale for _, _, scale in group], np.float32)
        scores[[place for place, _, _ in group]] = torch.mv(buffer[: len(group)], on_torch).numpy() * scale
    check_finite(scores, rows, numbers)
    return scores


def checked_queries(queries: np.ndarray, K: int, k: int) -> Float32[np.ndarray, "queries K"]:
    """`queries` as contiguous float32, if they are what a search can use; see `exact_search` for the errors."""
    if k < 1:
        raise UsageError(f"k must be at least 1, not {k}.")
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != K:
        raise UsageError(
            f"Queries must have the shape [queries, {K}], not {list(queries.shape)}.",
            hint="Compress them as the index was: the same model, -K, --shuffles and seed.",
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported as not finite
        queries = np.ascontiguousarray(queries, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise QueryError(
            f"The gradient of query {bad[0]} holds values that are not finite numbers.",
            hint="Its loss may have overflowed: try --dtype float32.",
        )
    return queries


def live_scores(
    rows: Rows, queries: Float32[np.ndarray, "queries K"], *, device: str = "cpu", threads: int | None = None
) -> Iterator[Float32[np.ndarray, " live"]]:
    """Query by query, its inner products with all live rows in order, from as few passes over them as memory allows."""
    live = np.flatnonzero(rows.live_mask)
    per_pass = max(1, _SCORES_BYTES // (4 * max(1, len(rows))))
    for first in range(0, len(queries), per_pass):
        with torch_threads(threads):
            passed = _all_scores(rows, queries[first : first + per_pass], torch.device(device))
        for scores in passed:
            check_finite(scores[live], rows, live)
            yield scores[live]


def check_finite(scores: np.ndarray, rows: Rows, numbers: np.ndarray) -> None:
    """DamagedIndex or QueryError, whoever is to blame, where the scores of the rows of these numbers are not finite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if not len(bad):
        return
    row = int(numbers[bad[0]])
    if np.isfinite(rows.take([row])).all():
        raise QueryError("The query's gradient is so large that its scores overflow.", hint="Scale the query down.")
    raise not_finite(rows, row)


def not_finite(rows: Rows, row: int) -> DamagedIndex:
    """The error for a stored row that holds NaN or infinity."""
    return damaged(rows.path, f"row {row} holds values that are not finite numbers")


def padding(queries: int, k: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of a search that found nothing."""
    scores = np.full((queries, k), -np.inf if largest else np.inf, np.float32)
    return scores, np.full((queries, k), -1, np.int64)


def top(scores: Float32[np.ndarray, " n"], k: int, largest: bool) -> Int64[np.ndarray, " best"]:
    """Positions of the min(k, n) best scores, best first; of equal scores the lower position."""
    signed = -scores if largest else scores
    if k < len(signed):
        worst = np.partition(signed, k - 1)[k - 1]
        better, equal = np.flatnonzero(signed < worst), np.flatnonzero(signed == worst)
        positions = np.concatenate([better, equal[: k - len(better)]])
    else:
        positions = np.arange(len(signed))
    return positions[np.argsort(signed[positions], kind="stable")]


def to_float32(block: np.ndarray, scale: np.ndarray, device: torch.device | str = "cpu") -> Float32[Tensor, "m K"]:
    """A block of `Rows.blocks` as float32 rows on `device`."""
    return torch.from_numpy(block).to(device, torch.float32).mul_(torch.tensor(scale, device=device)[:, None])


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads within; None leaves its setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _all_scores(rows: Rows, queries: np.ndarray, device: torch.device) -> Float32[np.ndarray, "queries rows"]:
    on_device = torch.from_numpy(queries).to(device)
    scores = torch.empty(len(queries), len(rows), device=device)
    block_rows = max(1, _BLOCK_BYTES.get(device.type, 2**28) // (4 * rows.K))
    buffer = torch.empty(min(block_rows, len(rows)), rows.K, device=device)  # one for all: new memory costs more
    for first, block, scale in rows.blocks(block_rows):
        part, here = scores[:, first : first + len(block)], buffer[: len(block)]
        here.copy_(torch.from_numpy(block).to(device))  # moved as they lie, and made float32 there
        part.copy_(on_device @ here.T)
        part.mul_(torch.tensor(scale, device=device))
    return scores.cpu().numpy()


def _summary(scores: Float32[np.ndarray, " n"]) -> ScoreSummary:
    if not len(scores):
        return ScoreSummary(0, 0.0, 0.0, 0.0, 0.0, [0] * HISTOGRAM_BINS)
    wide = scores.astype(np.float64)
    least, most = wide.min(), wide.max()
    bins = (wide - least) * (HISTOGRAM_BINS / (most - least or 1.0))
    counts = np.bincount(bins.astype(np.int64).clip(max=HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
    mean, std = float(wide.mean()), float(wide.std())
    return ScoreSummary(len(wide), float(least), float(most), mean, std, counts.tolist())
