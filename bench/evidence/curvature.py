"""Curvature as a Kronecker product in each layer: scores of whole gradients, and of their RapidGrads.

H ≈ (U ⊗ V) Λ (U ⊗ V)ᵀ for a weight of the shape [out, in]; by name:

    ekfac/none, ekfac/unit   ⟨H⁻¹ q, g⟩, and divided by |g|: the curvature on the query's side alone, rows as they are
    ekfac-root/unit          ⟨H^-½ q, H^-½ g⟩ / |H^-½ g|: rows corrected as well, as the default corrects them
    kronecker/unit           the same with `--second-moment kronecker`: U and V are the eigenvectors of a sample's mean
                             g gᵀ and gᵀ g, Λ its mean square along them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.evidence.cached import Replay
from bench.evidence.sketched import Scores, kept_scores
from rapidindex.config import SketchConfig
from rapidindex.gradients.second_moment import KRONECKER_DAMPING
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress

DAMPING = KRONECKER_DAMPING
"""Of each layer's mean eigenvalue; kronfluence's too."""
EKFAC = {"ekfac": (1.0, 0.0), "ekfac-root": (0.5, 0.5)}
KRONECKER = {"kronecker": (0.5, 0.5)}
"""By name, the powers of H⁻¹ on the query's side and on the row's."""


@dataclass(frozen=True)
class Eigenbasis:
    """One layer's Fisher: U ⊗ V with eigenvalues Λ, damped."""

    outputs: Tensor
    """U, float32 [out, out]."""
    inputs: Tensor
    """V, float32 [in, in]."""
    eigenvalues: Tensor
    """Λ, float32 [out, in]."""

    def solved(self, gradients: Tensor, power: float) -> Tensor:
        """Return H to the -`power` times gradients [n, out · in]."""
        if power == 0:
            return gradients
        turned = self.outputs.T @ gradients.view(len(gradients), *self.eigenvalues.shape) @ self.inputs
        turned /= self.eigenvalues**power
        return (self.outputs @ turned @ self.inputs.T).flatten(1)


def of_sample(sample: Replay) -> dict[str, Eigenbasis]:
    """Return each parameter's eigenbasis from the gradients of a sample."""
    bases = {}
    for layer in sample.layers:
        flat = torch.from_numpy(np.array(sample.rows[:, layer.start : layer.start + layer.size]))
        g = flat.view(len(flat), *layer.shape)
        outputs = torch.linalg.eigh(torch.einsum("nij,nkj->ik", g, g)).eigenvectors
        inputs = torch.linalg.eigh(torch.einsum("nij,nik->jk", g, g)).eigenvectors
        eigenvalues = (outputs.T @ g @ inputs).square().mean(0)
        if not eigenvalues.any():  # LoRA's A before B has moved: as in the package, nothing is corrected
            eigenvalues = torch.ones_like(eigenvalues)
        bases[layer.name] = Eigenbasis(outputs, inputs, eigenvalues + DAMPING * eigenvalues.mean())
    return bases


def scores_of(
    bases: Mapping[str, Eigenbasis],
    powers: Mapping[str, tuple[float, float]],
    rows: Replay,
    queries: Replay,
    config: SketchConfig,
    Ks: Sequence[int],
    progress: Progress,
) -> Scores:
    """Return scores `full/NAME/…` of each name in `powers`, and `K=…/NAME/unit/…` of its RapidGrads at each of `Ks`."""
    sketch = Sketch(rows.rows.shape[1], config)
    whole = {name: torch.zeros(len(queries), len(rows), dtype=torch.float64) for name in powers}
    squares = {name: torch.zeros(len(rows)) for name in powers}
    sums = {name: (sketch.empty(len(queries)), sketch.empty(len(rows))) for name in powers}
    for number, layer in enumerate(rows.layers, 1):
        part, basis = slice(layer.start, layer.start + layer.size), bases[layer.name]
        q, g = (torch.from_numpy(np.array(side.rows[:, part])) for side in (queries, rows))
        for name, (of_query, of_row) in powers.items():
            asked, kept = basis.solved(q, of_query), basis.solved(g, of_row)
            whole[name] += asked @ kept.T
            squares[name] += kept.square().sum(1)
            for total, values in zip(sums[name], (asked, kept), strict=True):
                sketch.add(total, layer.start, values)
        progress(" and ".join(powers), number, len(rows.layers))
    scores = {f"full/{name}/none": found.numpy().astype(np.float32) for name, found in whole.items()}
    for name, lengths in ((name, found.sqrt()) for name, found in squares.items()):
        scores[f"full/{name}/unit"] = (whole[name] / lengths).numpy().astype(np.float32)
        asked, kept = (sketch.finish(total) for total in sums[name])
        scores |= kept_scores(f"{name}/unit", asked, kept / lengths[:, None], config, Ks)
    return scores
