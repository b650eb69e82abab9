"""Adding data to an index, and taking examples out of it.

An index keeps the recipe and the second moment that it was built with. Building from A and adding B gives the rows of
building from A and B: exactly with --second-moment none, and otherwise but for the second moment, which stays that of
A.
"""

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.caching.build import BuildSummary, cache_levels
from rapidindex.caching.estimate import check_resources, free_resources, resources_of
from rapidindex.caching.job import Job, LevelPlan, check_tokens, plan_levels, prepare, same_day
from rapidindex.caching.moment import refuse_without_second_moment
from rapidindex.config import BuildConfig, BuildRequest, EncoderConfig, TokenConfig
from rapidindex.data.examples import listed_ids
from rapidindex.errors import StoreError, UsageError
from rapidindex.progress import Progress, silent
from rapidindex.recipe import Recipe, Source
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store


@dataclass(frozen=True)
class RemoveSummary:
    """What a removal did."""

    index: str
    removed: int
    """Examples that this run took out."""
    examples: int
    """Examples left in the index."""


def add(
    path: str | Path,
    data: Any,
    *,
    model: Any = None,
    adapter: str | None = None,
    encoder: str | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    work: BuildConfig | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> BuildSummary:
    """Cache the examples of `data` that the index at `path` lacks, by the index's own recipe.

    `data` is what `BuildRequest.data` may be. `model` and `adapter` are new places of the index's model, or `model` is
    a loaded model with its `tokenizer`; `encoder` is the new place of the encoder of an index of embeddings. Examples
    that were removed, and are in the data, come back. Raises as `build` does, and StoreError where the index is not
    finished yet.
    """
    started = time.perf_counter()
    with Store.open(path).lock() as store:
        recipe = Recipe.from_manifest(store.config)
        refuse_without_second_moment(store, recipe)
        if recipe.encoder is not None:
            model = EncoderConfig(encoder or recipe.encoder.path, device)
        elif model is None or isinstance(model, str | Path):
            model = recipe.model_config(model=model and str(model), adapter=adapter, device=device)
        request = BuildRequest(
            data=data,
            output=str(store.path),
            model=model,
            encoding=recipe.encoding,
            gradient=recipe.gradient,
            sketch=recipe.sketch,
            work=work or BuildConfig(),
            limit=limit,
            levels=_whole_levels(store, recipe),
            token=recipe.token or TokenConfig(),
            tokenizer=tokenizer,
        )
        job = prepare(same_day(request, store), progress, added=True)
        hint = "Say with -m and -a (or --encoder) where the model and the adapter of the index lie now."
        recipe.check(replace(job.recipe, data=recipe.data, token=recipe.token, task=recipe.task), Path(path), hint=hint)
        check_tokens(job, store)
        plans = plan_levels(job, store)
        check_resources(resources_of(job, plans, store), free_resources(job), request.output)
        _note_source(store, recipe, job, plans)
        restored = store.restore(store.removed & {item.example.id for item in job.items})
        return cache_levels(store, job, plans, started, progress, restored)


def remove(
    path: str | Path, *, ids: Sequence[str] = (), where: Sequence[str] = (), progress: Progress = silent
) -> RemoveSummary:
    """Take examples out of the index at `path`.

    They are those of `ids` (ids, or files with one a line), or those whose columns have the values of all of `where`
    (`COLUMN=VALUE`). StoreError where no example fits, or an id is unknown; nothing is removed then.
    """
    if bool(ids) == bool(where):
        raise UsageError(
            "Give either --ids or --where.", hint="For example: rapidindex remove INDEX --where source=web"
        )
    with Store.open(path).lock() as store:
        removed = store.remove(_matching(store, where) if where else listed_ids(ids))
        for level in store.levels:
            VectorIndex.update(store.rows(level), progress=progress)
        remaining = {id for level in store.levels for id in store.rows(level).ids} - store.removed
    return RemoveSummary(str(path), removed, len(remaining))


def _whole_levels(store: Store, recipe: Recipe) -> tuple[str, ...]:
    """Return the levels that hold all examples: not the tokens of listed ones."""
    levels = tuple(level for level in store.levels if level != "token" or recipe.tokens_of == "all")
    if not levels:
        raise StoreError(
            f"{store.path} holds the tokens of listed examples only: nothing can be added to it.",
            hint="Type its rapidindex build command with --level both first.",
        )
    return levels


def _note_source(store: Store, recipe: Recipe, job: Job, plans: list[LevelPlan]) -> None:
    """List the data among the index's sources, unless it is one of them. StoreError where another is not finished."""
    data = job.recipe.data
    sources = (recipe.data, *recipe.added)
    if any(source.fingerprint == data.fingerprint for source in sources):
        return
    if not all(map(store.complete, job.request.levels)):
        last = sources[-1].path
        add = shlex.join(["rapidindex", "add", str(store.path), last])
        command = add if recipe.added else "its rapidindex build command"
        raise StoreError(
            f"{store.path} does not hold all of {last} yet.", hint=f"Finish that first: give {command} again."
        )
    added = Source(data.path, data.fingerprint, len(plans[0].examples))
    skipped = [{**row, "source": data.path} for row in job.skipped]
    config = replace(recipe, added=(*recipe.added, added)).to_manifest()
    store.update_config(config, skipped=[*store.skipped, *skipped])


def _matching(store: Store, where: Sequence[str]) -> set[str]:
    """Return the ids of the live examples whose columns have these values."""
    wanted = [_condition(text) for text in where]
    columns: dict[str, set[str]] = {}
    ids = set()
    for id, meta in _columns(store):
        for name, value in meta.items():
            columns.setdefault(name, set()).add(_as_text(value))
        if all(name in meta and _as_text(meta[name]) == value for name, value in wanted):
            ids.add(id)
    if ids:
        return ids
    for name, _ in wanted:
        if name not in columns:
            known = ", ".join(sorted(columns)) or "none"
            raise StoreError(f"No example has a column {name!r}.", hint=f"Columns: {known}.")
    values = "; ".join(f"{name}: {', '.join(sorted(columns[name])[:5])}" for name in dict(wanted))
    raise StoreError(f"No example has {' and '.join(where)}.", hint=f"Values there, among others: {values}.")


def _columns(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the id and the columns of each live example, whatever level it is on."""
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
    """Return a column's value as it is typed: `true`, `7`, `null`, or the text itself."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
