"""Turn an example into token ids by a prompt template, and find which tokens are the response.

Knows tokenizers, not models. Prompt and response are tokenised as one text, as in training, and the response's tokens
are found by their character offsets. `alpaca` is the prompt of the paper's Figure 5.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from rapidindex.config import EncodingConfig, fingerprint
from rapidindex.data.examples import BETWEEN, Example, display_text
from rapidindex.data.layouts import CALLS, REASONING, WEIGHT, Messages, Turn, more
from rapidindex.data.tokens import is_spaceless
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.results import Token

_TEXTS = {
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "plain": "{prompt}\n",
    "raw": "{prompt}",
}
_MARK = "rapidindex-marks-the-response"
"""Stands in for a response, to find where a chat template puts it."""
_PLACEHOLDER = re.compile(r"\{\{? ?([A-Za-z_]\w*) ?\}?\}")
_THOUGHT_ENDS = "</think>"
_CLOCK = "strftime_now"
"""What a chat template calls to read the clock."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """An example as T token ids."""

    input_ids: np.ndarray
    """int32 [T]."""
    response_mask: np.ndarray
    """bool [T]; True for the response's tokens, all False where none is left."""
    tokens: list[Token]
    """The response's tokens, in the order of `response_mask`'s True positions."""
    truncated: bool
    """Whether tokens beyond `max_length` were cut off."""
    prompt_tokens: int
    """Number of tokens before the response, including any that were cut off."""
    response: str
    """The text in which the tokens' offsets count: `Example.response`, with the tool calls and thoughts in it."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: a hash of the token ids, and of which of them are in the loss."""
        return hashlib.sha256(self.input_ids.tobytes() + self.response_mask.tobytes()).hexdigest()[:16]


class _Piece(NamedTuple):
    """A turn that is in the loss: `start` to `stop` of the rendered text is `text` from its character `offset` on."""

    start: int
    stop: int
    text: str
    offset: int = 0


class _Rendered(NamedTuple):
    """An example as one text, and its turns that are in the loss, in order."""

    text: str
    pieces: list[_Piece]


class Template:
    """A prompt template with a tokenizer: writes prompts, and encodes examples as token ids."""

    def __init__(
        self, template: str, tokenizer: Any, max_length: int, *, date: str | None = None, overlap: int | None = None
    ) -> None:
        """Take a template by name: `alpaca`, `plain`, `raw`, `chat` (the tokenizer's own), or a text with `{prompt}`.

        In such a text backslash-n stands for a new line. `max_length` is in tokens. A chat template that reads the
        clock reads `date`, or today's. Raises UsageError for any other template, ModelError for a tokenizer without
        character offsets, or without a chat template for `chat`.
        """
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            hint = "Save the model with a fast tokenizer (tokenizer.json)."
            raise ModelError(f"The tokenizer {kind} gives no character offsets.", hint=hint)
        self.name = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlap = max_length // 8 if overlap is None else overlap
        self.add_special_tokens = template != "chat"
        """Whether to add special tokens to the text of `render_prompt`; a chat template writes its own."""
        self._text = _chat_template(tokenizer) if template == "chat" else _prompt_template(template)
        self.date = (date or datetime.now().date().isoformat()) if template == "chat" and _CLOCK in self._text else None
        """The day that the template writes, as 2024-05-19; None where it reads no clock."""
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}

    @classmethod
    def of(cls, encoding: EncodingConfig, tokenizer: Any, *, date: str | None = None) -> "Template":
        """Return the template of these options; `date` takes the place of theirs. Raises as Template does."""
        return cls(
            encoding.template, tokenizer, encoding.max_length, date=date or encoding.date, overlap=encoding.overlap
        )

    @property
    def fingerprint(self) -> str:
        """The template's name (`text` for the user's own) and 16 hexadecimal digits, a hash of its text."""
        name = self.name if self.name == "chat" or self.name in _TEXTS else "text"
        return f"{name}:{fingerprint(self._text)}"

    def render_prompt(self, messages: Iterable[Turn], tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the text that the model continues with its response to `messages`, turns of (role, content)."""
        if self.name == "chat":
            return self._render(messages, tools, add_generation_prompt=True)
        return self._text.replace("{prompt}", display_text(messages))

    def encode(self, example: Example, *, end: bool = True) -> Encoding:
        """Tokenise the conversation as one text; with `end`, the token that ends a turn is part of the response.

        Tokens beyond `max_length` are cut off, which may leave no response token. Raises ModelError where the template
        refuses the example or does not write all of it.
        """
        rendered = self._render_example(example)
        ids, spans = self._tokenize(rendered.text, special=self.add_special_tokens or example.is_text)
        runs = [self._run(ids, spans, piece) for piece in rendered.pieces]
        last = runs[-1][1]
        ends = end and not example.is_text and len({*runs[-1]}) > 1
        ending = self._ending_ids(ids, last) if ends else []
        ids = ids[:last] + ending
        positions: list[int] = []
        tokens: list[Token] = []
        before = 0
        for (first, stop), piece in zip(runs, rendered.pieces, strict=True):
            tokens += [_token(span, piece, before) for span in spans[first : min(stop, self.max_length)]]
            before += len(piece.text)
            # An earlier turn ends as the last one does, or its end is not the model's to write.
            closing = ending if first < stop and ids[stop : stop + len(ending)] == ending else []
            tokens += [Token(str(self.tokenizer.convert_ids_to_tokens(id)), before, before) for id in closing]
            positions += range(first, stop + len(closing))
            before += len(BETWEEN)
        response = BETWEEN.join(piece.text for piece in rendered.pieces)
        if positions[:1] == [0]:  # nothing comes before it from which it could be predicted
            positions, tokens = positions[1:], tokens[1:]
        return self._truncated(ids, runs[0][0], positions, tokens, response)

    def encode_stored(self, record: dict[str, Any]) -> tuple[Example, Encoding]:
        """Return the example of a stored record, and its encoding.

        Raises ConfigMismatch where that is not the one of which its row was computed. Records of older versions do not
        say which it was.
        """
        example = Example.from_record(record)
        encoding = self.encode(example)
        if record.get("tokens", encoding.fingerprint) != encoding.fingerprint:
            raise ConfigMismatch(
                f"The example {example.id} (line {example.line}) becomes other tokens now than those that its row was"
                " computed from: what is shown of it would belong to another text.",
                hint="Install the transformers and tokenizers that `rapidindex info INDEX --json` names under versions,"
                " or build the index anew.",
            )
        return example, encoding

    def passages(self, example: Example) -> list[Example]:
        """Cut a text of more than `max_length` tokens into passages that overlap; any other example is left whole.

        A passage is tokenised by itself, as it is when it is read again, and its tokens fit. Every character is in one.
        """
        if not example.is_text:
            return [example]
        text, starts = example.response, []
        _, spans = self._tokenize(text, special=False)
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        first = stop = 0
        while first < len(spans) and stop < len(text):
            start = spans[first][0] if starts else 0
            last, stop = self._passage_end(text, spans, first, start, room)
            if not starts or stop > starts[-1][1]:  # several tokens may write one character
                starts.append((start, stop))
            first = max(last - min(self.overlap, room // 2), first + 1)
        if len(starts) < 2:
            return [example]
        return [example.passage(number, len(starts), *span) for number, span in enumerate(starts, 1)]

    def _passage_end(
        self, text: str, spans: list[tuple[int, int]], first: int, start: int, room: int
    ) -> tuple[int, int]:
        """Return the token after a passage from token `first` on, and the character after it."""
        count = min(room, len(spans) - first)
        while True:
            last = first + count
            stop = spans[last - 1][1] if last < len(spans) else len(text)
            more = len(self._tokenize(text[start:stop], special=False)[0]) - room
            if more <= 0 or count == 1:
                return last, stop
            count = max(1, count - more)

    def _tokenize(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text and the characters that each stands for."""
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], self._without_gaps(encoded["input_ids"], encoded["offset_mapping"])

    def _run(self, ids: list[int], spans: list[tuple[int, int]], piece: _Piece) -> tuple[int, int]:
        """Return the positions of the piece's first token and of the one after its last; twice the end for none."""
        inside = [i for i, span in enumerate(spans) if self._is_response(ids[i], span, piece)]
        return (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))

    def encode_generated(self, prompt_ids: list[int], ids: list[int]) -> tuple[str, Encoding]:
        """Return the text and the encoding of the model's own answer: the ids that it read and gave, as they are."""
        answer, tokens = continuation(self.tokenizer, prompt_ids, ids)
        positions = list(range(len(prompt_ids), len(prompt_ids) + len(ids)))
        return answer, self._truncated([*prompt_ids, *ids], len(prompt_ids), positions, tokens, answer)

    def _render_example(self, example: Example) -> _Rendered:
        turns = example.turns
        trained = example.trained or (len(turns) - 1,)
        if example.is_text:
            return _Rendered(example.response, [_Piece(0, len(example.response), example.response)])
        if self.name == "chat":
            return self._render_chat(example, turns, trained)
        self.check_plain(turns, example.tools)
        prompt = self.render_prompt(example.messages)
        prompt += _space(prompt, turns[-1][1]) if self.name == "raw" else ""
        text = prompt + turns[-1][1]
        starts, reached = [], self._text.index("{prompt}")
        for role, content, *_ in example.messages:  # as `display_text` writes them
            starts.append(reached + len(f"{role}: "))
            reached = starts[-1] + len(f"{content}\n")
        starts.append(len(prompt))
        return _Rendered(text, [_Piece(starts[i], starts[i] + len(turns[i][1]), turns[i][1]) for i in trained])

    def check_plain(self, turns: Messages, tools: Sequence[dict[str, Any]] = ()) -> None:
        """Raise ModelError where there is more than text, which a chat template alone can write."""
        if self.name != "chat" and (tools or any(name in more(turn) for turn in turns for name in (CALLS, *REASONING))):
            raise ModelError(
                f"--template {self.name} writes neither tools nor their calls nor thoughts.",
                hint="Use --template chat.",
            )

    def _render_chat(self, example: Example, turns: Messages, trained: Sequence[int]) -> _Rendered:
        text = self._render(turns, example.tools)
        return _Rendered(text, [self._find(text, turns, number, example) for number in trained])

    def _find(self, text: str, turns: Messages, number: int, example: Example) -> _Piece:
        """Find a turn where the template puts a mark in its place.

        A template may strip the turn, leave out the thought of an earlier one, or write it in another way than the mark
        (where it holds a thought, say): then the last occurrence of the response counts.
        """
        content, last = turns[number][1], number == len(turns) - 1
        before, _, after = self._render(_marked(turns, number), example.tools).rpartition(_MARK)
        start, stop = len(before), len(text) - len(after)
        if any(name in more(turns[number]) for name in (CALLS, *REASONING)):
            return self._find_whole(text, turns, number, stop if text.endswith(after) else -1, example)
        if not (text.startswith(before) and text.endswith(after) and text[start:stop].strip()):
            opening = "" if last else self._render(turns[:number], example.tools, add_generation_prompt=True)
            start = text.rfind(content.strip()) if last else text.find(content.strip(), len(opening))
            start = start if text.startswith(opening) else -1
            stop = start + len(content.strip())
        written = text[start:stop]
        at_end = len(content.rstrip()) - len(written.rstrip())
        offset = at_end if content.startswith(written.rstrip(), max(at_end, 0)) else content.find(written)
        if start < 0 or offset < 0:
            raise self._not_written(turns, number, example)
        return _Piece(start, stop, content, offset)

    def _find_whole(self, text: str, turns: Messages, number: int, stop: int, example: Example) -> _Piece:
        """Find a turn with thoughts or tool calls: all that the template writes after the prompt, to the turn's end."""
        opening = self._render(turns[:number], example.tools, add_generation_prompt=True)
        piece = text[len(opening) : stop]
        contents = [turns[number][1].strip()]
        if number == len(turns) - 1:  # thoughts of earlier turns may be left out
            contents += [more(turns[number])[name].strip() for name in REASONING if name in more(turns[number])]
        if stop < 0 or not text.startswith(opening) or not all(content in piece for content in contents):
            raise self._not_written(turns, number, example)
        return _Piece(len(opening), stop, piece)

    def without_response(self, encoding: Encoding) -> str:
        """Say why no token of an example's response is left."""
        return f"the prompt alone has {encoding.prompt_tokens} tokens, and --max-length is {self.max_length}"

    def check_whole(self, example: Example) -> None:
        """Raise ModelError where the chat template leaves out anything of the example but the thoughts before its end.

        Templates that are texts leave out nothing.
        """
        if self.name != "chat" or example.is_text:
            return
        turns, tools = example.turns, example.tools
        text = self._render(turns, tools)
        if tools and self._render(turns) == text:
            raise self._not_written(turns, None, example, "the tools")
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            content = turn[1].strip() if last else turn[1].rpartition(_THOUGHT_ENDS)[2].strip()
            written = content in text or (not last and _MARK in self._render(_marked(turns, number), tools))
            calls = [call.get("function", call)["name"] for call in more(turn).get(CALLS, ())]
            if not written or not all(name in text for name in calls):
                raise self._not_written(turns, number, example)

    def _not_written(
        self, turns: Messages, number: int | None, example: Example, what: str = "the response"
    ) -> ModelError:
        if number is not None and number < len(turns) - 1:
            what = f"turn {number + 1} ({turns[number][0]})"
        return ModelError(
            f"The chat template does not write {what} of the example {example.id} (line {example.line}).",
            hint="Use a model whose chat template does." if example.tools else "Use --template alpaca.",
        )

    def _render(
        self, messages: Iterable[Turn], tools: Sequence[dict[str, Any]] = (), *, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        turns = [{"role": turn[0], "content": turn[1], **_written(more(turn))} for turn in messages]
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            if self.date is not None:
                options["chat_template"] = _stopped_clock(self.date) + self.tokenizer.get_chat_template(**options)
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except (TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns) or "none"
            message = f"The tokenizer's chat template refuses a conversation with the turns {roles}: {error}."
            raise ModelError(message, hint="Use --template alpaca.") from error

    def _without_gaps(self, ids: list[int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Extend the tokens' spans over characters, mostly spaces, that some tokenizers leave out of their offsets."""
        reached, extended = 0, []
        for id, (start, stop) in zip(ids, spans, strict=True):
            extended.append((start if id in self._special_ids else min(start, reached), stop))
            reached = max(reached, stop)
        return extended

    def _is_response(self, id: int, span: tuple[int, int], piece: _Piece) -> bool:
        """Return whether the token overlaps the piece; a special token, which may hold spaces, must lie within."""
        start, stop = span
        if id in self._special_ids:
            return piece.start <= start < stop <= piece.stop
        return stop > piece.start and start < piece.stop

    def _ending_ids(self, ids: list[int], last: int) -> list[int]:
        """Return the token ids that end the turn, where the response's own tokens end before position `last`."""
        if self.name == "chat":
            closing = next((i for i in range(last, len(ids)) if ids[i] in self._special_ids), last - 1)
            return ids[last : closing + 1]
        eos = self.tokenizer.eos_token_id
        return [] if eos is None or ids[last - 1] == eos else [eos]

    def _truncated(
        self, ids: list[int], first: int, positions: list[int], tokens: list[Token], response: str
    ) -> Encoding:
        input_ids = np.array(ids[: self.max_length], dtype=np.int32)
        mask = np.zeros(len(input_ids), dtype=bool)
        mask[[position for position in positions if position < len(input_ids)]] = True
        return Encoding(input_ids, mask, tokens[: int(mask.sum())], len(ids) > self.max_length, first, response)


def encode_examples(
    template: Template, examples: Iterable[Example]
) -> tuple[list[tuple[Example, Encoding]], list[tuple[Example, ModelError]]]:
    """Encode examples, long texts as passages.

    The second list has those that the template refuses or does not write whole, with the error.
    """
    encoded, refused = [], []
    for example in examples:
        try:
            template.check_whole(example)
            encoded += [(passage, template.encode(passage)) for passage in template.passages(example)]
        except ModelError as error:
            refused.append((example, error))
    return encoded, refused


def check_template(template: str) -> None:
    """Raise UsageError for a text with another placeholder than `{prompt}`, which would be written as it stands."""
    others = [name for name in _PLACEHOLDER.findall(template) if name != "prompt"]
    if others:
        raise UsageError(
            f"--template has {{{others[0]}}} in it; {{prompt}} is the only placeholder.",
            hint="The response follows the text by itself: leave the other placeholder out.",
        )


def _prompt_template(template: str) -> str:
    if template in _TEXTS:
        return _TEXTS[template]
    if "{prompt}" not in template:
        choices = ", ".join(_TEXTS)
        hint = f"Choose one of {choices}, chat, or give a text with {{prompt}} in it."
        raise UsageError(f"--template {template!r} is unknown.", hint=hint)
    return template.replace("\\n", "\n")


def _chat_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        hint = "Use --template alpaca, or a model with a chat template."
        raise ModelError("The model's tokenizer has no chat template of its own.", hint=hint) from error


def _space(prompt: str, answer: str) -> str:
    """Return the space that a word needs behind a prompt which it continues."""
    glued = not prompt or prompt[-1].isspace() or prompt[-1] in "([{-/\"'“‘«" or not answer[:1].isalnum()
    return "" if glued or is_spaceless(answer[0]) or is_spaceless(prompt[-1]) else " "


def _marked(turns: Messages, number: int) -> Messages:
    """Return the turns with a mark in the place of what one of them says."""
    kept = {name: value for name, value in more(turns[number]).items() if name not in (CALLS, *REASONING)}
    return (*turns[:number], (turns[number][0], _MARK, kept), *turns[number + 1 :])


def _written(extras: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extras.items() if name != WEIGHT}


def _stopped_clock(date: str) -> str:
    """Return a Jinja macro that takes the place of the clock in a chat template: midnight of a day."""
    day = datetime.fromisoformat(date)
    macro = "{%- macro " + _CLOCK + "(format) -%}{{ format"
    for code in ["-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdeFhHIjmMpRSTuUwVxXyYzZ", "%"]:
        macro += f" | replace({f'%{code}'!r}, {day.strftime(f'%{code}')!r})"
    return macro + " }}{%- endmacro -%}"


def _token(span: tuple[int, int], piece: _Piece, before: int) -> Token:
    """Return a token of a piece, with its place in the response, where `before` characters precede the piece."""
    clipped = (min(max(at, piece.start), piece.stop) for at in span)
    start, stop = (at - piece.start + piece.offset for at in clipped)
    return Token(piece.text[start:stop], before + start, before + stop)


def continuation(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> tuple[str, list[Token]]:
    """Return the text that `ids` write behind `prompt_ids`, without special tokens, and what each of them writes of it.

    A space at its start is kept, which a SentencePiece tokenizer drops at the start of a text. Each of several tokens
    that write one character stands for the whole of it.
    """
    texts = [
        tokenizer.decode([*prompt_ids, *ids[:n]], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for n in range(len(ids) + 1)
    ]
    whole = texts[-1]
    written = [len(os.path.commonprefix([text, whole])) for text in texts]  # half a character is not written yet
    tokens = []
    for n, id in enumerate(ids):
        start, end = written[n : n + 2]
        if not whole.startswith(texts[n + 1]):
            end = next((later for later in written[n + 1 :] if later > start), start)
        text = whole[start:end] or str(tokenizer.convert_ids_to_tokens(id))
        tokens.append(Token(text, start - written[0], end - written[0]))
    return whole[written[0] :], tokens
