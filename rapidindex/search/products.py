"""Inner products of queries with stored rows.

Rows of 8 bits stay what they are where the CPU multiplies 8-bit integers (VNNI): a query becomes three vectors of 8
bits, q ≈ s (p₀ + p₁/254 + p₂/254²), which keep as much of it as float32 does, and integer products are exact. One or
two of them do for a scan, which then knows what rows may be the best: what is left of q, times a row's length, is the
most by which a product may be off (Cauchy and Schwarz). Other rows become float32, a few at a time, on the CPU or on
a GPU. Knows arrays only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int8
from torch import Tensor

Multiply = Callable[[np.ndarray], Float32[np.ndarray, "queries m"]]
"""Returns the inner products of the queries with a block of stored entries [m, K], without the rows' scales."""
Block = tuple[np.ndarray, Float32[np.ndarray, " m"]]
"""Stored entries [m, K] and the scales of these rows."""

_LONGEST_SUM = 2**17
"""Products of two 8-bit entries that are summed in 32 bits: 2^17 · 127 · 128 is below 2^31."""
_QUERIES = 512
"""Queries multiplied at a time, which bounds the memory that their products take."""
_FLOATS = 2**20
"""Entries that are float32 at once: in the cache, and in memory that the heap keeps. Of 2^24, one query takes 1,370 ms
for 100,000 rows of 4,096, of 2^20 113 (AVX2, one thread)."""
_STEP = 254.0
"""The next vector of 8 bits holds what rounding left: at most half a unit, stretched to 127."""
_ROUNDING = 2.0**-21
"""Of products in float32, in parts of the two lengths."""


def products_with(queries: Float32[np.ndarray, "queries K"], row_type: str) -> Multiply:
    """Return the function that multiplies `queries` by blocks of rows of `row_type` (`int8`, `float16`) on the CPU.

    Several threads may call it at once; each is fastest with one inner thread of torch.
    """
    return rough_products_with(queries, row_type, parts=3)[0]


def products_with_each(queries: Float32[np.ndarray, "queries K"], row_type: str) -> list[Multiply]:
    """Return what `products_with` does for each query alone, in a tenth of the time."""
    if row_type == "int8" and multiplies_integers():
        scale, vectors, _ = _split(queries, parts=3)
        return [partial(_products, scale[one : one + 1], vectors[:, one : one + 1]) for one in range(len(queries))]
    return [_of_floats(torch.from_numpy(query[None])) for query in queries]


def rough_products_with(
    queries: Float32[np.ndarray, "queries K"], row_type: str, *, parts: int
) -> tuple[Multiply, Float32[np.ndarray, " queries"]]:
    """Return a faster function than `products_with` does, of the first `parts` vectors of each query.

    With it, by how much the product of each query and a row of length 1 may be off. An error of 0 says that the
    products are those of `products_with`.
    """
    if row_type == "int8" and multiplies_integers():
        scale, vectors, error = _split(queries, parts)
        return partial(_products, scale, vectors), error
    return _of_floats(torch.from_numpy(queries)), np.zeros(len(queries), np.float32)


def streamed_scores(
    queries: Float32[np.ndarray, "queries K"], blocks: Iterable[Block], n: int, device: str
) -> Float32[np.ndarray, "queries n"]:
    """Return the scores of the n rows of `blocks`, in their order, computed in float32 on `device`.

    They stay there until all are known. A block is copied to a GPU as it is stored, and converted there.
    """
    posed, first = torch.from_numpy(queries).to(device), 0
    scores, scales = torch.empty(len(queries), n, device=device), np.empty(n, np.float32)
    for entries, scale in _moved(blocks, torch.device(device)):
        there = slice(first, first + len(entries))
        torch.mm(posed, entries.float().T, out=scores[:, there])
        scales[there], first = scale, there.stop
    return scores.mul_(torch.from_numpy(scales).to(device)).cpu().numpy()


def multiplies_integers() -> bool:
    """Return whether torch multiplies 8-bit integers on this CPU exactly and fast.

    Without VNNI, products of pairs saturate at 16 bits on some CPUs.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _moved(blocks: Iterable[Block], device: torch.device) -> Iterator[tuple[Tensor, Float32[np.ndarray, " m"]]]:
    """Yield the entries of each block on `device`, to be used before the next is asked for, and the scales as they are.

    To CUDA they pass through two pinned buffers in turn, so that a block is read while the one before is on its way.
    """
    cuda, buffers = device.type == "cuda", [torch.empty(0), torch.empty(0)]
    copied = [torch.cuda.Event() if cuda else None for _ in buffers]
    for number, (entries, scale) in enumerate(blocks):
        turn, source = number % 2, torch.from_numpy(entries)
        if event := copied[turn]:
            event.synchronize()  # the copy before the last one read this buffer
        if len(buffers[turn]) < len(source):
            buffers[turn] = torch.empty(source.shape, dtype=source.dtype, pin_memory=cuda)
        staged = buffers[turn][: len(source)].copy_(source).to(device, non_blocking=cuda)
        if event:
            event.record(torch.cuda.current_stream(device))
        yield staged, scale


def _of_floats(queries: Float32[Tensor, "queries K"]) -> Multiply:
    together = max(1, _FLOATS // max(1, queries.shape[1]))

    def multiply(entries: np.ndarray) -> np.ndarray:
        products = torch.empty(len(queries), len(entries))
        for first in range(0, len(entries), together):
            some = slice(first, first + together)
            torch.mm(queries, torch.from_numpy(entries[some]).float().T, out=products[:, some])
        return products.numpy()

    return multiply


def _split(
    queries: Float32[np.ndarray, "queries K"], parts: int
) -> tuple[Float32[np.ndarray, " queries"], Int8[Tensor, "parts queries K"], Float32[np.ndarray, " queries"]]:
    """Return the scale s and the first vectors p of each query, and how far from it, as vectors, these may be."""
    scale = np.abs(queries).max(1, initial=0) / np.float32(127)
    units = rest = queries / np.where(scale > 0, scale, 1)[:, None]
    vectors = np.empty((parts, *queries.shape), np.int8)
    for vector in vectors:
        rounded = np.rint(rest).clip(-127, 127)
        vector[:] = rounded
        rest = (rest - rounded) * np.float32(_STEP)
    unseen = np.linalg.norm(rest, axis=1) / _STEP**parts + _ROUNDING * np.linalg.norm(units, axis=1)
    with np.errstate(over="ignore"):
        return scale, torch.from_numpy(vectors), scale * unseen


def _products(
    scale: Float32[np.ndarray, " queries"], vectors: Int8[Tensor, "parts queries K"], entries: np.ndarray
) -> Float32[np.ndarray, "queries m"]:
    block, products = torch.from_numpy(entries), torch.zeros(len(entries), len(scale))
    for group, there in zip(vectors.split(_QUERIES, dim=1), products.split(_QUERIES, dim=1), strict=True):
        _add_products(block, group, there)
    with np.errstate(over="ignore"):  # an overflow becomes infinite
        return np.multiply(products.numpy(), scale, out=products.numpy()).T


def _add_products(block: Tensor, vectors: Tensor, products: Float32[Tensor, "m queries"]) -> None:
    """Add the products of a block int8 [m, K] with the queries' vectors int8 [parts, queries, K], without scales."""
    for at in range(0, block.shape[1], _LONGEST_SUM):
        sums = _sums(block[:, at : at + _LONGEST_SUM], vectors[..., at : at + _LONGEST_SUM])
        for number, sum_of_part in enumerate(sums):
            products.add_(sum_of_part, alpha=_STEP**-number)


def _sums(block: Tensor, vectors: Tensor) -> Sequence[Tensor]:
    """Return int32 [m, queries] for each part.

    A single query's vectors are multiplied one by one: a product of two or three columns takes longer.
    """
    parts, queries = vectors.shape[:2]
    if queries == 1:
        return [torch._int_mm(block, vector.T) for vector in vectors]
    return torch._int_mm(block, vectors.flatten(0, 1).T).view(-1, parts, queries).unbind(1)
