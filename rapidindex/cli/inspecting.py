"""The commands that describe, check and rebuild what an index holds."""

import json
from dataclasses import replace
from typing import Annotated

import typer

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import echo, echo_json, print_plain
from rapidindex.config import DIM, TARGET_RECALL, check_level
from rapidindex.views.tables import checkpoints_tables, info_tables


@command(
    "Keep",
    "rapidindex info index",
)
def info(path: opt.IndexPath, as_json: opt.Json = False) -> None:
    """Say what an index holds and how it was built."""
    from rapidindex.query.index import Index

    found = Index.open(path).info()
    if "checkpoints" not in found:
        print_plain(found, as_json, info_tables(found))
        return
    print_plain(found, as_json, checkpoints_tables(found))
    for one in () if as_json else found["checkpoints"].values():
        print_plain(one, False, info_tables(one))


@command(
    "Keep",
    "rapidindex check index --repair",
)
def check(
    path: opt.IndexPath,
    repair: Annotated[
        bool, opt.in_output("--repair", help="Move what is damaged aside, so that the build can make it anew.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Read every byte of an index and say what is damaged, and how to mend it."""
    from rapidindex.search.check import check as run
    from rapidindex.store import indexes_at

    problems = [
        replace(problem, where=(one / problem.where).relative_to(path).as_posix())
        for one in indexes_at(path)
        for problem in run(one, repair=repair)
    ]
    if as_json:
        echo_json(json.dumps([vars(problem) for problem in problems], default=str, indent=2))
    elif not problems:
        echo(f"{path}: all files are as they were written.")
    for problem in () if as_json else problems:
        echo(f"{problem.where} {problem.what.rstrip('.')}: {problem.mend.rstrip('.')}.")
    if problems and not repair:
        raise typer.Exit(1)


@command(
    "Keep",
    'rapidindex index index --factory "HR,RaBitQ"',
)
def index(
    path: opt.IndexPath,
    factory: Annotated[
        str | None,
        opt.in_search(
            help='FAISS factory such as Flat or "HR,RaBitQ", or exact: no index, an exhaustive search.',
            show_default="by size",
        ),
    ] = None,
    dim: Annotated[int, opt.in_search(help="Length of the folded rows; divides K.")] = DIM,
    target_recall: Annotated[float, opt.in_search(help="Recall@10 to reach.")] = TARGET_RECALL,
    level: Annotated[
        str | None,
        opt.in_search(
            **opt.values("sentence", "token"),
            help="Of whole examples (sentence) or tokens (token).",
            show_default="all",
        ),
    ] = None,
    gpu: Annotated[bool, opt.in_search("--gpu", help="Build on the GPU (flat and IVF).")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rebuild the search index from the stored RapidGrads."""
    check_level(level)

    from rapidindex.progress import Bars
    from rapidindex.search.vector_index import VectorIndex
    from rapidindex.store import Store, indexes_at

    described, tables = {}, {}
    for one in indexes_at(path):
        store, at = Store.open(one), "" if one == path else f" at {one.name}"
        with store.lock(), Bars(quiet=quiet) as bars:
            options = {"factory": factory, "dim": dim, "target_recall": target_recall, "gpu": gpu, "progress": bars}
            for name in [level] if level else store.levels:
                card = VectorIndex.build(store.rows(name), **options).describe()
                described[f"{name}{at}"] = tables[f"Search index of {name}s{at}"] = card
    print_plain(described, as_json, tables)
