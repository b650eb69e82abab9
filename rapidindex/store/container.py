"""Sealed files: immutable HDF5 files of plain arrays that carry their own checksum and can be memory-mapped.

    0      one line of JSON, then zeros: {"format", "bytes", "sha256", "attributes", "arrays": {name: {"dtype", "shape",
           "offset"}}, "seal"}. `sha256` covers everything after these 2,048 bytes, `seal` the line without itself
    2048   the HDF5 file: contiguous, uncompressed arrays, with the same attributes

HDF5 calls the first part the user block; every HDF5 tool skips it. Its JSON is canonical and its padding is compared,
so a change to any byte is detected. Files are read by this table of contents and not by libhdf5, which hangs or crashes
on some changed bytes (2.0.0, one byte at a time). `writing.py` writes sealed files. Knows nothing of indexes.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, BinaryIO, Literal, TypedDict

import numpy as np
from msgspec import Meta

from rapidindex import typed
from rapidindex.errors import DamagedIndex, NewerFormat, StoreError
from rapidindex.typed import Count

USER_BLOCK = 2048
_FORMAT = "rapidindex.shard/"
_VERSION = 1


@dataclass(frozen=True)
class Extent:
    """The place of an array in its file."""

    dtype: Literal["<f4", "<f2", "|i1", "<i4", "<i8", "|u1"]
    """NumPy's name, with the byte order: `<f4`."""
    shape: tuple[Annotated[int, Meta(ge=0, lt=2**48)], ...]
    offset: Annotated[int, Meta(ge=-1, le=2**63 - 1)]
    """Bytes from the start of the file; -1 for an empty array."""

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def lies_in(self, size: int) -> bool:
        """Return whether the array lies in a file of so many bytes, behind the user block, in whole steps."""
        step = np.dtype(self.dtype).itemsize
        inside = USER_BLOCK <= self.offset <= size - self.nbytes and self.offset % step == 0
        return len(self.shape) <= 2 and (inside or not self.nbytes)


class _Contents(TypedDict):
    """The line of JSON, without format and seal."""

    bytes: Count
    sha256: str
    attributes: dict[str, str | Count]
    arrays: dict[str, Extent]


@dataclass(frozen=True)
class Layout:
    """The table of contents of a sealed file."""

    path: Path
    size: int
    """The size of the whole file in bytes."""
    sha256: str
    """The checksum of everything after the user block, in hexadecimal."""
    attributes: Mapping[str, str | int]
    extents: dict[str, Extent]

    def block(self) -> bytes:
        """Return the first 2,048 bytes of the file."""
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
        """Return a copy of the array of that name."""
        return np.array(map_arrays(self)[name])


def index_of(path: Path) -> Path:
    """Return the index folder that the file at `path` belongs to."""
    return path.parent.parent if path.name.startswith(("shard-", "ann.")) else path.parent


def damaged(path: Path, what: str) -> DamagedIndex:
    """Return the error for a file that is not as it was written."""
    return DamagedIndex(f"{path} is damaged: {what}.", hint=f"Type `rapidindex check {quote(str(index_of(path)))}`.")


def fitted(path: Path, value: Any, kind: Any, what: str) -> Any:
    """Return a value of the JSON in `path`, named `what`, as `kind`. Raise DamagedIndex where it is none."""
    try:
        return typed.fit(value, kind, what)
    except ValueError as error:
        raise damaged(path, str(error)) from None


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn a failure to read `path` into DamagedIndex, or into StoreError where permission is missing."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedIndex(
            f"{path} is missing.", hint=f"Type `rapidindex check {quote(str(index_of(path)))}`."
        ) from error
    except PermissionError as error:
        raise StoreError(f"{path} may not be read by you.", hint="Change its permissions.") from error
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from error


def open_file(path: Path) -> BinaryIO:
    """Open a file of an index to read it. Raise as `read_errors`, and DamagedIndex where it is no ordinary file.

    A link may lead out of the index, and a pipe has no end.
    """
    with read_errors(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise damaged(path, "it is a link, a folder or another thing that is not an ordinary file")
        return open(path, "rb")


def read_layout(path: Path) -> Layout:
    """Read the table of contents of `path` and compare it with its seal and the file's size. Read no arrays.

    Raises DamagedIndex where the file is missing or truncated or its user block was changed, NewerFormat where a newer
    version wrote it, and StoreError where permission to read it is missing.
    """
    with read_errors(path), open_file(path) as file:
        block, size = file.read(USER_BLOCK), os.fstat(file.fileno()).st_size
    layout = _parse(path, block)
    if layout.size != size:
        raise damaged(path, f"it should have {layout.size} bytes and has {size}")
    return layout


def verify(path: Path) -> Layout:
    """Compare the whole file at `path` with its checksum; return its table of contents. Raise as `read_layout` does."""
    layout = read_layout(path)
    with read_errors(path), open_file(path) as file:
        file.seek(USER_BLOCK)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != layout.sha256:
        raise damaged(path, "its contents were changed after it was written")
    return layout


def map_arrays(layout: Layout) -> dict[str, np.ndarray]:
    """Map the arrays of a file into memory, as views of one private map.

    A write to them never reaches the file, and torch takes them without a copy or a warning. Raises DamagedIndex where
    the file has shrunk.
    """
    with read_errors(layout.path), open_file(layout.path) as file:
        if os.fstat(file.fileno()).st_size != layout.size:  # touching pages past a file's end kills the process
            raise damaged(layout.path, f"it does not have {layout.size} bytes any more")
        whole = np.memmap(file, mode="c")
    return {name: _view(whole, extent) for name, extent in layout.extents.items()}


def _view(whole: np.ndarray, extent: Extent) -> np.ndarray:
    if not extent.nbytes:
        return np.empty(extent.shape, extent.dtype)
    return whole[extent.offset : extent.offset + extent.nbytes].view(extent.dtype).reshape(extent.shape)


def _parse(path: Path, block: bytes) -> Layout:
    try:
        contents = typed.loads(block.rstrip(b"\0"))
        version = str(contents["format"]).removeprefix(_FORMAT)
    except (ValueError, KeyError, TypeError):
        raise damaged(path, f"its first {USER_BLOCK} bytes are not what was written") from None
    with contextlib.suppress(ValueError):
        contents = typed.fit(contents, _Contents, "it")
        layout = Layout(path, contents["bytes"], contents["sha256"], contents["attributes"], contents["arrays"])
        if layout.block() == block:
            if not all(extent.lies_in(layout.size) for extent in layout.extents.values()):
                raise damaged(path, "its arrays lie outside the file")
            return layout
        if layout.block() == block.replace(version.encode(errors="replace"), b"%d" % _VERSION, 1):
            version = ""  # the seal fits the known version: only this digit was changed
    if version.isdecimal() and int(version) > _VERSION:
        raise NewerFormat(
            f"{path} is in format {version}; this version of rapidindex reads format {_VERSION}.",
            hint="Type `pip install --upgrade rapidindex`.",
        )
    raise damaged(path, f"its first {USER_BLOCK} bytes were changed after they were written")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
