"""The vector index of one level: finds the rows nearest to a query through FAISS, or by a scan where that is as fast.

    query [K] ──fold──> [dim] ──FAISS──> candidates, more than k ──inner products at full K──> the best k

FAISS holds a fold of every row (adjacent entries summed: the RapidGrad of a smaller K) and only proposes candidates.
Scores always come from the stored rows. Opponents are the candidates of -query. How many candidates a search needs, and
the recall that they give, is measured for each direction when the index is built (`calibration.py`).

    INDEX/<level>/ann.json              the metadata: how the index was built, from which shards, and its recall
    INDEX/<level>/ann.<8 hex>.faiss     FAISS's file, named in the metadata; none for the factory `exact`

The metadata is replaced in one step and FAISS's file never changes, so readers need no lock; writers hold the store's.
Rows removed after the build stay in FAISS's index and are dropped from its results. Knows vectors, not text.
"""

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from rapidindex.config import DIM, TARGET_RECALL
from rapidindex.errors import DamagedIndex, ResourceError, UsageError
from rapidindex.progress import Progress, silent
from rapidindex.search.calibration import Calibration, calibrate, draw_held_out, max_candidates
from rapidindex.search.exact import (
    SearchResult,
    checked_queries,
    exact_search,
    faster,
    faster_device,
    not_finite,
    padding,
    scores_of,
    to_float32,
    top,
)
from rapidindex.search.faiss_index import AnnIndex, check_factory, load_faiss, not_on_gpu, require_gpu
from rapidindex.search.metadata import IndexMetadata
from rapidindex.store import ANN, Rows

EXACT = "exact"
DEFAULT_FACTORY = "HR,RaBitQ"
EXACT_MAX_ENTRIES = 2**29
"""Up to this many entries in all rows the default is the exact scan: under 0.1 s a query."""
REMEASURE_GROWTH = 1.1
"""`update` measures recall again once the live rows have grown by this factor since the last measurement."""
_TRAIN_ROWS, _TRAIN_PER_LIST, _TRAIN_BYTES = 2**14, 64, 2**30
_FIRST_READ = 32  # candidates read before the k-th best score says how many more are needed
_SCAN_BYTES = 2**26
_FOLD_BYTES = 2**25  # rows folded at a time, in bytes of float32

_Best = tuple[Float32[np.ndarray, " k"], Int64[np.ndarray, " k"]]


GPU_BYTES = 256 * 2**20
"""An index of fewer bytes is searched on the CPU where no device is named: at 6 GB/s that takes less than 50 ms. Of a
larger one the faster place is measured."""


def default_factory(rows: int, K: int, max_entries: int = EXACT_MAX_ENTRIES) -> str:
    """Return `exact` for up to `max_entries` entries in all rows, else one bit a dimension of a rotated fold."""
    return EXACT if rows * K <= max_entries else DEFAULT_FACTORY


def search_index_bytes(rows: int, K: int) -> int:
    """Return roughly how many bytes, on disk and in memory, the default index of `rows` rows of length K takes.

    0 where the default is the exact scan. Raises ResourceError where FAISS is needed and missing.
    """
    factory = default_factory(rows, K)
    return 0 if factory == EXACT else rows * AnnIndex.create(factory, min(DIM, K)).bytes_per_row()


class VectorIndex:
    """The vector index over `rows`. Any number of threads and processes may search it at once."""

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
        self.not_on_gpu: str | None = None
        """Why the index is searched on the CPU, where a GPU was asked for; else None."""
        self._ann: Any = ann
        self._device, self._threads = device, threads

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
        exact_max_entries: int = EXACT_MAX_ENTRIES,
        progress: Progress = silent,
    ) -> "VectorIndex":
        """Build the index of `rows` and write it into their folder, in place of any other; the caller holds the lock.

        `factory` is `exact`, a string for FAISS's `index_factory`, or None for a choice by size (`default_factory`).
        `dim` must divide K, and is lowered to K. Raises UsageError for options that cannot work, ResourceError where
        FAISS, the GPU, memory or disk space is missing, and DamagedIndex for rows that are not finite.
        """
        live = int(np.count_nonzero(rows.live_mask))
        chosen, dim = factory or default_factory(live, rows.K, exact_max_entries), min(dim, rows.K)
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
    def open(cls, rows: Rows, *, device: str = "cpu", threads: int | None = None) -> "VectorIndex | None":
        """Open the index in the folder of `rows`; None where there is none. It may lack some of the rows: see `stale`.

        With a `device` of `cuda` or `cuda:N` it is searched there, where FAISS can; else `not_on_gpu` says why not.
        `auto` takes what is faster: measured, where FAISS has the index on a GPU and its size lets that be felt
        (`suited_device`), and for scans (`scan_device`).
        Raises DamagedIndex where its files were changed, StoreError where they cannot be read, ResourceError where
        FAISS is missing.
        """
        metadata = IndexMetadata.read(rows.path)
        if metadata is None:
            return None
        try:
            ann = _load(rows, metadata, threads=threads)
        except DamagedIndex:
            if IndexMetadata.read(rows.path) == metadata:
                raise
            return cls.open(rows, device=device, threads=threads)  # a writer replaced both after the metadata was read
        index = cls(rows, metadata, ann, device=scan_device(rows, device, threads=threads), threads=threads)
        if automatic := device == "auto":
            device = suited_device(metadata.factory, 0 if ann is None else metadata.live * ann.bytes_per_row())
        index._move(ann, device, only_if_faster=automatic)
        return index

    @classmethod
    def update(
        cls,
        rows: Rows,
        *,
        threads: int | None = None,
        exact_max_entries: int = EXACT_MAX_ENTRIES,
        progress: Progress = silent,
    ) -> "VectorIndex":
        """Add the live rows that the index lacks: new ones, and restored ones; the caller holds the store's lock.

        Without an index, one is built. Where the indexed rows were replaced by others, or the default factory for this
        many rows has changed, the index is rebuilt with the same options. Raises as `build` and `open` do.
        """
        metadata = IndexMetadata.read(rows.path)
        build = partial(cls.build, rows, threads=threads, exact_max_entries=exact_max_entries, progress=progress)
        if metadata is None:
            return build()
        live = int(np.count_nonzero(rows.live_mask))
        chosen = metadata.requested_factory or default_factory(live, rows.K, exact_max_entries)
        if not metadata.file or chosen != metadata.factory or not metadata.covers(rows):
            return build(**metadata.options)
        index = cls(rows, metadata, _load(rows, metadata, to_add=True, threads=threads), threads=threads)
        missing = index._missing()
        if metadata.shards == rows.shards and not missing.any():
            return index
        index.metadata = replace(metadata, shards=rows.shards, live=live)
        index._add(missing, progress)
        measured = metadata.proponents.rows if metadata.proponents else 0
        if live > REMEASURE_GROWTH * measured:
            index._measure(progress)
        return index._publish()

    def search(self, queries: np.ndarray, k: int, *, largest: bool = True) -> SearchResult:
        """Find the k live rows with the largest (or smallest) inner product with each of `queries` [queries, K].

        All rows are scanned for the factory `exact`, in a direction in which no margin reached the target recall, where
        the index lacks some of the rows (another process is adding them), and where every query would read a quarter of
        the rows or more: `SearchResult.method` tells. Raises as `exact_search` does.
        """
        queries = checked_queries(queries, self.rows.K, k)
        calibration = self.metadata.calibration(largest)
        if self._ann is None or calibration is None or calibration.margin is None or self._lacks_rows:
            return self._scan(queries, k, largest)
        live = int(np.count_nonzero(self.rows.live_mask))
        scores, numbers = padding(len(queries), k, largest)
        pending, seconds = np.arange(len(queries)), np.zeros(2)
        for count in _candidate_counts(calibration, k, live):
            if not len(pending):
                break
            answers, round_seconds = self._round(queries[pending], count, k, calibration, largest)
            seconds += round_seconds
            for query, answer in zip(pending, answers, strict=True):
                if answer:
                    scores[query], numbers[query] = answer
            pending = pending[[answer is None for answer in answers]]
        if len(pending):
            scan = self._scan(queries[pending], k, largest)
            if len(pending) == len(queries):
                return scan
            scores[pending], numbers[pending] = scan.scores, scan.rows
            seconds[1] += scan.search_seconds
        recall = calibration.recall(k)
        return SearchResult(scores, numbers, live, largest, "ann", recall, *seconds.tolist(), None, self._ann.device)

    @property
    def stale(self) -> str | None:
        """How the index and its rows differ; see `IndexMetadata.stale`."""
        return self.metadata.stale(self.rows)

    @property
    def _lacks_rows(self) -> bool:
        return self.stale is not None and not self.metadata.continues(self.rows)

    def describe(self) -> dict[str, Any]:
        """Return the metadata as plain data; see `IndexMetadata.describe`."""
        return self.metadata.describe(self.rows)

    def _move(self, ann: AnnIndex | None, device: str, *, only_if_faster: bool = False) -> None:
        """Have FAISS search on the GPU, or note why it does not."""
        if ann is None or not device.startswith("cuda"):
            return
        self.not_on_gpu = not_on_gpu(self.metadata.factory)
        if self.not_on_gpu is None:
            try:
                moved = ann.on_gpu(device)
            except ResourceError as error:
                self.not_on_gpu = str(error).rstrip(".")
            else:
                self._ann = self._faster(ann, moved) if only_if_faster else moved

    def _faster(self, *places: AnnIndex) -> AnnIndex:
        """Return the copy of FAISS's index that finds the candidates of a drawn query sooner."""
        query = np.random.default_rng(self.metadata.seed).standard_normal((1, self.metadata.dim), np.float32)
        calibration = self.metadata.proponents
        count, lists = (calibration.candidates, calibration.lists) if calibration else (_FIRST_READ, None)
        copies = {ann.device: ann for ann in places}
        return copies[faster({name: partial(ann.search, query, count, lists) for name, ann in copies.items()})]

    @property
    def _rerank_device(self) -> str:
        """Where candidates are re-ranked: on the GPU that found them, where torch sees it, too."""
        return scan_device(self.rows, self._ann.device)

    def _scan(self, queries: np.ndarray, k: int, largest: bool) -> SearchResult:
        return exact_search(self.rows, queries, k, largest=largest, device=self._device, threads=self._threads)

    def _round(
        self, queries: np.ndarray, count: int, k: int, calibration: Calibration, largest: bool
    ) -> tuple[list[_Best | None], tuple[float, float]]:
        """Search `count` candidates for each query and re-rank them. Return the answers and the seconds of both steps.

        A query's answer is None where rows beyond its candidates may be better.
        """
        started = time.perf_counter()
        estimates, numbers = self._candidates(queries, count, calibration.lists, largest)
        searched = time.perf_counter()
        answers = [
            self._rerank(*candidates, k, calibration.margin, largest)
            for candidates in zip(queries, estimates, numbers, strict=True)
        ]
        return answers, (searched - started, time.perf_counter() - searched)

    def _candidates(
        self, queries: np.ndarray, count: int, lists: int | None, largest: bool
    ) -> tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]]:
        """Ask FAISS for candidates; see `calibration.CandidateSearch`."""
        units = queries / _lengths(queries)[:, None] * (1 if largest else -1)
        folded = np.ascontiguousarray(fold(units, self.metadata.dim), dtype=np.float32)
        estimates, numbers = self._ann.search(folded, count, lists)
        if numbers.max(initial=-1) >= self.metadata.rows:
            raise self.metadata.damaged(self.rows.path, f"it names rows past the {self.metadata.rows:,} that it holds")
        estimates[numbers < 0] = -np.inf
        numbers[numbers >= len(self.rows)] = -1  # added since these rows were read
        numbers[(numbers >= 0) & ~self.rows.live_mask[numbers]] = -1
        return estimates, numbers

    def _rerank(
        self, query: np.ndarray, estimates: np.ndarray, numbers: np.ndarray, k: int, margin: float, largest: bool
    ) -> _Best | None:
        """Return the k best candidates by inner products at full K; None where rows beyond them may be better.

        Candidates are read by descending estimate, down to `margin` below the k-th best score so far.
        """
        last_estimate, live = estimates[-1], numbers >= 0
        estimates, numbers = estimates[live], numbers[live]
        if len(numbers) < k:
            return None
        length = _lengths(query[None])[0] * (1 if largest else -1)
        scores, scored = np.empty(0, np.float32), np.empty(0, np.int64)
        threshold, start, size = -np.inf, 0, max(2 * k, _FIRST_READ)
        while start < len(numbers) and estimates[start] >= threshold:
            block = slice(start, start + size)
            chosen = np.sort(numbers[block][estimates[block] >= threshold])  # the files are read forwards
            scores = np.append(scores, scores_of(self.rows, chosen, query, device=self._rerank_device))
            scored = np.append(scored, chosen)
            threshold = scores[top(scores, k, largest)[-1]] / length - margin
            start, size = start + size, 2 * size
        if last_estimate >= threshold:
            return None
        order = np.argsort(scored)  # of equal scores the lower row comes first
        best = order[top(scores[order], k, largest)]
        return scores[best], scored[best]

    def _missing(self) -> Bool[np.ndarray, " n"]:
        """Mark the live rows that FAISS's index lacks."""
        missing = self.rows.live_mask.copy()
        missing[self._ann.numbers()] = False
        return missing

    def _add(self, mask: Bool[np.ndarray, " n"], progress: Progress) -> None:
        """Add the rows marked in `mask` to FAISS's index. Raises DamagedIndex for rows that are not finite."""
        block_rows = max(1, _FOLD_BYTES // (4 * self.rows.K))
        for first, block, scale in self.rows.blocks(block_rows):
            numbers = first + np.flatnonzero(mask[first : first + len(block)])
            if not len(numbers):
                continue
            folded = fold(to_float32(block, scale, self._device), self.metadata.dim)[numbers - first].cpu().numpy()
            finite = np.isfinite(folded).all(axis=1)
            if not finite.all():
                raise not_finite(self.rows, int(numbers[~finite][0]))
            self._ann.add(folded, numbers)
            progress("index the rows", first + len(block), len(self.rows))

    def _measure(self, progress: Progress) -> None:
        """Measure recall in both directions, and set how far a search must look to reach the target."""
        progress("measure recall", 0, 2)
        held_out = draw_held_out(self.rows, seed=self.metadata.seed, device=self._device, threads=self._threads)
        if held_out is None:
            return
        for done, (direction, largest) in enumerate((("proponents", True), ("opponents", False)), 1):
            calibration = calibrate(
                partial(self._candidates, largest=largest),
                held_out,
                largest=largest,
                target=self.metadata.target_recall,
                lists=self._ann.lists,
                rows=self.metadata.live,
            )
            self.metadata = replace(self.metadata, **{direction: calibration})
            progress("measure recall", done, 2)

    def _publish(self) -> "VectorIndex":
        """Write FAISS's file under a new name, then the metadata that names it; delete the files it does not name."""
        folder = self.rows.path
        folder.mkdir(exist_ok=True)
        if self._ann is not None:
            name = f"{ANN}.{secrets.token_hex(4)}.faiss"
            size, sha256 = self._ann.save(folder / name)
            written = {"file": name, "file_bytes": size, "file_sha256": sha256, "faiss": load_faiss().__version__}
            self.metadata = replace(self.metadata, **written)
        self.metadata.write(folder)
        for file in folder.glob(f"{ANN}.*.faiss"):
            if file.name != self.metadata.file:
                with suppress(OSError):
                    file.unlink()
        return self


def _candidate_counts(calibration: Calibration, k: int, live: int) -> Iterator[int]:
    """Yield how many candidates each round of a search takes, four times more each; none where a scan is cheaper."""
    most, count = max_candidates(live), max(calibration.candidates * max(k, 10) // 10, k)
    if k > most:
        return
    while count < most:
        yield count
        count *= 4
    yield most


def _lengths(queries: Float32[np.ndarray, "queries K"]) -> Float64[np.ndarray, " queries"]:
    """Return the length of each query; 1 for a query of zeros, so that it can be divided by."""
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
    return np.where(lengths > 0, lengths, 1.0)


def _load(rows: Rows, metadata: IndexMetadata, *, to_add: bool = False, threads: int | None = None) -> AnnIndex | None:
    """Load FAISS's file; None where the metadata names none. Raises DamagedIndex where it is not what was written."""
    if not metadata.file:
        return None
    metadata.verify(rows.path)  # FAISS may crash on a changed file, or search it as if nothing had happened
    ann = AnnIndex.load(rows.path / metadata.file, to_add=to_add, threads=threads)
    if ann.dim != metadata.dim or len(ann) > metadata.rows:
        raise metadata.damaged(rows.path, f"it holds {len(ann):,} rows of {ann.dim:,} entries")
    return ann


def _check_options(factory: str, dim: int, K: int, live: int, target_recall: float) -> None:
    if not 0 < target_recall <= 1:
        raise UsageError(f"--target-recall must be above 0 and at most 1, not {target_recall}.")
    if dim < 1 or K % dim:
        raise UsageError(f"--dim {dim} cannot be used: it must divide K = {K:,}.", hint="Give a power of two.")
    if factory != EXACT:
        check_factory(factory, dim, live)


def suited_device(factory: str, size: int) -> str:
    """Return where FAISS searches an index of `size` bytes where no device was named: `cuda` or `cpu`.

    On the GPUs that it sees where it has the factory there, from the size on at which a CPU's search can be felt.
    """
    return "cuda" if size >= GPU_BYTES and not_on_gpu(factory) is None else "cpu"


def scan_device(rows: Rows, device: str, *, threads: int | None = None) -> str:
    """Return where to scan the rows: `device`, where torch sees it; where it is `auto`, the faster one, measured.

    Fewer than 64 MiB are scanned on the CPU: that takes some ten ms.
    """
    if not torch.cuda.is_available() and (device == "auto" or device.startswith("cuda")):
        return "cpu"
    if device != "auto":
        return device
    if len(rows) * rows.row_bytes < _SCAN_BYTES:
        return "cpu"
    try:
        return faster_device(rows, "cuda", threads=threads)
    except torch.OutOfMemoryError:  # beside the model
        return "cpu"


def _device(factory: str, gpu: bool) -> str:
    """Return torch's device. Raises ResourceError where a GPU is wanted and missing, UsageError as `require_gpu`."""
    if not gpu:
        return "cpu"
    if factory != EXACT:
        require_gpu(factory)
    if not torch.cuda.is_available():
        raise ResourceError("--gpu needs a CUDA device, and torch sees none.", hint="Leave out --gpu.")
    return "cuda"


def _check_space(rows: Rows, needed: int) -> None:
    """Raise ResourceError, before the rows are read, where memory or disk cannot hold an index of `needed` bytes."""
    for resource, free in (
        ("memory", psutil.virtual_memory().available),
        ("disk space", shutil.disk_usage(rows.path).free),
    ):
        if needed > free:
            raise ResourceError(
                f"This index would take {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB of {resource} are free.",
                hint=f"Use --factory {DEFAULT_FACTORY}, or a smaller --dim.",
            )


def _training_rows(rows: Rows, count: int, dim: int, seed: int) -> Float32[np.ndarray, "n dim"]:
    """Return folds of `count` live rows drawn by `seed`, or of as many as there are or fit into 1 GiB."""
    live = np.flatnonzero(rows.live_mask)
    count = min(count, len(live), _TRAIN_BYTES // (4 * dim))
    numbers = np.sort(np.random.default_rng([seed, 0]).choice(live, count, replace=False))
    folded = np.empty((count, dim), np.float32)
    for place, entries, scale in rows.each(numbers):
        folded[place] = fold(torch.from_numpy(entries).float(), dim).numpy() * scale
    return folded


def fold(rows, K: int):
    """Sum adjacent groups of entries: the RapidGrads of a smaller K under the same shuffles and signs.

    `rows` is a torch or NumPy array [..., K'], with K a divisor of K'; the result is [..., K].
    """
    if rows.shape[-1] == K:
        return rows
    return rows.reshape(*rows.shape[:-1], K, rows.shape[-1] // K).sum(-1)
