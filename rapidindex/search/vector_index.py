"""The vector index of one level: the rows nearest to a query, approximately and fast, or exactly where that is as fast.

    query [K] ──fold──> [dim] ──FAISS──> candidates, more than asked for ──inner products at full K──> the best k

FAISS holds a fold of every row (neighbouring entries summed, the RapidGrad of a smaller K). What it returns is only a
list of candidates: scores always come from the stored rows. Opponents are the candidates of -query. How far down the
list a search has to go is measured when the index is built, for each direction, and so is the recall that this gives.

    INDEX/<level>/ann.json              the metadata: what the index was made from and how, and its recall
    INDEX/<level>/ann.<8 hex>.faiss     FAISS's own file, named by the metadata; none for the factory `exact`

The metadata is replaced in one step and its file never changes, so readers need no lock; writers hold the store's. Rows
that were removed after an index was built stay in it and are dropped from what it finds. Knows vectors, not text.
"""

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from os import sysconf
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from rapidindex.errors import ResourceError, StoreError, UsageError
from rapidindex.progress import Progress, silent
from rapidindex.search.calibration import calibrate, draw_held_out, max_candidates
from rapidindex.search.exact import (
    SearchResult,
    checked_queries,
    exact_search,
    not_finite,
    padding,
    scores_of,
    to_float32,
    top,
)
from rapidindex.search.faiss_index import AnnIndex, check_factory, faiss_version, require_gpu
from rapidindex.search.metadata import IndexMetadata, rebuild_hint
from rapidindex.store import ANN, Rows

EXACT = "exact"
DEFAULT_FACTORY = "HR,RaBitQ"
EXACT_MAX_ENTRIES = 2**29
"""Up to so many numbers in all rows the default is to scan them: under 0.1 s for a query."""
DIM = 16_384
"""Of the fold, at most. Rows of real gradients are nearly orthogonal, so that the noise of a short fold drowns who is
nearest: 4,096 is scanned in a quarter of the time, and needs many times the candidates, each 500 times as dear."""
TARGET_RECALL = 0.99
REMEASURE_GROWTH = 1.1
"""`update` measures recall again once there are so many times the live rows that it was measured with."""
_TRAIN_ROWS, _TRAIN_PER_LIST, _TRAIN_BYTES = 2**14, 64, 2**30
_FIRST_READ = 32  # candidates whose scores say which others to look at
_FOLD_BYTES = 2**25  # float32 bytes of rows folded at a time


def default_factory(rows: int, K: int) -> str:
    """`exact` for rows that are scanned in 0.1 s; one bit a dimension of a rotated fold (`HR,RaBitQ`) beyond."""
    return EXACT if rows * K <= EXACT_MAX_ENTRIES else DEFAULT_FACTORY


def search_index_bytes(rows: int, K: int) -> int:
    """Return roughly how many bytes, on disk and in memory, the default index of `rows` rows of length K takes.

    0 where the default is to scan the rows. Raises ResourceError where FAISS is needed and missing.
    """
    factory = default_factory(rows, K)
    return 0 if factory == EXACT else rows * AnnIndex.create(factory, min(DIM, K)).bytes_per_row()


class VectorIndex:
    """The vector index over `rows`. Searches may run in any number of threads and processes at once."""

    def __init__(
        self,
        rows: Rows,
        metadata: IndexMetadata,
        ann: AnnIndex | None,
        *,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.rows, self.metadata = rows, metadata
        self._ann, self._device, self._threads = ann, device, threads

    @classmethod
    def build(
        cls,
        rows: Rows,
        *,
        factory: str | None = None,
        dim: int = DIM,
        target_recall: float = TARGET_RECALL,
        gpu: bool = False,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> "VectorIndex":
        """Build the index of `rows` anew and write it into their folder; the caller holds the store's lock.

        `factory` is `exact`, FAISS's `index_factory` string, or None to choose by size; `dim` is lowered to K, and must
        divide it. Raises UsageError for what cannot work, ResourceError without FAISS, GPU, memory or disk space, and
        DamagedIndex for rows that are not finite.
        """
        live = int(np.count_nonzero(rows.live_mask))
        chosen, dim = factory or default_factory(live, rows.K), min(dim, rows.K)
        _check_options(chosen, dim, rows.K, live, target_recall)
        device = _device(chosen, gpu)
        metadata = IndexMetadata(factory, chosen, dim, rows.K, rows.shards, live, target_recall, seed)
        if chosen == EXACT or not live:
            return cls(rows, metadata, None, device=device, threads=threads)._publish()
        ann = AnnIndex.create(chosen, dim, gpu=gpu, threads=threads)
        _check_space(rows, live * ann.bytes_per_row())
        if not ann.is_trained:
            progress("train the index", 0, 1)
            ann.train(_training_rows(rows, max(_TRAIN_ROWS, _TRAIN_PER_LIST * ann.lists), dim, seed))
            progress("train the index", 1, 1)
        index = cls(rows, metadata, ann, device=device, threads=threads)
        index._add(rows.live_mask, progress)
        index._measure(progress)
        return index._publish()

    @classmethod
    def open(cls, rows: Rows, *, gpu: bool = False, threads: int | None = None) -> "VectorIndex | None":
        """The index built before over `rows`, None where there is none. It may not hold all of them: see `stale`.

        Raises DamagedIndex where it is not as it was written, StoreError where it cannot be read, ResourceError without
        FAISS or a GPU.
        """
        metadata = IndexMetadata.read(rows.path)
        if metadata is None:
            return None
        try:
            ann = _load(rows, metadata, gpu=gpu, threads=threads)
        except FileNotFoundError:
            if IndexMetadata.read(rows.path) == metadata:
                raise metadata.damaged(rows.path, "it is missing") from None
            return cls.open(rows, gpu=gpu, threads=threads)  # a writer has replaced it since the metadata was read
        return cls(rows, metadata, ann, device=_device(metadata.factory, gpu), threads=threads)

    @classmethod
    def update(cls, rows: Rows, *, threads: int | None = None, progress: Progress = silent) -> "VectorIndex":
        """Bring the index up to date with `rows`, adding only those that it lacks; the caller holds the store's lock.

        It lacks those that are newer, and those that had been removed when it was built and are back.
        It is built where there is none, and built anew with the same options where other rows have taken the place of
        those it holds. Raises as `build` and `open` do.
        """
        metadata = IndexMetadata.read(rows.path)
        if metadata is None:
            return cls.build(rows, threads=threads, progress=progress)
        live = int(np.count_nonzero(rows.live_mask))
        chosen = metadata.requested_factory or default_factory(live, rows.K)
        if not metadata.file or chosen != metadata.factory or not metadata.covers(rows):
            options = {"dim": metadata.dim, "target_recall": metadata.target_recall, "seed": metadata.seed}
            return cls.build(rows, factory=metadata.requested_factory, **options, threads=threads, progress=progress)
        index = cls(rows, metadata, _load(rows, metadata, to_add=True, threads=threads), threads=threads)
        lacking = index._missing()
        if metadata.shards == rows.shards and not lacking.any():
            return index
        index.metadata = replace(metadata, shards=rows.shards, live=live)
        index._add(lacking, progress)
        measured = metadata.proponents.rows if metadata.proponents else 0
        if live > REMEASURE_GROWTH * measured:
            index._measure(progress)
        return index._publish()

    def search(self, queries: np.ndarray, k: int, *, largest: bool = True) -> SearchResult:
        """The k live rows of the largest (or smallest) inner product with each of `queries` [queries, K].

        It is exact for the factory `exact`, in a direction in which no margin reached the target recall, and where all
        queries would have to look at a quarter of the rows or more: `SearchResult.method` says which it was.
        Raises as `exact_search` does, and StoreError where the index does not hold all of the rows.
        """
        queries = checked_queries(queries, self.rows.K, k)
        calibration = self.metadata.calibration(largest)
        if self._ann is None or calibration is None or calibration.margin is None:
            return self._exact(queries, k, largest)
        if self.stale:
            raise StoreError(f"The search index is out of date: {self.stale}.", hint=rebuild_hint(self.rows.path))
        live = int(np.count_nonzero(self.rows.live_mask))
        most = max_candidates(live)
        scores, found = padding(len(queries), k, largest)
        left, count, seconds = list(range(len(queries))), calibration.candidates * max(k, 10) // 10, [0.0, 0.0]
        while left and k <= most:
            started = time.perf_counter()
            count = min(max(count, k), most)
            estimates, numbers = self._candidates(queries[left], count, calibration.lists, largest)
            searched = time.perf_counter()
            unfinished = []
            for query, *candidates in zip(left, estimates, numbers, strict=True):
                best = self._best(queries[query], *candidates, k, calibration.margin, largest)
                if best is None:
                    unfinished.append(query)
                else:
                    scores[query], found[query] = best
            seconds = [seconds[0] + searched - started, seconds[1] + time.perf_counter() - searched]
            left = unfinished
            if count == most:
                break
            count *= 4
        if left:
            whole = self._exact(queries[left], k, largest)
            if len(left) == len(queries):
                return whole
            scores[left], found[left] = whole.scores, whole.rows
            seconds[1] += whole.search_seconds
        return SearchResult(scores, found, live, largest, "ann", calibration.recall(k), *seconds, None)

    @property
    def stale(self) -> str | None:
        """How the index and its rows differ; see `IndexMetadata.stale`."""
        return self.metadata.stale(self.rows)

    def describe(self) -> dict[str, Any]:
        """Return the metadata as plain data; see `IndexMetadata.describe`."""
        return self.metadata.describe(self.rows)

    def _exact(self, queries: np.ndarray, k: int, largest: bool) -> SearchResult:
        return exact_search(self.rows, queries, k, largest=largest, device=self._device, threads=self._threads)

    def _candidates(
        self, queries: np.ndarray, count: int, lists: int | None, largest: bool
    ) -> tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]]:
        """See `calibration.CandidateSearch`."""
        assert self._ann is not None
        units = queries / _lengths(queries)[:, None] * (1 if largest else -1)
        folded = np.ascontiguousarray(fold(units, self.metadata.dim), dtype=np.float32)
        estimates, numbers = self._ann.search(folded, count, lists)
        estimates[numbers < 0] = -np.inf
        numbers[(numbers >= 0) & ~self.rows.live_mask[numbers]] = -1
        return estimates, numbers

    def _best(
        self, query: np.ndarray, estimates: np.ndarray, numbers: np.ndarray, k: int, margin: float, largest: bool
    ) -> tuple[Float32[np.ndarray, " k"], Int64[np.ndarray, " k"]] | None:
        """The k best of the candidates by their inner products at full K; None where others may be better."""
        bound, alive = estimates[-1], numbers >= 0
        estimates, numbers = estimates[alive], numbers[alive]
        if len(numbers) < k:
            return None
        unit = _lengths(query[None])[0] * (1 if largest else -1)
        scores, seen = np.empty(0, np.float32), np.empty(0, np.int64)
        lowest, done, block = -np.inf, 0, max(2 * k, _FIRST_READ)
        while done < len(numbers) and estimates[done] >= lowest:
            here = slice(done, done + block)
            wanted = np.sort(numbers[here][estimates[here] >= lowest])  # the disk is read forwards
            scores = np.append(scores, scores_of(self.rows, wanted, query))
            seen = np.append(seen, wanted)
            best = top(scores, k, largest)
            lowest = scores[best[-1]] / unit - margin
            done, block = done + block, 2 * block
        if bound >= lowest:
            return None
        order = np.argsort(seen)  # of equal scores the lower row comes first
        best = order[top(scores[order], k, largest)]
        return scores[best], seen[best]

    def _missing(self) -> Bool[np.ndarray, " n"]:
        """The live rows that FAISS's index does not hold."""
        assert self._ann is not None
        lacking = self.rows.live_mask.copy()
        lacking[self._ann.numbers()] = False
        return lacking

    def _add(self, wanted: Bool[np.ndarray, " n"], progress: Progress) -> None:
        """Add the rows that are `wanted`."""
        assert self._ann is not None
        block_rows = max(1, _FOLD_BYTES // (4 * self.rows.K))
        for first, block, scale in self.rows.blocks(block_rows):
            numbers = first + np.flatnonzero(wanted[first : first + len(block)])
            if not len(numbers):
                continue
            folded = fold(to_float32(block, scale, self._device), self.metadata.dim)[numbers - first].cpu().numpy()
            if not np.isfinite(folded).all():
                bad = numbers[np.flatnonzero(~np.isfinite(folded).all(axis=1))[0]]
                raise not_finite(self.rows, int(bad))
            self._ann.add(folded, numbers)
            progress("index the rows", first + len(block), len(self.rows))

    def _measure(self, progress: Progress) -> None:
        """Measure recall in both directions, and settle what a search needs to reach the target."""
        assert self._ann is not None
        progress("measure recall", 0, 2)
        known = draw_held_out(self.rows, seed=self.metadata.seed, device=self._device, threads=self._threads)
        if known is None:
            return
        settled = []
        for done, largest in enumerate((True, False), 1):
            settled.append(
                calibrate(
                    partial(self._candidates, largest=largest),
                    known,
                    largest=largest,
                    target=self.metadata.target_recall,
                    lists=self._ann.lists,
                    rows=self.metadata.live,
                )
            )
            progress("measure recall", done, 2)
        self.metadata = replace(self.metadata, proponents=settled[0], opponents=settled[1])

    def _publish(self) -> "VectorIndex":
        """Write FAISS's file under a new name, then the metadata that names it; delete files that it does not name."""
        folder = self.rows.path
        folder.mkdir(exist_ok=True)
        if self._ann is not None:
            name = f"{ANN}.{secrets.token_hex(4)}.faiss"
            size, sha256 = self._ann.save(folder / name)
            self.metadata = replace(
                self.metadata, file=name, file_bytes=size, file_sha256=sha256, faiss=faiss_version()
            )
        self.metadata.write(folder)
        for old in folder.glob(f"{ANN}.*.faiss"):
            if old.name != self.metadata.file:
                with suppress(OSError):
                    old.unlink()
        return self


def _lengths(queries: np.ndarray) -> np.ndarray:
    """float64 [queries]; 1 for those that are zero."""
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
    return np.where(lengths > 0, lengths, 1.0)


def _load(
    rows: Rows, metadata: IndexMetadata, *, gpu: bool = False, to_add: bool = False, threads: int | None = None
) -> AnnIndex | None:
    """FAISS's index, None where the metadata names none. FileNotFoundError where its file is missing."""
    if not metadata.file:
        return None
    _device(metadata.factory, gpu)
    path = rows.path / metadata.file
    if path.stat().st_size != metadata.file_bytes:  # touching a map past its file's end kills the process
        raise metadata.damaged(
            rows.path, f"it should have {metadata.file_bytes:,} bytes and has {path.stat().st_size:,}"
        )
    return AnnIndex.load(path, gpu=gpu, to_add=to_add, threads=threads)


def _check_options(factory: str, dim: int, K: int, live: int, target_recall: float) -> None:
    if not 0 < target_recall <= 1:
        raise UsageError(f"--target-recall must be above 0 and at most 1, not {target_recall}.")
    if dim < 1 or K % dim:
        raise UsageError(f"--dim {dim} cannot be used: it must divide K = {K:,}.", hint="Give a power of two.")
    if factory != EXACT:
        check_factory(factory, dim, live)


def _device(factory: str, gpu: bool) -> str:
    """Where torch computes; refuses a GPU that is not there."""
    if not gpu:
        return "cpu"
    if factory != EXACT:
        require_gpu(factory)
    if not torch.cuda.is_available():
        raise ResourceError("--gpu needs a CUDA device, and torch sees none.", hint="Leave out --gpu.")
    return "cuda"


def _check_space(rows: Rows, needed: int) -> None:
    """ResourceError where the index cannot fit into memory or on the disk: before the rows are read, not after."""
    memory, free = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE"), shutil.disk_usage(rows.path).free
    for what, there in (("memory", memory), ("disk space", free)):
        if needed > there:
            raise ResourceError(
                f"This index would take {needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB of {what}.",
                hint=f"Use --factory {DEFAULT_FACTORY}, or a smaller --dim.",
            )


def _training_rows(rows: Rows, count: int, dim: int, seed: int) -> Float32[np.ndarray, "n dim"]:
    """Folds of `count` live rows drawn by `seed`, or of all, or of as many as fit into 1 GiB."""
    live = np.flatnonzero(rows.live_mask)
    count = min(count, len(live), _TRAIN_BYTES // (4 * dim))
    drawn = np.sort(np.random.default_rng([seed, 0]).choice(live, count, replace=False))
    folded = np.empty((count, dim), np.float32)
    for place, numbers, scale in rows.each(drawn):
        folded[place] = fold(torch.from_numpy(numbers).float(), dim).numpy() * scale
    return folded


def fold(rows, K: int):
    """Sum adjacent groups of entries: the RapidGrads of a smaller K under the same shuffles and signs.

    `rows` is a torch or NumPy array [..., K'], with K a divisor of K'; the result is [..., K].
    """
    if rows.shape[-1] == K:
        return rows
    return rows.reshape(*rows.shape[:-1], K, rows.shape[-1] // K).sum(-1)
