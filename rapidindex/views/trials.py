"""A verification in words, and on a terminal: a verdict, a table with a small plot, and what the figures mean.

The plot has one strip a group, all on one scale: what a step on its rows, or a training without them, did to the words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rapidindex.results import Trial, TrialGroup, Verification
from rapidindex.views import heatmap
from rapidindex.views.sanitize import line

_STRIP = 17
_NAMES = {
    "top": "the matches",
    "bm25": "BM25 for the words",
    "least": "scores nearest to 0",
    "opponents": "opponents",
    "random": "random, like length",
    "unlearned": "matches, unlearned",
}


@dataclass(frozen=True)
class Row:
    """A group as a line of the table; all texts are ready to show."""

    name: str
    trials: str
    """How many rows, or draws of rows."""
    alone: str
    """The median change that a row alone makes, in nats; empty where rows were not tried alone."""
    together: str
    """The change that all rows make, in nats, or the draws' median and range."""
    points: str
    """The same of the probability, in percentage points."""
    places: list[float]
    """Where the trials of all rows lie in the plot, 0 to 1."""


def rows(found: Verification) -> list[Row]:
    """Return the lines of the table."""
    low, high = _scale(found)
    return [
        Row(
            _NAMES.get(group.name, group.name),
            _counted(group),
            f"{median(trial.log_probability for trial in group.alone):+.2f}" if group.alone else "",
            _spread([trial.log_probability for trial in group.together], "{:+.2f}"),
            _spread([trial.probability for trial in group.together], _points(found)),
            [(trial.log_probability - low) / (high - low) for trial in group.together],
        )
        for group in found.groups
    ]


def zero(found: Verification) -> float:
    """Return where no change lies in the plot, 0 to 1."""
    low, high = _scale(found)
    return -low / (high - low)


def scale(found: Verification) -> tuple[str, str]:
    """Return the plot's ends, in nats."""
    return tuple(f"{end:+.2f}" for end in _scale(found))


def verdict(found: Verification) -> str:
    """Return in one sentence or two what is shown, beside what controls do; where nothing is shown, that.

    Something is shown where the matches change the words by more than every random draw, in the direction that speaks
    for them. With so few controls no p-value would mean anything.
    """
    top, random = found.group("top").together[0], found.group("random").together
    beside, shown = _beside(found, random), _is_shown(found, top, random)
    n, words = len(top.rows), _words(found)
    start, end = _percent(found.probability), _percent(found.probability + top.probability / 100)
    if found.method == "retrain":
        what = f"without these {n} rows the training leaves {words} at {end}, where it was {start}"
    else:
        what = f"a step of training on these {n} rows takes {words} from {start} to {end}"
    if not shown:
        return f"Nothing is shown: {what}, and {beside}."
    return f"{what[0].upper()}{what[1:]}; {beside}."


def notes(found: Verification) -> list[str]:
    """Return sentences on what the figures mean and how they were made."""
    if found.method == "retrain":
        return _retraining_notes(found)
    sentences = [
        "A row's own gradient moves a word almost by definition: a step shows that these rows can move it, not that"
        " they did. What informs is how much further they move it than the rows that a text search finds."
    ]
    bm25 = found.group("bm25")
    if bm25:
        shared = len({*bm25.together[0].rows} & {*found.group("top").together[0].rows})
        sentences.append(f"{shared} of BM25's {len(bm25.together[0].rows)} rows are among the matches.")
    if found.nats_per_score is not None and found.score_correlation is not None:
        best = max((trial.score for trial in found.group("top").alone), default=0.0)
        sentences.append(
            f"In such a step a score of {best:.3f} is worth {best * found.nats_per_score:+.3f} nats of log-probability"
            f" (correlation of score and change {found.score_correlation:.2f}; of first-order prediction and change "
            f"{_or_dash(found.prediction_correlation)})."
        )
    sentences.append(
        f"Steps: {found.optimizer}, learning rate {found.learning_rate:.3g}, losses summed over the rows, from the"
        " indexed checkpoint; the weights were put back bit by bit."
    )
    return sentences


def terminal(found: Verification) -> RenderableType:
    """Return a verification for a terminal."""
    head = Text.assemble(("Prompt  ", "dim"), line(found.query.prompt), "\n", ("Answer  ", "dim"))
    for piece, marked in heatmap.marked_answer(found.query):
        head.append(line(piece), "bold reverse" if marked else "")
    said = [Text(line(sentence), "dim") for sentence in notes(found)]
    return Group(head, Text(), Text(line(verdict(found)), "bold"), _table(found), *said)


def _table(found: Verification) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), show_edge=False)
    low, high = scale(found)
    alone = any(group.alone for group in found.groups)
    table.add_column("rows", no_wrap=True)
    for name in ("", *(["alone"] if alone else []), "together, nats"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{low}{'nats':^{_STRIP - len(low) - len(high)}}{high}", no_wrap=True)
    for row in rows(found):
        cells = [row.name, row.trials, *([row.alone] if alone else []), row.together]
        table.add_row(*cells, _strip(row.places, zero(found)))
    return table


def _strip(places: Sequence[float], origin: float) -> Text:
    """Return the trials as dots in a line, with a mark where nothing changes."""
    cells = ["·"] * _STRIP
    cells[_cell(origin)] = "│"
    for place in places:
        cells[_cell(place)] = "●"
    return Text("".join(cells))


def _cell(place: float) -> int:
    return min(_STRIP - 1, max(0, int(place * _STRIP)))


def _scale(found: Verification) -> tuple[float, float]:
    """Return the ends of the plot in nats: 0 is within, and they differ."""
    values = [0.0, *(trial.log_probability for group in found.groups for trial in group.together)]
    return min(values), max(max(values), min(values) + 1e-6)


def _counted(group: TrialGroup) -> str:
    n = len(group.together[0].rows)
    return f"{n}" if len(group.together) == 1 else f"{len(group.together)} × {n}"


def _spread(values: Sequence[float], form: str) -> str:
    """Return a value, or the median of several with their range."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form} ({form} to {form})".format(median(values), min(values), max(values))


def _is_shown(found: Verification, top: Trial, random: Sequence[Trial]) -> bool:
    changes = [trial.log_probability for trial in random]
    if found.method == "retrain":
        return top.log_probability < min(0.0, *changes)
    return top.log_probability > max(0.0, *changes)


def _beside(found: Verification, random: Sequence[Trial]) -> str:
    """Return what the controls do, in a clause."""
    form, points, n = _points(found), [trial.probability for trial in random], len(random[0].rows)
    if len(random) > 1:
        does = f"change it by {form} to {form} points".format(min(points), max(points))
    else:
        does = f"changes it by {form} points".format(points[0])
    if found.method == "retrain":
        runs = f"{len(random)} trainings without {n} random rows" if len(random) > 1 else f"one without {n} random rows"
        return f"{runs} {does}"
    told = f"{len(random)} random draw{'s' * (len(random) > 1)} of {n} {does}"
    if bm25 := found.group("bm25"):
        told += f", and the {len(bm25.together[0].rows)} that BM25 finds for the words by"
        told += f" {form}".format(bm25.together[0].probability)
    return told


def _retraining_notes(found: Verification) -> list[str]:
    after = found.group("top").together[0].answer
    sentences = [f"It answered “{found.answer}”, and without these rows “{after}”."]
    if found.same_run:
        sentences.append("Each training repeats the indexed model's own, with its data, order, seed and options.")
    else:
        sentences.append(
            "The indexed model was trained elsewhere: these are trainings like it, with the options that were given,"
            " compared with one from which nothing was taken."
        )
    runs = len(found.group("random").together)
    sentences.append(f"With {runs} control{'s' if runs > 1 else ''} no p-value means anything: look at the sizes.")
    return sentences


def _points(found: Verification) -> str:
    """Return the format of changes in points: a word of low probability moves by hundredths of one."""
    largest = max(abs(trial.probability) for group in found.groups for trial in group.together)
    return "{:+.1f}" if largest >= 1 else "{:+.3f}"


def _words(found: Verification) -> str:
    pieces = [text.strip() for text, marked in heatmap.marked_answer(found.query) if marked]
    if found.query.whole or not pieces:
        return "the answer"
    return " … ".join(f"“{piece}”" for piece in dict.fromkeys(pieces))


def _percent(share: float) -> str:
    """Return a share in percent with two significant digits, or three from ten percent on."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.5 else f"{percent:.2g} %"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
