"""From examples, or their tokens, to shards: batches of like length, their RapidGrads, and rows for the next shard.

The gradient of a response token's own loss is that of the example cut after it, with no other token in the loss (models
are causal), so tokens take the same way as examples.

What one process does of a build, whether it is the only one or one of several workers. Knows nothing of options or of
what an index is identified by.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapidindex.caching.batches import Item, Unit, as_batch, padded_tokens
from rapidindex.config import BuildConfig, SketchConfig
from rapidindex.errors import ResourceError, StoreError
from rapidindex.gradients.eigenbases import Eigenbases, entries
from rapidindex.gradients.losses import Layer
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads, joined
from rapidindex.gradients.second_moment import KRONECKER, correction, kronecker_correction
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.model import LoadedModel
from rapidindex.store import MOMENT, Rows, ShardContent, Store, damaged

STAGES = {"sentence": "cache", "token": "cache tokens"}
"""What the work on each level is called while it is under way."""


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
    v = torch.tensor(np.asarray(moment))
    if store.config["gradient"]["second_moment"] == KRONECKER:
        return kronecker_correction(v, [layer["size"] for layer in store.layers])
    return correction(v)


def _load_eigenbases(store: Store, layers: Sequence[Layer], device: torch.device) -> Eigenbases | None:
    """The eigenbases along which the index corrects, mapped where they are used on a CPU; None for most indexes."""
    if store.config["gradient"]["second_moment"] != KRONECKER:
        return None
    vectors = store.eigenvectors()
    if vectors is None or len(vectors) != entries(layers):
        raise damaged(store.path / MOMENT, "it does not hold the eigenvectors of this model's layers")
    return Eigenbases(layers, torch.from_numpy(vectors).to(device))


def load_compressor(
    store: Store,
    loaded: LoadedModel,
    gradients: PerExampleGradients | None = None,
    *,
    K: int | None = None,
    slots: Tensor | None = None,
    factors: Tensor | None = None,
) -> Compressor:
    """What turns examples and queries into the RapidGrads of this index. StoreError if its second moment is missing.

    `K` is the length of a row, by default that of an example's. `slots` (int32 [|v|]) and `factors` (float32 [|v|]) are
    given where they are at hand, as they are to workers.
    """
    gradients = gradients or PerExampleGradients(loaded.model)
    factors = load_factors(store) if factors is None else factors
    size = sum(layer.size for layer in gradients.layers)
    return Compressor(
        gradients,
        Sketch(size, replace(SketchConfig(**store.config["sketch"]), **({"K": K} if K else {})), slots),
        normalize=store.config["gradient"]["normalize"],
        correction=None if factors is None else factors.to(loaded.device),
        eigenbases=_load_eigenbases(store, gradients.layers, loaded.device),
    )


def cache(
    units: Iterable[Unit],
    compressor: Compressor,
    writer: "ShardWriter",
    cached: Callable[[list[Item]], None],
) -> None:
    """Compute the RapidGrads of `units` and hand them to `writer`, telling `cached` of each batch that is done.

    However it ends, by an interrupt say, the units that were done are written first. ResourceError where the memory
    does not suffice.
    """
    device = next(compressor.gradients.model.parameters()).device
    try:
        for unit in units:
            found = []
            for batch in unit:
                found.append(compressor(as_batch(batch, device)))
                if batch is unit[-1]:
                    writer.add([item for one in unit for item in one], joined(found))
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
        most = work.shard_bytes // rows.row_bytes + 1
        self._rows = np.empty((min(most, capacity or most), rows.K), np.float32)  # memory is taken as it is filled
        self._begin()

    def _begin(self) -> None:
        self._taken = 0
        self._norms: list[np.ndarray] = []
        self._places: list[tuple[int, int, int]] = []  # example, position and token of each row
        self._examples: list[dict[str, Any]] = []
        self._rejected: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def add(self, items: Sequence[Item], found: RapidGrads) -> None:
        """Take a unit, all rows of its examples; an example with a gradient that is not finite is rejected."""
        rows, norms, losses = (tensor.cpu().numpy() for tensor in (found.rows, found.norms, found.losses))
        finite = np.isfinite(norms).all(1) & np.isfinite(rows).all(1)
        examples: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            examples.setdefault(item.example.id, []).append(number)
        good, bad = [], []
        for mine in examples.values():
            (good if finite[mine].all() else bad).append(mine)
        kept = [number for mine in good for number in mine]
        first = len(self._examples)
        places = [
            (first + nth, items[number].position, items[number].token)
            for nth, mine in enumerate(good)
            for number in mine
        ]
        with uninterrupted():  # an interrupt leaves no half unit
            self._room_for(len(kept))[:] = rows[kept]
            self._taken += len(kept)
            self._norms.append(norms[kept])
            self._places += places
            self._examples += [record_of(items[mine[0]], float(losses[mine].mean())) for mine in good]
            for number in (mine[int(np.argmin(finite[mine]))] for mine in bad):
                self._rejected.append(_rejection(items[number], float(losses[number])))

    def _room_for(self, more: int) -> np.ndarray:
        """The next rows of the buffer, which grows where a unit is larger than what was left of it."""
        last = self._taken + more
        if last > len(self._rows):
            self._rows = np.concatenate([self._rows[: self._taken], np.empty((last, self._rows.shape[1]), "f4")])
        return self._rows[self._taken : last]

    @property
    def full(self) -> bool:
        """Whether it is time to write: there is enough of rows, or of work."""
        enough = self.store_rows.row_bytes * self._taken >= self.work.shard_bytes
        return enough or time.monotonic() - self._started > self.work.shard_seconds

    def write(self) -> None:
        """Write what there is, if anything, and begin anew. Interrupts wait until it is done."""
        if not (self._examples or self._rejected):
            return
        places = np.array(self._places, np.int32).reshape(-1, 3)
        with uninterrupted():
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
    whose = "its gradient" if item.position < 0 else f"the gradient of its token {item.position}"
    reason = f"{whose} is not finite (loss {loss:.4g})"
    return {"id": item.example.id, "line": item.example.line, "reason": reason, **source}
