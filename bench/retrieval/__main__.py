"""Is retrieval as a vector search far ahead of scanning, and does it find the same?

    python -m bench.retrieval --index INDEX --work FOLDER [--stage real|synthetic|tracin|rows] [--keep]

    real       the rows of INDEX: every factory over several folds, beside the exact scan and FAISS's Flat
    synthetic  the same over more rows than there are: real ones first, then ones drawn to be like them (synthetic.py)
    tracin     a whole retrieval beside TracIn, which computes every training gradient again (on a part, multiplied up)
    rows       how few bytes keep the answers, and the order of the true influence

All stages in this order without --stage. INDEX is only read: indexes are built over hard links in FOLDER. A stage that
was stopped goes on where it was: what a configuration gave is kept in FOLDER. Measure alone, on an idle machine.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import save
from bench.retrieval.measure import THREADS, Bed, Flat, baselines, batches, fits, measure, pin
from bench.retrieval.queries import Queries, real_queries
from bench.retrieval.rows import smallest_row
from bench.retrieval.stores import LEVEL, Grown, left_out, linked
from bench.retrieval.synthetic import FITTED_ROWS, likeness
from bench.retrieval.tracin import against_tracin, query_batches
from rapidindex import Index
from rapidindex.progress import Bars
from rapidindex.search.exact import exact_search
from rapidindex.search.vector_index import DEFAULT_FACTORY, DIM, fold
from rapidindex.store import Store

STAGES = ("real", "synthetic", "tracin", "rows")
DIMS = (16_384, 8192, 4096)
STEPS = (10, 4, 2)
"""A store that grows is measured, the default index alone, at these parts of its size, too."""


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    pin(max(THREADS))
    stages: dict[str, Callable[[argparse.Namespace, Bars], Any]] = {
        "real": real,
        "synthetic": synthetic,
        "tracin": tracin,
        "rows": rows,
    }
    with Bars() as bars:
        for stage in [options.stage] if options.stage else STAGES:
            stages[stage](options, bars)


class Notebook:
    """Figures by name, each kept in a file as soon as it is known; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self.figures:
            self.figures[name] = work()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.figures))
            part.rename(self.path)
        return self.figures[name]


def real(options: argparse.Namespace, bars: Bars) -> None:
    """Every factory over the index's own rows."""
    queries = _queries(options, options.index, bars)
    store = linked(options.index, options.work / "real", LEVEL)
    notebook = Notebook(options.work / "real.json")
    bed = _bed(store, queries, len(store.rows(LEVEL)), options.rounds)
    everything(bed, options, notebook, bars)
    bars.say(f"written to {save('retrieval_real', {'real': len(bed.rows), **_about(bed), **notebook.figures})}")


def synthetic(options: argparse.Namespace, bars: Bars) -> None:
    """Every factory over larger stores, and the default one while they grow."""
    for size, K in options.sizes:
        name = f"{size}-{K}"
        path, level = _source(options, K)
        queries, source = _queries(options, path, bars), Store.open(path).rows(level)
        grown = Grown(options.work / name, K, source, size)
        notebook = Notebook(options.work / f"{name}.json")
        for part in sorted({size // step for step in STEPS if size // step > 1.2 * grown.real}):
            if f"at {part}" not in notebook.figures and np.count_nonzero(grown.rows.live_mask) <= part:  # it only grows
                grown.grow(part)
                bed = _bed(grown.store, queries, grown.real, options.rounds)
                notebook.once(f"at {part}", lambda bed=bed: alone(bed, bars))
        bars.say(f"write {size:,} rows of {K:,}")
        grown.grow(size)
        notebook.once("likeness", lambda grown=grown: _both_kinds(grown))
        bars.say(json.dumps(notebook.figures["likeness"], indent=1))
        bed = _bed(grown.store, queries, grown.real, options.rounds)
        everything(bed, options, notebook, bars)
        about = {"real": grown.real, "real_level": level, **_about(bed)}
        bars.say(f"written to {save(f'retrieval_{size}', about | notebook.figures)}")
        del bed
        if not options.keep:
            Store.destroy(options.work / name)


def tracin(options: argparse.Namespace, bars: Bars) -> None:
    """A whole retrieval beside TracIn."""
    index = Index.open(options.index, model=options.model, adapter=options.adapter, device="cpu")
    figures = against_tracin(index, options.queries, options.tracin_rows, bars)
    bars.say(f"written to {save('retrieval_tracin', figures)}")


def rows(options: argparse.Namespace, bars: Bars) -> None:
    """The smallest row."""
    queries = _queries(options, options.index, bars)
    store = linked(options.index, options.work / "real", LEVEL)
    bed = _bed(store, queries, len(store.rows(LEVEL)), 0, answers=False)
    index = Index.open(options.index, model=options.model, adapter=options.adapter, device="cpu")
    asked = query_batches(index, options.queries, min(10, len(queries.kinds)))
    figures = smallest_row(index, bed.rows, bed.queries, bed.kinds, asked, options.true_rows, bars)
    bars.say(f"written to {save('retrieval_rows', figures)}")


def everything(bed: Bed, options: argparse.Namespace, notebook: Notebook, bars: Bars) -> None:
    """All factories over all folds; what has no room in memory is named."""
    notebook.once("exact", lambda: _exact(bed))
    lists = max(2, int(bed.live**0.5))
    factories = options.factories or (
        "Flat",
        DEFAULT_FACTORY,
        "RaBitQ",
        f"IVF{lists},Flat",
        f"IVF{lists},SQ8",
        "SQ8",
        "HNSW32",
    )
    for dim in [dim for dim in options.dims if dim <= bed.rows.K]:
        wanted = [factory for factory in factories if fits(bed, factory, dim)]
        notebook.figures[f"no room at {dim}"] = sorted(set(factories) - set(wanted))
        if all(f"{factory}@{dim}" in notebook.figures for factory in (*wanted, "alone")):
            continue
        flat = Flat(bed, dim, int(0.4 * bed.room()))
        notebook.once(f"alone@{dim}", lambda dim=dim, flat=flat: baselines(bed, dim, flat))
        for factory in wanted:
            bars.say(f"{bed.live:,} rows: {factory} at {dim}")
            notebook.once(
                f"{factory}@{dim}", lambda factory=factory, dim=dim, flat=flat: measure(bed, factory, dim, flat, bars)
            )
        del flat


def alone(bed: Bed, bars: Bars) -> dict[str, Any]:
    """The default index."""
    dim = min(DIM, bed.rows.K)
    bars.say(f"{bed.live:,} rows: {DEFAULT_FACTORY} at {dim}")
    return measure(bed, DEFAULT_FACTORY, dim, Flat(bed, dim, int(0.4 * bed.room())), bars)


def _exact(bed: Bed) -> dict[str, Any]:
    return {"batch_seconds": batches(bed, lambda queries, t: exact_search(bed.rows, queries, 10, threads=t))}


def _bed(store: Store, queries: Queries, real: int, rounds: int, *, answers: bool = True) -> Bed:
    """The real queries and the rows left out of the store, with their answers."""
    stored = store.rows(LEVEL)
    others, kinds = left_out(stored, real)
    asked = np.concatenate([fold(queries.vectors, stored.K), others])
    kinds = [*queries.kinds, *kinds]
    return Bed.of(store, LEVEL, asked, kinds, rounds) if answers else Bed(store, stored, asked, kinds, {}, rounds)


def _about(bed: Bed) -> dict[str, Any]:
    return {
        "K": bed.rows.K,
        "row_type": bed.rows.row_type,
        "live": bed.live,
        "queries": {kind: bed.kinds.count(kind) for kind in set(bed.kinds)},
    }


def _both_kinds(grown: Grown) -> dict[str, Any]:
    """Real and synthetic rows side by side, as many of the one as of the other."""
    live = np.flatnonzero(grown.rows.live_mask)
    real, drawn = live[live < grown.real][:FITTED_ROWS], live[live >= grown.real]
    same = np.random.default_rng(37).choice(drawn, min(len(real), len(drawn)), replace=False)
    return {"real": likeness(grown.rows, real[: len(same)]), "synthetic": likeness(grown.rows, same)}


def _queries(options: argparse.Namespace, path: Path, bars: Bars) -> Queries:
    index = Index.open(path, model=options.model, adapter=options.adapter, device="cpu")
    kept = options.work / f"queries-{index.store.id}.npz"
    return real_queries(index, options.queries, options.query_count, kept, bars)


def _source(options: argparse.Namespace, K: int) -> tuple[Path, str]:
    """The index, and the level, whose rows come first in a store of this K: token rows where they are long enough."""
    if options.token_index and Store.open(options.token_index).rows("token").K >= K:
        return options.token_index, "token"
    return options.index, LEVEL


def _sizes(text: str) -> list[tuple[int, int]]:
    return [(int(size), int(K)) for size, K in (part.split(":") for part in text.split(","))]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="a finished index with sentence rows")
    parser.add_argument("--work", type=Path, required=True, help="where stores and partial figures are kept")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--queries", type=Path, required=True, help="prompts and answers that the index does not hold")
    parser.add_argument("--query-count", type=int, default=50, help="of them; each is asked about in two ways")
    parser.add_argument("--token-index", type=Path, help="an index with token rows: they come first where their K does")
    parser.add_argument("--sizes", type=_sizes, default=_sizes("100000:65536,1000000:4096"), help="rows:K,rows:K")
    parser.add_argument("--factories", type=lambda text: tuple(text.split(";")), help="these alone, with ; between")
    parser.add_argument("--dims", type=lambda text: tuple(map(int, text.split(","))), default=DIMS, help="folds")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, each with all ways in turn")
    parser.add_argument("--tracin-rows", type=int, default=64)
    parser.add_argument("--true-rows", type=int, default=200)
    parser.add_argument("-m", "--model", help="the model's folder, where it is not that of the build")
    parser.add_argument("-a", "--adapter")
    parser.add_argument("--keep", action="store_true", help="leave the synthetic stores on the disk")
    return parser.parse_args()


if __name__ == "__main__":
    main()
