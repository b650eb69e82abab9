"""Influence functions over the trainable parameters: DataInf's closed form, LiSSA as in the paper's code, its limit.

Scores are arrays [queries, examples]; positive: training on the example lowers the query's loss.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.evidence.cached import Replay
from rapidindex.gradients.losses import Batch, example_losses, trainable
from rapidindex.progress import Progress, silent

DAMP, SCALE = 0.01, 25.0
"""The defaults of the paper's released code (huawei-lin/RapidIn, `s_test`), whose default depth is 5,000."""
PART = 0.1
"""DataInf's λ of a layer, as a share of the layer's mean squared gradient entry (the authors' 1/10)."""


def datainf(rows: Replay, queries: Replay, progress: Progress) -> np.ndarray:
    """Score by DataInf (arXiv 2310.00902), layer by layer as in its authors' code."""
    scores = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    for number, layer in enumerate(rows.layers, 1):
        part = slice(layer.start, layer.start + layer.size)
        g, q = (torch.from_numpy(np.array(side.rows[:, part])) for side in (rows, queries))
        scores += layer_datainf(g, q)
        progress("DataInf", number, len(rows.layers))
    return scores.numpy().astype(np.float32)


def layer_datainf(g: Tensor, q: Tensor) -> Tensor:
    """Return qᵀ · mean_i (g_i g_iᵀ + λ I)⁻¹ · g of every query [Q, d] and example [N, d] of a layer: float [Q, N].

    Each inverse in the mean has the closed form (I − g_i g_iᵀ / (λ + |g_i|²)) / λ.
    """
    squares = g.square().sum(1)
    damping = PART * float(squares.mean()) / g.shape[1]
    if damping == 0:
        return torch.zeros(len(q), len(g))
    coefficients = (q @ g.T) / (damping + squares)
    solved = (q - coefficients @ g / len(g)) / damping
    return solved @ g.T


def limit(rows: Replay, queries: Replay, progress: Progress) -> np.ndarray:
    """Score by the limit of LiSSA, with the mean of g gᵀ over the examples (the empirical Fisher) for the Hessian.

    (damp·I + F/scale)⁻¹ q · g of every query and example. With the Gram matrices A = q·G and M = G·G of the N examples
    it is A (c I + M)⁻¹ c / damp, where c = damp · scale · N.
    """
    gram, asked = (torch.zeros(len(side), len(rows), dtype=torch.float64) for side in (rows, queries))
    for number, layer in enumerate(rows.layers, 1):
        part = slice(layer.start, layer.start + layer.size)
        g, q = (torch.from_numpy(np.array(side.rows[:, part])) for side in (rows, queries))
        gram += g @ g.T
        asked += q @ g.T
        progress("empirical Fisher", number, len(rows.layers))
    return limit_of(gram, asked).numpy().astype(np.float32)


def limit_of(gram: Tensor, asked: Tensor, damp: float = DAMP, scale: float = SCALE) -> Tensor:
    """Compute `limit` from the Gram matrices of examples [N, N] and of queries with them [Q, N]."""
    c = damp * scale * len(gram)
    solved = torch.linalg.solve(gram + c * torch.eye(len(gram), dtype=gram.dtype), asked.T)
    return solved.T * (c / damp)


def lissa(
    v: Tensor,
    hessian_product: Callable[[Tensor], Tensor],
    *,
    depth: int,
    damp: float = DAMP,
    scale: float = SCALE,
    progress: Progress = silent,
) -> tuple[Tensor, int]:
    """Iterate h ← v + (1 − damp)·h − H·h/scale from h = v [Q, |v|]; return the last finite h, and the steps to it.

    Where it converges its limit is (damp·I + H/scale)⁻¹ v. As in the paper's code it stops at the first h that is not
    finite, and `hessian_product` takes the Hessian of another random example each time.
    """
    h = v.clone()
    for step in range(depth):
        progress("LiSSA", step, depth)
        following = v + (1 - damp) * h - hessian_product(h) / scale
        if not following.isfinite().all():
            return h, step
        h = following
    return h, depth


class RandomHessians:
    """Multiplies vectors by the Hessian of one random example's loss, another one at every call."""

    def __init__(self, model: nn.Module, batches: list[Batch], seed: int) -> None:
        self.model, self.batches, self.draw = model, batches, random.Random(seed)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return H·v of each of `vectors` [Q, |v|], by differentiating twice."""
        return hessian_products(self.model, self.draw.choice(self.batches), vectors)


def hessian_products(model: nn.Module, batch: Batch, vectors: Tensor) -> Tensor:
    """Return H·v of the batch's summed loss for each of `vectors` [Q, |v|]."""
    parameters = list(trainable(model).values())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        loss = example_losses(model, batch).sum()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = []
        for vector in vectors:
            products = torch.autograd.grad(flat @ vector, parameters, retain_graph=True)
            rows.append(torch.cat([product.flatten() for product in products]))
    return torch.stack(rows)
