"""Influence functions of the Fisher matrix F over all layers at once: the mean g gᵀ over gradients of drawn tokens.

EK-FAC leaves out what lies between layers, and all but a Kronecker product within one. The gradients, a few draws of
every example, are kept on disk: the more, the better the estimate. `cg_scores` solves with EK-FAC's damping of each
layer by conjugate gradients that EK-FAC preconditions: with each iteration the solution for a query moves from EK-FAC's
(iteration 0) to the whole matrix's. `solved_scores` solves in closed form, with one damping for all entries; and so
does `scores_by_rows`, with the rows of an index, which are at hand, in the place of drawn gradients.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.evidence.cached import Replay
from bench.evidence.curvature import DAMPING, Eigenbasis
from bench.evidence.sketched import Scores
from rapidindex.config import SketchConfig
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress

LABEL_DRAWS = 4
"""Draws of every example's tokens."""
ITERATIONS = (1, 2, 5, 10, 20)
"""After which scores are taken."""
SAMPLES = (32, 64, 500, 2000)
"""Gradients that F is the mean of, in closed form."""
DAMPINGS = (0.1, 10.0, 100.0, 1000.0, 3000.0, 10_000.0)
"""In units of F's mean eigenvalue."""


def cg_scores(
    rows: Replay,
    queries: Replay,
    drawn: Sequence[np.ndarray],
    bases: Mapping[str, Eigenbasis],
    progress: Progress,
    iterations: Sequence[int] = ITERATIONS,
) -> Scores:
    """Return scores `full/ekfac-cg-N/none` and `…/unit` of ⟨H⁻¹ q, g⟩ after each N of `iterations`.

    `drawn` are files of gradients of drawn tokens, float32 [n, |v|] each; `bases` the preconditioner.
    """
    damping = _damping(rows, drawn)
    lengths = _lengths(rows)
    b, scores = torch.from_numpy(np.array(queries.rows)), {}
    x = _solved(rows, bases, b)
    residual = b - _times(x, drawn, damping)
    along, before = None, None
    for count in range(1, max(iterations) + 1):
        preconditioned = _solved(rows, bases, residual)
        now = (residual * preconditioned).sum(1, dtype=torch.float64)
        along = preconditioned if along is None else preconditioned.add_(along.mul_((now / before).float()[:, None]))
        product = _times(along, drawn, damping)
        step = (now / (along * product).sum(1, dtype=torch.float64)).float()[:, None]
        x += step * along
        residual -= step * product
        before = now
        if count in iterations:
            found = _inner(x, rows.rows)
            scores[f"full/ekfac-cg-{count}/none"] = found
            scores[f"full/ekfac-cg-{count}/unit"] = (found / lengths).astype(np.float32)
        progress("conjugate gradients", count, max(iterations))
    return scores


def solved_scores(
    rows: Replay, queries: Replay, drawn: Sequence[np.ndarray], config: SketchConfig, progress: Progress
) -> Scores:
    """Return ⟨H⁻¹ q, g⟩, and ⟨H^-½ q, H^-½ g⟩ / |H^-½ g|, for H = F + damping, of each sample and each damping.

    By name `full/fisher-SAMPLE-DAMPING/none` and `full/fisher-root-SAMPLE-DAMPING/unit`, and so of RapidGrads, whose
    Fisher matrix is that of the sample's RapidGrads: `K=…/shuffles=…/fisher-SAMPLE-DAMPING/none/float32`.
    """
    sketch = Sketch(rows.rows.shape[1], config)
    counts = len(queries), len(rows), sum(map(len, drawn))
    compressed, whole = [sketch.empty(count) for count in counts], _Products(*counts)
    for number, layer in enumerate(rows.layers, 1):
        part = slice(layer.start, layer.start + layer.size)
        sides = [np.array(queries.rows[:, part]), np.array(rows.rows[:, part])]
        values = [torch.from_numpy(one) for one in (*sides, np.concatenate([one[:, part] for one in drawn]))]
        whole.add(*values)
        for total, value in zip(compressed, values, strict=True):
            sketch.add(total, layer.start, value)
        progress("Fisher matrix", number, len(rows.layers))
    short = _Products(*counts)
    short.add(*map(sketch.finish, compressed))
    size, named = rows.rows.shape[1], {f"fisher{{}}-{m}": m for m in SAMPLES if m <= counts[2]}
    place = f"K={config.K}/shuffles={config.shuffles}"
    return _solved_by(whole, size, named, "full") | _solved_by(short, size, named, place, "/float32")


def scores_by_rows(rows: Replay, queries: Replay, progress: Progress) -> Scores:
    """Return scores as `solved_scores` does, of whole gradients, where F is the mean over all rows at length 1.

    By name `full/rows-DAMPING/none` and `full/rows-root-DAMPING/unit`, both of rows of length 1.
    """
    products, lengths = _Products(len(queries), len(rows), len(rows)), torch.from_numpy(_lengths(rows)).float()
    for number, layer in enumerate(rows.layers, 1):
        part = slice(layer.start, layer.start + layer.size)
        asked, kept = (torch.from_numpy(np.array(side.rows[:, part])) for side in (queries, rows))
        kept /= lengths[:, None]
        products.add(asked, kept, kept)
        progress("second moment of the rows", number, len(rows.layers))
    return _solved_by(products, rows.rows.shape[1], {"rows{}": len(rows)}, "full")


class _Products:
    """Inner products of queries, rows and the sample, summed over parts of the gradient, float64."""

    def __init__(self, queries: int, rows: int, sample: int) -> None:
        shapes = ((queries, rows), (queries, sample), (rows, sample), (sample, sample))
        self.plain, self.asked, self.kept, self.gram = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        self.squares = torch.zeros(rows, dtype=torch.float64)

    def add(self, queries: Tensor, rows: Tensor, sample: Tensor) -> None:
        """Add a part of the gradient, [n, entries] each."""
        self.plain += queries @ rows.T
        self.asked += queries @ sample.T
        self.kept += rows @ sample.T
        self.gram += sample @ sample.T
        self.squares += rows.square().sum(1)


def _solved_by(products: _Products, size: int, named: Mapping[str, int], place: str, kind: str = "") -> Scores:
    """Return the scores by name; the mean eigenvalue is that over the gradient's `size` entries, compressed or not.

    `named` has the number of gradients that are taken of the sample, by a name with room for `-root`.
    """
    scores = {}
    for name, m in named.items():
        gram, asked, kept = products.gram[:m, :m], products.asked[:, :m], products.kept[:, :m]
        for damping in DAMPINGS:
            added = damping * float(gram.trace()) / m / size
            solved = torch.linalg.solve(gram + m * added * torch.eye(m), kept.T)
            found = (products.plain - asked @ solved) / added
            lengths = ((products.squares - (kept.T * solved).sum(0)) / added).sqrt()
            for root, normalize, values in (("", "none", found), ("-root", "unit", found / lengths)):
                method = f"{place}/{name.format(root)}-{damping:g}/{normalize}{kind}"
                scores[method] = values.numpy().astype(np.float32)
    return scores


def _lengths(rows: Replay) -> np.ndarray:
    return np.array([np.linalg.norm(row) for row in rows.rows])


def _damping(rows: Replay, drawn: Sequence[np.ndarray]) -> Tensor:
    """Return what is added to the diagonal of F: a share of each layer's mean, as EK-FAC has it; [|v|]."""
    squares = sum(np.square(part[here]).sum(0) for part in drawn for here in _blocks(len(part)))
    squares = torch.from_numpy(squares / sum(len(part) for part in drawn))
    damping = torch.empty_like(squares)
    for layer in rows.layers:
        part = slice(layer.start, layer.start + layer.size)
        damping[part] = DAMPING * squares[part].mean()
    return damping


def _times(x: Tensor, drawn: Sequence[np.ndarray], damping: Tensor) -> Tensor:
    """Return H x of each of `x` [Q, |v|]."""
    found = torch.zeros_like(x)
    for part in drawn:
        for here in _blocks(len(part)):
            g = torch.from_numpy(part[here])
            found.addmm_(x @ g.T, g)
    return found.div_(sum(len(part) for part in drawn)).addcmul_(x, damping)


def _solved(rows: Replay, bases: Mapping[str, Eigenbasis], x: Tensor) -> Tensor:
    """Return EK-FAC's inverse times each of `x` [Q, |v|]."""
    layers = rows.layers
    return torch.cat([bases[one.name].solved(x[:, one.start : one.start + one.size], 1.0) for one in layers], 1)


def _inner(x: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return the inner products of `x` [Q, |v|] and `rows` [n, |v|], float32 [Q, n]."""
    return np.concatenate([(x @ torch.from_numpy(np.array(rows[here])).T).numpy() for here in _blocks(len(rows))], 1)


def _blocks(count: int, size: int = 128) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
