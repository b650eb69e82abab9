"""Task-specific curvature: R = λ R_eval + (1 - λ) R_train of stored rows, and its root (TrackStar, arXiv 2410.17413).

R_train is the mean outer product of the training examples' rows, R_eval that of a task's queries. What the queries of a
task have in common, such as the words of their template, is large in R_eval, so that R^-1/2 makes it small. R consists
of square blocks along its diagonal: `K / block` segments of a row, each of `block` entries. In a two-sided row a block
belongs to some layers; in a RapidGrad to a random share of the parameters. Knows nothing of models or files.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rapidindex.errors import UsageError


class Curvature:
    """Multiplies rows by R^-1/2, which is `roots`, and brings them to length 1."""

    def __init__(self, roots: Float[Tensor, "blocks block block"]) -> None:
        self.roots = roots

    @classmethod
    def of(cls, stored: Float[np.ndarray, "K block"], device: torch.device | str = "cpu") -> "Curvature":
        """Return the curvature whose roots were stored one below the other."""
        return cls(torch.from_numpy(np.array(stored)).to(device).view(-1, stored.shape[1], stored.shape[1]))

    def __call__(self, rows: Float[Tensor, "n K"]) -> tuple[Float[Tensor, "n K"], Float[Tensor, " n"]]:
        """Return R^-1/2 rows at length 1, and the lengths that they had; a row of zeros stays one, of length 1."""
        product = self.times(rows)
        lengths = product.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        return product / lengths.unsqueeze(1), lengths

    def times(self, rows: Float[Tensor, "n K"]) -> Float[Tensor, "n K"]:
        """Return R^-1/2 rows. R^-1/2 is symmetric."""
        return torch.bmm(_segments(rows, self.roots.shape[1]), self.roots).transpose(0, 1).reshape(len(rows), -1)


def mean_outer_products(
    batches: Iterable[Float[Tensor, "b K"]], K: int, block: int
) -> Float[Tensor, "blocks block block"]:
    """Return the mean outer product of rows within each block, float32, in memory of K · block entries."""
    total, n = torch.zeros(K // block, block, block), 0
    for rows in batches:
        parts = _segments(rows, block)
        total.baddbmm_(parts.transpose(1, 2), parts)
        n += len(rows)
    return total.div_(max(1, n))


def spectrum(R: Float[Tensor, "blocks block block"]) -> Float[Tensor, " K"]:
    """Return the eigenvalues of all blocks, the largest first, float64."""
    return torch.cat([torch.linalg.eigvalsh(one.double()) for one in R]).clamp_(min=0).sort(descending=True).values


def spectrum_of_rows(rows: Float[Tensor, "q K"], block: int) -> Float[Tensor, " values"]:
    """Return the eigenvalues of the mean outer product of a few rows that can differ from 0, the largest first."""
    parts = _segments(rows.double(), block)
    return (torch.linalg.svdvals(parts).flatten() ** 2 / len(rows)).sort(descending=True).values


def weight_at(component: int, train: Tensor, task: Tensor) -> float:
    """Return the λ at which λ R_eval and (1 - λ) R_train have the same `component`-th eigenvalue, counted from 1.

    The components before it are then those of the task, which R^-1/2 makes small. UsageError where either spectrum ends
    before that component.
    """
    most = min(int((values > 1e-9 * values[:1].sum()).sum()) for values in (train, task))
    if not 1 <= component <= most:
        raise UsageError(
            f"--component {component} is out of reach: rows and queries share {most} components.",
            hint="Give fewer, more queries, or --weight.",
        )
    ours, theirs = float(train[component - 1]), float(task[component - 1])
    return ours / (theirs + ours)


def take_inverse_root(
    train: Float[Tensor, "blocks block block"], queries: Float[Tensor, "q K"], weight: float, damping: float
) -> Iterator[int]:
    """Put R^-1/2 in the place of R_train, block by block, and yield the number of each block that is done.

    `damping` is added to the eigenvalues of a block, in units of their mean. A block of zeros becomes the identity.
    """
    parts = _segments(queries, train.shape[1])
    for number, (own, task) in enumerate(zip(train, parts, strict=True)):
        R = own.double() * (1 - weight) + (task.mT.double() @ task.double()) * (weight / len(queries))
        values, vectors = torch.linalg.eigh(R)
        values = values.clamp_(min=0) + damping * values.clamp(min=0).mean()
        if not float(values.max()) > 0:
            own.copy_(torch.eye(len(own)))
        else:
            own.copy_((vectors * values.clamp(min=1e-12 * float(values.max())) ** -0.5) @ vectors.mT)
        yield number


def block_of(K: int, blocks: int, most: int) -> int:
    """Return the size of R's blocks: that of the row's own `blocks`, halved until it is at most `most`."""
    size = K // blocks
    while size > most:
        size //= 2
    return size


def _segments(rows: Tensor, block: int) -> Float[Tensor, "blocks n block"]:
    return rows.reshape(len(rows), -1, block).transpose(0, 1)
