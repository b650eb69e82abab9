"""Turn an example into token ids by a prompt template, and find which tokens are the response.

Knows tokenizers, not models. Prompt and response are tokenised as one text, as in training, and the response's tokens
are found by their character offsets. `alpaca` is the prompt of the paper's Figure 5.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rapidindex.config import fingerprint
from rapidindex.data.examples import Example, display_text
from rapidindex.errors import ModelError, UsageError
from rapidindex.results import Token

_TEXTS = {
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:\n"
    ),
    "plain": "{prompt}\n",
}
_MARK = "rapidindex-marks-the-response"
"""Stands in for a response, to find where a chat template puts it."""


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


class _Rendered(NamedTuple):
    """An example as one text: `text[start:stop]` is the response from its character `offset` on."""

    text: str
    start: int
    stop: int
    offset: int


class Template:
    """A prompt template with a tokenizer: writes prompts, and encodes examples as token ids."""

    def __init__(self, template: str, tokenizer: Any, max_length: int) -> None:
        """Take a template by name: `alpaca`, `plain` or `chat` (the tokenizer's own), or a text with `{prompt}` in it.

        In such a text backslash-n stands for a new line. `max_length` is in tokens. Raises UsageError for any other
        template, ModelError for a tokenizer without character offsets, or without a chat template for `chat`.
        """
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            hint = "Save the model with a fast tokenizer (tokenizer.json)."
            raise ModelError(f"The tokenizer {kind} gives no character offsets.", hint=hint)
        self.name = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.add_special_tokens = template != "chat"
        """Whether to add special tokens to the text of `render_prompt`; a chat template writes its own."""
        self._text = _chat_template(tokenizer) if template == "chat" else _prompt_template(template)
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {*tokenizer.all_special_ids, *(id for id, token in added if token.special)}

    @property
    def fingerprint(self) -> str:
        """The template's name (`text` for the user's own) and 16 hexadecimal digits, a hash of its text."""
        name = self.name if self.name == "chat" or self.name in _TEXTS else "text"
        return f"{name}:{fingerprint(self._text)}"

    def render_prompt(self, messages: Iterable[tuple[str, str]]) -> str:
        """Return the text that the model continues with its response to `messages`, turns of (role, content)."""
        if self.name == "chat":
            return self._render(messages, add_generation_prompt=True)
        return self._text.replace("{prompt}", display_text(messages))

    def encode(self, example: Example, *, end: bool = True) -> Encoding:
        """Tokenise prompt and response as one text; with `end`, the token that ends the turn is part of the response.

        Tokens beyond `max_length` are cut off, which may leave no response token. Raises ModelError where the chat
        template refuses the example or does not write its response.
        """
        rendered = self._render_example(example)
        encoded = self.tokenizer(
            rendered.text, add_special_tokens=self.add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        ids = encoded["input_ids"]
        spans = self._without_gaps(ids, encoded["offset_mapping"])
        inside = [i for i, span in enumerate(spans) if self._is_response(ids[i], span, rendered)]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        ending = self._ending_ids(ids, last) if end and inside else []
        tokens = [_token(span, rendered, example.response) for span in spans[first : min(last, self.max_length)]]
        length = len(example.response)
        tokens += [Token(str(self.tokenizer.convert_ids_to_tokens(id)), length, length) for id in ending]
        return self._truncated(ids[:last] + ending, first, tokens)

    def encode_generated(self, prompt_ids: list[int], ids: list[int]) -> tuple[str, Encoding]:
        """Return the text and the encoding of the model's own answer: the ids that it read and gave, as they are."""
        answer, tokens = continuation(self.tokenizer, prompt_ids, ids)
        return answer, self._truncated([*prompt_ids, *ids], len(prompt_ids), tokens)

    def _render_example(self, example: Example) -> _Rendered:
        if self.name == "chat":
            return self._render_chat(example)
        prompt = self.render_prompt(example.messages)
        text = prompt + example.response
        return _Rendered(text, len(prompt), len(text), 0)

    def _render_chat(self, example: Example) -> _Rendered:
        """Render the whole conversation; the response stands where the template puts a mark in its place.

        A template may strip the response, or write it in another way than the mark (where it holds a thought, say):
        then the last occurrence of the response counts.
        """
        response = example.response
        text = self._render([*example.messages, ("assistant", response)])
        before, _, after = self._render([*example.messages, ("assistant", _MARK)]).rpartition(_MARK)
        start, stop = len(before), len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and text[start:stop].strip()):
            start = text.rfind(response.strip())
            stop = start + len(response.strip())
        offset = response.find(text[start:stop])
        if start < 0 or offset < 0:
            raise ModelError(
                f"The chat template does not write the response of the example {example.id} (line {example.line}).",
                hint="Use --template alpaca.",
            )
        return _Rendered(text, start, stop, offset)

    def _render(self, messages: Iterable[tuple[str, str]], *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError) as error:
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

    def _is_response(self, id: int, span: tuple[int, int], rendered: _Rendered) -> bool:
        """Return whether the token overlaps the response; a special token, which may hold spaces, must lie within."""
        start, stop = span
        if id in self._special_ids:
            return rendered.start <= start < stop <= rendered.stop
        return stop > rendered.start and start < rendered.stop

    def _ending_ids(self, ids: list[int], last: int) -> list[int]:
        """Return the token ids that end the turn, where the response's own tokens end before position `last`."""
        if self.name == "chat":
            closing = next((i for i in range(last, len(ids)) if ids[i] in self._special_ids), last - 1)
            return ids[last : closing + 1]
        eos = self.tokenizer.eos_token_id
        return [] if eos is None or ids[last - 1] == eos else [eos]

    def _truncated(self, ids: list[int], first: int, tokens: list[Token]) -> Encoding:
        input_ids = np.array(ids[: self.max_length], dtype=np.int32)
        mask = np.arange(len(input_ids)) >= first
        return Encoding(input_ids, mask, tokens[: int(mask.sum())], len(ids) > self.max_length, first)


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


def _token(span: tuple[int, int], rendered: _Rendered, response: str) -> Token:
    clipped = (min(max(at, rendered.start), rendered.stop) for at in span)
    start, stop = (at - rendered.start + rendered.offset for at in clipped)
    return Token(response[start:stop], start, stop)


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
