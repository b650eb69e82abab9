"""Check every byte of an index, report what is wrong with it, and repair what can be repaired without loss.

A repair deletes nothing but unfinished files. It moves damaged files to INDEX/damaged/ and writes the manifest anew
from the intact shards, so that `rapidindex build` with the same options computes what was lost and no more.
"""

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rapidindex.config import LEVELS
from rapidindex.errors import DamagedIndex, NewerFormat, StoreError
from rapidindex.store import container, folder, manifest, shards, writing
from rapidindex.store.manifest import Manifest
from rapidindex.store.shards import Shard

_BUILD = "type `rapidindex build` with the same options"
_MAKES_MOMENT = "give its `rapidindex build` or `rapidindex specialize` command again, which makes the same one"
_LISTED = "it is listed now"


@dataclass(frozen=True)
class Problem:
    """A fault of an index."""

    where: str
    """The file or the level, relative to the index."""
    what: str
    """The rest of a sentence that begins with `where`."""
    mend: str
    """The next command, in words."""


def check(path: str | Path, *, repair: bool = False) -> list[Problem]:
    """Read all of the index at `path` and return its problems; with `repair`, mend them and return what they were.

    Files that another process is writing are no problem. Raises NotAnIndex where there is no index, and StoreError
    where permission to read is missing. A repair also raises IndexBusy where another process is writing to the index,
    StoreError where the folder is read-only, and ResourceError where the disk is full.
    """
    path = Path(path)
    folder.refuse_links(path)
    if not folder.has_manifest(path) and not folder.is_index(path):
        manifest.load(path)  # raises NotAnIndex
    if not repair:
        return _Audit(path, repair=False, busy=folder.writer(path) is not None).problems
    with folder.exclusive(path):
        audit = _Audit(path, repair=True, busy=False)
        audit.repair()
    return audit.problems


class _Audit:
    """One reading of an index: its problems, its damaged files, and the manifest that its intact files amount to.

    `known` is False where the manifest is lost or newer than this version: then nothing else is judged or repaired.
    """

    def __init__(self, path: Path, *, repair: bool, busy: bool) -> None:
        self.path, self.busy = path, busy
        self.problems: list[Problem] = []
        self.damaged: list[Path] = []
        self.removed: list[str] | None = None
        self._to_repair = "" if repair else f"type `rapidindex check {quote(str(path))} --repair`"
        self._owners: dict[str, dict[str, str]] = {}
        self._sealed = folder.sealed_files(path)
        self._broken = self._verify()
        content = self._manifest()
        self.known = content is not None
        self.content: Manifest = content or {}
        if self.known:
            for level in LEVELS:
                self._check_level(level) if level in self.content["levels"] else self._check_unknown_level(level)
            self._check_moment()
            self._check_removed()
            self._check_unfinished()

    def repair(self) -> None:
        """Mend what can be mended. Called once, under the lock."""
        if not self.known:
            return
        for file in self.damaged:
            self._move_aside(file)
        folder.delete_parts(self.path)
        folder.write_json(self.path / folder.MANIFEST, self.content)
        if self.removed is not None:
            folder.write_json(self.path / folder.REMOVED, {"removed": sorted(self.removed)})

    def _verify(self) -> dict[Path, str]:
        """Return the fault of each sealed file whose bytes are not what was written."""
        broken = {}
        for file in self._sealed:
            try:
                container.verify(file)
            except (DamagedIndex, NewerFormat) as error:
                broken[file] = _fault(error, file)
        return broken

    def _manifest(self) -> Manifest | None:
        file = self.path / folder.MANIFEST
        try:
            return manifest.load(self.path)
        except NewerFormat as error:
            self._report(file, _fault(error, file), error.hint)
        except DamagedIndex as error:
            content = self._recovered()
            if content is not None:
                self._damage(file, _fault(error, file), f"it was written anew from the shards: {_BUILD}")
                return content
            lost = "no shard is intact, so the build's options are lost: type `rapidindex build` with --overwrite"
            self._report(file, _fault(error, file), lost)
        return None

    def _recovered(self) -> Manifest | None:
        """Rebuild the manifest: take the newest copy of it in the intact files, and list all of these."""
        intact = [file for file in self._sealed if file not in self._broken]
        copies = []
        for file in intact:
            with contextlib.suppress(DamagedIndex):
                copies.append(manifest.read_copy(container.read_layout(file)))
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

    def _check_level(self, level: str) -> None:
        """Judge each shard of a level, and keep only the good ones in the manifest."""
        plan, owners = self.content["levels"][level], self._owners.setdefault(level, {})
        listed, kept, done = plan["shards"], {}, set()
        on_disk = folder.shard_names(self.path / level)
        # Listed shards first: of two that hold the same example, the listed one counts.
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
            if name not in listed:
                self._check_unlisted(file)
            elif listed[name] != kept[name]:
                self._repairable(file, "is not the file that the manifest lists", _LISTED)
        plan["shards"] = kept
        if len(done) < plan["planned"] and not self.busy:
            self._report(self.path / level, f"is incomplete: {len(done)} of {plan['planned']} examples", _BUILD)

    def _check_unknown_level(self, level: str) -> None:
        for name in folder.shard_names(self.path / level):
            self._damage(self.path / level / name, f"is of a level that the manifest does not know: {level}", _BUILD)

    def _check_unlisted(self, file: Path) -> None:
        if not self.busy:
            self._repairable(file, "is finished, but the manifest does not list it", _LISTED)

    def _check_moment(self) -> None:
        file, listed = self.path / folder.MOMENT, self.content["second_moment"]
        if listed is None and not file.exists():
            if manifest.lost_moment(self.content):
                self._report(file, "is missing, and the rows were made with it", _MAKES_MOMENT)
            return
        entry = self._read_moment(self.content)
        fault = entry if isinstance(entry, str) else ""
        if not fault and listed not in (None, entry):
            fault = "is not the file that the manifest lists"
        if fault:
            self._damage(file, fault, f"the rows were made with it: {_MAKES_MOMENT}")
        elif listed is None:
            self._check_unlisted(file)
        self.content["second_moment"] = None if fault else entry

    def _check_removed(self) -> None:
        file, stored = self.path / folder.REMOVED, set().union(*self._owners.values())
        try:
            removed = set(manifest.load_removed(self.path))
        except (DamagedIndex, NewerFormat) as error:
            self.removed = _readable_ids(file, stored)
            what = f"{_fault(error, file)}; {len(self.removed)} ids in it can be read"
            after = "those are kept: see that none is missing, and type `rapidindex remove` where one is"
            self._damage(file, what, after)
            return
        if unknown := sorted(removed - stored):
            what = f"names {len(unknown)} ids that are not stored: {', '.join(unknown[:3])}"
            self._report(file, what, f"harmless; they stay removed if they come back: {_BUILD}")

    def _check_unfinished(self) -> None:
        for part in [] if self.busy else folder.parts(self.path):
            self._repairable(part, "was left by a killed build", "it was deleted")

    def _read(self, content: Manifest, file: Path) -> Shard | str:
        """Return the shard, or its fault."""
        if file in self._broken:
            return self._broken[file]
        try:
            return shards.read_shard(file, **manifest.shard_form(content, file.parent.name))
        except DamagedIndex as error:
            return _fault(error, file)

    def _read_moment(self, content: Manifest) -> dict[str, Any] | str:
        """Return the manifest's entry for the second moment, or the fault of its file."""
        file = self.path / folder.MOMENT
        if file in self._broken:
            return self._broken[file]
        try:
            layout = manifest.read_moment(self.path, content)
            if not manifest.are_of_rows(content, container.map_arrays(layout)):
                return f"is damaged: {manifest.OTHER_MOMENT}"
            return manifest.moment_entry(layout)
        except DamagedIndex as error:
            return _fault(error, file)

    def _damage(self, file: Path, what: str, after: str) -> None:
        """Report a file that a repair moves aside; `after` is the next step then."""
        self.damaged.append(file)
        self._repairable(file, what, after)

    def _repairable(self, file: Path, what: str, after: str) -> None:
        self._report(file, what, self._to_repair or after)

    def _report(self, file: Path, what: str, mend: str) -> None:
        self.problems.append(Problem(file.relative_to(self.path).as_posix(), what, mend))

    def _move_aside(self, file: Path) -> None:
        if not os.path.lexists(file):
            return
        aside = self.path / folder.DAMAGED
        name = f"{file.parent.name}-{file.name}" if file.parent != self.path else file.name
        with writing.write_errors(file, 0):
            aside.mkdir(exist_ok=True)
            taken = set(os.listdir(aside))
            names = (name, *(f"{name}.{count}" for count in range(1, len(taken) + 1)))
            os.rename(file, aside / next(free for free in names if free not in taken))
            writing.sync_folder(aside)
            writing.sync_folder(file.parent)


def _fault(error: DamagedIndex | NewerFormat, file: Path) -> str:
    return error.message.removeprefix(f"{file} ").rstrip(".")


def _content_fault(shard: Shard, owners: dict[str, str]) -> str:
    for fault in shards.faults(shard):
        return f"is damaged: {fault}"
    for id in shard.ids:
        if id in owners:
            return f"holds example {id}, which is in {owners[id]} too"
    return ""


def _readable_ids(file: Path, stored: set[str]) -> list[str]:
    """Return the stored ids that a damaged list of removed ids still names: `write_json` puts each on a line."""
    text = b""
    with contextlib.suppress(StoreError, OSError), container.open_file(file) as opened:
        text = opened.read()
    lines = {line.strip().removesuffix(b",") for line in text.splitlines()}
    return [id for id in stored if json.dumps(id).encode() in lines]
