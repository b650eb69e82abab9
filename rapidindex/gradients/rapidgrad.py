"""From a batch to its RapidGrads: per-example gradients, corrected, normalised and compressed layer by layer.

The way is the same for a training example and for a query, so that inner products of RapidGrads estimate Eq. 5 to 8
(with e·η = 1). Each layer goes into the sketch as soon as its gradient is known. Knows nothing of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.gradients.eigenbases import Eigenbases
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.sketch import Sketch


@dataclass(frozen=True)
class RapidGrads:
    """What is kept of a batch; an example whose norms are not all finite has no usable row."""

    rows: Float[Tensor, "examples K"]
    norms: Float[Tensor, "examples layers"]
    """Length of each layer's corrected gradient, before normalising."""
    losses: Float[Tensor, " examples"]


def joined(found: Sequence[RapidGrads]) -> RapidGrads:
    """Those of several batches as one."""
    if len(found) == 1:
        return found[0]
    parts = ([getattr(one, name) for one in found] for name in ("rows", "norms", "losses"))
    return RapidGrads(*map(torch.cat, parts))


class Compressor:
    """Turns batches of one model into RapidGrads.

    `normalize` is `unit` (the whole gradient to length 1), `layer` (every layer to length 1, section 3.2) or `none`;
    `correction` the factor of each gradient entry, float32 [|v|], or None; along `eigenbases` where they are given.
    """

    def __init__(
        self,
        gradients: PerExampleGradients,
        sketch: Sketch,
        *,
        normalize: str,
        correction: Tensor | None = None,
        eigenbases: Eigenbases | None = None,
    ) -> None:
        self.gradients = gradients
        self.sketch = sketch
        self.normalize = normalize
        self.correction = correction
        self.eigenbases = eigenbases

    def __call__(self, batch: Batch) -> RapidGrads:
        """The RapidGrads of every example of `batch`, float32, on the batch's device."""
        device = batch.input_ids.device
        sums = self.sketch.empty(len(batch), device)
        norms = torch.zeros(len(batch), len(self.gradients.layers), device=device)

        def consume(number: int, values: Tensor) -> None:
            layer = self.gradients.layers[number]
            self.correct(number, values)
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
        """The u of a query (a batch of one), such that ⟨u, ∇L(s)⟩ is its influence on s but for the norms of s.

        It is the corrected and normalised gradient, corrected once more for the other side; uncompressed, float32.
        """
        layers = self.gradients.layers
        flat = torch.zeros(layers[-1].start + layers[-1].size, device=batch.input_ids.device)
        norms = torch.zeros(len(layers), device=flat.device)

        def consume(number: int, values: Tensor) -> None:
            layer = layers[number]
            self.correct(number, values)
            norms[number] = values.norm()
            flat[layer.start : layer.start + layer.size] = values[0]

        self.gradients(batch, consume)
        if self.normalize == "unit":
            flat /= _or_one(norms.norm())
        if self.normalize == "layer":
            flat = self.divided(flat, norms)
        for number, layer in enumerate(layers):
            self.correct(number, flat[None, layer.start : layer.start + layer.size])
        return flat

    def correct(self, number: int, values: Float[Tensor, "examples n"]) -> None:
        """Correct one layer's gradients, in place."""
        if self.correction is None:
            return
        layer = self.gradients.layers[number]
        factors = self.correction[layer.start : layer.start + layer.size]
        if self.eigenbases is None:
            values.mul_(factors)
        else:
            values.copy_(
                self.eigenbases.from_eigenbasis(number, self.eigenbases.to_eigenbasis(number, values) * factors)
            )

    def divided(self, flat: Float[Tensor, " size"], norms: Float[Tensor, " layers"]) -> Float[Tensor, " size"]:
        """A copy of a flattened gradient with each layer's part divided by its norm; a zero norm divides by 1."""
        sizes = torch.tensor([layer.size for layer in self.gradients.layers], device=flat.device)
        return flat / _or_one(norms).repeat_interleave(sizes)


def _or_one(lengths: Tensor) -> Tensor:
    """A zero gradient has no direction: it stays zero."""
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))
