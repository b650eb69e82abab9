"""RapidGrads of a batch: per-example gradients, corrected, normalised and compressed layer by layer.

Training examples and queries are computed alike, so that inner products of RapidGrads estimate Eq. 5 to 8 (with
e·η = 1). Each layer goes into the sketch as soon as its gradient is known. Knows nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.errors import StoreError
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import Preconditioner, preconditioner_of
from rapidindex.gradients.sketch import Sketch
from rapidindex.recipe import Recipe


@dataclass(frozen=True)
class RapidGrads:
    """The RapidGrads of a batch, with what later stages need. An example whose norms are not all finite has no row."""

    rows: Float[Tensor, "examples K"]
    norms: Float[Tensor, "examples layers"]
    """Length of each layer's corrected gradient, before normalising."""
    losses: Float[Tensor, " examples"]


def concatenate(batches: Sequence[RapidGrads]) -> RapidGrads:
    """Concatenate the RapidGrads of several batches."""
    if len(batches) == 1:
        return batches[0]
    columns = ([getattr(batch, name) for batch in batches] for name in ("rows", "norms", "losses"))
    return RapidGrads(*map(torch.cat, columns))


class Compressor:
    """Turns batches of one model into RapidGrads.

    `normalize` is `unit` (the whole gradient to length 1), `layer` (every layer to length 1, section 3.2) or `none`.
    """

    def __init__(
        self,
        gradients: PerExampleGradients,
        sketch: Sketch,
        *,
        normalize: str,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.gradients = gradients
        self.sketch = sketch
        self.normalize = normalize
        self.preconditioner = preconditioner or Preconditioner(gradients.layers)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        gradients: PerExampleGradients,
        *,
        v: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        K: int | None = None,
        slots: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> "Compressor":
        """Return the compressor of an index's recipe, on the device of the gradients' model.

        `v` (float32 [|v|]) and `vectors` (float32) are the stored second moment and its eigenvectors; `K` is the length
        of a row, by default that of an example's. `slots` (int32 [|v|]) and `factors` (float32 [|v|]) are the sketch's
        map and the correction where they were computed before. StoreError where the recipe wants a second moment and
        there is none, DamagedIndex where the eigenvectors belong to other layers.
        """
        layers, device = gradients.layers, next(gradients.model.parameters()).device
        kind = preconditioner_of(recipe.gradient.second_moment)
        if kind is not Preconditioner and factors is None:
            if v is None:
                raise StoreError(
                    "The index has no second moment yet: its build did not get far.",
                    hint="Go on with it by giving its rapidindex build command again.",
                )
            factors = kind.factors_of(torch.tensor(np.asarray(v)), layers)
        factors = None if factors is None else factors.to(device)
        vectors_on_device = None if vectors is None else torch.from_numpy(vectors).to(device)
        sketch = Sketch(layers[-1].start + layers[-1].size, replace(recipe.sketch, K=K or recipe.sketch.K), slots)
        return cls(
            gradients,
            sketch,
            normalize=recipe.gradient.normalize,
            preconditioner=kind(layers, factors, vectors_on_device),
        )

    def __call__(self, batch: Batch) -> RapidGrads:
        """Return the RapidGrads of every example of `batch`, float32, on the batch's device."""
        device = batch.input_ids.device
        sums = self.sketch.empty(len(batch), device)
        norms = torch.zeros(len(batch), len(self.gradients.layers), device=device)

        def consume(number: int, values: Tensor) -> None:
            layer = self.gradients.layers[number]
            self.preconditioner.apply(number, values)
            norms[:, number] = values.norm(dim=1)
            if self.normalize == "layer":
                values.div_(_or_one(norms[:, number]).unsqueeze(1))
            self.sketch.add(sums, layer.start, values)

        losses = self.gradients(batch, consume)
        rows = self.sketch.finish(sums)
        if self.normalize == "unit":
            rows /= _or_one(norms.norm(dim=1)).unsqueeze(1)
        return RapidGrads(rows, norms, losses)

    def direction(self, batch: Batch) -> Float[Tensor, " size"]:
        """Return the direction u of a query (a batch of one): ⟨u, ∇L(s)⟩ is its influence on s, but for the norms of s.

        u is the corrected and normalised gradient, corrected once more for the other side; uncompressed, float32.
        """
        layers = self.gradients.layers
        flat = torch.zeros(layers[-1].start + layers[-1].size, device=batch.input_ids.device)
        norms = torch.zeros(len(layers), device=flat.device)

        def consume(number: int, values: Tensor) -> None:
            layer = layers[number]
            self.preconditioner.apply(number, values)
            norms[number] = values.norm()
            flat[layer.start : layer.start + layer.size] = values[0]

        self.gradients(batch, consume)
        if self.normalize == "unit":
            flat /= _or_one(norms.norm())
        if self.normalize == "layer":
            flat = self.divided(flat, norms)
        for number, layer in enumerate(layers):
            self.preconditioner.apply(number, flat[None, layer.start : layer.start + layer.size])
        return flat

    def divided(self, flat: Float[Tensor, " size"], norms: Float[Tensor, " layers"]) -> Float[Tensor, " size"]:
        """Copy a flattened gradient with each layer's part divided by its norm; a zero norm divides by 1."""
        sizes = torch.tensor([layer.size for layer in self.gradients.layers], device=flat.device)
        return flat / _or_one(norms).repeat_interleave(sizes)


def _or_one(lengths: Tensor) -> Tensor:
    """Replace zeros by ones: a zero gradient has no direction, and stays zero."""
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))
