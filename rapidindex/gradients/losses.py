"""Token and example losses of a language model, and the layers that their gradients have.

The loss of an example is Σ_t weight_t · cross-entropy_t, every token predicted from the ones before it; with the
weights 1/G on its G response tokens it is the paper's L(s) (below Eq. 1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A trainable parameter tensor and its place in the flattened gradient."""

    name: str
    start: int
    size: int
    shape: tuple[int, ...] = ()
    """The parameter's shape; its gradient is flattened row by row."""


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to a common length T."""

    input_ids: Int64[Tensor, "examples T"]
    attention: Int64[Tensor, "examples T"]
    weights: Float[Tensor, "examples T"]
    """Weight of each token's cross-entropy in its example's loss; 0 for the prompt and the padding."""
    labels: Int64[Tensor, "examples T"] | None = None
    """The tokens whose cross-entropy counts, where they are not those of `input_ids`; negative until they are drawn."""
    names: tuple[str, ...] = ()
    """What errors call the examples."""
    seed: tuple[int, int] = (0, 0)
    """The seed of drawn labels, and the first example's number among those that draw by it."""

    @classmethod
    def of(
        cls,
        ids: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        device: torch.device | str = "cpu",
        names: Sequence[str] = (),
    ) -> "Batch":
        """Pad the token ids (int [T_b]) and loss weights (float [T_b]) of several examples."""
        length = max(map(len, ids))
        input_ids = torch.zeros(len(ids), length, dtype=torch.int64)
        attention = torch.zeros_like(input_ids)
        padded = torch.zeros(len(ids), length)
        for row, (tokens, weight) in enumerate(zip(ids, weights, strict=True)):
            input_ids[row, : len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
            attention[row, : len(tokens)] = 1
            padded[row, : len(tokens)] = torch.from_numpy(np.asarray(weight, dtype=np.float32))
        return cls(input_ids.to(device), attention.to(device), padded.to(device), names=tuple(names))

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def are_prefixes(self) -> bool:
        """Whether the examples are several prefixes of the longest, each with its last token alone in the loss."""
        lengths = self.attention.sum(1)
        if len(self) == 1 or self.labels is not None or lengths.min() < 2:
            return False
        same = (self.input_ids == self.input_ids[lengths.argmax()]) | (self.attention == 0)
        last = torch.arange(self.input_ids.shape[1], device=lengths.device) == lengths.unsqueeze(1) - 1
        return bool(same.all()) and torch.equal(self.weights != 0, last)

    def example(self, row: int) -> "Batch":
        """Return one example alone, without its padding; a label that either draws, both have."""
        length = int(self.attention[row].sum())
        parts = (self.input_ids, self.attention, self.weights, self.labels)
        parts = (None if part is None else part[row : row + 1, :length] for part in parts)
        return Batch(*parts, self.names[row : row + 1], (self.seed[0], self.seed[1] + row))

    def with_drawn_labels(self, seed: int, first: int = 0) -> "Batch":
        """Return the batch with labels that its first forward pass draws from the model's own predictions.

        Later passes keep them. Example b draws by `seed` and its number, `first` + b, whatever else is in the batch.
        The mean product of such gradients is the Fisher matrix. Each weight becomes its square root: drawn tokens are
        independent, so that each then counts in a product as it does in the loss.
        """
        labels = self.input_ids.masked_fill(self.weights != 0, -1)
        return replace(self, weights=self.weights.sqrt(), labels=labels, seed=(seed, first))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice: torch on a CPU and mapped files have no type."""
    said = str(error).lower()
    told = "can't allocate memory" in said or "cannot allocate memory" in said
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; tied ones stand once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers in the order of the flattened gradient."""
    layers, start = [], 0
    for name, parameter in trainable(model).items():
        layers.append(Layer(name, start, parameter.numel(), tuple(parameter.shape)))
        start += parameter.numel()
    return layers


def positions_used(weights: Float[Tensor, "examples T"]) -> Int64[Tensor, "examples G"]:
    """Return, for each example, the positions whose next token has a weight, filled up with 0 to a common G."""
    wanted: Bool[Tensor, "examples T"] = weights[:, 1:] != 0
    most = max(1, int(wanted.sum(1).max()))
    order = torch.argsort(wanted.to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
    return torch.where(wanted.gather(1, order), order, torch.zeros_like(order))


def example_losses(model: nn.Module, batch: Batch, positions: Tensor | None = None) -> Float[Tensor, " examples"]:
    """Return the loss of each example, float32; `positions` [examples, G] are those of the logits, if not all."""
    weights, entropies = token_losses(model, batch, positions)
    return torch.where(weights != 0, weights * entropies, 0.0).sum(1)


def prefix_losses(
    model: nn.Module, batch: Batch, part: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " examples"]:
    """Return the loss of each example of a batch that `are_prefixes`, float32, by a forward pass of the longest.

    `part` is given the last hidden states [1, T, width] and the positions before the prefixes' last tokens, int64
    [examples]; the output layer sees what it returns, float [examples, 1, width]. ValueError where there is no output
    layer.
    """
    head, last = model.get_output_embeddings(), batch.attention.sum(1) - 1
    if head is None:
        raise ValueError("the model has no output layer")
    whole = batch.example(int(last.argmax()))
    handle = head.register_forward_pre_hook(lambda _, inputs: (part(*inputs, last - 1),))
    try:
        logits = model(input_ids=whole.input_ids, attention_mask=whole.attention, use_cache=False).logits
    finally:
        handle.remove()
    labels, weights = (values.gather(1, last.unsqueeze(1)).squeeze(1) for values in (batch.input_ids, batch.weights))
    return weights * F.cross_entropy(logits[:, 0].float(), labels, reduction="none")


def token_losses(model: nn.Module, batch: Batch, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight and the cross-entropy of the token after each position, both float32 [examples, G].

    Labels that are to be drawn are drawn from this pass.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False).logits
    if positions is None:
        positions = torch.arange(batch.input_ids.shape[1] - 1, device=logits.device).expand(len(batch), -1)
        logits = logits[:, :-1]
    weights = batch.weights.gather(1, positions + 1)
    # A filler repeats position 0, which counts only where it stands first and has a weight.
    repeated = (positions == 0) & (torch.arange(positions.shape[1], device=positions.device) > 0)
    weights = weights.masked_fill(repeated, 0.0)
    if batch.labels is not None:
        _draw(batch, logits.detach(), positions, weights != 0)
    labels = (batch.input_ids if batch.labels is None else batch.labels).gather(1, positions + 1)
    entropies = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
    return weights, entropies


def _draw(
    batch: Batch,
    logits: Float[Tensor, "examples G vocabulary"],
    positions: Int64[Tensor, "examples G"],
    wanted: Bool[Tensor, "examples G"],
) -> None:
    """Draw the labels after the positions that are `wanted`, in the examples that have not drawn theirs."""
    seed, first = batch.seed
    for row, mask in enumerate(wanted):
        places = positions[row, mask] + 1
        if (batch.labels[row, places] < 0).any():
            points = np.random.default_rng((seed, first + row)).random(len(places))
            drawn = [_token_at(point, scores) for point, scores in zip(points, logits[row, mask].cpu(), strict=True)]
            batch.labels[row, places] = torch.stack(drawn).to(batch.labels.device)


def _token_at(point: float, logits: Float[Tensor, " vocabulary"]) -> Int64[Tensor, ""]:
    """Return the token at a point between 0 and 1 of the cumulative distribution."""
    chances = logits.float().softmax(-1).nan_to_num_(1.0)  # its gradient will not be finite
    sums = chances.double().cumsum(-1)
    return torch.searchsorted(sums, point * sums[-1], right=True).clamp_max(len(sums) - 1)


def weighted_token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a mask of the tokens that have a weight, bool [examples, G], and their cross-entropies, float32 likewise.

    An example's tokens stand first in its row, in their order; G is the largest number of them.
    """
    positions = positions_used(batch.weights)
    with only_logits_at(model, positions) as narrowed:
        weights, entropies = token_losses(model, batch, positions if narrowed else None)
    if narrowed:
        return weights != 0, entropies
    wanted = batch.weights[:, 1:].gather(1, positions) != 0
    return wanted, entropies.gather(1, positions)


@contextmanager
def only_logits_at(model: nn.Module, positions: Tensor) -> Iterator[bool]:
    """Pass the output layer the hidden states at `positions` [examples, G] alone. Yield whether the model has one."""
    head = model.get_output_embeddings()
    if head is None:
        yield False
        return

    def narrow(_, inputs: tuple) -> tuple:
        (hidden,) = inputs
        return (hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])),)

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield True
    finally:
        handle.remove()
