"""How many candidates an approximate index needs to find most of the exact answer, and the share that it finds.

An index estimates scores. Its errors come from the fold and from keeping few bits, and are much the same for every
query in proportion to the query's length. So a search reads the candidates whose estimates come within a margin of the
k-th best score: few where the best rows stand out, many where they do not. The margin is measured, because RaBitQ's own
error bound (Gao and Long, 2024) does not cover the fold.

Recall is measured with held-out queries. A real query is the gradient of a prompt and an answer that are not among the
stored examples, computed by the same recipe. Two kinds stand in for it. Each is made from a stored row, and the rows of
that row's example then count in no answer:

    left out   the row itself: the query that another example of the same data would give
    faint      c times the row, plus white noise that restores its length, c uniform in [.4, 1]: much of a single
               token's gradient lies in no row's direction

Over 9,225 real rows (SmolLM2, LoRA, K = 65,536; 50 real queries of each sort) the scores of left-out rows have a
standard deviation of .0223 (median) and those of whole answers .0221. Those of single tokens have .0158, from .52 of
the rows' for the lowest tenth to .86 for the upper quarter: the range of c matches that. The recall of an index is its
recall for the worse kind.

The margin is the larger of two: what 64 queries' ten best rows need, and what they would need with the errors of all
rows whose exact scores are known, which are many more. The first alone varies with the rows that are drawn: of 100
draws, one in ten leaves a recall of .985, and one of .978, where .99 is meant. Knows vectors, not text.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Float32, Int64
from msgspec import Meta

from rapidindex.search.exact import live_scores, top
from rapidindex.store import Rows
from rapidindex.typed import Count

KINDS = ("left out", "faint")
FAINTEST = 0.4
QUERIES = 64
"""Held-out queries of each kind: 640 rows to find at recall@10, which measures .99 to within about .004."""
DEPTHS = (10, 100)
"""The k at which recall is measured."""
MAX_CANDIDATES = 2**15
"""A search that would read more rows than this, or a quarter of them all, scans instead."""
_MIN_CANDIDATES, _ROUNDING = 32, 1e-6
_TIES = 28  # rows kept beyond the deepest k, because any row that ties with the k-th counts as found

Pair = Annotated[list[float], Meta(min_length=2, max_length=2)]
Answer = tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]
"""Scores and numbers of the best rows for one query, best first."""
Candidates = tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]]
"""Estimated scores, best first, in lengths of the query (of minus the query for opponents), and row numbers. The number
is -1 for a removed row and, with the estimate -inf, where the index holds no more rows."""
CandidateSearch = Callable[[Float32[np.ndarray, "queries K"], int, int | None], Candidates]
"""A search of an index: (queries, number of candidates, lists to visit) → candidates."""


@dataclass(frozen=True)
class HeldOutQueries:
    """Queries of both kinds, and their exact answers in both directions."""

    queries: Float32[np.ndarray, "queries K"]
    kinds: list[str]
    """The kind of each query."""
    excluded: list[Int64[np.ndarray, " _"]]
    """For each query the rows of the example that it is made from; they count in no answer."""
    answers: dict[bool, list[Answer]]
    """The answer to each query, for True (proponents) and False (opponents)."""


@dataclass(frozen=True)
class Calibration:
    """The measurements in one direction, and the margin and counts that searches in it use."""

    margin: float | None
    """A search reads the rows whose estimates come within this of the k-th best score, in lengths of the query. None
    where a search would read too many rows, or no margin reached the target: searches are exact then."""
    candidates: Count
    """Candidates of a search's first round for k = 10: enough for nine tenths of the held-out queries."""
    rows_read: Pair
    """The median and the mean of the rows read for a held-out query at k = 10; an exact scan counts as all rows."""
    lists: Count | None
    """Lists of an IVF index that a search visits; None for other indexes."""
    recall_at_10: float
    """For the worse kind of query, with this margin; without one, with the maximum of candidates."""
    recall_at_100: float
    by_kind: dict[str, Pair]
    """Recall@10 and recall@100 of each kind."""
    queries: Count
    """Held-out queries of both kinds."""
    rows: Count
    """Live rows at the time of the measurement."""

    def recall(self, k: int) -> float:
        """Return the recall to report for a search of k rows: between 10 and 100 the lower of the two measured."""
        if k <= DEPTHS[0]:
            return self.recall_at_10
        return min(self.recall_at_10, self.recall_at_100) if k < DEPTHS[1] else self.recall_at_100


def draw_held_out(
    rows: Rows, *, seed: int, device: str = "cpu", threads: int | None = None, count: int = QUERIES
) -> HeldOutQueries | None:
    """Draw `count` queries of each kind by `seed`, and find their exact answers in one pass over the rows.

    None where fewer than two examples have live rows, and nothing can be measured.
    """
    rng = np.random.default_rng([seed, 1])
    live = rng.permutation(np.flatnonzero(rows.live_mask))
    _, first = np.unique(rows.example[live], return_index=True)
    one_per_example = rng.permutation(live[first])
    if len(one_per_example) < 2:
        return None
    numbers = one_per_example[:count]
    left_out = rows.take(numbers)
    noise = rng.standard_normal(left_out.shape, np.float32)
    noise *= np.linalg.norm(left_out, axis=1, keepdims=True) / np.float32(rows.K**0.5)
    share = rng.uniform(FAINTEST, 1, (len(numbers), 1)).astype(np.float32)
    queries = np.concatenate([left_out, share * left_out + np.sqrt(1 - share**2) * noise])
    kinds = [kind for kind in KINDS for _ in numbers]
    excluded = [np.flatnonzero(rows.example == example) for example in rows.example[numbers]] * len(KINDS)
    return HeldOutQueries(queries, kinds, excluded, _answers(rows, queries, excluded, device, threads))


def max_candidates(rows: int) -> int:
    """Return how many of `rows` rows a search may read. More would cost as much as a scan, which reads in order."""
    return min(MAX_CANDIDATES, rows // 4)


def calibrate(
    search: CandidateSearch, held_out: HeldOutQueries, *, largest: bool, target: float, lists: int, rows: int
) -> Calibration:
    """Find the smallest margin, and the fewest of an IVF index's `lists`, at which recall@10 reaches `target`.

    One deep search shows how far below the k-th best score each of the k best rows is estimated, and so what any margin
    finds. A search with as few candidates as nine tenths of the queries need then confirms it, because a graph that is
    asked for fewer candidates looks less far. `lists` is 0 for other indexes; `rows` is the number of live rows.
    """
    most = max(1, max_candidates(rows))
    visited = _enough_lists(search, held_out, largest, target, lists, most) if lists else None
    candidates = search(held_out.queries, most, visited)
    deep, deeper = (_AnswerEstimates.of(held_out, candidates, k, largest) for k in DEPTHS)
    margin = deep.margin(target)
    rows_read = deep.rows_read(candidates[0], margin, rows)
    if np.isinf(margin) or np.median(rows_read) >= rows:
        count, reached = most, False
        at_10, at_100 = deep.recall_among_candidates(), deeper.recall_among_candidates()
    else:
        count = int(np.clip(np.quantile(rows_read, 0.9), min(_MIN_CANDIDATES, most), most))
        while True:
            first = _AnswerEstimates.of(held_out, search(held_out.queries, count, visited), DEPTHS[0], largest)
            at_10 = first.continued(margin, deep).recall_within(margin)
            reached = min(at_10.values()) >= target
            if reached or count == most:
                break
            count = min(most, 2 * count)
        at_100 = deeper.recall_within(margin)
    return Calibration(
        margin=margin if reached else None,
        candidates=count,
        rows_read=[float(np.median(rows_read)), float(np.mean(rows_read))],
        lists=visited,
        recall_at_10=min(at_10.values()),
        recall_at_100=min(at_100.values()),
        by_kind={kind: [at_10[kind], at_100[kind]] for kind in KINDS},
        queries=len(held_out.queries),
        rows=rows,
    )


@dataclass(frozen=True)
class _AnswerEstimates:
    """An index's estimates of the true k best rows of each held-out query, in lengths of the query."""

    kinds: list[str]
    kth_scores: Float32[np.ndarray, " queries"]
    """The exact score of the k-th best row."""
    leads: list[Float32[np.ndarray, " k"]]
    """How far above that score each of the k best rows is, exactly."""
    errors: list[Float32[np.ndarray, " n"]]
    """By how much the index estimates the rows of the whole answer above their scores."""
    gaps: list[Float32[np.ndarray, " k"]]
    """How far below that score the index estimates each of the k best rows. A row missing among the candidates gets the
    last candidate's estimate: with a margin that reaches it, a search goes on to more candidates. Infinite where the
    index holds no more rows."""
    last_estimates: Float32[np.ndarray, " queries"]
    """The last candidate's estimate."""

    @classmethod
    def of(cls, held_out: HeldOutQueries, candidates: Candidates, k: int, largest: bool) -> "_AnswerEstimates":
        """Look up the rows of the exact answers among the candidates."""
        kth_scores, leads, errors, gaps = [], [], [], []
        for query, (scores, rows), estimates, numbers in zip(
            held_out.queries, held_out.answers[largest], *candidates, strict=True
        ):
            signed = (scores if largest else -scores) / (float(np.linalg.norm(query)) or 1.0)
            depth = min(k, len(rows))
            kth_score = signed[depth - 1]
            true = rows[signed >= kth_score]  # any row that ties for the last place counts
            known = estimates[np.isin(numbers, true)]
            filled = np.full(max(depth, len(true)), estimates[-1])
            filled[: len(known)] = known
            estimated = np.full(len(rows), estimates[-1])
            _, place, candidate = np.intersect1d(rows, numbers, return_indices=True)
            estimated[place] = estimates[candidate]
            kth_scores.append(kth_score)
            leads.append(signed[:depth] - kth_score)
            errors.append(estimated - signed)
            gaps.append(kth_score - np.sort(filled)[::-1][:depth])
        return cls(held_out.kinds, np.array(kth_scores), leads, errors, gaps, candidates[0][:, -1])

    def margin(self, target: float) -> float:
        """Return the smallest margin that finds a share `target` of the k best rows of either kind of query.

        It would do so as well if any known row's error were that of any of the k best.
        """
        pairs = zip(self._by_kind(self.leads), self._by_kind(self.errors), strict=True)
        gaps = [*self._by_kind(self.gaps), *(-np.add.outer(leads, errors).ravel() for leads, errors in pairs)]
        return max(0.0, *(float(np.quantile(gap, target, method="inverted_cdf")) for gap in gaps)) + _ROUNDING

    def rows_read(self, estimates: Float32[np.ndarray, "queries count"], margin: float, rows: int) -> np.ndarray:
        """Return how many candidates each query's search reads; all `rows` where the margin reaches the last one."""
        thresholds = self.kth_scores - margin
        within = (estimates >= thresholds[:, None]).sum(axis=1)
        return np.where(self.last_estimates >= thresholds, rows, within)

    def continued(self, margin: float, more: "_AnswerEstimates") -> "_AnswerEstimates":
        """Replace by those among `more` candidates the estimates of queries whose search would go on."""
        goes_on = self.last_estimates >= self.kth_scores - margin
        gaps = [later if again else now for now, later, again in zip(self.gaps, more.gaps, goes_on, strict=True)]
        return replace(self, gaps=gaps)

    def recall_within(self, margin: float) -> dict[str, float]:
        """Return the recall of each kind for searches with this margin."""
        return self._shares([gaps <= margin for gaps in self.gaps])

    def recall_among_candidates(self) -> dict[str, float]:
        """Return the recall of each kind for searches that read all candidates and no other rows."""
        reach = self.kth_scores - self.last_estimates
        return self._shares([gaps < limit for gaps, limit in zip(self.gaps, reach, strict=True)])

    def _shares(self, hits: list[np.ndarray]) -> dict[str, float]:
        shares = [round(float(kind_hits.mean()), 6) for kind_hits in self._by_kind(hits)]
        return dict(zip(KINDS, shares, strict=True))

    def _by_kind(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Concatenate the values of all queries of each kind."""
        return [np.concatenate([v for v, k in zip(values, self.kinds, strict=True) if k == kind]) for kind in KINDS]


def _answers(
    rows: Rows, queries: np.ndarray, excluded: list[np.ndarray], device: str, threads: int | None
) -> dict[bool, list[Answer]]:
    live = np.flatnonzero(rows.live_mask)
    answers: dict[bool, list[Answer]] = {True: [], False: []}
    for scores, left_out in zip(live_scores(rows, queries, device=device, threads=threads), excluded, strict=True):
        counts = ~np.isin(live, left_out)
        scores, numbers = scores[counts], live[counts]
        for largest in answers:
            best = top(scores, DEPTHS[-1] + _TIES, largest)
            answers[largest].append((scores[best], numbers[best]))
    return answers


def _enough_lists(
    search: CandidateSearch, held_out: HeldOutQueries, largest: bool, target: float, lists: int, count: int
) -> int:
    """Return the fewest lists whose rows hold a share `target` of the answers; all lists where no fewer do."""
    visited = max(1, lists // 64)
    while visited < lists:
        estimates = _AnswerEstimates.of(held_out, search(held_out.queries, count, visited), DEPTHS[0], largest)
        if min(estimates.recall_among_candidates().values()) >= target:
            return visited
        visited *= 2
    return lists
