"""How well rankings find the examples that are relevant, beside BM25 over the same examples."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

_WORD = re.compile(r"\w+")


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


class BM25:
    """Okapi BM25 (k1 = 1.5, b = .75) over texts, whose terms are their words in lower case."""

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        self.counts = [Counter(_words(text)) for text in texts]
        self.frequency = Counter(word for counts in self.counts for word in counts)
        lengths = np.array([sum(counts.values()) for counts in self.counts], float)
        self.k1, self.saturation = k1, k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))

    def ranking(self, query: str, k: int) -> np.ndarray:
        """Return the numbers of the k texts of the highest scores, best first; of equal scores the lower number."""
        scores, n = np.zeros(len(self.counts)), len(self.counts)
        for word in set(_words(query)):
            frequency = self.frequency[word]
            inverse = np.log(1 + (n - frequency + 0.5) / (frequency + 0.5))
            counts = np.array([counts[word] for counts in self.counts], float)
            scores += inverse * counts * (self.k1 + 1) / (counts + self.saturation)
        return np.argsort(-scores, kind="stable")[:k]


def _words(text: str) -> Iterator[str]:
    return (match[0].lower() for match in _WORD.finditer(text))
