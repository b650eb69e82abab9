"""The exhaustive scan beside its two floors, reading the rows and multiplying integers; the index; and a GPU.

Rows are drawn at random, with a few common directions as gradients have: their times are those of any rows. All methods
take turns, and the least seconds of each are kept: of the clock, and of the processor, which other processes disturb
less. The floors are measured in the same rounds.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import pin
from rapidindex.progress import Progress
from rapidindex.search.exact import exact_search, scores_of
from rapidindex.search.products import multiplies_integers
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Rows, ShardContent, Store

BATCH = 100
"""Queries at once."""
RERANKED = 1000
"""Rows re-ranked: drawn, and sorted."""
PARTS = 1
"""8-bit vectors that the scan makes of a query, where the rows' lengths are stored."""
_LEVEL, _SHARD_ROWS, _DIRECTIONS = "sentence", 25_000, 48
_MULTIPLIED = (4096, 4096, 256)
"""The product whose speed is the floor of computing: a block of rows, K, and enough columns to be fast."""


def drawn(n: int, K: int, seed: int) -> np.ndarray:
    """Return rows of length 1, float32 [n, K]: a power-law spectrum of common directions, and noise."""
    world, rng = np.random.default_rng(99), np.random.default_rng([seed, 7])
    spectrum = np.arange(1, _DIRECTIONS + 1, dtype=np.float32) ** -0.5
    basis = world.standard_normal((_DIRECTIONS, K), np.float32)
    rows = rng.standard_normal((n, _DIRECTIONS), np.float32) * spectrum @ basis
    rows += rng.standard_normal((n, K), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def store_of(path: Path, n: int, K: int) -> Store:
    """Open or make the store of n such rows."""
    if not Store.exists(path):
        Store.create(path, config={}, layers=[{"name": "all", "size": 1}], versions={}, planned={_LEVEL: (K, 0)})
    store = Store.open(path)
    while (there := len(store.rows(_LEVEL))) < n:
        rows, count = store.rows(_LEVEL), min(_SHARD_ROWS, n - there)
        nothing, examples = np.full(count, -1), [{"id": f"{there + i:016x}"} for i in range(count)]
        content = ShardContent(
            drawn(count, K, there), np.ones((count, 1), np.float32), np.arange(count), nothing, nothing, examples
        )
        with store.lock():
            store.record_shard(_LEVEL, rows.write_shard(rows.next_number(), content))
    return store


def measure(store: Store, threads: tuple[int, ...], rounds: int, progress: Progress) -> dict[str, Any]:
    """Return the least seconds of every method, by number of threads, and of a GPU where there is one."""
    rows = store.rows(_LEVEL)
    queries = drawn(BATCH, rows.K, len(rows))
    with store.lock():
        VectorIndex.build(rows, factory="HR,RaBitQ", progress=progress)
    figures: dict[str, Any] = {"rows": len(rows), "K": rows.K, "bytes": len(rows) * rows.row_bytes}
    figures["products"] = {name: PARTS * len(rows) * rows.K * n for name, n in (("one", 1), ("batch", BATCH))}
    figures["multiplied"], figures["integers"] = int(np.prod(_MULTIPLIED)), multiplies_integers()
    figures["threads"] = {}
    for count in threads:
        progress(f"{len(rows):,} rows, {count} threads", 0, 1)
        index = VectorIndex.open(rows, threads=pin(count))
        methods = {**floors(rows, count), **searches(rows, queries, index, count)}
        figures["threads"][str(count)] = least(methods, rounds)
    if torch.cuda.is_available():
        figures["gpu"] = {"device": torch.cuda.get_device_name(), **least(on_gpu(store, queries), rounds)}
    return figures


def floors(rows: Rows, threads: int) -> dict[str, Callable[[], Any]]:
    """Return what reads all rows, and what multiplies integers as fast as torch does."""
    a, b = (torch.ones(shape, dtype=torch.int8) for shape in (_MULTIPLIED[:2], _MULTIPLIED[1:]))

    def read() -> None:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(
                pool.map(lambda block: torch.from_numpy(block[1]).view(torch.int64).sum(), rows.blocks(2**22 // rows.K))
            )

    return {"read": read, "multiply": lambda: torch._int_mm(a, b)}


def searches(rows: Rows, queries: np.ndarray, index: VectorIndex, threads: int) -> dict[str, Callable[[], Any]]:
    """Return the scan of one query and of all, the index, and re-ranking, which one thread does."""
    numbers = reranked(rows)
    scan = partial(exact_search, rows, k=10, threads=threads)
    methods = {
        "one": lambda: scan(queries[:1]),
        "batch": lambda: scan(queries),
        "index": partial(index.search, queries[:1], 10),
    }
    return methods | ({"rerank": lambda: scores_of(rows, numbers, queries[0])} if threads == 1 else {})


def reranked(rows: Rows) -> np.ndarray:
    """Return the numbers of the rows that are re-ranked."""
    return np.sort(np.random.default_rng(5).choice(len(rows), min(RERANKED, len(rows)), replace=False))


def on_gpu(store: Store, queries: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return scan and re-ranking on a GPU, and Flat and IVF there and on the CPU: one query, and all."""
    rows = store.rows(_LEVEL)
    methods = {"re-ranking on the GPU": partial(scores_of, rows, reranked(rows), queries[0], device="cuda")}
    named = (("one", queries[:1]), ("batch", queries))
    for name, some in named:
        methods[f"scan on the GPU, {name}"] = partial(exact_search, rows, some, 10, device="cuda")
    for factory in ("Flat", f"IVF{int(len(rows) ** 0.5)},Flat"):
        with store.lock():
            VectorIndex.build(rows, factory=factory, gpu=True)
        for place, device in (("GPU", "cuda"), ("CPU", "cpu")):
            index = VectorIndex.open(rows, device=device)
            methods |= {f"{factory} on the {place}, {name}": partial(index.search, some, 10) for name, some in named}
    return methods


def least(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Return for each method the least seconds of the clock and of the processor; the first round does not count."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            before = time.perf_counter(), time.process_time()
            method()
            if number:
                spent[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    return {
        name: dict(zip(("clock", "processor"), map(min, zip(*each, strict=True)), strict=True))
        for name, each in spent.items()
    }
