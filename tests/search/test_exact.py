import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rapidindex.errors import DamagedIndex, QueryError, UsageError
from rapidindex.search import exact
from rapidindex.search.exact import exact_search, faster, faster_device, live_scores, scores_of, top
from rapidindex.search.products import multiplies_integers
from rapidindex.store import Store, manifest
from tests.search.stores import CountedRows, gradients, make_store, remove, spoil

N, K = 600, 256


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("exact") / "index", gradients(N, K), per_shard=130).rows("sentence")


@pytest.fixture(scope="module")
def queries():
    return gradients(7, K, seed=1)


def brute_force(rows, queries, k, largest):
    """Rows of the k best of all stored rows, and their scores, in float64."""
    scores = queries.astype(np.float64) @ rows.take(np.arange(len(rows))).astype(np.float64).T
    order = np.argsort(-scores if largest else scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 10, 599, 600])
def test_finds_what_brute_force_finds_in_the_same_order(rows, queries, k, largest):
    result = exact_search(rows, queries, k, largest=largest)
    expected, scores = brute_force(rows, queries, k, largest)
    np.testing.assert_array_equal(result.rows, expected)
    np.testing.assert_allclose(result.scores, scores, atol=1e-6)
    assert (result.method, result.recall, result.n, result.largest) == ("exact", 1.0, N, largest)
    assert result.scores.dtype == np.float32 and result.rows.dtype == np.int64


@pytest.mark.parametrize("largest", [True, False])
def test_one_vector_of_a_query_finds_what_two_find_and_looks_at_more_rows_again(rows, queries, monkeypatch, largest):
    again = {}
    for vectors, rough in ((1, np.inf), (2, 0)):
        monkeypatch.setattr(exact, "_ROUGH", rough)
        counted = CountedRows(rows)
        result = exact_search(counted, queries, 10, largest=largest)
        np.testing.assert_array_equal(result.rows, brute_force(rows, queries, 10, largest)[0])
        again[vectors] = counted.read_singly
        assert len(counted.passes) == 1
    if multiplies_integers():
        assert 11 * len(queries) <= again[2] < again[1] < len(queries) * N / 4


def test_a_query_that_one_vector_leaves_in_doubt_is_scanned_with_two(rows, queries, monkeypatch):
    monkeypatch.setattr(exact, "_ROUGH", np.inf)
    monkeypatch.setattr(exact, "_FEW", 0)
    monkeypatch.setattr(exact, "_NEAR", 0)
    counted = CountedRows(rows)
    result = exact_search(counted, queries, 10)
    assert len(counted.passes) == (1 + len(queries) if multiplies_integers() else 1)
    np.testing.assert_array_equal(result.rows, brute_force(rows, queries, 10, True)[0])


def test_a_batch_finds_what_its_queries_find_alone(rows, queries):
    together = exact_search(rows, queries, 20)
    alone = [exact_search(rows, query[None], 20) for query in queries]
    np.testing.assert_array_equal(together.rows, np.concatenate([result.rows for result in alone]))


def test_more_queries_than_fit_into_memory_take_several_passes(rows, queries):
    counted = CountedRows(rows)
    scores = list(live_scores(counted, queries, scores_bytes=4 * N * 2))
    assert len(scores) == len(queries) == 7 and len(counted.passes) == 4
    np.testing.assert_allclose(scores, list(live_scores(rows, queries)), atol=1e-6)


def test_blocks_of_one_row_give_the_same(rows, queries):
    counted = CountedRows(rows)
    scores = list(live_scores(counted, queries, block_bytes=1))
    assert counted.passes == [1]
    np.testing.assert_allclose(scores, list(live_scores(rows, queries)), atol=1e-6)


@pytest.mark.parametrize("largest", [True, False])
def test_rows_that_differ_by_less_than_a_rough_score_shows_come_in_the_right_order(tmp_path, largest):
    rng, values = np.random.default_rng(4), np.zeros((400, 512), np.float32)
    values[:] = rng.integers(-126, 127, 512)
    values[np.arange(400), rng.integers(1, 512, 400)] += rng.integers(-1, 2, 400)
    values[:, 0] = 127  # one scale for all, so that nothing is rounded
    rows = make_store(tmp_path / "index", values, per_shard=150).rows("sentence")
    query = rng.standard_normal((1, 512)).astype(np.float32)
    query[0, 0], query[0, 1:] = 300, 0.1 * query[0, 1:]
    for k in (1, 50, 250):
        result = exact_search(rows, query, k, largest=largest)
        np.testing.assert_allclose(result.scores, brute_force(rows, query, k, largest)[1], rtol=1e-6)


@pytest.mark.parametrize("largest", [True, False])
def test_equal_scores_come_in_the_order_of_the_rows(tmp_path, largest):
    values = np.zeros((90, 16), np.float32)
    values[:, 0] = np.tile([1, 2, 3], 30)
    rows = make_store(tmp_path / "index", values, per_shard=40).rows("sentence")
    query = np.eye(1, 16, dtype=np.float32)
    best = np.flatnonzero(values[:, 0] == (3 if largest else 1))
    for k in (1, 29, 30, 31):
        result = exact_search(rows, query, k, largest=largest).rows[0]
        np.testing.assert_array_equal(result[:30], best[:k])


@pytest.mark.parametrize("largest", [True, False])
def test_fewer_rows_than_k_are_filled_up_with_row_minus_one(rows, queries, largest):
    result = exact_search(rows, queries, N + 5, largest=largest)
    assert (result.rows[:, N:] == -1).all() and (result.rows[:, :N] >= 0).all()
    assert (result.scores[:, N:] == (-np.inf if largest else np.inf)).all()
    assert np.isnan(result.percentiles()[:, N:]).all()


def test_removed_rows_are_found_nowhere(tmp_path, queries):
    store = make_store(tmp_path / "index", gradients(N, K), per_shard=130)
    before = exact_search(store.rows("sentence"), queries, N)
    removed = np.unique(before.rows[:, :40])
    remove(store, removed)
    after = exact_search(store.rows("sentence"), queries, N)
    for earlier, later in zip(before.rows, after.rows, strict=True):
        np.testing.assert_array_equal(later[later >= 0], earlier[~np.isin(earlier, removed)])
    assert after.n == N - len(removed) == after.summaries[0].n


@pytest.mark.parametrize("emptied", ["never filled", "all removed"])
def test_a_store_without_rows_finds_nothing(tmp_path, queries, emptied):
    store = Store.create(tmp_path / "index", config={}, layers=[], versions={}, planned={"sentence": (K, 0)})
    if emptied == "all removed":
        store = make_store(tmp_path / "other", gradients(9, K))
        remove(store, np.arange(9))
    result = exact_search(store.rows("sentence"), queries, 3)
    assert (result.rows == -1).all() and result.n == 0
    assert result.summaries[0].n == 0 and sum(result.summaries[0].histogram) == 0


def test_no_queries_find_nothing(rows):
    assert exact_search(rows, np.empty((0, K), np.float32), 3).rows.shape == (0, 3)


def test_the_summary_is_of_all_scores(rows, queries):
    scores = brute_force(rows, queries, N, True)[1]
    for summary, of_query in zip(exact_search(rows, queries, 1).summaries, scores, strict=True):
        expected = (N, of_query.min(), of_query.max(), of_query.mean(), of_query.std())
        assert (summary.n, summary.min, summary.max) == pytest.approx(expected[:3], abs=5e-6)
        assert (summary.mean, summary.std) == pytest.approx(expected[3:], abs=1e-3)  # of rough scores, most of them
        assert np.abs(np.array(summary.histogram) - np.histogram(of_query, 50)[0]).sum() <= 0.1 * N


def test_equal_scores_are_one_bar_of_the_histogram(tmp_path):
    rows = make_store(tmp_path / "index", np.ones((5, 16), np.float32)).rows("sentence")
    summary = exact_search(rows, np.ones((1, 16), np.float32), 1).summaries[0]
    assert summary.histogram == [5, *[0] * 49] and summary.std == 0


def test_percentiles_count_the_rows_that_score_lower(rows, queries):
    np.testing.assert_allclose(exact_search(rows, queries, 2).percentiles()[0], [100 * 599 / 600, 100 * 598 / 600])
    np.testing.assert_allclose(exact_search(rows, queries, 2, largest=False).percentiles()[0], [0, 100 / 600])


def test_threads_are_a_setting_that_does_not_stay(rows, queries):
    before = torch.get_num_threads()
    np.testing.assert_array_equal(
        exact_search(rows, queries, 20, threads=1).rows, exact_search(rows, queries, 20, threads=2).rows
    )
    assert torch.get_num_threads() == before


def test_float64_queries_are_taken(rows, queries):
    np.testing.assert_array_equal(
        exact_search(rows, queries.astype(np.float64), 5).rows, exact_search(rows, queries, 5).rows
    )


@pytest.mark.parametrize("shape", [(K,), (2, K - 1), (2, 0), (1, 1, K)])
def test_queries_of_another_shape_are_refused(rows, shape):
    with pytest.raises(UsageError, match=rf"\[queries, {K}\]"):
        exact_search(rows, np.ones(shape, np.float32), 3)


def test_k_below_one_is_refused(rows, queries):
    with pytest.raises(UsageError, match="at least 1"):
        exact_search(rows, queries, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_queries_that_are_not_finite_are_refused_by_number(rows, queries, value):
    queries = queries.astype(np.float64)
    queries[3, 5] = value
    with pytest.raises(QueryError, match="query 3 "):
        exact_search(rows, queries, 3)


def test_a_query_whose_scores_overflow_is_refused(rows):
    with pytest.raises(QueryError, match="overflow"):
        exact_search(rows, np.full((1, K), 3e38, np.float32), 3)


def test_stored_rows_that_are_not_finite_are_reported_as_damage(tmp_path, queries):
    store = make_store(tmp_path / "index", gradients(20, K), per_shard=10)
    rows = store.rows("sentence")
    spoil(store.path / "sentence" / "shard-00001.h5", row=4)
    with pytest.raises(DamagedIndex, match="row 14 .*rapidindex check"):
        exact_search(rows, queries, 3)


def with_ties(n, kinds, seed=0):
    """float32 [n]: many equal scores among a few different ones."""
    return np.random.default_rng(seed).integers(-kinds, kinds, n).astype(np.float32) / 8


def test_a_scan_by_several_threads_leaves_later_threads_torchs_own_number():
    def multiply(entries):
        time.sleep(0.01)  # so that the threads are at work together
        assert torch.get_num_threads() == 1
        return np.ones((1, len(entries)), np.float32)

    block = np.zeros((5, 8), np.int8), np.ones(5, np.float32)
    with exact.torch_threads(3):
        for _ in range(20):
            np.testing.assert_array_equal(exact._multiplied(iter([block] * 4), 20, 1, multiply, 2), np.ones((1, 20)))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("n", "kinds"), [(1, 5), (63, 5), (700, 3), (7000, 40), (7000, 10**6)])
@pytest.mark.parametrize("k", [1, 2, 30, 6999, 7001])
def test_the_best_are_the_first_of_a_stable_sort(n, kinds, k, largest):
    scores = with_ties(n, kinds)
    expected = np.argsort(-scores if largest else scores, kind="stable")[:k]
    np.testing.assert_array_equal(top(scores, k, largest), expected)
    rising = np.sort(scores)
    np.testing.assert_array_equal(top(rising, 1, largest), [np.argmax(rising) if largest else 0])


@pytest.mark.parametrize("k", [1, 10, 300, 5000])
@pytest.mark.parametrize("error", [1e-6, 0.05, 3.0])
@pytest.mark.parametrize("kinds", [20, 10**6])
def test_rows_that_may_be_among_the_best_are_all_that_their_slack_leaves_in_doubt(k, error, kinds):
    scores = with_ties(5000, kinds, seed=2)
    lengths = np.random.default_rng(3).standard_exponential(5000, np.float32)
    least, most = scores - np.float32(error) * lengths, scores + np.float32(error) * lengths
    expected = np.flatnonzero((most >= np.sort(least)[-k]) | (least <= most.min()))
    np.testing.assert_array_equal(exact._near(scores, np.float32(error), lengths, k), expected)


def test_the_summary_of_scores_of_any_size_is_that_of_float64():
    for scale in (1e-44, 1e-37, 1e-3, 1.0, 1e37):
        scores = (np.random.default_rng(7).standard_normal(4000) * scale + scale).astype(np.float32)
        wide, summary = scores.astype(np.float64), exact._summary(scores)
        assert (summary.mean, summary.std) == pytest.approx((wide.mean(), wide.std()), rel=1e-4)
        counts = np.histogram(wide, 50)[0]
        assert sum(summary.histogram) == 4000 and summary.histogram[-1] == counts[-1] > 0
        assert np.abs(np.array(summary.histogram) - counts).sum() <= 8


# On a GPU: `cpu:0` is a device that the same code runs on.


def device(name):
    needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.param(name, marks=[pytest.mark.gpu, needs_cuda] if name == "cuda" else [])


devices = pytest.mark.parametrize("place", [device("cpu:0"), device("cuda")])


@pytest.fixture(scope="module", params=["int8", "float16"])
def stored(request, tmp_path_factory):
    """Rows of either type, some of them removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "row_type", lambda _: request.param)
        store = make_store(tmp_path_factory.mktemp("stored") / "index", gradients(N, K), per_shard=130)
        remove(store, np.arange(5, N, 50))
        return store.rows("sentence")


@devices
@pytest.mark.parametrize("largest", [True, False])
def test_a_gpu_finds_the_same(stored, queries, largest, place):
    there, here = (exact_search(stored, queries, 10, largest=largest, device=device) for device in (place, "cpu"))
    np.testing.assert_array_equal(there.rows, here.rows)
    np.testing.assert_allclose(there.scores, here.scores, atol=1e-6)
    assert (there.device, there.n) == (place, here.n)
    for ours, theirs in zip(there.summaries, here.summaries, strict=True):
        assert (ours.mean, ours.std) == pytest.approx((theirs.mean, theirs.std), abs=1e-3)


@devices
def test_blocks_that_pass_through_two_buffers_keep_their_places(stored, queries, place):
    scores = {}
    for rows_a_block in (1, 7, 50, 1000):
        size = rows_a_block * stored.row_bytes
        scores[rows_a_block] = np.stack(list(live_scores(stored, queries, device=place, block_bytes=size)))
        np.testing.assert_allclose(scores[rows_a_block], list(live_scores(stored, queries)), atol=1e-6)


@devices
def test_rows_scored_again_on_a_gpu_have_the_same_scores(stored, queries, place):
    numbers = np.random.default_rng(8).permutation(N)[:400]
    for some in (numbers, numbers[:0]):
        there = scores_of(stored, some, queries[0], device=place)
        np.testing.assert_allclose(there, scores_of(stored, some, queries[0]), atol=1e-6)


@devices
def test_damage_is_found_on_a_gpu_as_well(tmp_path, queries, place):
    store = make_store(tmp_path / "index", gradients(20, K), per_shard=10)
    rows = store.rows("sentence")
    spoil(store.path / "sentence" / "shard-00001.h5", row=4)
    with pytest.raises(DamagedIndex, match="row 14 "):
        exact_search(rows, queries, 3, device=place)


def test_the_faster_of_two_ways_is_found_and_a_slow_one_timed_once():
    times = {"slow": [], "fast": []}
    ways = {"slow": lambda: (times["slow"].append(1), time.sleep(0.02)), "fast": lambda: times["fast"].append(1)}
    assert faster(ways) == "fast" and faster(dict(reversed(ways.items()))) == "fast"
    assert [len(each) for each in times.values()] == [6, 6]


def test_a_device_is_tried_with_a_part_of_the_rows(rows, monkeypatch):
    assert faster_device(rows, "cpu:0") in ("cpu", "cpu:0")
    for slow, other in (("_multiplied", "cpu:0"), ("streamed_scores", "cpu")):
        with monkeypatch.context() as patch:
            patch.setattr(exact, slow, lambda *_: time.sleep(0.05))
            assert faster_device(rows, "cpu:0") == other
