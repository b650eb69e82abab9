"""The Kronecker eigenbasis of each layer, in which a second moment says more than entry by entry.

For a weight of the shape [out, in], U [out, out] and V [in, in] are the eigenvectors of the sample's mean g gᵀ and gᵀ g
(Shampoo's, arXiv 1802.09568). The correction multiplies Uᵀ g V entry by entry and rotates it back, as EK-FAC does
(arXiv 1806.03884) with activations in the place of gradients. The sample's loss is of tokens drawn from the model,
which makes the mean product the Fisher matrix: with the tokens of the data, the correction would take out what the
sample taught. A side longer than `LONGEST_SIDE`, or a parameter that is no matrix, is left as it is. Knows nothing of
files.
"""

import time
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.errors import ModelError
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import PerExampleGradients

LONGEST_SIDE = 4096
"""Rows or columns of a weight that are rotated, at most: the eigenvectors of 4,096 take 64 MiB, and half a minute on
one core of a CPU (those of 1,536 took 1.5 s)."""
_TIMED_SIDE = 768


def vector_entries(layers: Sequence[Layer]) -> int:
    """Count the entries of the eigenvectors of these layers."""
    return sum(side * side for layer in layers for side in _sides(layer) if side)


def _sides(layer: Layer) -> tuple[int, int]:
    """Return the lengths of U and V; 0 for a side that is not rotated."""
    if len(layer.shape) != 2:
        return 0, 0
    rows, columns = (side if 1 < side <= LONGEST_SIDE else 0 for side in layer.shape)
    return rows, columns


def seconds_to_find(layers: Sequence[Layer]) -> float:
    """Estimate the seconds that the eigenvectors of these layers take on a CPU, from one small matrix."""
    sides = [side for layer in layers for side in _sides(layer) if side]
    tried = min(max(sides, default=0), _TIMED_SIDE)
    began = time.perf_counter()
    _eigenvectors(torch.eye(tried).roll(1, 0).add(torch.eye(tried).roll(-1, 0)))
    return (time.perf_counter() - began) * sum((side / tried) ** 3 for side in sides)


class Eigenbases:
    """U and V of every layer, as views of `vectors`: all of them in a row, float32 [vector_entries(layers)]."""

    def __init__(self, layers: Sequence[Layer], vectors: Float[Tensor, " entries"]) -> None:
        self.layers, self._of, first = layers, [], 0
        for layer in layers:
            pair = []
            for side in _sides(layer):
                pair.append(vectors[first : first + side * side].view(side, side) if side else None)
                first += side * side
            self._of.append(pair)

    def to_eigenbasis(self, number: int, values: Float[Tensor, "examples size"]) -> Float[Tensor, "examples size"]:
        """Rotate one layer's gradients into its eigenbasis: Uᵀ g V."""
        U, V = self._of[number]
        return self._product(number, values, None if U is None else U.T, V)

    def from_eigenbasis(self, number: int, values: Float[Tensor, "examples size"]) -> Float[Tensor, "examples size"]:
        """Rotate one layer's gradients back from its eigenbasis: U g Vᵀ."""
        U, V = self._of[number]
        return self._product(number, values, U, None if V is None else V.T)

    def _product(self, number: int, values: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None and right is None:
            return values
        rotated = values.float().view(len(values), *self.layers[number].shape)
        rotated = rotated if left is None else left @ rotated
        return (rotated if right is None else rotated @ right).flatten(1)


def estimate_eigenbases(gradients: PerExampleGradients, batches: Iterable[Batch]) -> Float[Tensor, " entries"]:
    """Return the eigenvectors of every layer over the examples of `batches`, float32. ModelError if they overflow."""
    layers = gradients.layers
    products: dict[tuple[int, int], Tensor] = {}

    def add(number: int, values: Tensor) -> None:
        sides = _sides(layers[number])
        if not any(sides):
            return
        g = values[values.isfinite().all(1)].float().view(-1, *layers[number].shape)
        for side, equation in enumerate(("nij,nkj->ik", "nij,nik->jk")):
            if sides[side]:
                product = torch.einsum(equation, g, g)
                key = number, side
                products[key] = products[key] + product if key in products else product

    for batch in batches:
        gradients(batch, add)
    vectors, first = torch.empty(vector_entries(layers)), 0
    for key in sorted(products):
        columns = _eigenvectors(products.pop(key))
        vectors[first : first + columns.numel()] = columns.flatten()
        first += columns.numel()
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
