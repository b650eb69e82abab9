"""Turn the rows of training data into examples, each with a prompt, a response and an id.

Knows neither columns (`layouts.py`) nor file formats (`files.py`) nor tokenizers (`templates.py`). A row that cannot be
used is listed with its reason, never dropped silently. An example's id is a hash of its content, the same wherever the
row stands, and whatever of it is in the loss.
"""

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.config import EncodingConfig, fingerprint
from rapidindex.data.files import Rows, source_of
from rapidindex.data.layouts import (
    CALLS,
    COLUMNS,
    REASONING,
    TEXT,
    Conversation,
    Messages,
    Turn,
    Unusable,
    conversation_of,
    is_trained,
    jsonable,
    more,
)
from rapidindex.errors import DataError, UsageError

BETWEEN = "\n\n"
"""Stands between the texts of an example's turns in its response."""


@dataclass(frozen=True)
class Example:
    """One training example."""

    id: str
    """16 hexadecimal digits: a hash of messages, response and meta."""
    prompt: str
    """The messages as text to show: `display_text`, with … in the place of turns that are in the loss."""
    response: str
    """The text the model is trained to produce: the turns in the loss, with an empty line in between; never empty."""
    meta: dict[str, Any]
    """The other columns, as values that JSON can hold."""
    line: int
    """The first line of the row in a JSONL or CSV file, elsewhere the row's number; from 1."""
    messages: Messages
    """The turns before the last one that is in the loss."""
    final: Turn | None = None
    """The last turn that is in the loss, where it is not ("assistant", response)."""
    trained: tuple[int, ...] = ()
    """The numbers of the `turns` that are in the loss; empty for the last one alone."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the tools that the model may call."""

    @property
    def is_text(self) -> bool:
        """Whether it is a text without a prompt, all of which is in the loss."""
        return self.final is not None and self.final[0] == TEXT

    def passage(self, number: int, count: int, start: int, stop: int) -> "Example":
        """Return the passage `start` to `stop` (characters) of this text, the `number`-th of `count`, from 1."""
        meta, text = dict(self.meta), self.response[start:stop]
        where = {"document": self.id, "passage": f"{number} of {count}", "characters": f"{start}-{stop}"}
        for name, value in where.items():
            meta[_free_name(name, self.meta)] = value
        id = fingerprint([self.id, start, stop, text])
        return replace(self, id=id, response=text, final=(TEXT, text), meta=meta)

    @property
    def turns(self) -> Messages:
        """The turns up to the last one that is in the loss."""
        return (*self.messages, self.final or ("assistant", self.response))

    @property
    def has_earlier_replies(self) -> bool:
        """Whether there are several assistant turns that may be in the loss."""
        return any(map(is_trained, self.messages))

    def to_record(self, loss: float, source: str = "", tokens: str = "") -> dict[str, Any]:
        """Return the stored record of the example, as JSON can hold it.

        `loss` is the mean loss over the response's tokens, rounded to 6 places; `source` names the added data that the
        example comes from, and `tokens` is the fingerprint of its encoding. What is empty is left out, and so is the
        prompt: `from_record` renders it again.
        """
        optional = {
            "final": self.final and list(self.final),
            "trained": list(self.trained),
            "tools": list(self.tools),
            "source": source,
            "tokens": tokens,
        }
        return {
            "id": self.id,
            "line": self.line,
            "messages": [list(turn) for turn in self.messages],
            "response": self.response,
            "meta": self.meta,
            "loss": round(loss, 6),
            **{name: value for name, value in optional.items() if value},
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Example":
        """Return the example that `to_record` stored."""
        messages, trained = tuple(map(tuple, record["messages"])), tuple(record.get("trained", ()))
        return cls(
            record["id"],
            _shown_prompt(messages, trained),
            record["response"],
            record["meta"],
            record["line"],
            messages,
            final=tuple(record["final"]) if "final" in record else None,
            trained=trained,
            tools=tuple(record.get("tools", ())),
        )


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used."""

    line: int
    """The row's line or number, as in `Example.line`."""
    reason: str
    """Why the row cannot be used, in a few words."""


@dataclass(frozen=True)
class Dataset:
    """The usable examples of a file, folder or object, and its rows that cannot be used."""

    path: str
    """The path, or for an object its type and length: `list of 10 rows`."""
    examples: list[Example]
    skipped: list[Skipped]
    fingerprint: str
    """16 hexadecimal digits: a hash of the examples' ids and their number, in any order."""
    loss: str = EncodingConfig.loss
    """Which assistant turns are in the loss: `all` or the `last`."""
    masked: frozenset[str] = frozenset()
    """Ids of examples that fine-tuning leaves out of the loss; they keep their places in its order and batches."""

    @property
    def texts(self) -> bool:
        """Whether all examples are texts without a prompt."""
        return all(example.is_text for example in self.examples)


def read_examples(data: Any, *, limit: int | None = None, loss: str = EncodingConfig.loss) -> Dataset:
    """Read the examples in `data`, or its first `limit` usable ones; no row after these is read.

    `data` is the path of a file or folder, a `datasets.Dataset`, a pandas DataFrame (whose NaN cells count as missing),
    or a list or other sequence of dicts. The same rows have the same ids and fingerprint in each of these forms. Rows
    that do not parse, have an empty response, or repeat an earlier row exactly are listed as skipped; blank lines are
    ignored. Of a conversation `all` assistant turns are in the loss, or the `last`.

    Raises DataError where `data` cannot be read or has no usable row, UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    source = source_of(data)
    try:
        with closing(source.read()) as rows:
            examples, skipped = _collect(rows, source.unit, limit, loss)
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}.", hint="Check the path.") from error
    if not examples:
        reasons = "; ".join(f"{source.unit} {row.line}: {row.reason}" for row in skipped[:3])
        cause = f"none of its {len(skipped)} rows can be used" if skipped else "it has no rows"
        hint = f"{reasons}. {COLUMNS}".removeprefix(". ")
        raise DataError(f"{source.name} has no usable example: {cause}.", hint=hint)
    ids = sorted(example.id for example in examples)
    return Dataset(source.name, examples, skipped, fingerprint({"count": len(ids), "ids": ids}), loss)


def listed_ids(values: Iterable[str], flag: str = "--ids") -> set[str]:
    """Return the ids of examples, each value being an id or a file with one id a line.

    Raises UsageError, which names `flag`, for a value that is neither, and where the files hold no id.
    """
    ids: set[str] = set()
    for value in values:
        is_file = Path(value).is_file()
        if not is_file and not value.isalnum():
            raise UsageError(f"{flag} {value}: there is no such file, and it is not an id.", hint="Check the path.")
        try:
            ids.update(Path(value).read_text("utf-8").split() if is_file else [value])
        except UnicodeDecodeError as error:
            hint = "Give a file with one id a line."
            raise UsageError(f"{flag} {value}: the file is not UTF-8 text.", hint=hint) from error
    if not ids:
        raise UsageError(f"The files of {flag} hold no id.", hint="Write one id a line.")
    return ids


def display_text(messages: Iterable[Turn]) -> str:
    """Join the turns into one text: the content of a lone user turn, otherwise `role: content` lines."""
    turns = list(messages)
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content, *_ in turns)


def _collect(rows: Rows, unit: str, limit: int | None, loss: str) -> tuple[list[Example], list[Skipped]]:
    examples: dict[str, Example] = {}
    skipped: list[Skipped] = []
    for line, row in rows:
        try:
            example = _example(line, row, loss)
        except Unusable as reason:
            skipped.append(Skipped(line, str(reason)))
            continue
        if example.id in examples:
            skipped.append(Skipped(line, f"the same as {unit} {examples[example.id].line}"))
            continue
        examples[example.id] = example
        if len(examples) == limit:
            break
    return list(examples.values()), skipped


def _example(line: int, row: Any, loss: str) -> Example:
    if isinstance(row, str):
        raise Unusable(row)
    try:
        conversation = conversation_of(row)
        meta = {str(key): jsonable(value) for key, value in row.items() if key not in conversation.used}
        if conversation.later:
            meta[_free_name("later_turns", meta)] = [list(turn) for turn in conversation.later]
        id = _id(conversation, meta)
    except UnicodeEncodeError as error:
        raise Unusable("not valid Unicode text (bad UTF-8 or a lone surrogate)") from error
    except RecursionError as error:
        raise Unusable("nested too deeply") from error
    messages, final = conversation.messages, conversation.final
    if not (final[1].strip() or _has_more_text(final)):
        raise Unusable(f"an empty {'text' if final[0] == TEXT else 'response'} has no gradient")
    turns = (*messages, final)
    trained = tuple(i for i, turn in enumerate(turns) if is_trained(turn) and (turn[1].strip() or _has_more_text(turn)))
    trained = trained if loss == "all" and len(trained) > 1 else ()
    response = BETWEEN.join(turns[i][1] for i in trained or [-1])
    plain = not trained and len(final) == 2 and final[0] != TEXT
    prompt = _shown_prompt(messages, trained)
    return Example(id, prompt, response, meta, line, messages, None if plain else final, trained, conversation.tools)


def _id(conversation: Conversation, meta: dict[str, Any]) -> str:
    """Hash all content. What is a prompt and its response alone is hashed as it was before there was anything else."""
    final = conversation.final
    plain = len(final) == 2 and final[0] != TEXT
    content = [conversation.messages, final[1] if plain else final, meta]
    content += [conversation.tools] if conversation.tools else []
    json.dumps(content, ensure_ascii=False).encode("utf-8")  # a lone surrogate is an error
    return fingerprint(content)


def _has_more_text(turn: Turn) -> bool:
    """Return whether the turn says anything beside its content."""
    return any(name in more(turn) for name in (CALLS, *REASONING))


def _free_name(name: str, names: Iterable[str]) -> str:
    return _free_name(f"_{name}", names) if name in names else name


def _shown_prompt(messages: Messages, trained: Iterable[int]) -> str:
    return display_text((role, "…" if i in trained else content) for i, (role, content, *_) in enumerate(messages))
