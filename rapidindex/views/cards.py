"""Matches with token scores on a terminal: a card each, its response coloured by signed share; and all scores as bars.

Colour-blind-safe: what speaks against the answer is underlined too. Without colour there is a list of the strongest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from rapidindex.results import Asked, Match, Result, Span, Summary
from rapidindex.views import heatmap
from rapidindex.views.sanitize import line

_LONGEST = 1200
"""Characters of a response that a card shows."""
_WEAKEST = 5
"""Colour steps below this are left plain: the terminal's own background may be dark or light."""
_LISTED = 8
_COLUMNS = 50
_BLOCKS = "▁▂▃▄▅▆▇█"


def cards(found: Result) -> RenderableType:
    """The matches as cards, on one scale of colour, under a line that says what the colours mean."""
    full, of_answer = heatmap.scale(found), heatmap.answer_scale(found)
    return Group(_Legend(full), *(_card(match, found.query, full, of_answer) for match in found.matches))


@dataclass(frozen=True)
class Histogram:
    """All scores as bars that grow with the root of the count, and below them where the matches lie."""

    summary: Summary
    matches: Sequence[Match]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        summary = self.summary
        low, high = heatmap.signed(summary.min), heatmap.signed(summary.max)
        counts = _merged(summary.histogram, min(_COLUMNS, max(1, options.max_width - len(low) - len(high) - 2)))
        tallest = max(counts, default=0)
        bars = "".join(_bar(count, tallest) for count in counts)
        marks = [" "] * len(counts)
        for match in self.matches:
            marks[_column(match.score, summary, len(counts))] = "▲"
        yield Text(f"All {summary.n:,} scores; ▲ those shown here", "dim")
        yield Text(f"{low} {bars} {high}\n" + " " * (len(low) + 1) + "".join(marks).rstrip())


def _merged(counts: Sequence[int], columns: int) -> list[int]:
    group = math.ceil(len(counts) / columns) or 1
    return [sum(counts[i : i + group]) for i in range(0, len(counts), group)]


def _bar(count: int, tallest: int) -> str:
    return _BLOCKS[round(math.sqrt(count / tallest) * (len(_BLOCKS) - 1))] if count else " "


def _column(score: float, summary: Summary, columns: int) -> int:
    width = summary.max - summary.min
    part = (score - summary.min) / width if width > 0 else 0.5
    return min(columns - 1, max(0, int(part * columns)))


def _card(match: Match, asked: Asked, full: float, of_answer: float) -> RenderableType:
    exact = "" if match.exact_score is None else f"   exact {heatmap.signed(match.exact_score)}"
    head = Text.assemble(
        (f"{match.rank}.", "bold"), f"  score {heatmap.signed(match.score)}{exact}   percentile {match.percentile:.1f}"
    )
    if match.position is not None:
        head.append(f"   token {line(heatmap.found_token(match))}", "bold")
    for name, value in match.meta.items():
        shown = "" if value is None else str(value)
        head.append(f"   {line(_cut(str(name), 30))} ", "dim").append(line(_cut(shown, 60)))
    prompt = Text.assemble(("Prompt    ", "dim"), (line(_cut(match.prompt, _LONGEST)), "bold"))
    heats = [_Heat("Response", match.response, match.tokens, match.token_scores, full, match.position)]
    if match.answer_scores:
        heats.append(_Heat("Answer", asked.answer, asked.tokens, match.answer_scores, of_answer))
    return Group(Text(), head, Padding(Group(prompt, *heats), (0, 0, 0, 3)))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _colourless(console: Console) -> bool:
    return console.no_color or console.color_system is None


@dataclass(frozen=True)
class _Legend:
    """What the colours of the cards mean; the signs alone where there is no colour."""

    full: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if _colourless(console):
            yield Text("Tokens with their estimated influence: + makes the answer likelier, - less likely.", "dim")
            return
        yield Text.assemble(
            ("Estimated influence of each token:  ", "dim"),
            (" makes the answer likelier ", _style(heatmap.STEPS)),
            "  ",
            ("less likely", _style(-heatmap.STEPS)),
            (f"  full colour is {heatmap.signed(self.full)[1:]}", "dim"),
        )


@dataclass(frozen=True)
class _Heat:
    """A text, coloured where the console has colours; with its strongest tokens as a list where not."""

    name: str
    text: str
    tokens: list[Span]
    scores: list[float]
    full: float
    found: int | None = None
    """The token that a search of tokens found."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = _colourless(console) or not self.scores
        text = Text.assemble((f"{self.name:<10}", "dim"), self._plain() if plain else self._coloured())
        hidden = len(self.text) - _LONGEST
        if hidden > 0:
            text.append(f" … {hidden:,} more characters", "dim")
        yield text
        if self.scores and (plain or hidden > 0):
            yield self._list()

    def _plain(self) -> Text:
        return Text(line(self.text[:_LONGEST]))

    def _coloured(self) -> Text:
        text = Text()
        pieces, rest = heatmap.cut(self.text, self.tokens, self.scores)
        for chip in pieces:
            mark = "bold reverse " if chip.holds(self.found) else ""
            text.append(line(chip.before))
            text.append(line(chip.label), (mark + _style(heatmap.step(chip.score, self.full))).strip())
            text.append(line(chip.after))
            if len(text) >= _LONGEST:
                return text
        return text.append(line(rest))

    def _list(self) -> Text:
        shares = heatmap.strongest(self.tokens, self.scores, _LISTED)
        words = (f"{heatmap.signed(share.score)}\u00a0{line(heatmap.word(share.text))}" for share in shares)
        return Text.assemble(("Strongest ", "dim"), "  ".join(words))


def _style(number: int) -> str:
    if abs(number) < _WEAKEST:
        return ""
    mark = "underline " if number < 0 else ""
    return f"{mark}{heatmap.LIGHT.text} on {heatmap.blend(heatmap.LIGHT, number)}"
