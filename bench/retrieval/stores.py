"""The stores that are measured: an index's own rows, linked, and any number of rows drawn to be like them.

Some examples are removed from each store before anything is built over it. Their rows are the queries "left out": they
are in no index and in no answer, and had no part in measuring the recall that an index states.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from bench.retrieval.synthetic import RowModel
from rapidindex.search.vector_index import fold
from rapidindex.store import Rows, ShardContent, Store

LEFT_OUT = 50
"""Examples removed from a store as queries, of each kind: real and synthetic."""
LEVEL = "sentence"
"""The level of synthetic stores; a vector index knows rows, not examples or tokens."""
_SHARD_BYTES = 2**27


def linked(index: Path, copy: Path, level: str) -> Store:
    """Make a store of the same rows beside the index, by hard links where possible, else by copies."""
    if not Store.exists(copy):
        (copy / level).mkdir(parents=True, exist_ok=True)
        names = [
            path for folder in (index, *(p for p in index.iterdir() if p.is_dir())) for path in folder.glob("*.h5")
        ]
        for path in names:
            to = copy / path.relative_to(index)
            to.parent.mkdir(exist_ok=True)
            to.unlink(missing_ok=True)
            _link(path, to)
        if (index / "removed.json").exists():
            shutil.copyfile(index / "removed.json", copy / "removed.json")
        shutil.copyfile(index / "manifest.json", copy / "manifest.json")  # last: with it the copy is whole
    store = Store.open(copy)
    hold_out(store, level, 0, len(store.rows(level)))
    return store


def hold_out(store: Store, level: str, first: int, end: int) -> None:
    """Remove some of the examples of rows `first` to `end`, as `rapidindex remove` does, unless some are removed."""
    rows = store.rows(level)
    if end > first and rows.live_mask[first:end].all():
        examples = np.unique(rows.example[first:end])
        drawn = np.random.default_rng(3).choice(examples, min(LEFT_OUT, len(examples) // 4), replace=False)
        store.remove([rows.ids[example] for example in drawn])


def left_out(rows: Rows, real: int) -> tuple[np.ndarray, list[str]]:
    """Return a row of each removed example, float32 [n, K], and its kind; the store's first `real` rows are real."""
    gone = np.flatnonzero(~rows.live_mask)
    _, first = np.unique(rows.example[gone], return_index=True)
    numbers = gone[first]
    kinds = ["left out" if number < real else "left out, synthetic" for number in numbers]
    return rows.take(numbers), kinds


class Grown:
    """A store of real rows, then synthetic ones, that grows up to `size` live rows; existing shards are kept.

    `real` is the number of real rows.
    """

    def __init__(self, path: Path, K: int, source: Rows, size: int) -> None:
        if not Store.exists(path):
            layers = [{"name": "all", "size": 1}]
            Store.create(path, config={}, layers=layers, versions={}, planned={LEVEL: (K, 0)})
        self.store, self.K, self.source = Store.open(path), K, source
        self.per_shard = _SHARD_BYTES // self.rows.row_bytes
        self._starts = np.flatnonzero(np.diff(source.example, prepend=-1, append=source.example[-1] + 1))
        self.real = self._start(size)
        self._model: RowModel | None = None

    @property
    def rows(self) -> Rows:
        """The rows at this time."""
        return self.store.rows(LEVEL)

    def grow(self, size: int) -> None:
        """Write shards until the store has `size` live rows."""
        while (first := len(self.rows)) < self.real:
            end = min(self.real, max(self._start(first + self.per_shard), self._start(first, after=True)))
            numbers = np.arange(first, end)
            self._append(fold(self.source.take(numbers), self.K), self.source.example[numbers])
        hold_out(self.store, LEVEL, 0, self.real)
        while (missing := size - np.count_nonzero(self.rows.live_mask)) > 0:
            self._model = self._model or RowModel(self.source, self.K)
            fresh = self._model.draw(min(missing, self.per_shard), seed=self.rows.next_number())
            self._append(fresh, np.arange(len(fresh)))
            hold_out(self.store, LEVEL, self.real, len(self.rows))

    def _start(self, row: int, *, after: bool = False) -> int:
        """Return the first row of a source row's example, or of the next one: no example may lie in two shards."""
        at = np.searchsorted(self._starts, min(row, len(self.source)), side="right")
        return int(self._starts[min(at if after else at - 1, len(self._starts) - 1)])

    def _append(self, values: np.ndarray, example: np.ndarray) -> None:
        rows, nothing = self.rows, np.full(len(values), -1)
        example, first_id = example - example[0], len(rows.ids)
        content = ShardContent(
            rows=np.ascontiguousarray(values, dtype=np.float32),
            norms=np.ones((len(values), 1), np.float32),
            example=example,
            position=nothing,
            token=nothing,
            examples=[{"id": f"{first_id + i:016x}"} for i in range(int(example[-1]) + 1)],
        )
        with self.store.lock():
            self.store.record_shard(LEVEL, rows.write_shard(rows.next_number(), content))


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # another file system
        shutil.copyfile(source, to)
