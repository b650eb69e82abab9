import json
import os
from dataclasses import replace

import h5py
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidindex.errors import DamagedIndex, NewerFormat
from rapidindex.store import container, decode_rows, encode_rows, shards
from tests.store.content import K, content, reseal

NEAR = 2.0**-11 * (1 + 1e-6)
STEP = 1 / 254 * (1 + 1e-6)
IDS = [{"ids": np.frombuffer(text, "u1")} for text in (b'["a"]', b'["a","a","b"]', b"[1,2,3]", b'{"a":1,"b":2,"c":3}')]
INDEX = {"id": "0123456789abcdef", "config": {"a": 1}}


def relative_error(rows):
    """Of float16 rows, in units of their lengths."""
    rows = np.asarray(rows, np.float32)
    back = decode_rows(*encode_rows(rows, "float16")).astype(np.float64)
    length = np.linalg.norm(rows.astype(np.float64), axis=1)
    return np.linalg.norm(back - rows, axis=1) / np.where(length > 0, length, 1)


def largest_error(rows):
    """Of int8 rows, in units of their largest entries; what float32 cannot tell apart does not count."""
    rows = np.asarray(rows, np.float32)
    back = decode_rows(*encode_rows(rows, "int8")).astype(np.float64)
    peak = np.abs(rows).max(axis=1).astype(np.float64)
    error = np.abs(back - rows).max(axis=1) - np.finfo(np.float32).smallest_subnormal
    return error.clip(0) / np.where(peak > 0, peak, 1)


def write_shard(path, ids="abc", *, row_type="int8", rejected=()):
    shard_content = content(list(ids), rejected=rejected)
    return shards.write_shard(path, shard_content, level="sentence", row_type=row_type, index=INDEX)


def read_shard(path, row_type="int8"):
    return shards.read_shard(path, index=INDEX["id"], level="sentence", K=K, layers=2, row_type=row_type)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-6, 1.0, 3e4, 1e30, 3e38])
def test_a_row_of_any_size_comes_back_within_half_precision(size):
    rows = np.random.default_rng(0).standard_normal((50, 300))
    rows = (rows / np.abs(rows).max(axis=1, keepdims=True) * size).astype(np.float32)
    assert relative_error(rows).max() <= NEAR
    assert largest_error(rows).max() <= STEP


@given(arrays.arrays(np.float32, (3, 9), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@settings(database=None, deadline=None)
def test_any_finite_row_comes_back_within_its_precision(rows):
    assert relative_error(rows).max() <= NEAR
    assert largest_error(rows).max() <= STEP
    for row_type in shards.ROW_TYPES:
        numbers, scale = encode_rows(rows, row_type)
        assert np.array_equal(scale == 0, ~rows.any(axis=1))
        assert np.isfinite(decode_rows(numbers, scale)).all()


@pytest.mark.parametrize("row_type", shards.ROW_TYPES)
def test_the_largest_float32_does_not_overflow_on_its_way_back(row_type):
    largest = np.finfo(np.float32).max
    assert np.isfinite(decode_rows(*encode_rows(np.full((1, 4), largest, np.float32), row_type))).all()


def test_heavy_tails_keep_their_small_entries_in_float16():
    row = np.full((1, 4096), 1e-4, np.float32)
    row[0, 0] = 1.0
    assert np.allclose(decode_rows(*encode_rows(row, "float16"))[0, 1:], 1e-4, rtol=2**-11)


def test_eight_bits_change_the_score_of_a_row_like_real_ones_by_a_ten_thousandth_of_its_length():
    draw = np.random.default_rng(1)
    rows, queries = (draw.standard_normal((n, 16_384)).astype(np.float32) for n in (40, 10))
    rows, queries = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (rows, queries))
    wrong = queries @ (decode_rows(*encode_rows(rows, "int8")) - rows).T
    assert wrong.std() < 1e-4


@pytest.mark.parametrize("row_type", shards.ROW_TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(bad, row_type):
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = bad
    with pytest.raises(ValueError, match=r"not finite .*\[1\]"):
        encode_rows(rows, row_type)


def test_hdf5_reads_the_same_numbers_as_the_memory_map(tmp_path):
    path = tmp_path / "shard-00000.h5"
    layout = write_shard(path, rejected=["z"])
    mapped = container.map_arrays(layout)
    with h5py.File(path, "r") as file:
        assert file.userblock_size == container.USER_BLOCK
        assert dict(file.attrs) == layout.attributes
        assert set(file) == set(mapped)
        for name, dataset in file.items():
            assert dataset.id.get_offset() == layout.extents[name].offset, name
            assert (dataset.shape, dataset.dtype) == (mapped[name].shape, mapped[name].dtype), name
            assert np.array_equal(dataset[()], mapped[name]), name
            assert dataset.chunks is None and dataset.compression is None


def test_mapped_arrays_are_aligned_and_no_write_to_them_reaches_the_file(tmp_path):
    layout = write_shard(tmp_path / "shard-00000.h5", "abcde")
    before = layout.path.read_bytes()
    for name, array in container.map_arrays(layout).items():
        assert array.ctypes.data % 64 == 0, name
        array[...] = 0
    assert layout.path.read_bytes() == before


@pytest.mark.parametrize("row_type", shards.ROW_TYPES)
def test_what_was_written_is_read_back(tmp_path, row_type):
    path = tmp_path / "shard-00000.h5"
    shard_content = content(list("abc"), tokens=2, rejected=["z"])
    shards.write_shard(path, shard_content, level="sentence", row_type=row_type, index=INDEX)
    shard, held = read_shard(path, row_type), container.map_arrays(container.verify(path))
    assert shard.ids == ["a", "b", "c"] and shard.rejected == shard_content.rejected
    assert [shards.read_record(held, number, id) for number, id in enumerate("abc")] == shard_content.examples
    assert np.array_equal(decode_rows(held["rows"], held["scale"]), shard_content.rows)
    for name in ("norms", "example", "position", "token"):
        assert np.array_equal(held[name], getattr(shard_content, name))
    assert json.loads(shard.layout.read("index").tobytes()) == INDEX
    assert list(shards.faults(shard)) == []


def test_a_shard_may_hold_nothing_but_rejected_examples(tmp_path):
    path = tmp_path / "shard-00000.h5"
    write_shard(path, [], rejected=["z"])
    shard = read_shard(path)
    assert (shard.rows, shard.ids, len(shard.rejected)) == (0, [], 1)
    assert list(shards.faults(shard)) == []


def test_rows_longer_than_a_block_are_written_whole(tmp_path):
    path = tmp_path / "shard-00000.h5"
    shard_content = content([f"e{i}" for i in range(7)])
    form = {"level": "sentence", "row_type": "int8", "index": INDEX}
    held = container.map_arrays(shards.write_shard(path, shard_content, **form, block_bytes=4 * K * 2))
    container.verify(path)
    assert np.array_equal(decode_rows(held["rows"], held["scale"]), shard_content.rows)


def test_two_writings_of_the_same_content_are_the_same_bytes(tmp_path):
    write_shard(tmp_path / "shard-00000.h5")
    write_shard(tmp_path / "shard-00001.h5")
    assert (tmp_path / "shard-00000.h5").read_bytes() == (tmp_path / "shard-00001.h5").read_bytes()


def test_a_change_to_any_byte_is_found(tmp_path):
    path = tmp_path / "shard-00000.h5"
    write_shard(path)
    good = path.read_bytes()
    with open(path, "rb+", buffering=0) as file:
        for place in (*range(container.USER_BLOCK), *range(container.USER_BLOCK, len(good), 5)):
            os.pwrite(file.fileno(), bytes([good[place] ^ (1 << place % 8)]), place)
            with pytest.raises(DamagedIndex, match="shard-00000.h5 is damaged"):
                container.verify(path)
            os.pwrite(file.fileno(), good[place : place + 1], place)
    container.verify(path)


def test_a_version_digit_that_was_changed_is_damage_and_not_a_newer_format(tmp_path):
    path = tmp_path / "shard-00000.h5"
    write_shard(path)
    path.write_bytes(path.read_bytes().replace(b"rapidindex.shard/1", b"rapidindex.shard/3", 1))
    with pytest.raises(DamagedIndex):
        container.read_layout(path)


def test_a_newer_format_is_told_from_damage(tmp_path):
    path = tmp_path / "shard-00000.h5"
    line = json.dumps({"format": "rapidindex.shard/2", "novelty": 1}).encode()
    path.write_bytes(line.ljust(container.USER_BLOCK, b"\0") + b"more")
    with pytest.raises(NewerFormat, match="format 2") as caught:
        container.read_layout(path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("kept", [0, 1, 100, 2047, 2048, 2049, 9000, -1])
def test_a_truncated_file_is_found_before_it_is_mapped(tmp_path, kept):
    path = tmp_path / "shard-00000.h5"
    layout = write_shard(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedIndex, match="shard-00000.h5 is damaged"):
        container.read_layout(path)
    with pytest.raises(DamagedIndex, match="does not have"):
        container.map_arrays(layout)


def test_bytes_that_were_added_are_found(tmp_path):
    path = tmp_path / "shard-00000.h5"
    write_shard(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedIndex, match="should have"):
        container.read_layout(path)


@pytest.mark.parametrize(
    ("row_type", "changes", "fault"),
    [
        ("float16", {"rows": np.full((3, K), np.nan, "<f2")}, "rows are not all finite"),
        ("int8", {"scale": np.full(3, np.inf, "<f4")}, "scales are not all finite"),
        ("int8", {"lengths": np.array([1, -1, 1], "<f4")}, "lengths of its rows"),
        ("int8", {"lengths": np.array([1, np.nan, 1], "<f4")}, "lengths of its rows"),
        ("int8", {"example": np.array([0, 1, 3], "<i4")}, "point outside its 3 examples"),
        ("int8", {"examples": np.zeros(999, "u1")}, "examples cannot be read"),
        ("int8", {"examples": np.zeros(3, "u1")}, "lie outside their text"),
        ("int8", {"examples_offsets": np.array([0, 9, 5, 2], "<i8")}, "lie outside their text"),
        ("int8", {"examples_offsets": np.array([-9, 0, 1, 2], "<i8")}, "lie outside their text"),
        ("int8", {"position": np.array([-2, -1, -1], "<i4")}, "tokens before the first"),
    ],
)
def test_faulty_numbers_in_an_intact_file_are_found(tmp_path, row_type, changes, fault):
    path = tmp_path / "shard-00000.h5"
    write_shard(path, row_type=row_type)
    reseal(path, **changes)
    container.verify(path)
    assert any(fault in message for message in shards.faults(read_shard(path, row_type)))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("row_type", ["int8", "float16"])
def test_no_row_is_longer_than_its_length_says(tmp_path, row_type, old):
    path = tmp_path / "shard-00000.h5"
    write_shard(path, row_type=row_type)
    arrays = container.map_arrays(container.read_layout(path))
    lengths = np.linalg.norm(decode_rows(arrays["rows"], arrays["scale"]).astype(np.float64), axis=1)
    if old:
        del arrays["lengths"]
    assert (lengths <= shards.lengths_of(arrays)).all()
    assert old or (shards.lengths_of(arrays) <= 1.1 * lengths).all()


@pytest.mark.parametrize(
    "changes",
    [{"scale": np.ones(2, "<f4")}, {"rows": np.ones((3, K), "<f4")}, *IDS, {"rejected": np.frombuffer(b"[7]", "u1")}],
    ids=["shape", "dtype", "count", "twice", "numbers", "an object", "rejected"],
)
def test_arrays_that_do_not_fit_together_are_damage(tmp_path, changes):
    path = tmp_path / "shard-00000.h5"
    write_shard(path)
    reseal(path, **changes)
    with pytest.raises(DamagedIndex):
        read_shard(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.ones((3, K))}, "rows is float64"),
        ({"rows": np.ones((3, K - 1), np.float32)}, r"rows is float32 \(3, 15\)"),
        ({"norms": np.ones((3, 3), np.float32)}, "norms"),
        ({"norms": np.full((3, 2), np.inf, np.float32)}, "norms that are not finite"),
        ({"example": np.array([0, 1, 3])}, "outside the 3 examples"),
        ({"position": np.ones(3)}, "position is float64"),
        ({"examples": [{"id": "a"}] * 3}, "the same id"),
        ({"examples": [{"id": 1}, {"id": 2}, {"id": 3}]}, "must be a string"),
    ],
)
def test_content_that_does_not_fit_together_is_the_callers_error(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(content(list("abc")), **changes).check(K, layers=2)
