"""Show results on a terminal: as a table, or as cards where there are token scores. Imports neither torch nor faiss.

Training text is untrusted: its control characters never reach the terminal, and no markup in it counts.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rapidindex.results import Match, QueryInfo, Result, ScoreSummary, Token
from rapidindex.views import heatmap, wording
from rapidindex.views.sanitize import line

_META_COLUMNS = 6
_META_WIDTH = 16
"""The most characters of a metadata value that gets a column of the table."""
_META_LEAST = 9
_LONGEST = 1200
"""Characters of a response that a card shows."""
_WEAKEST = 5
"""Colour steps below this one are not coloured: the terminal's own background may be dark or light."""
_LISTED = 8
"""Tokens in the list of the strongest."""
_BARS = 50
_BLOCKS = "▁▂▃▄▅▆▇█"


def result(result: Result) -> RenderableType:
    """Return a query's answer with the selected tokens marked, its matches, and where they lie among all scores."""
    parts: list[RenderableType] = [_question(result.query), Text()]
    if any(match.token_scores for match in result.matches):
        parts += [Text(line(result.direction), style="bold"), cards(result), Text()]
    else:
        parts.append(_table(result))
    if result.summary and sum(result.summary.histogram):
        parts.append(_Histogram(result.summary, result.matches))
    for sentence, style in ((wording.rescored(result), "dim"), (wording.verdict(result), "bold")):
        if sentence:
            parts.append(Text(sentence, style=style))
    return Group(*parts, Text(_footer(result), style="dim"))


def fields(title: str, values: dict[str, Any]) -> RenderableType:
    """Return a titled table with a name and its value on each line.

    The value named `next` is left out: it is a command, which a table could break over two lines.
    """
    table = Table(title=Text(line(title), "bold"), show_header=False, box=None, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if name != "next":
            table.add_row(Text(line(name)), Text(line(str(value))))
    return table


def _question(query: QueryInfo) -> Text:
    text = Text.assemble(("Prompt  ", "dim"), line(query.prompt), "\n", ("Answer  ", "dim"))
    pieces = [(line(piece), marked) for piece, marked in heatmap.marked_answer(query)]
    for piece, marked in pieces:
        text.append(piece, "bold reverse" if marked else "")
    selected = " … ".join(piece for piece, marked in pieces if marked)
    if selected:
        text.append(f"\nAbout   {selected}", "dim")
    return text.append(f"\n{wording.selected(query)}", "bold") if query.parts_of_words else text


def _table(result: Result) -> Table:
    names = _meta_columns(result.matches)
    title = Text(line(result.direction), "bold")
    table = Table(title=title, title_justify="left", header_style="dim", expand=True)
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for name in ("#", "score", "pct"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in names:
        widest = max(len(_meta(match, name)) for match in result.matches)
        table.add_column(Text(line(name)), max_width=max(_META_LEAST, widest), overflow="fold")
    table.add_column("prompt → response", ratio=1)
    for match in result.matches:
        scores = (str(match.rank), f"{match.score:+.4f}", f"{match.percentile:.1f}")
        table.add_row(*map(Text, (*scores, *(_meta(match, name) for name in names))), _example(match))
    return table


def _example(match: Match) -> Text:
    token = f"{line(wording.matched_token(match))} in " if match.position is not None else ""
    return Text.assemble(token, (_shorten(match.prompt, 80), "bold"), (" → ", "dim"), _shorten(match.response, 120))


def _meta_columns(matches: Sequence[Match]) -> list[str]:
    """Return the first keys whose values are short in every match."""
    names = dict.fromkeys(name for match in matches for name in match.meta)
    return [name for name in names if all(len(_meta(m, name)) <= _META_WIDTH for m in matches)][:_META_COLUMNS]


def _meta(match: Match, name: str) -> str:
    return line(wording.meta_text(match.meta.get(name)))


def _footer(result: Result) -> str:
    seconds, summary = result.seconds, result.summary
    recall = "recall not measured" if result.recall is None else f"recall {result.recall:.3f} measured"
    search = "exact search" if result.search == "exact" else f"approximate search, {recall}"
    total = seconds.gradient + seconds.search + seconds.rerank + seconds.heatmaps
    spread = ""
    if summary and summary.std > 0 and result.matches:
        first = (result.matches[0].score - summary.mean) / summary.std
        spread = f"; the first lies {abs(first):.1f} standard deviations {'above' if first > 0 else 'below'} the mean"
    footer = f"{search} over {result.index.n:,} {wording.unit_name(result)} in {total:.2f} s{spread}"
    return f"{footer}\n{wording.unfinished(result)}".rstrip()


def _shorten(text: str, length: int) -> str:
    """Return at most `length` characters of a text, on one line."""
    return line(text if len(text) <= length else text[: length - 1] + "…")


@dataclass(frozen=True)
class _Histogram:
    """All scores as bars that grow with the root of the count, and marks below them where the matches lie."""

    summary: ScoreSummary
    matches: Sequence[Match]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        low, high = wording.signed(self.summary.min), wording.signed(self.summary.max)
        columns = min(_BARS, max(1, options.max_width - len(low) - len(high) - 2))
        counts = _merged(self.summary.histogram, columns)
        bars = "".join(_bar(count, max(counts)) for count in counts)
        marks = [" "] * len(counts)
        for match in self.matches:
            marks[min(len(counts) - 1, int(self.summary.place(match.score) * len(counts)))] = "▲"
        yield Text(f"All {self.summary.n:,} scores; ▲ those shown here", "dim")
        yield Text(f"{low} {bars} {high}\n" + " " * (len(low) + 1) + "".join(marks).rstrip())


def _merged(counts: Sequence[int], columns: int) -> list[int]:
    group = math.ceil(len(counts) / columns)
    return [sum(counts[i : i + group]) for i in range(0, len(counts), group)]


def _bar(count: int, tallest: int) -> str:
    return _BLOCKS[round(math.sqrt(count / tallest) * (len(_BLOCKS) - 1))] if count else " "


def cards(result: Result) -> RenderableType:
    """Return a legend, and the matches with their heat-maps as cards on one scale of colour."""
    full, answer_full = heatmap.response_scale(result), heatmap.answer_scale(result)
    return Group(_Legend(full), *(_card(match, result.query, full, answer_full) for match in result.matches))


def _card(match: Match, query: QueryInfo, full: float, answer_full: float) -> RenderableType:
    prompt = Text.assemble(("Prompt    ", "dim"), (_shorten(match.prompt, _LONGEST), "bold"))
    heatmaps = [_Heatmap("Response", match.response, match.tokens, match.token_scores, full, match.position)]
    if match.answer_scores:
        heatmaps.append(_Heatmap("Answer", query.answer, query.tokens, match.answer_scores, answer_full))
    return Group(Text(), _card_head(match), Padding(Group(prompt, *heatmaps), (0, 0, 0, 3)))


def _card_head(match: Match) -> Text:
    exact = "" if match.exact_score is None else f"   exact {wording.signed(match.exact_score)}"
    scores = f"  score {wording.signed(match.score)}{exact}   percentile {match.percentile:.1f}"
    head = Text.assemble((f"{match.rank}.", "bold"), scores)
    if match.position is not None:
        head.append(f"   token {line(wording.matched_token(match))}", "bold")
    for name, value in match.meta.items():
        head.append(f"   {_shorten(str(name), 30)} ", "dim").append(_shorten(wording.meta_text(value), 60))
    return head


def _colourless(console: Console) -> bool:
    return console.no_color or console.color_system is None


@dataclass(frozen=True)
class _Legend:
    """The meaning of the cards' colours; of the signs alone on a console without colours."""

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
            (f"  full colour is {wording.signed(self.full)[1:]}", "dim"),
        )


@dataclass(frozen=True)
class _Heatmap:
    """A text in colour; on a console without colours, plain with a list of its strongest tokens."""

    name: str
    text: str
    tokens: list[Token]
    scores: list[float]
    full: float
    matched: int | None = None
    """The position of the token that matched, which is marked."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = _colourless(console) or not self.scores
        text = Text.assemble((f"{self.name:<10}", "dim"), self._plain() if plain else self._coloured())
        hidden = len(self.text) - _LONGEST
        if hidden > 0:
            text.append(f" … {hidden:,} more characters", "dim")
        yield text
        if self.scores and (plain or hidden > 0):
            yield self._strongest()

    def _plain(self) -> Text:
        return Text(line(self.text[:_LONGEST]))

    def _coloured(self) -> Text:
        text = Text()
        pieces, rest = heatmap.segments(*heatmap.beginning(self.text, self.tokens, self.scores))
        for piece in pieces:
            mark = "bold reverse " if piece.holds(self.matched) else ""
            style = mark + _style(heatmap.colour_step(piece.score, self.full))
            text.append(line(piece.before)).append(line(piece.label), style.strip()).append(line(piece.after))
            if len(text) >= _LONGEST:
                return text
        return text.append(line(rest[: _LONGEST - len(text)]))

    def _strongest(self) -> Text:
        shares = heatmap.strongest(self.tokens, self.scores, _LISTED)
        words = (f"{wording.signed(share.score)}\u00a0{line(wording.word(share.text))}" for share in shares)
        return Text.assemble(("Strongest ", "dim"), "  ".join(words))


def _style(step: int) -> str:
    if abs(step) < _WEAKEST:
        return ""
    underline = "underline " if step < 0 else ""
    return f"{underline}{heatmap.LIGHT.text} on {heatmap.step_colour(heatmap.LIGHT, step)}"
