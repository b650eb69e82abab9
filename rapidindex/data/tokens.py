"""Select tokens: those of a response that get a RapidGrad of their own, and those of an answer that a query is about.

Knows text, not tokenizers or models.
"""

import re
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rapidindex.config import TokenConfig
from rapidindex.errors import QueryError, TokenNotFound, UsageError
from rapidindex.results import SPACELESS, Token

_WORD = re.compile(r"\w+(?:['’]\w+)*")

_SHOWN = 200
"""Characters of a text, and tokens of an answer, that an error shows."""
_SPACELESS = re.compile(f"[{SPACELESS}]")

_STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are aren't as at be because been before being below between
    both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either else ever
    every few for from further had hadn't has hasn't have haven't having he he'd he'll he's hence her here here's hers
    herself him himself his how however i i'd i'll i'm i've if in into is isn't it it'd it'll it's its itself just let
    let's may me might mine more most must my myself neither no nor not now of off on once only or other our ours
    ourselves out over own per quite rather same shall she she'd she'll she's should shouldn't since so some such than
    that that's the their theirs them themselves then there there's these they they'd they'll they're they've this those
    through thus to too under until up upon us very via was wasn't we we'd we'll we're we've were weren't what what's
    when where whether which while who who's whom whose why will with within without won't would wouldn't yet you you'd
    you'll you're you've your yours yourself yourselves
    """.split()
)


def token_positions(response: str, tokens: Sequence[Token], config: TokenConfig) -> list[int]:
    """Return the positions in `tokens` that get a RapidGrad of their own, in ascending order.

    `tokens` are those of `response`. A token carries content where it overlaps a word that is not an English stop word.
    """
    positions = _content_positions(response, tokens) if config.content else list(range(len(tokens)))
    return positions[: config.first]


def _content_positions(response: str, tokens: Sequence[Token]) -> list[int]:
    words = (match.span() for match in _WORD.finditer(response) if _has_content(match[0]))
    return _overlapping(tokens, response, words)


def _has_content(word: str) -> bool:
    word = word.lower().replace("’", "'")
    return word not in _STOP_WORDS and any(letter.isalnum() for letter in word)


def _overlapping(tokens: Sequence[Token], text: str, spans: Iterable[tuple[int, int]]) -> list[int]:
    """Return the positions of the tokens that share a character of `text` with a span, in linear time."""
    covered = bytearray(len(text))
    for start, end in spans:
        covered[start:end] = b"\1" * (end - start)
    return [position for position, token in enumerate(tokens) if any(covered[token.start : token.end])]


class Selection(NamedTuple):
    """The tokens of an answer that a query is about."""

    positions: list[int]
    parts_of_words: bool = False
    """Whether the text that was asked for stands in the answer only within longer words."""


def select_tokens(
    tokens: Sequence[Token], answer: str, *, token: str | None = None, span: str | None = None
) -> Selection:
    """Return the tokens that a query is about: all unless `token` or `span` is given.

    `token` names words of the answer and selects every token that overlaps them, at every occurrence (the paper's
    Γ(E2), section 4.6), or with `#n` at the n-th. Occurrences within longer words (India in Indian) count only where
    there are no others. Scripts without spaces have no such words, and canonically equivalent spellings are the same.
    `span` is `FIRST:LAST`, both included, or one position, from 0.

    Raises UsageError for both together or a form that has no meaning, TokenNotFound where the answer has no such token,
    QueryError for an answer without tokens.
    """
    if token is not None and span is not None:
        raise UsageError("--token and --span cannot be used together.", hint="Give one of them.")
    if not tokens:
        raise QueryError("The answer has no tokens.", hint="Give an answer that is not empty with --answer.")
    if token is not None:
        spans, parts = _occurrences(tokens, answer, token)
        return Selection(_overlapping(tokens, answer, spans), parts)
    return Selection(list(range(len(tokens))) if span is None else _span_positions(tokens, span))


def _occurrences(tokens: Sequence[Token], answer: str, text: str) -> tuple[list[tuple[int, int]], bool]:
    """Return where `text`, or the n-th `text` for `text#n`, stands in the answer, and whether only in longer words."""
    word, number = text, None
    whole, parts = _find(answer, text)
    numbered = re.fullmatch(r"(.+)#([1-9][0-9]{0,17})", text, re.DOTALL)
    if numbered and not whole and not parts:
        word, number = numbered[1], int(numbered[2])
        whole, parts = _find(answer, word)
    if not word.strip():
        raise UsageError("--token is empty.", hint="Give a word of the answer.")
    found = whole or parts
    chosen = found if number is None else found[number - 1 : number]
    if not _overlapping(tokens, answer, chosen):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        often = f"only {times}{' as a whole word' if whole and parts else ''}" if found else "not"
        raise TokenNotFound(
            f"{_short(word)!r} is {often} in the answer {_short(answer)!r}.",
            hint=f"Its tokens are  {_numbered(tokens)}  (choose with --token WORD or --span FIRST:LAST).",
        )
    return chosen, not whole


def _find(answer: str, text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return where `text` stands in the answer as (start, end) in characters: as whole words, and within longer ones.

    White space around `text` does not count: tokens are often shown with the space before them.
    """
    word = unicodedata.normalize("NFC", text.strip())
    normal, places = _normalized(answer)
    whole, parts = [], []
    for match in re.finditer(re.escape(word), normal) if word else ():
        start, end = match.span()
        inside = _within_a_word(normal, start) or _within_a_word(normal, end)
        (parts if inside else whole).append((places[start][0], places[end - 1][1]))
    return whole, parts


def _normalized(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text in NFC, and for each of its characters where it stood in `text`."""
    pieces, places = [], []
    starts = [at for at, letter in enumerate(text) if not at or not _joins(letter)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        normal = unicodedata.normalize("NFC", text[start:end])
        pieces.append(normal)
        same = normal == text[start:end]
        places += [(at, at + 1) for at in range(start, end)] if same else [(start, end)] * len(normal)
    return "".join(pieces), places


def _joins(letter: str) -> bool:
    """Return whether a character is one with that before it: accents, vowel signs, the later jamo of a syllable."""
    return unicodedata.category(letter).startswith("M") or "\u1160" <= letter <= "\u11ff"


def is_spaceless(letter: str) -> bool:
    """Return whether a letter is of a script that puts no spaces between words."""
    return bool(_SPACELESS.match(letter))


def _within_a_word(text: str, at: int) -> bool:
    """Return whether the characters on both sides of `at` belong to one word."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if _joins(after):
        return True
    word = all(letter.isalnum() or letter == "_" or _joins(letter) for letter in (before, after))
    return word and not (is_spaceless(before) or is_spaceless(after))


def parse_span(span: str) -> tuple[int, int]:
    """Return the first and last position that `FIRST:LAST`, or one position, names. UsageError for any other text.

    Nothing is known of the answer here: what the text alone gives away is refused before a model is loaded.
    """
    match = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", span.strip())
    if not match:
        raise UsageError(f"--span {reprlib.repr(span)} is not FIRST:LAST.", hint="For example --span 3:5, or --span 4.")
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise UsageError(
            f"--span {reprlib.repr(span)} ends before it begins.", hint=f"For example --span {last}:{first}."
        )
    return first, last


def _span_positions(tokens: Sequence[Token], span: str) -> list[int]:
    first, last = parse_span(span)
    if last >= len(tokens):
        raise TokenNotFound(
            f"--span {span} does not fit an answer of {len(tokens)} tokens (0 to {len(tokens) - 1}).",
            hint=f"Its tokens are  {_numbered(tokens)}",
        )
    return list(range(first, last + 1))


def _numbered(tokens: Sequence[Token]) -> str:
    named = (f"{position}:{token.text.strip() or repr(token.text)}" for position, token in enumerate(tokens[:_SHOWN]))
    return "  ".join(named) + ("  …" if len(tokens) > _SHOWN else "")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
