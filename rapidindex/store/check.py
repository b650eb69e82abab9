"""Reads every byte of an index, says what is wrong with it, and mends what can be mended without losing anything.

Repairing deletes nothing but unfinished files. What is damaged is moved to INDEX/damaged/, and the manifest is written
anew from the intact shards, so that `rapidindex build` with the same options computes what was lost, and only that.
"""

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidindex.config import LEVELS
from rapidindex.errors import DamagedIndex, NewerFormat
from rapidindex.store import container, folder, manifest, shards, writing
from rapidindex.store.manifest import Manifest
from rapidindex.store.shards import Shard

_BUILD = "type `rapidindex build` with the same options"


@dataclass(frozen=True)
class Problem:
    """Something in an index that is not as it should be."""

    where: str
    """The file or the level, relative to the index."""
    what: str
    """What is wrong: the rest of a sentence that begins with `where`."""
    mend: str
    """What to type next."""


def check(path: str | Path, *, repair: bool = False) -> list[Problem]:
    """What is wrong with the index at `path`, after reading all of it; with `repair`, what was wrong before mending it.

    What a process is writing at the time is no problem. Raises NotAnIndex where there is none, and StoreError where a
    file may not be read; when repairing also IndexBusy where another process is writing to it, StoreError where the
    folder cannot be written to, and ResourceError where there is no room.
    """
    path = Path(path)
    if not folder.has_manifest(path) and not folder.is_index(path):
        manifest.load(path)  # says that this is no index
    if not repair:
        return _Audit(path, repair=False, busy=folder.writer(path) is not None).problems
    with folder.exclusive(path):
        audit = _Audit(path, repair=True, busy=False)
        audit.repair()
    return audit.problems


class _Audit:
    """One reading of an index: its problems, what the manifest should say, and whether that is `known` at all."""

    def __init__(self, path: Path, *, repair: bool, busy: bool) -> None:
        self.path, self.busy = path, busy
        self.problems: list[Problem] = []
        self.damaged: list[Path] = []
        self.removed: list[str] | None = None
        self._to_repair = "" if repair else f"type `rapidindex check {path} --repair`"
        self._owners: dict[str, dict[str, str]] = {}
        self._broken = self._verify()
        content = self._manifest()
        self.known = content is not None
        self.content: Manifest = content or {}
        if self.known:
            for level in LEVELS:
                self._level(level) if level in self.content["levels"] else self._unknown_level(level)
            self._moment()
            self._removals()
            self._unfinished()

    def repair(self) -> None:
        """Mend what can be mended: called once, under the lock."""
        if not self.known:
            return
        for file in self.damaged:
            self._move_aside(file)
        for part in folder.parts(self.path):
            with writing.write_errors(part, 0):
                part.unlink(missing_ok=True)
        folder.write_json(self.path / folder.MANIFEST, self.content)
        if self.removed is not None:
            folder.write_json(self.path / folder.REMOVED, {"removed": sorted(self.removed)})

    def _verify(self) -> dict[Path, str]:
        """What is wrong with the bytes of each sealed file; intact ones are left out."""
        files = [self.path / level / name for level in LEVELS for name in folder.shard_names(self.path / level)]
        if (self.path / folder.MOMENT).exists():
            files.append(self.path / folder.MOMENT)
        broken = {}
        for file in files:
            try:
                container.verify(file)
            except (DamagedIndex, NewerFormat) as error:
                broken[file] = _what(error, file)
        self._sealed = files
        return broken

    def _manifest(self) -> Manifest | None:
        file = self.path / folder.MANIFEST
        try:
            return manifest.load(self.path)
        except NewerFormat as error:
            self._problem(file, _what(error, file), error.hint)
        except DamagedIndex as error:
            content = self._recovered()
            if content is not None:
                self._damage(file, _what(error, file), f"it was written anew from the shards: {_BUILD}")
                return content
            lost = (
                "no shard is intact, so the build's options are lost with it: type `rapidindex build` with --overwrite"
            )
            self._problem(file, _what(error, file), lost)
        return None

    def _recovered(self) -> Manifest | None:
        """The newest of the manifest's copies in the intact files, with all of these listed."""
        intact = [file for file in self._sealed if file not in self._broken]
        layouts = [container.read_layout(file) for file in intact]
        copies = [shards.read_index(layout) for layout in layouts if "index" in layout.extents]
        if not copies:
            return None
        [(id, _)] = Counter(copy["id"] for copy in copies).most_common(1)
        content = max((copy for copy in copies if copy["id"] == id), key=lambda copy: copy["revision"])
        for file in intact:
            plan = content["levels"].get(file.parent.name)
            if plan is not None and isinstance(shard := self._read(content, file), Shard):
                plan["shards"][file.name] = shard.entry()
        moment = self._read_moment(content)
        content["second_moment"] = moment if isinstance(moment, dict) else None
        return content

    def _level(self, level: str) -> None:
        """Judge each shard of a level, and keep the good ones in the manifest."""
        listed = self.content["levels"][level]["shards"]
        owners = self._owners[level] = {}
        done, kept = set(), {}
        on_disk = folder.shard_names(self.path / level)
        # Listed ones first: of two shards with the same example, they count.
        for name in sorted({*listed, *on_disk}, key=lambda name: (name not in listed, folder.shard_number(name))):
            file = self.path / level / name
            shard = self._read(self.content, file)
            fault = shard if isinstance(shard, str) else _content_fault(shard, owners)
            if isinstance(shard, str) or fault:
                self._damage(file, fault, f"its examples are not in the index now: {_BUILD}")
                continue
            kept[name] = shard.entry()
            owners.update(dict.fromkeys(shard.ids, name))
            done.update(shard.ids, (record["id"] for record in shard.rejected))
            if name not in listed and not self.busy:
                self._problem(
                    file, "is finished, but the manifest does not list it", self._to_repair or "it is listed now"
                )
            elif listed.get(name, kept[name]) != kept[name]:
                self._problem(file, "is not the file that the manifest lists", self._to_repair or "it is listed now")
        self.content["levels"][level]["shards"] = kept
        planned = self.content["levels"][level]["planned"]
        if len(done) < planned and not self.busy:
            self._problem(self.path / level, f"is incomplete: {len(done)} of {planned} examples", _BUILD)

    def _unknown_level(self, level: str) -> None:
        for name in folder.shard_names(self.path / level):
            self._damage(self.path / level / name, f"is of a level that the manifest does not know: {level}", _BUILD)

    def _moment(self) -> None:
        file, listed = self.path / folder.MOMENT, self.content["second_moment"]
        if listed is None and not file.exists():
            return
        found = self._read_moment(self.content)
        after = f"the shards were made with it: {_BUILD}, which makes the same one again"
        if isinstance(found, str):
            self._damage(file, found, after)
            found = None
        elif listed is None and not self.busy:
            self._problem(file, "is finished, but the manifest does not list it", self._to_repair or "it is listed now")
        elif listed not in (None, found):
            self._damage(file, "is not the file that the manifest lists", after)
            found = None
        self.content["second_moment"] = found

    def _removals(self) -> None:
        file = self.path / folder.REMOVED
        stored = set().union(*self._owners.values())
        try:
            removed = set(manifest.load_removed(self.path))
        except (DamagedIndex, NewerFormat) as error:
            text = b""
            with contextlib.suppress(OSError):
                text = file.read_bytes()
            lines = {line.strip().removesuffix(b",") for line in text.splitlines()}  # an id each
            self.removed = [id for id in stored if json.dumps(id).encode() in lines]
            what = f"{_what(error, file)}; {len(self.removed)} ids in it can be read"
            self._damage(
                file, what, "those are kept: see that none is missing, and type `rapidindex remove` where one is"
            )
            return
        if unknown := sorted(removed - stored):
            some = ", ".join(unknown[:3])
            what = f"names {len(unknown)} ids that are not stored: {some}"
            self._problem(file, what, f"harmless; they stay removed if they come back: {_BUILD}")

    def _unfinished(self) -> None:
        for part in [] if self.busy else folder.parts(self.path):
            self._problem(part, "was left by a killed build", self._to_repair or "it was deleted")

    def _read(self, content: Manifest, file: Path) -> Shard | str:
        if file in self._broken:
            return self._broken[file]
        level, layers = file.parent.name, len(content["layers"])
        try:
            plan = content["levels"][level]
            form = {"K": plan["K"], "row_type": manifest.row_type(plan)}
            return shards.read_shard(file, index=content["id"], level=level, layers=layers, **form)
        except DamagedIndex as error:
            return _what(error, file)

    def _read_moment(self, content: Manifest) -> dict[str, Any] | str:
        file = self.path / folder.MOMENT
        if file in self._broken:
            return self._broken[file]
        try:
            return manifest.moment_entry(manifest.read_moment(self.path, content))
        except DamagedIndex as error:
            return _what(error, file)

    def _damage(self, file: Path, what: str, after: str) -> None:
        """A problem with a file that repairing moves aside, if it is there; `after` says what follows then."""
        self.damaged.append(file)
        self._problem(file, what, self._to_repair or after)

    def _problem(self, file: Path, what: str, mend: str) -> None:
        self.problems.append(Problem(file.relative_to(self.path).as_posix(), what, mend))

    def _move_aside(self, file: Path) -> None:
        if not file.exists():
            return
        aside = self.path / folder.DAMAGED
        name = f"{file.parent.name}-{file.name}" if file.parent != self.path else file.name
        with writing.write_errors(file, 0):
            aside.mkdir(exist_ok=True)
            taken = set(os.listdir(aside))
            free = next(
                free for count in range(len(taken) + 1) if (free := f"{name}.{count}" if count else name) not in taken
            )
            os.rename(file, aside / free)
            writing.sync_folder(aside)
            writing.sync_folder(file.parent)


def _what(error: DamagedIndex | NewerFormat, file: Path) -> str:
    return error.message.removeprefix(f"{file} ").rstrip(".")


def _content_fault(shard: Shard, owners: dict[str, str]) -> str:
    for fault in shards.faults(shard):
        return f"is damaged: {fault}"
    for id in shard.ids:
        if id in owners:
            return f"holds example {id}, which is in {owners[id]} too"
    return ""
