"""The result of a query as plain data, and its JSON. Imports neither torch nor faiss, and pandas only on demand.

Tokens are identified by position, never by their text: `token_scores[i]` belongs to `tokens[i]`, whose text is
`response[start:end]`.
"""

import json
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from rapidindex import typed
from rapidindex.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas

SCHEMA = "rapidindex.result/1"

HISTOGRAM_BINS = 50


SPACELESS = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff"
)
"""Letters of scripts that put no spaces between words, in a set of a regular expression: Thai, Lao, Tibetan, Burmese,
Khmer, Chinese and Japanese."""


@dataclass(frozen=True)
class Token:
    """One token of a response, shown as the text it stands for."""

    text: str
    """`response[start:end]`; for a token that ends the turn, the token's own name."""
    start: int
    """Its first character in the response. Tokens that share a character, as byte-level ones may, share its span."""
    end: int
    """The character after its last; equal to `start`, at the response's end, for a token that ends the turn."""


@dataclass(frozen=True)
class Match:
    """A training example that the search returned."""

    rank: int
    """1 for the first."""
    score: float
    """The estimated influence: the inner product of RapidGrads."""
    exact_score: float | None
    """The uncompressed influence; for an example the mean of `token_scores`. None where it was not computed."""
    percentile: float | None
    """Percent of all rows that score lower; None for a candidate that its words brought up, and not the search."""
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
    """In a search of tokens, the position in `tokens` of the token that matched and has the scores; otherwise None."""
    answer_scores: list[float] = field(default_factory=list)
    """The example's influence on each token of the query's answer (Eq. 7); the mean over the selected tokens is
    `exact_score`. Empty where it was not computed."""
    source: str | None = None
    """The data that the example was read from, as it was named to `build` or `add`."""
    line: int | None = None
    """The line of its row in `source`, or the row's number, from 1."""


@dataclass(frozen=True)
class ScoreSummary:
    """A query's scores over all live rows; all zeros for an index without rows."""

    n: int
    """Number of scores."""
    min: float
    max: float
    mean: float
    std: float
    histogram: list[int]
    """Counts in `HISTOGRAM_BINS` equal bins from min to max."""

    def place(self, score: float) -> float:
        """Return where a score lies between min (0.0) and max (1.0); 0.5 where all scores are equal."""
        width = self.max - self.min
        return min(1.0, max(0.0, (score - self.min) / width)) if width > 0 else 0.5

    def distance(self, score: float) -> float:
        """Return how many standard deviations a score lies above the mean; 0.0 where all scores are equal."""
        return (score - self.mean) / self.std if self.std > 0 else 0.0

    @property
    def chance(self) -> float:
        """The distance of the most extreme of `n` draws from a normal distribution (Blom's approximation).

        2.5 standard deviations for 100 scores, 3.2 for 1,000, 3.9 for 10,000; 0.0 for fewer than two.
        """
        return NormalDist().inv_cdf((self.n - 0.375) / (self.n + 0.25)) if self.n > 1 else 0.0


@dataclass(frozen=True)
class QueryInfo:
    """A prompt, its answer, and the tokens of the answer to be explained."""

    prompt: str
    answer: str
    tokens: list[Token]
    """The answer's tokens."""
    selection: list[int]
    """Positions of the selected tokens in `tokens`; all of them for a query about the whole answer."""
    parts_of_words: bool = False
    """Whether the text that was asked about stands in the answer only within longer words."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The query's further keys, such as an id."""

    @property
    def whole(self) -> bool:
        """Whether the query is about the whole answer."""
        return len(set(self.selection)) == len(self.tokens)


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
    examples: int | None = None
    """Examples that the level holds, where its build was interrupted and has not stored all; None where it has."""
    planned: int | None = None
    """Examples that it was to hold; None where it holds them all."""
    encoder: str | None = None
    """The encoder whose cosine a match's `score` is; None where it is the inner product of RapidGrads. `exact_score` is
    the influence by the language model's gradients in either case."""
    specialized: bool = False
    """Whether `specialize` made the rows: `exact_score` is then the influence of compressed gradients, which alone the
    task's R is known of."""


@dataclass(frozen=True)
class Seconds:
    """Seconds that each stage of a query took."""

    gradient: float
    search: float
    rerank: float
    heatmaps: float


@dataclass(frozen=True)
class Rescoring:
    """How the order of the candidates changed from RapidGrad scores to uncompressed influence."""

    candidates: int
    """Number of examples or tokens that were scored again."""
    rank_correlation: float | None
    """Spearman's correlation of the two orders; None for fewer than two candidates."""
    largest_move: int
    """The most places that a candidate moved."""
    by_token: bool = False
    """Whether each candidate's strongest token gives the order, as for a query about words; else its `exact_score`."""
    for_words: int = 0
    """Candidates that are there because their responses hold the words of such a query, and not by their scores."""


@dataclass(frozen=True)
class Agreement:
    """How far the matches at another checkpoint are those of a result."""

    checkpoint: str
    """The other checkpoint's name."""
    common: int
    """Examples among the best ten at both."""
    ids: list[str]
    """The best ten at the other, best first; fewer where the index holds fewer."""


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
    """Given where uncompressed influence orders the matches; None where `score` does."""
    checkpoint: str | None = None
    """Of an index of several: the checkpoint that was asked, or `sum`; None for other indexes."""
    agreements: list[Agreement] = field(default_factory=list)
    """How far the other checkpoints agree; empty where one was named."""
    search_device: str = "cpu"
    """Where the search ran: `cpu`, `cuda`, `cuda:1` or `mps`."""

    def __repr__(self) -> str:
        """Return one line: the answer, the number and direction of the matches, and the first score."""
        answer = self.query.answer if len(self.query.answer) <= 60 else self.query.answer[:59] + "…"
        unit = "tokens" if self.level == "token" else "examples"
        first = f", the first scores {self.matches[0].score:+.4f}" if self.matches else ""
        return f"<Result {answer!r}: {len(self.matches)} {self.direction} of {self.index.n:,} {unit}{first}>"

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a frame with a row for each match, best first.

        Its columns are rank, score, exact_score, percentile, id, prompt, response, in a search of tokens position, and
        one for each key of the matches' `meta`, named `meta.KEY` where KEY is one of these names. Raises UsageError
        where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("Result.to_pandas needs the package pandas.", hint="pip install pandas") from error
        columns = ["rank", "score", "exact_score", "percentile", "id", "prompt", "response"]
        columns += ["position"] if self.level == "token" else []
        keys = {key: f"meta.{key}" if key in columns else key for match in self.matches for key in match.meta}
        rows = [
            {column: getattr(match, column) for column in columns}
            | {name: match.meta.get(key) for key, name in keys.items()}
            for match in self.matches
        ]
        return pandas.DataFrame(rows, columns=[*columns, *keys.values()])

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the result as JSON text, without NaN or infinity.

        `exhaustive`, `uncompressed_score` and `stands_out` are there for those who read it.
        """
        value = {"schema": SCHEMA, **asdict(self), "exhaustive": self.search == "exact"}
        for match, written in zip(self.matches, value["matches"], strict=True):
            written |= {"uncompressed_score": match.exact_score, "stands_out": self.stands_out(match)}
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)

    def stands_out(self, match: Match) -> bool | None:
        """Return whether a match scores further out than chance puts the best of as many scores; None if not known.

        Its score has the sign of the direction, and lies further from the mean than `ScoreSummary.chance`. Of a match
        that its strongest token may have brought up (`Rescoring.by_token`) a score within chance says nothing.
        """
        sign = 1 if self.direction == "proponents" else -1
        within = None if self.rescoring is not None and self.rescoring.by_token else False
        if sign * match.score <= 0:
            return within
        if self.summary is None or self.summary.n < 2:
            return None
        return (self.summary.std > 0 and sign * self.summary.distance(match.score) > self.summary.chance) or within

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Return the result that `to_json` wrote. Raises DataError for any other text or schema."""
        result = _parsed(cls, text, SCHEMA, "result", "rapidindex query --json")
        texts = [(result.query.answer, result.query.tokens), *((each.response, each.tokens) for each in result.matches)]
        outside = any(not 0 <= token.start <= token.end <= len(text) for text, tokens in texts for token in tokens)
        unknown = any(not 0 <= at < len(result.query.tokens) for at in result.query.selection)
        negative = result.summary is not None and min(result.summary.histogram, default=0) < 0
        if outside or unknown or negative:
            fault = "counts fewer than no scores" if negative else "names tokens outside its texts"
            raise DataError(f"This result {fault}.", hint="Give the output as it was written.")
        return result

    def to_html(self, *, opponents: "Result | None" = None, command: str = "") -> str:
        """Return one self-contained HTML page.

        `opponents` is the result of the other direction, to be shown beside this one; `command` is the command line
        that makes the page again, shown unless empty.
        """
        from rapidindex.views import html

        return html.page(self, opponents, command)

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows."""
        from rapidindex.views import html

        return html.fragment(self)

    def beside(self, opponents: "Result") -> "Both":
        """Return this result with that of the other direction, as a notebook shows them side by side."""
        return Both(self, opponents)


@dataclass(frozen=True)
class Both:
    """The results of both directions, for a notebook."""

    proponents: Result
    opponents: Result

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows."""
        from rapidindex.views import html

        return html.fragment(self.proponents, self.opponents)


VERIFICATION = "rapidindex.verification/1"


@dataclass(frozen=True)
class Trial:
    """What a change to the training did to the chosen tokens of an answer."""

    rows: list[str]
    """Ids of the examples that were trained on, or taken out."""
    log_probability: float
    """Change of the chosen tokens' mean log-probability, in nats."""
    probability: float
    """Change of their probability, in percentage points; of several tokens, of the geometric mean."""
    predicted: float | None = None
    """The change of `log_probability` that the gradients predict to first order; None for a retrained model."""
    score: float | None = None
    """The index's score of a row that was tried alone."""
    answer: str | None = None
    """The greedy answer of a retrained model."""


@dataclass(frozen=True)
class TrialGroup:
    """Rows of one origin: each tried alone, and all of them together."""

    name: str
    """`top` (the matches), `random` (of like length), `bm25` (found by the words), `least` (scores nearest to 0), or
    `opponents`; `unlearned` is a step up the loss of the matches."""
    alone: list[Trial]
    """A trial for each row; of `random`, for the first row of each draw. Empty where rows were not tried alone."""
    together: list[Trial]
    """One trial of all rows; of `random`, one for each draw."""


@dataclass(frozen=True)
class Verification:
    """Whether the matches of a query move its answer, beside what other rows do."""

    method: str
    """`tail-patch` (a step of training on the rows, from the indexed checkpoint) or `retrain` (without the rows)."""
    index: IndexInfo
    query: QueryInfo
    log_probability: float
    """Mean log-probability of the chosen tokens before, in nats."""
    probability: float
    """Their probability before, 0 to 1; of several tokens, the geometric mean."""
    groups: list[TrialGroup]
    seconds: float
    optimizer: str = ""
    """`sgd` or `adamw`, and whose state it began with; empty for `retrain`."""
    learning_rate: float | None = None
    """The step's; None for `retrain`."""
    prediction_correlation: float | None = None
    """Pearson's correlation of `predicted` with `log_probability`, over all rows that were tried alone."""
    score_correlation: float | None = None
    """Pearson's correlation of `score` with `log_probability`, over the same rows."""
    nats_per_score: float | None = None
    """Slope of the line through 0 that gives `log_probability` from `score`, over the same rows."""
    answer: str | None = None
    """For `retrain`, the greedy answer of the model before."""
    same_run: bool | None = None
    """For `retrain`, whether the indexed model's own training is repeated, and not one like it."""

    def group(self, name: str) -> TrialGroup | None:
        """Return the group of that name, if there is one."""
        return next((group for group in self.groups if group.name == name), None)

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the verification as JSON text, without NaN or infinity."""
        value = {"schema": VERIFICATION, **asdict(self)}
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Verification":
        """Return the verification that `to_json` wrote. Raises DataError for any other text or schema."""
        return _parsed(cls, text, VERIFICATION, "verification", "rapidindex verify --json")


def _parsed(kind: type, text: str, schema: str, what: str, command: str) -> Any:
    """Return the object of a dataclass in a JSON text. Raise DataError for any other text or schema."""
    hint = f"Give the output of `{command}`."
    try:
        value = typed.loads(text)
        found = value.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"This is not a rapidindex {what}.", hint=hint) from error
    if found != schema:
        raise DataError(f"The {what} has the schema {found!r}, not {schema!r}.", hint="Upgrade rapidindex.")
    try:
        return typed.fit(value, kind, what)
    except ValueError as error:
        raise DataError(f"This is not a rapidindex {what}: {error}.", hint=hint) from error
