"""Is retrieval as a vector search far ahead of scanning, and does it find the same?

    python -m bench.retrieval --index INDEX --queries FILE --work FOLDER [--stage STAGE] [--keep]

    real       the rows of INDEX: every factory over several folds, beside the exact scan and FAISS's Flat
    synthetic  the same over larger stores: real rows first, then rows drawn to be like them (synthetic.py)
    tracin     a whole retrieval beside TracIn, which computes every training gradient again (on a part, multiplied up)
    rows       how few bytes keep the answers, and the order of the true influence
    scan       the exhaustive scan beside the time to read its rows and to multiply them; needs no INDEX

Without --stage, all stages in this order; `python -m bench.render retrieval` then writes tables and plots. INDEX is
only read: search indexes are built over hard links in FOLDER. The figures of each configuration are kept in FOLDER, so
a stage that was stopped goes on where it was. Measure alone, on an idle machine.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import parser, pin, save, write_text
from bench.retrieval.measure import THREADS, Flat, Workload, batch_seconds, fits_memory, measure
from bench.retrieval.queries import Queries, query_batches, real_queries
from bench.retrieval.rows import smallest_row
from bench.retrieval.scan import measure as measure_scan
from bench.retrieval.scan import store_of
from bench.retrieval.stores import LEVEL, Grown, left_out, linked
from bench.retrieval.synthetic import FITTED_ROWS, likeness
from bench.retrieval.tracin import against_tracin
from rapidindex import Index
from rapidindex.progress import Bars
from rapidindex.search.exact import exact_search
from rapidindex.search.vector_index import DEFAULT_FACTORY, DIM, fold
from rapidindex.store import Store

FACTORIES = (DEFAULT_FACTORY, "RaBitQ", "IVF{lists},Flat", "IVF{lists},SQ8", "SQ8", "HNSW32")
STEPS = (10, 4, 2)
"""A growing store is also measured at these fractions of its size, with the default index alone."""


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    pin(max(THREADS))
    with Bars() as bars:
        for stage in [options.stage] if options.stage else STAGES:
            STAGES[stage](options, bars)


class Notebook:
    """Figures by name, each kept in a file as soon as it is known; a figure in the file is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the figure, measured by `work(*arguments)` where it is not known."""
        if name not in self.figures:
            self.figures[name] = work(*arguments)
            write_text(self.path, json.dumps(self.figures))
        return self.figures[name]


def real(options: argparse.Namespace, bars: Bars) -> None:
    """Measure every factory over the index's own rows."""
    queries = _queries(options, options.index, bars)
    store = linked(options.index, options.work / "real", LEVEL)
    notebook = Notebook(options.work / "real.json")
    workload = _workload(store, queries, len(store.rows(LEVEL)), options.rounds)
    measure_all(workload, options, notebook, bars)
    figures = {"real": len(workload.rows), **_sizes_of(workload), **notebook.figures}
    bars.say(f"written to {save('retrieval_real', figures, options)}")


def synthetic(options: argparse.Namespace, bars: Bars) -> None:
    """Measure every factory over larger stores, and the default one while they grow."""
    for size, K in options.sizes:
        path, level = _source(options, K)
        queries, source = _queries(options, path, bars), Store.open(path).rows(level)
        folder = options.work / f"{size}-{K}"
        grown, notebook = Grown(folder, K, source, size), Notebook(folder.with_name(f"{folder.name}.json"))
        for part in sorted({size // step for step in STEPS if size // step > 1.2 * grown.real}):
            if f"at {part}" not in notebook.figures and np.count_nonzero(grown.rows.live_mask) <= part:  # it only grows
                grown.grow(part)
                workload = _workload(grown.store, queries, grown.real, options.rounds)
                notebook.once(f"at {part}", measure_default, workload, bars)
        bars.say(f"write {size:,} rows of {K:,}")
        grown.grow(size)
        bars.say(json.dumps(notebook.once("likeness", _both_kinds, grown), indent=1))
        workload = _workload(grown.store, queries, grown.real, options.rounds)
        measure_all(workload, options, notebook, bars)
        figures = {"real": grown.real, "real_level": level, **_sizes_of(workload), **notebook.figures}
        bars.say(f"written to {save(f'retrieval_{size}', figures, options)}")
        del workload
        if not options.keep:
            Store.destroy(folder)


def tracin(options: argparse.Namespace, bars: Bars) -> None:
    """Measure a whole retrieval beside TracIn."""
    figures = against_tracin(_open(options, options.index), options.queries, options.tracin_rows, bars)
    bars.say(f"written to {save('retrieval_tracin', figures, options)}")


def rows(options: argparse.Namespace, bars: Bars) -> None:
    """Measure the smallest row."""
    queries, index = _queries(options, options.index, bars), _open(options, options.index)
    store = linked(options.index, options.work / "real", LEVEL)
    workload = _workload(store, queries, len(store.rows(LEVEL)), 0)
    batches = query_batches(index, options.queries, min(10, len(queries.kinds)))
    how = (workload.rows, workload.queries, workload.kinds, batches, options.true_rows)
    bars.say(f"written to {save('retrieval_rows', smallest_row(index, *how, bars), options)}")


def scan(options: argparse.Namespace, bars: Bars) -> None:
    """Measure the exhaustive scan."""
    threads, figures = tuple(t for t in (1, 2, 4) if t <= (os.cpu_count() or 1)), {}
    for size, K in options.scans:
        store = store_of(options.work / f"scan-{size}-{K}", size, K)
        figures[str(size)] = measure_scan(store, threads, options.rounds, bars)
        if not options.keep:
            Store.destroy(store.path)
    name = "retrieval_scan_gpu" if torch.cuda.is_available() else "retrieval_scan"
    bars.say(f"written to {save(name, figures, options)}")


STAGES = {"real": real, "synthetic": synthetic, "tracin": tracin, "rows": rows, "scan": scan}


def measure_all(workload: Workload, options: argparse.Namespace, notebook: Notebook, bars: Bars) -> None:
    """Measure all factories over all folds; those that memory cannot hold are named."""
    notebook.once("exact", _exact, workload)
    lists = max(2, int(workload.live**0.5))
    factories = [factory.format(lists=lists) for factory in options.factories or ("Flat", *FACTORIES)]
    for dim in [dim for dim in options.dims if dim <= workload.rows.K]:
        wanted = [factory for factory in factories if fits_memory(workload, factory, dim)]
        notebook.figures[f"no room at {dim}"] = sorted(set(factories) - set(wanted))
        if all(name in notebook.figures for name in (f"alone@{dim}", *(f"{factory}@{dim}" for factory in wanted))):
            continue
        flat = Flat(workload, dim)
        notebook.once(f"alone@{dim}", flat.figures, workload)
        for factory in wanted:
            bars.say(f"{workload.live:,} rows: {factory} at {dim}")
            notebook.once(f"{factory}@{dim}", measure, workload, factory, dim, flat, bars)
        del flat


def measure_default(workload: Workload, bars: Bars) -> dict[str, Any]:
    """Measure the default index."""
    dim = min(DIM, workload.rows.K)
    bars.say(f"{workload.live:,} rows: {DEFAULT_FACTORY} at {dim}")
    return measure(workload, DEFAULT_FACTORY, dim, Flat(workload, dim), bars)


def _exact(workload: Workload) -> dict[str, Any]:
    scan = batch_seconds(workload, lambda queries, t: exact_search(workload.rows, queries, 10, threads=t))
    return {"batch_seconds": scan}


def _workload(store: Store, queries: Queries, real: int, rounds: int) -> Workload:
    """Return the real queries and the rows left out of the store, with their answers unless `rounds` is 0."""
    stored = store.rows(LEVEL)
    others, kinds = left_out(stored, real)
    vectors = np.concatenate([fold(queries.vectors, stored.K), others])
    return Workload.of(store, LEVEL, vectors, [*queries.kinds, *kinds], rounds)


def _sizes_of(workload: Workload) -> dict[str, Any]:
    kinds = {kind: workload.kinds.count(kind) for kind in dict.fromkeys(workload.kinds)}
    return {"K": workload.rows.K, "row_type": workload.rows.row_type, "live": workload.live, "queries": kinds}


def _both_kinds(grown: Grown) -> dict[str, Any]:
    """Return the likeness of real and of synthetic rows, as many of the one as of the other."""
    live = np.flatnonzero(grown.rows.live_mask)
    real, drawn = live[live < grown.real][:FITTED_ROWS], live[live >= grown.real]
    same = np.random.default_rng(37).choice(drawn, min(len(real), len(drawn)), replace=False)
    return {"real": likeness(grown.rows, real[: len(same)]), "synthetic": likeness(grown.rows, same)}


def _open(options: argparse.Namespace, path: Path) -> Index:
    return Index.open(path, model=options.model, adapter=options.adapter, device="cpu")


def _queries(options: argparse.Namespace, path: Path, bars: Bars) -> Queries:
    index = _open(options, path)
    kept = options.work / f"queries-{index.store.id}.npz"
    return real_queries(index, options.queries, options.query_count, kept, bars)


def _source(options: argparse.Namespace, K: int) -> tuple[Path, str]:
    """Return the index and level of the first rows of a store of this K: token rows where they are long enough."""
    if options.token_index and Store.open(options.token_index).rows("token").K >= K:
        return options.token_index, "token"
    return options.index, LEVEL


def parse() -> argparse.Namespace:
    add = (options := parser(__doc__)).add_argument
    add("--index", type=Path, help="a finished index with sentence rows")
    add("--stage", choices=STAGES)
    add("--queries", type=Path, help="prompts and answers that the index does not hold")
    add("--query-count", type=int, default=50, help="of them; each is asked about in two ways")
    add("--token-index", type=Path, help="an index with token rows: they come first where their K does")
    add("--sizes", default="100000:65536,1000000:4096", help="rows:K,rows:K")
    add("--scans", default="100000:4096,1000000:4096", help="rows:K,rows:K of the stage `scan`")
    add("--factories", type=lambda text: tuple(text.split(";")), help="these alone, with ; between")
    add("--dims", default="16384,8192,4096", help="folds")
    add("--rounds", type=int, default=7, help="of timing, each with all methods in turn")
    add("--tracin-rows", type=int, default=64)
    add("--true-rows", type=int, default=200)
    add("-m", "--model", help="the model's folder, where it is not that of the build")
    add("-a", "--adapter")
    add("--keep", action="store_true", help="leave the synthetic stores on the disk")
    given = options.parse_args()
    if given.stage != "scan" and not (given.index and given.queries):
        options.error("--index and --queries are needed")
    if given.smoke:
        given.query_count, given.sizes, given.dims, given.rounds = 3, "240:1024", "1024", 1
        given.scans = "240:1024"
        given.factories, given.tracin_rows, given.true_rows = ("Flat", DEFAULT_FACTORY), 4, 8
    given.dims = tuple(map(int, given.dims.split(",")))
    for name in ("sizes", "scans"):
        setattr(given, name, [tuple(map(int, size.split(":"))) for size in getattr(given, name).split(",")])
    return given


if __name__ == "__main__":
    main()
