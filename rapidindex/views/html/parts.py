"""What the templates show, as plain values: matches with their chips, the marked answer, the histogram's bars."""

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rapidindex.results import Match, QueryInfo, Result, Token
from rapidindex.views import heatmap, wording
from rapidindex.views.sanitize import paragraph

WIDTH, HEIGHT, MARKS = 600, 120, 14
"""The histogram's bars, and the height of a row of marks, in the units of its view box."""
_STRONGEST = 12


@dataclass(frozen=True)
class Shown:
    """One direction of a query, ready for the page."""

    result: Result
    name: str
    """`Proponents` or `Opponents`."""
    matches: list[dict[str, Any]]
    verdict: str
    """Empty where something stands out."""
    order: str
    """Empty where the scores order the matches."""


@dataclass(frozen=True)
class Histogram:
    """Bars (x, y, width, height) and marks (x, row, what), in the units of the view box."""

    n: int
    low: float
    high: float
    zero: float | None
    """Where the score 0 lies; None where no bar does."""
    bars: list[tuple[float, float, float, float]]
    marks: list[tuple[float, int, str]]
    rows: int
    label: str
    """The picture in words."""


def shown(result: Result, full: float, of_answer: float) -> Shown:
    """A result for the page; `full` and `of_answer` are the shares that take full colour, of responses and answers."""
    matches = [_match(match, result.query, full, of_answer) for match in result.matches]
    return Shown(result, result.direction.capitalize(), matches, wording.verdict(result), wording.rescored(result))


def answer(asked: QueryInfo) -> list[tuple[str, bool]]:
    """The answer in pieces, and whether each is marked: what is asked about, if not all is, without its white space."""
    pieces, rest = heatmap.cut(asked.answer, asked.tokens, [0.0] * len(asked.tokens))
    chosen = set(asked.selection)
    partly = len(chosen) < len(asked.tokens)
    made: list[tuple[str, bool]] = []
    for chip in pieces:
        wanted = any(share.position in chosen for share in chip.shares)
        text = chip.label if wanted and partly else "" if chip.special else chip.text
        made += [(chip.before, False), (text, wanted and partly), (chip.after, False)]
    return [(paragraph(text), wanted) for text, wanted in [*made, (rest, False)] if text]


def chip(piece: heatmap.Segment, full: float, *, found: bool = False) -> Markup:
    """A chip as HTML: its characters in a coloured span, and the white space about them outside.

    `found` outlines it: it is what a search of tokens found.
    """
    number = heatmap.step(piece.score, full)
    colour = f" {'p' if number > 0 else 'n'}{abs(number)}" if number else ""
    mark = (" s" if piece.special else "" if piece.text else " w") + (" f" if found else "")
    before, text, after = paragraph(piece.before), paragraph(piece.label), paragraph(piece.after)
    return Markup('{}<span class="c{}{}" title="{}">{}</span>{}').format(
        before, colour, mark, paragraph(said(piece)), text, after
    )


def said(piece: heatmap.Segment) -> str:
    """A chip in words: text, signed share and position, of each token where it has several."""
    quoted = f"“{piece.label}”"
    if len(piece.shares) == 1:
        return f"{quoted} {wording.signed(piece.score)}, token {piece.shares[0].position}"
    each = "; ".join(f"token {share.position} {wording.signed(share.score)}" for share in piece.shares)
    return f"{quoted} {wording.signed(piece.score)} in all: {each}"


def histogram(results: list[Result]) -> Histogram | None:
    """The scores of all examples, and where the matches of each result lie; None where they were not all scored."""
    summary = next((result.summary for result in results if result.summary), None)
    if summary is None or not sum(summary.histogram):
        return None
    counts, width = summary.histogram, summary.max - summary.min
    tallest, wide = math.sqrt(max(counts)), WIDTH / len(counts)

    def x(score: float) -> float:
        return round(WIDTH * min(1.0, max(0.0, (score - summary.min) / width)) if width > 0 else WIDTH / 2, 1)

    heights = [round(HEIGHT * math.sqrt(count) / tallest, 1) for count in counts]
    bars = [(round(i * wide, 1), HEIGHT - tall, round(wide * 0.9, 1), tall) for i, tall in enumerate(heights) if tall]
    marks = [(x(match.score), row, result.direction) for row, result in enumerate(results) for match in result.matches]
    spans = [
        f"the {len(r.matches)} {r.direction} shown score {wording.signed(min(m.score for m in r.matches))} "
        f"to {wording.signed(max(m.score for m in r.matches))}"
        for r in results
        if r.matches
    ]
    label = (
        f"Histogram of {summary.n:,} scores from {wording.signed(summary.min)} to {wording.signed(summary.max)}, "
        f"mean {wording.signed(summary.mean)}, standard deviation {summary.std:.3g}; {'; '.join(spans)}."
    )
    zero = x(0.0) if summary.min < 0 < summary.max else None
    return Histogram(summary.n, summary.min, summary.max, zero, bars, marks, len(results), label)


def _match(match: Match, asked: QueryInfo, full: float, of_answer: float) -> dict[str, Any]:
    return {
        "match": match,
        "meta": {str(name): "" if value is None else value for name, value in match.meta.items()},
        "token": paragraph(wording.found_token(match)),
        "response": _heat(match.response, match.tokens, match.token_scores, full, match.position),
        "answer": _heat(asked.answer, asked.tokens, match.answer_scores, of_answer, None),
    }


def _heat(text: str, tokens: list[Token], scores: list[float], full: float, found: int | None) -> dict[str, Any]:
    pieces, rest = heatmap.cut(text, tokens, scores) if scores else ([], text)
    return {
        "chips": [chip(piece, full, found=piece.holds(found)) for piece in pieces],
        "rest": paragraph(rest),
        "strongest": heatmap.strongest(tokens, scores, _STRONGEST) if scores else [],
        "tokens": len(tokens),
        "full": full,
    }
