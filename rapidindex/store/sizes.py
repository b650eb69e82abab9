"""The disk space that an index will take, computed from what it is to hold. Writes nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rapidindex.config import LEVELS
from rapidindex.store import folder, manifest
from rapidindex.store.shards import ShardContent, sealed_content
from rapidindex.store.writing import ALIGNMENT, column, encode_json, file_bytes, json_column

_LEVEL = LEVELS[0]  # another one's files differ by a few bytes


def disk_bytes(
    *,
    row_bytes: int,
    rows: int,
    records: Sequence[dict[str, Any]],
    shards: int,
    description: dict[str, Any],
    moment_entries: int = 0,
) -> dict[str, int]:
    """Return the bytes that one level of an index will take on the disk, by part.

    `rows` is the number of rows, `row_bytes` the size of one (`Rows.row_bytes`), `records` the stored records of their
    examples (`ShardContent.examples`), and `shards` the number of files. `description` holds the arguments `config` and
    `layers` of `Store.create`, and `versions` and `skipped` where they are known. The part `second moment` counts
    its `moment_entries`, float32, with those of eigenvectors. The levels of an index share it and the `manifest`.
    """
    content = manifest.new(planned={_LEVEL: (row_bytes, len(records))}, **description)
    index, layers = manifest.copy_for_files(content), content["layers"]
    entry = {"sha256": 64 * "0", "bytes": rows * row_bytes, "rows": rows, "examples": len(records), "rejected": 0}
    content["levels"][_LEVEL]["shards"] = {folder.shard_name(number): entry for number in range(shards)}
    beside_rows = 4 * (len(layers) + 5)  # norms, scale, lengths, example, position and token
    beside_text = 11  # an offset, and quotes and a comma in the list of ids
    parts = {
        "rows": rows * (row_bytes + beside_rows),
        "examples": sum(len(encode_json(record)) + len(record["id"]) + beside_text for record in records),
        "shards": shards * _empty_shard_bytes(row_bytes, len(layers), index),
        "manifest": len(folder.render_json(content)),
    }
    if moment_entries:
        empty = {"index": json_column(index), "v": column([], "<f4")}
        parts["second moment"] = 4 * moment_entries + file_bytes(empty, {"index": index["id"]})
    return parts


def _empty_shard_bytes(K: int, layers: int, index: dict[str, Any]) -> int:
    none = np.empty(0, np.int32)
    content = ShardContent(np.empty((0, K), np.float32), np.empty((0, layers), np.float32), none, none, none, [])
    columns, attributes = sealed_content(content, level=_LEVEL, row_type="int8", index=index)
    gaps = len(columns) * ALIGNMENT // 2  # between the arrays, on average
    return file_bytes(columns, attributes) + gaps
