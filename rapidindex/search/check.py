"""Reads every byte of an index, FAISS's files included, says what is damaged, and repairs it."""

from pathlib import Path
from shlex import quote
from typing import Any

from rapidindex.errors import DamagedIndex, StoreError
from rapidindex.recipe import Recipe
from rapidindex.search.metadata import NAME, IndexMetadata
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Problem, Rows, Store
from rapidindex.store import check as check_store


def check(path: str | Path, *, repair: bool = False) -> list[Problem]:
    """Read all of the index at `path` and return its problems; with `repair`, mend them and return what they were.

    A damaged vector index is built anew from the stored rows. Raises as `store.check` does.
    """
    problems = check_store(path, repair=repair)
    try:
        store = Store.open(path)
        rows_of_levels = [store.rows(level) for level in store.levels]
    except StoreError:  # one of the problems: nothing can be said of what is built from the rows
        return problems
    problems += _problem_of_recipe(store)
    for rows in rows_of_levels:
        damage, options = _read(rows)
        if damage is not None:
            problems.append(Problem(f"{rows.level}/{NAME}", damage, _mend(path, repair)))
            if repair:
                with store.lock():
                    VectorIndex.build(store.rows(rows.level), **options)
    return problems


def _problem_of_recipe(store: Store) -> list[Problem]:
    """Return what is wrong with the options in a manifest that fits its checksum."""
    try:
        Recipe.from_manifest(store.config)
    except DamagedIndex as error:
        mend = f"delete it and type `rapidindex check {quote(str(store.path))} --repair`, which takes the shards' copy"
        return [Problem("manifest.json", error.message.replace("The manifest does", "does"), mend)]
    return []


def _read(rows: Rows) -> tuple[str | None, dict[str, Any]]:
    """Return what is wrong with a level's vector index, None where it is intact, and the options of its build."""
    options: dict[str, Any] = {}
    try:
        metadata = IndexMetadata.read(rows.path)
        if metadata is not None:
            options = metadata.options
            metadata.verify(rows.path)
    except DamagedIndex as error:
        reason = error.message.partition(" is damaged: ")[2].rstrip(".") or error.message.rstrip(".")
        return f"or the FAISS file that it names is damaged: {reason}", options
    return None, options


def _mend(path: str | Path, repair: bool) -> str:
    return "it was built anew" if repair else f"type `rapidindex check {quote(str(path))} --repair`"
