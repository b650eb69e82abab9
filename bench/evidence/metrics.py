"""What is counted: auPRC and auROC over the k highest and the k lowest (section 4.5), the share among the k highest
(section 4.6), agreement of two scorings, and the mean over seeds with its 95 % interval.

The paper's Table 4 can be had in one way only: membership of the positive set (the k highest) is the *prediction*, 1
against 0 for the negative set (the k lowest), whatever the scores are; average precision and the area under the ROC
curve are taken for each query and averaged. Four poisoned rows of five above and none below give 0.8 and 0.9167, five
and one 0.9333 and 0.9167: with ten queries that is how 0.96 beside 0.9833 (two queries of the first kind) and 0.9933
beside 0.9917 (one of the second) arise. `ranked` are the same with the scores as predictions, which does
not fall where k is more than the number of poisoned rows.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score


def order_of(scores: np.ndarray) -> np.ndarray:
    """Rows by falling score [N]; of equal scores the lower row first."""
    return np.argsort(-scores, kind="stable")


def two_sets(scores: np.ndarray, planted: np.ndarray, k: int) -> dict[str, float]:
    """auPRC and auROC over the k highest and the k lowest of one query; k is at most half of the rows.

    Where neither set holds a planted row all are 0 (as the paper's random selection shows them), and where nothing else
    is held, 1.
    """
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
    """The paper's AP for one query: planted rows among the k highest, divided by k."""
    k = min(k, len(scores))
    return float(planted[order_of(scores)[:k]].sum() / k)


def agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the relative error of one query's scores [N]; 0 where undefined."""
    error = float(np.linalg.norm(scores - truth) / (np.linalg.norm(truth) or 1.0))
    if not (np.ptp(scores) and np.ptp(truth)):
        return {"pearson": 0.0, "spearman": 0.0, "error": error}
    correlations = (stats.pearsonr(scores, truth)[0], stats.spearmanr(scores, truth)[0])
    return {"pearson": float(correlations[0]), "spearman": float(correlations[1]), "error": error}


def mean_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, and the half width of its 95 % interval by Student's t over the values; None for a single one."""
    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": mean, "half": half, "n": n}
