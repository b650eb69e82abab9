import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rapidindex.errors import DamagedIndex, IndexBusy, NotAnIndex, StoreError
from rapidindex.store import Store, check, container, folder, manifest
from tests.store.content import CONFIG, content, create, make, reseal, row_of, write

SHARD = "sentence/shard-00001.h5"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def index(path):
    """A complete index of the examples a to f in three shards."""
    return make(path, "ab", "cd", "ef")


def problems(path, **options):
    return [(problem.where, problem.what) for problem in check(path, **options)]


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def damage(path, kind):
    """Spoil the second of three shards."""
    file = path / SHARD
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "truncated":
        os.truncate(file, 5000)
    elif kind == "flipped":
        flip(file)
    elif kind == "flipped seal":
        flip(file, 100)
    elif kind == "newer digit":
        file.write_bytes(file.read_bytes().replace(b"shard/1", b"shard/9", 1))
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif kind == "nan":
        reseal(file, scale=np.full(2, np.nan, "<f4"))
    elif kind == "another index's":
        make(path.parent / "other", "xy", "cd")
        shutil.copy(path.parent / "other" / SHARD, file)


MESSAGES = {
    "missing": "is missing",
    "empty": "first 2048 bytes",
    "truncated": "should have",
    "flipped": "contents were changed",
    "flipped seal": "were changed",
    "newer digit": "were changed",
    "a folder": "not an ordinary file",
    "nan": "scales are not all finite",
    "another index's": "another index",
}


def test_a_complete_index_has_no_problems(index, path):
    index.remove(["a"])
    assert check(path) == [] and check(path, repair=True) == [] and check(str(path)) == []


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_spoilt_shard_is_named_and_the_repair_proposed(index, path, kind):
    damage(path, kind)
    (first, *rest) = check(path)
    assert first.where == SHARD and MESSAGES[kind] in first.what
    assert first.mend == f"type `rapidindex check {path} --repair`"
    assert [(problem.where, problem.what) for problem in rest] == [("sentence", "is incomplete: 4 of 6 examples")]


@pytest.mark.parametrize("kind", MESSAGES)
def test_repairing_loses_nothing_but_the_spoilt_shard_and_a_build_goes_on(index, path, kind):
    damage(path, kind)
    spoilt = (path / SHARD).read_bytes() if (path / SHARD).is_file() else None
    assert "rapidindex build" in check(path, repair=True)[0].mend
    assert problems(path) == [("sentence", "is incomplete: 4 of 6 examples")]
    store = Store.open(path)
    rows = store.rows("sentence")
    assert rows.done_ids == set("abef")
    assert np.array_equal(rows.take(range(4)), [row_of(id) for id in "abef"])
    aside = path / "damaged/sentence-shard-00001.h5"
    assert spoilt is None or aside.read_bytes() == spoilt
    write(store, ["c", "d"])
    assert check(path) == [] and store.complete("sentence")


def test_every_changed_byte_of_an_index_is_found(index, path):
    index.remove(["a"])
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.name != ".lock"):
        size = file.stat().st_size
        for place in np.random.default_rng(size).choice(size, 6, replace=False):
            flip(file, place)
            assert file.relative_to(path).as_posix() in [where for where, _ in problems(path)], (file, place)
            flip(file, place)
    assert check(path) == []


def test_a_shard_spoilt_twice_leaves_both_aside(index, path):
    for _ in range(2):
        flip(path / SHARD)
        check(path, repair=True)
        with Store.open(path).lock() as store:
            store.record_shard("sentence", store.rows("sentence").write_shard(1, content(["c", "d"])))
    assert sorted(os.listdir(path / "damaged")) == ["sentence-shard-00001.h5", "sentence-shard-00001.h5.1"]
    assert check(path) == []
    Store.destroy(path)


@pytest.mark.parametrize("kind", ["missing", "flipped", "empty", "not JSON"])
def test_the_manifest_is_rebuilt_from_the_shards(index, path, kind):
    index.update_config({"data": ["more.jsonl"]})
    write(index, ["g"], rejected=["h"])
    index.set_planned("sentence", 8)
    write(index, ["i"])
    file = path / "manifest.json"
    before = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes({"flipped": before.replace(b"20", b"21", 1), "empty": b"", "not JSON": b"\0" * 99}[kind])
    (problem,) = check(path)
    assert problem.where == "manifest.json" and "--repair" in problem.mend
    with pytest.raises(DamagedIndex):
        Store.open(path)
    assert "rapidindex build" in check(path, repair=True)[0].mend
    assert file.read_bytes() == before
    assert check(path) == []


def test_a_manifest_lost_together_with_shards_is_rebuilt_from_the_others(index, path):
    (path / "manifest.json").unlink()
    flip(path / SHARD)
    flip(path / "sentence/shard-00000.h5")
    check(path, repair=True)
    store = Store.open(path)
    assert store.config == CONFIG and store.rows("sentence").ids == ["e", "f"]
    assert store.second_moment().tolist() == list(range(8))
    assert problems(path) == [("sentence", "is incomplete: 2 of 6 examples")]


def test_without_any_intact_file_the_options_are_lost_and_starting_again_is_proposed(path):
    create(path)
    (path / "manifest.json").write_text("")
    for repair in (False, True):
        (problem,) = check(path, repair=repair)
        assert problem.where == "manifest.json" and "--overwrite" in problem.mend
    Store.destroy(path)


def test_a_newer_format_is_left_alone(index, path):
    (path / "manifest.json").write_text('{"format": 3, "sha256": ""}')
    for repair in (False, True):
        (problem,) = check(path, repair=repair)
        assert "format 3" in problem.what and "upgrade" in problem.mend
    assert (path / "manifest.json").read_text() == '{"format": 3, "sha256": ""}'


def test_a_finished_shard_that_is_not_listed_is_listed(index, path):
    index.rows("sentence").write_shard(3, content(["g"]))
    assert problems(path) == [("sentence/shard-00003.h5", "is finished, but the manifest does not list it")]
    check(path, repair=True)
    assert Store.open(path).rows("sentence").ids == list("abcdefg")


def test_an_intact_shard_in_the_place_of_another_is_kept(index, path):
    rows = index.rows("sentence")
    (path / SHARD).unlink()
    rows.write_shard(1, content(["c", "d", "g"]))
    with pytest.raises(DamagedIndex):
        Store.open(path)
    assert problems(path, repair=True) == [(SHARD, "is not the file that the manifest lists")]
    assert Store.open(path).rows("sentence").ids == list("abcdgef")


def test_an_example_in_two_shards_is_found_and_the_listed_shard_kept(index, path):
    index.rows("sentence").write_shard(7, content(["g", "c"]))
    assert problems(path) == [("sentence/shard-00007.h5", "holds example c, which is in shard-00001.h5 too")]
    check(path, repair=True)
    assert Store.open(path).rows("sentence").ids == list("abcdef")
    assert (path / "damaged/sentence-shard-00007.h5").exists()


def test_unfinished_files_are_found_and_deleted(index, path):
    part = path / "sentence/shard-00003.h5.0123abcd.part"
    part.write_text("unfinished")
    assert problems(path) == [("sentence/shard-00003.h5.0123abcd.part", "was left by a killed build")]
    check(path, repair=True)
    assert not part.exists() and check(path) == []


def test_unfinished_work_of_a_running_build_is_no_problem(path):
    store = create(path)
    with store.lock():
        store.rows("sentence").write_shard(0, content(["a"]))
        (path / "sentence/shard-00001.h5.0123abcd.part").write_text("unfinished")
        assert check(path) == []
        with pytest.raises(IndexBusy):
            check(path, repair=True)


def test_a_damaged_second_moment_is_moved_aside(index, path):
    flip(path / "second_moment.h5")
    assert problems(path) == [("second_moment.h5", "is damaged: its contents were changed after it was written")]
    check(path, repair=True)
    store = Store.open(path)
    assert store.second_moment() is None and store.rows("sentence").ids == list("abcdef")
    store.write_second_moment(np.arange(8, dtype=np.float32))
    assert check(path) == []


def test_a_missing_second_moment_is_found(index, path):
    (path / "second_moment.h5").unlink()
    assert problems(path) == [("second_moment.h5", "is missing")]


def test_a_lost_second_moment_is_remembered_until_it_is_made_again(index, path):
    index.update_config({"gradient": {"second_moment": "estimate"}})
    assert not index.lost_second_moment
    flip(path / "second_moment.h5")
    assert "rapidindex build" in check(path, repair=True)[0].mend
    (problem,) = check(path)
    assert problem.where == "second_moment.h5" and "is missing" in problem.what and "rapidindex build" in problem.mend
    assert check(path, repair=True) == [problem]
    store = Store.open(path)
    assert store.lost_second_moment
    with pytest.raises(StoreError, match=r"second_moment\.h5 is missing") as caught:
        store.refuse_lost_moment()
    assert "rapidindex build" in caught.value.hint
    store.write_second_moment(np.arange(8, dtype=np.float32))
    assert not store.lost_second_moment and check(path) == []
    store.refuse_lost_moment()


def lose_moment(index, path):
    """Flip a byte of the second moment and repair: it is moved aside."""
    index.update_config({"gradient": {"second_moment": "estimate"}})
    flip(path / "second_moment.h5")
    check(path, repair=True)
    return Store.open(path)


def test_rows_know_the_second_moment_that_they_were_made_with(index, path):
    store, moment = lose_moment(index, path), np.arange(8, dtype=np.float32)
    for other in (moment[::-1].copy(), moment * np.float32(1.1), np.zeros(8, np.float32)):
        with pytest.raises(StoreError, match="not the one that the rows of") as caught:
            store.write_second_moment(other)
        assert "--overwrite" in caught.value.hint and not (path / "second_moment.h5").exists()
    store.write_second_moment(moment * np.float32(1.001))  # made again, it differs by rounding
    assert check(path) == [] and Store.open(path).second_moment()[7] == pytest.approx(7.007)


@pytest.mark.parametrize("way", ["listed", "unlisted", "the manifest is lost"])
def test_an_exchanged_second_moment_is_found(path, way):
    make(path, "abc", "def")
    reseal(path / "second_moment.h5", v=np.ones(8, np.float32))
    content = folder.read_json(path / "manifest.json")
    entry = manifest.moment_entry(container.read_layout(path / "second_moment.h5"))
    content["second_moment"] = entry if way == "listed" else None
    folder.write_json(path / "manifest.json", content)
    if way == "the manifest is lost":
        (path / "manifest.json").unlink()
    else:
        store = Store.open(path)
        with pytest.raises(DamagedIndex, match="not the second moment that") if way == "listed" else store.lock():
            assert store.second_moment() is None  # it is not adopted
    problems = check(path, repair=True)
    assert "not the second moment that the rows were made with" in [p.what for p in problems if "moment" in p.where][0]
    assert Store.open(path).second_moment() is None and (path / "damaged/second_moment.h5").exists()


def test_an_index_of_an_earlier_version_takes_the_second_moment_that_is_made_again(index, path):
    store = lose_moment(index, path)
    content = folder.read_json(path / "manifest.json")
    del content["moment_means"]
    folder.write_json(path / "manifest.json", content)
    store = Store.open(path)
    store.write_second_moment(np.ones(8, np.float32))
    assert check(path) == [] and Store.open(path).manifest["moment_means"] == {"v": [1] * 8}


@pytest.mark.parametrize("wanted", ["none", "estimate"])
def test_a_second_moment_that_is_not_there_yet_is_not_lost(path, wanted):
    store = create(path, sentence=0)
    store.update_config({"gradient": {"second_moment": wanted}})
    write(store, [], rejected=["z"])
    assert not store.lost_second_moment and check(path) == []
    write(store, ["a"])
    assert store.lost_second_moment == (wanted == "estimate")


def test_removed_ids_outlive_damage_to_their_file(index, path):
    index.remove(list("abd"))
    file = path / "removed.json"
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"\xff"'))
    ((where, what),) = problems(path)
    assert where == "removed.json" and "2 ids in it can be read" in what
    assert "rapidindex remove" in check(path, repair=True)[0].mend
    assert Store.open(path).removed == {"a", "d"}


def test_removed_ids_that_are_not_stored_are_named_and_kept(index, path):
    index.remove(["c", "a"])
    flip(path / SHARD)
    check(path, repair=True)
    assert ("removed.json", "names 1 ids that are not stored: c") in problems(path)
    store = Store.open(path)
    write(store, ["c", "d"])
    assert store.rows("sentence").live_mask.tolist() == [False, True, True, True, False, True]


def test_a_level_that_the_manifest_does_not_know_is_found(index, path, tmp_path):
    (path / "token").mkdir()
    shutil.copy(path / SHARD, path / "token")
    assert problems(path) == [
        ("token/shard-00001.h5", "is of a level that the manifest does not know: token"),
    ]


def test_where_there_is_no_index_there_is_nothing_to_check(path):
    with pytest.raises(NotAnIndex):
        check(path)
    path.mkdir()
    (path / "notes.txt").write_text("")
    with pytest.raises(NotAnIndex):
        check(path, repair=True)


def test_checking_writes_nothing(index, path):
    flip(path / SHARD)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    check(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_no_damage_to_the_hdf5_part_stops_or_crashes_a_reader(index, path):
    """libhdf5 hangs or crashes on some of these; the process here is a child, so that a crash would be seen."""
    code = f"""
import numpy as np, pathlib
from rapidindex.errors import StoreError
from rapidindex.store import Store, check, container, folder, manifest
path = pathlib.Path({str(path)!r})
file = path / {SHARD!r}
good = file.read_bytes()
for place in np.random.default_rng(0).choice(len(good), 200, replace=False):
    file.write_bytes(good[:place] + bytes([good[place] ^ 0x80]) + good[place + 1:])
    assert check(path)
    try:
        rows = Store.open(path).rows("sentence")
        rows.take(range(6)), rows.norms([3]), rows.record(3)
    except StoreError:
        pass
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
