"""The stored rows of one level, numbered through all its shards, as they were when `Store.rows` was called.

Row numbers follow the shards' numbers. Later builds number their shards after those that are there, so rows keep their
numbers as an index grows, and what is derived from them can tell by `Rows.shards` whether it is still current.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.store import container, folder, shards, writing
from rapidindex.store.shards import Shard, ShardContent

_MAPS = 128  # shards mapped at a time: each map holds a file descriptor, and 1,024 is a common limit
_BLOCK_BYTES = 64 * 2**20


class Rows:
    """The n rows of one level, each of K numbers, that belong to m examples. `len` is n, removed examples included.

    path      the level's folder
    level     `sentence` or `token`
    K         length of a row
    row_type  `int8` or `float16`: how its numbers are kept
    layers    L, the number of layers
    shards    (name, sha256, rows) of each shard, in the order of the rows
    ids       the m examples' ids
    example   int64 [n], the example that a row is of: 0 to m - 1
    position  int32 [n], the response token that a row is of; -1 in sentence rows
    token     int32 [n], its token id; -1 in sentence rows
    live_mask bool [n], False in the rows of removed examples
    rejected  {"id", "line", "reason"} of each example whose gradient was not finite
    done_ids  ids of all examples stored or rejected: a resumed build need not compute them
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
        self._index, self._files = index, files
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
        """n: all stored rows, removed examples included."""
        return int(self._first_row[-1])

    @property
    def row_bytes(self) -> int:
        """What the numbers of a row take on the disk."""
        return shards.row_bytes(self.K, self.row_type)

    def blocks(self, max_rows: int | None = None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """All rows in order as (number of the first, numbers [b, K], scale float32 [b]): a row is their product.

        The arrays are views of the files, not copies; by default a block takes at most 64 MiB.
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
        """float32 [m, K]: the rows of these m numbers, in this order. IndexError where one is not 0 to n - 1."""
        taken = np.empty((np.size(row_numbers), self.K), np.float32)
        for to, numbers, scale in self.each(row_numbers):  # faster than all at once, which needs two copies more
            taken[to] = numbers
            taken[to] *= scale
        return taken

    def each(self, row_numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.float32]]:
        """(i, numbers [K], scale) of the i-th of these row numbers, file by file: a row is their product.

        The arrays are views of the files, not copies. IndexError where a number is not 0 to n - 1.
        """
        for file, here, inside in self._by_file(self._checked(row_numbers)):
            arrays = self._arrays(file)
            for to, source in zip(here, inside, strict=True):
                yield int(to), arrays["rows"][source], arrays["scale"][source]

    def norms(self, row_numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [m, L]: each layer's norm in these m rows. IndexError where a number is not 0 to n - 1."""
        row_numbers = self._checked(row_numbers)
        norms = np.empty((len(row_numbers), self.layers), np.float32)
        for file, here, inside in self._by_file(row_numbers):
            norms[here] = self._arrays(file)["norms"][inside]
        return norms

    def record(self, example_number: int) -> dict[str, Any]:
        """The example of that number, as it was given to `write_shard`. IndexError where it is not 0 to m - 1."""
        if not 0 <= example_number < len(self.ids):
            raise IndexError(f"example {example_number} of {len(self.ids)}")
        file = int(np.searchsorted(self._first_example, example_number, side="right")) - 1
        try:
            return shards.read_record(self._arrays(file), int(example_number - self._first_example[file]))
        except (ValueError, RecursionError):
            raise container.damaged(self._files[file].layout.path, "an example in it cannot be read") from None

    def example_of(self, row: int) -> int:
        """The number of the example that a row is of. IndexError where `row` is not 0 to n - 1."""
        return int(self.example[self._checked([row])[0]])

    def next_number(self) -> int:
        """A shard number greater than all in the folder, listed in the manifest or not."""
        names = (*folder.shard_names(self.path), *(file.name for file in self._files))
        return max((folder.shard_number(name) for name in names), default=-1) + 1

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
        for file, first_row in enumerate(self._first_row[:-1]):
            here, arrays = slice(first_row, self._first_row[file + 1]), self._arrays(file)
            inside, count = arrays["example"], len(self._files[file].ids)
            if len(inside) and not (0 <= inside.min() and inside.max() < count):
                raise container.damaged(self._files[file].layout.path, f"its rows point outside its {count} examples")
            self.example[here] = inside + self._first_example[file]
            self.position[here], self.token[here] = arrays["position"], arrays["token"]

    def _checked(self, row_numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        numbers = np.asarray(row_numbers, dtype=np.int64).reshape(-1)
        if len(numbers) and not (0 <= numbers.min() and numbers.max() < len(self)):
            raise IndexError(f"row numbers {numbers.min()} to {numbers.max()} of {len(self)} rows")
        return numbers

    def _by_file(self, row_numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(file, which of the row numbers are in it, their place in it) for each file that holds any."""
        order = np.argsort(row_numbers)  # so that each file is read forwards
        files = np.searchsorted(self._first_row, row_numbers[order], side="right") - 1
        for file in np.unique(files):
            here = order[files == file]
            yield int(file), here, row_numbers[here] - self._first_row[file]
