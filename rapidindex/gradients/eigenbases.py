"""The Kronecker eigenbasis of each layer, in which a second moment says more than entry by entry.

For a weight of the shape [out, in], U [out, 64] and V [in, 64] are the leading eigenvectors of the sample's mean g gᵀ
and gᵀ g (Shampoo's, arXiv 1802.09568); a shorter side has all of them. The correction multiplies Uᵀ g V entry by entry
and rotates it back, as EK-FAC does (arXiv 1806.03884) with activations in the place of gradients. What lies beyond the
leading eigenvectors of a side is one group with one second moment. The sample's loss is of tokens drawn from the model,
which makes the mean product the Fisher matrix: with the tokens of the data, the correction would take out what the
sample taught. A parameter that is no matrix keeps its axes. Knows nothing of files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.errors import ModelError
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch, Layer

LEADING = 64
"""Eigenvectors of a side: attribution (LDS) is as good with them as with all, and those of 7B with LoRA take .6 GiB."""
_COLUMNS = 2 * LEADING
"""Columns of the random sketch from which they are found; a shorter side is not sketched."""
_ROUNDING = 1e-6
"""Of the sketch's largest eigenvalue: what is smaller may be float32's rounding."""
_LONGEST_WHOLE = 4096
"""The longest side that indexes of earlier versions rotate; they hold all its eigenvectors, and leave longer ones."""
_LONGEST_SHORT = 16_384
"""The longest side that is no vocabulary's."""

Kept = Callable[[int], int]
"""Returns the eigenvectors that are kept of a matrix's side of this length; 0 where its axes are."""


def leading(length: int) -> int:
    """Keep the leading eigenvectors of every side."""
    return min(length, LEADING) if length > 1 else 0


def of_short(length: int) -> int:
    """Keep those of sides that are no vocabulary's: for one token or another, a mean product is diagonal."""
    return leading(length) if length <= _LONGEST_SHORT else 0


def whole(length: int) -> int:
    """Keep all eigenvectors, as earlier versions did."""
    return length if 1 < length <= _LONGEST_WHOLE else 0


@dataclass(frozen=True)
class Side:
    """Rows or columns of a weight."""

    length: int
    kept: int
    """Eigenvectors along it; 0 where its axes are kept."""

    @property
    def own(self) -> int:
        """Directions that have a second moment of their own: eigenvectors, or axes."""
        return self.kept or self.length

    @property
    def groups(self) -> int:
        """Second moments along it: one more for what the eigenvectors leave, if anything."""
        return self.own + (self.own < self.length)

    @property
    def counts(self) -> Float[Tensor, " groups"]:
        """The directions in each group."""
        counts = torch.ones(self.groups)
        counts[self.own :] = self.length - self.own
        return counts


def sides_of(layer: Layer, kept: Kept = leading) -> tuple[Side, Side]:
    """Return the rows and columns of a layer, a vector as a column."""
    if len(layer.shape) != 2:
        return Side(layer.size, 0), Side(1, 0)
    rows, columns = (Side(side, kept(side)) for side in layer.shape)
    return rows, columns


def vector_entries(layers: Sequence[Layer], kept: Kept = leading) -> int:
    """Count the entries of the eigenvectors of these layers."""
    return sum(side.length * side.kept for layer in layers for side in sides_of(layer, kept))


def moment_sizes(layers: Sequence[Layer], kept: Kept = leading) -> list[int]:
    """Count the second moments along the eigenvectors of each of these layers: one for each pair of groups."""
    return [rows.groups * columns.groups for rows, columns in (sides_of(layer, kept) for layer in layers)]


def moment_entries(layers: Sequence[Layer], kept: Kept = leading) -> int:
    """Count the second moments along the eigenvectors of all these layers."""
    return sum(moment_sizes(layers, kept))


def product_entries(layers: Sequence[Layer], kept: Kept = leading) -> int:
    """Count the entries of the products, or of their sketches, from which the eigenvectors are found."""
    sides = [side.length for layer in layers for side in sides_of(layer, kept) if side.kept]
    return sum(side * min(side, _COLUMNS) for side in sides)


class Eigenbases:
    """U and V of every layer, as views of `vectors`: all of them in a row, float32 [vector_entries(layers)]."""

    def __init__(self, layers: Sequence[Layer], vectors: Float[Tensor, " entries"], kept: Kept = leading) -> None:
        self.layers, self.sides, self._of, first = layers, [sides_of(layer, kept) for layer in layers], [], 0
        for sides in self.sides:
            pair = []
            for side in sides:
                last = first + side.length * side.kept
                pair.append(vectors[first:last].view(side.length, side.kept) if side.kept else None)
                first = last
            self._of.append(pair)

    def squares(self, number: int, values: Float[Tensor, "examples size"]) -> Float[Tensor, " groups"]:
        """Return a layer's mean squared gradient in each pair of groups, summed over the examples."""
        rows, columns = self.sides[number]
        g, a, b, c = self._along(number, values)
        sums = torch.zeros(rows.groups, columns.groups, device=g.device)
        own = sums[: rows.own, : columns.own]
        own.copy_(c.square().sum(0))
        if columns.groups > columns.own:
            sums[: rows.own, -1] = a.square().sum((0, 2)) - own.sum(1)
        if rows.groups > rows.own:
            sums[-1, : columns.own] = b.square().sum((0, 1)) - own.sum(0)
            if columns.groups > columns.own:
                sums[-1, -1] = g.square().sum() - sums.sum()
        counts = torch.outer(rows.counts, columns.counts).to(g.device)
        return (sums.clamp_min_(0) / counts).flatten()

    def multiply(
        self, number: int, values: Float[Tensor, "examples size"], factors: Float[Tensor, " groups"]
    ) -> Float[Tensor, "examples size"]:
        """Multiply a layer's gradients, in place, by a factor in each pair of groups.

        With P and Q the projections on U's and V's columns, and f of the rest in either or both sides: f_rr g +
        U ((f - f_r - f_c + f_rr) ∘ Uᵀ g V) Vᵀ + U (f_c - f_rr) ∘ (Uᵀ g) + (g V) ∘ (f_r - f_rr) Vᵀ, which is the sum of
        the four parts P g Q, P g (1 - Q), (1 - P) g Q and (1 - P) g (1 - Q), each multiplied by its own.
        """
        rows, columns = self.sides[number]
        U, V = self._of[number]
        if U is None and V is None:
            return values.mul_(factors)
        g, a, b, c = self._along(number, values)
        f = torch.nn.functional.pad(  # no rest: nothing lies there
            factors.view(rows.groups, columns.groups),
            (0, columns.own + 1 - columns.groups, 0, rows.own + 1 - rows.groups),
        )
        both = f[-1, -1]
        of_rows, of_columns = f[:-1, -1:] - both, f[-1:, :-1] - both
        inner = c * (f[:-1, :-1] - of_rows - of_columns - both)
        inner = inner if V is None else inner @ V.T
        inner += of_rows * a
        moved = inner if U is None else U @ inner
        if rows.groups > rows.own:
            beside = b * of_columns
            moved += beside if V is None else beside @ V.T
            moved += both * g
        return values.copy_(moved.flatten(1))

    def multiply_side(
        self, number: int, side: int, values: Float[Tensor, "*n length"], factors: Float[Tensor, " groups"]
    ) -> Float[Tensor, "*n length"]:
        """Multiply vectors along a layer's rows (side 0) or columns (1) by a factor in each group, float32."""
        U, own = self._of[number][side], self.sides[number][side].own
        if U is None:
            return values.float() * factors
        rest = factors[own] if own < len(factors) else 0.0
        values = values.float()
        return values * rest + (values @ U * (factors[:own] - rest)) @ U.T

    def _along(self, number: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return g, Uᵀ g, g V and Uᵀ g V."""
        U, V = self._of[number]
        rows, columns = self.sides[number]
        g = values.float().view(-1, rows.length, columns.length)
        a = g if U is None else U.T @ g
        c = a if V is None else a @ V
        b = c if rows.groups == rows.own else g if V is None else g @ V  # only the rest of the rows needs it
        return g, a, b, c


def estimate_eigenbases(
    gradients: Any, batches: Iterable[Batch], seed: int = 0, kept: Kept = leading
) -> Float[Tensor, " entries"]:
    """Return the eigenvectors of every layer over the examples of `batches`, float32. ModelError if they overflow.

    `gradients` are `PerExampleGradients`, or give the same.

    P = Σ g gᵀ of a long side is known by Y = P Ω alone, with Ω [side, 128] random by `seed`: its approximation
    Y (Ωᵀ Y)^-1 Yᵀ (Nyström's) has nearly P's leading eigenvectors, in memory that is linear in the side.
    """
    layers, random = gradients.layers, random_columns(gradients.layers, seed, kept)
    products: dict[tuple[int, int], Tensor] = {}

    def add(number: int, values: Tensor) -> None:
        rows, columns = sides_of(layers[number], kept)
        g = values[values.isfinite().all(1)].float().view(-1, rows.length, columns.length)
        for key, side, one in (((number, 0), rows, g), ((number, 1), columns, g.transpose(1, 2))):
            if side.kept:
                product = times_its_transpose(one, random)
                products[key] = products[key] + product if key in products else product

    for batch in batches:
        gradients(batch, add)
    vectors, first = torch.empty(vector_entries(layers, kept)), 0
    for key in sorted(products):
        columns, _ = leading_eigenvectors(products.pop(key), sides_of(layers[key[0]], kept)[key[1]].kept, random)
        vectors[first : first + columns.numel()] = columns.flatten()
        first += columns.numel()
    return vectors


def random_columns(layers: Sequence[Layer], seed: int, kept: Kept) -> Float[Tensor, "longest columns"]:
    """Draw Ω for the longest side with eigenvectors; a shorter one takes its first rows."""
    longest = max((side.length for layer in layers for side in sides_of(layer, kept) if side.kept), default=0)
    return torch.randn(longest, _COLUMNS, generator=torch.Generator().manual_seed(seed))


def products_of_sides(
    values: Float[Tensor, "examples size"] | Factors, layer: Layer, kept: Kept, random: Float[Tensor, "longest columns"]
) -> Float[Tensor, " entries"]:
    """Return Σ g gᵀ, Σ gᵀ g and Σ ‖g‖² of one layer over the examples, one after the other: `sizes_of_sides`.

    A long side's product comes times Ω; of a side that keeps its axes there is the diagonal.
    """
    rows, columns = sides_of(layer, kept)
    if isinstance(values, Factors) and not (rows.kept and columns.kept and values.smaller):
        # One example after another: all of them may not fit into memory.
        dense = (values.example(number).dense() for number in range(len(values)))
        return sum(products_of_sides(one, layer, kept, random) for one in dense)
    if isinstance(values, Factors):
        parts = [times_its_transpose(values, random), times_its_transpose(values, random, transposed=True)]
        return torch.cat([*(part.flatten() for part in parts), values.lengths().square().sum()[None]])
    g, parts = values.float().view(-1, rows.length, columns.length), []
    for side, one in ((rows, g), (columns, g.transpose(1, 2))):
        parts.append(times_its_transpose(one, random).flatten() if side.kept else one.square().sum((0, 2)))
    return torch.cat([*parts, g.square().sum()[None]])


def sizes_of_sides(layer: Layer, kept: Kept) -> list[int]:
    """Count the entries of the three parts of `products_of_sides`."""
    return [side.length * min(side.length, _COLUMNS) ** bool(side.kept) for side in sides_of(layer, kept)] + [1]


def times_its_transpose(
    g: Float[Tensor, "n side other"] | Factors, random: Tensor, *, transposed: bool = False
) -> Float[Tensor, "side columns"]:
    """Return Σ g gᵀ, or its product with the random columns where these are fewer; of factors also Σ gᵀ g."""
    if isinstance(g, Factors):
        side = g.shape[transposed]
        columns = (random[:side] if side > _COLUMNS else torch.eye(side)).to(g.pairs[0][1].device)
        return g.times(g.times(columns, transposed=not transposed), transposed=transposed).sum(0)
    if g.shape[1] <= _COLUMNS:
        return torch.einsum("nij,nkj->ik", g, g)
    return torch.einsum("nij,njk->ik", g, g.transpose(1, 2) @ random[: g.shape[1]].to(g.device))


def leading_eigenvectors(
    product: Float[Tensor, "side columns"], count: int, random: Float[Tensor, "longest columns"]
) -> tuple[Float[Tensor, "side count"], Float[Tensor, " count"]]:
    """Return the leading eigenvectors of Σ g gᵀ, and its eigenvalues, from what `times_its_transpose` sums; float64."""
    hint = "Build with --second-moment estimate."
    if not product.isfinite().all():
        raise ModelError("The gradients of the sample are so large that their products overflow.", hint=hint)
    try:  # in float32 it does not converge where many rows are zero, as an embedding's are
        root = product.cpu().double()
        if len(root) > _COLUMNS:
            values, Q = torch.linalg.eigh(random[: len(root)].double().T @ root)
            root = root @ (Q * torch.where(values > _ROUNDING * values.max(), values, torch.inf).rsqrt())
        U, found, _ = torch.linalg.svd(root, full_matrices=False)
        return U[:, :count], (found.square() if len(root) > _COLUMNS else found)[:count]
    except torch.linalg.LinAlgError as error:
        raise ModelError("The eigenvectors of the sample's gradients cannot be found.", hint=hint) from error
