"""Inner products of queries with stored rows, at the speed at which the rows are read.

Rows of 8 bits stay what they are where the CPU multiplies 8-bit integers (VNNI): a query becomes three vectors of 8
bits, q ≈ s (p₀ + p₁/254 + p₂/254²), which keep as much of it as float32 does, and integer products are exact. Other
rows become float32, a block at a time. Knows arrays only.
"""

from collections.abc import Callable

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


def products_with(queries: Float32[np.ndarray, "queries K"], row_type: str, device: str = "cpu") -> Multiply:
    """Return the function that multiplies `queries` by blocks of rows of `row_type` (`int8`, `float16`) on `device`.

    Several threads may call it at once; each is fastest with one inner thread of torch.
    """
    if row_type == "int8" and device == "cpu" and multiplies_integers():
        return _of_integers(queries)
    return _of_floats(torch.from_numpy(queries).to(device))


def multiplies_integers() -> bool:
    """Return whether torch multiplies 8-bit integers on this CPU exactly and fast.

    Without VNNI, products of pairs saturate at 16 bits on some CPUs.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _of_floats(queries: Float32[Tensor, "queries K"]) -> Multiply:
    def multiply(entries: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(entries).to(queries.device).float()  # moved as stored, converted on the device
        return (queries @ block.T).cpu().numpy()

    return multiply


def _of_integers(queries: Float32[np.ndarray, "queries K"]) -> Multiply:
    scale = np.abs(queries).max(1, initial=0) / np.float32(127)
    groups = [_parts(queries[at : at + _QUERIES], scale[at : at + _QUERIES]) for at in range(0, len(queries), _QUERIES)]

    def multiply(entries: np.ndarray) -> np.ndarray:
        block = torch.from_numpy(entries)
        products = [_multiply(block, parts).numpy() for parts in groups]
        with np.errstate(over="ignore"):  # an overflow becomes infinite, as it does in float32
            return (np.concatenate(products) * scale[:, None].astype(np.float64)).astype(np.float32)

    return multiply


def _parts(queries: Float32[np.ndarray, "q K"], scale: Float32[np.ndarray, " q"]) -> Int8[Tensor, "3 q K"]:
    """Return p₀, p₁ and p₂ of each query."""
    rest = queries / np.where(scale > 0, scale, 1)[:, None]
    parts = np.empty((3, *queries.shape), np.int8)
    for part in parts:
        rounded = np.rint(rest).clip(-127, 127)
        part[:] = rounded
        rest = (rest - rounded) * np.float32(_STEP)
    return torch.from_numpy(parts)


def _multiply(block: Tensor, parts: Tensor) -> Tensor:
    """Return the products of a block int8 [m, K] with the queries in units of their scales, float64 [queries, m]."""
    flat = parts.flatten(0, 1)
    sums = sum(
        torch._int_mm(block[:, at : at + _LONGEST_SUM], flat[:, at : at + _LONGEST_SUM].T).double()
        for at in range(0, block.shape[1], _LONGEST_SUM)
    )
    weights = torch.tensor([1, 1 / _STEP, 1 / _STEP**2], dtype=torch.float64)
    return torch.einsum("mpq,p->qm", sums.view(len(block), *parts.shape[:2]), weights)
