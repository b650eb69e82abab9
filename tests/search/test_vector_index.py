import json
import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from rapidindex.errors import DamagedIndex, QueryError, ResourceError, UsageError
from rapidindex.search import metadata
from rapidindex.search.calibration import KINDS, calibrate, draw_held_out
from rapidindex.search.exact import exact_search
from rapidindex.search.faiss_index import AnnIndex, check_factory, not_on_gpu
from rapidindex.search.vector_index import (
    EXACT_MAX_ENTRIES,
    VectorIndex,
    default_factory,
    fold,
    scan_device,
    search_index_bytes,
    suited_device,
)
from rapidindex.store import Store
from rapidindex.store.folder import read_json, write_json
from tests.search.stores import CountedRows, append, gradients, make_store, remove, spoil

N, K, DIM = 1500, 256, 128
# The least share of the exact answer that searches find when they promise .95, for other queries than those measured.
FLOORS = {"Flat": 0.95, "SQ8": 0.95, "IVF16,Flat": 0.9, "HNSW16": 0.9, "HR,RaBitQ": 0.92, "HR,IVF16,RaBitQ": 0.88}


@pytest.fixture(scope="module")
def values():
    return gradients(N, K)


@pytest.fixture(scope="module")
def queries():
    return gradients(40, K, seed=1)


@pytest.fixture
def store(tmp_path, values):
    return make_store(tmp_path / "index", values)


@pytest.fixture(scope="module", params=FLOORS)
def built(request, tmp_path_factory, values):
    """An index of each factory; read only."""
    rows = make_store(tmp_path_factory.mktemp("built") / "index", values).rows("sentence")
    return VectorIndex.build(rows, factory=request.param, dim=DIM, target_recall=0.95)


@pytest.fixture(scope="module")
def compact(tmp_path_factory, values):
    """A `HR,RaBitQ` index; read only."""
    rows = make_store(tmp_path_factory.mktemp("compact") / "index", values).rows("sentence")
    return VectorIndex.build(rows, factory="HR,RaBitQ", dim=DIM, target_recall=0.9)


def assert_same_answers(result, expected):
    assert result.method == expected.method == "exact"
    np.testing.assert_array_equal(result.rows, expected.rows)


def share_found(result, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(result.rows, expected.rows, strict=True)])


# What is found


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_each_factory_finds_nearly_what_the_exact_scan_finds(built, queries, k, largest):
    result = built.search(queries, k, largest=largest)
    expected = exact_search(built.rows, queries, k, largest=largest)
    assert result.method == "ann"
    assert share_found(result, expected) >= FLOORS[built.metadata.factory]
    assert result.scores.dtype == np.float32 and result.rows.dtype == np.int64
    assert (result.n, result.summaries) == (N, None)


@pytest.mark.parametrize("largest", [True, False])
def test_scores_are_inner_products_with_the_stored_rows_best_first(built, queries, largest):
    result = built.search(queries, 10, largest=largest)
    for query, scores, rows in zip(queries, result.scores, result.rows, strict=True):
        np.testing.assert_allclose(scores, built.rows.take(rows) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all() if largest else (np.diff(scores) >= 0).all()
        assert len(set(rows)) == 10


def test_a_reopened_index_finds_the_same(built, queries):
    again = VectorIndex.open(built.rows)
    assert again.metadata == built.metadata
    for largest in (True, False):
        before, after = (index.search(queries, 10, largest=largest) for index in (built, again))
        np.testing.assert_array_equal(before.rows, after.rows)
        np.testing.assert_array_equal(before.scores, after.scores)


def test_a_batch_finds_what_its_queries_find_alone(built, queries):
    together = built.search(queries[:5], 10)
    np.testing.assert_array_equal(together.rows, [built.search(query[None], 10).rows[0] for query in queries[:5]])


def test_the_same_seed_builds_the_same_index(store, queries):
    rows = store.rows("sentence")
    options = {"factory": "IVF16,SQ8", "dim": DIM, "target_recall": 0.9, "seed": 3}
    first, second = (VectorIndex.build(rows, **options).metadata for _ in range(2))
    assert first.file_sha256 == second.file_sha256 and first.proponents == second.proponents


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_the_length_of_a_query_changes_no_ranks(compact, queries, size):
    expected = compact.search(queries, 5)
    np.testing.assert_array_equal(compact.search(queries * np.float32(size), 5).rows, expected.rows)


def test_a_query_of_zeros_scores_zero(compact):
    result = compact.search(np.zeros((1, K), np.float32), 5)
    assert (result.scores == 0).all() and (result.rows >= 0).all()


def test_exact_order_where_a_quarter_of_the_rows_is_asked_for(compact, queries):
    expected = exact_search(compact.rows, queries, N // 4 + 1)
    result = compact.search(queries, N // 4 + 1)
    assert result.method == "exact"
    np.testing.assert_array_equal(result.rows, expected.rows)


def test_more_than_there_is_is_filled_up_with_row_minus_one(compact, queries):
    result = compact.search(queries, N + 3)
    assert (result.rows[:, N:] == -1).all() and (result.scores[:, N:] == -np.inf).all()
    assert (np.sort(result.rows[:, :N]) == np.arange(N)).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_a_setting(compact, queries, threads):
    result = VectorIndex.open(compact.rows, threads=threads).search(queries, 10)
    np.testing.assert_array_equal(result.rows, compact.search(queries, 10).rows)


# Removed rows, empty stores


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "HR,RaBitQ"])
def test_removed_rows_are_never_found_even_where_they_crowd_the_candidates(store, queries, factory):
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.9)
    queries = queries[:4]
    gone = np.unique(exact_search(rows, queries, 100).rows)
    remove(store, gone)
    after = VectorIndex.open(store.rows("sentence"))
    result = after.search(queries, 10)
    assert result.method == "ann" and result.n == N - len(gone)
    assert not np.isin(result.rows, gone).any() and (result.rows >= 0).all()
    # What is left scores much alike, which is hard for any index: no harder for this one than for one built anew.
    rebuilt = VectorIndex.build(after.rows, factory=factory, dim=DIM, target_recall=0.9).search(queries, 10)
    expected = exact_search(after.rows, queries, 10)
    assert share_found(result, expected) >= share_found(rebuilt, expected) - 0.15


def test_rows_removed_before_building_are_left_out(store, queries):
    gone = np.arange(0, N, 2)
    remove(store, gone)
    made = VectorIndex.build(store.rows("sentence"), factory="HR,RaBitQ", dim=DIM, target_recall=0.9)
    assert made.metadata.live == N // 2 and made.metadata.rows == N
    for largest in (True, False):
        assert (made.search(queries, 5, largest=largest).rows % 2 == 1).all()


@pytest.mark.parametrize("factory", [None, "exact", "HR,RaBitQ", "IVF16,Flat"])
def test_an_empty_store_can_be_indexed_and_searched(tmp_path, queries, factory):
    store = Store.create(tmp_path / "index", config={}, layers=[], versions={}, planned={"sentence": (K, 0)})
    VectorIndex.build(store.rows("sentence"), factory=factory)
    result = VectorIndex.open(store.rows("sentence")).search(queries, 3)
    assert (result.rows == -1).all() and result.n == 0


@pytest.mark.parametrize("n", [1, 3, 12])
def test_a_few_rows_can_be_indexed_and_searched(tmp_path, queries, n):
    rows = make_store(tmp_path / "index", gradients(n, K)).rows("sentence")
    made = VectorIndex.build(rows, factory="HR,RaBitQ")
    np.testing.assert_array_equal(made.search(queries, 3).rows, exact_search(rows, queries, 3).rows)


# Recall


def test_the_stated_recall_is_what_other_queries_get(built):
    queries = gradients(200, K, seed=2)
    for largest in (True, False):
        result = built.search(queries, 10, largest=largest)
        actual = share_found(result, exact_search(built.rows, queries, 10, largest=largest))
        assert actual >= result.recall - 0.05
        assert result.recall >= 0.95


def test_each_direction_has_the_smallest_margin_that_reaches_the_target(store):
    rows = store.rows("sentence")
    low, high = (
        VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=target).metadata for target in (0.5, 0.95)
    )
    for largest in (True, False):
        assert low.calibration(largest).margin < high.calibration(largest).margin
        assert low.calibration(largest).rows_read < high.calibration(largest).rows_read
        assert high.calibration(largest).recall_at_10 >= 0.95
        assert low.calibration(largest).recall_at_10 < high.calibration(largest).recall_at_10


@pytest.mark.parametrize("largest", [True, False])
def test_the_margin_is_the_smallest_that_a_search_confirms(tmp_path, largest):
    rows = make_store(tmp_path / "index", gradients(2000, K)).rows("sentence")
    held_out, folded = draw_held_out(rows, seed=0), fold(rows.take(range(2000)), 64)

    def search(queries, count, lists):
        units = queries / np.linalg.norm(queries, axis=1, keepdims=True) * (1 if largest else -1)
        scores = fold(units, 64) @ folded.T
        best = np.argsort(-scores, axis=1)[:, :count]
        return np.take_along_axis(scores, best, axis=1), best

    def share(i, margin):
        estimates, numbers = (array[0] for array in search(held_out.queries[[i]], 2000, None))
        scores, best = held_out.answers[largest][i]
        last = abs(scores[9]) / np.linalg.norm(held_out.queries[i])
        within = numbers[estimates >= last - margin]
        return 1.0 if len(within) > 500 else len({*within} & {*best[:10]}) / 10  # a quarter of the rows: a scan

    def recall(margin):
        return min(np.mean([share(i, margin) for i, k in enumerate(held_out.kinds) if k == kind]) for kind in KINDS)

    def expected(kind, margin):
        """The share found if any known row's error were that of any of the ten best."""
        errors, leads = [], []
        for i in (i for i, k in enumerate(held_out.kinds) if k == kind):
            estimates, numbers = (array[0] for array in search(held_out.queries[[i]], 500, None))
            scores, best = held_out.answers[largest][i]
            exact = np.abs(scores) / np.linalg.norm(held_out.queries[i])
            known = dict(zip(numbers.tolist(), estimates, strict=True))
            errors += [known.get(row, estimates[-1]) - score for row, score in zip(best.tolist(), exact, strict=True)]
            leads += list(exact[:10] - exact[9])
        return np.mean(-np.array(errors)[:, None] <= margin + np.array(leads))

    def found(margin):
        return min(recall(margin), *(expected(kind, margin) for kind in KINDS))

    options = {"largest": largest, "target": 0.8, "lists": 0, "rows": 2000}
    calibration = calibrate(search, held_out, **options)
    assert found(calibration.margin) > 0.8 - 1e-9 and found(calibration.margin - 2e-6) < 0.8 - 1e-9
    assert calibration.recall_at_10 == pytest.approx(recall(calibration.margin), abs=1e-6)

    def lazy(queries, count, lists):
        """Like a graph: asked for fewer candidates, it looks less far."""
        estimates, numbers = search(queries, count, lists)
        estimates[:, count // 2 :], numbers[:, count // 2 :] = -np.inf, -1
        return estimates, numbers

    slow = calibrate(lazy, held_out, **options)
    assert slow.candidates > 1.5 * calibration.candidates and slow.recall_at_10 >= 0.8


def test_a_query_whose_best_rows_stand_out_reads_fewer_of_them(compact):
    faint = np.random.default_rng(1).standard_normal((1, K)).astype(np.float32)
    counts = []
    for query in (compact.rows.take([3]), faint):
        rows = CountedRows(compact.rows)
        assert VectorIndex.open(rows).search(query, 1).method == "ann"
        counts.append(rows.read_singly)
    assert 0 < counts[0] < counts[1]


def test_a_query_that_tells_no_rows_apart_is_scanned_beside_others_that_are_not(store, queries):
    rows = store.rows("sentence")
    made = VectorIndex.build(rows, factory="HR,RaBitQ", dim=DIM, target_recall=0.9)
    mixed = np.stack([queries[0], np.zeros(K, np.float32), queries[1]])
    for largest in (True, False):
        result, truth = (search(mixed, 5, largest=largest) for search in (made.search, partial(exact_search, rows)))
        assert result.method == "ann"
        np.testing.assert_array_equal(result.rows[1], truth.rows[1])
        assert share_found(result, truth) >= 0.8


def test_an_ivf_index_visits_no_more_lists_than_the_target_needs(store):
    rows = store.rows("sentence")
    low, high = (
        VectorIndex.build(rows, factory="IVF32,Flat", dim=K, target_recall=target).metadata for target in (0.5, 0.99)
    )
    assert low.proponents.lists < high.proponents.lists <= 32


def test_a_target_out_of_reach_falls_back_to_the_exact_scan(store, queries):
    rows = store.rows("sentence")
    made = VectorIndex.build(rows, factory="HR,RaBitQ", dim=8, target_recall=1.0)
    assert made.metadata.proponents.margin is None and made.metadata.proponents.recall_at_10 < 1
    result = made.search(queries, 10)
    assert (result.method, result.recall) == ("exact", 1.0)
    np.testing.assert_array_equal(result.rows, exact_search(rows, queries, 10).rows)


def test_held_out_queries_leave_out_every_row_of_the_examples_they_are_made_of(tmp_path):
    rows = make_store(tmp_path / "index", gradients(60, K), per_shard=30, rows_per_example=5).rows("sentence")
    held_out = draw_held_out(rows, seed=0)
    assert held_out.kinds == ["left out"] * 12 + ["faint"] * 12
    assert [len(excluded) for excluded in held_out.excluded] == [5] * 24
    for query, excluded, kind in zip(held_out.queries, held_out.excluded, held_out.kinds, strict=True):
        scores, _ = held_out.answers[True][held_out.queries.tolist().index(query.tolist())]
        if kind == "left out":
            assert exact_search(rows, query[None], 1).rows[0, 0] in excluded
        assert scores[0] < exact_search(rows, query[None], 1).scores[0, 0]
    answers = held_out.answers[True] + held_out.answers[False]
    for (_, numbers), excluded in zip(answers, held_out.excluded * 2, strict=True):
        assert len(numbers) == 60 - len(excluded) and not np.isin(numbers, excluded).any()


def test_recall_counts_any_of_the_rows_that_tie_for_the_last_place(tmp_path):
    values = np.repeat(gradients(100, K), 12, axis=0)
    rows = make_store(tmp_path / "index", values).rows("sentence")
    made = VectorIndex.build(rows, factory="Flat", dim=K, target_recall=1.0)
    assert made.metadata.proponents.margin is not None and made.metadata.proponents.recall_at_10 == 1


# Choosing, refusing


def test_the_default_is_exact_for_small_stores_and_compact_beyond():
    rows = EXACT_MAX_ENTRIES // 65_536
    assert default_factory(rows, 65_536) == "exact"
    assert default_factory(rows + 1, 65_536) == "HR,RaBitQ"


def test_the_default_index_says_its_size_before_it_is_built():
    rows = EXACT_MAX_ENTRIES // 65_536
    assert search_index_bytes(rows, 65_536) == 0
    assert (rows + 1) * 2048 < search_index_bytes(rows + 1, 65_536) < (rows + 1) * 2100  # one bit a dimension of 16,384


def test_the_default_for_a_small_store_writes_no_faiss_file(store, queries):
    made = VectorIndex.build(store.rows("sentence"))
    assert (made.metadata.factory, made.metadata.file, made.metadata.requested_factory) == ("exact", None, None)
    assert made.search(queries, 3).method == "exact"


def test_the_default_for_a_large_store_is_the_compact_index(store):
    made = VectorIndex.build(store.rows("sentence"), target_recall=0.9, exact_max_entries=N * K // 2)
    assert (made.metadata.factory, made.metadata.dim, made.metadata.requested_factory) == ("HR,RaBitQ", K, None)
    assert made.metadata.file_bytes / N < K // 8 + 30


@pytest.mark.parametrize(
    ("factory", "dim", "reason"),
    [
        ("RaBitQfs", 4096, "overflow silently above 2048"),
        ("HR,RaBitQfs_64", 4096, "overflow silently above 2048"),
        ("IVF16,PQ64x4fsr", 4096, "overflow silently above 2048"),
        ("nonsense", 128, "could not parse index string nonsense"),
        ("", 128, ""),
        ("LSH", 128, "METRIC_L2|failed|metric"),
        ("PQ15", 128, "multiple of the number of subquantizers"),
        ("NSG16", 128, "cannot be built in batches"),
        ("Flat,RFlat", 128, "re-ranked"),
        ("IVF0,Flat", 128, "too few lists"),
        ("HNSW1", 128, "too few lists or links"),
        ("IVF2000,Flat", 128, "a row for each of its lists"),
        ("IVF1M,Flat", 128, "a row for each of its lists"),
        ("IVF99999999999999999999,Flat", 128, "a row for each of its lists"),
        ("Flat", 100, "must divide"),
        ("exact", 0, "must divide"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path, factory, dim, reason):
    rows = make_store(tmp_path / "index", gradients(20, 4096)).rows("sentence")
    if not factory:
        assert VectorIndex.build(rows, factory=factory).metadata.factory == "exact"  # as if none were asked for
        return
    with pytest.raises(UsageError, match=reason) as refusal:
        VectorIndex.build(rows, factory=factory, dim=dim)
    assert "/project/" not in str(refusal.value)
    assert not list(rows.path.glob("ann.*"))


@pytest.mark.parametrize("factory", ["PQ4x0", "RR0,Flat", "RQ0x0", "PQ8x4fs_0", "IVF2,PQ4x0", "é\0"])
def test_a_factory_on_which_faiss_crashes_is_refused_with_the_process_alive(tmp_path, factory):
    rows = make_store(tmp_path / "index", gradients(20, 32)).rows("sentence")
    with pytest.raises(UsageError, match=r"--factory .* cannot be used") as refusal:
        VectorIndex.build(rows, factory=factory)
    assert "Try HR,RaBitQ" in refusal.value.hint and not list(rows.path.glob("ann.*"))


def test_a_factory_that_faiss_does_not_finish_in_time_is_refused():
    with pytest.raises(UsageError, match=r"more than 0\.01 seconds"):
        check_factory("PQ4x4", 32, 20, trial_seconds=0.01)
    check_factory("PQ4x4", 32, 20)


@pytest.mark.parametrize("target", [0.0, 1.5, -1.0])
def test_a_target_that_is_no_share_is_refused(compact, target):
    with pytest.raises(UsageError, match="--target-recall"):
        VectorIndex.build(compact.rows, target_recall=target)


def test_fastscan_is_allowed_where_its_sums_fit(store):
    assert VectorIndex.build(store.rows("sentence"), factory="RaBitQfs", dim=DIM, target_recall=0.5).metadata.file


def test_the_fold_is_never_longer_than_the_rows(store):
    assert VectorIndex.build(store.rows("sentence"), factory="Flat", dim=8192).metadata.dim == K


def test_queries_that_cannot_be_used_are_refused(compact, queries):
    with pytest.raises(UsageError, match="shape"):
        compact.search(queries[:, :-1], 3)
    with pytest.raises(UsageError, match="at least 1"):
        compact.search(queries, 0)
    with pytest.raises(QueryError, match="query 0 "):
        compact.search(np.full((1, K), np.nan, np.float32), 3)
    with pytest.raises(QueryError, match="overflow"):
        compact.search(np.full((1, K), 3e38, np.float32), 3)


def test_rows_that_are_not_finite_are_refused(tmp_path):
    store = make_store(tmp_path / "index", gradients(20, K), per_shard=10)
    rows = store.rows("sentence")
    spoil(store.path / "sentence" / "shard-00001.h5", row=4)
    with pytest.raises(DamagedIndex, match="row 14 "):
        VectorIndex.build(rows, factory="Flat")


def test_an_index_larger_than_the_memory_is_refused_before_the_rows_are_read(store):
    rows = CountedRows(store.rows("sentence"))
    with pytest.raises(ResourceError, match="GiB of memory.*HR,RaBitQ"):
        VectorIndex.build(rows, factory=f"HNSW{2**28}")  # 2 GiB of links a row
    assert not rows.passes and not rows.read_singly


# FAISS itself


def test_without_faiss_the_error_says_what_to_install_and_exact_still_works(store, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    rows = store.rows("sentence")
    with pytest.raises(ResourceError, match=r"pip install 'rapidindex\[cpu\]'"):
        VectorIndex.build(rows, factory="Flat")
    VectorIndex.build(rows)
    assert VectorIndex.open(rows).search(queries, 3).method == "exact"


def test_a_faiss_that_does_not_load_is_reported(store, tmp_path, monkeypatch):
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text("raise RuntimeError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)  # so that the false one does not outlive the test
    monkeypatch.delitem(sys.modules, "faiss")
    with pytest.raises(ResourceError, match="does not load .*libcudart"):
        VectorIndex.build(store.rows("sentence"), factory="Flat")


def test_no_gpu_is_refused_with_the_extra_to_install(store):
    import faiss

    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("there is a GPU")
    with pytest.raises(ResourceError, match=r"rapidindex\[gpu\]"):
        VectorIndex.build(store.rows("sentence"), factory="Flat", gpu=True)
    with pytest.raises(ResourceError, match="--gpu"):
        VectorIndex.build(store.rows("sentence"), factory="exact", gpu=True)
    assert not list((store.path / "sentence").glob("ann.*"))


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQ8"])
def test_a_gpu_index_finds_what_the_cpu_finds(store, queries, factory):
    faiss = pytest.importorskip("faiss")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("FAISS sees no GPU")
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.95, gpu=True)
    on_gpu, on_cpu = (VectorIndex.open(rows, device=device).search(queries, 10) for device in ("cuda", "cpu"))
    assert share_found(on_gpu, on_cpu) >= 0.99 and (on_gpu.device, on_cpu.device) == ("cuda", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_an_index_in_parts_on_all_gpus_finds_what_one_gpu_finds(store, queries, factory):
    faiss = pytest.importorskip("faiss")
    if getattr(faiss, "get_num_gpus", lambda: 0)() < 2:
        pytest.skip("FAISS sees no two GPUs")
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.95)
    on_all, on_one = (VectorIndex.open(rows, device=device).search(queries, 10) for device in ("cuda", "cuda:0"))
    np.testing.assert_array_equal(on_all.rows, on_one.rows)


@pytest.mark.parametrize(("factory", "why"), [("Flat", "GPU"), ("HR,RaBitQ", "GPU"), ("exact", None)])
def test_where_faiss_has_no_gpu_the_cpu_is_searched_and_the_reason_known(store, queries, factory, why):
    import faiss

    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("there is a GPU")
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.9)
    asked, plain = (VectorIndex.open(rows, device=device) for device in ("cuda", "cpu"))
    assert plain.not_on_gpu is None and (why in asked.not_on_gpu if why else asked.not_on_gpu is None)
    found = asked.search(queries, 10)
    np.testing.assert_array_equal(found.rows, plain.search(queries, 10).rows)
    assert found.device == "cpu"


def test_factories_that_faiss_has_on_no_gpu_are_named(monkeypatch):
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    assert all(not_on_gpu(factory) is None for factory in ("Flat", "SQ8", "IVF16,Flat", "IVF1k,PQ8"))
    assert all(factory in not_on_gpu(factory) for factory in ("HR,RaBitQ", "HNSW32"))


def test_where_no_device_is_named_size_and_factory_decide(monkeypatch):
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    sizes = (0, 2**28 - 1, 2**28, 2**34)
    assert [suited_device("IVF16,Flat", size) for size in sizes] == ["cpu", "cpu", "cuda", "cuda"]
    assert [suited_device("HR,RaBitQ", size) for size in sizes] == ["cpu"] * 4
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert suited_device("Flat", 2**34) == "cpu"


@pytest.mark.parametrize("factory", ["Flat", "exact"])
def test_a_small_index_is_searched_on_the_cpu_where_no_device_is_named(store, queries, factory):
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.9)
    index = VectorIndex.open(rows, device="auto")
    assert index.search(queries, 10).device == "cpu" and index.not_on_gpu is None


@pytest.mark.gpu
def test_a_large_index_is_searched_on_the_gpu_where_no_device_is_named(store, queries, monkeypatch):
    faiss = pytest.importorskip("faiss")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("FAISS sees no GPU")
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.95)
    monkeypatch.setattr("rapidindex.search.vector_index.GPU_BYTES", 1)
    monkeypatch.setattr("rapidindex.search.vector_index.faster", lambda ways: list(ways)[-1])
    assert VectorIndex.open(rows, device="auto").search(queries, 10).device == "cuda"


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Have FAISS's index on the device `cpu:0`, on which torch runs what it runs on a GPU."""
    monkeypatch.setattr("rapidindex.search.vector_index.not_on_gpu", lambda _: None)
    monkeypatch.setattr("rapidindex.search.vector_index.GPU_BYTES", 1)
    monkeypatch.setattr(AnnIndex, "on_gpu", lambda self, _: AnnIndex(self._index, device="cpu:0"))


@pytest.mark.parametrize("largest", [True, False])
def test_candidates_are_re_ranked_where_they_were_found(store, queries, pretended_gpu, largest):
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.95)
    there, here = (
        VectorIndex.open(rows, device=device).search(queries, 10, largest=largest) for device in ("cuda", "cpu")
    )
    np.testing.assert_array_equal(there.rows, here.rows)
    np.testing.assert_allclose(there.scores, here.scores, atol=1e-6)
    assert (there.device, here.device, there.method) == ("cpu:0", "cpu", "ann")


@pytest.mark.parametrize(("slow", "taken"), [("cpu", "cpu:0"), ("cpu:0", "cpu")])
def test_where_no_device_is_named_the_faster_one_is_found_out(store, queries, pretended_gpu, monkeypatch, slow, taken):
    rows, search = store.rows("sentence"), AnnIndex.search
    VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.95)

    def sleepy(index, *how):
        time.sleep(0.05 if index.device == slow else 0)
        return search(index, *how)

    monkeypatch.setattr(AnnIndex, "search", sleepy)
    assert VectorIndex.open(rows, device="auto").search(queries[:1], 10).device == taken


def test_scans_take_the_faster_device_where_none_is_named(store, monkeypatch):
    rows = store.rows("sentence")
    assert scan_device(rows, "auto") == "cpu"  # small
    monkeypatch.setattr("rapidindex.search.vector_index._SCAN_BYTES", 1)
    monkeypatch.setattr("rapidindex.search.vector_index.faster_device", lambda *_, **__: "cuda")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        expected = ["cuda", "cuda", "cuda:1", "cpu"] if there else ["cpu"] * 4
        assert [scan_device(rows, device) for device in ("auto", "cuda", "cuda:1", "cpu")] == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("rapidindex.search.vector_index.faster_device", full)
    assert scan_device(rows, "auto") == "cpu"


# Growing


def test_there_is_none_before_one_is_built(store):
    assert VectorIndex.open(store.rows("sentence")) is None


def test_an_index_that_lacks_rows_says_so_and_an_update_adds_only_them(store, queries):
    built = VectorIndex.build(store.rows("sentence"), factory="HR,RaBitQ", dim=DIM, target_recall=0.9)
    append(store, gradients(100, K, seed=5))
    stale = VectorIndex.open(store.rows("sentence"))
    assert "100 newest rows" in stale.stale
    assert_same_answers(stale.search(queries, 3), exact_search(stale.rows, queries, 3))
    events = []
    with store.lock():
        VectorIndex.update(store.rows("sentence"), progress=lambda *event: events.append(event))
    assert [stage for stage, _, _ in events] == ["index the rows"]
    updated = VectorIndex.open(store.rows("sentence"))
    assert updated.stale is None and updated.metadata.rows == N + 100
    assert updated.metadata.proponents == built.metadata.proponents  # 7 % more rows: not measured again
    result = updated.search(gradients(100, K, seed=5), 1)
    np.testing.assert_array_equal(result.rows[:, 0], np.arange(N, N + 100))


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "HR,RaBitQ", "IVF16,Flat", "HR,IVF16,RaBitQ"])
def test_rows_that_were_out_when_the_index_was_built_and_are_back_are_added(store, values, factory):
    gone = np.arange(0, N, 10)
    remove(store, gone)
    VectorIndex.build(store.rows("sentence"), factory=factory, dim=K, target_recall=0.9)
    remove(store, np.arange(1, N, 10))  # these it holds
    with store.lock():
        store.restore(store.removed)
        events = []
        VectorIndex.update(store.rows("sentence"), progress=lambda *event: events.append(event))
    assert {stage for stage, _, _ in events} == {"index the rows", "measure recall"}  # 11 % more rows
    updated = VectorIndex.open(store.rows("sentence"))
    assert updated.metadata.live == N and sorted(updated._ann.numbers()) == list(range(N))
    result = updated.search(values[gone], 1)
    assert result.method == "ann"
    np.testing.assert_array_equal(result.rows[:, 0], gone)
    np.testing.assert_array_equal(result.rows, exact_search(updated.rows, values[gone], 1).rows)


def test_an_update_with_nothing_to_add_writes_nothing(store):
    remove(store, np.arange(0, N, 10))
    made = VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9)
    remove(store, np.arange(1, N, 10))
    assert VectorIndex.update(store.rows("sentence")).metadata == made.metadata


def test_recall_is_measured_again_once_the_index_has_grown(store):
    VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9)
    append(store, gradients(200, K, seed=5))
    assert VectorIndex.update(store.rows("sentence")).metadata.proponents.rows == N + 200


def test_an_update_with_nothing_new_writes_nothing(store):
    before = VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9).metadata
    assert (
        VectorIndex.update(store.rows("sentence")).metadata
        == before
        == metadata.IndexMetadata.read(store.path / "sentence")
    )


def test_an_update_builds_where_there_is_none_or_none_can_be_added_to(store, tmp_path):
    assert VectorIndex.update(store.rows("sentence")).metadata.factory == "exact"
    empty = make_store(tmp_path / "empty", np.empty((0, K), np.float32))
    VectorIndex.build(empty.rows("sentence"), factory="IVF4,Flat", target_recall=0.8)
    append(empty, gradients(N, K))
    assert VectorIndex.update(empty.rows("sentence")).metadata.file


def test_an_exact_index_is_never_stale_and_becomes_compact_when_it_has_grown(store, queries):
    VectorIndex.build(store.rows("sentence"))
    append(store, gradients(100, K, seed=5))
    grown = VectorIndex.open(store.rows("sentence"))
    assert grown.stale is None and grown.search(queries, 3).n == N + 100
    updated = VectorIndex.update(store.rows("sentence"), exact_max_entries=N * K // 2)
    assert (updated.metadata.factory, updated.metadata.requested_factory) == ("HR,RaBitQ", None)


def test_other_rows_in_the_place_of_those_indexed_are_noticed_and_indexed_anew(store, tmp_path, values, queries):
    made = VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9)
    other = make_store(tmp_path / "other", values[::-1])
    for file in (store.path / "sentence").glob("ann.*"):
        file.rename(other.path / "sentence" / file.name)
    wrong = VectorIndex.open(other.rows("sentence"))
    assert "replaced by others" in wrong.stale
    assert_same_answers(wrong.search(queries, 3), exact_search(wrong.rows, queries, 3))
    anew = VectorIndex.update(other.rows("sentence"))
    np.testing.assert_array_equal(anew.search(queries, 3).rows, N - 1 - made.search(queries, 3).rows)


def test_rows_added_after_an_index_was_opened_are_not_among_its_answers(store, queries):
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.9)
    append(store, gradients(100, K, seed=5))
    with store.lock():
        VectorIndex.update(store.rows("sentence"))
    older = VectorIndex.open(rows)
    assert "100 rows more" in older.stale
    for largest in (True, False):
        found = older.search(gradients(100, K, seed=5), 3, largest=largest)
        assert found.method == "ann" and found.rows.max() < N and (found.rows >= 0).all()
    assert share_found(older.search(queries, 10), exact_search(rows, queries, 10)) >= 0.9


def test_searches_while_rows_are_added_and_indexed_raise_nothing(store, queries):
    VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9)
    code = f"""
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store
from tests.search.stores import append, gradients
store = Store.open({str(store.path)!r})
for number in range(8):
    append(store, gradients(20, {K}, seed=number), per_shard=10)
    with store.lock():
        VectorIndex.update(store.rows("sentence"))
        VectorIndex.build(store.rows("sentence"), factory="Flat", dim={DIM}, target_recall=0.9)
"""
    writer = subprocess.Popen([sys.executable, "-c", code])
    methods = set()
    while writer.poll() is None:
        rows = Store.open(store.path).rows("sentence")
        result = VectorIndex.open(rows).search(queries, 3)
        methods.add(result.method)
        assert (result.rows < len(rows)).all() and (result.rows >= 0).all()
    assert writer.returncode == 0 and "ann" in methods
    assert len(Store.open(store.path).rows("sentence")) == N + 160


def test_a_rebuild_leaves_one_metadata_file_and_one_file(store):
    rows = store.rows("sentence")
    (rows.path / "ann.deadbeef.faiss").write_bytes(b"left by a build that was killed")
    for factory in ("Flat", "SQ8"):
        made = VectorIndex.build(rows, factory=factory, dim=DIM, target_recall=0.9)
    assert sorted(file.name for file in rows.path.glob("ann.*")) == sorted(["ann.json", made.metadata.file])
    VectorIndex.build(rows, factory="exact")
    assert [file.name for file in rows.path.glob("ann.*")] == ["ann.json"]


def test_describe_is_plain_data(built):
    described = json.loads(json.dumps(built.describe()))
    assert described["factory"] == built.metadata.factory and described["rows"] == N and described["stale"] is None
    assert described["asked"] == built.metadata.requested_factory
    assert described["proponents"]["recall_at_10"] >= 0.95
    assert set(described["opponents"]["by_kind"]) == {"left out", "faint"}


def test_the_metadata_is_described_without_faiss(store, monkeypatch):
    described = VectorIndex.build(store.rows("sentence"), factory="Flat", dim=DIM, target_recall=0.9).describe()
    append(store, gradients(100, K, seed=5))
    monkeypatch.setitem(sys.modules, "faiss", None)
    rows = store.rows("sentence")
    later = metadata.IndexMetadata.read(rows.path).describe(rows)
    assert later == {**described, "stale": "it lacks the 100 newest rows"}


# Damage


def test_a_damaged_index_is_named_with_the_way_to_rebuild_it(store):
    rows = store.rows("sentence")
    made = VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.9)
    file = rows.path / made.metadata.file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DamagedIndex, match="should have .*rapidindex index"):
        VectorIndex.open(rows)
    file.write_bytes(b"x" * len(whole))
    with pytest.raises(DamagedIndex, match="changed after it was written.*rapidindex index"):
        VectorIndex.open(rows)
    file.unlink()
    with pytest.raises(DamagedIndex, match="missing.*rapidindex index"):
        VectorIndex.open(rows)
    VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.9)
    assert VectorIndex.open(rows)


def test_a_byte_changed_in_the_file_is_found_by_reading_it_through(store):
    rows = store.rows("sentence")
    made = VectorIndex.build(rows, factory="Flat", dim=DIM, target_recall=0.9)
    made.metadata.verify(rows.path)
    with open(rows.path / made.metadata.file, "r+b") as file:
        file.seek(5000)
        file.write(b"?")
    with pytest.raises(DamagedIndex, match="changed after it was written.*rapidindex index"):
        made.metadata.verify(rows.path)


def test_changed_metadata_is_damage(store):
    rows = store.rows("sentence")
    VectorIndex.build(rows)
    path = rows.path / "ann.json"
    path.write_text(path.read_text().replace('"live": 1500', '"live": 1501'))
    with pytest.raises(DamagedIndex, match="ann.json"):
        VectorIndex.open(rows)


# Many at once


def test_threads_that_search_together_find_what_each_finds_alone(compact, queries):
    alone = [compact.search(query[None], 10, largest=bool(i % 2)).rows for i, query in enumerate(queries)]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda i: compact.search(queries[i][None], 10, largest=bool(i % 2)).rows, range(len(queries))
        )
        np.testing.assert_array_equal(list(together), alone)


def test_processes_that_search_together_find_the_same(compact, queries):
    expected = compact.search(queries, 10).rows
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.apply_async(search_in_another_process, (compact.rows.path.parent, queries))
        while not elsewhere.ready():
            np.testing.assert_array_equal(compact.search(queries, 10).rows, expected)
        np.testing.assert_array_equal(elsewhere.get(), expected)


def search_in_another_process(path, queries):
    return VectorIndex.open(Store.open(path).rows("sentence")).search(queries, 10).rows


def test_readers_are_undisturbed_while_the_index_is_rebuilt(store, queries):
    rows = store.rows("sentence")
    expected = exact_search(rows, queries, 10)
    VectorIndex.build(rows, factory="Flat", dim=K, target_recall=0.9)
    done = threading.Event()

    def read():
        shares = []
        while not done.is_set() or not shares:
            shares.append(share_found(VectorIndex.open(rows).search(queries, 10), expected))
        return shares

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for factory in ("SQ8", "HR,RaBitQ", "exact", "Flat"):
                VectorIndex.build(rows, factory=factory, dim=K, target_recall=0.9)
        finally:
            done.set()
        assert min(min(reader.result()) for reader in readers) >= 0.85


def test_the_metadata_keeps_the_key_of_earlier_versions_for_the_requested_factory(store):
    rows = store.rows("sentence")
    VectorIndex.build(rows, factory="exact")
    assert read_json(rows.path / metadata.NAME)["asked"] == "exact"
    assert VectorIndex.open(rows).metadata.requested_factory == "exact"


def test_metadata_of_another_version_says_what_to_type(tmp_path):
    rows = make_store(tmp_path / "index", gradients(60, K)).rows("sentence")
    VectorIndex.build(rows, factory="Flat", dim=K, target_recall=0.5)
    fields = read_json(rows.path / metadata.NAME)
    write_json(rows.path / metadata.NAME, {**fields, "proponents": {"overfetch": 3}})
    with pytest.raises(DamagedIndex, match="another version wrote it") as error:
        VectorIndex.open(rows)
    assert error.value.hint == f"Type `rapidindex index {tmp_path / 'index'}`."
    VectorIndex.build(rows, factory="Flat", dim=K, target_recall=0.5)
    assert VectorIndex.open(rows)
