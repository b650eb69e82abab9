"""Builds that are killed, interrupted, or find no room: real processes, whose messages are read."""

import json
import os
import random
import signal
import time

import pytest

from bench.crash import largest_difference, rows_of, shards, write_data
from rapidindex.store import Store, check


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """250 examples: enough to be killed four times in the middle."""
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", 250)


@pytest.fixture
def command(data, tmp_path, llama_folders):
    base, adapter = llama_folders
    index = tmp_path / "index"
    return ["build", data, "-m", base, "-a", adapter, "-o", index, "-K", 256, "--batch-tokens", 512]


def a_shard_more_than(index, before, running):
    """Wait until the build has finished one more shard."""
    deadline = time.monotonic() + 200
    while not set(shards(index)) - set(before):
        assert time.monotonic() < deadline, running.err
        assert running.pid, running.err
        time.sleep(0.01)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_no_kill_loses_a_finished_shard_and_the_resumed_index_is_that_of_an_undisturbed_build(
    zygote, command, tmp_path
):
    index, rng = tmp_path / "index", random.Random(0)
    command = [*command, "--shard-seconds", 0.05]
    undisturbed = [tmp_path / "undisturbed" if argument == index else argument for argument in command]
    assert zygote.run(*undisturbed).code == 0
    for workers, what in ((1, "build"), (2, "build"), (2, "worker"), (2, "ctrl-c")):
        before = shards(index)
        running = zygote.start(*command, "--workers", workers)
        a_shard_more_than(index, before, running)
        time.sleep(rng.uniform(0, 0.1))
        crew, seen, began = running.children(), shards(index), time.monotonic()
        assert len(crew) == (workers if workers > 1 else 0)
        if what == "worker":
            os.kill(crew[0], signal.SIGKILL)
        else:
            running.signal(signal.SIGINT if what == "ctrl-c" else signal.SIGKILL, group=what == "ctrl-c")
        running.wait()
        seconds = time.monotonic() - began
        assert running.code == {"build": -signal.SIGKILL, "worker": 1, "ctrl-c": 130}[what], running.err
        if what == "worker":
            assert "was killed by SIGKILL" in running.err and "type the same command again" in running.err
        if what == "ctrl-c":
            assert seconds < 3 and "Type the same command again" in running.err
        assert "Traceback" not in running.err
        deadline = time.monotonic() + 10
        while any(map(is_alive, crew)):
            assert time.monotonic() < deadline, "a worker outlives its build"
            time.sleep(0.02)
        assert seen.items() <= shards(index).items()
    before = shards(index)
    assert len(Store.open(index).rows("sentence")) < 250
    done = zygote.run(*command, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["examples"] == 250
    assert before.items() <= shards(index).items()
    assert len(rows_of(index)) == 250
    assert (
        largest_difference(index, tmp_path / "undisturbed") < 1e-2
    )  # a number on the edge of a step may fall either way
    assert check(index) == []


def test_a_full_disk_stops_a_build_which_then_goes_on(zygote, command, tmp_path):
    command[command.index("-K") + 1] = 4096
    stopped = zygote.run(*command, "--limit", 40, file_size=100_000)
    assert stopped.code == 1
    assert "cannot be written: files may not grow so large here" in stopped.err
    assert "type the same command again" in stopped.err and "Traceback" not in stopped.err
    done = zygote.run(*command, "--limit", 40)
    assert done.code == 0, done.err
    assert check(tmp_path / "index") == []


def test_a_second_build_of_an_index_is_refused_while_the_first_one_runs(zygote, command, tmp_path):
    first = zygote.start(*command, "--shard-seconds", 0.05)
    a_shard_more_than(tmp_path / "index", {}, first)
    second = zygote.run(*command)
    assert second.code == 1
    assert f"is being written to by process {first.pid}" in second.err and "Traceback" not in second.err
    first.signal(signal.SIGTERM)
    assert first.wait().code == 130
    assert zygote.run(*command).code == 0


def test_a_data_file_that_changed_is_refused_with_the_way_to_add_it(zygote, command, tmp_path, data):
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(data.read_text().splitlines(keepends=True)[:6]))
    command[1] = copy
    assert zygote.run(*command).code == 0
    copy.write_text(copy.read_text() + json.dumps({"instruction": "new", "output": "row"}))
    refused = zygote.run(*command)
    assert refused.code == 1
    assert f"rapidindex add {tmp_path / 'index'} {copy}" in " ".join(refused.err.split())
    added = zygote.run("add", tmp_path / "index", copy, "--json")
    assert added.code == 0, added.err
    assert (json.loads(added.out)["computed"], json.loads(added.out)["examples"]) == (1, 7)
