"""Synthetic rows that are like the real ones, for stores larger than the real data.

    row = length · unit( μ + c (r_parent - μ) + √(1 - c²) (Σ_j √λ_j g_j v_j + white noise) )

μ is the mean of the real rows. v_j are the principal directions of one half of them, and λ_j the variances of the other
half along these (the first half's own are too large where rows are few), times the one factor at which the products of
two rows vary as much as those of real rows. The remaining variance becomes white noise. So mean, spectrum and lengths
are the real ones. Such rows alone have no neighbours: real rows that share a subject score far above what the spectrum
makes likely. So every row has a parent, a real row; there are so few parents that each has ten children in as many
synthetic rows as there are real ones. Two siblings score c², plus chance. c² is the mean of the parent's ten best
scores among the real rows, times the one factor at which the median synthetic row has the ten best scores of the median
real row. More rows mean more siblings, as with more data of the same kind. `likeness` measures how well that fits.
"""

from typing import Any

import numpy as np
import torch

from rapidindex.search.vector_index import fold
from rapidindex.store import Rows

DIRECTIONS = 1024
SIBLINGS = 10
FITTED_ROWS = 10_000
"""The most real rows that the model is fitted to: 2.6 GB in float32 at K = 65,536."""
_LIKENESS_ROWS = 512
_PAIRED = 2048  # rows of each half whose products are computed
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class RowModel:
    """A distribution of rows, fitted to real rows that are folded to K."""

    def __init__(self, source: Rows, K: int) -> None:
        rng = np.random.default_rng(11)
        self.real = self._fitted(source, K, rng)
        self.lengths = self.real.norm(dim=1)
        self.mean = self.real.mean(0)
        centred = self.real - self.mean
        self.directions, self.variances, self.noise = _spectrum(centred)
        self.parents = torch.from_numpy(rng.permutation(len(self.real))[: max(1, len(self.real) // SIBLINGS)])
        self.nearness = self._nearness()

    def draw(self, count: int, *, seed: int) -> np.ndarray:
        """Return rows, float32 [count, K]: the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(len(self.parents), (count,), generator=generator)
        c = self.nearness[which].unsqueeze(1)
        weights = torch.randn(count, len(self.variances), generator=generator) * self.variances.sqrt()
        rows = weights @ self.directions
        noise = torch.empty(len(self.mean))
        for row in rows:  # a row at a time: the noise of all would double the memory
            row.add_(noise.normal_(generator=generator), alpha=self.noise)
        rows.mul_((1 - c.square()).sqrt()).add_(self.mean)
        for row, parent, share in zip(rows, self.parents[which].tolist(), c.flatten().tolist(), strict=True):
            row.add_(self.real[parent], alpha=share).sub_(self.mean, alpha=share)
        drawn = torch.randint(len(self.lengths), (count,), generator=generator)
        rows.mul_((self.lengths[drawn] / rows.norm(dim=1)).unsqueeze(1))
        return rows.numpy()

    @staticmethod
    def _fitted(source: Rows, K: int, rng: np.random.Generator) -> torch.Tensor:
        count = min(len(source), FITTED_ROWS)
        numbers = np.sort(rng.choice(len(source), count, replace=False))
        real = np.empty((count, K), np.float32)
        for first in range(0, count, 512):
            real[first : first + 512] = fold(source.take(numbers[first : first + 512]), K)
        return torch.from_numpy(real)

    def _nearness(self) -> torch.Tensor:
        """Return c of each parent, float32 [parents]."""
        units = self.lengths.unsqueeze(1)
        scores = (self.real[self.parents] / units[self.parents]) @ self.real.T / units.T
        scores[torch.arange(len(self.parents)), self.parents] = -1
        best = scores.topk(min(SIBLINGS, len(self.real) - 1), dim=1).values.mean(1).clamp(0, 0.9)
        return (best * self._factor(best)).clamp(max=0.9).sqrt()

    def _factor(self, best: torch.Tensor) -> float:
        """Return the factor of c², from products of rows that are simulated in the directions of the spectrum."""
        generator, n = torch.Generator().manual_seed(41), len(self.real)
        which = torch.randint(len(best), (n,), generator=generator)
        inside = torch.randn(n, len(self.variances), generator=generator) * self.variances.sqrt()
        some = min(n, _LIKENESS_ROWS)
        chance = torch.randn(some, n, generator=generator) * self.noise**2 * len(self.mean) ** 0.5
        background = inside[:some] @ inside.T + chance
        background[torch.arange(some), torch.arange(some)] = -1
        siblings = which[:some, None] == which

        def median_best(factor: float) -> float:
            shared = (best * factor)[which].clamp(max=0.9)
            rest = (1 - shared).sqrt()
            scores = background * rest[:some, None] * rest + siblings * (shared[:some, None] * shared).sqrt()
            return float(scores.topk(min(SIBLINGS, n - 1), dim=1).values.mean(1).median())

        low, high = 0.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if median_best(middle) < float(best.median()) else (low, middle)
        return low


def likeness(rows: Rows, numbers: np.ndarray) -> dict[str, Any]:
    """Return statistics of how hard the live rows of these numbers are to tell apart."""
    rng = np.random.default_rng(13)
    drawn = rng.choice(numbers, min(_LIKENESS_ROWS, len(numbers)), replace=False)
    some = rows.take(drawn)
    scores = np.concatenate([some @ rows.take(part).T for part in np.array_split(numbers, len(numbers) // 256 + 1)], 1)
    scores = np.sort(np.where(drawn[:, None] == numbers, np.nan, scores), axis=1)[:, :-1]  # NaN, itself, comes last
    ends = {"best": -1, "10th best": -10, "10th worst": 9, "worst": 0}
    columns = {name: scores[:, place] for name, place in ends.items()} | {"std of all": scores.std(axis=1)}
    lengths = np.linalg.norm(some, axis=1)
    values = np.linalg.eigvalsh((some / lengths[:, None]) @ (some / lengths[:, None]).T).clip(0)
    centred = some - some.mean(axis=1, keepdims=True)
    kurtosis = (centred**4).mean(axis=1) / (centred**2).mean(axis=1) ** 2
    spread = {
        name: _quantiles(column) for name, column in (columns | {"length": lengths, "kurtosis": kurtosis}).items()
    }
    effective = float(values.sum() ** 2 / (values**2).sum())
    return {"rows": len(numbers), "drawn": len(drawn), "effective rank of those drawn": effective, "quantiles": spread}


def _spectrum(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return directions [d, K] of one half of the rows, variances [d] along them, and the deviation of the noise."""
    one, other = centred[::2], centred[1::2]
    values, vectors = torch.linalg.eigh(one @ one.T)
    count = min(DIRECTIONS, len(one) - 1)
    values, vectors = values[-count:], vectors[:, -count:]
    directions = (vectors / values.clamp(min=1e-12).sqrt()).T @ one
    variances = (other @ directions.T).square().mean(0)
    K, total = centred.shape[1], float(torch.stack([row.square().sum() for row in centred]).mean())
    pairs = float((one[:_PAIRED] @ other[:_PAIRED].T).square().mean())
    variances *= _factor(variances, total, pairs, K)
    return directions, variances, (max(0.0, total - float(variances.sum())) / K) ** 0.5


def _factor(variances: torch.Tensor, total: float, pairs: float, K: int) -> float:
    """Return f such that rows of variances f λ, and noise up to `total`, have products of the mean square `pairs`.

    It is the larger root of f² Σλ² + (total - f Σλ)² / K = pairs.
    """
    explained = float(variances.sum())
    a = float(variances.square().sum()) + explained**2 / K
    b, c = -2 * total * explained / K, total**2 / K - pairs
    return min((-b + max(0.0, b * b - 4 * a * c) ** 0.5) / (2 * a), total / explained)


def _quantiles(values: Any) -> dict[str, float]:
    return {str(q): round(float(np.quantile(values, q)), 5) for q in QUANTILES}
