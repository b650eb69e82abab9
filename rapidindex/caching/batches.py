"""Examples, or single tokens of their responses, in batches of like length.

Models are causal: the gradient of a token's own loss is that of the example cut after the token, with no other token in
the loss. So tokens are cached as examples are; those of one example are batched together where there are several.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rapidindex.config import BuildConfig
from rapidindex.data.examples import Example
from rapidindex.data.templates import Encoding, Template
from rapidindex.errors import ResourceError
from rapidindex.gradients.losses import Batch, Layer

_LAYER_BYTES = 2**31
"""What a layer's gradients take in a batch at most, where they are made whole: those of a vocabulary are large."""
_UNIT_BATCHES = 8
"""Batches of token rows that are stored together: a killed build can lose them beside the shard under way."""


@dataclass(frozen=True, slots=True)
class Item:
    """An example, or one token of its response, that becomes a row."""

    example: Example
    encoding: Encoding
    source: str = ""
    """The data that was added to the index and holds the example; empty for the data of the build."""
    position: int = -1
    """The response token whose loss counts (Eq. 6); -1 for the mean over all of them (Eq. 5)."""

    @property
    def tokens(self) -> int:
        """Number of tokens of prompt and response that the loss depends on."""
        if self.position < 0:
            return len(self.encoding.input_ids)
        return int(np.flatnonzero(self.encoding.response_mask)[self.position]) + 1

    @property
    def token(self) -> int:
        """The id of the response token; -1 for an example."""
        return -1 if self.position < 0 else int(self.encoding.input_ids[self.tokens - 1])

    def to_record(self, loss: float) -> dict[str, Any]:
        """Return the stored record of the example, whose loss is `loss`."""
        return self.example.to_record(loss, self.source, self.encoding.fingerprint)


Unit = list[list[Item]]
"""Batches whose rows are stored together, so that an example has all of its rows in the store or none."""


def most_items(layers: Sequence[Layer]) -> int:
    """Return how many items a batch may hold whose gradients are made whole, one layer at a time."""
    return max(1, _LAYER_BYTES // (4 * max(layer.size for layer in layers)))


def plan_batches(items: Sequence[Item], batch_tokens: int, most: int | None = None) -> list[list[Item]]:
    """Batch items of like length, longest first: of `batch_tokens` padded tokens (or one item), and `most` items."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-item.tokens, item.example.id, item.position)):
        count = len(batches[-1]) + 1 if batches else 1
        if 1 < count <= (most or count) and batches[-1][0].tokens * count <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _plan_tokens(examples: Sequence[Sequence[Item]], batch_tokens: int, most: int | None) -> list[list[Item]]:
    """Batch each example's tokens by themselves, since they share a forward pass; those left single, together."""
    batches = [batch for tokens in examples for batch in plan_batches(tokens, batch_tokens, most)]
    single = [batch[0] for batch in batches if len(batch) == 1]
    return [batch for batch in batches if len(batch) > 1] + plan_batches(single, batch_tokens, most)


def plan_units(items: Sequence[Item], batch_tokens: int, most: int | None = None) -> list[Unit]:
    """Divide the work into units, longest first: one batch of examples, or the tokens of examples of like length.

    Batches are those of `plan_batches`.
    """
    if all(item.position < 0 for item in items):
        return [[batch] for batch in plan_batches(items, batch_tokens, most)]
    examples: dict[str, list[Item]] = {}
    for item in items:
        examples.setdefault(item.example.id, []).append(item)
    work = {id: sum(item.tokens for item in tokens) for id, tokens in examples.items()}
    groups: list[list[list[Item]]] = []
    filled = _UNIT_BATCHES * batch_tokens
    for id in sorted(examples, key=lambda id: (-work[id], id)):
        if filled + work[id] > _UNIT_BATCHES * batch_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(examples[id])
        filled += work[id]
    return [_plan_tokens(group, batch_tokens, most) for group in groups]


def padded_tokens(batch: Sequence[Item]) -> int:
    """Return the tokens of a batch with its padding, to which its work is proportional."""
    return len(batch) * max(item.tokens for item in batch)


def does_not_fit(items: Sequence[Item], device: torch.device) -> ResourceError:
    """Return the error of the longest of these items, which does not fit into memory by itself."""
    longest = max(items, key=lambda item: item.tokens)
    where = f" (line {longest.example.line})" if longest.example.line else ""
    return ResourceError(
        f"The memory of {device} does not suffice for one example of {longest.tokens} tokens{where}.",
        hint="Build with a smaller --max-length or -K, an adapter, or a larger machine.",
    )


def as_batch(items: Sequence[Item], device: torch.device | str) -> Batch:
    """Pad items to a batch whose losses are the mean over an example's response tokens, or one token's own."""
    ids = [item.encoding.input_ids[: item.tokens] for item in items]
    names = [f"the example in line {item.example.line}" for item in items]
    return Batch.of(ids, [_weights(item) for item in items], device, names)


def batches_of(examples: Iterable[Example], template: Template, device: torch.device | str) -> list[Batch]:
    """Return a few examples as padded batches, of as many tokens as those of a build by default."""
    items = [Item(example, template.encode(example)) for example in examples]
    return [as_batch(batch, device) for batch in plan_batches(items, BuildConfig.batch_tokens)]


def _weights(item: Item) -> np.ndarray:
    if item.position < 0:
        mask = item.encoding.response_mask
        return mask / mask.sum()
    return np.arange(item.tokens) == item.tokens - 1
