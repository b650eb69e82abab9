"""Who computes the units of a build, and what is left of them: shared by local processes and by a Ray cluster.

    Units   what is left, handed out longest first; the shards that come back are listed
    Worker  one process's or actor's model, and the shards that it writes

Knows neither processes nor Ray: `workers.py` and `actors.py` bring the two together.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rapidindex.caching.batches import Unit, padded_tokens
from rapidindex.caching.job import LevelPlan, open_model
from rapidindex.caching.shard_writer import STAGES, BatchCompressor, ShardWriter, cache_unit
from rapidindex.config import BuildConfig, EncoderConfig, ModelConfig
from rapidindex.progress import Progress
from rapidindex.recipe import Recipe
from rapidindex.store import Store


class Units:
    """The units of a plan that nobody has computed yet, and how far the work is.

    The `store`, which its process has locked, lists the shards. `batched` is whether all workers computed in batches.
    """

    def __init__(self, plan: LevelPlan, store: Store, progress: Progress) -> None:
        self.left = deque(plan.units)
        self.store, self.level, self._progress = store, plan.level, progress
        self._done, self._total = 0, plan.tokens
        self._note = ""
        self.batched = True

    def begin(self) -> None:
        """Report that nothing is computed yet."""
        self._progress(STAGES[self.level], 0, self._total)

    def take(self) -> Unit | None:
        """Return the next unit; None where there is no more."""
        return _without_texts(self.left.popleft()) if self.left else None

    def cached(self, tokens: int) -> None:
        """Report that so many more tokens, padding included, are computed."""
        self._done += tokens
        self._progress(STAGES[self.level], self._done, self._total, self._note)

    def record(self, shard: str) -> None:
        """List a shard that a worker has finished."""
        self.store.record_shard(self.level, shard)

    def lost(self, held: list[Unit], note: str) -> None:
        """Put back those of `held`, the units of a worker that died, whose rows it had not written; `note` says so."""
        self._note = note
        self.store.list_finished()
        done = self.store.done_ids(self.level)
        again = [unit for unit in held if any(item.example.id not in done for batch in unit for item in batch)]
        self.left.extendleft(reversed(again))


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker starts with."""

    number: int
    index: str
    level: str
    model: ModelConfig | EncoderConfig
    work: BuildConfig
    threads: int
    part: tuple[int, int]
    """It numbers its shards as writer `part[0]` of `part[1]` (`Rows.next_number`)."""


def worker_specs(plan: LevelPlan, store: Store, model: ModelConfig, work: BuildConfig) -> list[WorkerSpec]:
    """Return what each of the plan's workers starts with: they share this process's threads and its shard numbers."""
    count, (part, parts) = len(plan.devices), store.part
    threads = max(1, torch.get_num_threads() // count)
    return [
        WorkerSpec(
            n,
            str(store.path.absolute()),
            plan.level,
            replace(model, device=device),
            work,
            threads,
            (part + parts * n, parts * count),
        )
        for n, device in enumerate(plan.devices)
    ]


class Worker:
    """A model of its own, and the shards that it writes; `finished` is called with the name of each.

    `shared` has `slots`, the map of a sketch, int32 [|v|], and `factors`, the correction's, float32, where there are
    such. `write` may be called from another thread while `cache` computes.
    """

    def __init__(self, spec: WorkerSpec, shared: dict[str, Tensor], finished: Callable[[str], None]) -> None:
        torch.set_num_threads(spec.threads)
        store, self._model = Store.open(spec.index), open_model(spec.model)
        rows, (part, parts) = store.rows(spec.level), spec.part
        compressor = self._model.compressor(
            Recipe.from_manifest(store.config),
            vectors=store.eigenvectors(),
            roots=store.roots(),
            K=rows.K,
            **shared,
        )
        numbers = itertools.count(rows.next_number(part, parts), parts)
        self._compute, self._writer = BatchCompressor(compressor), ShardWriter(rows, spec.work, numbers, finished)

    @property
    def batched(self) -> bool:
        """Whether gradients are computed in batches."""
        return self._model.gradients.batched

    def cache(self, unit: Unit, report: Callable[[int], None]) -> None:
        """Compute the rows of `unit`, and `report` the tokens of each batch, padding included."""
        cache_unit(unit, self._compute, self._writer, lambda batch: report(padded_tokens(batch)))

    def write(self) -> None:
        """Write the rows of finished units that are in no shard yet."""
        self._writer.write()


def _without_texts(unit: Unit) -> Unit:
    """Drop the responses' tokens as text, which no gradient needs."""
    kept = {id(item.encoding): item.encoding for batch in unit for item in batch}
    slim = {key: replace(encoding, tokens=[]) for key, encoding in kept.items()}
    return [[replace(item, encoding=slim[id(item.encoding)]) for item in batch] for batch in unit]
