"""Adding data to an index, and taking examples out of it.

An index keeps the options, and the second moment, that it was built with, so added rows are as if they had been there
from the start: exactly so with --second-moment none, and otherwise up to that moment being the first data's own.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.caching.build import BuildSummary, cache_levels, check_fits, widen_levels
from rapidindex.caching.job import Job, left, prepare
from rapidindex.config import (
    BuildConfig,
    BuildRequest,
    EncodingConfig,
    GradientConfig,
    ModelConfig,
    SketchConfig,
    TokenConfig,
)
from rapidindex.data.examples import listed_ids
from rapidindex.errors import StoreError, UsageError
from rapidindex.progress import Progress, silent
from rapidindex.recipe import check_identity
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store


@dataclass(frozen=True)
class RemoveSummary:
    """What a removal did."""

    index: str
    removed: int
    """By this run."""
    examples: int
    """Left in the index."""


def add(
    path: str | Path,
    data: str,
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    work: BuildConfig | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> BuildSummary:
    """Cache the examples of `data` that the index at `path` lacks, as it was built; those removed before are back.

    `model` and `adapter` say where they lie now, if not where they were. Raises as `build` does, and StoreError where
    the index is not finished yet.
    """
    started = time.perf_counter()
    with Store.open(path).lock() as store:
        request = _request(store, data, ModelLocation(model, adapter, device), work or BuildConfig(), limit)
        job = prepare(request, progress)
        hint = "Say with -m and -a where the model and the adapter of the index lie now."
        built, asked = ({**config, "data": None, "token": None} for config in (store.config, job.identity))
        check_identity(built, asked, Path(path), hint=hint)
        job.items = [replace(item, source=data) for item in job.items]
        job.meet(store)
        check_fits(job, {level: left(job, level, store) for level in request.levels})
        _note_source(store, job)
        restored = store.restore(store.removed & {item.example.id for item in job.items})
        widen_levels(store, job)
        return cache_levels(store, job, started, progress, restored)


def remove(
    path: str | Path, *, ids: Sequence[str] = (), where: Sequence[str] = (), progress: Progress = silent
) -> RemoveSummary:
    """Take examples out of the index at `path`: those of `ids` (ids, or files with one a line), or those whose columns
    have the values of all of `where` (`COLUMN=VALUE`).

    StoreError where nothing is meant by them, naming what is unknown; nothing is removed then.
    """
    if bool(ids) == bool(where):
        raise UsageError(
            "Give either --ids or --where.", hint="For example: rapidindex remove INDEX --where source=web"
        )
    with Store.open(path).lock() as store:
        found = _meant(store, where) if where else listed_ids(ids)
        removed = store.remove(found)
        for level in store.levels:
            VectorIndex.update(store.rows(level), progress=progress)
        left_over = {id for level in store.levels for id in store.rows(level).ids} - store.removed
    return RemoveSummary(str(path), removed, len(left_over))


@dataclass(frozen=True)
class ModelLocation:
    """Where a model and an adapter lie now, None for where they were, and where to compute."""

    model: str | None
    adapter: str | None
    device: str


def _request(store: Store, data: str, place: ModelLocation, work: BuildConfig, limit: int | None) -> BuildRequest:
    """What would build the index at `store` from other data."""
    config = store.config
    encoding = {name: value for name, value in config["encoding"].items() if name != "fingerprint"}
    return BuildRequest(
        data=data,
        output=str(store.path),
        model=ModelConfig(
            place.model or config["model"]["path"],
            place.adapter or config["adapter"]["path"],
            config["quantize"],
            config["dtype"],
            place.device,
        ),
        encoding=EncodingConfig(**encoding),
        gradient=GradientConfig(**config["gradient"]),
        sketch=SketchConfig(**config["sketch"]),
        work=work,
        limit=limit,
        levels=_whole_levels(store),
        token=TokenConfig(**config.get("token", {})),
    )


def _whole_levels(store: Store) -> tuple[str, ...]:
    """The levels that hold all examples: not the tokens of listed ones."""
    levels = tuple(level for level in store.levels if level != "token" or store.config["tokens_of"] == "all")
    if not levels:
        raise StoreError(
            f"{store.path} holds the tokens of listed examples only: nothing can be added to it.",
            hint="Type its rapidindex build command with --level both first.",
        )
    return levels


def _note_source(store: Store, job: Job) -> None:
    """List the data among the index's sources, unless it is one of them. StoreError where another is not finished."""
    config, found = store.config, job.identity["data"]
    sources = [config["data"], *config.get("added", [])]
    if any(source["fingerprint"] == found["fingerprint"] for source in sources):
        return
    levels = job.request.levels
    if not all(map(store.complete, levels)):
        last = sources[-1]["path"]
        command = f"rapidindex add {store.path} {last}" if len(sources) > 1 else "its rapidindex build command"
        raise StoreError(
            f"{store.path} does not hold all of {last} yet.", hint=f"Finish that first: give {command} again."
        )
    added = {**found, "examples": len(left(job, levels[0], store))}
    skipped = [{**row, "source": found["path"]} for row in job.skipped]
    store.update_config({"added": [*sources[1:], added]}, skipped=[*store.skipped, *skipped])


def _meant(store: Store, where: Sequence[str]) -> set[str]:
    """Ids of the live examples whose columns have these values."""
    wanted = dict(_condition(text) for text in where)
    columns: dict[str, set[str]] = {}
    found = set()
    for id, meta in _columns(store):
        for name, value in meta.items():
            columns.setdefault(name, set()).add(_as_text(value))
        if all(name in meta and _as_text(meta[name]) == value for name, value in wanted.items()):
            found.add(id)
    if found:
        return found
    for name in wanted:
        if name not in columns:
            known = ", ".join(sorted(columns)) or "none"
            raise StoreError(f"No example has a column {name!r}.", hint=f"Columns: {known}.")
    some = {name: ", ".join(sorted(columns[name])[:5]) for name in wanted}
    told = "; ".join(f"{name}: {values}" for name, values in some.items())
    raise StoreError(f"No example has {' and '.join(where)}.", hint=f"Values there, among others: {told}.")


def _columns(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each live example's id and columns, whatever level it is in."""
    seen = set(store.removed)
    for level in store.levels:
        rows = store.rows(level)
        for number, id in enumerate(rows.ids):
            if id not in seen:
                seen.add(id)
                yield id, rows.record(number)["meta"]


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--where {text!r} is no condition.", hint="Write it as COLUMN=VALUE.")
    return name, value


def _as_text(value: Any) -> str:
    """A column's value as it is typed: `true`, `7`, `null`, or the text itself."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
