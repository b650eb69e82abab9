"""Several processes that compute one build: the parent hands out work, each worker writes shards of its own.

    parent ──units, longest first──> worker: a model of its own, rows, shards of its own numbers
           <──"cached", "next", "shard NAME"──                                                  ──> INDEX/<level>/
       └── the map of slots and the correction's factors: memory that all of them map, held once

A worker has one pipe and no lock in common with others, so one that is killed harms nobody. It ends with its parent.
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
from rapidindex.caching.job import Plan
from rapidindex.caching.shard_writer import STAGES, ShardWriter, cache, load_compressor, uninterrupted
from rapidindex.config import BuildConfig, ModelConfig
from rapidindex.errors import RapidIndexError, ResourceError
from rapidindex.model.model import load
from rapidindex.progress import Progress
from rapidindex.store import Store

_SECONDS_TO_STOP = 2.0
"""How long interrupted workers have for writing what they finished; a build must end in under 3 s."""
_SECONDS_AFTER_FAILURE = 30.0
_AHEAD = 2
"""Units that a worker holds: the one it computes, and the next."""


class Shared:
    """A one-dimensional tensor in memory that worker processes map instead of copying; pickled as a file descriptor."""

    def __init__(self, descriptor: int, length: int, dtype: torch.dtype) -> None:
        self._descriptor, self._length, self._dtype = descriptor, length, dtype
        self.tensor = torch.frombuffer(mmap.mmap(descriptor, length * dtype.itemsize), dtype=dtype)

    @classmethod
    def copy(cls, tensor: Tensor) -> "Shared":
        """Shared memory that holds what `tensor` does. ResourceError where there is not enough."""
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
        """Give back the descriptor; the memory goes with the last process that maps it."""
        os.close(self._descriptor)

    def __reduce__(self) -> tuple:
        return _attach, (reduction.DupFd(self._descriptor), self._length, self._dtype)


def _anonymous_file() -> int:
    """The descriptor of a file without a name, in memory where the system can (/dev/shm is small in containers)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rapidindex")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(descriptor: Any, length: int, dtype: torch.dtype) -> Shared:
    return Shared(descriptor.detach(), length, dtype)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to begin."""

    number: int
    workers: int
    index: str
    level: str
    model: ModelConfig
    work: BuildConfig
    threads: int
    first_shard: int
    """It numbers its shards from `first_shard + number` on, in steps of `workers`: no two ever clash."""
    slots: Shared
    factors: Shared | None


def cache_with_workers(
    plan: Plan,
    store: Store,
    model: ModelConfig,
    places: Sequence[str],
    work: BuildConfig,
    slots: Shared,
    factors: Shared | None,
    progress: Progress,
) -> bool:
    """Compute `plan` in one process for each of `places` (devices); the locked `store` lists their shards.

    Returns whether all of them could compute in batches. However it ends, no process is left, and what they finished is
    kept. ResourceError, naming the signal, where a worker was killed; what a worker raised where it failed.
    """
    first_shard, count, path = store.rows(plan.level).next_number(), len(places), str(store.path)
    threads = max(1, torch.get_num_threads() // count)
    duties = [
        WorkerSpec(n, count, path, plan.level, replace(model, device=place), work, threads, first_shard, slots, factors)
        for n, place in enumerate(places)
    ]
    crew = WorkerPool(plan, store, progress)
    try:
        with uninterrupted():
            crew.start(duties)
        crew.serve()
    except KeyboardInterrupt:
        crew.stop(_SECONDS_TO_STOP)
        raise
    except Exception:
        crew.stop(_SECONDS_AFTER_FAILURE)
        raise
    finally:
        crew.kill()
    return crew.batched


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, duty: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.ready = duty.number, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(duty, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def death(self) -> ResourceError:
        """The error of a worker that ended before its work did."""
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
    """The workers of a build, and what is left for them to do."""

    def __init__(self, plan: Plan, store: Store, progress: Progress) -> None:
        self.left = deque(plan.units)
        self.store, self.level, self.progress = store, plan.level, progress
        self.done, self.total = 0, plan.tokens
        self.batched = True
        self.workers: dict[connection.Connection, _Worker] = {}

    def start(self, duties: Sequence[WorkerSpec]) -> None:
        """Start a process for each of `duties`."""
        with _unheard_by_children():
            for duty in duties:
                worker = _Worker(duty)
                self.workers[worker.pipe] = worker

    def serve(self) -> None:
        """Hand out units and list shards until every worker has ended."""
        self.progress(STAGES[self.level], 0, self.total)
        working = dict(self.workers)
        while working:
            for pipe in connection.wait(list(working)):
                with uninterrupted():  # half a message would spoil the next one
                    if not self._hear(working[pipe]):
                        del working[pipe]
        for worker in self.workers.values():
            worker.process.join()

    def _hear(self, worker: _Worker) -> bool:
        """Take a message, and act on it; whether there will be more."""
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
        """The next unit, or None where there is no more."""
        with suppress(OSError):  # it has died, which is found out when it is listened to
            worker.pipe.send(_slim(self.left.popleft()) if self.left else None)

    def stop(self, seconds: float) -> None:
        """Let the workers write what they finished, and list it. Shards not listed in time are when the next begins."""
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


def _slim(unit: Unit) -> Unit:
    """Without the responses' tokens as text, which no gradient needs."""
    kept = {id(item.encoding): item.encoding for batch in unit for item in batch}
    slim = {key: replace(encoding, tokens=[]) for key, encoding in kept.items()}
    return [[replace(item, encoding=slim[id(item.encoding)]) for item in batch] for batch in unit]


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Processes that begin in the block never hear Ctrl-C, which a terminal sends to all of them.

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
    """The parent wants the worker to end."""


def _work(duty: WorkerSpec, pipe: connection.Connection) -> None:
    """The whole life of a worker."""
    units: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, units), daemon=True).start()
    try:
        _accept_termination()
        batched = _compute(duty, pipe, units)
        _tell(pipe, "end", batched)
    except _Stopped:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)  # whoever did not ask for it learns how the worker ended
    except RapidIndexError as error:
        _tell(pipe, "error", error)
    except BaseException:
        _tell(pipe, "failed", traceback.format_exc())
    finally:
        os._exit(0)  # nothing is left to tidy up, and an interrupted build has to end soon


def _tell(pipe: connection.Connection, kind: str, value: Any) -> None:
    with uninterrupted(), suppress(OSError):  # without a parent, `_listen` ends the process
        pipe.send((kind, value))


def _listen(pipe: connection.Connection, units: queue.SimpleQueue) -> None:
    """Take what the parent sends at once, so that it never waits; and end with it."""
    try:
        while True:
            units.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)


def _accept_termination() -> None:
    """Let the first SIGTERM raise _Stopped, and ignore more of them, so that what is finished can be written."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _compute(duty: WorkerSpec, pipe: connection.Connection, units: queue.SimpleQueue) -> bool:
    torch.set_num_threads(duty.threads)
    store, loaded = Store.open(duty.index), load(duty.model)
    rows, factors = store.rows(duty.level), duty.factors and duty.factors.tensor
    compressor = load_compressor(store, loaded, K=rows.K, slots=duty.slots.tensor, factors=factors)
    numbers = itertools.count(duty.first_shard + duty.number, duty.workers)
    writer = ShardWriter(rows, duty.work, numbers, lambda name: _tell(pipe, "shard", name))
    _tell(pipe, "ready", None)
    cache(_taken(units, pipe), compressor, writer, lambda batch: _tell(pipe, "cached", padded_tokens(batch)))
    return compressor.gradients.batched


def _taken(units: queue.SimpleQueue, pipe: connection.Connection) -> Iterator[Unit]:
    """The units as they come, asking for another as each is done."""
    while (unit := units.get()) is not None:
        yield unit
        _tell(pipe, "next", None)
