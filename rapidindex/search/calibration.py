"""Which share of the exact answer an approximate index finds, and how many candidates it takes to find enough.

An index estimates scores. The error of its estimates is that of a fold and of few bits, much the same for every query
in proportion to its length. So the candidates that are looked at are those whose estimates come within a margin of the
answer's last score: few where the best rows stand out, many where they do not. The margin is measured; RaBitQ's own
error bound (Gao and Long, 2024) knows nothing of the fold.

Held-out queries. A real query is the gradient of a prompt and an answer that are not among the stored examples,
computed by the same recipe. Two kinds stand in for it, made of a stored row whose example is taken out of all answers:

    left out   the row itself: just what a further example of the same data would meet
    faint      c of the row and white noise for the rest of its length, c drawn evenly from .4 to 1: much of a single
               token's gradient lies in no row's direction

Over 9,225 real rows (SmolLM2, LoRA, K = 65,536; 50 real queries of each sort) the scores of left out rows have a
standard deviation of .0223 (median) and those of whole answers .0221. Those of single tokens have .0158, from .52 of
the rows' for the lowest tenth to .86 for the upper quarter: c is drawn to match. An index counts as no better than it
is on the worse kind. Knows vectors, not text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from rapidindex.search.exact import live_scores, top
from rapidindex.store import Rows

KINDS = ("left out", "faint")
FAINTEST = 0.4
QUERIES = 64
"""Of each kind: 640 rows to be found at recall@10, so that .99 is measured to within about .004."""
DEPTHS = (10, 100)
MAX_CANDIDATES = 2**15
"""A search that would have to look at more rows, or at a quarter of them all, scans instead."""
_MIN_CANDIDATES, _ROUNDING = 32, 1e-6
_TIES = 28  # rows beyond the deepest: rows that score as much as the last one count as found, too


@dataclass(frozen=True)
class HeldOutQueries:
    """Queries of both kinds, and their exact answers in both directions."""

    queries: Float32[np.ndarray, "queries K"]
    kinds: list[str]
    """The kind of each query."""
    left_out: list[Int64[np.ndarray, " _"]]
    """For each query the rows that count in no answer: all that belong to the example it is made of."""
    answers: dict[bool, list[tuple[Float32[np.ndarray, " _"], Int64[np.ndarray, " _"]]]]
    """For True (proponents) and False (opponents), for each query: scores and numbers of the best rows, best first."""


@dataclass(frozen=True)
class Calibration:
    """What was measured for one direction, and what a search does about it."""

    margin: float | None
    """A row is looked at where its estimated score comes within this of the answer's last one, in lengths of the query.
    None: too many rows would be, or none reached the target, so searches are exact."""
    candidates: int
    """Candidates taken from the index at first, for 10 rows: enough for nine tenths of the held-out queries."""
    rows_read: list[float]
    """By held-out queries for 10 rows: the median, and the mean; an exact scan counts as all rows."""
    lists: int | None
    """Lists of an IVF index that a search visits."""
    recall_at_10: float
    """Of the worse kind of query, with this margin; with the most candidates where there is none."""
    recall_at_100: float
    by_kind: dict[str, list[float]]
    """Recall@10 and @100 of each kind."""
    queries: int
    rows: int
    """Live rows when it was measured."""

    def recall(self, k: int) -> float:
        """What to state of a search for k rows: the lower figure where k lies between 10 and 100."""
        if k <= DEPTHS[0]:
            return self.recall_at_10
        return min(self.recall_at_10, self.recall_at_100) if k < DEPTHS[1] else self.recall_at_100


CandidateSearch = Callable[
    [Float32[np.ndarray, "queries K"], int, int | None],
    tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]],
]
"""(queries, candidates, lists to visit) → estimated scores, best first, in lengths of the query (of minus the query for
opponents), and the rows' numbers: -1 for rows that were removed, and, beside -inf, where the index has no more."""


def draw_held_out(
    rows: Rows, *, seed: int, device: str = "cpu", threads: int | None = None, queries: int = QUERIES
) -> HeldOutQueries | None:
    """Draw `queries` of each kind and find their exact answers in one pass over the rows.

    None where fewer than two examples have live rows: there is nothing to measure then.
    """
    rng = np.random.default_rng([seed, 1])
    live = rng.permutation(np.flatnonzero(rows.live_mask))
    _, first = np.unique(rows.example[live], return_index=True)
    one_each = rng.permutation(live[first])
    if len(one_each) < 2:
        return None
    alone = one_each[:queries]
    taken = rows.take(alone)
    noise = rng.standard_normal(taken.shape, np.float32)
    noise *= np.linalg.norm(taken, axis=1, keepdims=True) / np.float32(rows.K**0.5)
    share = rng.uniform(FAINTEST, 1, (len(taken), 1)).astype(np.float32)
    drawn = np.concatenate([taken, share * taken + np.sqrt(1 - share**2) * noise])
    kinds = [kind for kind in KINDS for _ in alone]
    left_out = [np.flatnonzero(rows.example == example) for example in rows.example[alone]] * len(KINDS)
    return HeldOutQueries(drawn, kinds, left_out, _answers(rows, drawn, left_out, device, threads))


def max_candidates(rows: int) -> int:
    """Of so many rows: looking at more of them would cost as much as scanning all, which reads them in their order."""
    return min(MAX_CANDIDATES, rows // 4)


def calibrate(
    find: CandidateSearch, held_out: HeldOutQueries, *, largest: bool, target: float, lists: int, rows: int
) -> Calibration:
    """The smallest margin, and the fewest of an IVF index's `lists`, at which recall@10 reaches `target`.

    One deep search tells how far below the answer's last score each of its rows is estimated, and so what any margin
    finds. A search for as few candidates as nine tenths of the queries need confirms it: a graph that is asked for less
    looks less far.
    """
    most = max(1, max_candidates(rows))
    visited = _enough_lists(find, held_out, largest, target, lists, most) if lists else None
    found = find(held_out.queries, most, visited)
    seen, deeper = (_AnswerEstimates.of(held_out, found, k, largest) for k in DEPTHS)
    margins = [float(np.quantile(each, target, method="inverted_cdf")) for each in seen.by_kind(seen.below)]
    margin = max(0.0, *margins) + _ROUNDING
    read = seen.rows_read(found, margin, rows)
    if np.isinf(margin) or np.median(read) >= rows:
        at_10, at_100 = (each.recall_among_candidates() for each in (seen, deeper))
        return _calibration(None, most, read, visited, at_10, at_100, held_out, rows)
    candidates = int(np.clip(np.quantile(read, 0.9), min(_MIN_CANDIDATES, most), most))
    while True:
        first = _AnswerEstimates.of(held_out, find(held_out.queries, candidates, visited), DEPTHS[0], largest)
        at_10 = first.after_continuing(margin, seen).recall_within(margin)
        if min(at_10.values()) >= target or candidates == most:
            break
        candidates = min(most, 2 * candidates)
    at_100 = deeper.recall_within(margin)
    reached = margin if min(at_10.values()) >= target else None
    return _calibration(reached, candidates, read, visited, at_10, at_100, held_out, rows)


def _calibration(
    margin: float | None,
    candidates: int,
    read: np.ndarray,
    lists: int | None,
    at_10: dict[str, float],
    at_100: dict[str, float],
    held_out: HeldOutQueries,
    rows: int,
) -> Calibration:
    return Calibration(
        margin=margin,
        candidates=candidates,
        rows_read=[float(np.median(read)), float(np.mean(read))],
        lists=lists,
        recall_at_10=min(at_10.values()),
        recall_at_100=min(at_100.values()),
        by_kind={kind: [at_10[kind], at_100[kind]] for kind in KINDS},
        queries=len(held_out.queries),
        rows=rows,
    )


@dataclass(frozen=True)
class _AnswerEstimates:
    """Where the estimates of the true k best lie, in lengths of each query."""

    kinds: list[str]
    last: Float32[np.ndarray, " queries"]
    """The score of the k-th best."""
    below: list[Float32[np.ndarray, " k"]]
    """How far below it each of them is estimated. What is not among the candidates is taken for the worst of these: a
    margin that reaches so far makes a search ask for more. Infinite where the index has no more."""
    bound: Float32[np.ndarray, " queries"]
    """The worst candidate's estimate."""

    @classmethod
    def of(
        cls, held_out: HeldOutQueries, found: tuple[np.ndarray, np.ndarray], k: int, largest: bool
    ) -> "_AnswerEstimates":
        last, below, bound = [], [], []
        for query, (scores, rows), estimates, numbers in zip(
            held_out.queries, held_out.answers[largest], *found, strict=True
        ):
            signed = (scores if largest else -scores) / (float(np.linalg.norm(query)) or 1.0)
            depth = min(k, len(rows))
            true = rows[signed >= signed[depth - 1]]  # a tie for the last place counts as true
            told = np.full(max(depth, len(true)), estimates[-1])
            there = estimates[np.isin(numbers, true)]
            told[: len(there)] = there
            last.append(signed[depth - 1])
            below.append(signed[depth - 1] - np.sort(told)[::-1][:depth])
            bound.append(estimates[-1])
        return cls(held_out.kinds, np.array(last), below, np.array(bound))

    def by_kind(self, each: list[np.ndarray]) -> list[np.ndarray]:
        """Those of all queries of one kind together."""
        return [np.concatenate([e for e, k in zip(each, self.kinds, strict=True) if k == kind]) for kind in KINDS]

    def rows_read(self, found: tuple[np.ndarray, np.ndarray], margin: float, rows: int) -> np.ndarray:
        """By each query; all where the candidates end above the margin."""
        lowest = self.last - margin
        within = (found[0] >= lowest[:, None]).sum(axis=1)
        return np.where(self.bound >= lowest, rows, within)

    def after_continuing(self, margin: float, more: "_AnswerEstimates") -> "_AnswerEstimates":
        """With `more`, seen among more candidates, of the queries whose search would go on after these."""
        goes_on = self.bound >= self.last - margin
        below = [b if again else a for a, b, again in zip(self.below, more.below, goes_on, strict=True)]
        return _AnswerEstimates(self.kinds, self.last, below, self.bound)

    def recall_within(self, margin: float) -> dict[str, float]:
        """The recall of each kind that a search with this margin has."""
        return self._shares([each <= margin for each in self.below])

    def recall_among_candidates(self) -> dict[str, float]:
        """The recall of each kind where all candidates are looked at, and no more."""
        reach = self.last - self.bound
        return self._shares([each < most for each, most in zip(self.below, reach, strict=True)])

    def _shares(self, hits: list[np.ndarray]) -> dict[str, float]:
        means = [round(float(each.mean()), 6) for each in self.by_kind(hits)]
        return dict(zip(KINDS, means, strict=True))


def _answers(
    rows: Rows, queries: np.ndarray, left_out: list[np.ndarray], device: str, threads: int | None
) -> dict[bool, list[tuple[np.ndarray, np.ndarray]]]:
    live = np.flatnonzero(rows.live_mask)
    answers: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {True: [], False: []}
    for scores, excluded in zip(live_scores(rows, queries, device=device, threads=threads), left_out, strict=True):
        counts = ~np.isin(live, excluded)
        scores, numbers = scores[counts], live[counts]
        for largest, so_far in answers.items():
            best = top(scores, DEPTHS[-1] + _TIES, largest)
            so_far.append((scores[best], numbers[best]))
    return answers


def _enough_lists(
    find: CandidateSearch, held_out: HeldOutQueries, largest: bool, target: float, lists: int, candidates: int
) -> int:
    """The fewest lists whose rows hold enough of the answers; all where even those do not."""
    visited = max(1, lists // 64)
    while visited < lists:
        found = _AnswerEstimates.of(held_out, find(held_out.queries, candidates, visited), DEPTHS[0], largest)
        if min(found.recall_among_candidates().values()) >= target:
            return visited
        visited *= 2
    return lists
