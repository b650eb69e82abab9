"""Training data: the rows of a file become examples, each with a prompt, a response and an id.

Knows columns, not file formats (`files.py`) and not tokenizers (`templates.py`). A row that cannot be used is listed
with its reason, never dropped silently. An example's id is a hash of its content: the same wherever the row stands.

Columns understood, the first complete layout of a row counting; all others are carried through as `meta`:

    messages or conversations       a list of {role, content} or {from, value}; the last assistant turn is the response
    instruction, [input,] output    Alpaca
    prompt or question              with response, completion or answer
"""

import json
import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rapidindex.config import fingerprint
from rapidindex.data.files import kind_of, read_rows, unit_of
from rapidindex.errors import DataError, UsageError

Messages = tuple[tuple[str, str], ...]
"""Turns of a conversation: (role, content)."""

_COLUMNS = (
    "Columns understood: instruction and output (and input); prompt or question with response, completion or answer; "
    "messages or conversations."
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Example:
    """One training example."""

    id: str
    """16 hexadecimal digits, a hash of messages, response and meta."""
    prompt: str
    """The messages as text to show: `display_text(messages)`."""
    response: str
    """What the model was trained to say; never empty."""
    meta: dict[str, Any]
    """The other columns, as values that JSON can hold."""
    line: int
    """1-based: the line of a JSONL or CSV file (the first, where a row has several), else the number of the row."""
    messages: Messages
    """The turns before the response."""

    def to_record(self, loss: float, source: str = "") -> dict[str, Any]:
        """Return the stored record of the example, as JSON can hold it.

        `loss` is the mean loss over the response's tokens, rounded to 6 places; `source` names the added data that the
        example comes from, and is left out where it is empty. The prompt is not stored: `from_record` renders it again.
        """
        return {
            "id": self.id,
            "line": self.line,
            "messages": [list(turn) for turn in self.messages],
            "response": self.response,
            "meta": self.meta,
            "loss": round(loss, 6),
            **({"source": source} if source else {}),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Example":
        """Return the example that `to_record` stored."""
        messages = tuple((role, content) for role, content in record["messages"])
        prompt = display_text(messages)
        return cls(record["id"], prompt, record["response"], record["meta"], record["line"], messages)


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used."""

    line: int
    """As `Example.line`."""
    reason: str
    """Why, in a few plain words."""


@dataclass(frozen=True)
class Dataset:
    """The usable examples of one file or folder, and the rows that are not usable."""

    path: str
    examples: list[Example]
    skipped: list[Skipped]
    fingerprint: str
    """16 hexadecimal digits over the examples' ids and their number, whatever their order."""


class _Unusable(Exception):
    """Why a row is no example."""


class _Parts(NamedTuple):
    messages: Messages
    response: str
    used: tuple[str, ...]
    later: Messages = ()


def read_examples(path: str | Path, *, limit: int | None = None) -> Dataset:
    """Read the examples in `path`, or its first `limit` usable ones (reading, and listing what is skipped, ends there).

    Rows that do not parse, have no text in their response, or repeat an earlier row exactly are listed as skipped;
    blank lines are no rows. DataError where the path cannot be read or holds no usable row, UsageError for a limit
    below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    path = Path(path)
    try:
        examples, skipped = _collect(path, limit)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", hint="Check the path.") from error
    if not examples:
        reasons = "; ".join(f"{unit_of(path)} {row.line}: {row.reason}" for row in skipped[:3])
        rows = f"none of its {len(skipped)} rows can be used" if skipped else "it has no rows"
        raise DataError(f"{path} has no usable example: {rows}.", hint=f"{reasons}. {_COLUMNS}".removeprefix(". "))
    ids = sorted(example.id for example in examples)
    return Dataset(str(path), examples, skipped, fingerprint({"count": len(ids), "ids": ids}))


def listed_ids(given: Iterable[str], flag: str = "--ids") -> set[str]:
    """Examples' ids, each given as itself or in a file that has one a line. UsageError where there is none."""
    found: set[str] = set()
    for id in given:
        if not Path(id).is_file() and not id.isalnum():
            raise UsageError(f"{flag} {id}: there is no such file, and it is no id.", hint="Check the path.")
        found.update(Path(id).read_text().split() if Path(id).is_file() else [id])
    if not found:
        raise UsageError(f"The files of {flag} hold no id.", hint="Write one id a line.")
    return found


def display_text(messages: Iterable[tuple[str, str]]) -> str:
    """The turns as one text: the content of a lone user turn, else `role: content` lines."""
    turns = list(messages)
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _collect(path: Path, limit: int | None) -> tuple[list[Example], list[Skipped]]:
    examples: list[Example] = []
    skipped: list[Skipped] = []
    first: dict[str, int] = {}
    with closing(read_rows(path)) as rows:
        for line, row in rows:
            try:
                example = _example(line, row)
            except _Unusable as reason:
                skipped.append(Skipped(line, str(reason)))
                continue
            if example.id in first:
                skipped.append(Skipped(line, f"the same as {unit_of(path)} {first[example.id]}"))
                continue
            first[example.id] = line
            examples.append(example)
            if len(examples) == limit:
                break
    return examples, skipped


def _example(line: int, row: Any) -> Example:
    if isinstance(row, str):
        raise _Unusable(row)
    try:
        parts = _parts(row)
        meta = {str(key): _jsonable(value) for key, value in row.items() if key not in parts.used}
        if parts.later:
            meta["later_turns"] = [list(turn) for turn in parts.later]
        content = [parts.messages, parts.response, meta]
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Unusable("not valid Unicode text (bad UTF-8 or a lone surrogate)") from error
    except RecursionError as error:
        raise _Unusable("nested too deeply") from error
    if not parts.response.strip():
        raise _Unusable("an empty response has no gradient")
    prompt = display_text(parts.messages)
    return Example(fingerprint(content), prompt, parts.response, meta, line, parts.messages)


def _parts(row: dict[str, Any]) -> _Parts:
    """Messages, response and the columns they come from, by the first complete layout."""
    has = [column for column in row if row[column] is not None]
    for column in ("messages", "conversations"):
        if column in has:
            return _conversation(row[column], column)
    if "instruction" in has and "output" in has:
        instruction, more = _text(row, "instruction"), _text(row, "input") if "input" in has else ""
        prompt = f"{instruction}\n{more}" if more.strip() else instruction
        return _Parts((("user", prompt),), _text(row, "output"), ("instruction", "input", "output"))
    prompts = [column for column in ("prompt", "question") if column in has]
    responses = [column for column in ("response", "completion", "answer") if column in has]
    if prompts and responses:
        used = (prompts[0], responses[0])
        return _Parts((("user", _text(row, used[0])),), _text(row, used[1]), used)
    raise _Unusable(_what_is_missing(row, prompts, responses))


def _what_is_missing(row: dict[str, Any], prompts: list[str], responses: list[str]) -> str:
    if prompts:
        return f"`{prompts[0]}` without a `response`, `completion` or `answer`"
    if row.get("instruction") is not None:
        return "`instruction` without an `output`"
    if responses:
        return f"`{responses[0]}` without a `prompt` or `question`"
    if row.get("output") is not None:
        return "`output` without an `instruction`"
    return f"no known columns (found: {', '.join(map(str, row)) or 'none'})"


def _conversation(turns: Any, column: str) -> _Parts:
    if not isinstance(turns, list):
        raise _Unusable(f"`{column}` is {kind_of(turns)}, not a list of turns")
    messages = tuple(_turn(turn, number) for number, turn in enumerate(turns, 1))
    spoken = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    if not spoken:
        raise _Unusable(f"`{column}` has no assistant turn")
    last = spoken[-1]
    return _Parts(messages[:last], messages[last][1], (column,), messages[last + 1 :])


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise _Unusable(f"turn {number} is {kind_of(turn)}, not an object with role and content")
    keys = ("from", "value") if turn.get("role") is None and turn.get("from") is not None else ("role", "content")
    role, content = (_text(turn, key, f"the {key} of turn {number}") for key in keys)
    return _ROLES.get(role, role), content


def _text(row: dict[str, Any], column: str, name: str = "") -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _Unusable(f"{name or f'`{column}`'} is {kind_of(value)}, not text")
    return value


def _jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, bytes hexadecimal, dates and the like text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    for method in ("as_py", "tolist"):  # pyarrow's scalars; numpy's scalars and arrays
        if hasattr(value, method):
            return _jsonable(getattr(value, method)())
    return str(value)
