"""The scores that users get: an index built by the package, asked through its own queries, exactly and through FAISS.

The package computes the queries' gradients from prompt, answer and word; nothing of `cached.py` is used. Scores are
arrays [queries, examples]. Rows that a query did not return have a value between its best and its worst matches, which
no count of the first or last k sees.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.evidence.sketched import Scores
from bench.evidence.tasks import TaskQuery
from rapidindex import Index, Query
from rapidindex.caching.build import build
from rapidindex.config import (
    BuildRequest,
    DistillConfig,
    EncoderConfig,
    EncodingConfig,
    GradientConfig,
    ModelConfig,
    SketchConfig,
)
from rapidindex.encoder.distill import distill
from rapidindex.encoder.parts import LEAST
from rapidindex.progress import Progress
from rapidindex.query.two_stages import CANDIDATES
from rapidindex.search.vector_index import DEFAULT_FACTORY, VectorIndex

RECIPES = {
    "estimate": {"second_moment": "estimate"},
    "paper": {"normalize": "layer", "second_moment": "none"},
    "kronecker": {"second_moment": "kronecker"},
    "kronecker 16": {"second_moment": "kronecker", "moment_examples": 16},
    "kfac": {"second_moment": "kfac"},
    "two-sided factored": {"second_moment": "factored"},
    "two-sided kfac": {"second_moment": "kfac"},
    "two-sided none": {"second_moment": "none"},
}
"""A build's options; two-sided rows by the name."""
ANN_TOP = 10
"""Matches asked for through FAISS: of so few rows, more would be scanned exactly."""
RESCORED_QUERIES = 10
"""Questions about a word of each group that are asked as users ask them, with forty heat-maps each."""


def recipe_names(text: str) -> tuple[str, ...]:
    """Read names of `RECIPES` with commas between them, for a command line."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose among {', '.join(RECIPES)}")
    return names


def product_scores(
    data: str,
    model: ModelConfig,
    encoding: EncodingConfig,
    queries: Sequence[TaskQuery],
    folder: Path,
    *,
    recipe: str,
    seed: int,
    most: int | None,
    progress: Progress,
) -> Scores:
    """Return scores `product/RECIPE/exact` and `product/RECIPE/ann` of one recipe's index.

    `most` is the number of matches in each direction; None for all rows, which FAISS is then not asked for.
    `product/RECIPE/ann used` is 1 for a query that FAISS answered, else 0.
    """
    folder_of_index, name = _built(data, model, encoding, folder, recipe, seed, progress), f"product/{recipe}"
    index = Index.open(folder_of_index)
    exact, _ = _ask(index, queries, most or len(index.rows_of("sentence")), exact=True)
    if most is None:
        return {f"{name}/exact": exact}
    with index.store.lock():
        VectorIndex.build(index.rows_of("sentence"), factory=DEFAULT_FACTORY, progress=progress)
    ann, used = _ask(Index.open(folder_of_index), queries, ANN_TOP, exact=False)
    return {f"{name}/exact": exact, f"{name}/ann": ann, f"{name}/ann used": used}


def _built(
    data: str, model: ModelConfig, encoding: EncodingConfig, folder: Path, recipe: str, seed: int, progress: Progress
) -> str:
    """Build a recipe's index, or go on with it, and return its folder."""
    name = str(folder / f"index-{recipe.replace(' ', '-')}")
    projection = "two-sided" if recipe.startswith("two-sided") else "rapidgrad"
    gradient, sketch = GradientConfig(**RECIPES[recipe], seed=seed), SketchConfig(seed=seed, projection=projection)
    build(BuildRequest(data, name, model, encoding, gradient, sketch), progress=progress)
    return name


def rescored_scores(
    data: str,
    model: ModelConfig,
    encoding: EncodingConfig,
    queries: Sequence[TaskQuery],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
) -> Scores:
    """Return `product/kronecker/rescored`: the first `ANN_TOP` matches of questions about a word, as users get them.

    Of each group `RESCORED_QUERIES` are asked; the scores of the others are not finite. Nothing without such questions.
    """
    groups = {query.group for query in queries}
    about = [[n for n, query in enumerate(queries) if query.word and query.group == group] for group in groups]
    chosen = sorted(number for numbers in about for number in numbers[:RESCORED_QUERIES])
    if not chosen:
        return {}
    index = Index.open(_built(data, model, encoding, folder, "kronecker", seed, progress))
    place = _places(index)
    scores = np.full((len(queries), len(place)), np.nan, np.float32)
    for count, number in enumerate(chosen, 1):
        query = queries[number]
        asked = Query(query.prompt, query.answer, query.word)
        found = index.query(asked, k=min(ANN_TOP, len(place)), exact=True)
        scores[number] = 0
        scores[number, [place[match.id] for match in found.matches]] = [1 / match.rank for match in found.matches]
        progress("rescored", count, len(chosen))
    return {"product/kronecker/rescored": scores}


def encoder_scores(
    data: str,
    model: ModelConfig,
    encoding: EncodingConfig,
    queries: Sequence[TaskQuery],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
    encoder: str = EncoderConfig.model,
) -> Scores:
    """Return scores `encoder/kronecker`, `encoder/first` and `encoder/second`, of an encoder distilled from the rows.

    They are those of the index of gradients, of the encoder alone, which ignores a query's word, and of the gradients
    of the encoder's `CANDIDATES` best: what `--rescore` orders by, before the uncompressed influence of the first few.
    Nothing where the rows are too few to distil from.
    """
    gradients = _built(data, model, encoding, folder, "kronecker", seed, progress)
    distilled, embeddings = (str(folder / name) for name in ("encoder", "index-encoder"))
    full = Index.open(gradients)
    count = len(full.rows_of("sentence"))
    if count < LEAST:
        return {}
    distill(gradients, distilled, DistillConfig(seed=seed), encoder=EncoderConfig(encoder, "cpu"), progress=progress)
    build(BuildRequest(data, embeddings, EncoderConfig(distilled, "cpu")), progress=progress)
    second, _ = _ask(full, queries, count, exact=True)
    whole = [replace(query, word=None) for query in queries]
    first, _ = _ask(Index.open(embeddings, device="cpu"), whole, count, exact=True)
    ranks = np.argsort(np.argsort(-first, axis=1, kind="stable"), axis=1)
    dropped = second.min(axis=1, keepdims=True) - 1 - ranks
    rescored = np.where(ranks < CANDIDATES, second, dropped).astype(np.float32)
    return {"encoder/kronecker": second, "encoder/first": first, "encoder/second": rescored}


def _ask(index: Index, queries: Sequence[TaskQuery], most: int, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [queries, examples in the order of the data's lines], and which queries FAISS answered."""
    place = _places(index)
    asked = [Query(query.prompt, query.answer, query.word) for query in queries]
    how = {"k": min(most, len(place)), "exact": exact, "heatmaps": False}
    proponents, opponents = (index.query(asked, **how, opponents=opponents) for opponents in (False, True))
    scores = np.empty((len(queries), len(place)), np.float32)
    for row, (best, worst) in enumerate(zip(proponents, opponents, strict=True)):
        scores[row] = (best.matches[-1].score + worst.matches[-1].score) / 2
        for match in (*best.matches, *worst.matches):
            scores[row, place[match.id]] = match.score
    return scores, np.array([result.search == "ann" for result in proponents], np.float32)


def _places(index: Index) -> dict[str, int]:
    """Return the place of each example, by its id, among the lines of the data."""
    rows = index.rows_of("sentence")
    records = sorted((rows.record(number) for number in range(len(rows.ids))), key=lambda record: record["line"])
    return {record["id"]: number for number, record in enumerate(records)}
