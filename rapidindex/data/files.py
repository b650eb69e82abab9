"""Read the rows of JSONL, JSON, CSV or Parquet files, of a saved `datasets` folder, or of an object in memory.

A .txt or .md file is one row, {"text", "file"}, and a folder of these a row for each, folders within it included.

Knows formats, not what the columns mean (`examples.py`). A row that cannot be read does not spoil the others: a
sentence that says why takes its place.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rapidindex.errors import DataError

Rows = Generator[tuple[int, Any], None, None]
"""(1-based line or row number, the row as a dict, or a str that says why it cannot be read)."""

_BATCH = 1024
"""Rows converted to Python objects at a time."""
_TEXTS = (".txt", ".md")
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_COMPRESSED = (".gz", ".zst")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_INSTALL = "Install it with: pip install 'rapidindex[datasets]'"
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}


class Source(NamedTuple):
    """Training data, whatever it was given as."""

    name: str
    """The path, or for an object its type and length: `list of 10 rows`."""
    unit: str
    """What the numbers of its rows count: `line` or `row`."""
    read: Callable[[], Rows]
    """Return its rows in order. Raises DataError where the data as a whole cannot be read."""


def source_of(data: Any) -> Source:
    """Return the source for a path, a `datasets.Dataset`, a pandas DataFrame, or a list or other sequence of dicts.

    A path may be a pattern such as `part-*.jsonl`, in which `**` stands for folders within folders, and a list of paths
    is read file by file. A `datasets.DatasetDict` stands for its split named train, which the name then says. Raises
    DataError for any other object.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        files = [] if path.exists() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if files:
            return Source(str(path), unit_of(files[0]), partial(_files_rows, files))
        if (path / "dataset_dict.json").is_file() and (path / "train").is_dir():
            path /= "train"
        return Source(str(path), unit_of(path), partial(read_rows, path))
    if _is_paths(data):
        files = [Path(file) for file in data]
        return Source(", ".join(map(str, files)), unit_of(files[0]), partial(_files_rows, files))
    split = ""
    if isinstance(data, dict) and hasattr(data, "with_format"):
        data = _train_split(data, _type_name(data), f"Give one split, such as data[{next(iter(data), 'train')!r}].")
        split = " (split train)"
    if hasattr(data, "with_format") and hasattr(data, "num_rows"):
        read = _dataset_rows
    elif hasattr(data, "iloc") and hasattr(data, "columns"):
        read = _frame_rows
    elif isinstance(data, Sequence) and not isinstance(data, bytes):
        read = _sequence_rows
    else:
        hint = "Give a path, a datasets.Dataset, a pandas DataFrame, or a list of dicts."
        raise DataError(f"Training data cannot be read from an object of type {_type_name(data)}.", hint=hint)
    count = len(data)
    name = f"{_type_name(data)} of {count:,} row{'' if count == 1 else 's'}{split}"
    return Source(name, "row", partial(read, data))


def read_rows(path: Path) -> Rows:
    """Return the rows of a file or folder in order.

    Raises DataError where `path` does not exist, or its extension or content is not understood.
    """
    readers = dict(zip(_TABLES, (_jsonl, _jsonl, _json, _csv, _parquet), strict=True)) | dict.fromkeys(_TEXTS, _text)
    if path.is_dir():
        return _folder(path) if _is_saved(path) else _text_files(path, _texts_in(path))
    if not path.exists():
        raise DataError(f"{path} does not exist.", hint="Check the path.")
    kind = _kind(path)
    if kind not in readers or (kind == ".parquet" and kind != path.suffix.lower()):
        expected = ", ".join(readers)
        raise DataError(
            f"{path} has the unknown extension {path.suffix!r}.",
            hint=f"Give a file that ends in one of {expected} (.gz and .zst may follow), or a folder written by "
            "datasets' save_to_disk.",
        )
    return readers[kind](path)


def unit_of(path: Path) -> str:
    """Return what the numbers of `read_rows` count: `line` or `row`."""
    return "line" if _kind(path) in (".jsonl", ".ndjson", ".csv") else "row"


def kind_of(value: Any) -> str:
    """Return a value's kind in words for a message: `a list`, `text`, `null` …."""
    return _KINDS.get(type(value), "an object")


def _type_name(data: Any) -> str:
    package, name = type(data).__module__.split(".")[0], type(data).__qualname__
    return name if package == "builtins" else f"{package}.{name}"


def _kind(path: Path) -> str:
    """Return the extension that says what a file holds, whether it is compressed or not."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _is_paths(data: Any) -> bool:
    paths = isinstance(data, list | tuple) and bool(data)
    return paths and all(
        isinstance(file, os.PathLike) or (isinstance(file, str) and _kind(Path(file))) for file in data
    )


def _files_rows(files: Sequence[Path]) -> Rows:
    """Return the rows of several files; each is numbered by its place in its own file, which reasons name."""
    for file in files:
        for number, row in read_rows(file):
            yield number, f"{file.name}: {row}" if isinstance(row, str) else row


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text for its bytes, decompressed. Raises DataError where they are not UTF-8 but UTF-16 or 32."""
    try:
        with _decompressed(path) as file:
            start = file.peek(4)[:4]
            if start[:2] in _UTF16 or b"\0" in start:
                raise DataError(f"{path} is UTF-{32 if bytes(2) in start else 16}.", hint="Save it as UTF-8.")
            yield file
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system; what is no gzip or zstd has no number
            raise
        hint = "Write the file again, or rename it if it is not compressed."
        raise DataError(f"{path} is not a whole compressed file: {error}.", hint=hint) from error


def _decompressed(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(f"Reading {path} needs the package pyarrow.", hint=_INSTALL) from error
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl(path: Path) -> Rows:
    with _open(path) as file:
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


def _text(path: Path) -> Rows:
    yield 1, _text_row(path, path.name)


def _text_files(folder: Path, files: Sequence[Path]) -> Rows:
    """Return a row for each file, which is named as it lies in the folder."""
    for number, file in enumerate(files, 1):
        name = file.relative_to(folder).as_posix()
        row = _text_row(file, name)
        yield number, f"{name}: {row}" if isinstance(row, str) else row


def _text_row(path: Path, name: str) -> Any:
    try:
        with _open(path) as file:
            return {"text": file.read().decode("utf-8-sig"), "file": name}
    except UnicodeDecodeError as error:
        return f"bad UTF-8 at byte {error.start + 1}"
    except DataError as error:
        return error.message.rstrip(".")


def _is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved the folder."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _texts_in(folder: Path) -> list[Path]:
    """Return the files of text in a folder, in order.

    Raises DataError where there are none, or files of rows too, such as data beside its README.md.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = [file for file in files if _kind(file) in _TEXTS]
    tables = [file for file in files if _kind(file) in _TABLES]
    if tables:
        pattern = tables[0].parent / f"*{_kind(tables[0])}*"
        others = f"texts such as {texts[0].name} and " if texts else ""
        hint = f'Name the files, one pattern in quotes: "{pattern}"'
        hint += f', or "{folder / "**" / ("*" + texts[0].suffix)}".' if texts else "."
        raise DataError(f"{folder} holds {others}rows in {tables[0].relative_to(folder)}.", hint=hint)
    if not texts:
        hint = "Give a file, a folder of .txt and .md files, or one written by datasets' save_to_disk."
        raise DataError(f"{folder} holds no training data.", hint=hint)
    return texts


def _json(path: Path) -> Rows:
    try:
        with _open(path) as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "If each line is an object of its own, rename the file to end in .jsonl."
        raise DataError(f"{path} is not valid JSON: {error}.", hint=hint) from error
    if isinstance(value, dict):
        lists = [key for key in value if isinstance(value[key], list)]
        if len(lists) != 1:
            names = ", ".join(lists) or "none"
            hint = "Give a file that holds a list of objects, or an object with one such list."
            raise DataError(f"{path} should have one list in its object; found: {names}.", hint=hint)
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path} should hold a list, not {kind_of(value)}.", hint="Give a file with a list of objects.")
    yield from _sequence_rows(value)


def _csv(path: Path) -> Rows:
    # Strict, because a quote that is never closed would otherwise swallow the rest of the file silently.
    previous_limit = csv.field_size_limit(2**31 - 1)
    try:
        # Bytes that are not UTF-8 become lone surrogates, for which only their own row is rejected later.
        with _open(path) as file:
            lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
            reader = csv.reader(lines, strict=True)
            header = _csv_header(path, reader)
            lines.begin()
            while (row := _csv_row(header, reader)) is not None:
                if row:
                    yield lines.first, row
                if isinstance(row, _BadCsv):
                    lines.back_to_second()
                lines.begin()
    finally:
        csv.field_size_limit(previous_limit)


class _Lines:
    """The lines of a file, of which those of the row being read can be read again."""

    def __init__(self, file: Iterable[str]) -> None:
        self._file = iter(file)
        self._again: deque[str] = deque()
        self._row: list[str] = []
        self.first = 1
        """The number of the row's first line."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self._row.append(self._again.popleft() if self._again else next(self._file))
        return self._row[-1]

    def begin(self) -> None:
        """Begin another row."""
        self.first += len(self._row)
        self._row = []

    def back_to_second(self) -> None:
        """Go back to the row's second line: a quote that is not closed in its first one is no reason to lose others."""
        self._again.extendleft(reversed(self._row[1:]))
        del self._row[1:]


class _BadCsv(str):
    """Why a row is not CSV."""


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        hint = "Name the columns in the first line, separated by commas."
        raise DataError(f"{path} has a first line that is not CSV: {error}.", hint=hint) from error
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path} names the column {repeated[0]!r} twice in its first line.", hint="Rename one of them.")
    return header


def _csv_row(header: list[str], reader: Iterator[list[str]]) -> dict[str, str] | str | None:
    """Return the next row, empty for a blank line; None after the last row."""
    try:
        cells = next(reader, None)
    except csv.Error as error:
        return _BadCsv(f"bad CSV: {error}")
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
            yield from _arrow_rows(file.iter_batches(batch_size=_BATCH))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {str(error).rstrip('.')}.", hint="Write the file again."
        ) from error


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
        folder = path / str(next(iter(loaded), "train"))
        loaded = _train_split(loaded, str(path), f"Give the folder of one split, such as {folder}.")
    yield from _dataset_rows(loaded)


def _train_split(splits: dict[str, Any], name: str, hint: str) -> Any:
    if "train" not in splits:
        raise DataError(f"{name} has no split named train; found: {', '.join(map(str, splits))}.", hint=hint)
    return splits["train"]


def _dataset_rows(dataset: Any) -> Rows:
    return _arrow_rows(dataset.with_format("arrow").iter(batch_size=_BATCH))


def _arrow_rows(tables: Iterable[Any]) -> Rows:
    """Convert pyarrow tables or batches row by row, so that one bad value spoils one row."""
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


def _frame_rows(frame: Any) -> Rows:
    """Convert a frame's rows; NaN, NaT and NA cells become None, and arrays, as Parquet's lists are read, lists."""
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise DataError(f"The frame has two columns named {str(repeated[0])!r}.", hint="Rename one of them.")
    for first in range(0, len(frame), _BATCH):
        part = frame.iloc[first : first + _BATCH]
        rows = part.astype(object).where(part.notna(), None).to_dict("records")
        for number, row in enumerate(rows, first + 1):
            yield number, {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}


def _sequence_rows(rows: Sequence[Any]) -> Rows:
    yield from ((number, _as_row(row)) for number, row in enumerate(rows, 1))
