"""A Ray cluster computes one build: the driver hands out units of work, and each actor writes shards of its own.

    driver ──units, longest first──> actor: a model of its own, rows, shards of its own numbers
           <──tokens, names of shards──                                        ──> INDEX/<level>/, on shared storage
       └── the sketch's map and the correction's factors: in the object store, once a node

An actor that dies costs its units under way: the driver lists what it wrote, puts the rest back, and starts another.
One that hangs is killed first: it is silent for ten minutes, and ten times as long as any unit has taken.
Ray restarts no actor and repeats no call by itself, since only the driver knows which rows are in a shard.
"""

import socket
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rapidindex.caching.batches import Unit
from rapidindex.caching.shard_writer import uninterrupted
from rapidindex.caching.units import Units, Worker, WorkerSpec
from rapidindex.cluster import connect, import_ray
from rapidindex.config import BuildRequest
from rapidindex.errors import NotAnIndex, RapidIndexError, ResourceError, StoreError

_AHEAD = 2
"""Units that an actor holds: the one that it computes, and the next."""
_DEATHS = 3
"""Actors that may die one after another with no unit computed in between: an example may kill each in turn."""
_SECONDS_TO_START = 600.0
"""Seconds within which some actor must have loaded its model."""
_SECONDS_SILENT = 600.0
"""Seconds that an actor with work may always be silent, whatever units have taken so far."""
_TIMES_SLOWEST = 10
"""An actor may be silent for so many times as long as the slowest unit has taken."""


@contextmanager
def on_cluster(request: BuildRequest) -> Iterator[BuildRequest]:
    """Be connected to the request's Ray cluster, where it names one; yield the request with the number of its actors.

    By default that is one for each GPU, or for each node of a cluster without. UsageError where Ray is not installed,
    ResourceError where there is no such cluster, or where it is too small.
    """
    if request.work.ray is None:
        yield request
        return
    ours, ray = connect(request.work.ray), import_ray()
    try:
        kind, most, nodes = _size(ray, request.model.device)
        actors = request.work.workers or (int(most) if kind == "GPU" else nodes)
        if actors > most:
            raise ResourceError(
                f"The Ray cluster has {most:g} {kind}s, too few for {actors} actors.", hint="Give fewer --workers."
            )
        yield replace(request, work=replace(request.work, workers=actors))
    finally:
        if ours:
            ray.shutdown()


def _size(ray: Any, device: str) -> tuple[str, float, int]:
    """Return what an actor on `device` takes one of, GPU or CPU, how many the cluster has, and its number of nodes."""
    resources = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    kind = "GPU" if resources.get("GPU", 0) >= 1 and device != "cpu" else "CPU"
    return kind, resources.get(kind, 0), nodes


class _Actor:
    """The worker on a node; its errors come back as values, so that those of Ray itself stand out."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec, self._shards = spec, []

    def open(self, **shared: np.ndarray) -> Any:
        """Load the model; `shared` are read-only views of the node's object store, as `Worker` takes them."""
        return self._answer(lambda: self._open(shared))

    def cache(self, unit: Unit) -> Any:
        """Compute a unit. Return its tokens, and the shards that were finished since."""
        tokens: list[int] = []
        return self._answer(lambda: self._worker.cache(unit, tokens.append), tokens)

    def write(self) -> Any:
        """Write what is in no shard yet; while another call computes, too."""
        return self._answer(lambda: self._worker.write())

    def _answer(self, work: Any, tokens: Sequence[int] = ()) -> tuple:
        try:
            work()
            shards, self._shards = self._shards, []
            return sum(tokens), shards, self._worker.batched
        except RapidIndexError as error:
            return (error,)
        except Exception:
            return (RuntimeError(f"an actor on {socket.gethostname()} failed:\n{traceback.format_exc()}"),)

    def _open(self, shared: dict[str, np.ndarray]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody writes to what cannot be written to
            tensors = {name: torch.from_numpy(array) for name, array in shared.items()}
        try:
            self._worker = Worker(self._spec, tensors, self._shards_append)
        except NotAnIndex as error:
            raise StoreError(
                f"{socket.gethostname()} sees no index at {self._spec.index}.",
                hint="Index, model and adapter must lie on storage that all nodes have at the same path.",
            ) from error

    def _shards_append(self, name: str) -> None:
        self._shards.append(name)


class _Member:
    """The driver's side of an actor."""

    def __init__(self, spec: WorkerSpec, actor: Any) -> None:
        self.spec, self.actor, self.ready = spec, actor, False
        self.held: list[Unit] = []
        """Every unit that it was given: those of no shard go to others when it dies."""
        self.unwritten = False
        self.since = time.monotonic()
        """When it answered last, or was given work after it had none."""


class RayPool:
    """An actor for each of `specs`, which compute `units`; `shared` is that of `units.Worker`, as arrays."""

    def __init__(self, units: Units, specs: Sequence[WorkerSpec], shared: dict[str, np.ndarray]) -> None:
        self.units, self.specs, self.shared = units, specs, shared
        self._ray = import_ray()
        self._calls: dict[Any, tuple[_Member, Unit | None]] = {}
        self._members: list[_Member] = []
        self._deaths = 0
        self._slowest = 0.0
        """Seconds that the slowest unit has taken."""
        self._patience = _SECONDS_SILENT

    def start(self) -> None:
        """Start the actors. ResourceError where the object store is too small for what they share."""
        ray = self._ray
        try:
            self._shared = {name: ray.put(array) for name, array in self.shared.items()}
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            size = sum(array.nbytes for array in self.shared.values())
            raise ResourceError(
                f"Ray has no room for {size / 2**20:,.0f} MiB that the actors of a node share, in memory or on disk.",
                hint="Free some disk where Ray keeps its files (/tmp/ray), or give `ray start` another --temp-dir.",
            ) from error
        kind, _, self._nodes = _size(ray, self.specs[0].model.device)
        needs = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self._class = ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1}, scheduling_strategy="SPREAD", **needs
        )(_Actor)
        self._cpus = min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        for spec in self.specs:
            self._begin(spec)

    def _begin(self, spec: WorkerSpec) -> None:
        threads = max(1, int(self._cpus) * self._nodes // len(self.specs))
        member = _Member(spec, self._class.remote(replace(spec, threads=threads)))
        self._members.append(member)
        self._calls[member.actor.open.remote(**self._shared)] = member, None

    def serve(self) -> None:
        """Hand out units and list shards until every unit is in a shard."""
        self.units.begin()
        deadline = time.monotonic() + _SECONDS_TO_START
        while self._give() or self._write():
            ready, _ = self._ray.wait(list(self._calls), timeout=1.0)
            for call in ready:
                with uninterrupted():
                    if call in self._calls:  # and its actor has not died meanwhile
                        self._receive(call)
            self._end_hung()
            if any(member.ready for member in self._members):
                deadline = time.monotonic() + _SECONDS_TO_START
            elif time.monotonic() > deadline:
                raise ResourceError(
                    f"No actor has started on the Ray cluster in {_SECONDS_TO_START / 60:.0f} minutes.",
                    hint="`ray status` says what else uses its CPUs and GPUs.",
                )

    def _give(self) -> bool:
        """Give units to the actors that are ready. Return whether units are left or under way."""
        for member in self._members:
            under_way = sum(other is member for other, _ in self._calls.values())
            while member.ready and under_way < _AHEAD and (unit := self.units.take()):
                if not under_way:
                    member.since = time.monotonic()
                self._calls[member.actor.cache.remote(unit)] = member, unit
                member.held.append(unit)
                member.unwritten, under_way = True, under_way + 1
        return bool(self.units.left) or any(unit for _, unit in self._calls.values())

    def _write(self) -> bool:
        """Let the actors write their last rows. Return whether one has not done so yet."""
        writing = {id(member) for member, _ in self._calls.values()}
        for member in self._members:
            if member.unwritten and id(member) not in writing:
                member.since = time.monotonic()
                self._calls[self._last_rows(member)] = member, None
        return any(member.unwritten for member in self._members)

    @staticmethod
    def _last_rows(member: _Member) -> Any:
        return member.actor.write.options(concurrency_group="control").remote()

    def _receive(self, call: Any) -> None:
        member, unit = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._replace(member, "died", str(error).strip().partition("\n")[0])
            return
        if isinstance(answer[0], Exception):
            raise answer[0]
        tokens, shards, batched = answer
        self.units.batched &= batched
        for shard in shards:
            self.units.record(shard)
        if unit is not None:
            self._deaths = 0
            self._slowest = max(self._slowest, time.monotonic() - member.since)
            self.units.cached(tokens)
        elif member.ready:
            member.unwritten = False
        member.ready, member.since = True, time.monotonic()

    def _end_hung(self) -> None:
        """Replace the actors that have had work and been silent for too long.

        Each makes the driver twice as patient: a unit that honestly takes that long is then computed by a later actor.
        """
        for member in list(self._members):
            calls = [call for call, (other, _) in self._calls.items() if other is member]
            silent = time.monotonic() - member.since
            if not member.ready or not calls or silent <= max(self._patience, _TIMES_SLOWEST * self._slowest):
                continue
            if self._ray.wait(calls, timeout=1.0)[0]:  # it was the driver that slept
                continue
            self._patience *= 2
            with uninterrupted():
                self._replace(member, "hung", f"it was silent for {silent:.0f} seconds")

    def _replace(self, member: _Member, how: str, why: str) -> None:
        """Put back the units of an actor that died or hung, kill it, and start another in its place."""
        self._deaths += 1
        number = member.spec.number + 1
        if self._deaths > _DEATHS:
            raise ResourceError(
                f"Actor {number} {how}, the last of {self._deaths} with no unit computed in between: {why}",
                hint="What was finished is kept: type the same command again, with fewer --workers if memory ran out.",
            )
        self._calls = {call: entry for call, entry in self._calls.items() if entry[0] is not member}
        self._members.remove(member)
        with suppress(Exception):
            self._ray.kill(member.actor)
        self.units.lost(member.held, f"actor {number} {how}; its units go to others")
        self._begin(member.spec)

    def stop(self, seconds: float) -> None:
        """Let the actors write what they finished, and list it. The next build lists shards that come too late."""
        calls = [self._last_rows(member) for member in self._members if member.unwritten]
        ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=seconds) if calls else ([], [])
        for call in ready:
            with suppress(RapidIndexError, self._ray.exceptions.RayError):
                answer = self._ray.get(call)
                for shard in answer[1] if len(answer) > 1 else ():
                    self.units.record(shard)

    def kill(self) -> None:
        """Leave no actor behind."""
        for member in self._members:
            with suppress(Exception):
                self._ray.kill(member.actor)
