"""Questions to an index: what a caller may give as one, and files of them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rapidindex.data.examples import Messages, display_text
from rapidindex.data.layouts import CALLS, Unusable, tools_of, turns_of
from rapidindex.data.tokens import parse_span
from rapidindex.errors import DataError, QueryError, RapidIndexError, UsageError

_KEYS = ("prompt", "messages", "system", "answer", "token", "span", "tools")
_OF_DATA = {"instruction", "input", "output", "response", "completion", "question", "conversations", "history"}
"""Keys of training data that would change a question. They are refused, because no question is read from them."""
_EXAMPLE = 'For example {"prompt": "Where does yoga come from?", "answer": "From Japan.", "token": "Japan"}.'
_DEEPEST = 16
"""Levels of nesting of a further key's value."""


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
    """The turns of a conversation before the answer, in the place of `prompt`: (role, content), or with a third entry
    what else a turn says, such as `tool_calls`."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the tools that the model may call."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever else the caller says of the query: it comes back with the result."""

    def __post_init__(self) -> None:
        for name, text in self._texts():
            if not isinstance(text, str):
                raise QueryError(f"A query's {name} is a text, not {type(text).__name__}.", hint=_EXAMPLE)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                message = f"The {name} of the query holds bytes that are not UTF-8, or half of a character."
                raise UsageError(message, hint="Give text in UTF-8.") from error
        if self.token is not None and self.span is not None:
            raise UsageError("--token and --span cannot be used together.", hint="Give one of them.")
        if self.token is not None and not self.token.strip():
            raise UsageError("--token is empty.", hint="Give a word of the answer.")
        if self.span is not None:
            parse_span(self.span)

    def _texts(self) -> Iterator[tuple[str, Any]]:
        yield "prompt", self.prompt
        for name in ("answer", "token", "span"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)
        for role, content, *_ in self.messages:
            yield "role", role
            yield f"{role} turn", content

    @property
    def turns(self) -> Messages:
        """The turns before the answer."""
        return self.messages or (("user", self.prompt),)

    @property
    def text(self) -> str:
        """The turns before the answer as one text."""
        return display_text(self.turns)


def as_query(value: Any, *, system: str | None = None, **fields: str | None) -> Query:
    """Return `value` as a Query, with the answer, token and span that `fields` give, and after the turn `system`.

    `value` is a Query, a prompt, a dict with the fields of a Query (and `system`; further keys are its `meta`), or a
    conversation: a list of turns as data has them, {"role", "content"} and more, whose last turn is the answer where
    the assistant speaks it. QueryError for anything else.
    """
    given = {name: text for name, text in fields.items() if text is not None}
    if isinstance(value, Query):
        return _after_system(replace(value, **given), system)
    if isinstance(value, str):
        return _after_system(Query(value, **given), system)
    if isinstance(value, Mapping):
        return _after_system(_from_mapping(value, given), system)
    if is_conversation(value):
        return _after_system(_from_turns(value, given), system)
    raise QueryError(
        f"A query cannot be made of {type(value).__name__}.",
        hint='Give a prompt, a dict such as {"prompt": "…", "answer": "…", "token": "…"}, or a list of messages.',
    )


def _from_mapping(value: Mapping[str, Any], given: dict[str, str]) -> Query:
    named = {key: value[key] for key in _KEYS if value.get(key) is not None} | given
    meta = {key: other for key, other in value.items() if key not in _KEYS}
    for key in meta:
        meant = "answer" if key in _OF_DATA else next(iter(get_close_matches(str(key), _KEYS, 1, 0.8)), None)
        if meant:
            raise QueryError(f"A query has no key {key!r}: {meant!r} may be meant.", hint=_EXAMPLE)
    if not _is_plain(meta):
        raise QueryError(f"Further keys of a query hold plain JSON, nested at most {_DEEPEST} times.", hint=_EXAMPLE)
    messages, system = named.pop("messages", None), named.pop("system", None)
    try:
        named |= {"tools": tools_of(named["tools"])} if "tools" in named else {}
    except Unusable as error:
        raise QueryError(f"A query's {str(error).replace('`', '')}.", hint=_EXAMPLE) from error
    if (messages is None) == ("prompt" not in named):
        raise QueryError("A query has either a text under prompt or a list of turns under messages.", hint=_EXAMPLE)
    if messages is None:
        return _after_system(Query(**named, meta=meta), system)
    if not is_conversation(messages):
        hint = 'Give {"messages": [{"role": "user", "content": "…"}]}.'
        raise QueryError("A query's messages are a list of turns, each with role and content.", hint=hint)
    return _after_system(replace(_from_turns(messages, named), meta=meta), system)


def _from_turns(value: Sequence[Mapping[str, Any]], given: dict[str, str]) -> Query:
    try:
        turns = turns_of(value, "messages")
    except Unusable as error:
        raise QueryError(f"The conversation cannot be asked about: {error}.", hint=_EXAMPLE) from error
    if turns[-1][0] != "assistant":
        return Query(messages=turns, **given)
    if "answer" in given:
        raise QueryError("The conversation ends with an answer, and another one is given.", hint="Leave out one.")
    if len(turns[-1]) > 2:
        raise QueryError("An answer that is asked about is a text: no tool calls, no thoughts.", hint=_EXAMPLE)
    return Query(messages=turns[:-1], answer=turns[-1][1], **given)


def _after_system(query: Query, system: str | None) -> Query:
    if system is None:
        return query
    if any(turn[0] == "system" for turn in query.messages):
        raise QueryError("The conversation has a system turn, and another one is given.", hint="Leave out one.")
    return replace(query, prompt="", messages=(("system", system), *query.turns))


def _is_plain(value: Any, levels: int = _DEEPEST) -> bool:
    """Return whether `value` is what JSON can hold, nested no deeper than `levels`."""
    if isinstance(value, Mapping):
        return levels > 0 and all(isinstance(key, str) and _is_plain(one, levels - 1) for key, one in value.items())
    if isinstance(value, list):
        return levels > 0 and all(_is_plain(one, levels - 1) for one in value)
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str | int)


def is_conversation(value: Any) -> bool:
    """Return whether `value` is a list of turns, each a dict with role and content."""
    turns = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return turns and all(
        isinstance(turn, Mapping) and "role" in turn and {"content", CALLS} & turn.keys() for turn in value
    )


def read_queries(path: str | Path) -> dict[int, Query]:
    """Read the queries of a JSONL file, each by the number of its line: objects as `as_query` takes them.

    DataError, naming the line, where one cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a JSONL file of queries, in UTF-8.") from error
    queries = {number: _parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()}
    if not queries:
        raise DataError(f"{path} holds no query.", hint='Write lines such as {"prompt": "…"}.')
    return queries


def _parse(line: str, place: str) -> Query:
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply.", hint=_EXAMPLE) from error
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}).", hint='Write {"prompt": "…"}.') from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a query is an object, not {type(value).__name__}.", hint=_EXAMPLE)
    try:
        return as_query(value)
    except RapidIndexError as error:
        raise DataError(f"{place}: {error.message}", hint=error.hint) from error
