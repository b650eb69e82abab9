"""Jobs that build one index side by side, without an engine: one after another, at once, killed, and refused."""

import errno
import json
import os
import signal
import time
from contextlib import ExitStack

import pytest

from bench.crash import largest_difference, rows_of, shards, write_data
from rapidindex.errors import IndexBusy, StoreError
from rapidindex.store import Store, check

EXAMPLES = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", EXAMPLES)


@pytest.fixture
def command(data, tmp_path, llama_folders):
    base, adapter = llama_folders
    return ["build", data, "-m", base, "-a", adapter, "-K", 256, "--batch-tokens", 512, "-o"]


def test_jobs_one_after_another_and_at_once_and_killed_give_the_rows_of_one_build(zygote, command, tmp_path):
    plain, one_by_one, together = (tmp_path / name for name in ("plain", "one-by-one", "together"))
    assert zygote.run(*command, plain).code == 0
    for part in (3, 1, 2):
        done = zygote.run(*command, one_by_one, "--shard", f"{part}/3", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["computed"] > 0
        store = Store.open(one_by_one)
        assert store.complete("sentence") == (part == 2)
    said = zygote.run("info", one_by_one, "--json")
    assert json.loads(said.out)["levels"]["sentence"]["examples"] == EXAMPLES

    jobs = [zygote.start(*command, together, "--shard", f"{part}/3", "--shard-seconds", 0.05) for part in (1, 2, 3)]
    deadline = time.monotonic() + 100
    while not shards(together):
        assert time.monotonic() < deadline, [job.err for job in jobs]
        time.sleep(0.01)
    jobs[1].signal(signal.SIGKILL)
    kept = shards(together)
    assert jobs[1].wait().code == -signal.SIGKILL
    again = zygote.run(*command, together, "--shard", "2/3", "--shard-seconds", 0.05)
    assert again.code == 0, again.err
    for job in (jobs[0], jobs[2]):
        assert job.wait().code == 0, job.err
    assert kept.items() <= shards(together).items()
    for index in (one_by_one, together):
        assert Store.open(index).complete("sentence") and len(rows_of(index)) == EXAMPLES
        assert largest_difference(index, plain) < 1e-2  # a number on the edge of a step may fall either way
        assert check(index) == []
        assert not list(index.glob(".job-*"))


def test_a_job_twice_jobs_of_another_number_and_other_options_are_refused_in_one_sentence(zygote, command, tmp_path):
    index = tmp_path / "index"
    assert zygote.run(*command, index, "--shard", "1/2").code == 0
    with Store.open(index).join(0, 2):
        assert_refused(zygote.run(*command, index, "--shard", "1/2"), "Job 1 of 2", "is at work already")
        assert_refused(zygote.run(*command, index, "--shard", "2/3"), "is being built by jobs of 2, not of 3")
        assert_refused(zygote.run(*command, index), "is being written to by job 1 of 2")
        with pytest.raises(StoreError, match="at work already"):
            Store.open(index).join(0, 2).__enter__()
        halfway = zygote.run(*command, index, "--shard", "2/2")
        said = " ".join(halfway.out.split())  # a long path moves the ends of the lines
        assert halfway.code == 0 and "job 1 of 2" in said and "The last one to end lists" in said
        assert not Store.open(index).complete("sentence")
        busy = zygote.run("check", index)
        assert busy.code == 0, busy.out + busy.err
    assert zygote.run(*command, index, "--shard", "2/2").code == 0
    assert Store.open(index).complete("sentence") and len(rows_of(index)) == EXAMPLES
    assert_refused(zygote.run(*command, index, "--shard", "2/2", "--normalize", "layer"), "was built differently")
    assert_refused(zygote.run(*command, index, "--shard", "3/2"), "--shard 3/2 is no part of a whole", code=2)
    assert_refused(zygote.run(*command, index, "--shard", "1/2", "--overwrite"), "--overwrite would delete", code=2)


def assert_refused(ended, *texts, code=1):
    said = " ".join(ended.err.split())
    assert ended.code == code and all(text in said for text in texts) and "Traceback" not in said, ended.err


def test_jobs_share_the_lock_and_number_their_shards_apart(tmp_path):
    path = tmp_path / "index"
    Store.create(path, config={}, layers=[{"name": "a", "size": 4}], versions={}, planned={"sentence": (4, 2)})
    with ExitStack() as at_work:
        numbers = []
        for part in range(3):
            store = Store.open(path)
            at_work.enter_context(store.join(part, 3))
            numbers.append(store.rows("sentence").next_number(*store.part))
        assert numbers == [0, 1, 2]
        with pytest.raises(IndexBusy, match="job 1, job 2, job 3 of 3"):
            Store.open(path).lock().__enter__()
    with Store.open(path).lock():
        with pytest.raises(IndexBusy):
            Store.open(path).join(0, 3).__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_without_locks_is_refused_to_writers_in_one_sentence_and_read_all_the_same(
    tmp_path, monkeypatch, number
):
    path = tmp_path / "index"
    Store.create(path, config={}, layers=[{"name": "a", "size": 4}], versions={}, planned={"sentence": (4, 2)})

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("rapidindex.store.folder.fcntl.flock", refuse)
    for write in (Store.open(path).lock(), Store.open(path).join(0, 2)):
        with pytest.raises(StoreError, match="cannot be locked") as refused:
            write.__enter__()
        assert "copy the index: queries need no lock" in refused.value.hint
    assert len(Store.open(path).rows("sentence")) == 0


def test_one_job_of_one_is_a_build(zygote, command, tmp_path):
    done = zygote.run(*command, tmp_path / "index", "--shard", "1/1")
    assert done.code == 0, done.err
    assert Store.open(tmp_path / "index").complete("sentence")
