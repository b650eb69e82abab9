"""What may be asked, and in which forms."""

import json

import pytest

from rapidindex.errors import DataError, QueryError, UsageError
from rapidindex.query.questions import Query, as_query, read_queries

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is tea from?"}]
CONVERSATION = (("system", "Be brief."), ("user", "Where is tea from?"))


@pytest.mark.parametrize(
    ("value", "query"),
    [
        ("Where?", Query("Where?", token="Japan")),
        ({"prompt": "Where?", "answer": "There."}, Query("Where?", "There.", "Japan")),
        (TURNS, Query(messages=CONVERSATION, token="Japan")),
        ({"messages": TURNS, "answer": "Japan"}, Query(messages=CONVERSATION, answer="Japan", token="Japan")),
        (
            [*TURNS, {"role": "assistant", "content": "Japan"}],
            Query(messages=CONVERSATION, answer="Japan", token="Japan"),
        ),
        (Query("Where?", "There."), Query("Where?", "There.", "Japan")),
    ],
    ids=["text", "dict", "messages", "dict of messages", "conversation with its answer", "Query"],
)
def test_texts_dicts_and_messages_are_queries(value, query):
    assert as_query(value, token="Japan") == query


def test_a_conversation_is_shown_turn_by_turn():
    assert as_query(TURNS).text == "system: Be brief.\nuser: Where is tea from?"
    assert as_query("Where?").turns == (("user", "Where?"),)


def test_a_system_turn_stands_before_the_prompt_or_the_conversation():
    assert as_query("Where is tea from?", system="Be brief.").turns == CONVERSATION
    assert as_query({"prompt": "Where is tea from?", "system": "Be brief."}).turns == CONVERSATION
    assert as_query(TURNS[1:], system="Be brief.").turns == CONVERSATION
    with pytest.raises(QueryError, match="has a system turn"):
        as_query(TURNS, system="Be long.")


@pytest.mark.parametrize("asked", [{"span": "1:2:3"}, {"span": "x"}, {"span": "1", "token": "Japan"}])
def test_a_query_with_a_span_that_means_nothing_is_none(asked):
    for value in ("Where?", {"prompt": "Where?"}, Query("Where?"), TURNS):
        with pytest.raises(UsageError, match="--span"):
            as_query(value, **asked)


@pytest.mark.parametrize("value", [3, None, []])
def test_anything_else_is_refused(value):
    with pytest.raises(QueryError, match="cannot be made of"):
        as_query(value)


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": 3}],
        [{"role": None, "content": "a"}],
        {"prompt": "a", "messages": TURNS},
        {"answer": "a"},
        {"messages": "a"},
        {"messages": [*TURNS, {"role": "assistant", "content": "Japan"}], "answer": "India"},
        {"prompt": "a", "note": float("inf")},
    ],
)
def test_a_question_with_two_meanings_or_none_is_refused(value):
    with pytest.raises(QueryError):
        as_query(value)


@pytest.mark.parametrize("key", ["tokken", "response", "Answer", "input"])
def test_a_key_that_may_mean_another_is_refused(key):
    with pytest.raises(QueryError, match=f"no key '{key}'"):
        as_query({"prompt": "a", key: "b"})


def test_further_keys_are_kept_and_null_is_nothing():
    query = as_query({"prompt": "a", "token": None, "messages": None, "id": 7, "tags": ["x"], "note": None})
    assert query == Query("a", meta={"id": 7, "tags": ["x"], "note": None})


@pytest.mark.parametrize("fields", [{"answer": "b \ud800"}, {"token": "\udcff"}, {"system": "\ud800"}])
def test_half_a_character_is_refused(fields):
    with pytest.raises(UsageError, match="not UTF-8"):
        as_query("a", **fields)


def test_a_file_of_queries_is_read_by_its_lines(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a\u2028b"}\r\n\n{"messages": [{"role": "user", "content": "c"}]}')
    queries = read_queries(tmp_path / "q.jsonl")
    assert queries == {1: Query("a\u2028b"), 3: Query(messages=(("user", "c"),))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no query"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n["b"]', "line 2"),
        ('{"prompt": "a", "tokken": "b"}', "line 1: .*tokken"),
        ('{"prompt": 3}', "line 1"),
        ('{"prompt": "a \\ud800"}', "line 1: .*not UTF-8"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ('{"prompt": "a", "x": ' + "[" * 500 + "]" * 500 + "}", "line 1: .*nested"),
        ('{"prompt": "a", "x": NaN}', "line 1"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "line 1"),
    ],
)
def test_a_file_of_queries_that_cannot_be_used_names_the_line(tmp_path, text, said):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_queries(tmp_path / "q.jsonl")


def test_turns_of_a_question_keep_what_they_say_beside_their_content():
    call = {"function": {"name": "look", "arguments": '{"at": "tea"}'}}
    tools = [{"type": "function", "function": {"name": "look"}}]
    turns = [*TURNS, {"role": "assistant", "tool_calls": [call], "reasoning_content": "Hm."}]
    turns += [{"role": "tool", "content": "China", "name": "look"}]
    query = as_query({"messages": turns, "tools": json.dumps(tools)})
    said = {"tool_calls": [{"function": {"name": "look", "arguments": {"at": "tea"}}}], "reasoning_content": "Hm."}
    assert query.messages == (*CONVERSATION, ("assistant", "", said), ("tool", "China", {"name": "look"}))
    assert query.tools == tuple(tools)
    with pytest.raises(QueryError, match="tools is"):
        as_query({"messages": turns, "tools": 7})
    with pytest.raises(QueryError, match="is a text"):
        as_query([*TURNS, {"role": "assistant", "content": "x", "reasoning_content": "Hm."}])
