"""The index folder: the names of its files, JSON files with a checksum, and the lock of the one writer.

    INDEX/manifest.json      what the index is, and its finished shards; can be rebuilt from them
    INDEX/second_moment.h5   sealed: the float32 arrays `v` or `means`, `eigenvectors`, and `roots`, where there are any
    INDEX/removed.json       the ids of removed examples
    INDEX/.lock              held by the one process that writes, or shared by the jobs of one build
    INDEX/.job-2-of-3        held by a job of a build while it writes shards of its own
    INDEX/sentence/shard-00000.h5 …, INDEX/token/shard-00000.h5 …
    INDEX/damaged/           files that `check --repair` moved aside
    INDEX/gradients/         in an index of embeddings: an index of the true gradients of some of its examples

Files whose names end in `.part` are unfinished. Knows names and bytes, not their meaning.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rapidindex import typed
from rapidindex.config import LEVELS
from rapidindex.errors import IndexBusy, NewerFormat, NotAnIndex, StoreError
from rapidindex.store.container import damaged, open_file, read_errors, read_layout
from rapidindex.store.writing import replace_file, sync_folder, write_errors

FORMAT = 2
"""The format that is written. Format 1 is read too: its rows are float16, and its manifest does not say so."""
MANIFEST, REMOVED, MOMENT, LOCK, DAMAGED = "manifest.json", "removed.json", "second_moment.h5", ".lock", "damaged"
GRADIENTS = "gradients"
CHECKPOINTS = "checkpoints.json"  # see several.py
ANN = "ann"  # INDEX/<level>/ann.*: the vector index, which `search` derives from the shards
SHARD = re.compile(r"shard-([0-9]{5,18})\.h5")
_PART = re.compile(r".+\.[0-9a-f]{8}\.part")
_ASIDE = re.compile(r"((sentence|token)-shard-[0-9]{5,18}\.h5|manifest\.json|removed\.json|second_moment\.h5)(\.\d+)?")
_KEPT = re.compile(r"\.(nfs|fuse_hidden)[0-9a-f]+")
"""What NFS and FUSE call a file that was deleted while it was open, until it is closed."""
_JOB = re.compile(r"\.job-([0-9]+)-of-([0-9]+)")
_LOCK_SECONDS = 0.3  # `check` holds the lock for a moment; a writer holds it for hours


def shard_name(number: int) -> str:
    """Return the file name of a shard: `shard-00007.h5` for 7."""
    return f"shard-{number:05d}.h5"


def shard_number(name: str) -> int:
    """Return the number of a shard, 7 for `shard-00007.h5`; -1 where `name` is not that of a shard."""
    match = SHARD.fullmatch(name)
    return int(match[1]) if match else -1


def shard_names(folder: Path) -> list[str]:
    """Return the names of the finished shards in a level's folder, by number; none where the folder does not exist."""
    return sorted((name for name in _entries(folder) if SHARD.fullmatch(name)), key=shard_number)


def sealed_files(path: Path) -> list[Path]:
    """Return the shards and the second moment in the index folder `path`, listed in the manifest or not."""
    shards = [path / level / name for level in LEVELS for name in shard_names(path / level)]
    return [*shards, path / MOMENT] if (path / MOMENT).exists() else shards


def parts(path: Path) -> list[Path]:
    """Return the unfinished files in the index folder `path`."""
    folders = [path, *(path / level for level in LEVELS)]
    return [folder / name for folder in folders for name in _entries(folder) if _PART.fullmatch(name)]


def delete_parts(path: Path) -> None:
    """Delete the unfinished files in the index folder `path`. Called under the lock, when nobody is writing them."""
    for part in parts(path):
        with write_errors(part, 0):
            part.unlink(missing_ok=True)


def _entries(folder: Path) -> list[str]:
    with read_errors(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []


# JSON files with a checksum


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises DamagedIndex where any byte was changed, NewerFormat, and FileNotFoundError where there is no file.
    """
    text = None
    with read_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if os.path.lexists(path):
            with open_file(path) as file:
                text = file.read()
    if text is None:
        raise FileNotFoundError(path)
    try:
        content = typed.loads(text)
        version = content.pop("format")
        del content["sha256"]
        if type(version) is int and 1 <= version <= FORMAT and render_json(content, version) == text:
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged(path, "it is not the JSON that was written") from None
    # A damaged version number is the only fault of a file whose checksum fits once a known version is put in its place.
    newer, known = type(version) is int and version > FORMAT, range(1, FORMAT + 1)
    if newer and not any(text.replace(b"%d" % version, b"%d" % n, 1) == render_json(content, n) for n in known):
        raise NewerFormat(
            f"{path} is in format {version}; this version of rapidindex reads formats 1 to {FORMAT}.",
            hint="Type `pip install --upgrade rapidindex`.",
        )
    raise damaged(path, "it was changed after it was written")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its format and checksum, as `replace_file` does. Raise as it does."""
    replace_file(path, render_json(content))


def render_json(content: dict[str, Any], version: int = FORMAT) -> bytes:
    """Return the bytes that `write_json` writes."""
    content = {"format": version, **content}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


# The lock


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Be the only writer of the index at `path`. Raise IndexBusy, naming the other process, where there is one."""
    with _holding(path / LOCK, fcntl.LOCK_EX, path):
        for name in _entries(path):
            if _JOB.fullmatch(name):  # of a job that has ended: those at work share the lock
                (path / name).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def job(path: Path, part: int, parts: int) -> Iterator[None]:
    """Be job `part` (from 0) of `parts` of a build: they share the lock of the index. Raise as `Store.join`."""
    with _holding(path / LOCK, fcntl.LOCK_SH, path):
        with _holding(path / f".job-{part + 1}-of-{parts}", fcntl.LOCK_EX, path, _same_job(path, part, parts)):
            refuse_job(path, None, parts)
            yield


def refuse_job(path: Path, part: int | None, parts: int) -> None:
    """Raise StoreError where job `part` of `parts`, or jobs of another number, write to the index at `path`."""
    working = jobs(path)
    if part is not None and (part + 1, parts) in working:
        raise _same_job(path, part, parts)
    others = {of for _, of in working} - {parts}
    if others:
        raise StoreError(
            f"{path} is being built by jobs of {others.pop()}, not of {parts}.",
            hint="Give all jobs the same --shard I/N.",
        )


def _same_job(path: Path, part: int, parts: int) -> StoreError:
    return StoreError(
        f"Job {part + 1} of {parts} of {path} is at work already.",
        hint=f"Give each job a number of its own, 1/{parts} to {parts}/{parts}.",
    )


def jobs(path: Path) -> list[tuple[int, int]]:
    """Return (I, N) of each job I of N that is writing to the index at `path`."""
    found = [(int(match[1]), int(match[2])) for match in map(_JOB.fullmatch, _entries(path)) if match]
    return sorted(job for job in found if _is_held(path / f".job-{job[0]}-of-{job[1]}"))


@contextlib.contextmanager
def _holding(file: Path, how: int, path: Path, busy: StoreError | None = None) -> Iterator[None]:
    """Hold a lock on `file`. Raise IndexBusy, or `busy` where it is given, where others do."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while (descriptor := _try_lock(file, how)) is None:
        if time.monotonic() > deadline:
            raise busy or _busy(path, _holder(path))
        time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for forked processes, which hold a copy of the descriptor
        os.close(descriptor)


def refuse_writer(path: Path) -> None:
    """Raise IndexBusy where another process is writing to an index at `path`."""
    if is_index(path) and (holder := writer(path)) is not None:
        raise _busy(path, holder)


def _busy(path: Path, holder: str) -> IndexBusy:
    return IndexBusy(f"{path} is being written to by {holder}.", hint="Wait until it has finished.")


def writer(path: Path) -> str | None:
    """Describe the process that is writing to the index at `path`; None where there is none."""
    return _holder(path) if _is_held(path / LOCK) or jobs(path) else None


def _is_held(file: Path) -> bool:
    """Return whether a process holds `file` for itself."""
    with contextlib.suppress(StoreError), open_file(file) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _try_lock(lock: Path, how: int) -> int | None:
    if os.path.lexists(lock) and not stat.S_ISREG(os.lstat(lock).st_mode):
        raise StoreError(f"{lock} is not an ordinary file.", hint="Delete it, then type the same command again.")
    with write_errors(lock, 64):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        # The file may have been deleted meanwhile, together with its index.
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            with contextlib.suppress(OSError):  # the text is only for messages, and the disk may be full
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"rapidindex process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(descriptor)
        raise StoreError(
            f"{lock.parent} cannot be locked, so that two writers could spoil it: {error.strerror}.",
            hint="Build on a disk that has locks, such as a local one, and copy the index: queries need no lock.",
        ) from error
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    if working := jobs(path):
        return f"{', '.join(f'job {part}' for part, _ in working)} of {working[0][1]}"
    with contextlib.suppress(OSError, UnicodeDecodeError, StoreError), open_file(path / LOCK) as file:
        return file.read(256).decode().strip().removeprefix("rapidindex ") or "another process"
    return "another process"


# The folder as a whole


def has_manifest(path: Path) -> bool:
    """Return whether there is a manifest at `path`. Raise StoreError where permission to look is missing."""
    with read_errors(path):
        return (path / MANIFEST).exists()


def is_index(path: Path) -> bool:
    """Return whether `path` is certainly an index, intact or not: one of its files identifies itself as ours."""
    try:
        if "levels" in read_json(path / MANIFEST):
            return True
    except NewerFormat:
        return True
    except (FileNotFoundError, StoreError):
        pass
    for file in sealed_files(path):
        with contextlib.suppress(StoreError):
            read_layout(file)
            return True
    with contextlib.suppress(OSError, StoreError), open_file(path / LOCK) as file:
        return (path / MANIFEST).exists() and file.read(256).startswith(b"rapidindex process ")
    return False


def refuse_links(path: Path) -> None:
    """Raise StoreError where a folder of the index at `path` is a link, through which other files would be changed."""
    for name in (*LEVELS, DAMAGED, GRADIENTS):
        if os.path.islink(path / name):
            raise StoreError(
                f"{path / name} is a link, where an index keeps a folder of its own.",
                hint="Put a copy of the folder in its place: `cp -rL` copies what links lead to.",
            )


def create(path: Path) -> None:
    """Create the folder of a new index. Raise StoreError where `path` exists and is not an empty folder."""
    if is_index(path):
        raise StoreError(
            f"There is an index at {path} already.",
            hint="Add --overwrite to replace it, or give the options that it was built with to go on with it.",
        )
    with write_errors(path, 0):
        if path.is_symlink() or path.exists():
            if not path.is_dir():
                raise StoreError(f"{path} is a file, not a folder.", hint="Choose another name for the index.")
            foreign = [name for name in sorted(os.listdir(path)) if name != LOCK and not _is_left_over(path / name)]
            if foreign:
                raise StoreError(
                    f"{path} holds other files, such as {foreign[0]}.", hint="Choose a new folder for the index."
                )
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)


def destroy(path: Path) -> None:
    """Delete the index at `path`, and only that.

    Raises NotAnIndex where there is none, StoreError where the folder holds a file of another kind, which it names, and
    IndexBusy where another process is writing to the index. Nothing is deleted then.
    """
    if not is_index(path):
        raise NotAnIndex(f"There is no index at {path}.", hint="Nothing was deleted.")
    _own_files(path)
    with exclusive(path), write_errors(path, 0):
        files, folders = _own_files(path)
        last = [path / MANIFEST, path / LOCK]  # with these, a killed deletion can be finished
        for file in files:
            if file not in last:
                file.unlink(missing_ok=True)
        for subfolder in folders:
            _remove_folder(subfolder)
        for file in last:
            file.unlink(missing_ok=True)
    if not path.is_symlink():  # the lock is closed by now, and its file gone on NFS and FUSE, too
        with write_errors(path, 0):
            _remove_folder(path)


def _remove_folder(folder: Path) -> None:
    """Remove a folder, unless it holds files that are open, which NFS and FUSE keep, or another process was here."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _own_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files and the folders of the index. Raise StoreError where there is anything else in its folder."""
    files: list[Path] = []
    folders: list[Path] = []
    for folder, subfolders, names in os.walk(path, topdown=False):
        inside = Path(folder).relative_to(path)
        for name in (*names, *subfolders):
            entry = Path(folder, name)
            if _KEPT.fullmatch(name):
                continue
            if not _is_own(inside, name, entry.is_dir()) or entry.is_symlink():
                raise StoreError(
                    f"{path} holds a file that does not belong to the index: {entry}. Nothing was deleted.",
                    hint="Move it elsewhere, then type the same command again.",
                )
            (folders if entry.is_dir() else files).append(entry)
    return files, folders


def _is_left_over(entry: Path) -> bool:
    """Return whether an entry of a folder is no more than what the file system keeps, or a killed process left."""
    if entry.is_dir() and not entry.is_symlink():
        return _is_own(Path(), entry.name, True) and all(_KEPT.fullmatch(name) for name in os.listdir(entry))
    return bool(_PART.fullmatch(entry.name) or _KEPT.fullmatch(entry.name))


def _is_own(inside: Path, name: str, is_folder: bool) -> bool:
    if inside.parts[:1] == (GRADIENTS,):
        return name != GRADIENTS and _is_own(inside.relative_to(GRADIENTS), name, is_folder)
    if is_folder:
        return not inside.parts and name in (*LEVELS, DAMAGED, GRADIENTS)
    if _PART.fullmatch(name):
        return True
    if not inside.parts:
        return name in (MANIFEST, REMOVED, MOMENT, LOCK) or bool(_JOB.fullmatch(name))
    if inside.parts == (DAMAGED,):
        return bool(_ASIDE.fullmatch(name))
    return bool(SHARD.fullmatch(name)) or name.startswith(ANN + ".")
