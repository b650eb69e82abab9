"""Write files so that they appear complete and synced to the disk, or not at all: sealed files, and others.

For a sealed file (`container.py`), libhdf5 only plans the layout, in memory: a file on the disk that it failed to write
cannot be closed again and keeps its disk space. This module writes the bytes, into space allocated beforehand, so that
a full disk is an ordinary error that leaves nothing behind.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import h5py
import numpy as np

from rapidindex.errors import ResourceError, StoreError
from rapidindex.store.container import USER_BLOCK, Extent, Layout, index_of

ALIGNMENT = 64  # bytes: a mapped array can be used in place
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not grow so large here (`ulimit -f`)",
}
"""The numbers of the errors that say that there is no room, each in words."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Column:
    """An array to be written, as consecutive blocks along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def column(values: Any, dtype: str) -> Column:
    """Return `values` as a column of one block; `dtype` names the byte order, as in `<f4`."""
    array = np.ascontiguousarray(values, dtype=dtype)
    return Column(array.shape, array.dtype, [array])


def json_column(value: Any) -> Column:
    """Return `value` as JSON in a column of bytes."""
    return column(np.frombuffer(encode_json(value), np.uint8), "|u1")


def encode_json(value: Any) -> bytes:
    """Encode `value` as compact JSON. Lone surrogates, which a JSON file can hold, survive."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def write(path: Path, columns: dict[str, Column], attributes: Mapping[str, str | int]) -> Layout:
    """Write these arrays and attributes to `path` as a sealed file. Raise as `atomic_file` does."""
    pieces, extents = _plan(columns, attributes)
    with atomic_file(path, size=pieces.size) as file:
        _reserve(file.fileno(), pieces.size)
        for offset, piece in pieces.written:
            _write_at(file, offset, piece)
        for name, values in columns.items():
            _write_blocks(file, values.blocks, extents[name])
        file.seek(USER_BLOCK)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        layout = Layout(path, pieces.size, sha256, attributes, extents)
        block = layout.block()
        if len(block) != USER_BLOCK:
            raise ValueError(f"the table of contents takes {len(block)} bytes, more than {USER_BLOCK}")
        _write_at(file, 0, block)
    return layout


def file_bytes(columns: dict[str, Column], attributes: Mapping[str, str | int]) -> int:
    """Return the size in bytes of the file that `write` would write."""
    return _plan(columns, attributes)[0].size


@contextlib.contextmanager
def atomic_file(path: Path, *, size: int = 0, replace: bool = False) -> Iterator[BinaryIO]:
    """Open a new file for reading and writing that appears at `path` when the block ends, complete and synced.

    If the block raises, nothing appears and nothing is left behind. With `replace` the file takes the place of an
    older one; without it StoreError is raised where there is one. `size`, in bytes, is what a message says is needed.
    Raises ResourceError where there is no room, and StoreError where the folder cannot be written to.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # unique, even after a process was killed
    with write_errors(path, size):
        try:
            with open(part, "xb+") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            (os.replace if replace else _publish)(part, path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds its old content or the new, never a mixture. Raise as `atomic_file` does."""
    with atomic_file(path, size=len(data), replace=True) as file:
        file.write(data)


@contextlib.contextmanager
def write_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn the operating system's refusals to write `path`, of `needed` bytes, into StoreError and ResourceError."""
    try:
        yield
    except FileExistsError as error:
        raise StoreError(
            f"{path} is already there, and a finished file is never overwritten.",
            hint=f"Is another build running? If not, type `rapidindex check {quote(str(index_of(path)))} --repair`.",
        ) from error
    except OSError as error:
        raise _refusal(error, path, needed) from error


def sync_folder(folder: Path) -> None:
    """Sync `folder` to the disk, so that renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(error: OSError, path: Path, needed: int) -> StoreError | ResourceError:
    if error.errno in NO_ROOM:
        free = "an unknown amount"
        with contextlib.suppress(OSError):
            free = _size(shutil.disk_usage(path.parent).free)
        return ResourceError(
            f"{path} cannot be written: {NO_ROOM[error.errno]}. It needs {_size(needed)}; {free} is free.",
            hint="Make room, then type the same command again: finished work is kept.",
        )
    if error.errno in _READ_ONLY:
        return StoreError(
            f"{path} cannot be written: {path.parent} is read-only for you ({error.strerror}).",
            hint="Change its permissions, or copy the index to a folder of your own.",
        )
    return StoreError(f"{path} cannot be written: {error.strerror or error}.")


def _size(count: int) -> str:
    return f"{count} bytes" if count < 2**20 else f"{count / 2**20:,.1f} MiB"


class _Pieces:
    """An in-memory file for h5py that records what libhdf5 writes: everything but the arrays."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self.size = self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self.written.append((self._position, bytes(data)))
        self._position += len(data)
        self.size = max(self.size, self._position)
        return len(data)

    def truncate(self, size: int) -> int:
        self.size = size
        return size

    def flush(self) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        raise OSError("libhdf5 is not expected to read from a file that it creates")

    readinto = read


def _plan(columns: dict[str, Column], attributes: Mapping[str, str | int]) -> tuple[_Pieces, dict[str, Extent]]:
    """Return the file without its arrays, and the places of the arrays, whose space is allocated but not filled."""
    pieces, extents = _Pieces(), {}
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(pieces, "w", userblock_size=USER_BLOCK, alignment_threshold=1, alignment_interval=ALIGNMENT) as file:
        file.attrs.update(attributes)
        for name, values in columns.items():
            dataset = file.create_dataset(name, values.shape, values.dtype, dcpl=creation)
            offset = dataset.id.get_offset() if dataset.size else -1
            extents[name] = Extent(values.dtype.str, values.shape, offset)
    return pieces, extents


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the disk space now, so that a full disk is noticed before anything is written."""
    os.ftruncate(descriptor, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot reserve
            raise


def _write_blocks(file: BinaryIO, blocks: Iterable[np.ndarray], extent: Extent) -> None:
    written = 0
    for block in blocks:
        if block.size:
            _write_at(file, extent.offset + written, np.ascontiguousarray(block, extent.dtype).data.cast("B"))
        written += block.nbytes
    if written != extent.nbytes:
        raise ValueError(f"a column of {extent.nbytes} bytes was given blocks of {written}")


def _write_at(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    file.seek(offset)
    file.write(data)


def _publish(part: Path, path: Path) -> None:
    """Give the finished file its name. Raise FileExistsError where `path` exists."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(part, path)
