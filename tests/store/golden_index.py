"""The writer of the indexes in tests/store/golden, one for each format, which every later version must read.

Written once by `python -m tests.store.golden_index FOLDER`; a new format gets a folder of its own beside the others.
"""

import sys
from pathlib import Path

import numpy as np

from rapidindex.store import ShardContent, Store

GOLDEN = Path(__file__).parent / "golden"
K = 16
CONFIG = {"model": {"model": "tiny", "adapter": None}, "sketch": {"K": K, "shuffles": 20, "seed": 0}}
LAYERS = [{"name": "q_proj.lora_A", "size": 6}, {"name": "q_proj.lora_B", "size": 4}]
VERSIONS = {"rapidindex": "0.1.0"}
SKIPPED = [{"line": 2, "reason": "The response is empty."}]
REJECTED = [{"id": "0000000000000009", "line": 9, "reason": "The gradient is not finite."}]
MOMENT = np.arange(10, dtype=np.float32) / 8
IDS = [f"000000000000000{number}" for number in range(5)]
PLANNED = {"sentence": (K, 6), "token": (K, 2)}
REMOVED = IDS[3]


def record(number: int) -> dict:
    """Return the record of an example with text beyond ASCII and a lone surrogate."""
    text = {"prompt": f"What is the capital of Japan, {number}?", "response": "Tōkyō 東京 \ud83d"}
    return {"id": IDS[number], **text, "meta": {"source": "golden", "weight": 0.5}, "line": number + 1}


def row(number: int, version: int = 2) -> np.ndarray:
    """Return a row, float32 [K], that the format stores exactly: each of another size, row 2 all zeros."""
    if number == 2:
        return np.zeros(K, np.float32)
    steps = np.arange(K) * 7 % 11 - 5
    if version > 1:  # whole numbers up to 127
        steps = np.r_[127, 25 * steps[1:]]
    return (steps * 2.0 ** (40 * number - 80) * (number + 1)).astype(np.float32)


def norms(number: int) -> list[float]:
    """Return the norms of a row, one for each layer."""
    return [number + 0.5, 2.0**-number]


def shard(numbers: list[int], examples: list[int], positions: list[int], rejected: list[dict]) -> ShardContent:
    """Return the content of a shard: rows of these numbers, which belong to `examples` of the records in IDS."""
    kept = sorted(set(examples))
    return ShardContent(
        rows=np.array([row(number) for number in numbers], np.float32).reshape(-1, K),
        norms=np.array([norms(number) for number in numbers], np.float32).reshape(-1, 2),
        example=np.array([kept.index(example) for example in examples], np.int64),
        position=np.array(positions, np.int64),
        token=np.array([1000 + position if position >= 0 else -1 for position in positions], np.int64),
        examples=[record(example) for example in kept],
        rejected=rejected,
    )


def write(path: Path) -> None:
    """Write the index at `path`."""
    store = Store.create(path, config=CONFIG, layers=LAYERS, versions=VERSIONS, planned=PLANNED, skipped=SKIPPED)
    with store.lock():
        store.write_second_moment(MOMENT)
        sentence, token = store.rows("sentence"), store.rows("token")
        contents = [([0, 1, 2], [0, 1, 2], [-1] * 3, []), ([3, 4], [3, 4], [-1] * 2, []), ([], [], [], REJECTED)]
        for number, content in enumerate(contents):
            store.record_shard("sentence", sentence.write_shard(number, shard(*content)))
        token_rows = shard([0, 1, 2, 3, 4], [0, 0, 0, 4, 4], [0, 1, 2, 0, 1], [])
        store.record_shard("token", token.write_shard(0, token_rows))
        store.remove([REMOVED])
    (path / ".lock").unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
