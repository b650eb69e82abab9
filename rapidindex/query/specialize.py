"""Specialize an index for a task: a new index whose rows, and whose queries', were multiplied by R^-1/2.

    queries of the task ──model──> their rows ─┐
    INDEX, its rows ───────────────────────────┴─> R = λ R_eval + (1 - λ) R_train ──> roots, kept in INDEX2
    INDEX, its rows ──× R^-1/2, to length 1──> INDEX2, shard by shard

As in TrackStar (arXiv 2410.17413, section 3); the mathematics is in `gradients/curvature.py`. INDEX2 is an index like
any other, with the roots in its second moment's file: its compressor applies them to queries, to rows that are added,
and in heat-maps.
Memory holds K · block entries and a portion of rows. Given again, the same call goes on where it stopped.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from rapidindex.config import QueryOptions, SpecializeOptions, fingerprint
from rapidindex.errors import ConfigMismatch, ResourceError, StoreError, UsageError
from rapidindex.gradients.curvature import (
    Curvature,
    block_of,
    mean_outer_products,
    spectrum,
    spectrum_of_rows,
    take_inverse_root,
    weight_at,
)
from rapidindex.model.outputs import check_room
from rapidindex.progress import Progress, silent
from rapidindex.query.anchors import encode_file
from rapidindex.query.encode import stack_rows
from rapidindex.query.index import Index
from rapidindex.query.questions import Query, read_queries
from rapidindex.recipe import Recipe, Source, Task
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Rows, ShardContent, Store, decode_rows

ROWS_PER_ENTRY = 5
"""Rows that a block wants for each of its entries: with fewer, R is mostly noise, and its root makes that large."""
LARGEST_BLOCK = 4096
"""Entries of a block by default, at most: those of the paper's 16 blocks. One takes 64 MiB, and its eigenvectors half a
minute of two cores."""
PAPERS_COMPONENT, PAPERS_K = 1000, 65_536
_PORTION_BYTES = 32 * 2**20


@dataclass(frozen=True)
class SpecializeSummary:
    """What an index was specialized for, and how."""

    index: str
    source: str
    examples: int
    rows: int
    queries: int
    """Queries of the task."""
    K: int
    block: int
    """Entries of a block of R."""
    weight: float
    """λ."""
    component: int | None
    """The component at which the spectra cross; None where the weight was given."""
    damping: float
    seconds: float
    already_there: bool

    @property
    def fewest_rows(self) -> int:
        """Rows that blocks of this size want."""
        return ROWS_PER_ENTRY * self.block


def specialize(
    index: str | Path,
    queries: str | Path,
    output: str | Path,
    options: SpecializeOptions | None = None,
    *,
    model: Any = None,
    adapter: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> SpecializeSummary:
    """Write to `output` the index `index`, specialized for the task whose queries `queries` holds, a JSONL file.

    Raises UsageError for an index that cannot be specialized, DataError, naming the line, for a query that cannot be
    answered, ConfigMismatch where `output` was specialized otherwise, ResourceError where memory or disk is too small,
    and StoreError.
    """
    started, options = time.perf_counter(), options or SpecializeOptions()
    source, asked = Index.open(index, model=model, adapter=adapter, device=device), read_queries(queries)
    level = options.level or source.store.levels[0]
    _refuse(source, level, Path(output))
    recipe = _recipe(source, level, queries, len(asked), options)
    target = None if overwrite or not Store.exists(output) else Store.open(output)
    if target is None or target.roots() is None:
        _check_room(source.rows_of(level), recipe.task.block, Path(output))
    if target is not None:
        recipe = _recorded(Recipe.from_manifest(target.config), recipe, target)
    there = target is not None and target.complete(level) and target.roots() is not None
    if not there:
        if target is None or target.roots() is None:
            task_rows = _task_rows(source, level, queries, asked, progress)
            target = target or _create(source, level, recipe, Path(output), overwrite)
        with target.lock():
            if target.roots() is None:
                recipe = _write_roots(source, level, recipe, task_rows, target, progress)
            _write_rows(source, level, target, progress)
            VectorIndex.update(target.rows(level), progress=progress)
    rows, task = target.rows(level), recipe.task
    return SpecializeSummary(
        index=str(output),
        source=str(index),
        examples=len(rows.live_examples),
        rows=int(rows.live_mask.sum()),
        queries=len(asked),
        K=rows.K,
        block=task.block,
        weight=task.weight,
        component=task.component,
        damping=task.damping,
        seconds=time.perf_counter() - started,
        already_there=there,
    )


def _refuse(source: Index, level: str, output: Path) -> None:
    """Raise where `source` cannot be specialized, or `output` cannot hold the new index."""
    store, recipe = source.store, source.recipe
    if recipe.encoder is not None:
        raise UsageError(
            f"{store.path} is an index of embeddings: only gradients have a curvature.",
            hint="Specialize the index that its encoder was distilled from.",
        )
    if recipe.task is not None:
        raise UsageError(
            f"{store.path} is specialized already.",
            hint=f"Specialize {recipe.task.index.path}, which it was made from.",
        )
    if output.resolve() == store.path.resolve():
        raise UsageError("-o is the index itself.", hint="Give the specialized index a folder of its own.")
    rows = source.rows_of(level)
    if not store.complete(level) or not rows.live_mask.any():
        raise StoreError(
            f"{store.path} holds the {level} rows of {len(rows.ids):,} of {store.planned(level):,} examples.",
            hint="Give its rapidindex build command again first.",
        )
    store.refuse_lost_moment()
    if output.exists() and not Store.exists(output) and (not output.is_dir() or any(output.iterdir())):
        raise StoreError(f"{output} is there, and is no index.", hint="Give -o a new folder.")


def _recipe(source: Index, level: str, queries: str | Path, n: int, options: SpecializeOptions) -> Recipe:
    """Return the recipe of the new index, whose weight is not known yet unless it was given.

    Rows of length 1 no longer say how long a gradient was: those of `--normalize none` become those of `unit`.
    """
    store, recipe, K = source.store, source.recipe, source.rows_of(level).K
    blocks = len(source.blocks(level)) if recipe.sketch.projection == "two-sided" else 1
    fits = max(16, min(LARGEST_BLOCK, int(source.rows_of(level).live_mask.sum()) // ROWS_PER_ENTRY))
    block = block_of(K, blocks, options.block or fits)
    component = None
    if options.weight is None:
        spanned = min(n, block) * (K // block)
        component = options.component or max(1, min(PAPERS_COMPONENT * K // PAPERS_K, spanned // 2))
    origin = Source(str(store.path.resolve()), fingerprint([store.manifest, sorted(store.removed)]))
    of = Source(str(Path(queries).resolve()), fingerprint(Path(queries).read_text(encoding="utf-8-sig")))
    normalize = "unit" if recipe.gradient.normalize == "none" else recipe.gradient.normalize
    return replace(
        recipe,
        gradient=replace(recipe.gradient, normalize=normalize),
        token=recipe.token if level == "token" else None,
        tokens_of=recipe.tokens_of if level == "token" else None,
        task=Task(origin, of, block, options.damping, component, options.weight),
    )


def _recorded(built: Recipe, wanted: Recipe, target: Store) -> Recipe:
    """Return the recipe of an index that is there. ConfigMismatch where it is not the one that is wanted."""
    if built.task is None:
        raise ConfigMismatch(
            f"{target.path} is another index.", hint="Give another -o, or --overwrite to put this one in its place."
        )
    weight = built.task.weight if wanted.task.component is not None else wanted.task.weight
    wanted = replace(wanted, task=replace(wanted.task, weight=weight), added=built.added)
    if built.task.index.fingerprint != wanted.task.index.fingerprint:
        raise ConfigMismatch(
            f"{wanted.task.index.path} is not what it was when {target.path} was made of it.",
            hint="Add --overwrite to make it anew.",
        )
    built.check(wanted, target.path)
    return wanted


def _task_rows(
    source: Index, level: str, file: str | Path, asked: dict[int, Query], progress: Progress
) -> torch.Tensor:
    encoded = encode_file(source, file, asked, progress, QueryOptions(level=level))
    return torch.from_numpy(stack_rows(encoded))


def _create(source: Index, level: str, recipe: Recipe, output: Path, overwrite: bool) -> Store:
    if overwrite and Store.exists(output):
        Store.destroy(output)
    store, rows = source.store, source.rows_of(level)
    return Store.create(
        output,
        config=recipe.to_manifest(),
        layers=store.layers,
        versions=store.manifest["versions"],
        skipped=store.skipped,
        planned={level: (rows.K, len(rows.live_examples))},
    )


def _write_roots(
    source: Index, level: str, recipe: Recipe, task_rows: torch.Tensor, target: Store, progress: Progress
) -> Recipe:
    """Compute R^-1/2 and write it beside the second moment; return the recipe with λ, which is recorded first."""
    rows, task = source.rows_of(level), recipe.task
    R = mean_outer_products(_batches(rows, progress), rows.K, task.block)
    weight = task.weight
    if weight is None:
        progress("spectra", 0, 1)
        weight = weight_at(task.component, spectrum(R), spectrum_of_rows(task_rows, task.block))
        progress("spectra", 1, 1)
    recipe = replace(recipe, task=replace(task, weight=weight))
    target.update_config(recipe.to_manifest())
    for number in take_inverse_root(R, task_rows, weight, task.damping):
        progress("roots", number + 1, len(R))
    target.copy_moment(source.store, roots=R.flatten(0, 1).numpy())
    return recipe


def _batches(rows: Rows, progress: Progress) -> Iterator[torch.Tensor]:
    """Yield the live rows, float32, a portion at a time."""
    for first, entries, scale in rows.blocks(_portion(rows)):
        progress("curvature of the rows", first, len(rows))
        live = rows.live_mask[first : first + len(entries)]
        yield torch.from_numpy(decode_rows(entries[live], scale[live]))
    progress("curvature of the rows", len(rows), len(rows))


def _write_rows(source: Index, level: str, target: Store, progress: Progress) -> None:
    """Write the rows of the examples that `target` lacks, a shard for each portion."""
    rows, done = source.rows_of(level), target.rows(level).done_ids
    curvature = Curvature.of(target.roots())
    free = source.recipe.gradient.normalize == "none"
    missing = rows.live_mask & np.array([id not in done for id in rows.ids], bool)[rows.example]
    numbers = np.flatnonzero(missing)
    for first, last in _portions(rows.example[numbers], _portion(rows)):
        progress("rows", first, len(numbers))
        content = _specialized(rows, numbers[first:last], curvature, free=free)
        into = target.rows(level)
        target.record_shard(level, into.write_shard(into.next_number(), content))
    progress("rows", len(numbers), len(numbers))


def _specialized(rows: Rows, numbers: np.ndarray, curvature: Curvature, *, free: bool) -> ShardContent:
    """Return the shard of these rows. Norms are multiplied by the length that R^-1/2 gave a row of length 1.

    Rows that are `free` have the length of their gradient.
    """
    norms = rows.norms(numbers)
    product, lengths = curvature(torch.from_numpy(rows.take(numbers)))
    whole = np.linalg.norm(norms, axis=1) if free else np.ones(len(norms), np.float32)
    norms *= (lengths.numpy() / np.where(whole > 0, whole, 1))[:, None]
    examples, places = np.unique(rows.example[numbers], return_inverse=True)
    return ShardContent(
        rows=product.numpy(),
        norms=norms,
        example=places,
        position=rows.position[numbers],
        token=rows.token[numbers],
        examples=[rows.record(int(number)) for number in examples],
    )


def _portion(rows: Rows) -> int:
    return max(1, _PORTION_BYTES // rows.K)


def _portions(examples: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of portions of about `size` rows, which part no example's rows."""
    first = 0
    while first < len(examples):
        last = min(first + size, len(examples))
        while last < len(examples) and examples[last] == examples[last - 1]:
            last += 1
        yield first, last
        first = last


def _check_room(rows: Rows, block: int, output: Path) -> None:
    """Raise ResourceError where memory for R, or the disk for the new index, is too small."""
    roots = 4 * rows.K * block
    memory = roots + 40 * block**2 + 16 * _PORTION_BYTES
    free = psutil.virtual_memory().available
    if memory > free:
        raise ResourceError(
            f"R takes {memory / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB is free.",
            hint=f"Give a smaller --block, such as {block // 4}.",
        )
    disk = roots + int(rows.live_mask.sum()) * (rows.K + 4 * (rows.layers + 4))
    folder = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    check_room(folder, disk, "Specializing")
