"""From examples to shards: batches of like length, their RapidGrads, and rows that wait for the next shard.

What one process does of a build, whether it is the only one or one of several workers. Knows nothing of options or of
what an index is identified by.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapidindex.config import BuildConfig, SketchConfig
from rapidindex.corrections import correction
from rapidindex.errors import ResourceError, StoreError
from rapidindex.examples import Example
from rapidindex.gradients import Batch, PerExampleGradients
from rapidindex.model import LoadedModel
from rapidindex.rapidgrad import Compressor, RapidGrads
from rapidindex.sketch import Sketch
from rapidindex.store import Store
from rapidindex.store.rows import Rows
from rapidindex.templates import Encoding


@dataclass(frozen=True)
class Item:
    """An example on its way to a row."""

    example: Example
    encoding: Encoding
    source: str = ""
    """The data file, where it is not the one that the index was built from."""

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.encoding.input_ids)


def plan_batches(items: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """Batches of like length, longest first, of at most `batch_tokens` padded tokens (or one example)."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (-item.tokens, item.example.id)):
        if batches and batches[-1][0].tokens * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def padded_tokens(batch: Sequence[Item]) -> int:
    """Tokens of a batch with its padding: what its work grows with."""
    return len(batch) * max(item.tokens for item in batch)


def as_batch(items: Sequence[Item], device: torch.device | str) -> Batch:
    """Examples whose loss is the mean over their response tokens."""
    masks = [item.encoding.response_mask for item in items]
    weights = [mask / mask.sum() for mask in masks]
    return Batch.of([item.encoding.input_ids for item in items], weights, device)


def load_factors(store: Store) -> Tensor | None:
    """The correction's factor of each gradient entry, float32 [|v|]; None for an index without a correction.

    StoreError where the second moment is missing.
    """
    if store.config["gradient"]["second_moment"] == "none":
        return None
    moment = store.second_moment()
    if moment is None:
        raise StoreError(
            f"{store.path} has no second moment yet: its build did not get far.",
            hint="Go on with it by giving its rapidindex build command again.",
        )
    return correction(torch.tensor(np.asarray(moment)))


def load_compressor(
    store: Store,
    loaded: LoadedModel,
    gradients: PerExampleGradients | None = None,
    *,
    slots: Tensor | None = None,
    factors: Tensor | None = None,
) -> Compressor:
    """What turns examples and queries into the RapidGrads of this index. StoreError if its second moment is missing.

    `slots` (int32 [|v|]) and `factors` (float32 [|v|]) are given where they are at hand, as they are to workers.
    """
    gradients = gradients or PerExampleGradients(loaded.model)
    factors = load_factors(store) if factors is None else factors
    size = sum(layer.size for layer in gradients.layers)
    return Compressor(
        gradients,
        Sketch(size, SketchConfig(**store.config["sketch"]), slots),
        normalize=store.config["gradient"]["normalize"],
        correction=None if factors is None else factors.to(loaded.device),
    )


def cache(
    batches: Iterable[list[Item]],
    compressor: Compressor,
    writer: "ShardWriter",
    cached: Callable[[list[Item]], None],
) -> None:
    """Compute the RapidGrads of `batches` and hand them to `writer`, telling `cached` of each batch that is done.

    However it ends, by an interrupt say, the batches that were done are written first. ResourceError where the memory
    does not suffice.
    """
    device = next(compressor.gradients.model.parameters()).device
    try:
        for batch in batches:
            writer.add(batch, compressor(as_batch(batch, device)))
            if writer.full:
                writer.write()
            cached(batch)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            f"The memory of {device} does not suffice for a batch of {padded_tokens(batch)} tokens.",
            hint="Type the same command with a smaller --batch-tokens: it goes on where it stopped.",
        ) from error
    finally:
        writer.write()


class ShardWriter:
    """Rows on their way into the next shard.

    `numbers` gives each shard its number, `finished` is told the name of each one that was written, and `capacity` is
    the number of rows that are still to come, if it is known.
    """

    def __init__(
        self,
        rows: Rows,
        work: BuildConfig,
        numbers: Iterator[int],
        finished: Callable[[str], None],
        capacity: int | None = None,
    ) -> None:
        self.store_rows, self.work, self.numbers, self.finished = rows, work, numbers, finished
        most = work.shard_bytes // (2 * rows.K) + 1
        self._rows = np.empty((min(most, capacity or most), rows.K), np.float32)  # memory is taken as it is filled
        self._begin()

    def _begin(self) -> None:
        self.norms: list[np.ndarray] = []
        self.examples: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def add(self, items: Sequence[Item], found: RapidGrads) -> None:
        """Take a batch; an example whose gradient is not finite is rejected."""
        rows, norms = found.rows.cpu().numpy(), found.norms.cpu().numpy()
        finite = np.isfinite(norms).all(1) & np.isfinite(rows).all(1)
        told = list(zip(items, found.losses.tolist(), finite, strict=True))
        with uninterrupted():  # an interrupt leaves no half batch
            first = len(self.examples)
            last = first + int(finite.sum())
            if last > len(self._rows):
                self._rows = np.concatenate([self._rows[:first], np.empty((2 * last - first, rows.shape[1]), "f4")])
            self._rows[first:last] = rows[finite]
            self.norms.append(norms[finite])
            self.examples += [record_of(item, loss) for item, loss, ok in told if ok]
            self.rejected += [_rejection(item, loss) for item, loss, ok in told if not ok]

    @property
    def full(self) -> bool:
        """Whether it is time to write: there is enough of rows, or of work."""
        enough = 2 * self.store_rows.K * len(self.examples) >= self.work.shard_bytes
        return enough or time.monotonic() - self.started > self.work.shard_seconds

    def write(self) -> None:
        """Write what there is, if anything, and begin anew. Interrupts wait until it is done."""
        if not (self.examples or self.rejected):
            return
        n = len(self.examples)
        with uninterrupted():
            try:
                name = self.store_rows.write_shard(
                    next(self.numbers),
                    rows=self._rows[:n],
                    norms=np.concatenate(self.norms),
                    example=np.arange(n, dtype=np.int32),
                    position=np.full(n, -1, np.int32),
                    token=np.full(n, -1, np.int32),
                    examples=self.examples,
                    rejected=self.rejected,
                )
                self.finished(name)
            finally:
                self._begin()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block has ended (in the main thread: they reach no other one)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if caught:
            signal.raise_signal(caught[0])


def record_of(item: Item, loss: float) -> dict[str, Any]:
    """What a shard keeps of an example."""
    example = item.example
    return {
        "id": example.id,
        "line": example.line,
        "messages": [list(turn) for turn in example.messages],
        "response": example.response,
        "meta": example.meta,
        "loss": round(loss, 6),
        **({"source": item.source} if item.source else {}),
    }


def _rejection(item: Item, loss: float) -> dict[str, Any]:
    source = {"source": item.source} if item.source else {}
    reason = f"its gradient is not finite (loss {loss:.4g})"
    return {"id": item.example.id, "line": item.example.line, "reason": reason, **source}
