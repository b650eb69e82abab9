"""The layouts of columns that rows of training data have, each read as a conversation.

Knows columns, not files or templates. A row's first complete layout counts:

    messages or conversations       a list of {role, content} or {from, value}, or the JSON text of one
    instruction, output             Alpaca; `input` and `context` follow the instruction
    prompt or question              with response, completion, answer or chosen: texts, or lists of turns
    chosen                          a list of turns: the preferred conversation
    instruction                     with response, completion or answer (Dolly)
    text                            a passage or document without a prompt, all of it in the loss

`system` or `system_prompt`, `history` (pairs of prompt and response) and `tools` join the conversation where they hold
anything.
"""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rapidindex.data.files import kind_of

Turn = tuple[Any, ...]
"""(role, content), or (role, content, more): `more` is a dict of what else the turn holds, such as `tool_calls`."""
Messages = tuple[Turn, ...]
"""The turns of a conversation."""

COLUMNS = (
    "Columns understood: instruction and output (and input); prompt, question or instruction with response, "
    "completion, answer or chosen; messages or conversations; text."
)
WEIGHT = "weight"
"""0 under this key keeps an assistant turn out of the loss."""
CALLS = "tool_calls"
REASONING = ("reasoning_content", "reasoning", "thinking")

_PROMPTS, _RESPONSES = ("prompt", "question"), ("response", "completion", "answer", "chosen")
TEXT = "text"
"""The column of a text without a prompt, and the role of its only turn."""
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}


class Unusable(Exception):
    """A row cannot be used; the message says why."""


class Conversation(NamedTuple):
    """The content of a row."""

    messages: Messages
    """The turns before the last one that is in the loss."""
    final: Turn
    """The last turn that is in the loss."""
    later: Messages
    """Turns after it."""
    tools: tuple[dict[str, Any], ...]
    """Descriptions of the tools that the model may call."""
    used: tuple[str, ...]
    """The columns that the content comes from."""


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """Return the content of a row by its first complete layout. Raises Unusable."""
    if _is_text(row):
        return Conversation((), (TEXT, _text(row, TEXT)), (), (), (TEXT,))
    turns, used = _turns(row)
    system = next((name for name in ("system", "system_prompt") if _is_filled_text(row.get(name))), None)
    if system is not None:
        if turns and turns[0][0] == "system" and turns[0][1] != row[system]:
            raise Unusable(f"`{system}` beside another system turn")
        turns = turns if turns and turns[0][0] == "system" else (("system", row[system]), *turns)
        used = (*used, system)
    tools = tools_of(row.get("tools"))
    used = (*used, "tools") if tools else used
    trained = [number for number, turn in enumerate(turns) if is_trained(turn)]
    if not trained:
        raise Unusable(f"`{used[0]}` has no assistant turn{' of weight 1' if _has_reply(turns) else ''}")
    last = trained[-1]
    return Conversation(turns[:last], turns[last], turns[last + 1 :], tools, used)


def is_trained(turn: Turn) -> bool:
    """Return whether the turn is the assistant's, and not kept out of the loss."""
    return turn[0] == "assistant" and more(turn).get(WEIGHT) != 0


def more(turn: Turn) -> dict[str, Any]:
    """Return what the turn holds beside role and content."""
    return turn[2] if len(turn) > 2 else {}


def jsonable(value: Any) -> Any:
    """Convert a value to JSON's types: NaN and infinity become None, bytes hexadecimal, dates and the like text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    for method in ("as_py", "tolist"):  # pyarrow's scalars; numpy's scalars and arrays
        if hasattr(value, method):
            return jsonable(getattr(value, method)())
    return str(value)


def _turns(row: Mapping[str, Any]) -> tuple[Messages, tuple[str, ...]]:
    """Return the turns of a row and the columns that they come from."""
    filled = [column for column in row if row[column] is not None]
    for column in ("messages", "conversations"):
        if column in filled:
            return turns_of(row[column], column), (column,)
    if "instruction" in filled and "output" in filled:
        return _pair(row, "instruction", "output", ("input", "context"))
    prompts = [column for column in _PROMPTS if column in filled]
    responses = [column for column in _RESPONSES if column in filled]
    if responses and _is_turns(row[responses[0]]):
        turns = turns_of(row[responses[0]], responses[0])
        if turns[0][0] != "assistant":  # the whole conversation, whose prompt stands in a column of its own too
            return turns, (responses[0], *prompts[:1])
    if prompts and responses:
        return _pair(row, prompts[0], responses[0], ("context",))
    if "instruction" in filled and responses:
        return _pair(row, "instruction", responses[0], ("input", "context"))
    raise Unusable(_missing_column(row, prompts, responses))


def _pair(
    row: Mapping[str, Any], prompt: str, response: str, contexts: Sequence[str]
) -> tuple[Messages, tuple[str, ...]]:
    """Return the turns of a prompt, with what follows it in other columns, and of its response."""
    used = (prompt, response)
    if _is_turns(row[prompt]):
        # What TRL calls a prompt is not in the loss, whoever speaks in it.
        before = tuple(_untrained(turn) for turn in turns_of(row[prompt], prompt))
    else:
        text = _text(row, prompt)
        for column in contexts:
            added = _text(row, column) if row.get(column) is not None else ""
            text = f"{text}\n{added}" if added.strip() else text
            # An empty `context` stays among the other columns, as it always did: ids are hashes of these too.
            used = (*used, column) if added.strip() or column == "input" else used
        before = (("user", text),)
    history = _history(row.get("history"))
    used = (*used, "history") if history else used
    if _is_turns(row[response]):
        return (*history, *before, *turns_of(row[response], response)), used
    return (*history, *before, ("assistant", _text(row, response))), used


def _history(value: Any) -> Messages:
    if value is None or (isinstance(value, str | list | tuple) and not len(value)):
        return ()
    value = _from_json(value)
    pairs = value if isinstance(value, list | tuple) else [None]
    turns: list[Turn] = []
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Unusable("`history` is not a list of pairs of texts, prompt and response")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return tuple(turns)


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the descriptions of tools in the column `tools`, which may be JSON text. Raises Unusable."""
    value = _from_json(value)
    if value is None or (isinstance(value, str | list | tuple) and not len(value)):
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("`tools` is not a list of objects")
    return tuple(jsonable(tool) for tool in value)


def _is_text(row: Mapping[str, Any]) -> bool:
    """Return whether the row has a text, and no column of another layout."""
    others = ("messages", "conversations", "instruction", "output", *_PROMPTS, *_RESPONSES)
    return row.get(TEXT) is not None and all(row.get(column) is None for column in others)


def _missing_column(row: Mapping[str, Any], prompts: list[str], responses: list[str]) -> str:
    if prompts:
        return f"`{prompts[0]}` without a `response`, `completion` or `answer`"
    if row.get("instruction") is not None:
        return "`instruction` without an `output`"
    if responses:
        return f"`{responses[0]}` without a `prompt` or `question`"
    if row.get("output") is not None:
        return "`output` without an `instruction`"
    return f"no known columns (found: {', '.join(map(str, row)) or 'none'})"


def turns_of(value: Any, column: str) -> Messages:
    """Return the turns in a column: a list of {role, content} or {from, value}, or its JSON text. Raises Unusable."""
    turns = _from_json(value)
    if not isinstance(turns, list | tuple):
        raise Unusable(f"`{column}` is {kind_of(value)}, not a list of turns")
    return tuple(_turn(turn, number) for number, turn in enumerate(turns, 1))


def _turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise Unusable(f"turn {number} is {kind_of(turn)}, not an object with role and content")
    keys = ("from", "value") if turn.get("role") is None and turn.get("from") is not None else ("role", "content")
    role = _text(turn, keys[0], f"the {keys[0]} of turn {number}")
    role = _ROLES.get(role.strip().lower(), role)
    if turn.get("function_call") is not None or role == "function_call":
        raise Unusable(f"turn {number} is a function_call; only `tool_calls` are understood")
    extras = _extras(turn, role, number)
    if turn.get(keys[1]) is None and CALLS in extras:
        content = ""
    else:
        content = _content(turn, keys[1], number)
    return (role, content, extras) if extras else (role, content)


def _content(turn: dict[str, Any], key: str, number: int) -> str:
    """Return a turn's text, which may come in parts."""
    parts = turn.get(key)
    if not isinstance(parts, list | tuple):
        return _text(turn, key, f"the {key} of turn {number}")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        kind = other.get("type", "an object") if isinstance(other, dict) else kind_of(other)
        raise Unusable(f"turn {number} holds {kind}; only text is understood")
    return "".join(texts)


def _extras(turn: dict[str, Any], role: str, number: int) -> dict[str, Any]:
    """Return what else a template may write of a turn, and a weight of 0."""
    names = (CALLS, "tool_call_id", *REASONING, *(("name",) if role == "tool" else ()))
    extras = {name: jsonable(turn[name]) for name in names if turn.get(name)}
    if CALLS in extras:
        extras[CALLS] = _calls(extras[CALLS], number)
    weight = turn.get(WEIGHT)
    if role == "assistant" and weight is not None:
        if weight not in (0, 1):
            raise Unusable(f"the weight of turn {number} is {reprlib.repr(weight)}, not 0 or 1")
        extras |= {} if weight else {WEIGHT: 0}
    return extras


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects: templates would write OpenAI's JSON text in quotes."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unusable(f"the tool_calls of turn {number} are not a list of objects")
    functions = [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]
    for function in functions:
        if not isinstance(function.get("name"), str):
            raise Unusable(f"a tool call of turn {number} has no name")
        arguments = _from_json(function.get("arguments"))
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return calls


def _untrained(turn: Turn) -> Turn:
    return (turn[0], turn[1], {**more(turn), WEIGHT: 0}) if turn[0] == "assistant" else turn


def _has_reply(turns: Messages) -> bool:
    return any(turn[0] == "assistant" for turn in turns)


def _is_turns(value: Any) -> bool:
    value = _from_json(value) if isinstance(value, str) else value
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _is_filled_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _from_json(value: Any) -> Any:
    """Return the list or object that a text holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(row: Mapping[str, Any], column: str, name: str = "") -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable(f"{name or f'`{column}`'} is {kind_of(value)}, not text")
    return value
