"""The contents of the templates as plain values: matches with their segments, and the histogram's bars and marks."""

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rapidindex.results import Match, QueryInfo, Result, ScoreSummary, Token
from rapidindex.views import heatmap, wording
from rapidindex.views.sanitize import paragraph

WIDTH, HEIGHT = 600, 120
"""The size of the histogram's bars, in the units of its view box."""
_STRONGEST = 12
"""Tokens in the table of the strongest."""


@dataclass(frozen=True)
class Direction:
    """A query's result in one direction, ready for the page."""

    result: Result
    name: str
    """`Proponents` or `Opponents`."""
    matches: list[dict[str, Any]]
    verdict: str
    """Empty where something stands out."""
    order: str
    """Empty where the scores order the matches."""
    unfinished: str
    """Empty where the index holds all planned examples."""


@dataclass(frozen=True)
class Histogram:
    """Bars (x, y, width, height) and marks (x, row, direction), in the units of the view box."""

    n: int
    low: float
    high: float
    zero: float | None
    """The x of the score 0; None where it lies outside the bars."""
    bars: list[tuple[float, float, float, float]]
    marks: list[tuple[float, int, str]]
    rows: int
    label: str
    """The picture in words."""


def direction(result: Result, full: float, answer_full: float) -> Direction:
    """Return a result for the page; `full` and `answer_full` are the shares of full colour in responses and answers."""
    matches = [_match(match, result.query, full, answer_full) for match in result.matches]
    sentences = wording.verdict(result), wording.rescored(result), wording.unfinished(result)
    return Direction(result, result.direction.capitalize(), matches, *sentences)


def segment(piece: heatmap.Segment, full: float, *, matched: bool = False) -> Markup:
    """Return a segment as HTML: its text in a coloured span, and the white space around it outside.

    `matched` outlines it, as the token that a search of tokens returned.
    """
    step = heatmap.colour_step(piece.score, full)
    colour = f" {'p' if step > 0 else 'n'}{abs(step)}" if step else ""
    mark = (" s" if piece.special else "" if piece.text else " w") + (" f" if matched else "")
    before, title, text, after = map(paragraph, (piece.before, _title(piece), piece.label, piece.after))
    return Markup('{}<span class="c{}{}" title="{}">{}</span>{}').format(before, colour, mark, title, text, after)


def histogram(results: list[Result]) -> Histogram | None:
    """Return all scores and the places of each result's matches among them; None where not all were scored."""
    summary = next((result.summary for result in results if result.summary), None)
    if summary is None or not sum(summary.histogram):
        return None

    def x(score: float) -> float:
        return round(WIDTH * summary.place(score), 1)

    marks = [(x(match.score), row, result.direction) for row, result in enumerate(results) for match in result.matches]
    zero = x(0.0) if summary.min < 0 < summary.max else None
    label = _histogram_label(summary, results)
    return Histogram(summary.n, summary.min, summary.max, zero, _bars(summary.histogram), marks, len(results), label)


def _bars(counts: list[int]) -> list[tuple[float, float, float, float]]:
    """Return a bar for each count above zero; its height grows with the count's root."""
    width = WIDTH / len(counts)
    heights = [round(HEIGHT * math.sqrt(count / max(counts)), 1) for count in counts]
    return [(round(i * width, 1), HEIGHT - h, round(width * 0.9, 1), h) for i, h in enumerate(heights) if h]


def _histogram_label(summary: ScoreSummary, results: list[Result]) -> str:
    signed = wording.signed
    ranges = [
        f"the {len(scores)} {result.direction} shown score {signed(min(scores))} to {signed(max(scores))}"
        for result in results
        if (scores := [match.score for match in result.matches])
    ]
    return (
        f"Histogram of {summary.n:,} scores from {signed(summary.min)} to {signed(summary.max)}, "
        f"mean {signed(summary.mean)}, standard deviation {summary.std:.3g}; {'; '.join(ranges)}."
    )


def _title(piece: heatmap.Segment) -> str:
    """Return a segment in words: its text and signed share, and the position and share of each of its tokens."""
    score = f"“{piece.label}” {wording.signed(piece.score)}"
    if len(piece.shares) == 1:
        return f"{score}, token {piece.shares[0].position}"
    shares = "; ".join(f"token {share.position} {wording.signed(share.score)}" for share in piece.shares)
    return f"{score} in all: {shares}"


def _match(match: Match, query: QueryInfo, full: float, answer_full: float) -> dict[str, Any]:
    return {
        "match": match,
        "meta": {str(name): wording.meta_text(value) for name, value in match.meta.items()},
        "token": paragraph(wording.matched_token(match)),
        "response": _heatmap(match.response, match.tokens, match.token_scores, full, match.position),
        "answer": _heatmap(query.answer, query.tokens, match.answer_scores, answer_full, None),
    }


def _heatmap(text: str, tokens: list[Token], scores: list[float], full: float, matched: int | None) -> dict[str, Any]:
    shown = heatmap.beginning(text, tokens, scores)
    pieces, rest = heatmap.segments(*shown) if scores else ([], shown[0])
    return {
        "segments": [segment(piece, full, matched=piece.holds(matched)) for piece in pieces],
        "rest": paragraph(rest),
        "hidden": len(text) - len(shown[0]),
        "strongest": heatmap.strongest(tokens, scores, _STRONGEST) if scores else [],
        "tokens": len(tokens),
        "full": full,
    }
