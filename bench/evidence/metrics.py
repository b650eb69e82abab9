"""Metrics: auPRC and auROC over the k highest and the k lowest (section 4.5), the share among the k highest (section
4.6), the agreement of two scorings, and the mean over seeds with its 95 % interval.

Only one reading gives the paper's Table 4: membership of the positive set (the k highest) is the *prediction*, 1
against 0 for the negative set (the k lowest), whatever the scores are; average precision and the area under the ROC
curve are taken query by query and averaged. Four poisoned rows of five above and none below give 0.8 and 0.9167, five
and one 0.9333 and 0.9167: with ten queries, 0.96 beside 0.9833 (two queries of the first kind) and 0.9933 beside 0.9917
(one of the second). The `ranked` metrics take the scores as predictions, and do not fall where k is more than the
number of poisoned rows.
"""

import math
from collections.abc import Sequence

import numpy as np


def order_of(scores: np.ndarray) -> np.ndarray:
    """Return the rows by falling score [N]; of equal scores the lower row comes first."""
    return np.argsort(-scores, kind="stable")


def two_sets(scores: np.ndarray, planted: np.ndarray, k: int) -> dict[str, float]:
    """Return auPRC and auROC over the k highest and the k lowest of one query; k is at most half of the rows.

    All are 0 where neither set holds a planted row (as in the paper's random selection), and 1 where all rows are.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    order, k = order_of(scores), min(k, len(scores) // 2)
    chosen = np.concatenate([order[:k], order[-k:]])
    truth, member = planted[chosen], np.repeat([1.0, 0.0], k)
    names = ("auPRC", "auROC", "ranked auPRC", "ranked auROC")
    if truth.all() or not truth.any():
        return dict.fromkeys(names, float(truth.all()))
    ranks = np.arange(2 * k, 0, -1)
    values = (
        average_precision_score(truth, member),
        roc_auc_score(truth, member),
        average_precision_score(truth, ranks),
        roc_auc_score(truth, ranks),
    )
    return dict(zip(names, map(float, values), strict=True))


def share_at(scores: np.ndarray, planted: np.ndarray, k: int) -> float:
    """Return the paper's AP for one query: planted rows among the k highest, divided by k."""
    k = min(k, len(scores))
    return float(planted[order_of(scores)[:k]].sum() / k)


def agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the relative error of one query's scores [N]; 0 if undefined."""
    from scipy import stats

    error = float(np.linalg.norm(scores - truth) / (np.linalg.norm(truth) or 1.0))
    if not (np.ptp(scores) and np.ptp(truth)):
        return {"pearson": 0.0, "spearman": 0.0, "error": error}
    correlations = (stats.pearsonr(scores, truth)[0], stats.spearmanr(scores, truth)[0])
    return {"pearson": float(correlations[0]), "spearman": float(correlations[1]), "error": error}


def mean_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, and the half width of its 95 % interval by Student's t; None for a single value."""
    n, mean, half = len(values), float(np.mean(values)), None
    if n > 1:
        from scipy import stats

        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "half": half, "n": n}
