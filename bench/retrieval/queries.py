"""Real queries: the gradients of prompts and answers that the index does not hold, computed by its own model."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rapidindex import Index
from rapidindex.data.examples import Example, read_examples
from rapidindex.data.templates import Encoding
from rapidindex.progress import Progress
from rapidindex.query.questions import Query

KINDS = ("whole answer", "one token")
"""Every example is asked about twice: by its whole answer, and by the token in the middle of it."""


@dataclass(frozen=True)
class Queries:
    """Full-K RapidGrads of queries."""

    vectors: np.ndarray
    """float32 [n, K]."""
    kinds: list[str]
    seconds: np.ndarray
    """float64 [n]: what each gradient took, the model being loaded."""


def real_queries(index: Index, data: Path, count: int, kept: Path, progress: Progress) -> Queries:
    """The RapidGrads of 2 · `count` queries from `data`; kept in a file."""
    if not kept.exists():
        vectors, seconds = [], []
        for one, _ in posed(index, read_examples(data).examples, 2 * count):
            started = time.perf_counter()
            vectors.append(index.vectors([one])[0])
            seconds.append(time.perf_counter() - started)
            progress("query gradients", len(vectors), 2 * count)
        part = kept.with_suffix(".part.npz")
        np.savez(part, vectors=np.stack(vectors), kinds=KINDS * (len(vectors) // 2), seconds=seconds)
        part.rename(kept)
    with np.load(kept) as said:
        return Queries(said["vectors"], said["kinds"].tolist(), said["seconds"])


def posed(index: Index, examples: Sequence[Example], count: int) -> Iterator[tuple[Query, Encoding]]:
    """`count` questions about examples that the index does not hold, drawn; the kinds alternate."""
    held = {id for level in index.store.levels for id in index.store.rows(level).ids}
    drawn = iter(np.random.default_rng(7).permutation(len(examples)))
    done = 0
    while done < count and (number := next(drawn, None)) is not None:
        example = examples[number]
        encoding = index.template.encode(example, end=False)
        middle = len(encoding.tokens) // 2
        if example.id in held or encoding.truncated or middle < 1:
            continue
        for span in (None, str(middle)):
            yield Query(example.prompt, example.response, span=span), encoding
        done += 2
