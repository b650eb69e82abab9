"""Cut a text into the segments that carry its tokens' shares, and give each its colour.

Knows neither terminals nor HTML. The shares of a response average to its influence (`Match.exact_score`).
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidindex.errors import DataError
from rapidindex.results import SPACELESS, Match, QueryInfo, Result, Token

STEPS = 20
"""Steps from no colour to full colour."""
FLOOR = 0.1
"""Shares below this part of full colour are not coloured: they are noise, and would draw the eye like signal."""
_WITHIN_WORDS = re.compile(rf"[^\W_{SPACELESS}]")
"""A letter or digit of a script that writes spaces between its words."""
LONGEST = 10_000
"""Characters of a text that a heat-map shows. Forty responses of 100,000 would take minutes, and 50 MB of HTML."""


@dataclass(frozen=True)
class Theme:
    """Four colours, `#rrggbb`. Text has a contrast of 4.5:1 on every step from the background to the other two."""

    background: str
    text: str
    positive: str
    negative: str


LIGHT = Theme("#ffffff", "#16181d", "#f28a2e", "#5aa5e0")
DARK = Theme("#14171c", "#f4f5f7", "#a84e00", "#1b62a8")


@dataclass(frozen=True)
class Share:
    """One token's contribution to the influence of its text."""

    position: int
    """The token's position in its text, from 0."""
    score: float
    text: str


@dataclass(frozen=True)
class Segment:
    """A piece of a text that takes one colour: a token, or tokens that share characters."""

    before: str
    """Text since the previous segment, uncoloured: mostly white space."""
    text: str
    """The coloured text: the tokens' characters without the white space around them; empty for white space alone."""
    after: str
    """White space that belongs to the segment's tokens."""
    shares: tuple[Share, ...]
    """The share of each token."""
    special: bool = False
    """Whether the token stands for no characters, as one that ends the turn does; `text` is then its name."""

    def holds(self, position: int | None) -> bool:
        """Return whether the token at `position` belongs to the segment."""
        return any(share.position == position for share in self.shares)

    @property
    def score(self) -> float:
        """The sum of the shares."""
        return math.fsum(share.score for share in self.shares)

    @property
    def label(self) -> str:
        """The text to show: a sign for white space where there is no other text."""
        if self.text:
            return self.text
        return "↵" if "\n" in self.after else "␣" if self.after else "∅"


def segments(
    text: str, tokens: Sequence[Token], scores: Sequence[float], *, words: bool = True
) -> tuple[list[Segment], str]:
    """Return the segments of a text in order, and the text after the last one.

    Joined, these give the whole text, special tokens aside. Tokens that share a character, that split what is seen as
    one character, or with `words` that split a word, form one segment. Raises DataError unless `scores` has one number
    for each of `tokens`.
    """
    if len(tokens) != len(scores):
        raise DataError(f"The heat-map has {len(tokens)} tokens and {len(scores)} shares.")
    shares = _shares(tokens, scores)
    pieces, previous_end = [], 0
    for start, end, positions in _groups(text, tokens, words):
        whole = text[start:end]
        shown = whole.strip() if end > start else tokens[positions[0]].text
        lead = whole[: len(whole) - len(whole.lstrip())] if shown else ""
        after = whole[len(lead) + len(shown) :] if end > start else ""
        before = text[previous_end:start] + lead
        pieces.append(Segment(before, shown, after, tuple(shares[i] for i in positions), start == end))
        previous_end = end
    return pieces, text[previous_end:]


def beginning(
    text: str, tokens: Sequence[Token], scores: Sequence[float]
) -> tuple[str, Sequence[Token], Sequence[float]]:
    """Return the part of a text that a heat-map shows, at most `LONGEST` characters, with its tokens and their shares.

    Its last characters may have no token: one that reaches beyond them is left out.
    """
    if len(text) <= LONGEST or len(tokens) != len(scores):
        return text, tokens, scores
    count = next((i for i, token in enumerate(tokens) if token.end > LONGEST), len(tokens))
    return text[:LONGEST], tokens[:count], scores[:count]


def marked_answer(query: QueryInfo) -> list[tuple[str, bool]]:
    """Return the answer in pieces, each with whether it is marked: selected, without the white space around its tokens.

    Nothing is marked where every token is selected. A special token appears, by its name, only where it is marked.
    """
    pieces, rest = segments(query.answer, query.tokens, [0.0] * len(query.tokens), words=False)
    selected = set() if query.whole else set(query.selection)
    runs: list[tuple[str, bool]] = []
    for piece in pieces:
        marked = any(share.position in selected for share in piece.shares)
        text = piece.label if marked else "" if piece.special else piece.text
        runs += [(piece.before, False), (text, marked), (piece.after, False)]
    return _joined([*runs, (rest, False)])


def _joined(runs: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Join neighbours that are both marked or both not, and drop empty pieces."""
    joined: list[tuple[str, bool]] = []
    for text, marked in runs:
        if text and joined and joined[-1][1] == marked:
            joined[-1] = joined[-1][0] + text, marked
        elif text:
            joined.append((text, marked))
    return joined


def response_scale(*results: Result | None) -> float:
    """Return the share that takes full colour: the largest absolute one of any match's segment; 0.0 without shares."""
    matches = (match for result in results if result for match in result.matches if match.token_scores)
    return _largest((match.response, match.tokens, match.token_scores) for match in matches)


def answer_scale(*results: Result | None) -> float:
    """Return the same as `response_scale` for the matches' influence on the tokens of the answer."""
    pairs = ((result.query, match) for result in results if result for match in result.matches if match.answer_scores)
    return _largest((query.answer, query.tokens, match.answer_scores) for query, match in pairs)


def colour_step(score: float, full: float) -> int:
    """Return a share's colour step, -STEPS to STEPS; it grows with the share's root; 0 below the floor."""
    if not full or abs(score) < FLOOR * full:
        return 0
    return round(math.copysign(STEPS * math.sqrt(min(1.0, abs(score) / full)), score))


def step_colour(theme: Theme, step: int) -> str:
    """Return the background colour of a step, as `#rrggbb`."""
    part = abs(step) / STEPS
    low, high = _channels(theme.background), _channels(theme.positive if step > 0 else theme.negative)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def strongest(text: str, tokens: Sequence[Token], scores: Sequence[float], count: int) -> list[Segment]:
    """Return the `count` words of the largest absolute share, largest first; none that stands for no characters."""
    pieces = [piece for piece in segments(text, tokens, scores)[0] if not piece.special]
    return sorted(pieces, key=lambda piece: -abs(piece.score))[:count]


def total(match: Match) -> float:
    """Return the influence that the shares of a match's tokens are parts of: the sum, or the matched token's own."""
    return math.fsum(match.token_scores) if match.position is None else match.token_scores[match.position]


def answer_total(match: Match, query: QueryInfo) -> float:
    """Return the influence on the words asked about that the shares of the answer's tokens are parts of."""
    return math.fsum(match.answer_scores[position] for position in query.selection)


def _shares(tokens: Sequence[Token], scores: Sequence[float]) -> list[Share]:
    pairs = enumerate(zip(tokens, scores, strict=True))
    return [Share(position, score, token.text) for position, (token, score) in pairs]


def _groups(text: str, tokens: Sequence[Token], words: bool) -> list[tuple[int, int, list[int]]]:
    """Return (start, end, token positions) of each segment, in the text's order."""
    groups: list[tuple[int, int, list[int]]] = []
    for position in sorted(range(len(tokens)), key=lambda i: (tokens[i].start, tokens[i].end, i)):
        start, end = (min(max(at, 0), len(text)) for at in (tokens[position].start, tokens[position].end))
        joined = start < end and (_inside_a_character(text, start) or (words and _inside_a_word(text, start)))
        if groups and (start < groups[-1][1] or (joined and start == groups[-1][1])):
            first, last, positions = groups[-1]
            groups[-1] = first, max(last, end), [*positions, position]
        else:
            groups.append((start, max(start, end), [position]))
    return groups


def _inside_a_character(text: str, at: int) -> bool:
    """Return whether a cut at `at` splits what is seen as one character: accents, joined emoji, skin tones."""
    if not 0 < at < len(text):
        return False
    after = text[at]
    return (
        text[at - 1] == "\u200d"
        or after in "\u200d\u200c"
        or unicodedata.category(after).startswith("M")
        or "\U0001f3fb" <= after <= "\U0001f3ff"
    )


def _inside_a_word(text: str, at: int) -> bool:
    """Return whether a cut at `at` splits a word. The others' words are not known, so that each token is one."""
    return 0 < at < len(text) and bool(_WITHIN_WORDS.match(text[at - 1]) and _WITHIN_WORDS.match(text[at]))


def _largest(texts: Iterable[tuple[str, Sequence[Token], Sequence[float]]]) -> float:
    pieces = (piece for text in texts for piece in segments(*beginning(*text))[0])
    return max((abs(piece.score) for piece in pieces if not piece.special), default=0.0)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
