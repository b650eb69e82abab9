"""The index folder as a whole: create, open and lock it, and keep its manifest in step with the finished shards.

A shard appears complete or not at all, and the manifest lists only finished ones. Whenever a build is killed, the next
one finds every finished shard, listed or not, and goes on from there.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Self

import numpy as np

from rapidindex.config import LEVELS
from rapidindex.errors import ConfigMismatch, StoreError
from rapidindex.store import container, folder, manifest, writing
from rapidindex.store.manifest import Manifest
from rapidindex.store.rows import Rows
from rapidindex.store.shards import Shard, read_shard


class Store:
    """An index folder, from `create` or `open`. Methods that change it take the lock; a build holds it throughout.

    path      the folder
    manifest  the content that `manifest.py` describes, to be changed by the methods only
    removed   frozenset of the ids of removed examples
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks, self._joined = 0, False
        self.part = (0, 1)
        """Which of how many jobs this is while it holds `join`."""
        self._shards: dict[tuple[str, str], Shard] = {}
        self._owners: dict[str, dict[str, str]] = {}
        self._rows: dict[str, tuple[Any, Rows]] = {}
        self._judged: str | None = None  # the checksum of the second moment that was found to be that of the rows
        self.refresh()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        config: dict[str, Any],
        layers: Sequence[dict[str, Any]],
        versions: dict[str, str],
        planned: dict[str, tuple[int, int]],
        skipped: Sequence[dict[str, Any]] = (),
    ) -> Self:
        """Create an index at `path`, which does not exist or is an empty folder.

        `layers` is [{"name", "size"}] in the order of the norms, `skipped` [{"line", "reason"}], and `planned` {level:
        (K, number of examples)}. Raises StoreError where the folder is not empty (an index included) or cannot be
        written to, and IndexBusy where another process is creating an index there.
        """
        path, content = (
            Path(path),
            manifest.new(config=config, layers=layers, versions=versions, planned=planned, skipped=skipped),
        )
        folder.refuse_writer(path)  # rather than advise to replace what it is writing
        folder.create(path)
        with folder.exclusive(path):
            folder.create(path)
            folder.write_json(path / folder.MANIFEST, content)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the index at `path`. Quick: compare the sizes of its files with the manifest, and read no shard.

        Raises NotAnIndex where there is none, NewerFormat where a newer version wrote it, and DamagedIndex where the
        manifest was changed or a listed file is missing or has another size.
        """
        return cls(Path(path))

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Return whether `path` has a manifest, damaged or not. Raise StoreError where the folder cannot be read."""
        return folder.has_manifest(Path(path))

    @staticmethod
    def destroy(path: str | Path) -> None:
        """Delete the index at `path`.

        Raises NotAnIndex where there is none, StoreError where the folder holds a file that does not belong to the
        index, and IndexBusy where another process is writing to it. Nothing is deleted then.
        """
        folder.destroy(Path(path))

    @property
    def id(self) -> str:
        """16 hexadecimal digits, drawn when the index was created."""
        return self.manifest["id"]

    @property
    def config(self) -> dict[str, Any]:
        """The options that the index was built with."""
        return self.manifest["config"]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """{"name", "size"} of each layer, in the order of the norms."""
        return self.manifest["layers"]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """{"line", "reason"} of each unusable line of the data."""
        return self.manifest["skipped"]

    @property
    def levels(self) -> list[str]:
        """The levels of the index: `sentence`, `token` or both, in this order."""
        return [level for level in LEVELS if level in self.manifest["levels"]]

    def planned(self, level: str) -> int:
        """Return the number of examples that the level is to hold. Raise StoreError where there is no such level."""
        return self._plan(level)["planned"]

    def complete(self, level: str) -> bool:
        """Return whether every planned example is stored or rejected. Raise StoreError where there is no such level."""
        rejected = {record["id"] for shard in self._level(level) for record in shard.rejected}
        return len(rejected.union(self._owner(level))) >= self.planned(level)

    def rows(self, level: str) -> Rows:
        """Return the level's rows as they are now: the same object until the index changes.

        Raises StoreError where the index has no such level, and DamagedIndex where a shard is not what was written.
        """
        plan = self._plan(level)
        state = (self.id, self.manifest["revision"], plan, self.removed)
        if self._rows.get(level, (None,))[0] != state:
            self._rows[level] = state, self._read_rows(level, plan)
        return self._rows[level][1]

    def second_moment(self) -> np.ndarray | None:
        """Return v, float32 [sum of the layers' sizes], or its row and column means, float32 [n], a view of their file.

        None where the index has none. Raises DamagedIndex where its file is not the one that the rows were made with.
        """
        stored = self._map_moment()
        return stored.get("v", stored.get("means"))

    def eigenvectors(self) -> np.ndarray | None:
        """Return the eigenvectors of v's basis, float32 [n], a view of their file; None where the index has none."""
        return self._map_moment().get("eigenvectors")

    def roots(self) -> np.ndarray | None:
        """Return R^-1/2 of a specialized index, float32 [K, block], a view of its file; None for others."""
        return self._map_moment().get("roots")

    @property
    def lost_second_moment(self) -> bool:
        """Whether the rows were made with a second moment that the index has no more."""
        return manifest.lost_moment(self.manifest)

    def refuse_lost_moment(self) -> None:
        """Raise StoreError where the second moment was lost: without it nothing can be compared with the rows."""
        if self.lost_second_moment:
            raise StoreError(
                f"{self.path / folder.MOMENT} is missing, and the rows were made with it.",
                hint="Give its rapidindex build (or specialize) command again: the same data gives the same one.",
            )

    def _map_moment(self) -> dict[str, np.ndarray]:
        if self.manifest["second_moment"] is None:
            return {}
        layout = manifest.read_moment(self.path, self.manifest)
        if manifest.moment_entry(layout) != self.manifest["second_moment"]:
            raise container.damaged(layout.path, "it is not the one that the manifest lists")
        arrays = container.map_arrays(layout)
        if self._judged != layout.sha256:
            if not manifest.are_of_rows(self.manifest, arrays):
                raise container.damaged(layout.path, manifest.OTHER_MOMENT)
            self._judged = layout.sha256
        return arrays

    # Changing it

    @contextlib.contextmanager
    def lock(self) -> Iterator[Self]:
        """Be the only writer, or raise IndexBusy, which names the process that is. May be nested.

        The outermost block first reads what other processes changed, deletes the unfinished files of a killed build,
        and verifies and lists finished shards that the manifest does not list.
        """
        with contextlib.nullcontext() if self._locks else folder.exclusive(self.path):
            self._locks += 1
            try:
                if self._locks == 1:
                    self.refresh()
                    self._recover()
                yield self
            finally:
                self._locks -= 1

    @contextlib.contextmanager
    def join(self, part: int, parts: int) -> Iterator[Self]:
        """Be job `part` (from 0) of `parts` that write shards at the same time, and list none of them.

        Whoever takes the lock when the last job has ended lists them. Raises IndexBusy where the lock is taken, and
        StoreError as `refuse_job` does.
        """
        with folder.job(self.path, part, parts):
            self.refresh()
            self.part, self._joined = (part, parts), True
            try:
                yield self
            finally:
                self.part, self._joined = (0, 1), False

    def refuse_job(self, part: int, parts: int) -> None:
        """Raise StoreError where job `part` (from 0) of `parts`, or jobs of another number, are at work here."""
        folder.refuse_job(self.path, part, parts)

    def refresh(self) -> None:
        """Read the manifest and the list of removed ids again. Raise as `open` does."""
        content = manifest.load(self.path)
        manifest.check_sizes(self.path, content)
        self.manifest, self.removed = content, frozenset(manifest.load_removed(self.path))
        self._owners.clear()
        listed = {level: plan["shards"] for level, plan in content["levels"].items()}
        self._shards = {
            (level, name): shard
            for (level, name), shard in self._shards.items()
            if listed.get(level, {}).get(name) == shard.entry()
        }

    def record_shard(self, level: str, name: str) -> None:
        """List a shard that `Rows.write_shard` finished in this process or in a worker.

        One of several jobs leaves that to the last one. Raises DamagedIndex where it is no shard of this index, and
        StoreError where it holds an example that is stored already.
        """
        if self._joined:
            return
        with self.lock():
            if name not in self._plan(level)["shards"]:
                self._list(level, name)

    def done_ids(self, level: str) -> frozenset[str]:
        """Return the ids of all stored and rejected examples, those of shards that are not listed yet included."""
        shards = [self._verified(level, name) for name in self._unlisted(level)]
        found = [{*shard.ids, *(record["id"] for record in shard.rejected)} for shard in shards if shard]
        return self.rows(level).done_ids.union(*found)

    def set_planned(self, level: str, n: int, *, K: int | None = None) -> None:
        """Plan for n examples in all. With K, add the level where it is new.

        Raises ConfigMismatch where the level has another K, and StoreError where there is none and K is not given.
        """
        with self._changing(revised=True) as content:
            if level not in content["levels"] and K is not None:
                content["levels"] |= manifest.new(config={}, layers=[], planned={level: (K, n)})["levels"]
            if K not in (None, self._plan(level, content)["K"]):
                raise ConfigMismatch(f"The {level} rows of {self.path} have K = {self._plan(level)['K']}, not {K}.")
            content["levels"][level]["planned"] = n

    def update_config(self, changes: dict[str, Any], *, skipped: Sequence[dict[str, Any]] | None = None) -> None:
        """Set these fields of `config`, and `skipped` where it is given."""
        with self._changing(revised=True) as content:
            content["config"] |= manifest.as_json(changes)
            if skipped is not None:
                content["skipped"] = manifest.as_json(list(skipped))

    def remove(self, ids: Iterable[str]) -> int:
        """Remove examples from every level and return how many were not removed before.

        Raises StoreError where ids are unknown; nothing is removed then.
        """
        ids = set(ids)
        with self.lock():
            stored = {id for level in self.levels for id in self._owner(level)}
            _refuse_unknown(ids - stored, f"not in {self.path}")
            return self._set_removed(self.removed | ids)

    def restore(self, ids: Iterable[str]) -> int:
        """Put removed examples back and return how many. Raise StoreError where ids are not those of removed ones."""
        ids = set(ids)
        with self.lock():
            _refuse_unknown(ids - self.removed, f"not among the examples removed from {self.path}")
            return self._set_removed(self.removed - ids)

    def write_second_moment(
        self, v: np.ndarray, eigenvectors: np.ndarray | None = None, *, means: bool = False
    ) -> None:
        """Write the second moment v, float32 [sum of the layers' sizes], which an index has once and for all.

        `eigenvectors`, float32 [n], are given where v is in their basis. Where `v` holds only row and column `means`,
        it may have any length. Raises StoreError where the index has a second moment, or rows that were made with
        another one, and ValueError where v does not fit the layers or is not finite.
        """
        length = sum(layer["size"] for layer in self.layers)
        if (v.ndim != 1 if means else v.shape != (length,)) or v.dtype != np.float32 or not np.isfinite(v).all():
            raise ValueError(f"a second moment must be finite float32 ({length},), not {v.dtype} {v.shape}")
        columns = {"means" if means else "v": v}
        if eigenvectors is not None:
            columns["eigenvectors"] = eigenvectors
        self._write_moment(columns)

    def copy_moment(self, source: "Store", *, roots: np.ndarray | None = None) -> None:
        """Write the second moment of `source`, if it has one, and `roots`, as `roots` returns them, if they are given.

        Raises StoreError where the index has a second moment.
        """
        columns = {name: values for name, values in source._map_moment().items() if name in manifest.MOMENT_ARRAYS}
        columns |= {} if roots is None else {"roots": roots}
        if columns:
            self._write_moment(columns)

    def _write_moment(self, columns: dict[str, np.ndarray]) -> None:
        numbers = {name: writing.column(values, "<f4") for name, values in columns.items()}
        with self.lock():
            self._refuse_other_moment(columns)
            index = writing.json_column(manifest.copy_for_files(self.manifest))
            attributes = {"format": "rapidindex.second-moment/1", "index": self.id}
            writing.write(self.path / folder.MOMENT, {"index": index, **numbers}, attributes)
            self._list_moment()

    @contextlib.contextmanager
    def _changing(self, *, revised: bool = False) -> Iterator[Manifest]:
        """Yield a copy of the manifest to be changed; afterwards write it and put it in the place of the old one."""
        with self.lock():
            content = copy.deepcopy(self.manifest)
            yield content
            content["revision"] += revised
            folder.write_json(self.path / folder.MANIFEST, content)
            self.manifest = content

    def _recover(self) -> None:
        """Delete what a killed build left unfinished, and list what it finished."""
        folder.delete_parts(self.path)
        self.list_finished()
        if self.manifest["second_moment"] is None and (self.path / folder.MOMENT).exists():
            with contextlib.suppress(StoreError):
                container.verify(self.path / folder.MOMENT)
                self._list_moment()

    def list_finished(self) -> None:
        """Verify and list the finished shards that the manifest of this locked index does not list."""
        for level in self.levels:
            for name in self._unlisted(level):
                with contextlib.suppress(StoreError):  # an example that is stored already: `check` says so
                    if self._verified(level, name):
                        self._list(level, name)

    def _unlisted(self, level: str) -> list[str]:
        listed = self._plan(level)["shards"]
        return [name for name in folder.shard_names(self.path / level) if name not in listed]

    def _verified(self, level: str, name: str) -> Shard | None:
        with contextlib.suppress(StoreError):  # `check` says what is wrong with it
            container.verify(self.path / level / name)
            return self._read(level, name)
        return None

    def _list(self, level: str, name: str) -> None:
        shard = self._read(level, name)
        self._refuse_duplicates(level, shard)
        with self._changing() as content:
            content["levels"][level]["shards"][shard.name] = shard.entry()
        self._shards[level, shard.name] = shard
        self._owner(level).update(dict.fromkeys(shard.ids, shard.name))

    def _list_moment(self) -> None:
        with self._changing(revised=True) as content:
            layout = manifest.read_moment(self.path, content)
            arrays = container.map_arrays(layout)
            self._refuse_other_moment(arrays)
            content["second_moment"] = manifest.moment_entry(layout)
            if "moment_means" not in content or not manifest.has_rows(content):
                content["moment_means"] = manifest.moment_means(arrays)

    def _refuse_other_moment(self, arrays: dict[str, np.ndarray]) -> None:
        if not manifest.are_of_rows(self.manifest, arrays):
            raise StoreError(
                f"The second moment that was made now is not the one that the rows of {self.path} were made with.",
                hint=f"Put the first one back as {self.path / folder.MOMENT} (its training checkpoint, or the model, "
                "was changed), or type the build command with --overwrite.",
            )

    def _set_removed(self, removed: frozenset[str]) -> int:
        changed = len(removed ^ self.removed)
        folder.write_json(self.path / folder.REMOVED, {"removed": sorted(removed)})
        self.removed = removed
        return changed

    def _plan(self, level: str, content: Manifest | None = None) -> dict[str, Any]:
        plan = (content or self.manifest)["levels"].get(level)
        if plan is None:
            raise StoreError(
                f"{self.path} holds no {level} rows.", hint=f"Type `rapidindex build` with --level {level} to add them."
            )
        return plan

    def _level(self, level: str) -> list[Shard]:
        names = sorted(self._plan(level)["shards"], key=folder.shard_number)
        return [self._shard(level, name) for name in names]

    def _read_rows(self, level: str, plan: dict[str, Any]) -> Rows:
        return Rows(
            self.path / level,
            index=manifest.copy_for_files(self.manifest),
            K=plan["K"],
            row_type=manifest.row_type(plan),
            layers=len(self.layers),
            files=self._level(level),
            removed=self.removed,
        )

    def _shard(self, level: str, name: str) -> Shard:
        if (level, name) not in self._shards:
            shard = self._read(level, name)
            if shard.entry() != self._plan(level)["shards"][name]:
                raise container.damaged(shard.layout.path, "it is not the one that the manifest lists")
            self._shards[level, name] = shard
        return self._shards[level, name]

    def _read(self, level: str, name: str) -> Shard:
        self._plan(level)
        return read_shard(self.path / level / name, **manifest.shard_form(self.manifest, level))

    def _owner(self, level: str) -> dict[str, str]:
        """Return the name of the shard of each stored example, by its id."""
        if level not in self._owners:
            self._owners[level] = {id: shard.name for shard in self._level(level) for id in shard.ids}
        return self._owners[level]

    def _refuse_duplicates(self, level: str, shard: Shard) -> None:
        for id in shard.ids:
            if id in self._owner(level):
                raise StoreError(
                    f"{shard.layout.path} holds example {id}, which is stored in {self._owner(level)[id]} already.",
                    hint=f"Type `rapidindex check {quote(str(self.path))} --repair`.",
                )


def _refuse_unknown(ids: set[str], what: str) -> None:
    if ids:
        some = ", ".join(sorted(ids)[:3]) + (" and others" if len(ids) > 3 else "")
        raise StoreError(
            f"{len(ids)} ids are {what}: {some}.", hint="`rapidindex info` says how many examples there are."
        )
