"""Several processes compute one build: the parent hands out units of work, and each worker writes shards of its own.

    parent ──units, longest first──> worker: a model of its own, rows, shards of its own numbers
           <──"cached", "next", "shard NAME"──                                                  ──> INDEX/<level>/
       └── the sketch's map and the correction's factors: memory that all processes map

A worker shares one pipe with its parent, and no lock with other workers: a killed one harms nobody. It ends with its
parent.
"""

import mmap
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, reduction, resource_tracker
from typing import Any

import torch
from torch import Tensor

from rapidindex.caching.shard_writer import uninterrupted
from rapidindex.caching.units import Units, Worker, WorkerSpec
from rapidindex.errors import RapidIndexError, ResourceError

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


def compute_with(pool: "WorkerPool") -> bool:
    """Compute a plan by a pool of workers, local or on a cluster; the locked store lists their shards.

    Return whether all workers computed in batches. However the work ends, no worker is left, and finished units are
    kept. ResourceError where a worker was killed, and is not replaced; a worker's own error where it failed.
    """
    try:
        with uninterrupted():
            pool.start()
        pool.serve()
    except KeyboardInterrupt:
        pool.stop(_SECONDS_TO_STOP)
        raise
    except Exception:
        pool.stop(_SECONDS_AFTER_FAILURE)
        raise
    finally:
        pool.kill()
    return pool.units.batched


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, spec: WorkerSpec, shared: dict[str, Shared]) -> None:
        context = multiprocessing.get_context("spawn")
        self.number, self.ready = spec.number, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(spec, shared, theirs), daemon=True)
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
    """A process for each of `specs`, which compute `units`.

    `shared` is that of `units.Worker`, in memory that the processes map.
    """

    def __init__(self, units: Units, specs: Sequence[WorkerSpec], shared: dict[str, Shared]) -> None:
        self.units, self.specs, self.shared = units, specs, shared
        self.workers: dict[connection.Connection, _Worker] = {}

    def start(self) -> None:
        """Start the processes."""
        with _signals_blocked_in_children():
            for spec in self.specs:
                worker = _Worker(spec, self.shared)
                self.workers[worker.pipe] = worker

    def serve(self) -> None:
        """Hand out units and list shards until every worker has ended."""
        self.units.begin()
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
            self.units.batched &= value
        elif kind == "shard":
            self.units.record(value)
        elif kind == "error":
            raise value
        elif kind == "failed":
            raise RuntimeError(f"worker {worker.number + 1} failed:\n{value}")
        elif kind == "ready":
            worker.ready = True
            for _ in range(_AHEAD):
                self._give(worker)
        elif kind == "cached":
            self.units.cached(value)
        elif kind == "next":
            self._give(worker)
        return kind != "end"

    def _give(self, worker: _Worker) -> None:
        """Send the next unit, or None where there is no more."""
        with suppress(OSError):  # a dead worker is found when its pipe is read
            worker.pipe.send(self.units.take())

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
                        self.units.record(value)
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


def _work(spec: WorkerSpec, shared: dict[str, Shared], pipe: connection.Connection) -> None:
    """Run a worker from its start to its end."""
    units: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, units), daemon=True).start()
    try:
        _accept_termination()
        _send(pipe, "end", _compute(spec, shared, pipe, units))
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


def _compute(
    spec: WorkerSpec, shared: dict[str, Shared], pipe: connection.Connection, units: queue.SimpleQueue
) -> bool:
    arrays = {name: array.tensor for name, array in shared.items()}
    worker = Worker(spec, arrays, lambda name: _send(pipe, "shard", name))
    _send(pipe, "ready", None)
    try:
        while (unit := units.get()) is not None:
            worker.cache(unit, lambda tokens: _send(pipe, "cached", tokens))
            _send(pipe, "next", None)
    finally:
        worker.write()
    return worker.batched
