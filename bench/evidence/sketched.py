"""Scores of the package's RapidGrads over K, λ and every recipe, and of the same recipes uncompressed.

All are arrays [queries, examples] by name: `full/CORRECTION/NORMALISATION` uncompressed, and
`K=65536/shuffles=20/CORRECTION/NORMALISATION/ROWS` compressed, where ROWS are `int8` (as the store keeps them),
`float16` (as its format 1 did), `float32` or `1bit`. One pass over the gradients serves every K that folds from the
largest one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.evidence.cached import BLOCK, Replay, compressor_of
from rapidindex.config import SketchConfig
from rapidindex.gradients.rapidgrad import RapidGrads
from rapidindex.gradients.sketch import Sketch
from rapidindex.progress import Progress
from rapidindex.search.vector_index import fold
from rapidindex.store import decode_rows, encode_rows

CORRECTIONS = ("none", "estimate")
NORMALIZATIONS = ("none", "layer", "unit")
DEFAULT, PAPER = ("estimate", "unit"), ("none", "layer")
"""(correction, normalisation) of `estimate` at unit length and of the paper's recipe."""
ROTATED_K = 2**16
"""The largest K whose rows are scored in every precision."""

Scores = dict[str, np.ndarray]


def sketched(
    rows: Replay, queries: Replay, factors: Tensor, config: SketchConfig, Ks: Sequence[int], progress: Progress
) -> Scores:
    """Score every recipe at each of `Ks`, which divide `config.K`; `factors` are the correction's, [|v|]."""
    sketch = Sketch(rows.rows.shape[1], config)
    posed = {
        (recipe, K): _asked(fold(found, K), recipe) for recipe, found in _whole(queries, sketch, factors) for K in Ks
    }
    scores: Scores = {}
    for recipe, here, found in _each_block(rows, sketch, factors):
        progress(f"RapidGrads, K={config.K}, λ={config.shuffles}", here.stop, len(rows))
        for K in Ks:
            for kind, values in _kept(*posed[recipe, K], fold(found, K)).items():
                name = f"K={K}/shuffles={config.shuffles}/{recipe[0]}/{recipe[1]}/{kind}"
                whole = scores.setdefault(name, np.empty((len(queries), len(rows)), np.float32))
                whole[:, here] = values.numpy()
    return scores


def kept_scores(recipe: str, asked: Tensor, rows: Tensor, config: SketchConfig, Ks: Sequence[int]) -> Scores:
    """Score RapidGrads of queries [Q, K] against those of rows [n, K], under the recipe's name, at each of `Ks`."""
    scores: Scores = {}
    for K in Ks:
        posed = fold(asked, K)
        turned = hadamard(posed) if K <= ROTATED_K else None
        for first in range(0, len(rows), BLOCK):
            here = slice(first, first + BLOCK)
            for kind, values in _kept(posed, turned, fold(rows[here], K)).items():
                name = f"K={K}/shuffles={config.shuffles}/{recipe}/{kind}"
                scores.setdefault(name, np.empty((len(asked), len(rows)), np.float32))[:, here] = values.numpy()
    return scores


def _asked(asked: Tensor, recipe: tuple[str, str]) -> tuple[Tensor, Tensor | None]:
    """Return queries [Q, K], and their rotation for the two recipes and K that are scored in every precision."""
    return asked, hadamard(asked) if recipe in (DEFAULT, PAPER) and asked.shape[1] <= ROTATED_K else None


def _kept(asked: Tensor, turned: Tensor | None, found: Tensor) -> dict[str, Tensor]:
    """Return inner products of queries [Q, K] with rows [n, K] by row type; more types given rotated queries."""
    kinds = {row_type: asked @ _stored(found, row_type).T for row_type in ("int8", "float16")}
    if turned is not None:
        kinds |= {"float32": asked @ found.T, "1bit": one_bit(turned, found)}
    return kinds


def _stored(found: Tensor, row_type: str) -> Tensor:
    """Return rows [n, K] after a shard's encoding."""
    return torch.from_numpy(decode_rows(*encode_rows(found.numpy(), row_type)))


def one_bit(turned: Tensor, found: Tensor) -> Tensor:
    """Return inner products of rotated queries [Q, K] with rows [n, K] kept as a bit an entry and a factor.

    ⟨q, x⟩ ≈ ⟨Hq, sign(Hx)⟩ · |x|² / |Hx|₁ with the Hadamard rotation H: RaBitQ's estimate.
    """
    signs = hadamard(found)
    factor = found.square().sum(1) / signs.abs().sum(1).clamp_min(1e-30)
    return turned @ torch.where(signs < 0, -1.0, 1.0).T * factor


def hadamard(rows: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of each row; their length is a power of two."""
    n, K = rows.shape
    turned, width = rows.clone(), 1
    while width < K:
        pairs = turned.view(n, K // (2 * width), 2, width)
        turned = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(n, K)
        width *= 2
    return turned / K**0.5


def _each_block(rows: Replay, sketch: Sketch, factors: Tensor) -> Iterator[tuple[tuple[str, str], slice, Tensor]]:
    """Yield (recipe, rows, their RapidGrads) for every block and every recipe."""
    compressors = {
        (correction, normalize): compressor_of(rows, sketch, normalize, factors if correction == "estimate" else None)
        for correction in CORRECTIONS
        for normalize in ("none", "layer")
    }
    for here, batch in rows.blocks():
        for (correction, normalize), compressor in compressors.items():
            rapidgrads = compressor(batch)
            yield (correction, normalize), here, rapidgrads.rows
            if normalize == "none":  # one compression serves both: only the length differs
                yield (correction, "unit"), here, _unit(rapidgrads)


def _unit(rapidgrads: RapidGrads) -> Tensor:
    lengths = rapidgrads.norms.norm(dim=1, keepdim=True)
    return rapidgrads.rows / torch.where(lengths > 0, lengths, 1.0)


def _whole(queries: Replay, sketch: Sketch, factors: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield (recipe, the RapidGrads of all queries)."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for recipe, _, rows in _each_block(queries, sketch, factors):
        found.setdefault(recipe, []).append(rows)
    for recipe, blocks in found.items():
        yield recipe, torch.cat(blocks)


def uncompressed(rows: Replay, queries: Replay, factors: Tensor, progress: Progress) -> Scores:
    """Score every recipe on whole gradients.

    `full/none/none` is TracIn at one checkpoint, `full/none/layer` the same with layer-wise normalisation.
    """
    shape = (len(queries), len(rows))
    scores = {f"full/{c}/{n}": np.zeros(shape) for c in CORRECTIONS for n in NORMALIZATIONS}
    for correction in CORRECTIONS:
        by = factors if correction == "estimate" else None
        for first in range(0, len(rows), BLOCK):
            here = slice(first, min(first + BLOCK, len(rows)))
            found = _recipes(rows, queries, here, by)
            for normalize, values in found.items():
                scores[f"full/{correction}/{normalize}"][:, here] = values
            progress(f"whole gradients, correction {correction}", here.stop, len(rows))
    return {name: values.astype(np.float32) for name, values in scores.items()}


def _recipes(rows: Replay, queries: Replay, here: slice, by: Tensor | None) -> dict[str, Tensor]:
    """Return the three normalisations' scores [Q, n] of one block of rows."""
    block = torch.from_numpy(np.array(rows.rows[here]))
    plain = torch.zeros(len(queries), len(block), dtype=torch.float64)
    layered, q_squares, g_squares = plain.clone(), torch.zeros(len(queries), 1), torch.zeros(1, len(block))
    for layer in rows.layers:
        part = slice(layer.start, layer.start + layer.size)
        g, q = block[:, part], torch.from_numpy(np.array(queries.rows[:, part]))
        if by is not None:
            g, q = g * by[part], q * by[part]
        inner, g_norm, q_norm = q @ g.T, g.norm(dim=1)[None], q.norm(dim=1)[:, None]
        lengths = q_norm * g_norm
        plain += inner
        layered += torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 0.0)
        q_squares, g_squares = q_squares + q_norm.square(), g_squares + g_norm.square()
    lengths = q_squares.sqrt() * g_squares.sqrt()
    return {"none": plain, "layer": layered, "unit": plain / torch.where(lengths > 0, lengths, 1.0)}
