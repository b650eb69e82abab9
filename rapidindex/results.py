"""What a query returns, as plain data, and its JSON. Imports neither torch nor faiss.

Positions, never token strings, are keys: `token_scores[i]` belongs to `tokens[i]`, and a token's text is
`response[start:end]`.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rapidindex.errors import DataError

SCHEMA = "rapidindex.result/1"

HISTOGRAM_BINS = 50


@dataclass(frozen=True)
class Token:
    """One token of a response, shown as the text it stands for."""

    text: str
    """`response[start:end]`; for a token that ends the turn, the token's own name."""
    start: int
    """Characters of the response before it. Tokens that share a character, as byte-level ones may, share its span."""
    end: int
    """Where it ends; equal to `start`, at the response's end, for a token that ends the turn."""


@dataclass(frozen=True)
class ScoreSummary:
    """One query's scores over all live rows; zeros where there is no row."""

    n: int
    min: float
    max: float
    mean: float
    std: float
    histogram: list[int]
    """Counts in `HISTOGRAM_BINS` equal bins from min to max."""


@dataclass(frozen=True)
class Match:
    """One training example that a search found."""

    rank: int
    """1 for the first."""
    score: float
    """The estimated influence: the inner product of RapidGrads."""
    exact_score: float | None
    """The uncompressed influence; of an example the mean of `token_scores`. None where it was not computed."""
    percentile: float
    """Percent of all rows that score lower."""
    id: str
    prompt: str
    response: str
    meta: dict[str, Any]
    """The example's other columns."""
    tokens: list[Token] = field(default_factory=list)
    """The response's tokens."""
    token_scores: list[float] = field(default_factory=list)
    """The influence of each of `tokens` (Eq. 6 and 8); empty where it was not computed."""
    position: int | None = None
    """Which of `tokens` was found where tokens were searched: the scores are its own. None for an example."""
    answer_scores: list[float] = field(default_factory=list)
    """Its influence on each token of the query's answer (Eq. 7), whose mean over the selection is `exact_score`; empty
    where it was not computed."""


@dataclass(frozen=True)
class QueryInfo:
    """The query: what was said, and which of its tokens are asked about."""

    prompt: str
    answer: str
    tokens: list[Token]
    """The answer's tokens."""
    selection: list[int]
    """Positions in `tokens`; all of them for the whole sentence."""


@dataclass(frozen=True)
class IndexInfo:
    """The index that was searched."""

    id: str
    model: str
    adapter: str | None
    K: int
    shuffles: int
    n: int
    """Rows searched."""


@dataclass(frozen=True)
class Seconds:
    """Where the time went."""

    gradient: float
    search: float
    rerank: float
    heatmaps: float


@dataclass(frozen=True)
class Rescoring:
    """How far the RapidGrad scores of the candidates were off the uncompressed influence that orders the matches."""

    candidates: int
    rank_correlation: float | None
    """Spearman's, between the two orders of the candidates; None for fewer than two."""
    largest_move: int
    """Places by which a candidate moved, at most."""


@dataclass(frozen=True)
class Result:
    """The training examples that most influence a query's answer, best first."""

    index: IndexInfo
    query: QueryInfo
    direction: str
    """`proponents` (training on them makes the answer likelier) or `opponents`."""
    level: str
    """`sentence` or `token`."""
    search: str
    """`exact` or `ann`."""
    recall: float | None
    """1.0 for `exact`, the recall measured at build time for `ann`, None where it was not measured."""
    seconds: Seconds
    summary: ScoreSummary | None
    """None for `ann`, which does not score every row."""
    matches: list[Match]
    rescoring: Rescoring | None = None
    """Where the matches are ordered by `exact_score` instead of `score`."""

    def to_json(self, *, indent: int | None = None) -> str:
        """The result as JSON text; never NaN or infinity."""
        value = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)

    def to_html(self, *, opponents: "Result | None" = None, command: str = "") -> str:
        """One self-contained HTML page, with the other direction's matches beside these where `opponents` gives them.

        `command` is shown as what makes the page again.
        """
        from rapidindex.views import html

        return html.page(self, opponents, command)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from rapidindex.views import html

        return html.fragment(self)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The result that `to_json` wrote. Raises DataError for anything else."""
        try:
            value = json.loads(text)
            schema = value.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                "This is not a rapidindex result.", hint="Give what `rapidindex query --json` prints."
            ) from error
        if schema != SCHEMA:
            raise DataError(f"The result has the schema {schema!r}, not {SCHEMA!r}.", hint="Upgrade rapidindex.")
        query, summary, rescoring = value.pop("query"), value.pop("summary"), value.pop("rescoring", None)
        matches = [{**match, "tokens": _spans(match["tokens"])} for match in value.pop("matches")]
        return cls(
            index=IndexInfo(**value.pop("index")),
            query=QueryInfo(**{**query, "tokens": _spans(query["tokens"])}),
            seconds=Seconds(**value.pop("seconds")),
            summary=ScoreSummary(**summary) if summary else None,
            rescoring=Rescoring(**rescoring) if rescoring else None,
            matches=[Match(**match) for match in matches],
            **value,
        )


def _spans(values: list[dict[str, Any]]) -> list[Token]:
    return [Token(**value) for value in values]
