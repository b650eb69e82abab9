"""One process's share of a build: RapidGrads of its units of work, written to shards.

Knows nothing of options and recipes; whether it is the only process or one of several makes no difference to it.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rapidindex.caching.batches import Item, Unit, as_batch, does_not_fit, padded_tokens
from rapidindex.config import BuildConfig
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads, concatenate
from rapidindex.store import Rows, ShardContent

STAGES = {"sentence": "cache", "token": "cache tokens"}
"""The name of each level's work, for the progress."""


def cache(
    units: Iterable[Unit], compressor: Compressor, writer: "ShardWriter", report: Callable[[list[Item]], None]
) -> None:
    """Compute the RapidGrads of `units`, hand them to `writer`, and `report` each batch.

    A batch that does not fit into memory is halved, and so are later ones of its size: rows do not depend on batches.
    However the work ends, the finished units are written. ResourceError where a single example does not fit.
    """
    compute = BatchCompressor(compressor)
    try:
        for unit in units:
            cache_unit(unit, compute, writer, report)
    finally:
        writer.write()


def cache_unit(
    unit: Unit, compute: "BatchCompressor", writer: "ShardWriter", report: Callable[[list[Item]], None]
) -> None:
    """Compute the rows of one unit, hand them to `writer`, which writes full shards, and `report` each batch."""
    rapidgrads = []
    for batch in unit:
        rapidgrads.append(compute(batch))
        if batch is unit[-1]:
            writer.add([item for batch in unit for item in batch], concatenate(rapidgrads))
            if writer.full:
                writer.write()
        report(batch)


class BatchCompressor:
    """Compresses batches, in parts where a whole one does not fit into memory."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.device = compressor.device
        self.most_tokens = 2**63

    def __call__(self, items: list[Item]) -> RapidGrads:
        """Return the RapidGrads of a batch of `items`. ResourceError where one of them does not fit by itself."""
        if len(items) == 1 or padded_tokens(items) <= self.most_tokens:
            rapidgrads = self._try(items)
            if rapidgrads is not None:
                return rapidgrads
            self.most_tokens = padded_tokens(items) - 1
        middle = len(items) // 2
        return concatenate([self(items[:middle]), self(items[middle:])])

    def _try(self, items: list[Item]) -> RapidGrads | None:
        """Return None where the batch does not fit. ResourceError where it is a single item."""
        try:
            return self.compressor(as_batch(items, self.device))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            if len(items) == 1:
                raise does_not_fit(items, self.device) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


class ShardWriter:
    """Collects rows, and writes them to shards.

    `numbers` yields the numbers of the shards, `finished` is called with the name of each shard that was written, and
    `capacity` is the number of rows to come, if it is known. One thread may write while another computes what it adds.
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
        most = work.shard_bytes // rows.row_bytes + 1
        self._lock = threading.RLock()
        self._rows = np.empty((min(most, capacity or most), rows.K), np.float32)  # memory is taken as it is filled
        self._begin()

    def _begin(self) -> None:
        self._taken = 0
        self._norms: list[np.ndarray] = []
        self._places: list[tuple[int, int, int]] = []  # example, position and token of each row
        self._examples: list[dict[str, Any]] = []
        self._rejected: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def add(self, items: Sequence[Item], rapidgrads: RapidGrads) -> None:
        """Add a unit: all rows of its examples. An example with a gradient that is not finite is rejected."""
        rows, norms, losses = (
            tensor.cpu().numpy() for tensor in (rapidgrads.rows, rapidgrads.norms, rapidgrads.losses)
        )
        finite = np.isfinite(norms).all(1) & np.isfinite(rows).all(1)
        examples: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            examples.setdefault(item.example.id, []).append(number)
        good, bad = [], []
        for mine in examples.values():
            (good if finite[mine].all() else bad).append(mine)
        kept = [number for mine in good for number in mine]
        with uninterrupted(), self._lock:  # an interrupt leaves no half unit
            self._next_rows(len(kept))[:] = rows[kept]
            self._taken += len(kept)
            self._norms.append(norms[kept])
            first = len(self._examples)
            self._places += [
                (first + nth, items[number].position, items[number].token)
                for nth, mine in enumerate(good)
                for number in mine
            ]
            self._examples += [items[mine[0]].to_record(float(losses[mine].mean())) for mine in good]
            for number in (mine[int(np.argmin(finite[mine]))] for mine in bad):
                self._rejected.append(_rejection(items[number], float(losses[number])))

    def _next_rows(self, more: int) -> np.ndarray:
        """Return the next rows of the buffer, which grows where a unit is larger than the rest of it."""
        last = self._taken + more
        if last > len(self._rows):
            self._rows = np.concatenate([self._rows[: self._taken], np.empty((last, self._rows.shape[1]), "f4")])
        return self._rows[self._taken : last]

    @property
    def full(self) -> bool:
        """Whether the rows or the seconds of a shard are reached."""
        enough = self.store_rows.row_bytes * self._taken >= self.work.shard_bytes
        return enough or time.monotonic() - self._started > self.work.shard_seconds

    def write(self) -> None:
        """Write the collected rows, if there are any. Interrupts wait until they are written."""
        with uninterrupted(), self._lock:
            if not (self._examples or self._rejected):
                return
            places = np.array(self._places, np.int32).reshape(-1, 3)
            try:
                content = ShardContent(
                    rows=self._rows[: self._taken],
                    norms=np.concatenate(self._norms),
                    example=places[:, 0],
                    position=places[:, 1],
                    token=places[:, 2],
                    examples=self._examples,
                    rejected=self._rejected,
                )
                self.finished(self.store_rows.write_shard(next(self.numbers), content))
            finally:
                self._begin()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block has ended. Only the main thread receives them."""
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


def _rejection(item: Item, loss: float) -> dict[str, Any]:
    source = {"source": item.source} if item.source else {}
    whose = "its gradient" if item.position < 0 else f"the gradient of its token {item.position}"
    reason = f"{whose} is not finite (loss {loss:.4g})"
    return {"id": item.example.id, "line": item.example.line, "reason": reason, **source}
