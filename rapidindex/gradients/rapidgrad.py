"""RapidGrads of a batch: per-example gradients, corrected, normalised and compressed layer by layer.

Training examples and queries are computed alike, so that inner products of RapidGrads estimate Eq. 5 to 8 (with
e·η = 1). Each layer goes into the sketch, or the two-sided projection, as soon as its gradient is known. Norms are
those of the whole gradients either way: heat-maps and `rescore`, which divide by them, then know no projection. Knows
nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.config import SketchConfig
from rapidindex.errors import StoreError
from rapidindex.gradients.curvature import Curvature
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import Preconditioner, preconditioner_of
from rapidindex.gradients.sketch import Sketch
from rapidindex.gradients.two_sided import TwoSided
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


def projection_of(config: SketchConfig, layers: Sequence[Layer], slots: Tensor | None = None) -> Sketch | TwoSided:
    """Return the projection that a recipe names; `slots` is the map of a sketch where it was computed before."""
    if config.projection == "two-sided":
        return TwoSided(layers, config)
    return Sketch(layers[-1].start + layers[-1].size, config, slots)


class Compressor:
    """Turns batches of one model into RapidGrads.

    `normalize` is `unit` (the whole gradient to length 1), `layer` (every layer to length 1, section 3.2) or `none`.
    With a `curvature` rows are multiplied by its root and brought to length 1, and norms by the length before that.
    """

    def __init__(
        self,
        gradients: PerExampleGradients,
        sketch: Sketch | TwoSided,
        *,
        normalize: str,
        preconditioner: Preconditioner | None = None,
        curvature: Curvature | None = None,
    ) -> None:
        self.curvature = curvature
        self.gradients = gradients
        self.sketch = sketch
        self.normalize = normalize
        self.preconditioner = preconditioner or Preconditioner(gradients.layers)
        factored = sketch.takes_factors and self.preconditioner.takes_factors
        self._options = {"factored": True} if factored else {}

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        gradients: PerExampleGradients,
        *,
        v: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        roots: np.ndarray | None = None,
        K: int | None = None,
        slots: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> "Compressor":
        """Return the compressor of an index's recipe, on the device of the gradients' model.

        `v` and `vectors` (float32) are the stored second moment and its eigenvectors, `roots` the stored root of a
        curvature (float32 [K, block]); `K` is the length of a row, by default that of an example's. `slots`
        (int32 [|v|]) and `factors` (float32, as long as v) are the sketch's map and the correction where they were
        computed before. StoreError where the recipe wants a second moment and there is none, DamagedIndex where it, or
        the eigenvectors, belong to other layers.
        """
        layers, device = gradients.layers, next(gradients.model.parameters()).device
        kind = preconditioner_of(recipe)
        if kind is not Preconditioner and factors is None:
            if v is None:
                raise StoreError(
                    "The index has no second moment yet: its build did not get far.",
                    hint="Go on with it by giving its rapidindex build command again.",
                )
            factors = kind.factors_of(torch.tensor(np.asarray(v)), layers)
        factors = None if factors is None else factors.to(device)
        vectors_on_device = None if vectors is None else torch.from_numpy(vectors).to(device)
        return cls(
            gradients,
            projection_of(replace(recipe.sketch, K=K or recipe.sketch.K), layers, slots),
            normalize=recipe.gradient.normalize,
            preconditioner=kind(layers, factors, vectors_on_device),
            curvature=None if roots is None else Curvature.of(roots, device),
        )

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.gradients.model.parameters()).device

    def __call__(self, batch: Batch) -> RapidGrads:
        """Return the RapidGrads of every example of `batch`, float32, on the batch's device."""
        device = batch.input_ids.device
        sums = self.sketch.empty(len(batch), device)
        norms = torch.zeros(len(batch), len(self.gradients.layers), device=device)

        def consume(number: int, values: Tensor | Factors) -> None:
            values = self.preconditioner.apply(number, values)
            factored = isinstance(values, Factors)
            norms[:, number] = values.lengths() if factored else values.norm(dim=1)
            if self.normalize == "layer":
                lengths = _or_one(norms[:, number])
                values = values.divided(lengths) if factored else values.div_(lengths.unsqueeze(1))
            self.sketch.add(sums, self.gradients.layers[number].start, values)

        losses = self.gradients(batch, consume, **self._options)
        rows = self.sketch.finish(sums)
        if self.normalize == "unit":
            rows /= _or_one(norms.norm(dim=1)).unsqueeze(1)
        if self.curvature is not None:
            rows, lengths = self.curvature(rows)
            norms *= lengths.unsqueeze(1)
        return RapidGrads(rows, norms, losses)

    def direction(self, batch: Batch, norms: Float[Tensor, " layers"] | None = None) -> Float[Tensor, " size"]:
        """Return the direction u of a query (a batch of one): ⟨u, ∇L(s)⟩ is its influence on s, but for the norms of s.

        u is the corrected and normalised gradient, corrected once more for the other side; uncompressed, float32,
        except that a curvature is that of rows. `norms` are those of the row whose share this gradient is; without
        them its own normalise it.
        """
        layers = self.gradients.layers
        flat = torch.zeros(layers[-1].start + layers[-1].size, device=batch.input_ids.device)
        own = torch.zeros(len(layers), device=flat.device)

        def consume(number: int, values: Tensor) -> None:
            layer = layers[number]
            self.preconditioner.apply(number, values)
            own[number] = values.norm()
            flat[layer.start : layer.start + layer.size] = values[0]

        self.gradients(batch, consume)
        lengths = own if norms is None else norms
        if self.normalize == "unit":
            flat /= _or_one(lengths.norm())
        if self.normalize == "layer":
            flat = self.divided(flat, lengths)
        if self.curvature is not None:
            flat = self._through_curvature(flat, self.curvature, whole=norms is None)
        for number, layer in enumerate(layers):
            self.preconditioner.apply(number, flat[None, layer.start : layer.start + layer.size])
        return flat

    def _through_curvature(
        self, flat: Float[Tensor, " size"], curvature: Curvature, *, whole: bool
    ) -> Float[Tensor, " size"]:
        """Return Pᵀ R^-1/2 r, where P is the projection and r = R^-1/2 P flat, at length 1 if it is a whole row.

        R is known of rows alone: the influence along it is that of the compressed gradients.
        """
        layers, sums = self.gradients.layers, self.sketch.empty(1, flat.device)
        for layer in layers:
            self.sketch.add(sums, layer.start, flat[None, layer.start : layer.start + layer.size])
        row = self.sketch.finish(sums)
        row = curvature(row)[0] if whole else curvature.times(row)
        (row,) = curvature.times(row)
        return torch.cat([self.sketch.transposed(row, layer.start, layer.size) for layer in layers])

    def divided(self, flat: Float[Tensor, " size"], norms: Float[Tensor, " layers"]) -> Float[Tensor, " size"]:
        """Copy a flattened gradient with each layer's part divided by its norm; a zero norm divides by 1."""
        sizes = torch.tensor([layer.size for layer in self.gradients.layers], device=flat.device)
        return flat / _or_one(norms).repeat_interleave(sizes)


def _or_one(lengths: Tensor) -> Tensor:
    """Replace zeros by ones: a zero gradient has no direction, and stays zero."""
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))
