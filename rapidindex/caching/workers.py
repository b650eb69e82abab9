"""Several processes compute one build: the parent hands out units of work, and each worker writes shards of its own.

    parent ──units, longest first──> worker: a model of its own, rows, shards of its own numbers
           <──"cached", "next", "shard NAME"──                                                  ──> INDEX/<level>/
       └── the sketch's map and the correction's factors: memory that all processes map

A worker shares one pipe with its parent, and no lock with other workers: a killed one harms nobody. It ends with its
parent.
"""

import itertools
import mmap
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, reduction, resource_tracker
from typing import Any

import torch
from torch import Tensor

from rapidindex.caching.batches import Unit, padded_tokens
from rapidindex.caching.job import LevelPlan, open_model
from rapidindex.caching.shard_writer import STAGES, ShardWriter, cache, uninterrupted
from rapidindex.config import BuildConfig, EncoderConfig, ModelConfig
from rapidindex.errors import RapidIndexError, ResourceError
from rapidindex.progress import Progress
from rapidindex.recipe import Recipe
from rapidindex.store import Store

_SECONDS_TO_STOP = 2.0
"""Seconds for interrupted workers to write what they finished; a build must end within 3 s."""
_SECONDS_AFTER_FAILURE = 30.0
_AHEAD = 2
"""Units that a worker holds: the one that it computes, and the next."""


class Shared:
    """A one-dimensional tensor in memory that worker processes map instead of copying; pickled as a file descriptor."""

    def __init__(self, descriptor: int, length: int, dtype: torch.dtype) -> None:
        self._descriptor, self._length, self._dtype = descriptor, length, dtype
        self.tensor = torch.frombuffer(mmap.mmap(descriptor, length * dtype.itemsize), dtype=dtype)

    @classmethod
    def copy(cls, tensor: Tensor) -> "Shared":
        """Copy `tensor` into shared memory. ResourceError where there is not enough."""
        size = tensor.numel() * tensor.element_size()
        try:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, size)
            shared = cls(descriptor, tensor.numel(), tensor.dtype)
        except OSError as error:
            raise ResourceError(f"No {size / 2**20:,.0f} MiB to share between workers: {error.strerror}.") from error
        shared.tensor.copy_(tensor)
        return shared

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last process that maps it."""
        os.close(self._descriptor)

    def __reduce__(self) -> tuple:
        return _attach, (reduction.DupFd(self._descriptor), self._length, self._dtype)


def _anonymous_file() -> int:
    """Open a file without a name, in memory where the system can (/dev/shm is small in containers)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rapidindex")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(descriptor: Any, length: int, dtype: torch.dtype) -> Shared:
    return Shared(descriptor.detach(), length, dtype)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process starts with."""

    number: int
    workers: int
    index: str
    level: str
    model: ModelConfig | EncoderConfig
    work: BuildConfig
    threads: int
    first_shard: int
    """It numbers its shards from `first_shard + number` on, in steps of `workers`: no two ever clash."""
    shared: dict[str, Shared]
    """`slots`, the map of a sketch, int32 [|v|], and `factors`, the correction's, float32, where there are such."""


def cache_with_workers(
    plan: LevelPlan, store: Store, model: ModelConfig, work: BuildConfig, shared: dict[str, Shared], progress: Progress
) -> bool:
    """Compute `plan` in one process for each of its devices; the locked `store` lists their shards.

    `shared` is that of `WorkerSpec`. Return whether all workers computed
    in batches. However the work ends, no process is left, and finished units are kept. ResourceError, naming the
    signal, where a worker was killed; a worker's own error where it failed.
    """
    first_shard, count, path = store.rows(plan.level).next_number(), len(plan.devices), str(store.path)
    threads = max(1, torch.get_num_threads() // count)
    specs = [
        WorkerSpec(n, count, path, plan.level, replace(model, device=device), work, threads, first_shard, shared)
        for n, device in enumerate(plan.devices)
    ]
    pool = WorkerPool(plan, store, progress)
    try:
        with uninterrupted():
            pool.start(specs)
        pool.serve()
    except KeyboardInterrupt:
        pool.stop(_SECONDS_TO_STOP)
        raise
    except Exception:
        pool.stop(_SECONDS_AFTER_FAILURE)
        raise
    finally:
        pool.kill()
    return pool.batched


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.ready = spec.number, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(spec, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def death(self) -> ResourceError:
        """Return the error of a worker that ended before its work did."""
        self.process.join(5)
        code = self.process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        often = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return ResourceError(
            f"Worker {self.number + 1} (process {self.process.pid}) {how}{often}.",
            hint="What was finished is kept: type the same command again to go on, with fewer --workers if need be.",
        )


class WorkerPool:
    """The workers of a build, and the units that are left."""

    def __init__(self, plan: LevelPlan, store: Store, progress: Progress) -> None:
        self.units = deque(plan.units)
        self.store, self.level, self.progress = store, plan.level, progress
        self.done, self.total = 0, plan.tokens
        self.batched = True
        self.workers: dict[connection.Connection, _Worker] = {}

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start a process for each of `specs`."""
        with _signals_blocked_in_children():
            for spec in specs:
                worker = _Worker(spec)
                self.workers[worker.pipe] = worker

    def serve(self) -> None:
        """Hand out units and list shards until every worker has ended."""
        self.progress(STAGES[self.level], 0, self.total)
        working = dict(self.workers)
        while working:
            for pipe in connection.wait(list(working)):
                with uninterrupted():  # half a message would spoil the next one
                    if not self._receive(working[pipe]):
                        del working[pipe]
        for worker in self.workers.values():
            worker.process.join()

    def _receive(self, worker: _Worker) -> bool:
        """Receive a message and act on it. Return whether more will come."""
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            raise worker.death() from None
        if kind == "end":
            self.batched = self.batched and value
        elif kind == "shard":
            self.store.record_shard(self.level, value)
        elif kind == "error":
            raise value
        elif kind == "failed":
            raise RuntimeError(f"worker {worker.number + 1} failed:\n{value}")
        elif kind == "ready":
            worker.ready = True
            for _ in range(_AHEAD):
                self._give(worker)
        elif kind == "cached":
            self.done += value
            self.progress(STAGES[self.level], self.done, self.total)
        elif kind == "next":
            self._give(worker)
        return kind != "end"

    def _give(self, worker: _Worker) -> None:
        """Send the next unit, or None where there is no more."""
        with suppress(OSError):  # a dead worker is found when its pipe is read
            worker.pipe.send(_without_texts(self.units.popleft()) if self.units else None)

    def stop(self, seconds: float) -> None:
        """Let the workers write what they finished, and list it. The next build lists shards that come too late."""
        deadline = time.monotonic() + seconds
        for worker in self.workers.values():
            worker.process.terminate() if worker.ready else worker.process.kill()
        talking = [pipe for pipe, worker in self.workers.items() if worker.ready]
        while talking and (left := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(talking, left):
                try:
                    kind, value = pipe.recv()
                    if kind == "shard":
                        self.store.record_shard(self.level, value)
                except (EOFError, OSError):
                    talking.remove(pipe)
                except RapidIndexError:
                    pass

    def kill(self) -> None:
        """Leave no process behind."""
        for pipe, worker in self.workers.items():
            worker.process.kill()
            worker.process.join()
            worker.process.close()
            pipe.close()


def _without_texts(unit: Unit) -> Unit:
    """Drop the responses' tokens as text, which no gradient needs."""
    kept = {id(item.encoding): item.encoding for batch in unit for item in batch}
    slim = {key: replace(encoding, tokens=[]) for key, encoding in kept.items()}
    return [[replace(item, encoding=slim[id(item.encoding)]) for item in batch] for batch in unit]


@contextmanager
def _signals_blocked_in_children() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all processes, from those that start in the block.

    SIGTERM waits until they are ready for it.
    """
    resource_tracker.ensure_running()  # or it would begin in the block, and end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The worker's side


class _Stopped(BaseException):
    """The parent has asked the worker to end."""


def _work(spec: WorkerSpec, pipe: connection.Connection) -> None:
    """Run a worker from its start to its end."""
    units: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, units), daemon=True).start()
    try:
        _accept_termination()
        batched = _compute(spec, pipe, units)
        _send(pipe, "end", batched)
    except _Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)  # whoever did not ask for it learns how the worker ended
    except RapidIndexError as error:
        _send(pipe, "error", error)
    except BaseException:
        _send(pipe, "failed", traceback.format_exc())
    finally:
        os._exit(0)  # nothing is left to tidy up, and an interrupted build has to end soon


def _send(pipe: connection.Connection, kind: str, value: Any) -> None:
    with uninterrupted(), suppress(OSError):  # without a parent, `_listen` ends the process
        pipe.send((kind, value))


def _listen(pipe: connection.Connection, units: queue.SimpleQueue) -> None:
    """Receive at once, so that the parent never waits, and end with the parent."""
    try:
        while True:
            units.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)


def _accept_termination() -> None:
    """Let the first SIGTERM raise _Stopped, and ignore later ones, so that finished units can be written."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _compute(spec: WorkerSpec, pipe: connection.Connection, units: queue.SimpleQueue) -> bool:
    torch.set_num_threads(spec.threads)
    store, model = Store.open(spec.index), open_model(spec.model)
    rows = store.rows(spec.level)
    shared = {name: array.tensor for name, array in spec.shared.items()}
    recipe = Recipe.from_manifest(store.config)
    compressor = model.compressor(recipe, vectors=store.eigenvectors(), roots=store.roots(), K=rows.K, **shared)
    numbers = itertools.count(spec.first_shard + spec.number, spec.workers)
    writer = ShardWriter(rows, spec.work, numbers, lambda name: _send(pipe, "shard", name))
    _send(pipe, "ready", None)
    cache(_received(units, pipe), compressor, writer, lambda batch: _send(pipe, "cached", padded_tokens(batch)))
    return model.gradients.batched


def _received(units: queue.SimpleQueue, pipe: connection.Connection) -> Iterator[Unit]:
    """Yield the units as they come, and ask for another after each."""
    while (unit := units.get()) is not None:
        yield unit
        _send(pipe, "next", None)
