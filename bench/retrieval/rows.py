"""The smallest row: how few bytes keep the answers of full float16 rows, and the order of the true influence?

Rows of every K from 65,536 down, each folded from the next, are kept in several forms. What a form cannot hold is lost
for good (unlike what the vector index loses: its candidates are scored again), so the forms themselves do the scoring.

    float16        K entries and one float32 scale: what the store kept in its format 1
    8 bit, 4 bit   whole numbers, and one float32 scale: the first of them is what it keeps now
    1 bit          signs, and one float32: |x|² / Σ|x_i|, so that a row's product with itself comes out right (RaBitQ's
                   correction). `rotated`: after random signs and a Hadamard transform, of rows and queries alike
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bench.retrieval.tracin import directions_of, influences, items_of
from rapidindex import Index
from rapidindex.caching.batches import as_batch, plan_batches
from rapidindex.gradients.losses import Batch
from rapidindex.progress import Progress
from rapidindex.search.vector_index import fold
from rapidindex.store.rows import Rows
from rapidindex.store.shards import decode_rows, encode_rows

SMALLEST = 1024
TOP = 10
_BLOCK = 256


def float16(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(decode_rows(*encode_rows(rows.numpy(), "float16")))


def whole_numbers(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    most = 2 ** (bits - 1) - 1

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / most
        return (rows / scale).round() * scale

    return rounded


def signs(rows: torch.Tensor) -> torch.Tensor:
    lengths = rows.square().sum(1, keepdim=True) / rows.abs().sum(1, keepdim=True).clamp(min=1e-30)
    return torch.where(rows < 0, -lengths, lengths)


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Random signs, then the orthonormal Hadamard transform: [n, K], K a power of two."""
    n, K = rows.shape
    flips = torch.randint(0, 2, (K,), generator=torch.Generator().manual_seed(29)) * 2 - 1
    rows, half = rows * flips, 1
    while half < K:
        pairs = rows.view(n, -1, 2, half)
        rows = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(n, K)
        half *= 2
    return rows / K**0.5


FORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, bool]] = {
    "float16": (float16, 16, False),
    "8 bit": (whole_numbers(8), 8, False),
    "4 bit": (whole_numbers(4), 4, False),
    "1 bit": (signs, 1, False),
    "1 bit, rotated": (signs, 1, True),
}
"""How rows are kept and read again, bits an entry, whether they are rotated before."""


def scores_by_form(rows: Rows, queries: np.ndarray, progress: Progress) -> Iterator[tuple[int, str, np.ndarray]]:
    """(K, form, scores [queries, live rows]) for each, all from one pass over the rows."""
    live, Ks = np.flatnonzero(rows.live_mask), list(_folds(rows.K))
    found = {(K, form): np.empty((len(queries), len(live)), np.float32) for K in Ks for form in FORMS}
    asked = {K: torch.from_numpy(np.ascontiguousarray(fold(queries, K))) for K in Ks}
    turned = {K: rotated(asked[K]) for K in Ks}
    for first in range(0, len(live), _BLOCK):
        block = torch.from_numpy(rows.take(live[first : first + _BLOCK]))
        for K in Ks:
            folded = fold(block, K)
            other = rotated(folded)
            for form, (kept, _, is_rotated) in FORMS.items():
                decoded, posed = (kept(other), turned[K]) if is_rotated else (kept(folded), asked[K])
                found[K, form][:, first : first + len(block)] = (posed @ decoded.T).numpy()
        progress("forms of rows", first + len(block), len(live))
    for (K, form), scores in found.items():
        yield K, form, scores


def bytes_of(K: int, form: str) -> int:
    """On disk, its float32 included."""
    return K * FORMS[form][1] // 8 + 4


def smallest_row(
    index: Index, rows: Rows, queries: np.ndarray, kinds: list[str], asked: list[Batch], size: int, progress: Progress
) -> dict[str, Any]:
    """Recall of the full rows' best, and agreement with the true influence, of every form.

    `asked` are the first of the `queries` as batches: those whose true influence is computed, for `size` rows, half of
    them drawn at random, half among the best and worst of these queries.
    """
    forms = list(scores_by_form(rows, queries, progress))
    full = next(scores for K, form, scores in forms if (K, form) == (rows.K, "float16"))
    places = _informative(full[: len(asked)], size)
    truth = true_influence(index, rows, np.flatnonzero(rows.live_mask)[places], asked, progress)
    table = []
    for K, form, scores in forms:
        recall = {
            name: _recall(sign * scores, sign * full, kinds) for name, sign in (("proponents", 1), ("opponents", -1))
        }
        agreement = _agreement(scores[: len(asked)][:, places], truth)
        table.append({"K": K, "form": form, "bytes_per_row": bytes_of(K, form), "recall_at_10": recall, **agreement})
    drawn = {"rows": len(full.T), "queries": len(queries), "true_rows": len(places), "true_queries": len(asked)}
    return {**drawn, "forms": table}


def true_influence(index: Index, rows: Rows, numbers: np.ndarray, asked: list[Batch], progress: Progress) -> np.ndarray:
    """float32 [queries, rows]: nothing compressed."""
    directions = directions_of(index, asked)
    items = items_of(index, rows, numbers)
    place = {item.example.id: i for i, item in enumerate(items)}
    truth = np.empty((len(asked), len(items)), np.float32)
    batches = plan_batches(items, 1024)
    for done, batch in enumerate(batches):
        progress("true influence", done, len(batches))
        found = influences(index.compressor, as_batch(batch, "cpu"), directions)
        truth[:, [place[item.example.id] for item in batch]] = found.T.numpy()
    return truth


def _folds(K: int) -> Iterator[int]:
    while K >= SMALLEST:
        yield K
        K //= 2


def _informative(scores: np.ndarray, size: int) -> np.ndarray:
    """Places of rows: the best and worst of each query, and others drawn."""
    rng, each = np.random.default_rng(31), max(1, size // (4 * len(scores)))
    order = np.argsort(scores, axis=1)
    chosen = np.unique(np.concatenate([order[:, :each], order[:, -each:]], axis=1))
    others = np.setdiff1d(np.arange(scores.shape[1]), chosen)
    more = rng.choice(others, min(len(others), max(0, size - len(chosen))), replace=False)
    return np.sort(np.concatenate([chosen, more]))


def _recall(scores: np.ndarray, full: np.ndarray, kinds: list[str]) -> dict[str, float]:
    shares: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, mine, theirs in zip(kinds, _best(scores), _best(full), strict=True):
        shares[kind].append(len(mine & theirs) / len(theirs))
    return {kind: round(float(np.mean(share)), 4) for kind, share in shares.items()}


def _agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Means over the queries: rank correlation, and the share of the truly best (and worst) ten."""
    ranks = [[np.argsort(np.argsort(each)) for each in both] for both in (scores, truth)]
    spearman = [np.corrcoef(mine, theirs)[0, 1] for mine, theirs in zip(*ranks, strict=True)]
    shared = {
        name: np.mean([len(a & b) / len(b) for a, b in zip(_best(sign * scores), _best(sign * truth), strict=True)])
        for name, sign in (("true_best_10", 1), ("true_worst_10", -1))
    }
    return {"spearman": round(float(np.mean(spearman)), 4)} | {n: round(float(s), 4) for n, s in shared.items()}


def _best(scores: np.ndarray) -> list[set[int]]:
    depth = min(TOP, scores.shape[1])
    return [set(np.argpartition(-each, depth - 1)[:depth].tolist()) for each in scores]
