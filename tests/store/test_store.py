import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidindex.errors import ConfigMismatch, DamagedIndex, IndexBusy, NewerFormat, NotAnIndex, StoreError
from rapidindex.store import Store, container, folder
from tests.store.content import CONFIG, K, content, create, make, row_of, write


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


def files(path):
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())


# Making and opening


def test_a_new_index_opens_as_it_was_made(path):
    made, opened = create(path), Store.open(str(path))
    assert opened.manifest == made.manifest
    assert opened.config == CONFIG and len(opened.id) == 16
    assert [layer["name"] for layer in opened.layers] == ["a", "b"]
    assert opened.skipped == [{"line": 3, "reason": "The response is empty."}]
    assert opened.levels == ["sentence"] and opened.planned("sentence") == 6
    assert len(opened.rows("sentence")) == 0 and not opened.complete("sentence")
    assert opened.second_moment() is None and opened.removed == frozenset()


def test_values_read_back_as_json_from_the_start(path):
    store = Store.create(path, config={"betas": (1, 2), 3: None}, layers=[], versions={}, planned={})
    assert store.config == Store.open(path).config == {"betas": [1, 2], "3": None}


def test_an_empty_folder_becomes_an_index(path):
    path.mkdir()
    create(path)
    assert Store.open(path).levels == ["sentence"]


def test_what_a_killed_creation_left_is_taken_over(path):
    path.mkdir()
    (path / ".lock").touch()
    (path / "manifest.json.0123abcd.part").write_text("{")
    create(path)
    assert Store.open(path).levels == ["sentence"]


def test_an_index_is_not_created_twice(path):
    make(path, "abc")
    with pytest.raises(StoreError, match="There is an index") as caught:
        create(path)
    assert "--overwrite" in caught.value.hint
    assert Store.open(path).rows("sentence").ids == ["a", "b", "c"]


def test_a_folder_with_other_files_is_refused_and_left_alone(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="thesis.txt"):
        create(path)
    with pytest.raises(NotAnIndex):
        Store.destroy(path)
    assert files(path) == ["thesis.txt"]


@pytest.mark.parametrize("below", [False, True])
def test_a_file_is_no_place_for_an_index(path, below):
    path.write_text("a file")
    with pytest.raises(StoreError):
        create(path / "index" if below else path)


def test_a_manifest_of_another_program_is_no_index(path):
    path.mkdir()
    (path / "manifest.json").write_text('{"name": "a browser extension", "version": "1"}')
    with pytest.raises(StoreError, match="other files"):
        create(path)
    with pytest.raises(NotAnIndex):
        Store.destroy(path)
    assert files(path) == ["manifest.json"]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_where_there_is_no_index_the_command_that_makes_one_is_named(path, kind):
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("a file")
    with pytest.raises(NotAnIndex) as caught:
        Store.open(path)
    assert "rapidindex build" in caught.value.hint


def test_an_index_is_destroyed_without_a_trace(path):
    store = make(path, "abc", "def")
    store.remove(["a"])
    (path / "sentence" / "ann.json").write_text("{}")
    (path / "sentence" / "shard-00007.h5.0123abcd.part").write_text("unfinished")
    Store.destroy(path)
    assert not path.exists()


def test_what_nfs_and_fuse_keep_of_open_files_stops_neither_deletion_nor_a_new_index(path):
    make(path, "abc")
    kept = [path / ".fuse_hidden0000000300000001", path / "sentence" / ".nfs00000000012c4f7b00000001"]
    for file in kept:
        file.write_text("open")
    Store.destroy(path)
    assert files(path) == sorted(str(file.relative_to(path)) for file in kept) and not Store.exists(path)
    make(path, "def")
    assert Store.open(path).rows("sentence").ids == ["d", "e", "f"]
    Store.destroy(path)
    for file in kept:
        file.unlink()


def test_an_index_whose_files_are_open_is_destroyed_and_made_anew_on_fuse(path):
    path.mkdir()
    mounted = path.parent / "mounted"
    mounted.mkdir()
    if not shutil.which("bindfs") or subprocess.run(["bindfs", path, mounted], capture_output=True).returncode:
        pytest.skip("bindfs cannot be mounted here")
    try:
        store = make(mounted / "index", "abc")
        rows = store.rows("sentence")
        assert len(rows.take([0])) == 1  # maps the shard
        Store.destroy(mounted / "index")
        assert not Store.exists(mounted / "index")
        again = make(mounted / "index", "def")
        assert again.rows("sentence").ids == ["d", "e", "f"]
        del store, rows, again
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def test_an_index_behind_a_link_is_emptied_and_made_anew(path, tmp_path):
    (tmp_path / "large disk").mkdir()
    path.symlink_to(tmp_path / "large disk")
    make(path, "abc")
    Store.destroy(path)
    assert path.is_symlink() and files(path) == []
    assert make(path, "de").rows("sentence").ids == ["d", "e"]


def test_a_damaged_index_can_be_destroyed(path):
    make(path, "abc")
    (path / "manifest.json").write_text("")
    Store.destroy(path)
    assert not path.exists()


@pytest.mark.parametrize("foreign", ["notes.txt", "sentence/notes.txt", "sentence/more/shard-00000.h5", "token/x"])
def test_nothing_is_destroyed_beside_foreign_files(path, foreign):
    make(path, "abc")
    (path / foreign).parent.mkdir(exist_ok=True)
    (path / foreign).write_text("precious")
    before = files(path)
    with pytest.raises(StoreError, match=Path(foreign).name if "more" not in foreign else "more"):
        Store.destroy(path)
    assert files(path) == before


def test_links_are_not_followed_when_an_index_is_destroyed(path, tmp_path):
    make(path, "abc")
    other = tmp_path / "other"
    other.mkdir()
    (other / "shard-00000.h5").write_text("precious")
    (path / "token").symlink_to(other)
    with pytest.raises(StoreError, match="token"):
        Store.destroy(path)
    assert files(other) == ["shard-00000.h5"] and (path / "manifest.json").exists()


def test_a_manifest_of_a_newer_format_asks_for_an_upgrade(path):
    make(path, "abc")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 3, "novelty": True}))
    with pytest.raises(NewerFormat, match="format 3") as caught:
        Store.open(path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("name", ["manifest.json", "removed.json"])
def test_a_change_to_any_byte_of_a_json_file_is_found(path, name):
    make(path, "abc").remove(["b"])
    good = (path / name).read_bytes()
    for place in range(len(good)):
        (path / name).write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        with pytest.raises(DamagedIndex, match=name) as caught:
            Store.open(path)
        assert "rapidindex check" in caught.value.hint
    (path / name).write_bytes(good)
    Store.open(path)


def test_a_missing_shard_is_named(path):
    make(path, "abc", "def")
    (path / "sentence/shard-00001.h5").unlink()
    with pytest.raises(DamagedIndex, match="shard-00001.h5 is missing") as caught:
        Store.open(path)
    assert caught.value.hint == f"Type `rapidindex check {path}`."


@pytest.mark.parametrize("name", ["sentence/shard-00000.h5", "second_moment.h5"])
def test_a_file_of_the_wrong_size_is_named(path, name):
    make(path, "abc")
    os.truncate(path / name, 100)
    with pytest.raises(DamagedIndex, match=name):
        Store.open(path)


def test_a_missing_manifest_is_damage_and_not_an_empty_folder(path):
    make(path, "abc")
    (path / "manifest.json").unlink()
    with pytest.raises(DamagedIndex) as caught:
        Store.open(path)
    assert "check" in caught.value.hint
    with pytest.raises(StoreError):
        create(path)


def test_the_shard_of_another_index_is_refused(path, tmp_path):
    make(path, "abc")
    make(tmp_path / "other", "xyz")
    shutil.copy(tmp_path / "other/sentence/shard-00000.h5", path / "sentence")
    with pytest.raises(DamagedIndex, match="belongs to another index"):
        Store.open(path).rows("sentence")


def test_a_shard_replaced_by_another_of_the_same_index_is_refused(path):
    make(path, "abc", "def")
    shutil.copy(path / "sentence/shard-00000.h5", path / "sentence/shard-00001.h5")
    with pytest.raises(DamagedIndex, match="shard-00001.h5 is damaged: it is not the one that the manifest lists"):
        Store.open(path).rows("sentence")


def test_an_index_exists_once_it_was_made_and_until_it_is_destroyed(path):
    assert not Store.exists(path)
    path.mkdir()
    assert not Store.exists(path)
    create(path)
    assert Store.exists(path) and Store.exists(str(path))
    Store.destroy(path)
    assert not Store.exists(path)


# Rows


def test_rows_come_back_with_their_examples(path):
    make(path, "abc", "", "de")
    rows = Store.open(path).rows("sentence")
    assert (len(rows), rows.K, rows.layers, rows.level, rows.path) == (5, K, 2, "sentence", path / "sentence")
    assert rows.ids == list("abcde")
    assert rows.example.tolist() == [0, 1, 2, 3, 4] and rows.example.dtype == np.int64
    assert rows.position.tolist() == rows.token.tolist() == [-1] * 5
    assert rows.live_mask.all() and rows.live_mask.dtype == bool
    taken = rows.take([4, 0, 3, 3])
    assert taken.dtype == np.float32
    assert np.array_equal(taken, [row_of(id) for id in "eadd"])
    entries, scale = rows.gather([4, 0, 3, 3])
    assert entries.dtype == rows.row_type and np.array_equal(entries * scale[:, None], taken)
    assert rows.norms([4, 1]).tolist() == [[2, 1], [2, 1]]
    assert rows.record(3) == content(["d"]).examples[0]
    assert [name for name, _, _ in rows.shards] == ["shard-00000.h5", "shard-00001.h5", "shard-00002.h5"]
    assert [count for _, _, count in rows.shards] == [3, 0, 2]


def test_examples_are_found_by_a_text_that_they_hold(path):
    rows = make(path, "abc", "", "dé").rows("sentence")
    assert [rows.record(number)["id"] for number in range(5)] == list("abcdé")
    for texts in (["What"], ["is d?"], ["What is é?"], ["né \ud83d"], ["c", "is a"], ["nothing of this"], []):
        values = [map(str, rows.record(number).values()) for number in range(5)]
        expected = {
            number for number, row in enumerate(values) if any(text in value for value in row for text in texts)
        }
        assert rows.holding(texts) == expected, texts


def test_token_rows_know_their_position_and_token(path):
    store = create(path, token=2)
    write(store, ["a", "b"], level="token", tokens=3)
    rows = store.rows("token")
    assert rows.ids == ["a", "b"] and [rows.example_of(row) for row in range(6)] == [0, 0, 0, 1, 1, 1]
    assert rows.position.tolist() == [0, 1, 2] * 2 and rows.token.tolist() == [100, 101, 102] * 2
    assert np.array_equal(rows.take([5])[0], row_of("b", 2))
    assert store.complete("token") and not store.complete("sentence")


def test_blocks_cover_all_rows_without_copying(path):
    make(path, "abcde", "", "fg")
    blocks = list(Store.open(path).rows("sentence").blocks(max_rows=2))
    assert [(first, len(rows)) for first, rows, _ in blocks] == [(0, 2), (2, 2), (4, 1), (5, 2)]
    assert all(isinstance(rows, np.memmap) for _, rows, _ in blocks)
    assert all((rows.dtype, scale.dtype) == (np.int8, np.float32) for _, rows, scale in blocks)
    joined = np.concatenate([rows.astype(np.float32) * scale[:, None] for _, rows, scale in blocks])
    assert np.array_equal(joined, [row_of(id) for id in "abcdefg"])


def test_an_index_without_rows_has_no_blocks(path):
    rows = make(path, "").rows("sentence")
    assert list(rows.blocks()) == [] and rows.take([]).shape == (0, K) and rows.norms([]).shape == (0, 2)


@given(st.lists(st.integers(0, 4), max_size=6), st.data())
@settings(database=None, deadline=None, max_examples=20)
def test_any_selection_of_rows_is_that_of_one_long_array(sizes, data):
    with tempfile.TemporaryDirectory() as path:
        ids = [f"e{number}" for number in range(sum(sizes))]
        store, at = create(Path(path)), iter(ids)
        for size in sizes:
            write(store, [next(at) for _ in range(size)])
        rows = Store.open(path).rows("sentence")
        numbers = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=9)) if ids else []
        assert rows.ids == ids
        assert np.array_equal(rows.take(numbers), np.array([row_of(ids[number]) for number in numbers]).reshape(-1, K))
        assert [rows.record(number)["id"] for number in numbers] == [ids[number] for number in numbers]
        assert all(rows.record(rows.example_of(row))["id"] == ids[row] for row in range(len(ids)))


@pytest.mark.parametrize("number", [-1, 3])
def test_numbers_of_no_row_are_refused(path, number):
    rows = make(path, "abc").rows("sentence")
    for ask in (lambda: rows.take([0, number]), lambda: rows.norms([number]), lambda: rows.record(number)):
        with pytest.raises(IndexError):
            ask()


def test_rows_are_read_in_the_order_of_shard_numbers_however_they_were_finished(path):
    store = create(path)
    with store.lock():
        rows = store.rows("sentence")
        for number, ids in ((2, "e"), (0, "ab"), (1, "cd")):
            store.record_shard("sentence", rows.write_shard(number, content(list(ids))))
    assert store.rows("sentence").ids == Store.open(path).rows("sentence").ids == list("abcde")


def test_rows_stay_as_they_were_when_shards_are_added(path):
    store = make(path, "abc")
    before = store.rows("sentence")
    write(store, ["d"])
    assert (len(before), len(store.rows("sentence"))) == (3, 4)
    assert store.rows("sentence").shards[:1] == before.shards


def test_rows_are_read_once_for_each_state_of_the_index(path):
    store = make(path, "abc")
    rows = store.rows("sentence")
    with store.lock():
        assert store.rows("sentence") is rows
    changes = [
        lambda: write(store, ["d"]),
        lambda: store.remove(["b"]),
        lambda: store.restore(["b"]),
        lambda: store.update_config({"data": []}),
        lambda: store.set_planned("sentence", 9),
        lambda: write(Store.open(path), ["e"]) and store.refresh(),
    ]
    for change in changes:
        change()
        assert store.rows("sentence") is not rows
        rows = store.rows("sentence")
        assert store.rows("sentence") is rows
    assert rows.ids == list("abcde") and rows.live_mask.all()


def test_an_unknown_level_names_the_command_that_adds_it(path):
    with pytest.raises(StoreError, match="no token rows") as caught:
        make(path, "abc").rows("token")
    assert "--level token" in caught.value.hint


def test_a_changed_example_text_is_damage_and_not_a_traceback(path):
    store = make(path, "abc")
    file = path / "sentence/shard-00000.h5"
    file.write_bytes(file.read_bytes().replace(b'{"id":"b"', b'["id":"b"'))
    with pytest.raises(DamagedIndex, match="shard-00000.h5"):
        store.rows("sentence").record(1)


@pytest.mark.parametrize("array", ["scale", "norms", "example", "position", "token", "examples_offsets", "ids"])
def test_a_changed_bit_beside_the_rows_is_found_before_they_are_used(path, array):
    make(path, "abc")
    file = path / "sentence/shard-00000.h5"
    extent = container.read_layout(file).extents[array]
    good = file.read_bytes()
    for place in (extent.offset, extent.offset + extent.nbytes - 1):
        file.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
        with pytest.raises(DamagedIndex, match=r"shard-00000\.h5"):
            Store.open(path).rows("sentence")


def test_many_shards_do_not_use_up_the_file_descriptors(path):
    shards = 160
    store = create(path, sentence=shards)
    with store.lock():
        rows = store.rows("sentence")
        for number in range(shards):
            store.record_shard("sentence", rows.write_shard(number, content([f"e{number}"])))
    code = f"""
import resource, numpy as np
from rapidindex.store import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
rows = Store.open({str(path)!r}).rows("sentence")
assert rows.take(np.arange({shards})).any(axis=1).all()
assert sum(len(block) for _, block, _ in rows.blocks()) == {shards}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Building


def test_the_ids_of_stored_and_rejected_examples_are_done(path):
    store = create(path, sentence=4)
    write(store, ["a", "b"], rejected=["x"])
    rows = store.rows("sentence")
    assert rows.done_ids == {"a", "b", "x"} and rows.ids == ["a", "b"]
    assert rows.rejected == [{"id": "x", "line": 7, "reason": "The gradient is not finite."}]
    assert not store.complete("sentence")
    write(store, [], rejected=["y"])
    assert store.complete("sentence") and Store.open(path).complete("sentence")


def test_a_worker_writes_and_its_parent_records(path):
    store = create(path)
    with store.lock():
        code = f"""
from rapidindex.store import Store
from tests.store.content import content
print(Store.open({str(path)!r}).rows("sentence").write_shard(4, content(["a"])))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        store.record_shard("sentence", done.stdout.strip())
        assert store.rows("sentence").ids == ["a"] and store.rows("sentence").next_number() == 5
    assert Store.open(path).rows("sentence").ids == ["a"]


def test_recording_a_shard_twice_changes_nothing(path):
    store = make(path, "abc")
    before = (path / "manifest.json").read_bytes()
    store.record_shard("sentence", "shard-00000.h5")
    assert (path / "manifest.json").read_bytes() == before


def test_a_shard_with_a_stored_example_is_not_recorded(path):
    store = make(path, "abc")
    with store.lock():
        name = store.rows("sentence").write_shard(1, content(["d", "b"]))
        with pytest.raises(StoreError, match="holds example b, which is stored in shard-00000.h5"):
            store.record_shard("sentence", name)
    assert Store.open(path).rows("sentence").ids == list("abc")


def test_a_shard_number_is_not_used_twice(path):
    rows = make(path, "abc").rows("sentence")
    with pytest.raises(StoreError, match="never overwritten"):
        rows.write_shard(0, content(["d"]))
    assert rows.write_shard(rows.next_number(), content(["d"])) == "shard-00001.h5"
    assert rows.next_number() == 2


def test_finished_shards_that_are_not_listed_are_adopted_under_the_lock(path):
    store = create(path)
    store.rows("sentence").write_shard(3, content(["a", "b"]))
    opened = Store.open(path)
    assert opened.rows("sentence").ids == []
    with opened.lock():
        assert opened.rows("sentence").ids == ["a", "b"]
    assert Store.open(path).rows("sentence").ids == ["a", "b"]


@pytest.mark.parametrize("fault", ["flipped", "foreign", "duplicate"])
def test_a_shard_that_is_not_sound_is_left_alone_and_not_adopted(path, tmp_path, fault):
    store, file = make(path, "abc"), path / "sentence/shard-00001.h5"
    if fault == "foreign":
        make(tmp_path / "other", "de")
        shutil.copy(tmp_path / "other/sentence/shard-00000.h5", file)
    else:
        store.rows("sentence").write_shard(1, content(["c" if fault == "duplicate" else "d"]))
    if fault == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with store.lock():
        assert store.rows("sentence").ids == ["a", "b", "c"] and store.rows("sentence").next_number() == 2
    assert file.exists()


def test_unfinished_files_are_deleted_under_the_lock(path):
    store = make(path, "abc")
    left = [path / "sentence/shard-00001.h5.0123abcd.part", path / "manifest.json.0123abcd.part"]
    for part in left:
        part.write_text("unfinished")
    assert len(Store.open(path).rows("sentence")) == 3
    with store.lock():
        assert not any(part.exists() for part in left)


def test_a_second_moment_finished_before_a_kill_is_adopted(path):
    store = create(path)
    before = (path / "manifest.json").read_bytes()
    store.write_second_moment(np.arange(8, dtype=np.float32))
    (path / "manifest.json").write_bytes(before)
    opened = Store.open(path)
    assert opened.second_moment() is None
    with opened.lock():
        assert opened.second_moment().tolist() == list(range(8))


def test_the_second_moment_is_written_once_and_read_from_the_file(path):
    store = create(path)
    store.write_second_moment(np.arange(8, dtype=np.float32))
    v = Store.open(path).second_moment()
    assert isinstance(v, np.memmap) and v.dtype == np.float32
    assert v.tolist() == list(range(8))
    with pytest.raises(StoreError, match="never overwritten"):
        store.write_second_moment(np.ones(8, np.float32))


@pytest.mark.parametrize("v", [np.ones(7, np.float32), np.ones(8), np.full(8, np.nan, np.float32)])
def test_a_second_moment_that_does_not_fit_is_the_callers_error(path, v):
    with pytest.raises(ValueError, match="second moment"):
        create(path).write_second_moment(v)


def test_the_second_moment_of_another_index_is_refused(path, tmp_path):
    make(path, "abc")
    make(tmp_path / "other", "abc")
    shutil.copy(tmp_path / "other/second_moment.h5", path)
    with pytest.raises(DamagedIndex, match="belongs to another index"):
        Store.open(path).second_moment()


def test_an_index_grows(path):
    store = make(path, "abc", "def")
    assert store.complete("sentence")
    store.set_planned("sentence", 8)
    store.update_config({"data": ["train.jsonl", "more.jsonl"]}, skipped=[{"line": 1, "reason": "It is empty."}])
    assert not store.complete("sentence")
    write(store, ["g", "h"])
    opened = Store.open(path)
    assert opened.complete("sentence") and opened.planned("sentence") == 8
    assert opened.config == CONFIG | {"data": ["train.jsonl", "more.jsonl"]}
    assert opened.skipped == [{"line": 1, "reason": "It is empty."}]


def test_a_level_is_added(path):
    store = make(path, "abc")
    store.set_planned("token", 1, K=32)
    assert store.levels == ["sentence", "token"] and Store.open(path).rows("token").K == 32


def test_a_level_keeps_its_K(path):
    store = make(path, "abc")
    store.set_planned("sentence", 9, K=K)
    with pytest.raises(ConfigMismatch, match="K = 16, not 32"):
        store.set_planned("sentence", 9, K=32)
    with pytest.raises(StoreError, match="no token rows"):
        store.set_planned("token", 9)


def test_a_manifest_that_could_not_be_written_is_not_believed(path):
    store = make(path, "abc")
    before = store.config
    with pytest.raises(TypeError):
        store.update_config({"new": object()})
    assert store.config == before == Store.open(path).config


# Removing


def test_removed_examples_stay_stored_but_are_not_alive(path):
    store = make(path, "abc", "de")
    assert store.remove(["b", "d"]) == 2
    rows = Store.open(path).rows("sentence")
    assert rows.live_mask.tolist() == [True, False, True, False, True]
    assert len(rows) == 5 and "b" in rows.done_ids
    assert store.remove(["b"]) == 0


def test_removed_examples_can_be_put_back(path):
    store = make(path, "abc")
    store.remove(["a", "b"])
    assert store.restore(["a"]) == 1
    assert store.removed == Store.open(path).removed == {"b"}
    with pytest.raises(StoreError, match="not among the examples removed"):
        store.restore(["c"])


def test_unknown_ids_are_named_and_nothing_is_removed(path):
    store = make(path, "abc")
    with pytest.raises(StoreError, match="5 ids are not in .*: p, q, r and others"):
        store.remove(["a", *"tsrqp"])
    assert store.removed == frozenset() and store.rows("sentence").live_mask.all()


def test_removing_an_example_takes_it_out_of_every_level(path):
    store = create(path, token=2)
    write(store, ["a", "b"])
    write(store, ["a", "b"], level="token", tokens=2)
    store.remove(["a"])
    assert store.rows("token").live_mask.tolist() == [False, False, True, True]
    assert store.rows("sentence").live_mask.tolist() == [False, True]


# One writer


def test_a_second_writer_learns_which_process_is_writing(path):
    create(path)
    code = f"from rapidindex.store import Store\nwith Store.open({str(path)!r}).lock(): print(flush=True), input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(IndexBusy, match=f"process {holder.pid} on"), Store.open(path).lock():
            pass
        with pytest.raises(IndexBusy):
            Store.open(path).remove([])
        with pytest.raises(IndexBusy):
            Store.destroy(path)
        assert folder.writer(path).startswith(f"process {holder.pid}")
        assert len(Store.open(path).rows("sentence")) == 0
    finally:
        holder.kill()
        holder.communicate()
    assert folder.writer(path) is None
    with Store.open(path).lock():
        pass


def test_two_stores_in_one_process_do_not_write_together(path):
    store = create(path)
    with store.lock(), pytest.raises(IndexBusy, match=f"process {os.getpid()}"), Store.open(path).lock():
        pass
    with Store.open(path).lock():
        pass


def test_an_index_that_another_process_has_just_created_is_not_to_be_replaced(tmp_path):
    store = make(tmp_path / "index", "ab")
    with store.lock(), pytest.raises(IndexBusy, match=f"process {os.getpid()}"):
        make(tmp_path / "index", "ab")


def test_the_lock_may_be_nested_and_is_released_after_an_error(path):
    store = create(path)
    with pytest.raises(RuntimeError, match="oops"), store.lock(), store.lock():
        raise RuntimeError("oops")
    with Store.open(path).lock():
        pass


def test_the_lock_of_a_deleted_index_is_no_lock(path):
    store = create(path)
    held = os.open(path / ".lock", os.O_RDWR)
    shutil.rmtree(path)
    create(path)
    fcntl.flock(held, fcntl.LOCK_EX)
    with Store.open(path).lock():
        pass
    os.close(held)
    assert store.id != Store.open(path).id


def test_what_another_writer_did_is_seen_under_the_lock(path):
    first = create(path)
    write(Store.open(path), ["a"])
    assert len(first.rows("sentence")) == 0
    with first.lock():
        assert first.rows("sentence").ids == ["a"]


def test_the_store_needs_neither_torch_nor_faiss_nor_transformers():
    code = "import sys, rapidindex.store; print({'torch', 'faiss', 'transformers', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
