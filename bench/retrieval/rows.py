"""The smallest row: how few bytes keep the answers of full float16 rows, and the order of the true influence?

Rows of every K from 65,536 down, each folded from the next, are kept in several forms. What a form cannot hold is lost
for good, unlike what the vector index loses, whose candidates are scored again; so the forms themselves do the scoring.

    float16        K entries and one float32 scale: the rows of the store's format 1
    8 bit, 4 bit   whole numbers, and one float32 scale: 8 bit are the rows of its format 2
    1 bit          signs, and one float32: |x|² / Σ|x_i|, so that a row's product with itself comes out right (RaBitQ's
                   correction). `rotated`: after random signs and a Hadamard transform, of rows and queries alike
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.evidence.sketched import hadamard
from bench.retrieval.tracin import BATCH_TOKENS, influences, items_of
from rapidindex import Index
from rapidindex.caching.batches import as_batch, plan_batches
from rapidindex.gradients.losses import Batch
from rapidindex.progress import Progress
from rapidindex.search.exact import top
from rapidindex.search.vector_index import fold
from rapidindex.store import Rows, decode_rows, encode_rows

SMALLEST = 1024
TOP = 10
_BLOCK = 256


def float16(rows: Tensor) -> Tensor:
    return torch.from_numpy(decode_rows(*encode_rows(rows.numpy(), "float16")))


def whole_numbers(bits: int) -> Callable[[Tensor], Tensor]:
    most = 2 ** (bits - 1) - 1

    def rounded(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / most
        return (rows / scale).round() * scale

    return rounded


def signs(rows: Tensor) -> Tensor:
    lengths = rows.square().sum(1, keepdim=True) / rows.abs().sum(1, keepdim=True).clamp(min=1e-30)
    return torch.where(rows < 0, -lengths, lengths)


def rotated(rows: Tensor) -> Tensor:
    """Flip random signs, then take the orthonormal Hadamard transform: [n, K], K a power of two."""
    flips = torch.randint(0, 2, (rows.shape[1],), generator=torch.Generator().manual_seed(29)) * 2 - 1
    return hadamard(rows * flips)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], int, bool]] = {
    "float16": (float16, 16, False),
    "8 bit": (whole_numbers(8), 8, False),
    "4 bit": (whole_numbers(4), 4, False),
    "1 bit": (signs, 1, False),
    "1 bit, rotated": (signs, 1, True),
}
"""The rounding of rows, bits an entry, and whether they are rotated before."""


def scores_by_form(rows: Rows, queries: np.ndarray, progress: Progress) -> dict[tuple[int, str], np.ndarray]:
    """Return scores [queries, live rows] by (K, form), all from one pass over the rows."""
    live, Ks = np.flatnonzero(rows.live_mask), list(_folds(rows.K))
    scores = {(K, form): np.empty((len(queries), len(live)), np.float32) for K in Ks for form in FORMS}
    plain = {K: torch.from_numpy(np.ascontiguousarray(fold(queries, K))) for K in Ks}
    turned = {K: rotated(plain[K]) for K in Ks}
    for first in range(0, len(live), _BLOCK):
        block = torch.from_numpy(rows.take(live[first : first + _BLOCK]))
        for K in Ks:
            folded = fold(block, K)
            other = rotated(folded)
            for form, (kept, _, is_rotated) in FORMS.items():
                decoded, of_query = (kept(other), turned[K]) if is_rotated else (kept(folded), plain[K])
                scores[K, form][:, first : first + len(block)] = (of_query @ decoded.T).numpy()
        progress("forms of rows", first + len(block), len(live))
    return scores


def smallest_row(
    index: Index, rows: Rows, queries: np.ndarray, kinds: list[str], batches: list[Batch], size: int, progress: Progress
) -> dict[str, Any]:
    """Measure, for every form, the recall of the full rows' best and the agreement with the true influence.

    `batches` are the first of the `queries`: their true influence is computed for `size` rows, half of them drawn at
    random, half among the best and worst of these queries.
    """
    forms = scores_by_form(rows, queries, progress)
    full = forms[rows.K, "float16"]
    places = _informative(full[: len(batches)], size)
    truth = true_influence(index, np.flatnonzero(rows.live_mask)[places], batches, progress)
    table = []
    for (K, form), scores in forms.items():
        size_on_disk = K * FORMS[form][1] // 8 + 4  # its float32 included
        recall = {way: _recall(scores, full, kinds, way == "proponents") for way in ("proponents", "opponents")}
        agreement = _agreement(scores[: len(batches)][:, places], truth)
        table.append({"K": K, "form": form, "bytes_per_row": size_on_disk, "recall_at_10": recall, **agreement})
    sizes = {"rows": len(full.T), "queries": len(queries), "true_rows": len(places), "true_queries": len(batches)}
    return {**sizes, "forms": table}


def true_influence(index: Index, numbers: np.ndarray, queries: list[Batch], progress: Progress) -> np.ndarray:
    """Return the uncompressed influence, float32 [queries, rows], of the rows of these numbers."""
    compressor, items = index.compressor_of("sentence"), items_of(index, numbers)
    directions = torch.stack([compressor.direction(query) for query in queries])
    place = {item.example.id: number for number, item in enumerate(items)}
    norms = torch.from_numpy(index.rows_of("sentence").norms(numbers))
    truth = np.empty((len(queries), len(items)), np.float32)
    batches = plan_batches(items, BATCH_TOKENS)
    for done, batch in enumerate(batches):
        progress("true influence", done, len(batches))
        here = [place[item.example.id] for item in batch]
        truth[:, here] = influences(compressor, as_batch(batch, "cpu"), directions, norms[here]).T.numpy()
    return truth


def _folds(K: int) -> Iterator[int]:
    while K >= SMALLEST:
        yield K
        K //= 2


def _informative(scores: np.ndarray, size: int) -> np.ndarray:
    """Return the places of each query's best and worst rows, and of others that are drawn."""
    rng, each = np.random.default_rng(31), max(1, size // (4 * len(scores)))
    order = np.argsort(scores, axis=1)
    chosen = np.unique(np.concatenate([order[:, :each], order[:, -each:]], axis=1))
    others = np.setdiff1d(np.arange(scores.shape[1]), chosen)
    more = rng.choice(others, min(len(others), max(0, size - len(chosen))), replace=False)
    return np.sort(np.concatenate([chosen, more]))


def _recall(scores: np.ndarray, full: np.ndarray, kinds: list[str], largest: bool) -> dict[str, float]:
    shares = _shared(scores, full, largest)
    return {kind: round(float(np.mean(shares[np.array(kinds) == kind])), 4) for kind in dict.fromkeys(kinds)}


def _agreement(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return means over the queries: rank correlation, and the share of the truly best (and worst) ten."""
    ranks = [[np.argsort(np.argsort(row)) for row in side] for side in (scores, truth)]
    spearman = [np.corrcoef(ours, true)[0, 1] for ours, true in zip(*ranks, strict=True)]
    best, worst = (_shared(scores, truth, largest) for largest in (True, False))
    means = {"spearman": spearman, "true_best_10": best, "true_worst_10": worst}
    return {name: round(float(np.mean(values)), 4) for name, values in means.items()}


def _shared(scores: np.ndarray, truth: np.ndarray, largest: bool) -> np.ndarray:
    """Return, by query, the share of the ten truly best (or worst) rows that are among the ten by `scores`."""
    pairs = zip(scores, truth, strict=True)
    return np.array([np.isin(top(true, TOP, largest), top(ours, TOP, largest)).mean() for ours, true in pairs])
