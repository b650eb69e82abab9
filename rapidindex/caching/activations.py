"""What a model keeps of a forward pass for the backward one, from three short passes, and what is alive of tensors.

All figures are bytes. Knows nothing of data, of options or of what else a build takes.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rapidindex.gradients.per_example import Batch, PerExampleGradients, example_losses

_LENGTHS = (16, 40, 64)


@dataclass(frozen=True)
class Activations:
    """Bytes for n examples of T tokens: `constant` + n (`linear` T + `square` T²)."""

    constant: float
    """A layer's dequantized weights, for one."""
    linear: float
    square: float
    """Of masks and eager attention."""

    def of(self, examples: int, tokens: int) -> int:
        """Bytes for a batch of examples padded to so many tokens, logits excepted."""
        return int(self.constant + examples * tokens * (self.linear + self.square * tokens))


class Alive(TorchDispatchMode):
    """While open, counts the bytes of the tensors made within that are alive (`now`), and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view is nothing new
        for storage in _storages(made):
            if storage._cdata not in given | self._known:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def measure_activations(gradients: PerExampleGradients) -> Activations:
    """From forward passes over two examples of 16, 40 and 64 tokens; the model is left as it was."""
    batches = [_made_up(gradients.model, length) for length in _LENGTHS]
    if not gradients.batched:
        batches = [batch.example(0) for batch in batches]
    terms = [(1, len(batch) * length, len(batch) * length**2) for batch, length in zip(batches, _LENGTHS, strict=True)]
    found = np.linalg.solve(np.array(terms, float), [_peak(gradients, batch) for batch in batches])
    return Activations(*np.maximum(found, 0.0).tolist())  # what grows otherwise may fit with a term below zero


def _peak(gradients: PerExampleGradients, batch: Batch) -> int:
    """Bytes alive at the fullest moment of a forward pass."""
    with Alive() as alive:
        if gradients.batched:
            with gradients.forward(batch, lambda number, values: None):
                return alive.peak
        with torch.enable_grad():
            example_losses(gradients.model, batch)
        return alive.peak


def _made_up(model: torch.nn.Module, length: int) -> Batch:
    """Two examples with one token each in the loss; the second is shorter, so that there is a mask, as mostly."""
    embedding = model.get_input_embeddings()
    ids = [np.arange(tokens) % embedding.num_embeddings for tokens in (length, length - 1)]
    weights = [(np.arange(len(tokens)) == len(tokens) - 1).astype(np.float32) for tokens in ids]
    return Batch.of(ids, weights, embedding.weight.device)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
