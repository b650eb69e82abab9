"""Real queries: the gradients of prompts and answers that the index does not hold, computed by its own model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import timed
from rapidindex import Index, Query
from rapidindex.data.examples import read_examples
from rapidindex.data.tokens import select_tokens
from rapidindex.gradients.losses import Batch
from rapidindex.progress import Progress
from rapidindex.query.encode import selected_batch, stack_rows

KINDS = ("whole answer", "one token")
"""Every example is asked about twice: by its whole answer, and by the token in the middle of it."""


@dataclass(frozen=True)
class Queries:
    """RapidGrads of queries, at full K."""

    vectors: np.ndarray
    """float32 [n, K]."""
    kinds: list[str]
    seconds: np.ndarray
    """float64 [n]: the seconds that each gradient took, the model being loaded."""


def real_queries(index: Index, data: Path, count: int, kept: Path, progress: Progress) -> Queries:
    """Return the RapidGrads of 2 · `count` queries from `data`, and keep them in a file."""
    if not kept.exists():
        measured = []
        for query, _ in draw_queries(index, data, 2 * count):
            measured.append(timed(lambda query=query: stack_rows(index.encode([query]))[0]))
            progress("query gradients", len(measured), 2 * count)
        seconds, vectors = zip(*measured, strict=True)
        part = kept.with_suffix(".part.npz")
        np.savez(part, vectors=np.stack(vectors), kinds=KINDS * (len(vectors) // 2), seconds=seconds)
        part.rename(kept)
    with np.load(kept) as saved:
        return Queries(saved["vectors"], saved["kinds"].tolist(), saved["seconds"])


def query_batches(index: Index, data: Path, count: int) -> list[Batch]:
    """Return the first `count` of the real queries as batches of one."""
    return [batch for _, batch in draw_queries(index, data, count)][:count]


def draw_queries(index: Index, data: Path, count: int) -> Iterator[tuple[Query, Batch]]:
    """Draw `count` queries about examples that the index does not hold; the kinds alternate."""
    examples, done = read_examples(data).examples, 0
    held = {id for level in index.store.levels for id in index.store.rows(level).ids}
    for number in np.random.default_rng(7).permutation(len(examples)):
        if done >= count:
            return
        example = examples[number]
        encoding = index.template.encode(example, end=False)
        middle = len(encoding.tokens) // 2
        if example.id in held or encoding.truncated or middle < 1:
            continue
        for span in (None, str(middle)):
            selection = select_tokens(encoding.tokens, example.response, span=span).positions
            query = Query(example.prompt, example.response, span=span)
            yield query, selected_batch(encoding, selection, index.loaded.device)
        done += 2
