"""The store under kill -9, full disks and read-only folders: real processes, real limits, real file systems."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rapidindex.store import Store, check
from tests.store.content import create, make, row_of

PRELUDE = """
import json, os, resource, signal, sys
from pathlib import Path
import numpy as np
from rapidindex.errors import *
from rapidindex.store import Store, check
from tests.store.content import content, create, make, row_of, write
path = Path(sys.argv[1])

CHANGES = {"open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

def killed(work, changes):
    "Run `work` in a child that is killed after so many changes to the disk; whether it did not end before."
    child = os.fork()
    if not child:
        remaining = changes
        def count(event, arguments):
            nonlocal remaining
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES and not reads and path.name in str(arguments[0]):
                if not remaining:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining -= 1
        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

def build():
    "A build without end, which resumes where the last one was killed."
    store = Store.open(path)
    with store.lock():
        if store.second_moment() is None:
            store.write_second_moment(np.arange(8, dtype=np.float32))
        rows, done = store.rows("sentence"), store.rows("sentence").done_ids
        todo = (f"e{number}" for number in range(10**6) if f"e{number}" not in done)
        for number in range(rows.next_number(), 10**5):
            name = rows.write_shard(number, content([next(todo) for _ in range(3)]))
            store.record_shard("sentence", name)

def state():
    rows = Store.open(path).rows("sentence")
    return dict(zip(rows.ids, [row.tolist() for row in rows.take(range(len(rows)))]))
"""


def run(code, *arguments, mounting=""):
    """The output of Python code in a process of its own, in which `mounting` was done first, unseen by others."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    if mounting:
        command = ["unshare", "-m", "sh", "-c", f'{mounting} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def tmpfs(path):
    """`path` as the mount point of a small file system, and the command that mounts it."""
    path.mkdir()
    mounting = f"mount -t tmpfs -o size=256k tmpfs {path}"
    command = ["unshare", "-m", "sh", "-c", mounting]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    return mounting


def test_no_moment_of_killing_a_build_loses_a_finished_shard(path):
    create(path, sentence=10**6)
    code = """
kills, problems = 0, set()
for changes in range(8, 33):
    before = state()
    kills += killed(build, changes)
    problems |= {problem.what for problem in check(path) if problem.where != "sentence"}
    with Store.open(path).lock():
        after = state()
    assert before.items() <= after.items()
    assert len(after) == len(Store.open(path).rows("sentence"))
    assert [problem.where for problem in check(path)] == ["sentence"], check(path)
print(json.dumps([kills, sorted(problems), after]))
"""
    kills, problems, after = json.loads(run(code, path))
    assert kills == 25
    assert set(problems) <= {"was left by a killed build", "is finished, but the manifest does not list it"}
    assert len(after) >= 25 * 3 and set(after) == {f"e{number}" for number in range(len(after))}
    assert all(np.array_equal(row, row_of(id)) for id, row in after.items())


def test_no_moment_of_killing_creation_or_deletion_leaves_a_folder_that_stops_the_next_build(path):
    code = """
def life():
    "One index from creation to deletion."
    store = make(path, "a")
    store.remove("a")
    Store.destroy(path)
for changes in range(1000):
    if not killed(life, changes):
        break
    try:
        Store.destroy(path)  # --overwrite
    except NotAnIndex:
        pass
    write(create(path), ["a", "b"])
    assert list(state()) == ["a", "b"]
    Store.destroy(path)
    assert not path.exists()
print(changes)
"""
    assert 30 < int(run(code, path)) < 1000


def test_of_many_processes_that_create_an_index_at_once_one_does(path):
    code = """
def attempt():
    os.close(start)
    os.read(wait, 1)
    try:
        create(path)
    except StoreError:
        os._exit(3)
    os._exit(0)
for _ in range(10):
    children, (wait, start) = [], os.pipe()
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            attempt()
    os.close(wait), os.close(start)  # all begin
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 3, 3, 3], codes
    Store.destroy(path)
"""
    run(code, path)


def test_no_moment_of_killing_a_removal_loses_the_list(path):
    make(path, "abc", "def")
    code = """
def work():
    while True:
        store = Store.open(path)
        store.remove("abcde")
        store.restore("cde")
Store.open(path).remove("ab")
for changes in range(20):
    assert killed(work, changes)
    with Store.open(path).lock() as store:
        assert store.removed in ({*"ab"}, {*"abcde"}), store.removed
    assert check(path) == []
"""
    run(code, path)


def test_no_moment_of_killing_a_repair_makes_things_worse(path):
    make(path, "ab", "cd", "ef")
    code = """
good = (path / "sentence/shard-00001.h5").read_bytes()
for changes in range(20):
    (path / "sentence/shard-00001.h5").write_bytes(good[:-1] + b"?")
    (path / "manifest.json").unlink(missing_ok=True)
    killed(lambda: check(path, repair=True), changes)
    check(path, repair=True)
    assert list(state()) == ["a", "b", "e", "f"]
    assert [problem.where for problem in check(path)] == ["sentence"]
"""
    run(code, path)


def test_a_file_size_limit_stops_a_shard_and_leaves_the_others(path):
    make(path, "ab")
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
store = Store.open(path)
write(store, ["c"])
before = sorted(path.rglob("*"))
try:
    write(store, [f"e{number}" for number in range(300)])
except ResourceError as error:
    print(error)
assert sorted(path.rglob("*")) == before
assert list(state()) == ["a", "b", "c"]
"""
    message = run(code, path)
    assert "shard-00002.h5 cannot be written: files may not grow so large here" in message
    assert "It needs 5" in message and " free" in message and "finished work is kept" in message
    assert [problem.where for problem in check(path)] == ["sentence"]


def test_a_file_size_limit_stops_the_manifest_and_leaves_the_old_one(path):
    make(path, "ab")
    code = """
store = Store.open(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
for change in (lambda: store.update_config({"more": "x" * 2000}), lambda: store.set_planned("sentence", 9)):
    try:
        change()
        raise SystemExit("the limit did not hold")
    except ResourceError as error:
        assert "manifest.json cannot be written" in error.message
assert store.planned("sentence") == Store.open(path).planned("sentence") == 6
"""
    run(code, path)
    assert Store.open(path).rows("sentence").ids == ["a", "b"]


def test_a_full_disk_stops_a_build_which_goes_on_when_there_is_room(path, tmpfs):
    code = """
import subprocess
store = create(path, sentence=300)
def fill(first):
    for number in range(first, 100):
        write(store, [f"e{3 * number + part}" for part in range(3)])
try:
    fill(0)
except ResourceError as error:
    print(error)
finished = store.rows("sentence")
first = len(finished) // 3
assert 3 < first < 100 and finished.ids == [f"e{number}" for number in range(3 * first)]
assert {problem.where for problem in check(path)} <= {"sentence", f"sentence/shard-{first:05d}.h5"}, check(path)
assert not list(path.rglob("*.part"))
with Store.open(path).lock():
    pass  # although the disk is full
subprocess.run(["mount", "-o", "remount,size=4m", path], check=True)
store = Store.open(path)
with store.lock():
    first = len(store.rows("sentence")) // 3
    fill(first)
assert check(path) == [] and len(state()) == 300
"""
    message = run(code, path, mounting=tmpfs)
    assert "cannot be written: the disk is full. It needs " in message
    assert str(path) in message and " free" in message and "type the same command again" in message


def test_a_disk_that_is_full_from_the_start_is_named(path, tmpfs):
    code = """
(path / "filler").write_bytes(b"x" * (256 * 1024))
index = path / "index"
index.mkdir()
try:
    create(index)
except ResourceError as error:
    print(error)
assert [entry.name for entry in index.iterdir()] in ([], [".lock"])
(path / "filler").unlink()
create(index)
"""
    assert "manifest.json cannot be written: the disk is full" in run(code, path, mounting=tmpfs)


def test_a_read_only_index_can_be_read_but_not_written(path, tmpfs):
    code = """
import subprocess
make(path, "abc", "def").remove(["a"])
subprocess.run(["mount", "-o", "remount,ro", path], check=True)
assert list(state()) == list("abcdef") and check(path) == []
store = Store.open(path)
assert store.second_moment().tolist() == list(range(8)) and not store.rows("sentence").live_mask[0]
attempts = [
    lambda: store.rows("sentence").write_shard(2, content(["g"])),
    lambda: store.remove(["b"]),
    lambda: store.set_planned("sentence", 9),
    lambda: Store.destroy(path),
    lambda: check(path, repair=True),
    lambda: create(path / "sentence" / "new"),
]
for attempt in attempts:
    try:
        attempt()
        raise SystemExit("written to a read-only file system")
    except ResourceError:
        raise
    except StoreError as error:
        assert "is read-only for you" in error.message and error.hint, error
assert list(state()) == list("abcdef")
"""
    run(code, path, mounting=tmpfs)


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_not_a_crash(path):
    make(path, "abc", "def")
    code = """
store = Store.open(path)
rows = store.rows("sentence")
os.truncate(path / "sentence/shard-00001.h5", 100)
rows._arrays.cache_clear()
try:
    rows.take([4])
except DamagedIndex as error:
    print(error)
"""
    assert "shard-00001.h5 is damaged: it does not have" in run(code, path)
