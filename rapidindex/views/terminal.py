"""Results for people, on a terminal: tables, or cards where there are token scores. Imports neither torch nor faiss.

Training text is untrusted: control characters are shown, never sent to the terminal, and no markup in it counts.
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

_META_WIDTH = 16

_META_LEAST = 9

_LONGEST = 1200
"""Characters of a response that a card shows."""

_WEAKEST = 5
"""Colour steps below this are left plain: the terminal's own background may be dark or light."""

_LISTED = 8

_COLUMNS = 50

_BLOCKS = "▁▂▃▄▅▆▇█"


def result(found: Result) -> RenderableType:
    """A query's answer with the selected tokens marked, its matches, and how they lie among all scores."""
    parts: list[RenderableType] = [_asked(found.query), Text()]
    if any(match.token_scores for match in found.matches):
        parts += [Text(found.direction, style="bold"), cards(found), Text()]
    else:
        parts.append(_matches(found))
    if found.summary and sum(found.summary.histogram):
        parts.append(Histogram(found.summary, found.matches))
    if said := wording.rescored(found):
        parts.append(Text(said, style="dim"))
    if said := wording.verdict(found):
        parts.append(Text(said, style="bold"))
    return Group(*parts, Text(_footer(found), style="dim"))


def fields(title: str, values: dict[str, Any]) -> RenderableType:
    """Names and values, a line each."""
    table = Table(title=title, show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if name == "next":  # a command, which no table may break
            continue
        table.add_row(name, line(str(value)))
    return table


def _asked(asked: QueryInfo) -> Text:
    selected = set(asked.selection)
    text = Text.assemble(("Prompt  ", "dim"), line(asked.prompt), "\n", ("Answer  ", "dim"))
    if len(selected) == len(asked.tokens):
        return text.append(line(asked.answer))
    runs = _runs(asked)
    for (start, end), chosen in runs:
        text.append(line(asked.answer[start:end]), "bold reverse" if chosen else "")
    words = " … ".join(asked.answer[start:end].strip() for (start, end), chosen in runs if chosen)
    return text.append(f"\nAbout   {line(words)}", "dim")


def _runs(asked: QueryInfo) -> list[tuple[tuple[int, int], bool]]:
    """The answer cut where selected characters begin and end; white space before a word is not marked."""
    marked = [False] * len(asked.answer)
    for position in asked.selection:
        token = asked.tokens[position]
        blank = len(token.text) - len(token.text.lstrip())
        marked[token.start + blank : token.end] = [True] * (token.end - token.start - blank)
    edges = [i for i in range(1, len(marked)) if marked[i] != marked[i - 1]]
    return [((a, b), marked[a]) for a, b in zip([0, *edges], [*edges, len(marked)], strict=True)]


def _matches(found: Result) -> Table:
    columns = _meta_columns(found.matches)
    table = Table(title=found.direction, title_justify="left", title_style="bold", header_style="dim", expand=True)
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for name in ("#", "score", "pct"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in columns:
        widest = max(len(line(_short(match.meta.get(name)))) for match in found.matches)
        table.add_column(line(name), max_width=max(_META_LEAST, widest), overflow="fold")
    table.add_column("prompt → response", ratio=1)
    for match in found.matches:
        scores = (str(match.rank), f"{match.score:+.4f}", f"{match.percentile:.1f}")
        meta = (line(_short(match.meta.get(name))) for name in columns)
        table.add_row(*map(Text, (*scores, *meta)), _example(match))
    return table


def _example(match: Match) -> Text:
    token = f"{line(wording.found_token(match))} in " if match.position is not None else ""
    return Text.assemble(token, (line(_cut(match.prompt, 80)), "bold"), (" → ", "dim"), line(_cut(match.response, 120)))


def _meta_columns(matches: Sequence[Match]) -> list[str]:
    """The metadata worth a column: short in every match."""
    names = {name: None for match in matches for name in match.meta}
    return [n for n in names if all(len(_short(m.meta.get(n))) <= _META_WIDTH for m in matches)][:6]


def _footer(found: Result) -> str:
    seconds = found.seconds
    how = "exact search" if found.search == "exact" else f"approximate search, {_recall(found.recall)}"
    total = seconds.gradient + seconds.search + seconds.rerank + seconds.heatmaps
    spread = ""
    if found.summary and found.summary.std > 0 and found.matches:
        best = (found.matches[0].score - found.summary.mean) / found.summary.std
        spread = f"; the first lies {abs(best):.1f} standard deviations {'above' if best > 0 else 'below'} the mean"
    return f"{how} over {found.index.n:,} {wording.things(found)} in {total:.2f} s{spread}"


def _recall(recall: float | None) -> str:
    return "recall not measured" if recall is None else f"recall {recall:.3f} measured"


def _short(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def cards(found: Result) -> RenderableType:
    """The matches as cards, on one scale of colour, under a line that says what the colours mean."""
    full, of_answer = heatmap.scale(found), heatmap.answer_scale(found)
    return Group(_Legend(full), *(_card(match, found.query, full, of_answer) for match in found.matches))


@dataclass(frozen=True)
class Histogram:
    """All scores as bars that grow with the root of the count, and below them where the matches lie."""

    summary: ScoreSummary
    matches: Sequence[Match]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        summary = self.summary
        low, high = wording.signed(summary.min), wording.signed(summary.max)
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


def _column(score: float, summary: ScoreSummary, columns: int) -> int:
    width = summary.max - summary.min
    part = (score - summary.min) / width if width > 0 else 0.5
    return min(columns - 1, max(0, int(part * columns)))


def _card(match: Match, asked: QueryInfo, full: float, of_answer: float) -> RenderableType:
    exact = "" if match.exact_score is None else f"   exact {wording.signed(match.exact_score)}"
    head = Text.assemble(
        (f"{match.rank}.", "bold"), f"  score {wording.signed(match.score)}{exact}   percentile {match.percentile:.1f}"
    )
    if match.position is not None:
        head.append(f"   token {line(wording.found_token(match))}", "bold")
    for name, value in match.meta.items():
        shown = "" if value is None else str(value)
        head.append(f"   {line(_cut(str(name), 30))} ", "dim").append(line(_cut(shown, 60)))
    prompt = Text.assemble(("Prompt    ", "dim"), (line(_cut(match.prompt, _LONGEST)), "bold"))
    heats = [_Heat("Response", match.response, match.tokens, match.token_scores, full, match.position)]
    if match.answer_scores:
        heats.append(_Heat("Answer", asked.answer, asked.tokens, match.answer_scores, of_answer))
    return Group(Text(), head, Padding(Group(prompt, *heats), (0, 0, 0, 3)))


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
            (f"  full colour is {wording.signed(self.full)[1:]}", "dim"),
        )


@dataclass(frozen=True)
class _Heat:
    """A text, coloured where the console has colours; with its strongest tokens as a list where not."""

    name: str
    text: str
    tokens: list[Token]
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
        words = (f"{wording.signed(share.score)}\u00a0{line(wording.word(share.text))}" for share in shares)
        return Text.assemble(("Strongest ", "dim"), "  ".join(words))


def _style(number: int) -> str:
    if abs(number) < _WEAKEST:
        return ""
    mark = "underline " if number < 0 else ""
    return f"{mark}{heatmap.LIGHT.text} on {heatmap.blend(heatmap.LIGHT, number)}"
