"""Indexes of every format version, committed once, are read for ever."""

import shutil

import h5py
import numpy as np
import pytest

from rapidindex.store import Store, check
from tests.store import golden_index as golden

FORMATS = ["format-1", "format-2"]
IDS = {"format-1": "d5dcedbef1d489d6", "format-2": "7be5193d8cccade0"}


@pytest.fixture(params=FORMATS)
def path(request):
    return golden.GOLDEN / request.param


def version_of(path):
    return int(path.name.removeprefix("format-"))


def written(path):
    return [golden.row(number, version_of(path)) for number in range(5)]


def test_every_committed_format_is_tested():
    assert sorted(entry.name for entry in golden.GOLDEN.iterdir() if entry.is_dir()) == FORMATS


def test_the_golden_index_is_intact(path):
    assert check(path) == []


def test_the_golden_index_says_what_it_was_made_from(path):
    store = Store.open(path)
    assert store.id == IDS[path.name]
    assert store.rows("sentence").row_type == {"format-1": "float16", "format-2": "int8"}[path.name]
    assert (store.config, store.layers, store.skipped) == (golden.CONFIG, golden.LAYERS, golden.SKIPPED)
    assert store.manifest["versions"] == golden.VERSIONS
    assert store.removed == {golden.REMOVED}
    assert {level: (store.rows(level).K, store.planned(level)) for level in store.levels} == golden.PLANNED
    assert store.complete("sentence") and store.complete("token")
    assert np.array_equal(store.second_moment(), golden.MOMENT)


def test_the_golden_sentence_rows_are_what_was_written(path):
    rows = Store.open(path).rows("sentence")
    assert rows.ids == golden.IDS and rows.rejected == golden.REJECTED
    assert [rows.record(number) for number in range(5)] == [golden.record(number) for number in range(5)]
    assert np.array_equal(rows.take(range(5)), written(path))
    assert np.array_equal(rows.norms(range(5)), np.array([golden.norms(number) for number in range(5)], np.float32))
    assert rows.live_mask.tolist() == [True, True, True, False, True]
    assert [count for _, _, count in rows.shards] == [3, 2, 0]


def test_the_golden_token_rows_are_what_was_written(path):
    rows = Store.open(path).rows("token")
    assert rows.ids == [golden.IDS[0], golden.IDS[4]] and rows.example.tolist() == [0, 0, 0, 1, 1]
    assert rows.position.tolist() == [0, 1, 2, 0, 1] and rows.token.tolist() == [1000, 1001, 1002, 1000, 1001]
    assert np.array_equal(rows.take(range(5)), written(path))


def test_any_hdf5_tool_reads_the_golden_rows(path):
    with h5py.File(path / "sentence/shard-00000.h5", "r") as file:
        rows = file["rows"][:].astype(np.float32) * file["scale"][:][:, None]
        assert dict(file.attrs) == {
            "format": f"rapidindex.rows/{version_of(path)}",
            "level": "sentence",
            "K": 16,
            "index": IDS[path.name],
        }
    assert np.array_equal(rows, written(path)[:3])


def test_a_golden_index_can_be_written_on(path, tmp_path):
    shutil.copytree(path, tmp_path / "index")
    store = Store.open(tmp_path / "index")
    assert store.restore([golden.REMOVED]) == 1
    store.set_planned("sentence", 7)
    assert check(tmp_path / "index")[0].what == "is incomplete: 6 of 7 examples"
    with store.lock():
        rows = store.rows("sentence")
        more = golden.shard([1], [1], [-1], [])
        more.examples[0]["id"] = "000000000000000f"
        store.record_shard("sentence", rows.write_shard(rows.next_number(), more))
    grown = Store.open(tmp_path / "index").rows("sentence")
    assert grown.row_type == Store.open(path).rows("sentence").row_type  # an old index goes on as it began
    assert np.array_equal(grown.take([1, 5]), [golden.row(1, version_of(path)), golden.row(1)])


def test_what_is_written_today_has_the_golden_layout(tmp_path):
    path = golden.GOLDEN / FORMATS[-1]
    golden.write(tmp_path / "index")
    names = {file.relative_to(tmp_path / "index") for file in (tmp_path / "index").rglob("*") if file.is_file()}
    assert names == {file.relative_to(path) for file in path.rglob("*") if file.is_file()}
    old, new = Store.open(path).rows("token"), Store.open(tmp_path / "index").rows("token")
    assert old.record(1) == new.record(1) and np.array_equal(old.take([3]), new.take([3]))
