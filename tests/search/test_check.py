"""Damage to what is derived from the rows is found, refused and repaired, at any byte."""

import json
import os

import numpy as np
import pytest

from rapidindex.errors import DamagedIndex
from rapidindex.search.check import check
from rapidindex.search.metadata import IndexMetadata
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store, read_json, write_json
from tests.search.stores import gradients, make_store

N, K = 300, 64


@pytest.fixture
def rows(tmp_path):
    store = make_store(tmp_path / "index", gradients(N, K))
    VectorIndex.build(store.rows("sentence"), factory="SQ8", dim=32, target_recall=0.5)
    return store.rows("sentence")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["ann.json", "faiss"])
@pytest.mark.parametrize("place", [0, 1, 200, 3001, -1])
def test_every_changed_byte_is_found_and_repaired_and_no_search_uses_it(rows, name, place):
    expected = VectorIndex.open(rows).search(gradients(3, K, seed=2), 5)
    file = rows.path / (name if name == "ann.json" else VectorIndex.open(rows).metadata.file)
    flip(file, place)
    with pytest.raises(DamagedIndex):
        VectorIndex.open(rows)
    index = rows.path.parent
    [problem] = check(index)
    assert problem.where == "sentence/ann.json" and "damaged" in problem.what and "--repair" in problem.mend
    assert len(check(index, repair=True)) == 1 and check(index) == []
    again = VectorIndex.open(Store.open(index).rows("sentence"))
    np.testing.assert_array_equal(again.search(gradients(3, K, seed=2), 5).rows, expected.rows)
    if name == "faiss":  # the options are known
        assert (again.metadata.factory, again.metadata.dim) == ("SQ8", 32)


@pytest.mark.parametrize("damage", ["missing", "shorter", "link"])
def test_a_file_that_is_missing_cut_or_a_link_is_found(rows, damage, tmp_path):
    file = rows.path / VectorIndex.open(rows).metadata.file
    content = file.read_bytes()
    file.unlink()
    if damage == "shorter":
        file.write_bytes(content[:-8])
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(DamagedIndex):
        VectorIndex.open(rows)
    assert len(check(rows.path.parent)) == 1


@pytest.mark.parametrize("file", ["../../other.faiss", "/etc/passwd", "ann.json", "", 7])
def test_metadata_names_only_files_of_its_own_folder(rows, file):
    fields = read_json(rows.path / "ann.json") | {"file": file}
    write_json(rows.path / "ann.json", fields)
    with pytest.raises(DamagedIndex, match="ann.json"):
        IndexMetadata.read(rows.path)
    assert "file" in json.loads((rows.path / "ann.json").read_text())


def test_an_intact_index_has_no_problem(rows):
    assert check(rows.path.parent) == []


def test_options_that_no_build_writes_are_found_and_taken_from_the_shards_again(rows):
    manifest = rows.path.parent / "manifest.json"
    held = read_json(manifest)
    encoding = held["config"]["encoding"] | {"max_length": "x"}
    write_json(manifest, held | {"config": held["config"] | {"encoding": encoding}})
    [problem] = check(rows.path.parent)
    assert problem.where == "manifest.json" and "max_length is 'x'" in problem.what and "delete it" in problem.mend
    manifest.unlink()
    check(rows.path.parent, repair=True)
    assert check(rows.path.parent) == []
