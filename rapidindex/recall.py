"""Which share of the exact answer an approximate index finds, and how many candidates it takes to find enough.

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

from rapidindex.exact import live_scores, top
from rapidindex.store.rows import Rows

KINDS = ("left out", "faint")
FAINTEST = 0.4
QUERIES = 64
"""Of each kind: 640 rows to be found at recall@10, so that .99 is measured to within about .004."""
DEPTHS = (10, 100)
MOST_OVERFETCH = 2048
"""Rows of a language model's gradients are nearly orthogonal: the tenth best of 9,225 stands out by three standard
deviations, and what a fold to 4,096 adds is three quarters of one. Hundreds of candidates for each row are then
needed, for opponents more, and still far cheaper than a scan."""
_TIES = 28  # rows beyond the deepest: rows that score as much as the last one count as found, too


@dataclass(frozen=True)
class HeldOut:
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

    overfetch: int | None
    """Candidates for each row asked for; None: no over-fetch reached the target, so searches are exact."""
    lists: int | None
    """Lists of an IVF index that a search visits."""
    recall_at_10: float
    """Of the worse kind of query, at this over-fetch; at the greatest where none reached the target."""
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


Find = Callable[[Float32[np.ndarray, "queries K"], int, int | None], Int64[np.ndarray, "queries count"]]
"""(queries, candidates, lists to visit) → numbers of live rows, best first, and -1 where there is none."""


def held_out(
    rows: Rows, *, seed: int, device: str = "cpu", threads: int | None = None, queries: int = QUERIES
) -> HeldOut | None:
    """Draw `queries` of each kind and find their exact answers in one pass over the rows.

    None where fewer than two examples have live rows: there is nothing to measure then.
    """
    rng = np.random.default_rng([seed, 1])
    live = rng.permutation(np.flatnonzero(rows.alive))
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
    return HeldOut(drawn, kinds, left_out, _answers(rows, drawn, left_out, device, threads))


def most_candidates(rows: int) -> int:
    """Of so many rows: re-ranking more of them would cost as much as scanning all, which reads them in their order."""
    return rows // 4


def calibrate(find: Find, held_out: HeldOut, *, largest: bool, target: float, lists: int, rows: int) -> Calibration:
    """The smallest over-fetch, and the fewest of an IVF index's `lists`, at which recall@10 reaches `target`.

    One deep search tells at which rank each row of the answers comes, and so what any over-fetch finds. A search with
    the one chosen confirms it: a graph that is asked for less looks less far.
    """
    shallow, deep = DEPTHS
    most = max(1, min(MOST_OVERFETCH, most_candidates(rows) // shallow))
    visited = _enough_lists(find, held_out, largest, target, lists, most) if lists else None

    def recall(k: int, overfetch: int) -> dict[str, float]:
        return _recall(_places(find, held_out, k, overfetch, visited, largest), overfetch * k)

    places = _places(find, held_out, shallow, most, visited, largest)
    enough = (n for n in range(1, most) if min(_recall(places, n * shallow).values()) >= target)
    overfetch = next(enough, most)
    while min((found := recall(shallow, overfetch)).values()) < target and overfetch < most:
        overfetch = min(most, overfetch + overfetch // 4 + 1)
    below = recall(deep, overfetch)
    return Calibration(
        overfetch=overfetch if min(found.values()) >= target else None,
        lists=visited,
        recall_at_10=min(found.values()),
        recall_at_100=min(below.values()),
        by_kind={kind: [found[kind], below[kind]] for kind in KINDS},
        queries=len(held_out.queries),
        rows=rows,
    )


def _answers(
    rows: Rows, queries: np.ndarray, left_out: list[np.ndarray], device: str, threads: int | None
) -> dict[bool, list[tuple[np.ndarray, np.ndarray]]]:
    live = np.flatnonzero(rows.alive)
    answers: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {True: [], False: []}
    for scores, excluded in zip(live_scores(rows, queries, device=device, threads=threads), left_out, strict=True):
        counts = ~np.isin(live, excluded)
        scores, numbers = scores[counts], live[counts]
        for largest, so_far in answers.items():
            best = top(scores, DEPTHS[-1] + _TIES, largest)
            so_far.append((scores[best], numbers[best]))
    return answers


def _places(
    find: Find, held_out: HeldOut, k: int, overfetch: int, lists: int | None, largest: bool
) -> list[tuple[str, Float32[np.ndarray, " k"]]]:
    """The kind of each query, and where its true k best are among `overfetch` · k candidates, in order.

    Infinite: not among them. A tie for the last place counts as true.
    """
    count = overfetch * k
    candidates = find(held_out.queries, count + max(map(len, held_out.left_out)), lists)
    told = []
    for kind, numbers, excluded, (scores, rows) in zip(
        held_out.kinds, candidates, held_out.left_out, held_out.answers[largest], strict=True
    ):
        depth = min(k, len(rows))
        true = rows[scores >= scores[depth - 1] if largest else scores <= scores[depth - 1]]
        counted = numbers[(numbers >= 0) & ~np.isin(numbers, excluded)][:count]
        places = np.full(depth, np.inf, np.float32)
        found = np.flatnonzero(np.isin(counted, true))[:depth]
        places[: len(found)] = found
        told.append((kind, places))
    return told


def _recall(places: list[tuple[str, Float32[np.ndarray, " k"]]], count: int) -> dict[str, float]:
    """Of each kind of query, the mean share of the true best that are among the first `count` candidates."""
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, each in places:
        shares[kind].append(float((each < count).mean()))
    return {kind: round(float(np.mean(share)), 6) for kind, share in shares.items()}


def _enough_lists(find: Find, held_out: HeldOut, largest: bool, target: float, lists: int, overfetch: int) -> int:
    """The fewest lists whose rows hold enough of the answers; all where even those do not."""
    visited = max(1, lists // 64)
    while visited < lists:
        places = _places(find, held_out, DEPTHS[0], overfetch, visited, largest)
        if min(_recall(places, overfetch * DEPTHS[0]).values()) >= target:
            return visited
        visited *= 2
    return lists
