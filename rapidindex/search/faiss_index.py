"""FAISS: inner-product indexes over folded rows, made from an `index_factory` string. Knows neither store nor queries.

FAISS is imported where it is first needed: its CPU and GPU builds install the same package, so neither is a dependency.
"""

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from rapidindex.errors import DamagedIndex, ResourceError, UsageError
from rapidindex.store import atomic_file, index_of

QB = 4
"""Bits of each query entry in RaBitQ. 4 take 1.06 ms and 8 take 1.42, and 4 lose at most .002 of recall@10 at an
over-fetch of 4 (20,000 rows, d = 4,096, one thread); 0 is 100 times slower."""
FASTSCAN_DIM = 2048
"""The most dimensions for FastScan. Its 16-bit sums overflow silently: recall .38 at 4,096, .02 at 5,120."""
_GPU_MAX_RESULTS = 2048  # FAISS's limit for the results, and the visited lists, of a query on a GPU
_HINT = "Try HR,RaBitQ, Flat, SQ8, IVF256,Flat or HNSW32."
_WRITE_BYTES = 2**22
_KNOWN = re.compile(r"(HR,)?(IVF\d+[kM]?,)?(Flat|SQ8|SQfp16|RaBitQ)|HNSW\d{1,3}(,Flat|,SQ8)?")
_ON_GPU = re.compile(r"(IVF\d+[kM]?,)?(Flat|SQ8|SQfp16|PQ\d+(x8)?)")
_TRIAL_ROWS = (16, 1000)
TRIAL_SECONDS = 60


def load_faiss() -> Any:
    """Import faiss. Raises ResourceError where it is missing or does not load."""
    try:
        import faiss

        # By default searches of fewer than 128,000 / d queries take a path that is 20 to 30 times slower.
        faiss.cvar.distance_compute_blas_threshold = 1
    except ImportError as error:
        raise ResourceError(
            f"An approximate index needs FAISS, which cannot be imported ({error}).",
            hint="Type: pip install 'rapidindex[cpu]' (or search with --exact, which needs no FAISS).",
        ) from error
    except (RuntimeError, OSError, AttributeError) as error:  # no CUDA libraries; a package that is half removed
        raise ResourceError(
            f"FAISS is installed but does not load ({_first_line(error)}).",
            hint="Type: pip uninstall faiss-gpu faiss-gpu-cuvs faiss-cpu, then pip install 'rapidindex[cpu]'.",
        ) from error
    return faiss


def not_on_gpu(factory: str) -> str | None:
    """Return why FAISS cannot search an index of `factory` on a GPU here; None where it can."""
    if not _sees_gpu():
        return "FAISS sees no GPU: that takes its GPU build, pip install 'rapidindex[gpu]'"
    return None if _ON_GPU.fullmatch(factory) else f"FAISS has flat and IVF indexes on a GPU, and no {factory}"


def require_gpu(factory: str) -> None:
    """Raise ResourceError where FAISS sees no GPU, UsageError where FAISS has no such `factory` on a GPU."""
    if not _sees_gpu():
        raise ResourceError(
            "--gpu needs a GPU and FAISS's GPU build, and this FAISS sees no GPU.",
            hint="Type: pip uninstall faiss-cpu, then pip install 'rapidindex[gpu]'; or leave out --gpu.",
        )
    if not _ON_GPU.fullmatch(factory):
        raise UsageError(
            f"--factory {factory} cannot be used with --gpu: FAISS has flat and IVF indexes on a GPU, but no RaBitQ, "
            "HNSW or FastScan.",
            hint="Try --factory Flat or IVF256,Flat, or leave out --gpu.",
        )


def check_factory(factory: str, dim: int, rows: int, *, trial_seconds: float = TRIAL_SECONDS) -> None:
    """Raise UsageError where FAISS does not know `factory`, or it fails for `rows` rows of `dim` entries.

    All but the usual ones are tried in a child process first, for `trial_seconds` at most: FAISS crashes on some, and
    never ends with others.
    """
    for pattern, reason in (
        (r"(^|,)NSG|NNDescent", "it cannot be built in batches"),
        (r"Refine|(^|,)RFlat", "candidates are re-ranked with the stored rows already"),
        (r"(HNSW|IVF)0*1?($|[,_])", "it has too few lists or links"),
    ):
        if re.search(pattern, factory):
            raise UsageError(f"--factory {factory} cannot be used: {reason}.", hint=_HINT)
    if dim > FASTSCAN_DIM and re.search(r"fsr?(_\d+)?($|,)", factory):
        raise UsageError(
            f"--factory {factory} cannot be used at --dim {dim}: FastScan's 16-bit sums overflow silently "
            f"above {FASTSCAN_DIM} dimensions.",
            hint=f"Add --dim {FASTSCAN_DIM}, or use HR,RaBitQ.",
        )
    lists = re.search(r"IVF(\d+)([kM]?)", factory)
    if lists and 0 < rows < int(lists[1]) * {"": 1, "k": 2**10, "M": 2**20}[lists[2]]:
        raise UsageError(
            f"--factory {factory} needs a row for each of its lists, and there are {rows:,} rows.",
            hint=f"Try IVF{max(2, int(rows**0.5))} instead of IVF{lists[1]}{lists[2]}.",
        )
    if not _KNOWN.fullmatch(factory):
        _try_in_child(factory, dim, rows, trial_seconds)
    _make(factory, dim)


def _try_in_child(factory: str, dim: int, rows: int, seconds: float) -> None:
    load_faiss()
    least, most = _TRIAL_ROWS
    plain = factory.encode("ascii", "replace").decode().replace("\0", "?")
    arguments = [plain, str(dim), str(min(max(rows, least), most))]
    try:
        trial = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        reason = f"FAISS takes more than {seconds} seconds for {arguments[-1]} rows of noise"
    else:
        said = (trial.stderr.strip().splitlines() or ["nothing"])[-1]
        if not trial.returncode or said.startswith("MemoryError"):  # the caller knows how much memory it takes
            return
        reason = "FAISS crashes" if trial.returncode < 0 else f"a trial fails ({said})"
    raise UsageError(f"--factory {factory!r} cannot be used at --dim {dim}: {reason}.", hint=_HINT)


def _trial(factory: str, dim: int, rows: int) -> None:
    """Make, fill and search an index of noise. What FAISS refuses in words is left to the caller, who has the rows."""
    noise = np.random.default_rng(0).standard_normal((rows, dim), np.float32)
    try:
        index = AnnIndex.create(factory, dim)
        index.train(noise)
    except UsageError:
        return
    index.add(noise, np.arange(rows))
    index.search(noise[:2], min(rows, 5))


class AnnIndex:
    """FAISS's index of folded rows and their row numbers, searched by inner product. Concurrent searches are safe."""

    def __init__(self, index: Any, *, device: str = "cpu", threads: int | None = None) -> None:
        self._faiss, self.device = load_faiss(), device
        self._index, self._on_gpu, self._threads = index, device != "cpu", threads
        self._turn = (
            threading.Lock() if self._on_gpu else nullcontext()
        )  # FAISS's GPU indexes take one thread at a time
        self._inner = _inner(self._faiss, index)
        self._ivf = self._inner if hasattr(self._inner, "nprobe") else None

    @classmethod
    def create(cls, factory: str, dim: int, *, gpu: bool = False, threads: int | None = None) -> "AnnIndex":
        """Create an empty index for rows of `dim` entries. Raises UsageError where FAISS does not know `factory`."""
        faiss, index = load_faiss(), _make(factory, dim)
        inner = _inner(faiss, index)
        for part in (inner, getattr(inner, "pq", inner)):
            if hasattr(part, "cp"):
                part.cp.min_points_per_centroid = 1  # silences a warning; recall is measured anyway
        if hasattr(inner, "qb"):
            inner.qb = QB
        if gpu:
            index = inner = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        if not hasattr(inner, "nprobe") and not isinstance(index, faiss.IndexIDMap):
            index = faiss.IndexIDMap(index)  # only IVF indexes store row numbers themselves
        return cls(index, device="cuda" if gpu else "cpu", threads=threads)

    @classmethod
    def load(cls, path: Path, *, to_add: bool = False, threads: int | None = None) -> "AnnIndex":
        """Load the file that `save` wrote, memory-mapped unless rows are `to_add`.

        Raises DamagedIndex where FAISS cannot read it.
        """
        faiss = load_faiss()
        flags = 0 if to_add else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
        try:
            index = faiss.read_index(str(path), flags)
        except RuntimeError as error:
            hint = f"Type `rapidindex index {quote(str(index_of(path)))}`."
            raise DamagedIndex(f"{path} cannot be read ({_in_short(error)}).", hint=hint) from error
        return cls(index, threads=threads)

    def on_gpu(self, device: str) -> "AnnIndex":
        """Return a copy on the GPU named `cuda:N`; for `cuda` on all GPUs, each with a part of the rows.

        Raises ResourceError where it does not fit.
        """
        faiss, number = self._faiss, device.partition(":")[2]
        try:
            if number:
                copy = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), int(number), self._index)
            else:
                options = faiss.GpuMultipleClonerOptions()
                options.shard = True
                copy = faiss.index_cpu_to_all_gpus(self._index, options)
        except RuntimeError as error:
            raise ResourceError(f"FAISS cannot copy the index to {device} ({_in_short(error)}).") from error
        moved = AnnIndex(copy, device=device, threads=self._threads)
        moved._inner, moved._ivf = self._inner, self._ivf  # what an index in parts does not tell
        return moved

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def dim(self) -> int:
        """The length of a row."""
        return self._index.d

    @property
    def lists(self) -> int:
        """The number of lists of an IVF index, some of which a search visits; 0 for other indexes."""
        return self._ivf.nlist if self._ivf else 0

    def bytes_per_row(self) -> int:
        """Return roughly how many bytes of memory a row takes."""
        try:
            return 8 + self._inner.sa_code_size()
        except RuntimeError:  # a graph, which stores vectors and links
            storage = self._faiss.downcast_index(getattr(self._inner, "storage", self._inner))
            return 8 + storage.sa_code_size() + 4 * self._inner.hnsw.nb_neighbors(0)

    def train(self, folded: Float32[np.ndarray, "n dim"]) -> None:
        """Train the quantizers on some of the rows. Raises UsageError where they are too few."""
        if not self._index.is_trained:
            self._call(self._index.train, folded)

    @property
    def is_trained(self) -> bool:
        """Whether the index is ready for rows."""
        return self._index.is_trained

    def add(self, folded: Float32[np.ndarray, "n dim"], numbers: Int64[np.ndarray, " n"]) -> None:
        """Add rows with their row numbers."""
        self._call(self._index.add_with_ids, folded, numbers)

    def numbers(self) -> Int64[np.ndarray, " n"]:
        """Return the row numbers that an index on the CPU holds, in any order."""
        if not self._ivf:
            return self._faiss.vector_to_array(self._faiss.downcast_index(self._index).id_map)
        lists = self._ivf.invlists
        views = (self._faiss.rev_swig_ptr(lists.get_ids(at), lists.list_size(at)) for at in range(self._ivf.nlist))
        return np.concatenate([view.copy() for view in views])

    def search(
        self, folded: Float32[np.ndarray, "queries dim"], count: int, lists: int | None = None
    ) -> tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]]:
        """Find about the `count` rows of the largest inner products: their estimates and row numbers, best first.

        Row -1 fills the rest where fewer are found. An IVF index visits `lists` of its lists, by default all.
        """
        if self._threads:
            self._faiss.omp_set_num_threads(self._threads)  # holds for this thread alone
        count = min(count, _GPU_MAX_RESULTS if self._on_gpu else len(self))
        with self._turn:
            return self._index.search(folded, count, params=self._parameters(count, lists))

    def save(self, path: Path) -> tuple[int, str]:
        """Write the index to `path`, whole or not at all, and return the file's size in bytes and its SHA-256.

        Raises ResourceError where there is no room.
        """
        index = self._faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        digest = hashlib.sha256()
        with atomic_file(path, size=len(self) * self.bytes_per_row(), replace=True) as file:
            each = _to_both(digest.update, file.write)
            self._faiss.write_index(index, self._faiss.PyCallbackIOWriter(each, _WRITE_BYTES))
            size = file.tell()
        return size, digest.hexdigest()

    def _parameters(self, count: int, lists: int | None) -> Any:
        if self._ivf:
            limit = _GPU_MAX_RESULTS if self._on_gpu else self._ivf.nlist
            return self._faiss.SearchParametersIVF(nprobe=min(lists or self._ivf.nlist, limit))
        if hasattr(self._inner, "hnsw"):
            return self._faiss.SearchParametersHNSW(efSearch=max(64, 4 * count))
        return None

    def _call(self, method: Callable[..., None], *arguments: np.ndarray) -> None:
        try:
            method(*arguments)
        except RuntimeError as error:
            raise UsageError(
                f"This --factory does not work on these rows: FAISS says: {_in_short(error)}.", hint=_HINT
            ) from error


def _sees_gpu() -> bool:
    return getattr(load_faiss(), "get_num_gpus", lambda: 0)() > 0


def _make(factory: str, dim: int) -> Any:
    faiss = load_faiss()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            f"--factory {factory!r} cannot be used at --dim {dim}: FAISS says: {_in_short(error)}.", hint=_HINT
        ) from error


def _inner(faiss: Any, index: Any) -> Any:
    """Return the index inside the wrappers for row numbers and rotations."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _to_both(first: Callable[[bytes], Any], second: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        first(data)
        second(data)

    return write


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _in_short(error: BaseException) -> str:
    """Return the last part of `Error in void faiss::f(…) at /…/file.cpp:823: Error: 'x' failed: what happened`."""
    message = re.sub(r"^Error in .*? at \S+:\d+: ", "", _first_line(error))
    return re.sub(r"^Error: (?:'.*?' failed: )?", "", message).rstrip(". ") or "nothing"


if __name__ == "__main__":
    _trial(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
