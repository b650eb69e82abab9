"""The Kronecker eigenbasis of each layer: directions along which a second moment tells more than along single entries.

For a weight of the shape [out, in], U [out, out] and V [in, in] are the eigenvectors of a sample's mean g gᵀ and gᵀ g
(Shampoo's, arXiv 1802.09568). The correction is then made along them: Uᵀ g V is multiplied, entry by entry, and turned
back (as EK-FAC does, arXiv 1806.03884, with activations where this has gradients). The sample's gradients are those of
tokens drawn from the model, the Fisher matrix's: with the tokens of the data the correction takes out what just these
examples taught, and finds less of it. A side longer than `LONGEST`, or a parameter that is no matrix, keeps its axes.
Knows nothing of files.
"""

import time
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.errors import ModelError
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import PerExampleGradients

LONGEST = 4096
"""Rows or columns of a weight, at most: eigenvectors of 4,096 take 64 MiB, and half a minute to find on one core
of a CPU (those of 1,536 took 1.5 s)."""
_TRIED = 768


def entries(layers: Sequence[Layer]) -> int:
    """How many numbers the eigenvectors of these layers are."""
    return sum(side * side for layer in layers for side in _sides(layer) if side)


def _sides(layer: Layer) -> tuple[int, int]:
    """The lengths of U and V; 0 for none."""
    if len(layer.shape) != 2:
        return 0, 0
    rows, columns = (side if 1 < side <= LONGEST else 0 for side in layer.shape)
    return rows, columns


def seconds_to_find(layers: Sequence[Layer]) -> float:
    """What the eigenvectors of these layers take to find on a CPU, told from a single small matrix."""
    sides = [side for layer in layers for side in _sides(layer) if side]
    tried = min(max(sides, default=0), _TRIED)
    began = time.perf_counter()
    _eigenvectors(torch.eye(tried).roll(1, 0).add(torch.eye(tried).roll(-1, 0)))
    return (time.perf_counter() - began) * sum((side / tried) ** 3 for side in sides)


class Eigenbases:
    """U and V of every layer; `vectors` is all of them one after the other, float32 [entries(layers)]."""

    def __init__(self, layers: Sequence[Layer], vectors: Float[Tensor, " entries"]) -> None:
        self.layers, self._of, first = layers, [], 0
        for layer in layers:
            pair = []
            for side in _sides(layer):
                pair.append(vectors[first : first + side * side].view(side, side) if side else None)
                first += side * side
            self._of.append(pair)

    def to_eigenbasis(self, number: int, values: Float[Tensor, "examples size"]) -> Float[Tensor, "examples size"]:
        """Gradients of one layer as seen along its eigenvectors: Uᵀ g V."""
        U, V = self._of[number]
        return self._product(number, values, None if U is None else U.T, V)

    def from_eigenbasis(self, number: int, values: Float[Tensor, "examples size"]) -> Float[Tensor, "examples size"]:
        """What `turned` gave, as gradients again: U g Vᵀ."""
        U, V = self._of[number]
        return self._product(number, values, U, None if V is None else V.T)

    def _product(self, number: int, values: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None and right is None:
            return values
        found = values.float().view(len(values), *self.layers[number].shape)
        found = found if left is None else left @ found
        return (found if right is None else found @ right).flatten(1)


def estimate_eigenbases(gradients: PerExampleGradients, batches: Iterable[Batch]) -> Float[Tensor, " entries"]:
    """The eigenvectors of every layer, over the examples of `batches`; gradients that are not finite are left out."""
    layers = gradients.layers
    products: dict[tuple[int, int], Tensor] = {}

    def add(number: int, values: Tensor) -> None:
        sides = _sides(layers[number])
        if not any(sides):
            return
        g = values[values.isfinite().all(1)].float().view(-1, *layers[number].shape)
        for way, equation in enumerate(("nij,nkj->ik", "nij,nik->jk")):
            if sides[way]:
                found = torch.einsum(equation, g, g)
                products[number, way] = products[number, way] + found if (number, way) in products else found

    for batch in batches:
        gradients(batch, add)
    vectors, first = torch.empty(entries(layers)), 0
    for key in sorted(products):
        found = _eigenvectors(products.pop(key))
        vectors[first : first + found.numel()] = found.flatten()
        first += found.numel()
    return vectors


def _eigenvectors(product: Float[Tensor, "side side"]) -> Float[Tensor, "side side"]:
    hint = "Build with --second-moment estimate."
    if not product.isfinite().all():
        raise ModelError("The gradients of the sample are so large that their products overflow.", hint=hint)
    product = product.cpu() if product.device.type == "mps" else product  # which has no float64
    try:  # in float32 it does not converge where many rows are zero, as an embedding's are
        return torch.linalg.eigh(product.double()).eigenvectors
    except torch.linalg.LinAlgError as error:
        raise ModelError("The eigenvectors of the sample's gradients cannot be found.", hint=hint) from error
