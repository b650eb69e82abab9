"""The per-example gradients of a weight before its outer products are summed: Σ_t l_t ⊗ r_t.

For a linear layer l is the gradient of its outputs and r its inputs; for an embedding l is the token id, which stands
for a row that is 1 there and 0 elsewhere. Lengths, row and column factors, and projections need no more than these,
which for most layers of a language model are far smaller than the gradients themselves.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""l, float [examples, T, rows] or token ids [examples, T], and r, float [examples, T, columns]."""


class Factors:
    """The gradients [examples, rows · columns] of one weight as pairs, one for each use of the weight."""

    def __init__(self, shape: tuple[int, int], pairs: Sequence[Pair]) -> None:
        self.shape, self.pairs = shape, tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs[0][1])

    def joined(self, other: "Factors") -> "Factors":
        """Return the sum of two weights' gradients: those of a weight that is used more than once."""
        return Factors(self.shape, self.pairs + other.pairs)

    def example(self, row: int) -> "Factors":
        """Return those of one example."""
        return Factors(self.shape, [(left[row : row + 1], right[row : row + 1]) for left, right in self.pairs])

    def isfinite(self) -> Tensor:
        """Return whether each number of the factors is finite, one after another."""
        return torch.cat([side.isfinite().flatten() for pair in self.pairs for side in pair])

    @property
    def smaller(self) -> bool:
        """Whether the factors take less work than the gradients: T (rows + columns) < rows · columns."""
        rows, columns = self.shape
        return sum(right.shape[1] for _, right in self.pairs) * (rows + columns) < rows * columns

    def dense(self) -> Float[Tensor, "examples size"]:
        """Return the gradients, float32, flattened row by row."""
        found = None
        for left, right in sorted(self.pairs, key=lambda pair: _is_ids(pair[0])):
            if _is_ids(left):
                found = _zeros(self, right) if found is None else found
                for one, ids, values in zip(found, left, right, strict=True):
                    one.index_add_(0, ids, values.float())
            else:
                product = (left.transpose(1, 2) @ right).float()
                found = product if found is None else found.add_(product)
        return found.flatten(1)

    def scaled(self, rows: Float[Tensor, " rows"], columns: Float[Tensor, " columns"]) -> "Factors":
        """Return the factors, float32, of the gradients whose rows and columns are multiplied by these numbers."""
        pairs = []
        for left, right in self.pairs:
            right = right.float() * columns
            pairs.append((left, right * rows[left].unsqueeze(-1)) if _is_ids(left) else (left.float() * rows, right))
        return Factors(self.shape, pairs)

    def mapped(self, left_of: Callable[[Tensor], Tensor] | None, right_of: Callable[[Tensor], Tensor]) -> "Factors":
        """Return the factors l' and r' that `left_of` and `right_of` give; ids stay ids where there is no `left_of`."""
        pairs = []
        for left, right in self.pairs:
            if left_of is not None:
                left = left_of(F.one_hot(left, self.shape[0]) if _is_ids(left) else left)
            pairs.append((left, right_of(right)))
        return Factors(self.shape, pairs)

    def divided(self, lengths: Float[Tensor, " examples"]) -> "Factors":
        """Return the factors of the gradients divided by these numbers."""
        return Factors(self.shape, [(left, right.float() / lengths[:, None, None]) for left, right in self.pairs])

    def lengths(self) -> Float[Tensor, " examples"]:
        """Return the gradients' lengths, float32: ‖Σ_t l_t ⊗ r_t‖² = Σ_tu ⟨l_t, l_u⟩ ⟨r_t, r_u⟩."""
        squares = sum(
            (_gram(left, other) * _gram(right, beside)).sum((1, 2), dtype=torch.float64)
            for left, right in self.pairs
            for other, beside in self.pairs
        )
        return squares.clamp_min(0).sqrt().float()

    def times(self, x: Tensor, *, transposed: bool = False) -> Float[Tensor, "examples m k"]:
        """Return g x, or gᵀ x, float32, of each example's gradient g; x is [n, k], or [examples, n, k]."""
        found = 0
        for left, right in self.pairs:
            if transposed:
                found = found + right.float().transpose(1, 2) @ _rows_of(left, x)
            elif _is_ids(left):
                values = right.float() @ x
                places = left.unsqueeze(2).expand_as(values)
                found = found + values.new_zeros(len(self), self.shape[0], x.shape[-1]).scatter_add_(1, places, values)
            else:
                found = found + left.float().transpose(1, 2) @ (right.float() @ x)
        return found

    def projected(
        self, left_of: Callable[[Tensor], Tensor], right_of: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "examples m n"]:
        """Return Σ_t l'_t ⊗ r'_t, float32, where `left_of` and `right_of` give l' and r'."""
        return sum(left_of(left).transpose(1, 2) @ right_of(right) for left, right in self.pairs)


def _rows_of(left: Tensor, x: Tensor) -> Tensor:
    """Return l x for every l, which picks a row of x where it is an id."""
    if not _is_ids(left):
        return left.float() @ x
    return x[left] if x.dim() == 2 else x.gather(1, left.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _is_ids(left: Tensor) -> bool:
    return not left.is_floating_point()


def _zeros(factors: Factors, like: Tensor) -> Tensor:
    return torch.zeros(len(factors), *factors.shape, device=like.device)


def _gram(a: Tensor, b: Tensor) -> Float[Tensor, "examples T U"]:
    """Return the inner products of the rows of a and b, either of which may be given as ids."""
    if _is_ids(a) and _is_ids(b):
        return (a.unsqueeze(2) == b.unsqueeze(1)).float()
    if _is_ids(a):
        return _gram(b, a).transpose(1, 2)
    if _is_ids(b):
        return a.float().gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1))
    return a.float() @ b.float().transpose(1, 2)
