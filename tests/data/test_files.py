"""Every file format gives the same rows, and one bad row spoils neither the others nor their numbers."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rapidindex.data.files import read_rows, source_of, unit_of
from rapidindex.errors import DataError

ROWS = [
    {"prompt": "Capital of Japan?", "response": "Tokyo, of course.\nWhat else?", "source": "a"},
    {"prompt": 'Say "hi" {name}', "response": "hi 🤖", "source": "b"},
]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _jsonl(path: Path, rows: list) -> Path:
    return _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _csv_text(rows: list[dict]) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(quoted(value) for value in row.values()) for row in rows)]
    return "\r\n".join(lines) + "\r\n"


def _saved(folder: Path, rows: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def _parquet(path: Path, rows: list[dict]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    return path


WRITERS = {
    "jsonl": lambda folder: _jsonl(folder / "a.jsonl", ROWS),
    "upper case": lambda folder: _jsonl(folder / "a.JSONL", ROWS),
    "bom": lambda folder: _write(folder / "a.jsonl", "\ufeff" + "\n".join(map(json.dumps, ROWS))),
    "json list": lambda folder: _write(folder / "a.json", json.dumps(ROWS)),
    "json object": lambda folder: _write(folder / "a.json", "\ufeff" + json.dumps({"version": 1, "data": ROWS})),
    "csv": lambda folder: _write(folder / "a.csv", _csv_text(ROWS)),
    "csv bom": lambda folder: _write(folder / "a.csv", "\ufeff" + _csv_text(ROWS)),
    "parquet": lambda folder: _parquet(folder / "a.parquet", ROWS),
    "datasets": lambda folder: _saved(folder / "saved", ROWS),
}


@pytest.mark.parametrize("form", WRITERS)
def test_each_format_gives_the_same_rows(form, tmp_path):
    assert [row for _, row in read_rows(WRITERS[form](tmp_path))] == ROWS


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    text = '{"a": 1}\n\n  \r\n{"a": "\u2028 \x0b"}\r\nnot json\n{"a": 2}'
    numbers = [number for number, _ in read_rows(_write(tmp_path / "a.jsonl", text.encode()))]
    assert numbers == [1, 4, 5, 6]


def test_a_csv_row_is_numbered_by_its_first_line(tmp_path):
    path = _write(tmp_path / "a.csv", 'prompt,response\na,"1\n2\n3"\n\nb,c\n')
    rows = list(read_rows(path))
    assert [number for number, _ in rows] == [2, 6]
    assert rows[0][1] == {"prompt": "a", "response": "1\n2\n3"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "bad JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": "\xff"}', "bad UTF-8 at byte 8 of the line"),
        (b"[1, 2]", "not an object with columns but a list"),
        (b'"text"', "not an object with columns but text"),
        (b"3", "not an object with columns but a number"),
        (b"null", "not an object with columns but null"),
        (b"9" * 5000, "bad JSON: Exceeds the limit"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_json_object_says_why_and_spoils_no_other(line, reason, tmp_path):
    path = _write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    rows = list(read_rows(path))
    assert [rows[0], rows[2]] == [(1, {"a": 1}), (3, {"a": 2})]
    assert rows[1][0] == 2 and rows[1][1].startswith(reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a,b,c", "3 cells where the first line names 2 columns"),
        ("a", "1 cells where the first line names 2 columns"),
        ('"a"b,c', "bad CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_csv_row_says_why_and_spoils_no_other(line, reason, tmp_path):
    path = _write(tmp_path / "a.csv", f"prompt,response\n{line}\nc,d\n")
    assert list(read_rows(path)) == [(2, reason), (3, {"prompt": "c", "response": "d"})]


def test_a_csv_quote_that_is_never_closed_costs_its_own_line_only(tmp_path):
    path = _write(tmp_path / "a.csv", 'prompt,response\na,b\nc,"d\ne,f\ng,"h\ni"\nj,k\nl,"m\nn,o\n')
    rows = list(read_rows(path))
    good = [(2, "b"), (4, "f"), (5, "h\ni"), (7, "k"), (9, "o")]
    assert [(line, row["response"]) for line, row in rows if isinstance(row, dict)] == good
    bad = [(3, "bad CSV: ',' expected after '\"'"), (8, "bad CSV: unexpected end of data")]
    assert [(line, row) for line, row in rows if isinstance(row, str)] == bad


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_line_of_megabytes_is_read(form, tmp_path):
    long = "x" * 3_000_000
    row = {"prompt": "p", "response": long}
    path = tmp_path / f"a.{form}"
    _jsonl(path, [row]) if form == "jsonl" else _write(path, f"prompt,response\np,{long}\n")
    assert [read for _, read in read_rows(path)] == [row]


def test_a_bad_parquet_value_spoils_its_row_only(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"good", b"\xff", b"fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"response": text}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert rows == [(1, {"response": "good"}), (2, "bad UTF-8"), (3, {"response": "fine"})]


def test_a_dataset_dict_gives_its_train_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"test": datasets.Dataset.from_list(ROWS[1:]), "train": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read_rows(tmp_path / "saved")] == ROWS[:1]
    assert [row for _, row in read_rows(tmp_path / "saved" / "test")] == ROWS[1:]


def test_a_dataset_dict_without_train_names_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="found: dev") as caught:
        list(read_rows(tmp_path / "saved"))
    assert str(tmp_path / "saved" / "dev") in caught.value.hint


def test_a_filtered_dataset_is_read_as_filtered_and_whatever_its_format(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS).select([1]).with_format("numpy", columns=["prompt"])
    data.save_to_disk(str(tmp_path / "saved"))
    assert [row for _, row in read_rows(tmp_path / "saved")] == ROWS[1:]


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.xls", "x", "unknown extension '.xls'", ".jsonl, .ndjson, .json, .csv, .parquet"),
        ("noextension", "x", "unknown extension ''", ".jsonl"),
        ("a.json", '{"a": 1}\n{"a": 2}', "not valid JSON", ".jsonl"),
        ("a.json", b"\xff", "not valid JSON", ".jsonl"),
        ("a.json", '{"a": [], "b": []}', "found: a, b", "one such list"),
        ("a.json", '{"a": 1}', "found: none", "one such list"),
        ("a.json", "3", "should hold a list, not a number", "list of objects"),
        ("a.csv", "a,b,a\n1,2,3\n", "column 'a' twice", "Rename"),
        ("a.csv", '"a"b\n1\n', "first line that is not CSV", "columns"),
        ("a.parquet", "no parquet", "not a readable Parquet file", "again"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_a_hint(name, content, message, hint, tmp_path):
    with pytest.raises(DataError) as caught:
        list(read_rows(_write(tmp_path / name, content)))
    assert message in caught.value.message and hint in caught.value.hint


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no training data") as caught:
        list(read_rows(tmp_path))
    assert "save_to_disk" in caught.value.hint
    pytest.importorskip("datasets")
    _write(tmp_path / "state.json", "{}")
    with pytest.raises(DataError, match="not a saved datasets folder"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "within/a.parquet", "a.csv", "a.json"])
def test_texts_are_not_read_in_the_place_of_the_rows_beside_them(tmp_path, name):
    (tmp_path / "within").mkdir()
    _write(tmp_path / name, "")
    with pytest.raises(DataError, match=f"holds rows in {name}"):
        read_rows(tmp_path)
    _write(tmp_path / "README.md", "About this data set.")
    with pytest.raises(DataError, match=rf"holds texts such as README\.md and rows in {name}") as caught:
        read_rows(tmp_path)
    assert f'"{tmp_path}/**/*.md"' in caught.value.hint
    assert [row["text"] for _, row in source_of(f"{tmp_path}/**/*.md").read()] == ["About this data set."]


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("datasets", "saved")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, name, tmp_path):
    # A package that cannot be imported: `None` in sys.modules is how Python itself says so.
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path; from rapidindex.data.files import read_rows, DataError\n"
        f"try: list(read_rows(Path({str(tmp_path / name)!r})))\n"
        "except DataError as error: print(error)"
    )
    (tmp_path / "saved").mkdir()
    _write(tmp_path / "saved" / "state.json", "{}")
    _write(tmp_path / "a.parquet", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs the package {package}" in done.stdout and "pip install 'rapidindex[datasets]'" in done.stdout


def test_numbers_count_lines_where_a_file_has_lines():
    units = {name: unit_of(Path(name)) for name in ("a.jsonl", "a.CSV", "a.json", "a.parquet", "folder")}
    assert units == {"a.jsonl": "line", "a.CSV": "line", "a.json": "row", "a.parquet": "row", "folder": "row"}


def _zst(path: Path, content: bytes) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_reads_as_the_file_does(name, ending, tmp_path):
    content = {"a.json": json.dumps(ROWS), "a.csv": _csv_text(ROWS), "a.jsonl": "\n".join(map(json.dumps, ROWS))}[name]
    plain, packed = _write(tmp_path / name, content), tmp_path / f"{name}.{ending}"
    packed.write_bytes(gzip.compress(plain.read_bytes())) if ending == "gz" else _zst(packed, plain.read_bytes())
    assert list(read_rows(packed)) == list(read_rows(plain)) and unit_of(packed) == unit_of(plain)


def test_a_compressed_file_that_is_cut_off_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode())[:-9])
    with pytest.raises(DataError, match="not a whole compressed file"):
        list(read_rows(path))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_file_that_is_not_compressed_is_named_as_such(tmp_path, ending):
    pytest.importorskip("pyarrow")
    path = _jsonl(tmp_path / f"a.jsonl.{ending}", ROWS)
    with pytest.raises(DataError, match="not a whole compressed file") as caught:
        list(read_rows(path))
    assert "rename it" in caught.value.hint


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf_16_is_named_as_such(name, encoding, tmp_path):
    path = _write(tmp_path / name, json.dumps(ROWS).encode(encoding))
    with pytest.raises(DataError, match=f"is {encoding[:6].upper()}") as caught:
        list(read_rows(path))
    assert caught.value.hint == "Save it as UTF-8."


def test_a_pattern_and_a_list_of_paths_are_read_file_by_file(tmp_path):
    files = [_jsonl(tmp_path / "part-1.jsonl", ROWS[:1]), _jsonl(tmp_path / "part-2.jsonl", ROWS[1:])]
    _write(tmp_path / "part-3.csv", "prompt,response\na\n")
    for data in (tmp_path / "part-*", str(tmp_path / "part-?.*"), [*files, str(tmp_path / "part-3.csv")]):
        source = source_of(data)
        rows = list(source.read())
        assert [row for _, row in rows[:-1]] == ROWS
        assert rows[-1] == (2, "part-3.csv: 1 cells where the first line names 2 columns")
    named = _jsonl(tmp_path / "[1].jsonl", ROWS[:1])
    assert [row for _, row in source_of(named).read()] == ROWS[:1]


def test_of_a_dataset_dict_the_split_that_is_read_is_said(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[1:]))
    splits.save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved")
    assert source.name == str(tmp_path / "saved" / "train") and [row for _, row in source.read()] == ROWS
    assert source_of(splits).name == f"datasets.Dataset of {len(ROWS)} rows (split train)"
