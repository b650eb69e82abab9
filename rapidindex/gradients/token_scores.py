"""Heat-maps: each response token's share of an example's influence, from one directional derivative.

With the norms of an example fixed, its influence is linear in its gradient: the score is ⟨u, ∇L(s)⟩ for a direction u
made from the query's gradient. The derivative of the example's token losses along u gives every token's share (Eq. 6
and 8), and their mean is the uncompressed influence.

The derivative is a forward-mode pass (`torch.func.jvp`), about the cost of two forward passes. Where an operation of
the model has no forward-mode rule, as bitsandbytes' have none, a central difference over two forward passes stands in;
and where that is too coarse, as under 8-bit products, which round their inputs, a backward pass for each token.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapidindex.gradients.losses import Batch, trainable, weighted_token_losses
from rapidindex.gradients.rapidgrad import Compressor

STEPS = (1e-2, 1e-3, 1e-4)
"""Steps of a central difference, in lengths of the parameters; the best one is taken."""


LARGEST_ERROR = 0.02
"""Relative error against backpropagation up to which a method is used."""

PROBES = 4
"""Backward passes by which the first example is compared."""


class TokenScores:
    """Differentiates the token losses of one model along directions in its trainable parameters.

    `method` is chosen by the first example: the first of `forward-mode`, `central difference` and `backward per token`
    that agrees with backpropagation there. (A custom operation may drop a forward derivative silently.)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.method: str | None = None
        self._step = STEPS[0]

    def __call__(self, batch: Batch, direction: Float[Tensor, " size"]) -> list[Float[Tensor, " tokens"]]:
        """Return, for each example, the derivative of each weighted token's loss along `direction`, float32 [tokens].

        `direction` is float32 [|v|], flattened as gradients are: layer after layer.
        """
        if not direction.any():
            return [torch.zeros(int(n), device=direction.device) for n in (batch.weights[:, 1:] != 0).sum(1)]
        tangents = _split(self.model, direction)
        if self.method is None:
            self.method = self._choose(batch.example(0), direction, tangents)
        if self.method == "forward-mode":
            return self._forward_mode(batch, tangents)
        if self.method == "central difference":
            return self._central(batch, tangents, self._step)
        return [self._backward(batch.example(row), direction) for row in range(len(batch))]

    def _choose(self, example: Batch, direction: Tensor, tangents: dict[str, Tensor]) -> str:
        """Return the first method whose scores agree with backpropagation, by `PROBES` random sums of them.

        A sum with random signs of an error has the error's length as its root mean square (Hutchinson): a few backward
        passes tell a wrong method from a right one, where one for each token would take most of a first query.
        """
        tokens = int((example.weights[:, 1:] != 0).sum())
        signs = torch.randint(0, 2, (PROBES, tokens), generator=torch.Generator().manual_seed(0)).to(direction) * 2 - 1
        truth = self._backward(example, direction, signs)

        def error(scores: Tensor) -> float:
            difference = (signs @ scores - truth).square().mean().sqrt()
            return float(difference / scores.norm()) if difference else 0.0

        try:
            if error(self._forward_mode(example, tangents)[0]) <= LARGEST_ERROR:
                return "forward-mode"
        except (NotImplementedError, RuntimeError) as reason:
            if isinstance(reason, torch.OutOfMemoryError):
                raise
        errors = {step: error(self._central(example, tangents, step)[0]) for step in STEPS}
        self._step = min(errors, key=lambda step: errors[step])
        return "central difference" if errors[self._step] <= LARGEST_ERROR else "backward per token"

    def _forward_mode(self, batch: Batch, tangents: dict[str, Tensor]) -> list[Tensor]:
        module = _Losses(self.model)
        values = {f"model.{name}": parameter.detach() for name, parameter in trainable(self.model).items()}
        along = {f"model.{name}": tangent for name, tangent in tangents.items()}

        def losses(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            mask, entropies = torch.func.functional_call(module, parameters, (batch,))
            return entropies, mask

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode rule
            _, derivatives, mask = torch.func.jvp(losses, (values,), (along,), has_aux=True)
        return _rows(derivatives, mask)

    @torch.no_grad()
    def _central(self, batch: Batch, tangents: dict[str, Tensor], step: float) -> list[Tensor]:
        epsilon = step * _length(trainable(self.model).values()) / _length(tangents.values())
        mask, above = self._moved(tangents, epsilon, batch)
        _, below = self._moved(tangents, -epsilon, batch)
        return _rows((above - below) / (2 * epsilon), mask)

    def _backward(self, batch: Batch, direction: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the derivatives of one example's token losses by backpropagation, or of sums of them.

        `weights` is [sums, tokens], a backward pass each; None for every token alone.
        """
        with torch.enable_grad():
            _, entropies = weighted_token_losses(self.model, batch)
            parameters = list(trainable(self.model).values())
            parts = direction.split([parameter.numel() for parameter in parameters])
            derivatives = []
            for loss in entropies[0] if weights is None else weights @ entropies[0]:
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                pairs = [(g, part) for g, part in zip(gradients, parts, strict=True) if g is not None]
                derivatives.append(sum(torch.dot(g.flatten().float(), part) for g, part in pairs))
        return torch.stack(derivatives).detach()

    def _moved(self, tangents: dict[str, Tensor], by: float, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the token losses with the parameters moved along `tangents`, then restore them to the bit."""
        parameters = trainable(self.model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.add_(tangents[name], alpha=by)
            return weighted_token_losses(self.model, batch)
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _rows(derivatives: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[wanted] for row, wanted in zip(derivatives, mask, strict=True)]


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().float().square().sum()) for tensor in tensors))


def _split(model: nn.Module, direction: Tensor) -> dict[str, Tensor]:
    tangents, start = {}, 0
    for name, parameter in trainable(model).items():
        part = direction[start : start + parameter.numel()]
        tangents[name] = part.view_as(parameter).to(parameter.dtype)
        start += parameter.numel()
    return tangents


def shares(
    scorer: TokenScores,
    compressor: Compressor,
    direction: Tensor,
    batch: Batch,
    norms: Float[Tensor, "examples layers"],
) -> list[Float[Tensor, " tokens"]]:
    """Return each response token's share of each example's influence on a query: their mean is the influence.

    `direction` is the query's (`Compressor.direction`), `norms` the stored lengths of the examples' layers.
    """
    if compressor.normalize == "layer":  # every example has a direction of its own
        alone = [(batch.example(row), compressor.divided(direction, norms[row])) for row in range(len(batch))]
        return [scorer(example, own)[0] for example, own in alone]
    token_scores = scorer(batch, direction)
    if compressor.normalize == "none":
        return token_scores
    return [
        scores / length if length > 0 else scores
        for scores, length in zip(token_scores, norms.norm(dim=1), strict=True)
    ]


class _Losses(nn.Module):
    """The token losses as a module, which `functional_call` computes with other parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return weighted_token_losses(self.model, batch)
