"""The index folder: which files are its own, JSON files that check themselves, and the one-writer lock.

    INDEX/manifest.json      what the index is, and the finished shards; derived from them, it can be rebuilt
    INDEX/second_moment.h5   sealed; one float32 array `v`
    INDEX/removed.json       ids taken out
    INDEX/.lock              held by the one process that writes
    INDEX/sentence/shard-00000.h5 …, INDEX/token/shard-00000.h5 …
    INDEX/damaged/           what `check --repair` moved aside

Files whose names end in `.part` were never finished. Knows names and bytes, not what is in them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rapidindex.config import LEVELS
from rapidindex.errors import IndexBusy, NewerFormat, NotAnIndex, StoreError
from rapidindex.store.container import damaged, read_errors, read_layout
from rapidindex.store.writing import replace_file, sync_folder, write_errors

FORMAT = 2
"""What is written. Format 1 is read, too: its rows are float16, and its manifest does not say so."""
MANIFEST, REMOVED, MOMENT, LOCK, DAMAGED = "manifest.json", "removed.json", "second_moment.h5", ".lock", "damaged"
ANN = "ann"  # INDEX/<level>/ann…: derived from the shards by index.py, and rebuilt at will
_SHARD = re.compile(r"shard-(\d{5,})\.h5")
_PART = re.compile(r".+\.[0-9a-f]{8}\.part")
_ASIDE = re.compile(r"((sentence|token)-shard-\d{5,}\.h5|manifest\.json|removed\.json|second_moment\.h5)(\.\d+)?")
_LOCK_SECONDS = 0.3  # `check` holds the lock for a moment; a writer holds it for hours


def shard_name(number: int) -> str:
    """`shard-00007.h5`."""
    return f"shard-{number:05d}.h5"


def shard_number(name: str) -> int:
    """7 of `shard-00007.h5`; -1 where `name` is no shard's."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match else -1


def shard_names(folder: Path) -> list[str]:
    """The finished shards in a level's folder, in order; none where the folder does not exist."""
    return sorted((name for name in _entries(folder) if _SHARD.fullmatch(name)), key=shard_number)


def parts(path: Path) -> list[Path]:
    """The unfinished files in an index folder."""
    folders = [path, *(path / level for level in LEVELS)]
    return [folder / name for folder in folders for name in _entries(folder) if _PART.fullmatch(name)]


def _entries(folder: Path) -> list[str]:
    with read_errors(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []


# JSON files that check themselves


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote.

    A change to any byte raises DamagedIndex, a newer format NewerFormat, no file FileNotFoundError.
    """
    text = None
    with read_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        text = path.read_bytes()
    if text is None:
        raise FileNotFoundError(path)
    try:
        content = json.loads(text)
        version = content.pop("format")
        del content["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path, "it is not the JSON that was written") from None
    if type(version) is int and 1 <= version <= FORMAT and render_json(content, version) == text:
        return content
    # `format` comes first. With one that is known in its place a newer file does not fit its checksum, a damaged does.
    newer, known = type(version) is int and version > FORMAT, range(1, FORMAT + 1)
    if newer and not any(text.replace(b"%d" % version, b"%d" % n, 1) == render_json(content, n) for n in known):
        raise NewerFormat(
            f"{path} is in format {version}; this version of rapidindex reads formats 1 to {FORMAT}.",
            hint="Type `pip install --upgrade rapidindex`.",
        )
    raise damaged(path, "it was changed after it was written")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its format and checksum to `path`, as `replace_file` does; raise as it does."""
    replace_file(path, render_json(content))


def render_json(content: dict[str, Any], version: int = FORMAT) -> bytes:
    """Return the bytes of the file that `write_json` writes."""
    content = {"format": version, **content}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


# The lock


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Be the one writer of the index at `path`; IndexBusy, naming the other process, where there is one."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while (descriptor := _try_lock(path / LOCK)) is None:
        if time.monotonic() > deadline:
            raise IndexBusy(f"{path} is being written to by {_holder(path)}.", hint="Wait until it has finished.")
        time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for processes that were forked and hold a copy
        os.close(descriptor)


def writer(path: Path) -> str | None:
    """Which process is writing to the index at `path`, in words; None where none is."""
    with contextlib.suppress(FileNotFoundError, PermissionError), open(path / LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(path)
        except OSError:
            return None
    return None


def _try_lock(lock: Path) -> int | None:
    with write_errors(lock, 64):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):  # else it was deleted meanwhile, with its index
            with contextlib.suppress(OSError):  # only words for a message, and the disk may be full
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"rapidindex process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"{lock.parent} cannot be locked: {error.strerror}.", hint="Use a local disk.") from error
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (path / LOCK).read_text().strip().removeprefix("rapidindex ") or "another process"
    return "another process"


# Whose folder it is


def has_manifest(path: Path) -> bool:
    """Return whether there is a manifest at `path`. StoreError where the folder may not be read."""
    with read_errors(path):
        return (path / MANIFEST).exists()


def is_index(path: Path) -> bool:
    """Whether `path` is surely an index, intact or not: its manifest, a sealed file or its lock file says so."""
    try:
        if "levels" in read_json(path / MANIFEST):
            return True
    except NewerFormat:
        return True
    except (FileNotFoundError, StoreError):
        pass
    sealed = [path / MOMENT, *(path / level / name for level in LEVELS for name in shard_names(path / level))]
    for file in sealed:
        with contextlib.suppress(StoreError):
            read_layout(file)
            return True
    with contextlib.suppress(OSError):
        return (path / MANIFEST).exists() and (path / LOCK).read_bytes().startswith(b"rapidindex process ")
    return False


def make_ready(path: Path) -> None:
    """Make `path` a folder for a new index: StoreError where it exists and is anything but empty."""
    if is_index(path):
        raise StoreError(
            f"There is an index at {path} already.",
            hint="Add --overwrite to replace it; without it, the options that it was built with go on with it.",
        )
    with write_errors(path, 0):
        if path.is_symlink() or path.exists():
            if not path.is_dir():
                raise StoreError(f"{path} is a file, not a folder.", hint="Choose another name for the index.")
            foreign = [name for name in sorted(os.listdir(path)) if name != LOCK and not _PART.fullmatch(name)]
            if foreign:
                raise StoreError(
                    f"{path} holds other files, such as {foreign[0]}.", hint="Choose a new folder for the index."
                )
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)


def destroy(path: Path) -> None:
    """Delete the index at `path`, and only that.

    Raises NotAnIndex where there is none, StoreError, naming it, where the folder holds a file that is not the index's,
    and IndexBusy where another process is writing to it. Nothing is deleted then.
    """
    if not is_index(path):
        raise NotAnIndex(f"There is no index at {path}.", hint="Nothing was deleted.")
    _own_files(path)
    with exclusive(path), write_errors(path, 0):
        files, folders = _own_files(path)
        last = [path / MANIFEST, path / LOCK]  # they say that it is an index: a killed deletion can be finished
        for file in files:
            if file not in last:
                file.unlink(missing_ok=True)
        for subfolder in folders:
            subfolder.rmdir()
        for file in last:
            file.unlink(missing_ok=True)
        if not path.is_symlink():
            path.rmdir()


def _own_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The index's files, and its folders; StoreError where there is anything else."""
    files: list[Path] = []
    folders: list[Path] = []
    for folder, subfolders, names in os.walk(path, topdown=False):
        inside = Path(folder).relative_to(path)
        for name in (*names, *subfolders):
            entry = Path(folder, name)
            if not _is_own(inside, name, entry.is_dir()) or entry.is_symlink():
                raise StoreError(
                    f"{path} holds a file that is not the index's: {entry}. Nothing was deleted.",
                    hint="Move it elsewhere, then type the same command again.",
                )
            (folders if entry.is_dir() else files).append(entry)
    return files, folders


def _is_own(inside: Path, name: str, is_folder: bool) -> bool:
    where = inside.parts
    if is_folder:
        return not where and name in (*LEVELS, DAMAGED)
    if _PART.fullmatch(name):
        return True
    if not where:
        return name in (MANIFEST, REMOVED, MOMENT, LOCK)
    if where == (DAMAGED,):
        return bool(_ASIDE.fullmatch(name))
    return bool(_SHARD.fullmatch(name)) or name.startswith(ANN + ".")
