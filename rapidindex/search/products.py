"""Inner products of queries with stored rows.

Rows of 8 bits stay what they are where the CPU multiplies 8-bit integers (VNNI): a query becomes three vectors of 8
bits, q ≈ s (p₀ + p₁/254 + p₂/254²), which keep as much of it as float32 does, and integer products are exact. One or
two of them do for a scan, which then knows what rows may be the best: what is left of q, times a row's length, is the
most by which a product may be off (Cauchy and Schwarz). Other rows become float32, a block at a time. Knows arrays
only.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int8
from torch import Tensor

Multiply = Callable[[np.ndarray], Float32[np.ndarray, "queries m"]]
"""Returns the inner products of the queries with a block of stored entries [m, K], without the rows' scales."""

_LONGEST_SUM = 2**17
"""Products of two 8-bit entries that are summed in 32 bits: 2^17 · 127 · 128 is below 2^31."""
_QUERIES = 512
"""Queries multiplied at a time, which bounds the memory that their products take."""
_STEP = 254.0
"""The next vector of 8 bits holds what rounding left: at most half a unit, stretched to 127."""
_ROUNDING = 2.0**-21
"""Of products in float32, in parts of the two lengths."""


def products_with(queries: Float32[np.ndarray, "queries K"], row_type: str, device: str = "cpu") -> Multiply:
    """Return the function that multiplies `queries` by blocks of rows of `row_type` (`int8`, `float16`) on `device`.

    Several threads may call it at once; each is fastest with one inner thread of torch.
    """
    return _with_errors(queries, row_type, device, parts=3)[0]


def rough_products_with(
    queries: Float32[np.ndarray, "queries K"], row_type: str, device: str = "cpu", *, parts: int
) -> tuple[Multiply, Float32[np.ndarray, " queries"]]:
    """Return a faster function than `products_with` does, of the first `parts` vectors of each query.

    With it, by how much the product of each query and a row of length 1 may be off. An error of 0 says that the
    products are those of `products_with`.
    """
    return _with_errors(queries, row_type, device, parts=parts)


def multiplies_integers() -> bool:
    """Return whether torch multiplies 8-bit integers on this CPU exactly and fast.

    Without VNNI, products of pairs saturate at 16 bits on some CPUs.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _with_errors(
    queries: Float32[np.ndarray, "queries K"], row_type: str, device: str, parts: int
) -> tuple[Multiply, Float32[np.ndarray, " queries"]]:
    if row_type == "int8" and device == "cpu" and multiplies_integers():
        return _of_integers(queries, parts)
    return _of_floats(torch.from_numpy(queries).to(device)), np.zeros(len(queries), np.float32)


def _of_floats(queries: Float32[Tensor, "queries K"]) -> Multiply:
    def multiply(entries: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(entries).to(queries.device).float()  # moved as stored, converted on the device
        return (queries @ block.T).cpu().numpy()

    return multiply


def _of_integers(
    queries: Float32[np.ndarray, "queries K"], parts: int
) -> tuple[Multiply, Float32[np.ndarray, " queries"]]:
    scale, vectors, error = _split(queries, parts)
    groups = torch.from_numpy(vectors).split(_QUERIES, dim=1)

    def multiply(entries: np.ndarray) -> np.ndarray:
        products = np.concatenate([_multiply(torch.from_numpy(entries), group) for group in groups])
        with np.errstate(over="ignore"):  # an overflow becomes infinite
            return np.multiply(products, scale[:, None], out=products)

    return multiply, error


def _split(
    queries: Float32[np.ndarray, "queries K"], parts: int
) -> tuple[Float32[np.ndarray, " queries"], Int8[np.ndarray, "parts queries K"], Float32[np.ndarray, " queries"]]:
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
        return scale, vectors, scale * unseen


def _multiply(block: Tensor, vectors: Tensor) -> Float32[np.ndarray, "queries m"]:
    """Return the products of a block int8 [m, K] with the queries' vectors int8 [parts, queries, K], without scales."""
    products = torch.zeros(len(block), vectors.shape[1])
    for at in range(0, block.shape[1], _LONGEST_SUM):
        sums = _sums(block[:, at : at + _LONGEST_SUM], vectors[..., at : at + _LONGEST_SUM])
        for number, sum_of_part in enumerate(sums):
            products.add_(sum_of_part, alpha=_STEP**-number)
    return products.T.numpy()


def _sums(block: Tensor, vectors: Tensor) -> Sequence[Tensor]:
    """Return int32 [m, queries] for each part.

    A single query's vectors are multiplied one by one: a product of two or three columns takes longer.
    """
    parts, queries = vectors.shape[:2]
    if queries == 1:
        return [torch._int_mm(block, vector.T) for vector in vectors]
    return torch._int_mm(block, vectors.flatten(0, 1).T).view(-1, parts, queries).unbind(1)
