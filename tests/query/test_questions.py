"""What may be asked, and in which forms."""

import pytest

from rapidindex.errors import QueryError
from rapidindex.query.questions import Query, as_query

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
        (Query("Where?", span="1"), Query("Where?", token="Japan", span="1")),
    ],
    ids=["text", "dict", "messages", "dict of messages", "conversation with its answer", "Query"],
)
def test_texts_dicts_and_messages_are_queries(value, query):
    assert as_query(value, token="Japan") == query


def test_a_conversation_is_shown_turn_by_turn():
    assert as_query(TURNS).text == "system: Be brief.\nuser: Where is tea from?"
    assert as_query("Where?").turns == (("user", "Where?"),)


@pytest.mark.parametrize("value", [3, None, {"prompt": "a", "tokken": "b"}, [], [{"role": "user"}]])
def test_anything_else_is_refused(value):
    with pytest.raises(QueryError, match="cannot be made of"):
        as_query(value)
