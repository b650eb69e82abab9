"""Small real stores of given rows, and rows that look like gradients: few directions, heavy tails, noise."""

from pathlib import Path

import h5py
import numpy as np

from rapidindex.store import ShardContent, Store
from tests.store.test_hostile import CONFIG


def gradients(n: int, K: int, *, seed: int = 0) -> np.ndarray:
    """float32 [n, K] of length 1: a power-law spectrum of 48 directions with heavy-tailed entries, and noise.

    Rows of another seed lie in the same directions.
    """
    world, rng = np.random.default_rng(99), np.random.default_rng([seed, 7])
    spectrum = np.arange(1, 49) ** -0.5
    basis = world.standard_t(3, (48, K))
    rows = rng.standard_t(4, (n, 48)) * spectrum @ basis + rng.standard_normal((n, K))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_store(path: Path, rows: np.ndarray, *, per_shard: int = 250, rows_per_example: int = 1) -> Store:
    """A store of sentence rows at `path`."""
    planned = {"sentence": (rows.shape[1], len(rows) // rows_per_example)}
    config = {**CONFIG, "gradient": {**CONFIG["gradient"], "second_moment": "none"}}
    store = Store.create(path, config=config, layers=[{"name": "w", "size": 8}], versions={}, planned=planned)
    append(store, rows, per_shard=per_shard, rows_per_example=rows_per_example)
    return store


def append(store: Store, rows: np.ndarray, *, per_shard: int = 250, rows_per_example: int = 1) -> None:
    """Add shards of further examples, whose ids count up from those that are there."""
    with store.lock():
        stored = store.rows("sentence")
        first_id, number = len(stored.ids), stored.next_number()
        for at in range(0, len(rows), per_shard):
            part = rows[at : at + per_shard]
            example = np.arange(len(part)) // rows_per_example
            ids = [first_id + at // rows_per_example + i for i in range(example[-1] + 1)]
            nothing = np.full(len(part), -1)
            content = ShardContent(
                rows=part,
                norms=np.ones((len(part), 1), np.float32),
                example=example,
                position=nothing,
                token=nothing,
                examples=[{"id": id_of(i)} for i in ids],
            )
            store.record_shard("sentence", stored.write_shard(number, content))
            number += 1


def id_of(example: int) -> str:
    """The id of the example of that number."""
    return f"{example:016x}"


def remove(store: Store, rows: np.ndarray) -> None:
    """Take out the examples of these rows."""
    stored = store.rows("sentence")
    with store.lock():
        store.remove([stored.ids[example] for example in stored.example[rows]])


def spoil(shard, *, row: int) -> None:
    """Make NaN the scale of a row in a shard's file."""
    with h5py.File(shard) as file:
        offset = file["scale"].id.get_offset() + 4 * row
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(np.float32(np.nan).tobytes())


class CountedRows:
    """Rows that note the block size of each pass over them, and how many of them were read one by one."""

    def __init__(self, rows) -> None:
        self._rows, self.passes, self.read_singly = rows, [], 0

    def __getattr__(self, name):
        return getattr(self._rows, name)

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, max_rows=None):
        self.passes.append(max_rows)
        return self._rows.blocks(max_rows)

    def gather(self, numbers):
        self.read_singly += len(numbers)
        return self._rows.gather(numbers)

    def each(self, numbers):
        self.read_singly += len(numbers)
        return self._rows.each(numbers)
