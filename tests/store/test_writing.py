import numpy as np
import pytest

from rapidindex.errors import StoreError
from rapidindex.store import atomic_file, container, replace_file, writing


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def write_numbers(path, count=3):
    return writing.write(path, {"numbers": writing.column(np.arange(count), "<i8")}, {"count": count})


def names(path):
    return [entry.name for entry in path.parent.iterdir()]


def test_a_finished_file_is_never_overwritten(path):
    write_numbers(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="never overwritten"):
        write_numbers(path, 5)
    assert path.read_bytes() == before
    assert names(path) == ["file"]


def test_a_file_system_without_hard_links_is_served_by_renaming(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    write_numbers(path)
    container.verify(path)
    with pytest.raises(StoreError, match="never overwritten"):
        write_numbers(path, 5)
    assert names(path) == ["file"]


def test_a_column_of_several_blocks_is_written_whole(path):
    blocks = [np.arange(3), np.arange(0), np.arange(3, 8)]
    layout = writing.write(path, {"numbers": writing.Column((8,), np.dtype("<i8"), blocks)}, {})
    assert container.verify(path).read("numbers").tolist() == layout.read("numbers").tolist() == list(range(8))


def test_blocks_of_another_size_than_their_column_are_the_callers_error(path):
    with pytest.raises(ValueError, match="64 bytes was given blocks of 56"):
        writing.write(path, {"numbers": writing.Column((8,), np.dtype("<i8"), [np.arange(7)])}, {})
    assert names(path) == []


def test_a_file_appears_when_its_block_ends(path):
    with atomic_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and names(path) == ["file"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_block_that_raises_leaves_nothing_behind(path, replace):
    with pytest.raises(RuntimeError, match="oops"), atomic_file(path, replace=replace) as file:
        file.write(b"half")
        raise RuntimeError("oops")
    assert names(path) == []


def test_a_file_that_is_there_is_replaced_whole_or_kept(path):
    replace_file(path, b"old")
    with pytest.raises(RuntimeError, match="oops"), atomic_file(path, replace=True) as file:
        file.write(b"ne")
        raise RuntimeError("oops")
    assert path.read_bytes() == b"old"
    with pytest.raises(StoreError, match="never overwritten"), atomic_file(path):
        pass
    replace_file(path, b"new")
    assert path.read_bytes() == b"new" and names(path) == ["file"]
