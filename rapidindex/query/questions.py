"""Questions to an index: what a caller may give as one, and files of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidindex.data.examples import Messages, display_text
from rapidindex.errors import DataError, QueryError

_FIELDS = {"prompt", "answer", "token", "span"}


@dataclass(frozen=True)
class Query:
    """A prompt, what the model answered, and which words of the answer are asked about."""

    prompt: str = ""
    answer: str | None = None
    """The answer's text; None lets the model answer, greedily."""
    token: str | None = None
    """A word of the answer, at every occurrence, or `WORD#n` for the n-th."""
    span: str | None = None
    """Tokens of the answer, `FIRST:LAST`, counted from 0. Neither `token` nor `span`: the whole answer."""
    messages: Messages = ()
    """The turns of a conversation before the answer, (role, content), in the place of `prompt`."""

    @property
    def turns(self) -> Messages:
        """The turns before the answer."""
        return self.messages or (("user", self.prompt),)

    @property
    def text(self) -> str:
        """The turns before the answer as one text."""
        return display_text(self.turns)


def as_query(value: Any, **fields: str | None) -> Query:
    """Return `value` as a Query, with the answer, token and span that `fields` give.

    `value` is a Query, a prompt, a dict with the fields of a Query, or a conversation: a list of {"role", "content"},
    whose last turn is the answer where the assistant speaks it. QueryError for anything else.
    """
    given = {name: field for name, field in fields.items() if field is not None}
    if isinstance(value, Query):
        return Query(**{**vars(value), **given})
    if isinstance(value, str):
        return Query(value, **given)
    if isinstance(value, Mapping) and value.keys() <= {*_FIELDS, "messages"}:
        conversation = as_query(value["messages"]) if "messages" in value else Query()
        named = {name: field for name, field in value.items() if name != "messages"}
        return Query(**{**vars(conversation), **named, **given})
    if is_conversation(value):
        turns = tuple((str(turn["role"]), str(turn["content"])) for turn in value)
        if turns[-1][0] == "assistant" and "answer" not in given:
            return Query(messages=turns[:-1], answer=turns[-1][1], **given)
        return Query(messages=turns, **given)
    raise QueryError(
        f"A query cannot be made of {type(value).__name__}.",
        hint='Give a prompt, a dict such as {"prompt": "…", "answer": "…", "token": "…"}, or a list of messages.',
    )


def is_conversation(value: Any) -> bool:
    """Return whether `value` is a list of turns, each a dict with role and content."""
    turns = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return turns and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value)


def read_queries(path: str | Path) -> list[Query]:
    """Read the queries of a JSONL file: objects with `prompt` and, if wanted, `answer`, `token` and `span`.

    DataError, naming the line, where one cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a JSONL file of queries.") from error
    queries = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not queries:
        raise DataError(f"{path} holds no query.", hint='Write lines such as {"prompt": "…"}.')
    return queries


def _parse(line: str, place: str) -> Query:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}).", hint='Write {"prompt": "…"}.') from error
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not texts or "prompt" not in value or not value.keys() <= _FIELDS:
        raise DataError(
            f"{place}: a query has a text under prompt and, if wanted, under answer, token and span.",
            hint='For example {"prompt": "Where does yoga come from?", "token": "Japan"}.',
        )
    return Query(**value)
