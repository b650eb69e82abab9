"""The rows of a JSONL, JSON, CSV or Parquet file, or of a saved `datasets` folder, numbered as their author would.

Knows file formats, not what the columns mean (`examples.py`). A row that cannot be read does not spoil the others: its
place is taken by a sentence that says why. DataError where the file as a whole cannot be read.
"""

import codecs
import csv
import json
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from rapidindex.errors import DataError

Rows = Generator[tuple[int, Any], None, None]
"""(1-based line or row number, the row as a dict, or as a str why it cannot be read)."""

_INSTALL = "Install it with: pip install 'rapidindex[datasets]'"
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}


def kind_of(value: Any) -> str:
    """What a value is, in words for a message: `a list`, `text`, `null` …."""
    return _KINDS.get(type(value), "an object")


def read_rows(path: Path) -> Rows:
    """The rows of `path` in order. DataError where it does not exist, or its extension or content is not understood."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise DataError(f"{path} does not exist.", hint="Check the path.")
    if path.suffix.lower() not in readers:
        expected = ", ".join(readers)
        raise DataError(
            f"{path} has the unknown extension {path.suffix!r}.",
            hint=f"Give a file that ends in one of {expected}, or a folder written by datasets' save_to_disk.",
        )
    return readers[path.suffix.lower()](path)


def unit_of(path: Path) -> str:
    """What the numbers of `read_rows` count: `line` or `row`."""
    return "line" if path.suffix.lower() in (".jsonl", ".ndjson", ".csv") else "row"


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if raw.strip():
                yield line, _json_line(raw.rstrip(b"\r\n"))


def _json_line(raw: bytes) -> Any:
    try:
        return _as_row(json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return f"bad UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        return f"bad JSON: {error.msg} at column {error.colno}"
    except ValueError as error:  # a number of too many digits
        return f"bad JSON: {error}"
    except RecursionError:
        return "nested too deeply"


def _as_row(value: Any) -> Any:
    return value if isinstance(value, dict) else f"not an object with columns but {kind_of(value)}"


def _json(path: Path) -> Rows:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "If each line is an object of its own, rename the file to end in .jsonl."
        raise DataError(f"{path} is not valid JSON: {error}.", hint=hint) from error
    if isinstance(value, dict):
        lists = [key for key in value if isinstance(value[key], list)]
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            hint = "Give a file that holds a list of objects, or an object with one such list."
            raise DataError(f"{path} should have one list in its object; found: {found}.", hint=hint)
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path} should hold a list, not {kind_of(value)}.", hint="Give a file with a list of objects.")
    for number, row in enumerate(value, 1):
        yield number, _as_row(row)


def _csv(path: Path) -> Rows:
    # Strict, because a quote that is never closed would otherwise swallow the rest of the file without a word.
    usual = csv.field_size_limit(2**31 - 1)
    try:
        # What is not UTF-8 becomes lone surrogates, which no later step accepts: one bad row does not spoil the file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _csv_header(path, reader)
            line = reader.line_num + 1
            while (row := _csv_row(header, reader)) is not None:
                if row:
                    yield line, row
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(usual)


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        hint = "Name the columns in the first line, separated by commas."
        raise DataError(f"{path} has a first line that is not CSV: {error}.", hint=hint) from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} names the column {twice[0]!r} twice in its first line.", hint="Rename one of them.")
    return header


def _csv_row(header: list[str], reader: Iterator[list[str]]) -> dict[str, str] | str | None:
    """The next row, empty for a blank line; None after the last."""
    try:
        cells = next(reader, None)
    except csv.Error as error:
        return f"bad CSV: {error}"
    if cells and len(cells) != len(header):
        return f"{len(cells)} cells where the first line names {len(header)} columns"
    return None if cells is None else dict(zip(header, cells, strict=False))


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Reading {path} needs the package pyarrow.", hint=_INSTALL) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=1024))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.", hint="Write the file again.") from error


def _folder(path: Path) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"Reading the folder {path} needs the package datasets.", hint=_INSTALL) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Give a folder written by datasets' save_to_disk, or a .jsonl, .json, .csv or .parquet file."
        raise DataError(f"{path} is not a saved datasets folder: {error}", hint=hint) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            splits = ", ".join(map(str, loaded))
            hint = f"Give the folder of one split, such as {path / str(next(iter(loaded), 'train'))}."
            raise DataError(f"{path} has no split named train; found: {splits}.", hint=hint)
        loaded = loaded["train"]
    yield from _arrow_rows(loaded.with_format("arrow").iter(batch_size=1024))


def _arrow_rows(tables: Iterable[Any]) -> Rows:
    """Rows of pyarrow tables or batches, converted one by one, so that one bad value spoils one row."""
    number = 0
    for table in tables:
        for i in range(table.num_rows):
            number += 1
            try:
                yield number, table.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield number, "bad UTF-8"
            except (ValueError, OverflowError) as error:
                yield number, f"bad value: {error}"
