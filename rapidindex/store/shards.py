"""Shards: sealed files of RapidGrads, of the layers' norms, and of the examples that they belong to.

    rows      int8 [n, K]      a row's entries are rows · scale; float16 in an index made with format 1
    scale     float32 [n]      the row's largest entry / 127 (float16: a power of two); 0 for a row of zeros
    lengths   float32 [n]      no stored row is longer; none in older shards
    norms     float32 [n, L]   the norm of each layer's gradient
    example   int32 [n]        the number of the row's example in this file
    position  int32 [n]        the row's response token; -1 in a sentence row
    token     int32 [n]        the id of that token; -1 in a sentence row
    examples  uint8            the records of the m examples as JSON, one after the other
    examples_offsets  int64 [m + 1]  the beginning of each record, and the end of the last
    ids       uint8            JSON list of the examples' ids
    rejected  uint8            JSON list of {"id", "line", "reason"}: examples whose gradient was not finite
    index     uint8            JSON: the manifest without its list of files, so that it can be rebuilt

Knows the content of one shard, not its place or the other shards.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from rapidindex.store.container import Layout, damaged, fitted, map_arrays, read_layout
from rapidindex.store.writing import Column, column, encode_json, json_column, write
from rapidindex.typed import Count

_PEAK = 10  # a row's largest entry becomes 2^9 to 2^10 in float16, whose normal numbers reach 2^-24 of that
_LARGEST = 1023.5  # the largest float16 below 2^10
_BLOCK_BYTES = 32 * 2**20
ROW_TYPES = {"int8": "|i1", "float16": "<f2"}
"""The types in which rows are stored. An entry of a RapidGrad is a sum of many of the gradient's entries and so nearly
normal: 8 bits an entry change scores by 1/25,000 of the row's length (bench/README.md, "The smallest row")."""
ROW_TYPE, OLD_ROW_TYPE = "int8", "float16"
"""The type in new levels, and in those whose manifest says none."""
_VERSIONS = {"int8": 2, "float16": 1}
_STEPS = 127
_LARGEST_OF = {"int8": _STEPS + 1, "float16": 65_504}  # an entry, before it is multiplied by the row's scale
_HASHED = ("scale", "lengths", "norms", "example", "position", "token", "examples_offsets", "ids")
_DTYPES = {
    **dict.fromkeys(("scale", "norms"), "<f4"),
    **dict.fromkeys(("example", "position", "token"), "<i4"),
    **dict.fromkeys(("examples", "ids", "rejected", "index"), "|u1"),
    "examples_offsets": "<i8",
}


class Rejected(TypedDict):
    """An example whose gradient was not finite."""

    id: str
    line: Count | None
    reason: str


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
        if any_outside(self.example, len(self.examples)):
            raise ValueError(f"example points outside the {len(self.examples)} examples")
        ids = [record["id"] for record in (*self.examples, *self.rejected)]
        if not all(isinstance(id, str) for id in ids):
            raise ValueError("an example's id must be a string")
        if len(set(ids)) != len(ids):
            raise ValueError("two examples of a shard have the same id")


@dataclass(frozen=True)
class Shard:
    """A finished shard, whose arrays stay on the disk."""

    layout: Layout
    ids: list[str]
    """The ids of the m examples."""
    rejected: list[dict[str, Any]]
    """{"id", "line", "reason"} of each rejected example."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.layout.path.name

    @property
    def rows(self) -> int:
        """The number of rows, n."""
        return self.layout.extents["rows"].shape[0]

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry for this shard."""
        counts = {"rows": self.rows, "examples": len(self.ids), "rejected": len(self.rejected)}
        return {"sha256": self.layout.sha256, "bytes": self.layout.size, **counts}


def any_outside(numbers: np.ndarray, count: int) -> bool:
    """Return whether any of these numbers is not one of 0 to count - 1."""
    return bool(len(numbers)) and not (0 <= numbers.min() and numbers.max() < count)


def row_bytes(K: int, row_type: str) -> int:
    """Return the size in bytes of a stored row of K entries, without its scale."""
    return K * np.dtype(ROW_TYPES[row_type]).itemsize


def encode_rows(rows: np.ndarray, row_type: str = ROW_TYPE) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows, float32 [n, K], to ([n, K] of `row_type`, scale float32 [n]).

    Raises ValueError where a row is not finite.
    """
    scale = _scales(rows, row_type)
    return _rounded(rows, scale, row_type), scale


def lengths_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return lengths, float32 [n], that the rows of a shard do not exceed.

    An older shard has none: its rows are as long as if all entries were the largest, at most.
    """
    if "lengths" in arrays:
        return arrays["lengths"]
    rows = arrays["rows"]
    with np.errstate(over="ignore"):
        return arrays["scale"] * np.float32(_LARGEST_OF[rows.dtype.name] * rows.shape[1] ** 0.5)


def decode_rows(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Restore encoded rows as float32 [n, K].

    An entry stored as int8 is off by at most 1/254 of the row's largest, a float16 row by 2^-11 of its length.
    """
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
    form = {"format": f"rapidindex.rows/{_VERSIONS[row_type]}", "level": level}
    attributes = {**form, "K": content.rows.shape[1], "index": index["id"]}
    scale = _scales(content.rows, row_type)
    step = _block_rows(content.rows.shape[1], block_bytes)
    firsts = range(0, len(content.rows), step)
    blocks = (_rounded(content.rows[i : i + step], scale[i : i + step], row_type) for i in firsts)
    texts = [encode_json(record) for record in content.examples]
    columns = {
        "scale": column(scale, "<f4"),
        "lengths": column(_longest(content.rows, scale), "<f4"),
        "norms": column(content.norms, "<f4"),
        **{name: column(getattr(content, name), "<i4") for name in ("example", "position", "token")},
        "examples": column(np.frombuffer(b"".join(texts), np.uint8), "|u1"),
        "examples_offsets": column(np.cumsum([0, *map(len, texts)]), "<i8"),
        "ids": json_column([record["id"] for record in content.examples]),
        "rejected": json_column(list(content.rejected)),
        "index": json_column(index),
        "rows": Column(content.rows.shape, np.dtype(ROW_TYPES[row_type]), blocks),
    }
    return columns, {**attributes, "numbers": _digest(block for name in _HASHED for block in columns[name].blocks)}


def read_shard(path: Path, *, index: str, level: str, K: int, layers: int, row_type: str) -> Shard:
    """Read the shard at `path`, without its rows.

    Raises DamagedIndex where the file is missing, does not fit its seal, or does not belong to this index and level.
    """
    layout = read_layout(path)
    attributes = layout.attributes
    if attributes.get("index") != index:
        raise damaged(path, f"it belongs to another index ({attributes.get('index')}, not {index})")
    if (attributes.get("level"), attributes.get("K")) != (level, K):
        form = f"{attributes.get('level')} rows of {attributes.get('K')}"
        raise damaged(path, f"it holds {form}, not {level} rows of {K}")
    _check_shapes(layout, K, layers, ROW_TYPES[row_type])
    try:
        ids, rejected = (json.loads(layout.read(name).tobytes()) for name in ("ids", "rejected"))
    except (ValueError, RecursionError):
        raise damaged(path, "its list of examples cannot be read") from None
    fitted(path, ids, list[str], "ids")
    fitted(path, rejected, list[Rejected], "rejected")
    if len(set(ids)) != len(ids):
        raise damaged(path, "two of its examples have the same id")
    if len(ids) != layout.extents["examples_offsets"].shape[0] - 1:
        raise damaged(path, "its examples and their ids differ in number")
    return Shard(layout, ids, rejected)


def faults(shard: Shard) -> Iterator[str]:
    """Read all of an intact file, and yield what is wrong with its numbers and texts."""
    arrays = map_arrays(shard.layout)
    if not np.isfinite(arrays["norms"]).all():
        yield "its norms are not all finite"
    rows = arrays["rows"]
    step = _block_rows(rows.shape[1])
    if not all(np.isfinite(rows[first : first + step]).all() for first in range(0, len(rows), step)):
        yield "its rows are not all finite"
    fault = numbers_fault(shard.layout, arrays, len(shard.ids))
    if fault:
        yield fault
        return
    try:
        for number, id in enumerate(shard.ids):
            read_record(arrays, number, id)
    except ValueError as error:
        yield str(error)


def numbers_fault(layout: Layout, arrays: dict[str, np.ndarray], count: int) -> str:
    """Return what is wrong with what lies beside a shard's rows, its texts excepted; "" for nothing.

    One changed bit of a scale can put a row first; one of an entry hardly changes a score. So the scales and their like
    are compared with a checksum before rows are used, and the rows by `check` alone: that takes longer than a scan.
    Shards of older versions have no such checksum. `arrays` are those of the file, and `count` is that of its examples.
    """
    hashed = [arrays[name] for name in _HASHED if name in arrays]
    if layout.attributes.get("numbers") not in (None, _digest(hashed)):
        return "the numbers beside its rows were changed after they were written"
    if "lengths" in arrays and not arrays["lengths"].min(initial=0) >= 0:  # nor NaN
        return "the lengths of its rows are not all positive"
    if not (np.isfinite(arrays["scale"]).all() and arrays["scale"].min(initial=0) >= 0):
        return "its scales are not all finite and positive"
    if any_outside(arrays["example"], count):
        return f"its rows point outside its {count} examples"
    ends = arrays["examples_offsets"]
    if (np.diff(ends) < 0).any() or any_outside(ends, len(arrays["examples"]) + 1):
        return "its examples lie outside their text"
    if arrays["position"].min(initial=0) < -1:
        return "its rows belong to tokens before the first"
    return ""


def read_record(arrays: dict[str, np.ndarray], number: int, id: str) -> dict[str, Any]:
    """Read the record of one example, of this id, from the mapped arrays of a shard. Raise ValueError for another."""
    first, end = arrays["examples_offsets"][number : number + 2]
    try:
        record = json.loads(arrays["examples"][first:end].tobytes())
    except (ValueError, RecursionError):
        raise ValueError("its examples cannot be read") from None
    if not isinstance(record, dict) or record.get("id") != id:
        raise ValueError("its examples and their ids differ")
    return record


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Return the first half of the SHA-256 of these arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:32]


def _scales(rows: np.ndarray, row_type: str) -> np.ndarray:
    """Return the scale of each row, float32 [n]. Raise ValueError where a row is not finite.

    One scale a row: the largest entry of a real row was at most .116 of its length (docs/format.md).
    Its quotient brings the largest entry to 127 or, as a power of two, to just under 2^10 in float16. A power of two is
    not less than 2^-126, so that it is a normal number; smaller rows still have float16's subnormals.
    """
    if not len(rows):
        return np.zeros(0, np.float32)
    peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))  # NaN stays NaN
    if not np.isfinite(peak).all():
        raise ValueError(f"rows that are not finite cannot be stored: {np.flatnonzero(~np.isfinite(peak))[:3]}")
    if row_type == "float16":
        exponent = np.maximum(np.frexp(peak)[1] - _PEAK, -126)
        return np.where(peak > 0, np.ldexp(np.float32(1), exponent), np.float32(0)).astype(np.float32)
    with np.errstate(under="ignore", over="ignore"):
        scale, steps = peak / np.float32(_STEPS), np.float32(_STEPS)
        coarse = scale < np.finfo(np.float32).tiny  # a subnormal scale may be rounded down by much of itself
        scale = np.where(coarse & (scale * steps < peak), np.nextafter(scale, np.float32(1)), scale)
        return np.where(np.isfinite(scale * steps), scale, np.nextafter(scale, np.float32(0)))


def _longest(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return what no row is longer than once it is rounded, float32 [n]: half a step may be added to each entry."""
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return (np.sqrt(squares) + 0.5 * rows.shape[1] ** 0.5 * scale).astype(np.float32)


def _rounded(rows: np.ndarray, scale: np.ndarray, row_type: str) -> np.ndarray:
    with np.errstate(under="ignore"):
        scaled = rows / np.where(scale > 0, scale, np.float32(1))[:, None]
        if row_type == "int8":
            return np.clip(np.rint(scaled, out=scaled), -_STEPS, _STEPS, out=scaled).astype(np.int8)
        # An entry rounded up to 2^10 would overflow float32 when it is restored, in a row near float32's limit.
        return np.clip(scaled, -_LARGEST, _LARGEST, out=scaled).astype("<f2")


def _block_rows(K: int, block_bytes: int = _BLOCK_BYTES) -> int:
    return max(1, block_bytes // (4 * K))


def _check_shapes(layout: Layout, K: int, layers: int, rows: str) -> None:
    extents = layout.extents
    dtypes = {"rows": rows, **_DTYPES, **({"lengths": "<f4"} if "lengths" in extents else {})}
    for name, dtype in dtypes.items():
        if name not in extents or extents[name].dtype != dtype:
            raise damaged(layout.path, f"its array {name!r} is missing or of another type")
    n = (extents["rows"].shape or (0,))[0]
    shapes = {name: (n,) for name in ("scale", "lengths", "example", "position", "token")}
    shapes |= {"rows": (n, K), "norms": (n, layers)}
    for name in dtypes:
        shape = extents[name].shape
        if shape != shapes.get(name, shape[:1] or (0,)):
            raise damaged(layout.path, f"its array {name!r} has the shape {shape}")
