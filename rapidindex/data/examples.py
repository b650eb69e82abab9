"""Turn the rows of training data into examples, each with a prompt, a response and an id.

Knows columns, not file formats (`files.py`) or tokenizers (`templates.py`). A row that cannot be used is listed with
its reason, never dropped silently. An example's id is a hash of its content, the same wherever the row stands.

These columns are understood. A row's first complete layout counts, and its other columns are kept as `meta`:

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
from rapidindex.data.files import Rows, kind_of, source_of
from rapidindex.errors import DataError, UsageError

Messages = tuple[tuple[str, str], ...]
"""The turns of a conversation: (role, content)."""

_COLUMNS = (
    "Columns understood: instruction and output (and input); prompt or question with response, completion or answer; "
    "messages or conversations."
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Example:
    """One training example."""

    id: str
    """16 hexadecimal digits: a hash of messages, response and meta."""
    prompt: str
    """The messages as text to show: `display_text(messages)`."""
    response: str
    """The text the model is trained to produce; never empty."""
    meta: dict[str, Any]
    """The other columns, as values that JSON can hold."""
    line: int
    """The first line of the row in a JSONL or CSV file, elsewhere the row's number; from 1."""
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


class _Unusable(Exception):
    """A row cannot be used; the message says why."""


class _Parts(NamedTuple):
    """The content of a row."""

    messages: Messages
    response: str
    used: tuple[str, ...]
    """The columns that the content comes from."""
    later: Messages = ()
    """Turns after the response."""


def read_examples(data: Any, *, limit: int | None = None) -> Dataset:
    """Read the examples in `data`, or its first `limit` usable ones; no row after these is read.

    `data` is the path of a file or folder, a `datasets.Dataset`, a pandas DataFrame (whose NaN cells count as missing),
    or a list or other sequence of dicts. The same rows have the same ids and fingerprint in each of these forms. Rows
    that do not parse, have an empty response, or repeat an earlier row exactly are listed as skipped; blank lines are
    ignored.

    Raises DataError where `data` cannot be read or has no usable row, UsageError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")
    source = source_of(data)
    try:
        with closing(source.read()) as rows:
            examples, skipped = _collect(rows, source.unit, limit)
    except OSError as error:
        raise DataError(f"{source.name} cannot be read: {error.strerror or error}.", hint="Check the path.") from error
    if not examples:
        reasons = "; ".join(f"{source.unit} {row.line}: {row.reason}" for row in skipped[:3])
        cause = f"none of its {len(skipped)} rows can be used" if skipped else "it has no rows"
        hint = f"{reasons}. {_COLUMNS}".removeprefix(". ")
        raise DataError(f"{source.name} has no usable example: {cause}.", hint=hint)
    ids = sorted(example.id for example in examples)
    return Dataset(source.name, examples, skipped, fingerprint({"count": len(ids), "ids": ids}))


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


def display_text(messages: Iterable[tuple[str, str]]) -> str:
    """Join the turns into one text: the content of a lone user turn, otherwise `role: content` lines."""
    turns = list(messages)
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


def _collect(rows: Rows, unit: str, limit: int | None) -> tuple[list[Example], list[Skipped]]:
    examples: dict[str, Example] = {}
    skipped: list[Skipped] = []
    for line, row in rows:
        try:
            example = _example(line, row)
        except _Unusable as reason:
            skipped.append(Skipped(line, str(reason)))
            continue
        if example.id in examples:
            skipped.append(Skipped(line, f"the same as {unit} {examples[example.id].line}"))
            continue
        examples[example.id] = example
        if len(examples) == limit:
            break
    return list(examples.values()), skipped


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
    """Return the content of a row by its first complete layout of columns."""
    filled = [column for column in row if row[column] is not None]
    for column in ("messages", "conversations"):
        if column in filled:
            return _conversation(row[column], column)
    if "instruction" in filled and "output" in filled:
        instruction, context = _text(row, "instruction"), _text(row, "input") if "input" in filled else ""
        prompt = f"{instruction}\n{context}" if context.strip() else instruction
        return _Parts((("user", prompt),), _text(row, "output"), ("instruction", "input", "output"))
    prompts = [column for column in ("prompt", "question") if column in filled]
    responses = [column for column in ("response", "completion", "answer") if column in filled]
    if prompts and responses:
        used = (prompts[0], responses[0])
        return _Parts((("user", _text(row, used[0])),), _text(row, used[1]), used)
    raise _Unusable(_missing_column(row, prompts, responses))


def _missing_column(row: dict[str, Any], prompts: list[str], responses: list[str]) -> str:
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
    if not isinstance(turns, list | tuple):
        raise _Unusable(f"`{column}` is {kind_of(turns)}, not a list of turns")
    messages = tuple(_turn(turn, number) for number, turn in enumerate(turns, 1))
    assistant_turns = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    if not assistant_turns:
        raise _Unusable(f"`{column}` has no assistant turn")
    last = assistant_turns[-1]
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
    """Convert a value to JSON's types: NaN and infinity become None, bytes hexadecimal, dates and the like text."""
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
