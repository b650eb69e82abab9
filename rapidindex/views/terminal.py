"""Results for people, on a terminal: tables, or cards where there are token scores. Imports neither torch nor faiss.

Training text is untrusted: control characters are shown, never sent to the terminal, and no markup in it counts.
"""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rapidindex.results import Asked, Match, Result
from rapidindex.views import cards, heatmap
from rapidindex.views.sanitize import line

_META_WIDTH = 16
_META_LEAST = 9


def result(found: Result) -> RenderableType:
    """A query's answer with the selected tokens marked, its matches, and how they lie among all scores."""
    parts: list[RenderableType] = [_asked(found.query), Text()]
    if any(match.token_scores for match in found.matches):
        parts += [Text(found.direction, style="bold"), cards.cards(found), Text()]
    else:
        parts.append(_matches(found))
    if found.summary and sum(found.summary.histogram):
        parts.append(cards.Histogram(found.summary, found.matches))
    if said := heatmap.rescored(found):
        parts.append(Text(said, style="dim"))
    if said := heatmap.verdict(found):
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


def _asked(asked: Asked) -> Text:
    selected = set(asked.selection)
    text = Text.assemble(("Prompt  ", "dim"), line(asked.prompt), "\n", ("Answer  ", "dim"))
    if len(selected) == len(asked.tokens):
        return text.append(line(asked.answer))
    runs = _runs(asked)
    for (start, end), chosen in runs:
        text.append(line(asked.answer[start:end]), "bold reverse" if chosen else "")
    words = " … ".join(asked.answer[start:end].strip() for (start, end), chosen in runs if chosen)
    return text.append(f"\nAbout   {line(words)}", "dim")


def _runs(asked: Asked) -> list[tuple[tuple[int, int], bool]]:
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
    token = f"{line(heatmap.found_token(match))} in " if match.position is not None else ""
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
    return f"{how} over {found.index.n:,} {heatmap.things(found)} in {total:.2f} s{spread}"


def _recall(recall: float | None) -> str:
    return "recall not measured" if recall is None else f"recall {recall:.3f} measured"


def _short(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
