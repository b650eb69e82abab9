"""The contents of the templates as plain values: matches with their segments, and the histogram's bars and marks."""

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rapidindex.results import Match, Result, ScoreSummary, Token
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
    """How many of the matches stand out; empty where that is not known."""
    order: str
    """Empty where the scores order the matches."""
    unfinished: str
    """Empty where the index holds all planned examples."""
    folded: str
    """The heading of the matches at or below chance; empty where there are none."""


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
    matches = [_match(result, match, full, answer_full) for match in result.matches]
    sentences = wording.standing(result), wording.rescored(result), wording.unfinished(result)
    _, rest, heading = wording.folded(result)
    return Direction(result, result.direction.capitalize(), matches, *sentences, heading if rest else "")


def segment(piece: heatmap.Segment, full: float, whole: float, *, matched: bool = False) -> Markup:
    """Return a segment as HTML: its text in a coloured span, and the white space around it outside.

    `full` is the share of full colour, `whole` the influence of which the title gives the share's percent.

    `matched` outlines it, as the token that a search of tokens returned.
    """
    step = heatmap.colour_step(piece.score, full)
    colour = f" {'p' if step > 0 else 'n'}{abs(step)}" if step else ""
    mark = (" s" if piece.special else "" if piece.text else " w") + (" f" if matched else "")
    before, title, text, after = map(paragraph, (piece.before, _title(piece, whole), piece.label, piece.after))
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


def _title(piece: heatmap.Segment, whole: float) -> str:
    """Return a segment in words: its text, its share in percent, and the position and share of each of its tokens."""
    score = f"“{piece.label}” {wording.percent(piece.score, whole)}"
    if len(piece.shares) == 1:
        return f"{score}, token {piece.shares[0].position}"
    shares = "; ".join(f"token {share.position} {wording.percent(share.score, whole)}" for share in piece.shares)
    return f"{score} in all: {shares}"


def _match(result: Result, match: Match, full: float, answer_full: float) -> dict[str, Any]:
    query = result.query
    whole = heatmap.total(match) if match.token_scores else 0.0
    answer_whole = heatmap.answer_total(match, query) if match.answer_scores else 0.0
    return {
        "match": match,
        "kind": wording.exact(result),
        "meta": wording.meta(match),
        "token": paragraph(wording.matched_token(match)),
        "place": wording.place(match),
        "distance": wording.distance(result, match),
        "percentile": wording.percentile(match),
        "folded": result.stands_out(match) is False,
        "response": _heatmap(match.response, match.tokens, match.token_scores, full, whole, match.position),
        "answer": _heatmap(query.answer, query.tokens, match.answer_scores, answer_full, answer_whole, None),
    }


def _heatmap(
    text: str, tokens: list[Token], scores: list[float], full: float, whole: float, matched: int | None
) -> dict[str, Any]:
    shown = heatmap.beginning(text, tokens, scores)
    pieces, rest = heatmap.segments(*shown) if scores else ([], shown[0])
    return {
        "segments": [
            segment(piece, full, whole, matched=piece.holds(matched))
            for piece in pieces
            if not piece.special or piece.holds(matched)
        ],
        "rest": paragraph(rest),
        "hidden": len(text) - len(shown[0]),
        "strongest": heatmap.strongest(text, tokens, scores, _STRONGEST) if scores else [],
        "tokens": len(tokens),
        "whole": whole,
    }
