"""Rows of files and of objects become examples, or say why not; ids depend on content alone."""

import datetime
import decimal
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rapidindex.config import fingerprint
from rapidindex.data.examples import Dataset, Example, Skipped, display_text, read_examples
from rapidindex.errors import DataError, UsageError

GOOD = {"prompt": "Capital of Japan?", "response": "Tokyo"}
CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Capital of Japan?")]


def _read(folder: Path, rows: list, **options) -> Dataset:
    path = folder / "data.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return read_examples(path, **options)


def _only(folder: Path, row: dict):
    (example,) = _read(folder, [row]).examples
    return example


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 + 1", "output": "Tokyo"}, "Add.\n1 + 1"),
        ({"instruction": "Add.", "input": "", "output": "Tokyo"}, "Add."),
        ({"instruction": "Add.", "input": " \n", "output": "Tokyo"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "Tokyo"}, "Add."),
        ({"instruction": "Add.", "output": "Tokyo"}, "Add."),
        ({"prompt": "Add.", "response": "Tokyo"}, "Add."),
        ({"prompt": "Add.", "completion": "Tokyo"}, "Add."),
        ({"question": "Add.", "answer": "Tokyo"}, "Add."),
        ({"question": "Add.", "response": "Tokyo"}, "Add."),
        ({"messages": None, "prompt": "Add.", "response": "Tokyo"}, "Add."),
        ({"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "Tokyo"}]}, "Add."),
        ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "Tokyo"}]}, "Add."),
    ],
)
def test_each_layout_of_columns_gives_prompt_and_response(row, prompt, tmp_path):
    example = _only(tmp_path, row)
    assert (example.prompt, example.response) == (prompt, "Tokyo")
    assert example.messages == (("user", prompt),)
    assert {key: value for key, value in example.meta.items() if value is not None} == {}


def _turns(*turns: tuple) -> list[dict]:
    return [{"role": turn[0], "content": turn[1], **(turn[2] if len(turn) > 2 else {})} for turn in turns]


def test_every_assistant_turn_is_in_the_response_and_the_other_turns_are_the_prompt(tmp_path):
    row = {"messages": _turns(*CHAT, ("assistant", "Tokyo"), ("user", "Thanks")), "n": 1}
    example = _only(tmp_path, row)
    assert example.response == "Hello\n\nTokyo" and example.trained == (2, 4)
    assert example.turns == (*CHAT, ("assistant", "Tokyo"))
    assert example.prompt == "system: Be brief.\nuser: Hi\nassistant: …\nuser: Capital of Japan?"
    assert example.meta == {"n": 1, "later_turns": [["user", "Thanks"]]}


def test_of_the_last_turn_alone_the_earlier_turns_are_the_prompt_and_the_id_is_the_same(tmp_path):
    row = {"messages": _turns(*CHAT, ("assistant", "Tokyo"), ("user", "Thanks")), "n": 1}
    (example,) = _read(tmp_path, [row], loss="last").examples
    assert example.response == "Tokyo" and not example.trained and example.final is None
    assert example.messages == tuple(CHAT)
    assert example.prompt == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Capital of Japan?"
    turns = [list(turn) for turn in CHAT]
    expected = fingerprint([turns, "Tokyo", {"n": 1, "later_turns": [["user", "Thanks"]]}])
    assert example.id == _only(tmp_path, row).id == expected


def test_turns_of_weight_0_stay_out(tmp_path):
    turns = [("user", "a"), ("assistant", "b", {"weight": 0}), ("user", "c"), ("assistant", "d", {"weight": 1})]
    example = _only(tmp_path, {"messages": _turns(*turns, ("assistant", "e", {"weight": 0}))})
    assert (example.response, example.trained) == ("d", ())
    assert example.messages == (("user", "a"), ("assistant", "b", {"weight": 0}), ("user", "c"))
    assert _read(tmp_path, [{"messages": _turns(*turns)}, {"messages": _turns(("assistant", "b"))}]).examples[1:]


def test_a_column_of_the_users_own_named_later_turns_is_kept(tmp_path):
    row = {"messages": _turns(("assistant", "b"), ("user", "c")), "later_turns": 3}
    assert _only(tmp_path, row).meta == {"later_turns": 3, "_later_turns": [["user", "c"]]}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tokyo"}}}
AS_OPENAI = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Tokyo"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
SYSTEM, USER, REPLY = ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")
UNTRAINED = ("assistant", "b", {"weight": 0})


@pytest.mark.parametrize(
    ("row", "turns", "trained"),
    [
        ({"instruction": "Hi", "output": "Yo", "system": "Be brief."}, [SYSTEM, USER, REPLY], ()),
        ({"prompt": "Hi", "response": "Yo", "system_prompt": "Be brief."}, [SYSTEM, USER, REPLY], ()),
        ({"system": "Be brief.", "messages": _turns(USER, REPLY)}, [SYSTEM, USER, REPLY], ()),
        ({"system": "Be brief.", "messages": _turns(SYSTEM, USER, REPLY)}, [SYSTEM, USER, REPLY], ()),
        ({"instruction": "Hi", "output": "Yo", "system": ""}, [USER, REPLY], ()),
        (
            {"instruction": "Hi", "output": "Yo", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), USER, REPLY],
            (1, 3),
        ),
        ({"instruction": "Sum up", "context": "Rain.", "response": "Yo"}, [("user", "Sum up\nRain."), REPLY], ()),
        ({"question": "Where?", "context": "Rain.", "answer": "Yo"}, [("user", "Where?\nRain."), REPLY], ()),
        ({"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Yo"}]}, [USER, REPLY], ()),
        ({"messages": json.dumps(_turns(USER, REPLY))}, [USER, REPLY], ()),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *_turns(REPLY)]},
            [USER, REPLY],
            (),
        ),
        ({"prompt": _turns(SYSTEM, USER), "completion": _turns(REPLY)}, [SYSTEM, USER, REPLY], ()),
        (
            {"prompt": _turns(("user", "a"), ("assistant", "b"), USER), "completion": _turns(REPLY)},
            [("user", "a"), UNTRAINED, USER, REPLY],
            (),
        ),
        ({"prompt": _turns(USER), "completion": "Yo"}, [USER, REPLY], ()),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, [USER, REPLY], ()),
        ({"prompt": _turns(USER), "chosen": _turns(REPLY), "rejected": _turns(REPLY)}, [USER, REPLY], ()),
        ({"prompt": "Hi", "chosen": _turns(USER, REPLY), "rejected": _turns(USER, REPLY)}, [USER, REPLY], ()),
        ({"chosen": _turns(USER, REPLY)}, [USER, REPLY], ()),
        (
            {"messages": [*_turns(USER), {"role": "assistant", "content": None, "tool_calls": [AS_OPENAI]}]},
            [USER, ("assistant", "", {"tool_calls": [CALL]})],
            (),
        ),
        (
            {
                "messages": _turns(
                    USER, ("assistant", "Yo", {"reasoning_content": "Hm", "name": "x", "tool_calls": None})
                )
            },
            [USER, ("assistant", "Yo", {"reasoning_content": "Hm"})],
            (),
        ),
    ],
)
def test_each_layout_gives_all_its_turns_and_what_is_in_the_loss(row, turns, trained, tmp_path):
    example = _only(tmp_path, row)
    assert (example.turns, example.trained) == (tuple(turns), trained)
    left = {"rejected", "system"} if row.get("system") == "" else {"rejected"}
    assert set(example.meta) <= left
    assert Example.from_record(json.loads(json.dumps(example.to_record(1.0)))) == example


def test_tools_are_read_from_a_list_or_its_text_and_count_in_the_id(tmp_path):
    row = {"messages": _turns(USER, REPLY)}
    rows = [row, {**row, "tools": [TOOL]}, {**row, "tools": json.dumps([TOOL])}, {**row, "tools": []}]
    dataset = _read(tmp_path, rows)
    assert [example.tools for example in dataset.examples] == [(), (TOOL,), ()]
    assert dataset.skipped == [Skipped(3, "the same as line 2")]


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"prompt": "Hi", "response": "Yo", "system": "a"}, {"prompt": "Hi", "response": "Yo", "system": "b"}),
        (
            {"messages": _turns(USER, ("assistant", "Yo", {"reasoning_content": "a"}))},
            {"messages": _turns(USER, ("assistant", "Yo", {"reasoning_content": "b"}))},
        ),
        (
            {"messages": _turns(USER, UNTRAINED, USER, REPLY)},
            {"messages": _turns(USER, UNTRAINED[:2], USER, REPLY)},
        ),
    ],
)
def test_rows_that_differ_in_anything_that_is_read_are_two_examples(row, other, tmp_path):
    assert len(_read(tmp_path, [row, other]).examples) == 2


def test_a_conversation_that_starts_with_its_response_has_an_empty_prompt(tmp_path):
    example = _only(tmp_path, {"messages": [{"role": "assistant", "content": "Tokyo"}]})
    assert (example.prompt, example.messages, example.response) == ("", (), "Tokyo")


def test_a_stored_record_gives_the_example_back(tmp_path):
    turns = [{"role": role, "content": content} for role, content in [*CHAT, ("assistant", "Tokyo")]]
    for example in _read(tmp_path, [{"messages": turns, "n": [1]}, {**GOOD, "source": "a"}], loss="last").examples:
        record = example.to_record(1.23456789, "more.jsonl")
        assert list(record) == ["id", "line", "messages", "response", "meta", "loss", "source"]
        assert (record["loss"], record["source"]) == (1.234568, "more.jsonl")
        assert Example.from_record(json.loads(json.dumps(record))) == example
        assert "source" not in example.to_record(1.0)


def test_a_lone_system_turn_is_shown_with_its_role():
    assert display_text([("system", "Be brief.")]) == "system: Be brief."


def test_text_is_kept_to_the_letter(tmp_path):
    row = {"prompt": " {prompt} {0} %s \\n\t", "response": "  שלום عالم 👩‍👩‍👧 e\u0301 \u2028\x00 "}
    example = _only(tmp_path, row)
    assert (example.prompt, example.response) == (row["prompt"], row["response"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"prompt": ', "bad JSON: Expecting value at column 12"),
        (b'{"prompt": "\xe9"}', "bad UTF-8 at byte 13 of the line"),
        ([1], "not an object with columns but a list"),
        ({"prompt": "a"}, "`prompt` without a `response`, `completion` or `answer`"),
        ({"prompt": "a", "response": None}, "`prompt` without a `response`, `completion` or `answer`"),
        ({"answer": "a"}, "`answer` without a `prompt` or `question`"),
        ({"instruction": "a"}, "`instruction` without an `output`"),
        ({"output": "a"}, "`output` without an `instruction`"),
        ({"body": "a", "n": 1}, "no known columns (found: body, n)"),
        ({}, "no known columns (found: none)"),
        ({"prompt": 3, "response": "a"}, "`prompt` is a number, not text"),
        ({"prompt": "a", "response": ["b"]}, "`response` is a list, not text"),
        ({"instruction": "a", "input": True, "output": "b"}, "`input` is a boolean, not text"),
        (
            {**GOOD, "system": "a", "prompt": [{"role": "system", "content": "b"}]},
            "`system` beside another system turn",
        ),
        ({**GOOD, "history": [["a"]]}, "`history` is not a list of pairs of texts, prompt and response"),
        ({**GOOD, "context": {"a": 1}}, "`context` is an object, not text"),
        ({**GOOD, "tools": "search"}, "`tools` is not a list of objects"),
        ({"chosen": "Human: a Assistant: b"}, "`chosen` without a `prompt` or `question`"),
        ({"messages": _turns(USER, UNTRAINED)}, "`messages` has no assistant turn of weight 1"),
        ({"messages": _turns(("assistant", "a", {"weight": 0.5}))}, "the weight of turn 1 is 0.5, not 0 or 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1 holds image_url; only text is understood",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "a"}}]},
            "turn 1 is a function_call; only `tool_calls` are understood",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            "a tool call of turn 1 has no name",
        ),
        ({"messages": "hello"}, "`messages` is text, not a list of turns"),
        ({"messages": []}, "`messages` has no assistant turn"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "`conversations` has no assistant turn"),
        ({"messages": ["hello"]}, "turn 1 is text, not an object with role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of turn 1 is null, not text"),
        ({"messages": [{"role": "user", "content": "a"}, {"from": "gpt"}]}, "the value of turn 2 is null, not text"),
        ({"messages": [{"content": "a"}]}, "the role of turn 1 is null, not text"),
        ({"prompt": "a", "response": ""}, "an empty response has no gradient"),
        ({"prompt": "a", "response": " \n\u3000"}, "an empty response has no gradient"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "an empty response has no gradient"),
        (b'{"prompt": "\\ud83d", "response": "a"}', "not valid Unicode text (bad UTF-8 or a lone surrogate)"),
        ({**GOOD, "a": {"\ud83d": 1}}, "not valid Unicode text (bad UTF-8 or a lone surrogate)"),
        (b'{"prompt": "a", "response": "b", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested too deeply"),
        (GOOD, "the same as line 1"),
    ],
)
def test_an_unusable_row_is_skipped_with_its_line_and_reason(row, reason, tmp_path):
    dataset = _read(tmp_path, [GOOD, row, {"prompt": "last", "response": "kept"}])
    assert dataset.skipped == [Skipped(2, reason)]
    assert [example.line for example in dataset.examples] == [1, 3]


def test_bad_utf8_in_a_csv_cell_skips_its_row_only(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,response\na,\xe9\nb,\xc3\xa9\n")
    dataset = read_examples(path)
    assert dataset.skipped == [Skipped(2, "not valid Unicode text (bad UTF-8 or a lone surrogate)")]
    assert [example.response for example in dataset.examples] == ["é"]


def test_duplicates_name_the_first_and_count_rows_where_a_file_has_no_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, GOOD, {**GOOD, "n": 1}, GOOD]))
    dataset = read_examples(path)
    assert dataset.skipped == [Skipped(2, "the same as row 1"), Skipped(4, "the same as row 1")]
    assert len(dataset.examples) == 2


def test_an_id_is_a_hash_of_content_and_the_same_in_every_format_and_place(tmp_path):
    expected = fingerprint([[["user", "Capital of Japan?"]], "Tokyo", {"source": "a"}])
    row = {**GOOD, "source": "a"}
    first = _read(tmp_path, [row]).examples[0]
    later = _read(tmp_path, [{"prompt": "x", "response": "y"}, dict(reversed(row.items()))]).examples[1]
    (tmp_path / "a.csv").write_text("source,response,prompt\na,Tokyo,Capital of Japan?\n")
    assert first.id == later.id == read_examples(tmp_path / "a.csv").examples[0].id == expected


def test_ids_of_a_released_version_stay_what_they_are(tmp_path):
    example = _only(tmp_path, {"instruction": "Say", "input": "hi 🤖", "output": "hi", "n": 1.5})
    assert example.id == "941d29d690a12f67"
    example = _only(tmp_path, {"instruction": "Say", "input": None, "output": "hi", "context": "", "tools": []})
    assert example.id == fingerprint([[["user", "Say"]], "hi", {"context": "", "tools": []}])


def test_any_change_of_content_changes_the_id(tmp_path):
    rows = [GOOD, {**GOOD, "prompt": "b"}, {**GOOD, "response": "b"}, {**GOOD, "n": 1}, {**GOOD, "n": 2}]
    assert len({example.id for example in _read(tmp_path, rows).examples}) == len(rows)


def test_a_dataset_fingerprint_ignores_order_and_skipped_rows_but_no_example(tmp_path):
    other = {"prompt": "b", "response": "c"}
    assert _read(tmp_path, [GOOD, other]).fingerprint == _read(tmp_path, [other, b"?", GOOD, GOOD]).fingerprint
    assert _read(tmp_path, [GOOD, other]).fingerprint != _read(tmp_path, [GOOD]).fingerprint


def test_limit_takes_the_first_usable_rows_and_reads_no_further(tmp_path):
    rows = [b"?", GOOD, GOOD, {"prompt": "b", "response": "c"}, {"prompt": "d", "response": "e"}, b"?"]
    dataset = _read(tmp_path, rows, limit=2)
    assert [example.line for example in dataset.examples] == [2, 4]
    assert [skipped.line for skipped in dataset.skipped] == [1, 3]


def test_a_limit_above_the_number_of_rows_takes_them_all(tmp_path):
    assert len(_read(tmp_path, [GOOD], limit=9).examples) == 1


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--limit must be at least 1, not 0"):
        _read(tmp_path, [GOOD], limit=0)


def test_a_file_without_a_usable_row_tells_the_first_reasons_and_the_columns(tmp_path):
    rows = [{"qText": "a", "answers": []}, b"?", {"prompt": "a", "response": ""}, b"!"]
    with pytest.raises(DataError, match="none of its 4 rows can be used") as caught:
        _read(tmp_path, rows)
    hint = caught.value.hint
    assert hint.startswith("line 1: no known columns (found: qText, answers); line 2: bad JSON")
    assert "line 3: an empty response" in hint and "line 4" not in hint and "instruction and output" in hint


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n\n"), ("a.csv", "prompt,response\n"), ("a.json", "[]")])
def test_a_file_without_rows_is_an_error(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="it has no rows") as caught:
        read_examples(tmp_path / name)
    assert caught.value.hint.startswith("Columns understood")


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "deep")
    (tmp_path / "deep").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError):
        read_examples(tmp_path / "loop.jsonl")


def test_meta_is_valid_json_whatever_the_columns_held(tmp_path):
    line = b'{"prompt": "a", "response": "b", "x": [NaN, {"y": -Infinity}, 1e999, 1.5, true, null]}'
    example = _read(tmp_path, [line]).examples[0]
    assert example.meta == {"x": [None, {"y": None}, None, 1.5, True, None]}


def test_parquet_values_become_plain_python(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "prompt": ["a"],
        "response": ["b"],
        "half": pyarrow.array([np.float16(0.5)], pyarrow.float16()),
        "nan": [math.nan],
        "price": [decimal.Decimal("1.50")],
        "day": [datetime.date(2024, 5, 19)],
        "raw": [b"\x00\xff"],
        "pairs": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    meta = read_examples(tmp_path / "a.parquet").examples[0].meta
    expected = {"half": 0.5, "nan": None, "price": "1.50", "day": "2024-05-19", "raw": "00ff", "pairs": [["k", 1]]}
    assert meta == expected
    assert json.loads(json.dumps(meta, allow_nan=False)) == expected


def test_a_saved_dataset_reads_as_its_rows_do(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**GOOD, "n": 1}, {"prompt": "b", "response": "", "n": 2}, {"prompt": "c", "response": "d", "n": 3}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    saved, lines = read_examples(tmp_path / "saved"), _read(tmp_path, rows)
    assert saved.examples == lines.examples and saved.skipped == lines.skipped
    assert saved.fingerprint == lines.fingerprint


def _objects(rows: list[dict]) -> list:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows)
    return [rows, tuple(rows), dataset, datasets.DatasetDict(train=dataset), pandas.DataFrame(rows)]


def test_an_object_reads_as_a_file_of_the_same_rows_does(tmp_path):
    rows = [{**GOOD, "n": 1}, {"prompt": "b", "response": "", "n": 2}, {**GOOD, "n": 1}, {**GOOD, "n": 3}]
    lines = _read(tmp_path, rows)
    assert [skipped.reason for skipped in lines.skipped] == ["an empty response has no gradient", "the same as line 1"]
    names = []
    for data in _objects(rows):
        dataset = read_examples(data)
        names.append(dataset.path)
        assert dataset.examples == lines.examples and dataset.fingerprint == lines.fingerprint
        assert [skipped.line for skipped in dataset.skipped] == [2, 3]
        assert dataset.skipped[1].reason == "the same as row 1"
        assert read_examples(data, limit=1).examples == lines.examples[:1]
    kinds = ["list", "tuple", "datasets.Dataset", "datasets.Dataset", "pandas.DataFrame"]
    assert names == [f"{kind} of 4 rows{' (split train)' if at == 3 else ''}" for at, kind in enumerate(kinds)]


def test_objects_of_chats_read_as_chats():
    turns = [{"role": role, "content": content} for role, content in [*CHAT, ("assistant", "Tokyo")]]
    for data in [*_objects([{"messages": turns}]), [{"messages": tuple(turns)}]]:
        assert read_examples(data).examples[0].messages == tuple(CHAT)


def test_a_frame_read_from_parquet_has_its_chats_and_lists(tmp_path):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": role, "content": content} for role, content in [*CHAT, ("assistant", "Tokyo")]]
    table = pyarrow.Table.from_pylist([{"messages": turns, "tags": ["a", "b"], "day": datetime.datetime(2024, 5, 19)}])
    parquet.write_table(table, tmp_path / "a.parquet")
    dataset = read_examples(pandas.read_parquet(tmp_path / "a.parquet"))
    assert dataset.examples == read_examples(tmp_path / "a.parquet").examples


def test_cells_of_a_frame_that_are_not_available_are_missing(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{**GOOD, "input": None, "x": 1.5, "n": None, "day": None}, {"prompt": "b", "response": None, "x": math.nan}]
    frame = pandas.DataFrame(rows)
    frame["n"], frame["day"] = pandas.array([None, 2], "Int64"), pandas.to_datetime(["NaT", "2024-05-19"])
    frame["input"] = math.nan
    dataset = read_examples(frame)
    assert dataset.examples == _read(tmp_path, rows[:1]).examples
    assert dataset.skipped == [Skipped(2, "`prompt` without a `response`, `completion` or `answer`")]


def test_a_filtered_or_formatted_dataset_object_is_read_as_filtered():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}, GOOD]).select([1])
    (example,) = read_examples(data.with_format("numpy", columns=["prompt"])).examples
    assert (example.prompt, example.line) == (GOOD["prompt"], 1)


def test_rows_of_a_list_that_are_not_dicts_are_skipped():
    dataset = read_examples(["hello", GOOD, None])
    reasons = ["not an object with columns but text", "not an object with columns but null"]
    assert dataset.skipped == [Skipped(1, reasons[0]), Skipped(3, reasons[1])]


def test_an_object_without_a_usable_row_is_named_with_the_reasons():
    with pytest.raises(DataError, match="list of 1 row has no usable example: none of its 1 rows") as caught:
        read_examples([{"prompt": "a", "response": " "}])
    assert caught.value.hint.startswith("row 1: an empty response")
    with pytest.raises(DataError, match="list of 0 rows has no usable example: it has no rows"):
        read_examples([])


@pytest.mark.parametrize("data", [None, 3, b"rows.jsonl", GOOD, {1}, iter([GOOD]), np.zeros(3)])
def test_any_other_object_is_refused_with_its_type_and_the_accepted_ones(data):
    kind = type(data).__qualname__
    with pytest.raises(DataError, match=rf"from an object of type (numpy\.)?{kind}\.") as caught:
        read_examples(data)
    assert caught.value.hint == "Give a path, a datasets.Dataset, a pandas DataFrame, or a list of dicts."


def test_datasets_without_a_known_length_or_a_train_split_are_refused():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([GOOD])
    with pytest.raises(DataError, match=r"an object of type datasets\.IterableDataset\."):
        read_examples(dataset.to_iterable_dataset())
    with pytest.raises(DataError, match=r"datasets\.DatasetDict has no split named train; found: dev") as caught:
        read_examples(datasets.DatasetDict(dev=dataset))
    assert "data['dev']" in caught.value.hint


def test_a_frame_with_two_columns_of_one_name_is_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="two columns named 'a'"):
        read_examples(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_reading_objects_imports_neither_pandas_nor_datasets():
    code = (
        "import sys; from rapidindex.data.examples import read_examples\n"
        f"read_examples([{GOOD!r}]); print({{'pandas', 'datasets', 'pyarrow'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_parquet_chats_read_as_chats(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": role, "content": content} for role, content in [*CHAT, ("assistant", "Tokyo")]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet").examples[0].messages == tuple(CHAT)
