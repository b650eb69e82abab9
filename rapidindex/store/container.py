"""A sealed file: an HDF5 file of plain arrays that checks itself, is never changed, and can be memory-mapped.

    0      one line of JSON, then zeros: {"format", "bytes", "sha256", "attributes", "arrays": {name: {"dtype", "shape",
           "offset"}}, "seal"}. `sha256` is over all that follows these 2,048 bytes, `seal` over the line without it
    2048   the HDF5 file: contiguous arrays, uncompressed, with the same attributes

HDF5 calls the first part the user block; every HDF5 tool skips it. Its JSON is canonical and its padding is checked,
so a change to any byte is found. The file is read by its own table of contents, without libhdf5, which hangs or crashes
on some changed bytes in HDF5's part (2.0.0, one byte at a time). Written by `writing.py`; knows nothing of indexes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.errors import DamagedIndex, NewerFormat, StoreError

USER_BLOCK = 2048
_FORMAT = "rapidindex.shard/"
_VERSION = 1


@dataclass(frozen=True)
class Extent:
    """Where an array lies in its file."""

    dtype: str
    """As NumPy writes it, with the byte order: `<f4`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file; -1 where it takes no space."""

    @property
    def nbytes(self) -> int:
        """The array's size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """A sealed file's table of contents."""

    path: Path
    size: int
    """Bytes of the whole file."""
    sha256: str
    """Of everything after the user block."""
    attributes: Mapping[str, str | int]
    extents: dict[str, Extent]

    def block(self) -> bytes:
        """The first 2,048 bytes of the file."""
        content = {
            "format": f"{_FORMAT}{_VERSION}",
            "bytes": self.size,
            "sha256": self.sha256,
            "attributes": dict(self.attributes),
            "arrays": {name: vars(extent) for name, extent in self.extents.items()},
        }
        seal = hashlib.sha256(_json(content)).hexdigest()
        return _json({**content, "seal": seal}).ljust(USER_BLOCK, b"\0")

    def read(self, name: str) -> np.ndarray:
        """A copy of one array."""
        return np.array(map_arrays(self)[name])


def index_of(path: Path) -> Path:
    """The index folder that a file belongs to."""
    return path.parent.parent if path.name.startswith(("shard-", "ann.")) else path.parent


def damaged(path: Path, what: str) -> DamagedIndex:
    """The error for a file that is not as it was written."""
    return DamagedIndex(f"{path} is damaged: {what}.", hint=f"Type `rapidindex check {index_of(path)}`.")


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the failure to read `path` into our errors: DamagedIndex, or StoreError where it may not be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedIndex(f"{path} is missing.", hint=f"Type `rapidindex check {index_of(path)}`.") from error
    except PermissionError as error:
        raise StoreError(f"{path} may not be read by you.", hint="Change its permissions.") from error
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from error


def read_layout(path: Path) -> Layout:
    """The table of contents of `path`, checked against itself and the file's size; the arrays are not read.

    Raises DamagedIndex where the file is missing, truncated, or its first part was changed, NewerFormat where a newer
    version wrote it, and StoreError where it may not be read.
    """
    with read_errors(path), open(path, "rb") as file:
        block, size = file.read(USER_BLOCK), os.fstat(file.fileno()).st_size
    layout = _parse(path, block)
    if layout.size != size:
        raise damaged(path, f"it should have {layout.size} bytes and has {size}")
    return layout


def verify(path: Path) -> Layout:
    """The table of contents of `path`, after reading the whole file against it. Raises as `read_layout` does."""
    layout = read_layout(path)
    with read_errors(path), open(path, "rb") as file:
        file.seek(USER_BLOCK)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != layout.sha256:
        raise damaged(path, "its contents were changed after it was written")
    return layout


def map_arrays(layout: Layout) -> dict[str, np.ndarray]:
    """Map the arrays of a file: views of one private memory map, whose changes never reach the file."""
    with read_errors(layout.path):
        if os.stat(layout.path).st_size != layout.size:  # touching pages past a file's end kills the process
            raise damaged(layout.path, f"it does not have {layout.size} bytes any more")
        whole = np.memmap(
            layout.path, mode="c"
        )  # private: torch takes it without a copy, and no write reaches the file
    return {name: _view(whole, extent) for name, extent in layout.extents.items()}


def _view(whole: np.ndarray, extent: Extent) -> np.ndarray:
    if not extent.nbytes:
        return np.empty(extent.shape, extent.dtype)
    return whole[extent.offset : extent.offset + extent.nbytes].view(extent.dtype).reshape(extent.shape)


def _parse(path: Path, block: bytes) -> Layout:
    try:
        said = json.loads(block.rstrip(b"\0"))
        version = str(said["format"]).removeprefix(_FORMAT)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, f"its first {USER_BLOCK} bytes are not what was written") from None
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        arrays = said["arrays"].items()
        extents = {name: Extent(array["dtype"], tuple(array["shape"]), array["offset"]) for name, array in arrays}
        layout = Layout(path, said["bytes"], said["sha256"], said["attributes"], extents)
        if layout.block() == block:
            return layout
        if layout.block() == block.replace(version.encode(), b"%d" % _VERSION, 1):
            version = ""  # a newer file's seal covers its version: only this digit was changed
    if version.isdecimal() and int(version) > _VERSION:
        raise NewerFormat(
            f"{path} is in format {version}; this version of rapidindex reads format {_VERSION}.",
            hint="Type `pip install --upgrade rapidindex`.",
        )
    raise damaged(path, f"its first {USER_BLOCK} bytes were changed after they were written")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
