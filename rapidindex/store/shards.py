"""A shard: RapidGrads, the norms that went into them, and the examples they belong to, in one sealed file.

    rows      int8 [n, K]      a row is rows · scale; float16 in an index that was made with format 1
    scale     float32 [n]      the row's largest entry / 127 (float16: a power of two); 0 for a row of zeros
    norms     float32 [n, L]   one for each layer
    example   int32 [n]        which of this file's examples a row belongs to
    position  int32 [n]        response token; -1 in a sentence row
    token     int32 [n]        its token id; -1 in a sentence row
    examples  uint8            the examples as JSON, one after the other
    examples_offsets  int64 [m + 1]  where each begins, and where the last one ends
    ids       uint8            their ids as one JSON list
    rejected  uint8            JSON list of {"id", "line", "reason"}: examples whose gradient was not finite
    index     uint8            JSON: the manifest's own words without its list of shards, from which it can be rebuilt

Knows what a shard holds, not where it lies or which others there are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.store.container import Layout, damaged, map_arrays, read_layout
from rapidindex.store.writing import Column, column, encode_json, json_column, write

PEAK = 10  # a row's largest entry becomes 2^9 to 2^10 in float16, whose normal numbers reach 2^-24 of that
_LARGEST = 1023.5  # the largest float16 below 2^10
_BLOCK_BYTES = 32 * 2**20
ROW_TYPES = {"int8": "|i1", "float16": "<f2"}
"""How a row's K numbers may be kept. A RapidGrad's entries are sums of many of the gradient's, near to normal, so that
8 bits an entry change its scores by 1/25,000 of its length (bench/README.md, "The smallest row")."""
ROW_TYPE, OLD_ROW_TYPE = "int8", "float16"
"""Of new levels; of those whose manifest does not say."""
_VERSIONS = {"int8": 2, "float16": 1}
_STEPS = 127
_DTYPES = {
    "scale": "<f4",
    "norms": "<f4",
    "example": "<i4",
    "position": "<i4",
    "token": "<i4",
    "examples": "|u1",
    "examples_offsets": "<i8",
    "ids": "|u1",
    "rejected": "|u1",
    "index": "|u1",
}


@dataclass(frozen=True)
class ShardContent:
    """The content of a shard to be written: n rows over L layers, which belong to m examples. n and m may be 0."""

    rows: np.ndarray
    """float32 [n, K], finite."""
    norms: np.ndarray
    """float32 [n, L], finite: the norm of each layer's gradient."""
    example: np.ndarray
    """Integers [n]: the number of each row's example in `examples`, 0 to m - 1."""
    position: np.ndarray
    """Integers [n]: the response token of each row; -1 in sentence rows."""
    token: np.ndarray
    """Integers [n]: the id of that token; -1 in sentence rows."""
    examples: Sequence[dict[str, Any]]
    """The records of the m examples, each with at least a string `id`."""
    rejected: Sequence[dict[str, Any]] = ()
    """{"id", "line", "reason"} of each example whose gradient was not finite."""

    def check(self, K: int, layers: int) -> None:
        """Raise ValueError, an error of the caller, where the fields do not fit together or are not finite."""
        n = len(self.rows)
        for name, shape in (("rows", (n, K)), ("norms", (n, layers))):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not float32 {shape}")
        for name in ("example", "position", "token"):
            array = getattr(self, name)
            if array.shape != (n,) or array.dtype.kind not in "iu":
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not integers ({n},)")
        if not np.isfinite(self.norms).all():
            raise ValueError("norms that are not finite cannot be stored")
        if n and not (0 <= self.example.min() and self.example.max() < len(self.examples)):
            raise ValueError(f"example points outside the {len(self.examples)} examples")
        ids = [record["id"] for record in (*self.examples, *self.rejected)]
        if not all(isinstance(id, str) for id in ids):
            raise ValueError("an example's id must be a string")
        if len(set(ids)) != len(ids):
            raise ValueError("two examples of a shard have the same id")


@dataclass(frozen=True)
class Shard:
    """A finished shard: what it holds, its arrays left on the disk."""

    layout: Layout
    ids: list[str]
    """Of its m examples."""
    rejected: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.layout.path.name

    @property
    def rows(self) -> int:
        """n."""
        return self.layout.extents["rows"].shape[0]

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        counts = {"rows": self.rows, "examples": len(self.ids), "rejected": len(self.rejected)}
        return {"sha256": self.layout.sha256, "bytes": self.layout.size, **counts}


def row_bytes(K: int, row_type: str) -> int:
    """What the numbers of a row take on the disk."""
    return K * np.dtype(ROW_TYPES[row_type]).itemsize


def encode_rows(rows: np.ndarray, row_type: str = ROW_TYPE) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, K] as ([n, K] of `row_type`, float32 scale [n]). ValueError where a row is not finite."""
    scale = _scales(rows, row_type)
    return _rounded(rows, scale, row_type), scale


def decode_rows(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [n, K]: int8 entries within 1/254 of their row's largest, float16 rows within 2^-11 of their length."""
    return rows.astype(np.float32) * scale[:, None]


def write_shard(path: Path, content: ShardContent, **form: Any) -> Layout:
    """Write `content` to `path`; `form` as in `sealed_content`. Raise as `writing.write` does."""
    return write(path, *sealed_content(content, **form))


def sealed_content(
    content: ShardContent, *, level: str, row_type: str, index: dict[str, Any], block_bytes: int = _BLOCK_BYTES
) -> tuple[dict[str, Column], dict[str, str | int]]:
    """Return the arrays and attributes of a shard's file; rows are encoded `block_bytes` at a time, when written.

    `index` is the manifest without its shards.
    """
    attributes = {
        "format": f"rapidindex.rows/{_VERSIONS[row_type]}",
        "level": level,
        "K": content.rows.shape[1],
        "index": index["id"],
    }
    scale = _scales(content.rows, row_type)
    step = _block_rows(content.rows.shape[1], block_bytes)
    firsts = range(0, len(content.rows), step)
    blocks = (_rounded(content.rows[i : i + step], scale[i : i + step], row_type) for i in firsts)
    texts = [encode_json(record) for record in content.examples]
    columns = {
        "scale": column(scale, "<f4"),
        "norms": column(content.norms, "<f4"),
        "example": column(content.example, "<i4"),
        "position": column(content.position, "<i4"),
        "token": column(content.token, "<i4"),
        "examples": column(np.frombuffer(b"".join(texts), np.uint8), "|u1"),
        "examples_offsets": column(np.cumsum([0, *map(len, texts)]), "<i8"),
        "ids": json_column([record["id"] for record in content.examples]),
        "rejected": json_column(list(content.rejected)),
        "index": json_column(index),
        "rows": Column(content.rows.shape, np.dtype(ROW_TYPES[row_type]), blocks),
    }
    return columns, attributes


def read_shard(path: Path, *, index: str, level: str, K: int, layers: int, row_type: str) -> Shard:
    """What the shard at `path` holds; its rows are not read.

    Raises DamagedIndex where it is missing, is not what its seal says, or does not belong to this index.
    """
    layout = read_layout(path)
    said = layout.attributes
    if said.get("index") != index:
        raise damaged(path, f"it belongs to another index ({said.get('index')}, not {index})")
    if (said.get("level"), said.get("K")) != (level, K):
        raise damaged(path, f"it holds {said.get('level')} rows of {said.get('K')}, not {level} rows of {K}")
    _check_shapes(layout, K, layers, ROW_TYPES[row_type])
    try:
        ids, rejected = (json.loads(layout.read(name).tobytes()) for name in ("ids", "rejected"))
    except (ValueError, RecursionError):
        raise damaged(path, "its list of examples cannot be read") from None
    if len(ids) != layout.extents["examples_offsets"].shape[0] - 1:
        raise damaged(path, "its examples and their ids differ in number")
    return Shard(layout, ids, rejected)


def faults(shard: Shard) -> Iterator[str]:
    """What is wrong with the numbers and texts of an intact file; reads all of it."""
    arrays = map_arrays(shard.layout)
    for name in ("scale", "norms"):
        if not np.isfinite(arrays[name]).all():
            yield f"its {name} are not all finite"
    rows = arrays["rows"]
    step = _block_rows(rows.shape[1])
    if not all(np.isfinite(rows[first : first + step]).all() for first in range(0, len(rows), step)):
        yield "its rows are not all finite"
    example, count = arrays["example"], len(shard.ids)
    if len(example) and not (0 <= example.min() and example.max() < count):
        yield f"its rows point outside its {count} examples"
    try:
        if [read_record(arrays, number).get("id") for number in range(count)] != shard.ids:
            yield "its examples and their ids differ"
    except (ValueError, AttributeError, RecursionError):
        yield "its examples cannot be read"


def read_record(arrays: dict[str, np.ndarray], number: int) -> dict[str, Any]:
    """One example of a mapped shard, as it was given to `write_shard`."""
    first, end = arrays["examples_offsets"][number : number + 2]
    return json.loads(arrays["examples"][first:end].tobytes())


def read_index(layout: Layout) -> dict[str, Any]:
    """The manifest without its shards, as it was when the file was written."""
    return json.loads(layout.read("index").tobytes())


def _scales(rows: np.ndarray, row_type: str) -> np.ndarray:
    """float32 [n]: what brings each row's largest entry to 127; for float16, the power of two to just under 2^PEAK.

    The latter not less than 2^-126, so that it is a normal number; rows below that still have float16's subnormals.
    """
    if not len(rows):
        return np.zeros(0, np.float32)
    peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))  # NaN stays NaN
    if not np.isfinite(peak).all():
        raise ValueError(f"rows that are not finite cannot be stored: {np.flatnonzero(~np.isfinite(peak))[:3]}")
    if row_type == "float16":
        exponent = np.maximum(np.frexp(peak)[1] - PEAK, -126)
        return np.where(peak > 0, np.ldexp(np.float32(1), exponent), np.float32(0)).astype(np.float32)
    with np.errstate(under="ignore", over="ignore"):
        scale, steps = peak / np.float32(_STEPS), np.float32(_STEPS)
        coarse = scale < np.finfo(np.float32).tiny  # subnormal numbers are rounded down by as much as all of them
        scale = np.where(coarse & (scale * steps < peak), np.nextafter(scale, np.float32(1)), scale)
        return np.where(np.isfinite(scale * steps), scale, np.nextafter(scale, np.float32(0)))


def _rounded(rows: np.ndarray, scale: np.ndarray, row_type: str) -> np.ndarray:
    with np.errstate(under="ignore"):
        scaled = rows / np.where(scale > 0, scale, np.float32(1))[:, None]
        if row_type == "int8":
            return np.clip(np.rint(scaled, out=scaled), -_STEPS, _STEPS, out=scaled).astype(np.int8)
        # Rounding up to 2^10 would overflow float32 on the way back where the row is near its limit.
        return np.clip(scaled, -_LARGEST, _LARGEST, out=scaled).astype("<f2")


def _block_rows(K: int, block_bytes: int = _BLOCK_BYTES) -> int:
    return max(1, block_bytes // (4 * K))


def _check_shapes(layout: Layout, K: int, layers: int, rows: str) -> None:
    extents = layout.extents
    wrong = [
        name for name, dtype in {"rows": rows, **_DTYPES}.items() if name not in extents or extents[name].dtype != dtype
    ]
    if wrong:
        raise damaged(layout.path, f"its array {wrong[0]!r} is missing or of another kind")
    n = extents["rows"].shape[0]
    shapes = {
        "rows": (n, K),
        "norms": (n, layers),
        **{name: (n,) for name in ("scale", "example", "position", "token")},
    }
    flat = ("examples", "examples_offsets", "ids", "rejected", "index")
    for name, extent in extents.items():
        if shapes.get(name, extent.shape) != extent.shape or (name in flat and len(extent.shape) != 1):
            raise damaged(layout.path, f"its array {name!r} has the shape {extent.shape}")
