"""Whole gradients on disk, computed once a seed, and played back to the product's own code.

A file holds float32 [examples, |v|] (7.4 MB an example for rank 16 on SmolLM2-135M). `Replay` gives its rows to
`Compressor` and `estimate_second_moment` as if the model computed them, so that every recipe, K and λ is the product's
own arithmetic over one pass of the model.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.evidence.tasks import write_text
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import Consume, PerExampleGradients
from rapidindex.progress import Progress

BLOCK = 16
"""Rows that are worked on at a time."""
_FLUSH = 8  # batches between two marks of how far it has come


class Replay(PerExampleGradients):
    """The gradients of a file, [N, |v|]; a batch's input ids are row numbers, [n, 1]."""

    def __init__(self, layers: list[Layer], rows: np.ndarray) -> None:
        self.layers, self.rows = layers, rows

    def __call__(self, batch: Batch, consume: Consume) -> Tensor:
        """Hand every layer of the batch's rows to `consume`, which may change them; return zeros for the losses."""
        block = torch.from_numpy(self.rows[batch.input_ids[:, 0].numpy()])
        for number, layer in enumerate(self.layers):
            part = block[:, layer.start : layer.start + layer.size]
            consume(number, part.clone(memory_format=torch.contiguous_format))
        return torch.zeros(len(batch))

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[slice, Batch]]:
        """All rows in order, a block at a time."""
        for first in range(0, len(self), BLOCK):
            here = slice(first, min(first + BLOCK, len(self)))
            yield here, numbered(range(here.start, here.stop))


def numbered(rows: Sequence[int]) -> Batch:
    """The batch that stands for these rows of a file."""
    numbers = torch.tensor(list(rows), dtype=torch.int64)[:, None]
    return Batch(numbers, torch.ones_like(numbers), torch.zeros(numbers.shape))


def compute(
    gradients: PerExampleGradients, batches: Sequence[tuple[list[int], Batch]], path: Path, progress: Progress
) -> np.ndarray:
    """The gradients of `batches` of (row numbers, batch) in the file `path`, read only; goes on where it stopped."""
    layers = gradients.layers
    shape = (sum(len(numbers) for numbers, _ in batches), layers[-1].start + layers[-1].size)
    mark = path.with_name(f"{path.name}.done")
    done = int(mark.read_text()) if mark.exists() else 0
    rows = np.memmap(path, np.float32, "r+" if done else "w+", shape=shape)
    for count, (numbers, batch) in enumerate(batches[done:], done + 1):
        rows[numbers] = _whole(gradients, batch)
        if count % _FLUSH == 0 or count == len(batches):
            rows.flush()
            write_text(mark, str(count))
        progress(f"gradients: {path.stem}", count, len(batches))
    return np.memmap(path, np.float32, "r", shape=shape)


def _whole(gradients: PerExampleGradients, batch: Batch) -> np.ndarray:
    layers = gradients.layers
    found = np.empty((len(batch), layers[-1].start + layers[-1].size), np.float32)

    def keep(number: int, values: Tensor) -> None:
        layer = layers[number]
        found[:, layer.start : layer.start + layer.size] = values.cpu().numpy()

    gradients(batch, keep)
    if not np.isfinite(found).all():
        raise SystemExit("A gradient is not finite; a smaller learning rate may help.")
    return found


def example_batches(items: Sequence[Item], batch_tokens: int = 1024) -> list[tuple[list[int], Batch]]:
    """Training examples as the product batches them, with their row numbers."""
    number = {id(item): row for row, item in enumerate(items)}
    planned = plan_batches(items, batch_tokens)
    return [([number[id(item)] for item in batch], as_batch(batch, "cpu")) for batch in planned]
