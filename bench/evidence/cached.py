"""Whole gradients on disk, computed once a seed, and played back to the package's own code.

A file holds float32 [examples, |v|] (7.4 MB an example for rank 16 on SmolLM2-135M). `Replay` hands its rows to
`Compressor` and `estimate_second_moment` as if the model computed them. So every recipe, K and λ is the package's own
arithmetic, and the model runs once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.common import write_text
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import Consume, PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import Diagonal
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress

BLOCK = 16
"""Rows of a block."""
_FLUSH = 8  # batches after which the file is flushed and their number noted


class Replay(PerExampleGradients):
    """Plays back the gradients of a file, [N, |v|]; the input ids of a batch are row numbers, [n, 1]."""

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
        """Yield all rows in order, a block at a time."""
        for first in range(0, len(self), BLOCK):
            here = slice(first, min(first + BLOCK, len(self)))
            yield here, numbered(range(here.start, here.stop))


def compressor_of(
    gradients: PerExampleGradients, sketch: Sketch, normalize: str, factors: Tensor | None = None
) -> Compressor:
    """Return the package's compressor; `factors` [|v|] multiply the gradient's entries before it is normalised."""
    preconditioner = None if factors is None else Diagonal(gradients.layers, factors)
    return Compressor(gradients, sketch, normalize=normalize, preconditioner=preconditioner)


def numbered(rows: Sequence[int]) -> Batch:
    """Return the batch that stands for these rows of a file."""
    numbers = torch.tensor(list(rows), dtype=torch.int64)[:, None]
    return Batch(numbers, torch.ones_like(numbers), torch.zeros(numbers.shape))


def compute(
    gradients: PerExampleGradients, batches: Sequence[tuple[list[int], Batch]], path: Path, progress: Progress
) -> np.ndarray:
    """Compute the gradients of `batches` of (row numbers, batch) into the file `path`, and map it read-only.

    A computation that was interrupted goes on where it stopped.
    """
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
    whole = np.empty((len(batch), layers[-1].start + layers[-1].size), np.float32)

    def keep(number: int, values: Tensor) -> None:
        layer = layers[number]
        whole[:, layer.start : layer.start + layer.size] = values.cpu().numpy()

    gradients(batch, keep)
    if not np.isfinite(whole).all():
        raise SystemExit("A gradient is not finite; a smaller learning rate may help.")
    return whole


def example_batches(items: Sequence[Item], batch_tokens: int = 1024) -> list[tuple[list[int], Batch]]:
    """Return the training examples as a build batches them, with their row numbers."""
    number = {id(item): row for row, item in enumerate(items)}
    planned = plan_batches(items, batch_tokens)
    return [([number[id(item)] for item in batch], as_batch(batch, "cpu")) for batch in planned]
