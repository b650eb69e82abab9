"""What an encoder learns from: the split of an index's examples, and the exact targets.

A target is the inner product of two stored rows: the influence that an index of gradients would report. A text lies in
one part, whatever the ids of the examples that hold it, so that no part has a text of another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from rapidindex.config import DistillConfig
from rapidindex.data.bm25 import BM25
from rapidindex.data.examples import Example
from rapidindex.errors import UsageError
from rapidindex.store import Rows

PARTS = ("train", "choose", "held out")
"""What is learnt from, what chooses the head or the epoch, and what the figures are measured on."""
LEAST = 100
"""Examples that an index must hold: fewer leave parts of a few texts."""
_MEASURED = {"choose": (50, 300), "held out": (100, 1000)}
"""Anchors and pool of a part that is measured, at most."""
_LEAST_ANCHORS = 8
"""Anchors to learn from, at least."""
_GROUP = 64
"""Rows that are read, and anchors that are compared with them, at a time."""


@dataclass(frozen=True)
class Text:
    """A prompt and a response, with a row of the index or, for a question, one of its own."""

    prompt: str
    response: str
    number: int = -1
    """The stored row's number; -1 for a question."""
    row: Float32[np.ndarray, " K"] | None = None
    """The RapidGrad of a question."""

    def share(self, seed: int) -> float:
        """Return a number in [0, 1) that depends on the text and the seed alone."""
        digest = hashlib.sha256(f"{seed}\0{self.prompt}\0{self.response}".encode()).hexdigest()
        return int(digest[:13], 16) / 16**13


@dataclass(frozen=True)
class Part:
    """Anchors, and the pool that is ranked for each of them, or learnt from with them as landmarks."""

    anchors: list[Text]
    pool: list[Text]
    targets: Float32[np.ndarray, "anchors pool"]
    """Inner products of the stored rows; but for a head's landmarks NaN where an anchor is itself the candidate."""


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation of scores with the targets."""

    per_anchor: float
    """The mean over the anchors: how well the pool is ranked for one of them."""
    aggregated: float
    """Over all pairs together."""


def read_parts(rows: Rows, questions: Sequence[Text], options: DistillConfig) -> dict[str, Part]:
    """Split the live examples of `rows` and the questions, and compute the targets within each part.

    UsageError where the index or the questions are too few.
    """
    if len(rows.live_examples) < LEAST:
        raise UsageError(
            f"The index holds {len(rows.live_examples)} examples, and {LEAST} are needed to distil from.",
            hint="Add data to it, or search it as it is: so few need no encoder.",
        )
    parts = _split(_texts(rows), options)
    asked = _split(questions, options)
    return {name: _part(rows, parts[name], asked[name], name, options) for name in PARTS}


def _texts(rows: Rows) -> list[Text]:
    live = np.flatnonzero(rows.live_mask)
    examples = (Example.from_record(rows.record(int(rows.example[number]))) for number in live)
    return [Text(example.prompt, example.response, int(number)) for number, example in zip(live, examples, strict=True)]


def _split(texts: Sequence[Text], options: DistillConfig) -> dict[str, list[Text]]:
    """Return the texts of each part, in an order drawn by seed. Equal texts stay together."""
    share = {id(text): text.share(options.seed) for text in texts}
    drawn = sorted(texts, key=lambda text: share[id(text)])
    places = sorted(set(share.values()))
    ends = [places[min(len(places) - 1, round(len(places) * end))] if places else 0.0 for end in _ends(options)]
    part_of = {key: PARTS[2 - sum(value >= end for end in ends)] for key, value in share.items()}
    return {name: [text for text in drawn if part_of[id(text)] == name] for name in PARTS}


def _ends(options: DistillConfig) -> tuple[float, float]:
    return options.held_out, 1.5 * options.held_out


def _part(rows: Rows, texts: list[Text], asked: list[Text], name: str, options: DistillConfig) -> Part:
    most_anchors, most_pool = _MEASURED.get(name, (options.anchors, options.pool))
    pool, landmarks = texts[:most_pool], name == "train" and options.method == "head"
    candidates = pool if landmarks else texts  # a head's anchors are among the texts that it learns from
    anchors = [*candidates[: most_anchors if options.anchors else 0], *asked]
    least = _LEAST_ANCHORS if name == "train" else 1
    if len(anchors) < least:
        raise UsageError(
            f"{len(anchors)} anchors are left in the part {name!r}, and {least} are needed.",
            hint="Give more questions, or --anchors.",
        )
    if landmarks:
        pool = [*pool, *asked]
        return Part(anchors, pool, products(rows, anchors, pool))
    return Part(anchors, pool, targets(rows, anchors, pool))


def targets(rows: Rows, anchors: Sequence[Text], pool: Sequence[Text]) -> Float32[np.ndarray, "anchors pool"]:
    """Return the inner products of the rows of anchors and pool; NaN where both are the same row."""
    found = products(rows, anchors, pool)
    same = np.array([a.number for a in anchors])[:, None] == np.array([text.number for text in pool])[None]
    found[same] = np.nan
    return found


def products(rows: Rows, anchors: Sequence[Text], pool: Sequence[Text]) -> Float32[np.ndarray, "anchors pool"]:
    """Return the inner products of the rows of anchors and pool."""
    found = np.empty((len(anchors), len(pool)), np.float32)
    for first in range(0, len(anchors), _GROUP * 4):
        queries = _rows(rows, anchors[first : first + _GROUP * 4])
        for start in range(0, len(pool), _GROUP):
            block = _rows(rows, pool[start : start + _GROUP])
            found[first : first + len(queries), start : start + len(block)] = queries @ block.T
    return found


def _rows(rows: Rows, texts: Sequence[Text]) -> Float32[np.ndarray, "texts K"]:
    stored = iter(rows.take([text.number for text in texts if text.row is None]))
    return np.stack([next(stored) if text.row is None else text.row for text in texts])


def agreement(scores: np.ndarray, part: Part) -> Agreement:
    """Compare scores [anchors, pool] with the targets; a constant ranking agrees with nothing."""
    from scipy.stats import rankdata

    known = ~np.isnan(part.targets)
    each = [
        correlation(rankdata(mine[here]), rankdata(target[here])) or 0.0
        for mine, target, here in zip(scores, part.targets, known, strict=True)
    ]
    overall = correlation(rankdata(scores[known]), rankdata(part.targets[known])) or 0.0
    return Agreement(float(np.mean(each)), overall)


def bm25_scores(part: Part) -> np.ndarray:
    """Return BM25's scores of the pool for each anchor's words."""
    bm25 = BM25([f"{text.prompt}\n{text.response}" for text in part.pool])
    return np.array([bm25.scores(f"{anchor.prompt}\n{anchor.response}") for anchor in part.anchors])


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Pearson's correlation of two arrays of n numbers; None where one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else None
