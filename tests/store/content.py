"""Shards whose rows follow from their examples' ids, so that a test knows the right answer. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.store import ShardContent, Store, container, writing

K = 16
LAYERS = [{"name": "a", "size": 5}, {"name": "b", "size": 3}]
CONFIG = {"sketch": {"K": K, "shuffles": 20}, "data": ["train.jsonl"], "name": "\ud800 é"}


def row_of(id: str, position: int = -1) -> np.ndarray:
    """Return the row of an example, float32 [K], which int8 stores exactly: its largest entry is 127 steps."""
    seed = int.from_bytes(id.encode(), "big") % 997 + 31 * (position + 1)
    steps = ((np.arange(K) * 7 + seed) % 23 - 11) * 11
    steps[seed % K] = 127
    return steps.astype(np.float32) * np.float32(2.0 ** (seed % 9 - 4))


def content(ids: Sequence[str], *, tokens: int = 0, rejected: Sequence[str] = ()) -> ShardContent:
    """Return the content of a shard: a row for each id, or for each of `tokens` response tokens of each."""
    positions = range(tokens) if tokens else [-1]
    pairs = [(number, position) for number in range(len(ids)) for position in positions]
    rows = [row_of(ids[number], position) for number, position in pairs]
    return ShardContent(
        rows=np.array(rows, np.float32).reshape(-1, K),
        norms=np.array([[number + 1, position + 2] for number, position in pairs], np.float32).reshape(-1, 2),
        example=np.array([number for number, _ in pairs], np.int64),
        position=np.array([position for _, position in pairs], np.int64),
        token=np.array([100 + position if tokens else -1 for _, position in pairs], np.int64),
        examples=[{"id": id, "prompt": f"What is {id}?", "response": "né \ud83d", "meta": {"n": 1}} for id in ids],
        rejected=[{"id": id, "line": 7, "reason": "The gradient is not finite."} for id in rejected],
    )


def create(path: Path, *, sentence: int = 6, token: int | None = None) -> Store:
    """Create an index without shards, planned for so many examples."""
    planned = {"sentence": (K, sentence)} | ({} if token is None else {"token": (K, token)})
    skipped = [{"line": 3, "reason": "The response is empty."}]
    return Store.create(
        path, config=CONFIG, layers=LAYERS, versions={"rapidindex": "0"}, planned=planned, skipped=skipped
    )


def write(store: Store, ids: Sequence[str], *, level: str = "sentence", **options: Any) -> str:
    """Write and list one more shard; return its name."""
    with store.lock():
        rows = store.rows(level)
        name = rows.write_shard(rows.next_number(), content(ids, **options))
        store.record_shard(level, name)
    return name


def make(path: Path, *shards: str, planned: int = 6) -> Store:
    """Create an index with a second moment and a shard for each string, with an example for each of its letters."""
    store = create(path, sentence=planned)
    store.write_second_moment(np.arange(8, dtype=np.float32))
    for ids in shards:
        write(store, list(ids))
    return store


def reseal(path, **changes):
    """Write a shard again with other arrays, as a faulty program would."""
    layout = container.read_layout(path)
    attributes = {name: value for name, value in layout.attributes.items() if name != "numbers"}
    held = {name: np.array(array) for name, array in container.map_arrays(layout).items()} | changes
    path.unlink()
    writing.write(path, {name: writing.column(array, array.dtype.str) for name, array in held.items()}, attributes)
