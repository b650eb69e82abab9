"""The rows that are put to the test, and those beside them: what is no better than these is not shown."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rapidindex.data.bm25 import BM25
from rapidindex.data.examples import Example
from rapidindex.errors import UsageError
from rapidindex.query.encode import EncodedQuery, selected_text
from rapidindex.query.index import Index

_SCORED = 4096
"""Rows among which the scores nearest to 0 are looked for."""
_ALIKE = 8
"""A random row is drawn from the eighth of all rows whose length is nearest to that of the row beside which it stands,
or from ten times as many rows as are drawn."""


@dataclass(frozen=True)
class Pool:
    """The live examples of an index, in the order of their rows."""

    rows: np.ndarray
    """int64 [n], the number of each example's row."""
    examples: list[Example]

    @classmethod
    def of(cls, index: Index) -> "Pool":
        """Read the examples of an index. StoreError where it holds no rows of whole examples."""
        stored = index.rows_of("sentence")
        rows = np.flatnonzero(stored.live_mask)
        return cls(rows, [Example.from_record(stored.record(int(stored.example[row]))) for row in rows])

    @cached_property
    def by_id(self) -> dict[str, int]:
        """The place of each example by its id."""
        return {example.id: place for place, example in enumerate(self.examples)}

    def only(self, ids: set[str]) -> "Pool":
        """Return the pool of the examples with these ids."""
        kept = [place for place, example in enumerate(self.examples) if example.id in ids]
        return Pool(self.rows[kept], [self.examples[place] for place in kept])

    def scores(self, index: Index, query: EncodedQuery, places: np.ndarray) -> np.ndarray:
        """Return the index's scores of the examples at these places, float32."""
        return index.scores_of(self.rows[places], query)

    def check(self, top: int) -> None:
        """Raise UsageError where there are too few examples for a control of as many rows."""
        if len(self.examples) < 2 * top:
            most = len(self.examples) // 2
            raise UsageError(
                f"Among {len(self.examples)} examples there are no {top} others to compare {top} matches with.",
                hint=f"Give --top {most}." if most else "Build an index of more examples.",
            )

    def draws(self, beside: list[int], number: int, seed: int) -> list[list[int]]:
        """Draw `number` times as many other places as `beside` has, each of a row about as long as that in its place.

        No place occurs twice in a draw.
        """
        lengths = np.array([len(example.response) for example in self.examples])
        others = np.setdiff1d(np.arange(len(lengths)), beside)
        nearest = max(10 * len(beside), len(others) // _ALIKE)
        alike = [others[np.argsort(np.abs(lengths[others] - lengths[at]), kind="stable")[:nearest]] for at in beside]
        generator = np.random.default_rng(seed)
        return [_draw(alike, generator) for _ in range(number)]

    def found_by_words(self, query: EncodedQuery, k: int) -> list[int]:
        """Return the places of the first k examples by BM25 for the chosen words, or the whole answer."""
        texts = [f"{example.prompt}\n{example.response}" for example in self.examples]
        return BM25(texts).ranking(selected_text(query.info), k).tolist()

    def least(self, index: Index, query: EncodedQuery, k: int, seed: int) -> list[int]:
        """Return the places of the k examples with the scores nearest to 0, among 4,096 at most."""
        generator, n = np.random.default_rng(seed), len(self.examples)
        places = np.sort(generator.choice(n, min(n, _SCORED), replace=False))
        nearest = np.argsort(np.abs(self.scores(index, query, places)), kind="stable")
        return places[nearest[:k]].tolist()


def _draw(alike: list[np.ndarray], generator: np.random.Generator) -> list[int]:
    drawn: list[int] = []
    for places in alike:
        drawn.append(int(generator.choice(np.setdiff1d(places, drawn))))
    return drawn
