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

_META_ROOM = 18
"""Characters of all columns of metadata together."""
_META_WIDTH = 16
"""The most characters of a metadata value that gets a column of the table."""
_LONGEST = 1200
"""Characters of a response that a card shows."""
_STRONG = 0.7
"""The part of the colour steps from which a word's ground is painted where there are 16 colours."""
_SIXTEEN = (
    (("blue", "bright_white on blue"), ("red", "bright_white on red")),
    (("bright_cyan", "black on bright_cyan"), ("bright_yellow", "black on bright_yellow")),
)
"""(weak, strong) styles of negative and positive shares, on a light and on a dark ground."""
_LISTED = 8
"""Tokens in the list of the strongest."""
_BARS = 50
_BLOCKS = "▁▂▃▄▅▆▇█"


def result(result: Result, theme: heatmap.Theme = heatmap.LIGHT, *, every: bool = False) -> RenderableType:
    """Return a query's answer with the selected tokens marked, the finding, the matches, and where these lie among all.

    Matches within chance are named in one line, or are the table's rows where no other is, unless `every` is set.
    `theme` has the colours of the heat-maps: those for the terminal's own background.
    """
    parts: list[RenderableType] = [_question(result.query), Text()]
    if finding := wording.standing(result):
        parts += [Text(finding, style="bold"), Text()]
    out, rest, heading = wording.folded(result, every)
    if any(match.token_scores for match in out):
        parts += [Text(line(result.direction), style="bold"), cards(result, theme, every=every), Text()]
    else:
        parts.append(_table(result, every))
    if out and rest:
        parts += [_folded(rest, heading), Text()]
    if result.summary and sum(result.summary.histogram):
        parts.append(_Histogram(result.summary, result.matches))
    if order := wording.rescored(result):
        parts.append(Text(order, style="dim"))
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


def _table(result: Result, every: bool) -> Table:
    names = _meta_columns(result.matches)
    title = Text(line(result.direction), "bold")
    table = Table(title=title, title_justify="left", header_style="dim", expand=True)
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for name in ("#", "score", "σ", "pct"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in names:
        table.add_column(Text(line(name)), width=_column_width(result.matches, name), no_wrap=True)
    table.add_column("prompt → response", ratio=1, overflow="fold")
    out, rest, heading = wording.folded(result, every)
    if rest and not out:
        table.add_row(*[""] * (4 + len(names)), Text(f"{heading}:", "dim italic"))
    for match in out or rest:
        table.add_row(*_row(result, match, names), _example(match), style="" if out else "dim")
    return table


def _folded(matches: Sequence[Match], heading: str) -> Text:
    """Return a line with rank, score and row of each match, or its id where the row is not known."""
    named = (f"{m.rank}. {m.score:+.4f} {line(wording.place(m)) or f'id {m.id}'}" for m in matches)
    return Text(f"{heading}: {'; '.join(named)}", "dim")


def _row(result: Result, match: Match, names: list[str]) -> list[Text]:
    distance = wording.distance(result, match).removesuffix(" σ")
    scores = (str(match.rank), f"{match.score:+.4f}", distance, wording.percentile(match))
    return [*map(Text, (*scores, *(_meta(match, name) for name in names)))]


def _example(match: Match) -> Text:
    token = f"{line(wording.matched_token(match))} in " if match.position is not None else ""
    prompt = _shorten(match.prompt, 80), "bold"
    return Text.assemble(token, prompt, (" → ", "dim"), _shorten(match.response, 120), "\n", (_where(match), "dim"))


def _where(match: Match) -> str:
    """Return where a match's row stands, and its id, by which it is removed."""
    return "  ".join(filter(None, (line(wording.place(match)), f"id {match.id}")))


def _meta_columns(matches: Sequence[Match]) -> list[str]:
    """Return the first keys whose values are short in every match, as many as leave room for the texts."""
    names = dict.fromkeys(name for match in matches for name in wording.meta(match))
    short = [name for name in names if all(len(_meta(m, name)) <= _META_WIDTH for m in matches)]
    room = [sum(_column_width(matches, name) + 1 for name in short[: number + 1]) for number in range(len(short))]
    return [name for name, taken in zip(short, room, strict=True) if taken <= _META_ROOM]


def _column_width(matches: Sequence[Match], name: str) -> int:
    """Return the width of a column of metadata, whose name is never broken unless it is longer than any value."""
    return max(min(len(line(name)), _META_WIDTH), *(len(_meta(match, name)) for match in matches))


def _meta(match: Match, name: str) -> str:
    return line(wording.meta(match).get(name, ""))


def _footer(result: Result) -> str:
    seconds, summary = result.seconds, result.summary
    total = seconds.gradient + seconds.search + seconds.rerank + seconds.heatmaps
    spread = ""
    if summary and summary.std > 0 and result.matches:
        first = summary.distance(result.matches[0].score)
        spread = f"; the first lies {abs(first):.1f} standard deviations {'above' if first > 0 else 'below'} the mean"
    footer = f"{wording.search(result)} over {result.index.n:,} {wording.unit_name(result)} in {total:.2f} s{spread}"
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


def cards(result: Result, theme: heatmap.Theme = heatmap.LIGHT, *, every: bool = False) -> RenderableType:
    """Return a legend, and the matches that stand out with their heat-maps as cards on one scale of colour.

    Where it is not known what chance gives, or `every` is set, all matches have cards.
    """
    scales = heatmap.response_scale(result), heatmap.answer_scale(result)
    out, _, _ = wording.folded(result, every)
    return Group(*([_Legend(theme)] if out else []), *(_card(result, match, *scales, theme) for match in out))


def _card(result: Result, match: Match, full: float, answer_full: float, theme: heatmap.Theme) -> RenderableType:
    query = result.query
    prompt = Text.assemble(("Prompt    ", "dim"), (_shorten(match.prompt, _LONGEST), "bold"))
    whole = heatmap.total(match) if match.token_scores else 0.0
    response = match.response, match.tokens, match.token_scores
    heatmaps = [_Heatmap("Response", *response, full, whole, theme, match.position)]
    if match.answer_scores:
        whole = heatmap.answer_total(match, query)
        heatmaps.append(_Heatmap("Answer", query.answer, query.tokens, match.answer_scores, answer_full, whole, theme))
    return Group(Text(), _card_head(result, match), Padding(Group(prompt, *heatmaps), (0, 0, 0, 3)))


def _card_head(result: Result, match: Match) -> Text:
    exact = "" if match.exact_score is None else f"   {wording.exact(result)} {wording.signed(match.exact_score)}"
    distance = f"   {far}" if (far := wording.distance(result, match)) else ""
    percentile = f"   percentile {lower}" if (lower := wording.percentile(match)) else ""
    scores = f"  score {wording.signed(match.score)}{exact}{distance}{percentile}"
    head = Text.assemble((f"{match.rank}.", "bold"), scores)
    if match.position is not None:
        head.append(f"   token {line(wording.matched_token(match))}", "bold")
    for name, value in wording.meta(match).items():
        head.append(f"   {_shorten(name, 30)}\u00a0", "dim").append(_shorten(value, 60))  # on one line
    return head.append(f"\n   {_where(match)}", "dim")


def _colourless(console: Console) -> bool:
    return console.no_color or console.color_system is None


@dataclass(frozen=True)
class _Legend:
    """The meaning of the cards' colours; of the signs alone on a console without colours."""

    theme: heatmap.Theme

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        percent = "in percent of its example's"
        if _colourless(console):
            yield Text(f"Each word's estimated influence {percent}: + makes the answer likelier, - less likely.", "dim")
            return
        strong, weak = heatmap.STEPS, round(heatmap.STEPS / 2)
        styles = [_style(console, self.theme, step) for step in (strong, weak, -weak, -strong)]
        yield Text.assemble(
            ("Estimated influence of each word:  ", "dim"),
            *zip((" much likelier ", " likelier ", " less likely ", " much less "), styles, strict=True),
        )


@dataclass(frozen=True)
class _Heatmap:
    """A text in colour; on a console without colours, plain with a list of its strongest tokens."""

    name: str
    text: str
    tokens: list[Token]
    scores: list[float]
    full: float
    whole: float
    """The influence that the shares are parts of."""
    theme: heatmap.Theme
    matched: int | None = None
    """The position of the token that matched, which is marked."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = _colourless(console) or not self.scores
        text = Text.assemble((f"{self.name:<10}", "dim"), self._plain() if plain else self._coloured(console))
        hidden = len(self.text) - _LONGEST
        if hidden > 0:
            text.append(f" … {hidden:,} more characters", "dim")
        yield text
        if self.scores and (plain or hidden > 0):
            yield self._strongest()

    def _plain(self) -> Text:
        return Text(line(self.text[:_LONGEST]))

    def _coloured(self, console: Console) -> Text:
        text = Text()
        pieces, rest = heatmap.segments(*heatmap.beginning(self.text, self.tokens, self.scores))
        for piece in pieces:
            if piece.special and not piece.holds(self.matched):
                continue
            mark = "bold reverse " if piece.holds(self.matched) else ""
            style = mark + _style(console, self.theme, heatmap.colour_step(piece.score, self.full))
            text.append(line(piece.before)).append(line(piece.label), style.strip()).append(line(piece.after))
            if len(text) >= _LONGEST:
                return text
        return text.append(line(rest[: _LONGEST - len(text)]))

    def _strongest(self) -> Text:
        pieces = heatmap.strongest(self.text, self.tokens, self.scores, _LISTED)
        percents = (wording.percent(piece.score, self.whole).replace(" ", "\u00a0") for piece in pieces)
        words = (f"{percent}\u00a0{line(piece.label)}" for percent, piece in zip(percents, pieces, strict=True))
        return Text.assemble(("Strongest ", "dim"), "  ".join(words))


def _style(console: Console, theme: heatmap.Theme, step: int) -> str:
    """Return the style of a colour step. Of 16 colours, two for either sign: words painted, or on a painted ground."""
    if not step:
        return ""
    underline = "underline " if step < 0 else ""
    if console.color_system in ("standard", "windows"):
        return underline + _SIXTEEN[theme == heatmap.DARK][step > 0][abs(step) > heatmap.STEPS * _STRONG]
    return f"{underline}{theme.text} on {heatmap.step_colour(theme, step)}"
