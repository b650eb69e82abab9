"""The stored rows of one level, numbered consecutively through all its shards.

Rows are numbered in the order of their shards' numbers. A later build gives its shards higher numbers, so rows keep
their numbers as an index grows, and a vector index compares `Rows.shards` to know whether it is still current.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.errors import DamagedIndex
from rapidindex.store import container, folder, shards, writing
from rapidindex.store.shards import Shard, ShardContent

_MAPS = 128  # shards mapped at a time: each map holds a file descriptor, and a common limit is 1,024
_BLOCK_BYTES = 64 * 2**20


class Rows:
    """The n rows of one level as they were when `Store.rows` was called: K entries each, of m examples.

    `len` is n, the rows of removed examples included.

    path      the level's folder
    level     `sentence` or `token`
    K         the length of a row
    row_type  `int8` or `float16`, the type of the stored entries
    layers    L, the number of layers
    shards    (name, sha256, rows) of each shard, in the order of the rows
    ids       the ids of the m examples
    example   int64 [n], the number of each row's example: 0 to m - 1
    position  int32 [n], the response token of each row; -1 in sentence rows
    token     int32 [n], the id of that token; -1 in sentence rows
    lengths   float32 [n], which the rows do not exceed
    live_mask bool [n], False in the rows of removed examples
    removed   the ids of removed examples
    rejected  {"id", "line", "reason"} of each example whose gradient was not finite
    done_ids  ids of all stored and rejected examples, which a resumed build skips
    """

    def __init__(
        self,
        path: Path,
        *,
        index: dict[str, Any],
        K: int,
        row_type: str,
        layers: int,
        files: list[Shard],
        removed: frozenset[str],
    ) -> None:
        self.path, self.level, self.K, self.row_type, self.layers = path, path.name, K, row_type, layers
        self._index, self._files, self.removed = index, files, removed
        self._arrays = lru_cache(maxsize=_MAPS)(lambda file: container.map_arrays(files[file].layout))
        self._first_row = np.cumsum([0, *(file.rows for file in files)])
        self._first_example = np.cumsum([0, *(len(file.ids) for file in files)])
        self.shards = [(file.name, file.layout.sha256, file.rows) for file in files]
        self.ids = [id for file in files for id in file.ids]
        self.rejected = [record for file in files for record in file.rejected]
        self.done_ids = frozenset(self.ids) | {record["id"] for record in self.rejected}
        self._number_rows()
        self.live_mask = np.array([id not in removed for id in self.ids], dtype=bool)[self.example]

    def __len__(self) -> int:
        """The number of stored rows, those of removed examples included."""
        return int(self._first_row[-1])

    @property
    def live_examples(self) -> np.ndarray:
        """int64: the numbers of the examples that have live rows, in order."""
        return np.unique(self.example[self.live_mask])

    @property
    def row_bytes(self) -> int:
        """The size in bytes of a stored row, without its scale."""
        return shards.row_bytes(self.K, self.row_type)

    def blocks(self, max_rows: int | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield all rows in order as (number of the first, entries [b, K], scale float32 [b]): a row is their product.

        The arrays are views of the files, not copies. By default a block takes at most 64 MiB.
        """
        step = max_rows or max(1, _BLOCK_BYTES // self.row_bytes)
        for file, first_row in enumerate(self._first_row[:-1]):
            for first in range(0, self._files[file].rows, step):
                arrays = self._arrays(file)
                yield (
                    int(first_row) + first,
                    arrays["rows"][first : first + step],
                    arrays["scale"][first : first + step],
                )

    def take(self, row_numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the rows of these r numbers in this order, float32 [r, K].

        Raises IndexError where a number is not 0 to n - 1.
        """
        rows = np.empty((np.size(row_numbers), self.K), np.float32)
        for i, entries, scale in self.each(row_numbers):  # a whole file at once would make two more copies
            rows[i] = entries
            rows[i] *= scale
        return rows

    def gather(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the entries [r, K] and scale float32 [r] of these r row numbers: a row is their product.

        Raises IndexError where a number is not 0 to n - 1.
        """
        numbers = self._checked(row_numbers)
        entries = np.empty((len(numbers), self.K), self.row_type)
        scale = np.empty(len(numbers), np.float32)
        for file, which, inside in self._by_file(numbers):
            arrays = self._arrays(file)
            rows, scales = np.asarray(arrays["rows"]), np.asarray(arrays["scale"])  # a memmap's own indexing is slow
            entries[which], scale[which] = rows[inside], scales[inside]
        return entries, scale

    def each(self, row_numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.float32]]:
        """Yield (i, entries [K], scale) for the i-th of these row numbers, file by file: a row is their product.

        The arrays are views of the files, not copies. Raises IndexError where a number is not 0 to n - 1.
        """
        for file, which, inside in self._by_file(self._checked(row_numbers)):
            arrays = self._arrays(file)
            for i, row in zip(which, inside, strict=True):
                yield int(i), arrays["rows"][row], arrays["scale"][row]

    def part(self, first: int, last: int, removed: frozenset[str]) -> "Rows":
        """Return the rows of shards `first` to `last` - 1 alone, numbered from 0, with other `removed` examples."""
        form = {"index": self._index, "K": self.K, "row_type": self.row_type, "layers": self.layers}
        return Rows(self.path, **form, files=self._files[first:last], removed=removed)

    def norms(self, row_numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return each layer's norm for these r row numbers, float32 [r, L].

        Raises IndexError where a number is not 0 to n - 1.
        """
        row_numbers = self._checked(row_numbers)
        norms = np.empty((len(row_numbers), self.layers), np.float32)
        for file, which, inside in self._by_file(row_numbers):
            norms[which] = self._arrays(file)["norms"][inside]
        return norms

    def record(self, example_number: int) -> dict[str, Any]:
        """Return the stored record of that example. Raise IndexError where the number is not 0 to m - 1."""
        if not 0 <= example_number < len(self.ids):
            raise IndexError(f"example {example_number} of {len(self.ids)}")
        file = int(np.searchsorted(self._first_example, example_number, side="right")) - 1
        try:
            place = int(example_number - self._first_example[file])
            return shards.read_record(self._arrays(file), place, self.ids[example_number])
        except ValueError as error:
            raise self._damaged(file, str(error)) from None

    def holding(self, texts: Iterable[str]) -> set[int]:
        """Return the numbers of the examples whose stored record holds any of these texts, in whatever column."""
        wanted, found = [writing.encode_json(text)[1:-1] for text in texts], set()
        for file, first_example in enumerate(self._first_example[:-1]):
            arrays = self._arrays(file)
            records, offsets = arrays["examples"].tobytes(), arrays["examples_offsets"]
            for text in wanted:
                place = records.find(text)
                while place >= 0:
                    number = int(np.searchsorted(offsets, place, side="right")) - 1
                    found.add(int(first_example) + number)
                    place = records.find(text, int(offsets[number + 1]))
        return found

    def example_of(self, row: int) -> int:
        """Return the number of the row's example. Raise IndexError where `row` is not 0 to n - 1."""
        return int(self.example[self._checked([row])[0]])

    def next_number(self, writer: int = 0, writers: int = 1) -> int:
        """Return a number greater than those of all shards in the folder, listed in the manifest or not.

        Writers at work together never clash: one's first number, and the others in steps of `writers`, are its own.
        """
        names = (*folder.shard_names(self.path), *(file.name for file in self._files))
        first = max((folder.shard_number(name) for name in names), default=-1) + 1
        return first + (writer - first) % writers

    def write_shard(self, number: int, content: ShardContent) -> str:
        """Write a finished shard and return its name, for `Store.record_shard`. These rows do not change.

        Worker processes may call this while their parent holds the lock. Raises ResourceError where there is no room,
        StoreError where the number is taken or the folder is read-only, and ValueError as `ShardContent.check` does.
        """
        content.check(self.K, self.layers)
        name = folder.shard_name(number)
        if not self.path.is_dir():
            with writing.write_errors(self.path, 0):
                self.path.mkdir(exist_ok=True)
                writing.sync_folder(self.path.parent)
        shards.write_shard(self.path / name, content, level=self.level, row_type=self.row_type, index=self._index)
        return name

    def _number_rows(self) -> None:
        n = len(self)
        self.example, self.position, self.token = np.empty(n, np.int64), np.empty(n, np.int32), np.empty(n, np.int32)
        self.lengths = np.empty(n, np.float32)
        for file, first_row in enumerate(self._first_row[:-1]):
            here, arrays = slice(first_row, self._first_row[file + 1]), self._arrays(file)
            if fault := shards.numbers_fault(self._files[file].layout, arrays, len(self._files[file].ids)):
                raise self._damaged(file, fault)
            self.example[here] = arrays["example"] + self._first_example[file]
            self.position[here], self.token[here] = arrays["position"], arrays["token"]
            self.lengths[here] = shards.lengths_of(arrays)

    def _damaged(self, file: int, what: str) -> DamagedIndex:
        return container.damaged(self._files[file].layout.path, what)

    def _checked(self, row_numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers = np.asarray(row_numbers, dtype=np.int64).reshape(-1)
        if shards.any_outside(numbers, len(self)):
            raise IndexError(f"row numbers {numbers.min()} to {numbers.max()} of {len(self)} rows")
        return numbers

    def _by_file(self, row_numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (file, indices of the row numbers that lie in it, their places in it) for each file that holds any."""
        order = np.argsort(row_numbers)  # so that each file is read forwards
        numbers = row_numbers[order]
        bounds = np.searchsorted(numbers, self._first_row)
        for file in np.flatnonzero(np.diff(bounds)):
            here = slice(bounds[file], bounds[file + 1])
            yield int(file), order[here], numbers[here] - self._first_row[file]
