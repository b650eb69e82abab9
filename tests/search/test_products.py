import numpy as np
import pytest
import torch

from rapidindex.search import products
from rapidindex.search.products import multiplies_integers, products_with, products_with_each, rough_products_with


def stored(n, K, row_type, seed=0):
    rng = np.random.default_rng(seed)
    if row_type == "int8":
        return rng.integers(-127, 128, (n, K), dtype=np.int8)
    return rng.standard_normal((n, K)).astype(np.float16)


@pytest.mark.parametrize("row_type", ["int8", "float16"])
@pytest.mark.parametrize("queries", [1, 3, 600])
def test_products_are_those_of_float64(row_type, queries):
    posed = np.random.default_rng(1).standard_t(3, (queries, 1024)).astype(np.float32)
    entries = stored(50, 1024, row_type)
    expected = posed.astype(np.float64) @ entries.astype(np.float64).T
    lengths = np.linalg.norm(posed, axis=1)[:, None] * np.linalg.norm(entries.astype(np.float64), axis=1)
    assert (np.abs(products_with(posed, row_type)(entries) - expected) / lengths).max() < 1e-6


@pytest.mark.parametrize("row_type", ["int8", "float16"])
def test_a_query_alone_has_the_products_that_it_has_among_others(row_type):
    posed, entries = np.random.default_rng(4).standard_normal((5, 1024)).astype(np.float32), stored(700, 1024, row_type)
    together = products_with(posed, row_type)(entries)
    for one, multiply in enumerate(products_with_each(posed, row_type)):
        np.testing.assert_allclose(multiply(entries)[0], together[one], rtol=1e-5, atol=0.01)


def test_rows_become_float32_a_few_at_a_time(monkeypatch):
    posed, entries = np.random.default_rng(4).standard_normal((5, 64)).astype(np.float32), stored(50, 64, "float16")
    whole = products_with(posed, "float16")(entries)
    monkeypatch.setattr(products, "_FLOATS", 64 * 7)
    np.testing.assert_allclose(products_with(posed, "float16")(entries), whole, rtol=1e-5, atol=1e-5)


needs_integers = pytest.mark.skipif(not multiplies_integers(), reason="this CPU multiplies no 8-bit integers")


@needs_integers
@pytest.mark.parametrize("K", [products._LONGEST_SUM, 2 * products._LONGEST_SUM, 3 * products._LONGEST_SUM + 16])
def test_the_largest_sums_do_not_overflow(K):
    entries = np.stack([np.full(K, 127, np.int8), np.full(K, -128, np.int8)])
    found = products_with(np.ones((1, K), np.float32), "int8")(entries)
    np.testing.assert_allclose(found, [[127 * K, -128 * K]], rtol=1e-7)


@needs_integers
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tails", [1, 3, 100])
def test_rough_products_are_off_by_no_more_than_they_say(tails, parts):
    posed = np.random.default_rng(5).standard_t(tails, (9, 2048)).astype(np.float32)
    posed[0, 1:] = posed[0, 0]
    entries = np.concatenate([stored(300, 2048, "int8"), 127 * np.sign(posed).astype(np.int8)])
    wide = entries.astype(np.float64)
    multiply, errors = rough_products_with(posed, "int8", parts=parts)
    off = (np.abs(multiply(entries) - posed.astype(np.float64) @ wide.T) / np.linalg.norm(wide, axis=1)).max(1)
    step = np.abs(posed).max(1) / 127 / 254 ** (parts - 1)
    assert (off <= errors).all() and (errors < 0.5 * step * 2048**0.5 + 1e-6 * np.linalg.norm(posed, axis=1)).all()


@pytest.mark.parametrize("row_type", ["int8", "float16"])
def test_products_with_no_error_are_the_exact_ones(row_type, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    posed, entries = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32), stored(9, 64, row_type)
    multiply, errors = rough_products_with(posed, row_type, parts=1)
    np.testing.assert_array_equal(multiply(entries), products_with(posed, row_type)(entries))
    assert not errors.any()


@needs_integers
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_queries_of_any_size_keep_their_precision(scale):
    query = np.random.default_rng(2).standard_normal((1, 512)).astype(np.float64)
    entries = stored(20, 512, "int8")
    found = products_with((query * scale).astype(np.float32), "int8")(entries)
    expected = query @ entries.T.astype(np.float64) * scale
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max() + 1e-44


def test_a_query_of_zeros_scores_zero():
    assert not products_with(np.zeros((2, 64), np.float32), "int8")(stored(5, 64, "int8")).any()


@needs_integers
def test_rows_are_multiplied_alike_in_blocks_of_any_size():
    posed, entries = np.random.default_rng(3).standard_normal((2, 256)).astype(np.float32), stored(40, 256, "int8")
    multiply = products_with(posed, "int8")
    apart = np.concatenate([multiply(entries[at : at + 7]) for at in range(0, 40, 7)], axis=1)
    np.testing.assert_array_equal(multiply(entries), apart)


def test_a_cpu_without_vnni_converts_to_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    posed, entries = np.ones((1, 64), np.float32), stored(5, 64, "int8")
    np.testing.assert_allclose(products_with(posed, "int8")(entries)[0], entries.sum(1, dtype=np.float64), rtol=1e-6)
