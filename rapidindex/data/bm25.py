"""The ranking that every other one is compared with: Okapi BM25 over words. Knows no examples."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

_WORD = re.compile(r"\w+")


class BM25:
    """Okapi BM25 (k1 = 1.5, b = .75) over texts, whose terms are their words in lower case."""

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        self.counts = [Counter(_words(text)) for text in texts]
        self.frequency = Counter(word for counts in self.counts for word in counts)
        lengths = np.array([sum(counts.values()) for counts in self.counts], float)
        self.k1, self.saturation = k1, k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))

    def ranking(self, query: str, k: int) -> np.ndarray:
        """Return the numbers of the k texts of the highest scores, best first; of equal scores the lower number."""
        return np.argsort(-self.scores(query), kind="stable")[:k]

    def scores(self, query: str) -> np.ndarray:
        """Return the score of every text, float64 [texts]; 0 for one without a word of the query."""
        scores, n = np.zeros(len(self.counts)), len(self.counts)
        for word in set(_words(query)):
            frequency = self.frequency[word]
            inverse = np.log(1 + (n - frequency + 0.5) / (frequency + 0.5))
            counts = np.array([counts[word] for counts in self.counts], float)
            scores += inverse * counts * (self.k1 + 1) / (counts + self.saturation)
        return scores


def _words(text: str) -> Iterator[str]:
    return (match[0].lower() for match in _WORD.finditer(text))
