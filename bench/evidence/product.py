"""What users get: an index built by the product, asked through `Index.query`, exactly and through FAISS.

The queries' gradients are computed by the product from prompt, answer and word; nothing of `cached.py` is used. Scores
are arrays [queries, examples] that hold what was returned, and a value between best and worst for the rows that were
not, which no count of the first or last k sees.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.evidence.sketched import Scores
from bench.evidence.tasks import QueryInfo
from rapidindex import Index, Query
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.progress import Progress
from rapidindex.search.vector_index import DEFAULT_FACTORY, VectorIndex

RECIPES = {
    "default": {},
    "paper": {"normalize": "layer", "second_moment": "none"},
    "kronecker": {"second_moment": "kronecker"},
}
ANN_TOP = 10
"""Matches asked for through FAISS: of so few rows, more would be scanned exactly."""


def product_scores(
    data: str,
    model: ModelConfig,
    encoding: EncodingConfig,
    queries: Sequence[QueryInfo],
    folder: Path,
    *,
    recipes: Sequence[str],
    seed: int,
    most: int,
    progress: Progress,
) -> Scores:
    """Scores of `product/RECIPE/exact` and `product/RECIPE/ann`; 0 or 1 under `product/RECIPE/ann used`, per query.

    `most` is how many matches are asked for in each direction.
    """
    scores: Scores = {}
    for recipe in recipes:
        index = folder / f"index-{recipe}"
        gradient, sketch = GradientConfig(**RECIPES[recipe], seed=seed), SketchConfig(seed=seed)
        build(BuildRequest(data, str(index), model, encoding, gradient, sketch), progress=progress)
        opened = Index.open(index)
        scores[f"product/{recipe}/exact"], _ = _ask(opened, queries, most, exact=True)
        with opened.store.lock():
            VectorIndex.build(opened.rows, factory=DEFAULT_FACTORY, progress=progress)
        found, used = _ask(Index.open(index), queries, ANN_TOP, exact=False)
        scores[f"product/{recipe}/ann"] = found
        scores[f"product/{recipe}/ann used"] = used
    return scores


def _ask(index: Index, queries: Sequence[QueryInfo], most: int, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """The matches' scores [queries, examples in the order of the data's lines], and which queries FAISS answered."""
    asked = [Query(query.prompt, query.answer, query.word) for query in queries]
    rows = index.rows_of("sentence")
    records = [rows.record(number) for number in range(len(rows.ids))]
    lines = sorted(record["line"] for record in records)
    place = {line: number for number, line in enumerate(lines)}
    k = min(most, len(lines))
    ends = [index.query(asked, k=k, exact=exact, heatmaps=False, opponents=opponents) for opponents in (False, True)]
    line_of = {record["id"]: record["line"] for record in records}
    scores = np.empty((len(queries), len(lines)), np.float32)
    for row, (best, worst) in enumerate(zip(*ends, strict=True)):
        scores[row] = (best.matches[-1].score + worst.matches[-1].score) / 2
        for match in (*best.matches, *worst.matches):
            scores[row, place[line_of[match.id]]] = match.score
    return scores, np.array([result.search == "ann" for result in ends[0]], np.float32)
