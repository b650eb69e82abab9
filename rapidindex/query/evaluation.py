"""How well rankings find the examples that are relevant, beside BM25 over the same examples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Evaluation:
    """Means over queries: precision at k and average precision, of the index and of BM25."""

    queries: int
    k: int
    precision: float
    """Share of the first k matches that are relevant."""
    average_precision: float
    """Mean over the relevant examples of the precision at their rank, among the first k (0 for those not there)."""
    bm25_precision: float
    bm25_average_precision: float

    def to_dict(self) -> dict[str, float]:
        """Return the figures as plain data."""
        return asdict(self)


def precision_at(ranking: Sequence[str], relevant: set[str], k: int) -> float:
    """Return the share of the first k ids that are relevant."""
    return sum(id in relevant for id in ranking[:k]) / k


def average_precision(ranking: Sequence[str], relevant: set[str], k: int) -> float:
    """Return the mean of the precision at each relevant id among the first k, out of those that could be there."""
    hits = np.array([id in relevant for id in ranking[:k]], float)
    ranks = np.arange(1, len(hits) + 1)
    return float((hits * hits.cumsum() / ranks).sum() / min(k, len(relevant))) if relevant else 0.0
