"""One optimizer step on some examples, measured on the chosen tokens of an answer, and taken back bit by bit.

This is the tail-patch of Chang et al. (arXiv 2410.17413, section 5.2). Knows nothing of an index.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn

from rapidindex.errors import ModelError
from rapidindex.gradients.losses import Batch, example_losses, trainable

Gradient = list[Tensor]
"""One tensor for each trainable parameter, in the model's order."""
OptimizerOf = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
"""Makes an optimizer of these parameters, with this learning rate."""
OWN_LOSS = 0.1
"""Nats by which a step on a row lowers the row's own loss, to first order, at the default learning rate."""


@dataclass(frozen=True)
class Effect:
    """What a step did to the chosen tokens."""

    log_probability: float
    """Change of their mean log-probability, in nats."""
    probability: float
    """Change of its exponential, in percentage points."""
    predicted: float
    """⟨gradient of `log_probability`, what the step added to the parameters⟩, in nats; for SGD η · ⟨g, g'⟩."""


class Steps:
    """Takes steps from a model's weights as they are now, one at a time; each measures, and puts the weights back."""

    def __init__(self, model: nn.Module, question: Batch, optimizer_of: OptimizerOf) -> None:
        self.model, self.question, self.optimizer_of = model, question, optimizer_of
        self.parameters = list(trainable(model).values())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.log_probability = self._measure()
        self.question_gradient = self.gradient([question])

    def gradient(self, batches: Sequence[Batch]) -> Gradient:
        """Return the gradient of the summed losses of all examples in the batches."""
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        for batch in batches:
            loss = example_losses(self.model, batch).sum()
            parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            for whole, part in zip(total, parts, strict=True):
                if part is not None:
                    whole += part
        return total

    def __call__(self, gradient: Gradient, learning_rate: float) -> Effect:
        """Take one step along a gradient, measure it, and put the weights back.

        The weights are put back whatever happens. ModelError where they are not those of the start when it begins, or
        where the step leaves no finite loss.
        """
        with self._stepped(gradient, learning_rate):
            after = self._measure()
            predicted = -sum(map(_moved, self.question_gradient, self.parameters, self.start))
        if after != after or after in (float("inf"), float("-inf")):
            raise ModelError(
                f"The step leaves a loss that is not finite: its learning rate is {learning_rate:g}.",
                hint="Give a smaller --learning-rate.",
            )
        change = 100 * (exp(after) - exp(self.log_probability))
        return Effect(after - self.log_probability, change, predicted)

    def default_rate(self, gradients: Iterable[Gradient]) -> float:
        """Return the rate at which a step on one of these rows lowers the row's own loss by OWN_LOSS in the mean.

        To first order; the update is linear in the rate, for SGD and for AdamW. ModelError where that is no number.
        """
        lowered = [self._lowered(gradient) for gradient in gradients]
        mean = sum(lowered) / len(lowered)
        if not 0 < mean < float("inf"):
            raise ModelError("The random rows have no gradient to step along.", hint="Give --learning-rate.")
        return OWN_LOSS / mean

    def _lowered(self, gradient: Gradient) -> float:
        """Return by how much a step of rate 1 along a row's gradient would lower the row's loss, to first order.

        It is taken from zeros: what a step adds does not depend on where it begins, and would round there.
        """
        zeros = [nn.Parameter(torch.zeros_like(part)) for part in gradient]
        for zero, part in zip(zeros, gradient, strict=True):
            zero.grad = part
        self.optimizer_of(zeros, 1.0).step()
        return -sum(_moved(part, zero, torch.zeros_like(zero)) for zero, part in zip(zeros, gradient, strict=True))

    def check(self) -> None:
        """Raise ModelError unless every trainable weight has the bits that it had at the start."""
        if not all(map(torch.equal, self.parameters, self.start)):
            raise ModelError(
                "The model's weights are no longer those of the index: something else changes them.",
                hint="Load the model again, and use it for nothing else meanwhile.",
            )

    @contextmanager
    def _stepped(self, gradient: Gradient, learning_rate: float) -> Iterator[None]:
        self.check()
        before = [parameter.grad for parameter in self.parameters]
        optimizer = self.optimizer_of(self.parameters, learning_rate)
        try:
            for parameter, part in zip(self.parameters, gradient, strict=True):
                parameter.grad = part
            optimizer.step()
            yield
        finally:
            self._restore(before)

    def _restore(self, gradients: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for parameter, start, gradient in zip(self.parameters, self.start, gradients, strict=True):
                parameter.copy_(start)
                parameter.grad = gradient

    @torch.no_grad()
    def _measure(self) -> float:
        return -float(example_losses(self.model, self.question).sum())


def sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Return plain SGD."""
    return torch.optim.SGD(parameters, lr=learning_rate)


def adamw(second_moment: Tensor | None) -> OptimizerOf:
    """Return AdamW without weight decay or momentum, which have nothing to do with the rows.

    `second_moment` is Adam's, bias-corrected, float32 [|v|]; None begins afresh, where the step has one size for all
    entries whatever their gradient.
    """

    def make(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        if second_moment is None:
            return optimizer
        parts = second_moment.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            optimizer.state[parameter] = {
                "step": torch.tensor(1e6),  # the moment's bias is corrected already
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": part.view_as(parameter).to(parameter, copy=True),
            }
        return optimizer

    return make


def _moved(gradient: Tensor, now: Tensor, start: Tensor) -> float:
    return float((gradient.double() * (now.detach().double() - start.double())).sum())
