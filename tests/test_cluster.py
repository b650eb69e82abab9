"""A Ray cluster of two nodes on this machine builds and finds what one process does, whatever dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bench.crash import largest_difference, rows_of, shards, write_data
from rapidindex.errors import StoreError
from rapidindex.search.exact import exact_search
from rapidindex.store import Store, check
from tests.search.stores import gradients, make_store, remove

ray = pytest.importorskip("ray")
EXAMPLES = 120


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU."""
    from rapidindex.cluster import import_ray

    import_ray()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        options = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **options})
        cluster.second = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", EXAMPLES)


@pytest.fixture
def command(data, llama_folders):
    base, adapter = llama_folders
    return ["build", data, "-m", base, "-a", adapter, "-K", 256, "--batch-tokens", 512, "--shard-seconds", 0.05, "-o"]


def actors():
    """The processes of the actors."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("_Actor" in part for part in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def wait_for(condition, running):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline and running.pid, running.err
        time.sleep(0.02)


@pytest.mark.slow
def test_a_cluster_gives_the_rows_of_one_process_and_a_killed_actor_and_driver_lose_nothing(
    zygote, command, tmp_path, cluster
):
    plain, index = tmp_path / "plain", tmp_path / "index"
    assert zygote.run(*command, plain).code == 0
    command = [*command, index, "--ray", cluster.address]
    driver = zygote.start(*command)
    wait_for(lambda: shards(index), driver)
    driver.signal(signal.SIGKILL)
    driver.wait()
    kept = shards(index)
    again = zygote.start(*command, "--json")
    wait_for(lambda: set(shards(index)) - set(kept), again)
    os.kill(actors()[0], signal.SIGKILL)
    assert again.wait().code == 0, again.err
    assert json.loads(again.out)["examples"] == EXAMPLES
    assert kept.items() <= shards(index).items()
    assert Store.open(index).complete("sentence") and len(rows_of(index)) == EXAMPLES
    assert largest_difference(index, plain) < 1e-2  # a number on the edge of a step may fall either way
    assert check(index) == []


@pytest.mark.slow
def test_a_node_that_is_gone_costs_its_units_under_way_and_the_others_do_them(zygote, command, tmp_path, cluster):
    plain, index = tmp_path / "plain", tmp_path / "index"
    assert zygote.run(*command, plain).code == 0
    running = zygote.start(*command, index, "--ray", cluster.address, "--workers", 2)
    wait_for(lambda: shards(index) and len(actors()) == 2, running)
    cluster.remove_node(cluster.second, allow_graceful=False)
    assert running.wait().code == 0, running.err
    assert Store.open(index).complete("sentence") and len(rows_of(index)) == EXAMPLES
    assert largest_difference(index, plain) < 1e-2
    refused = zygote.run(*command, index, "--ray", cluster.address, "--workers", 9)
    assert refused.code == 1 and "CPUs, too few for 9 actors" in " ".join(refused.err.split()), refused.err


class Numbers:
    """Units that are numbers, of one shard each, as `RayPool` needs them."""

    def __init__(self, count):
        self.left, self.shards, self.notes = list(range(count)), [], []
        self.batched = True
        self.record = self.shards.append

    def begin(self):
        pass

    def cached(self, tokens):
        pass

    def take(self):
        return [self.left.pop(0)] if self.left else None

    def lost(self, held, note):
        self.notes.append(note)
        self.left += [unit[0] for unit in held if unit[0] not in self.shards]


def test_an_actor_that_hangs_is_killed_and_its_units_go_to_others(cluster, tmp_path, monkeypatch):
    from rapidindex.caching import actors as module
    from rapidindex.cluster import connect

    @dataclass
    class Spec:  # as WorkerSpec, which an actor would import torch for
        number: int = 0
        model: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(device="cpu"))
        threads: int = 1

    hung = tmp_path / "hung"

    class Stops:
        def __init__(self, spec):
            pass

        def open(self):
            return 0, [], True

        def write(self):
            return 0, [], True

        def cache(self, unit):
            if unit == [1] and not hung.exists():
                hung.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            return 1, unit, True

    monkeypatch.setattr(module, "_Actor", Stops)
    monkeypatch.setattr(module, "_SECONDS_SILENT", 3.0)
    monkeypatch.setattr(module, "_TIMES_SLOWEST", 1)
    units = Numbers(6)
    connect(cluster.address)
    pool = module.RayPool(units, [Spec()], {})
    try:
        pool.start()
        pool.serve()
        gone = int(hung.read_text())
        deadline = time.monotonic() + 60
        while psutil.pid_exists(gone) and psutil.Process(gone).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline  # it could write shards when it goes on
            time.sleep(0.1)
    finally:
        pool.kill()
        ray.shutdown()
    assert sorted(units.shards) == [0, 1, 2, 3, 4, 5]
    assert set(units.notes) == {"actor 1 hung; its units go to others"}


SMALL = """
import numpy, ray
from rapidindex.cluster import connect
connect("local")
whole = numpy.arange(2**25, dtype="f4")
read = ray.remote(lambda array: (len(array), float(array[-1])))
assert ray.get(read.remote(ray.put(whole))) == (len(whole), float(whole[-1]))
print("read", int(ray.cluster_resources()["object_store_memory"]))
"""


def in_a_container(*command):
    """Run a command with 64 MB of /dev/shm, as containers have it; skip the test where that cannot be tried."""
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m none /dev/shm && exec "$@"', "sh"]
    try:
        possible = subprocess.run([*own, "true"], capture_output=True).returncode == 0
    except OSError:
        possible = False
    if not possible:
        pytest.skip("another /dev/shm cannot be mounted here")
    return subprocess.run([*own, sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)


def test_a_cluster_that_is_started_here_shares_arrays_larger_than_its_memory_and_dev_shm():
    done = in_a_container("-c", SMALL)
    assert done.stdout.split() == ["read", str(80 * 2**20)], done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_in_time_and_keeps_what_was_finished(zygote, command, tmp_path, cluster):
    index = tmp_path / "index"
    command[command.index("--shard-seconds") + 1] = 0.5
    running = zygote.start(*command, index, "--ray", cluster.address)
    wait_for(lambda: shards(index), running)
    began, seen = time.monotonic(), shards(index)
    running.signal(signal.SIGINT)
    assert running.wait().code == 130, running.err
    assert time.monotonic() - began < 15 and "Type the same command again" in running.err  # Ray itself takes seconds
    assert "Traceback" not in running.err
    wait_for(lambda: not actors(), running)
    assert seen.items() <= shards(index).items()
    assert zygote.run(*command, index).code == 0
    assert len(rows_of(index)) == EXAMPLES


def test_a_spread_search_is_the_local_one_whoever_dies_and_refuses_other_rows(cluster, tmp_path):
    from rapidindex.search.spread import SpreadSearch

    rows = gradients(90, 64)
    rows[60] = rows[7]  # of equal scores the lower row comes first, in whichever part it lies
    store = make_store(tmp_path / "index", rows, per_shard=20)
    remove(store, np.array([3, 41]))
    queries = np.concatenate([rows[[7, 30]], gradients(1, 64, seed=5)])
    stored = store.rows("sentence")
    try:
        spread = SpreadSearch(str(store.path), stored, cluster.address)
        assert len(spread._bounds) == 2
        for k, largest in ((10, True), (10, False), (200, True)):
            ours, theirs = spread.search(queries, k, largest=largest), exact_search(stored, queries, k, largest=largest)
            assert (ours.rows == theirs.rows).all() and ours.n == theirs.n == 88
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-6)
        with ThreadPoolExecutor(2) as pool:  # as the threads of a page
            found = list(pool.map(lambda query: spread.search(query[None], 10).rows[0], queries))
        assert (found == exact_search(stored, queries, 10).rows).all()
        ray.kill(spread._actors[1])
        assert (spread.search(queries, 10).rows == exact_search(stored, queries, 10).rows).all()
        other = make_store(tmp_path / "other", gradients(90, 64, seed=3), per_shard=20)
        with pytest.raises(StoreError, match="sees other rows at"):
            SpreadSearch(str(other.path), stored, cluster.address).search(queries, 3)
    finally:
        ray.shutdown()


def test_what_is_wrong_with_a_cluster_is_one_sentence(zygote, command, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    for address, text, code in (
        (nobody, f"There is no Ray cluster at {nobody}", 1),
        ("somewhere", "--ray somewhere is no address", 2),
    ):
        refused = zygote.run(*command, tmp_path / "index", "--ray", address)
        said = " ".join(refused.err.split())
        assert refused.code == code and text in said and "Traceback" not in said, refused.err
    assert time.monotonic() - began < 30
    refused = zygote.run("serve", tmp_path, "--ray", "somewhere")
    assert refused.code == 2 and "--ray somewhere is no address" in " ".join(refused.err.split()), refused.err
