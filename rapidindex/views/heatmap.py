"""A text as a heat-map: the chips that carry its tokens' shares, and the colours they take.

Knows neither terminals nor HTML. The shares of a response average to its influence (`Match.exact_score`).
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidindex.errors import DataError
from rapidindex.results import Result, Token

STEPS = 20
"""Steps from no colour to full colour."""


@dataclass(frozen=True)
class Theme:
    """Four colours, `#rrggbb`. Text holds 4.5:1 on every blend of the background with either of the other two."""

    background: str
    text: str
    positive: str
    negative: str


LIGHT = Theme("#ffffff", "#16181d", "#f28a2e", "#5aa5e0")
DARK = Theme("#14171c", "#f4f5f7", "#a84e00", "#1b62a8")


@dataclass(frozen=True)
class Share:
    """What one token adds to a text's influence."""

    position: int
    """Of the token in its text, from 0."""
    score: float
    text: str


@dataclass(frozen=True)
class Segment:
    """A piece of a text that takes one colour: a token, or tokens that share characters."""

    before: str
    """Text since the last chip, uncoloured: white space, mostly."""
    text: str
    """What is coloured: `shares`' characters without the white space around them; empty for white space alone."""
    after: str
    """White space that belongs to the chip's tokens."""
    shares: tuple[Share, ...]
    """Of one token, or of each of those that share characters."""
    special: bool = False
    """Whether the token stands for no characters, as one that ends the turn; `text` is then its name."""

    def holds(self, position: int | None) -> bool:
        """Whether the token at `position` is in it."""
        return any(share.position == position for share in self.shares)

    @property
    def score(self) -> float:
        """The sum of the shares: the part of the influence that these characters have."""
        return math.fsum(share.score for share in self.shares)

    @property
    def label(self) -> str:
        """What stands for the chip where its characters cannot be seen."""
        if self.text:
            return self.text
        return "↵" if "\n" in self.after else "␣" if self.after else "∅"


def cut(text: str, tokens: Sequence[Token], scores: Sequence[float]) -> tuple[list[Segment], str]:
    """The chips of a text in its order, and the text after the last.

    Their parts add up to `text`, special tokens aside. Tokens that share a character, or split what is seen as one,
    become one chip. DataError where `scores` has not one number for each of `tokens`.
    """
    if len(tokens) != len(scores):
        raise DataError(f"The heat-map has {len(tokens)} tokens and {len(scores)} shares.")
    shares = [Share(i, score, token.text) for i, (token, score) in enumerate(zip(tokens, scores, strict=True))]
    made, at = [], 0
    for start, end, members in _groups(text, tokens):
        inner = text[start:end]
        shown = inner.strip() if end > start else tokens[members[0]].text
        lead = inner[: len(inner) - len(inner.lstrip())] if shown else ""
        after = inner[len(lead) + len(shown) :] if end > start else ""
        made.append(Segment(text[at:start] + lead, shown, after, tuple(shares[i] for i in members), start == end))
        at = end
    return made, text[at:]


def _groups(text: str, tokens: Sequence[Token]) -> list[tuple[int, int, list[int]]]:
    """(start, end, positions) of each chip, in the text's order."""
    groups: list[tuple[int, int, list[int]]] = []
    for position in sorted(range(len(tokens)), key=lambda i: (tokens[i].start, tokens[i].end, i)):
        start, end = (min(max(at, 0), len(text)) for at in (tokens[position].start, tokens[position].end))
        if groups and (start < groups[-1][1] or (start < end and _inside_a_character(text, start))):
            first, last, members = groups[-1]
            groups[-1] = first, max(last, end), [*members, position]
        else:
            groups.append((start, max(start, end), [position]))
    return groups


def _inside_a_character(text: str, at: int) -> bool:
    """Whether a cut at `at` would part what is seen as one: accents, joined emoji, skin tones."""
    if not 0 < at < len(text):
        return False
    after = text[at]
    return (
        text[at - 1] == "\u200d"
        or after in "\u200d\u200c"
        or unicodedata.category(after).startswith("M")
        or "\U0001f3fb" <= after <= "\U0001f3ff"
    )


def scale(*results: Result | None) -> float:
    """The largest absolute share of any chip of any match: what takes full colour. 0.0 where there is none."""
    found = (match for result in results if result for match in result.matches if match.token_scores)
    return _largest((match.response, match.tokens, match.token_scores) for match in found)


def answer_scale(*results: Result | None) -> float:
    """As `scale`, of the matches' influence on the words of the answer."""
    found = ((result.query, match) for result in results if result for match in result.matches if match.answer_scores)
    return _largest((asked.answer, asked.tokens, match.answer_scores) for asked, match in found)


def _largest(heats: Iterable[tuple[str, Sequence[Token], Sequence[float]]]) -> float:
    return max((abs(chip.score) for heat in heats for chip in cut(*heat)[0]), default=0.0)


def step(score: float, full: float) -> int:
    """A share's colour, -STEPS to STEPS: it grows with the root of the share, so that small ones are seen as well."""
    if not full or not score:
        return 0
    return round(math.copysign(STEPS * math.sqrt(min(1.0, abs(score) / full)), score))


def blend(theme: Theme, number: int) -> str:
    """The background of colour step `number`, as `#rrggbb`."""
    part = abs(number) / STEPS
    low, high = _channels(theme.background), _channels(theme.positive if number > 0 else theme.negative)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def strongest(tokens: Sequence[Token], scores: Sequence[float], count: int) -> list[Share]:
    """The shares of the largest absolute value, largest first."""
    pairs = enumerate(zip(tokens, scores, strict=True))
    shares = (Share(position, score, token.text) for position, (token, score) in pairs)
    return sorted(shares, key=lambda share: -abs(share.score))[:count]


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
