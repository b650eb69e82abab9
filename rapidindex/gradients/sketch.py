"""RapidGrad: the compression of a gradient of |v| entries to K (section 3.2, Algorithm 1).

The compression is a pure function of (seed, |v|, K, λ): only these are stored. Knows nothing of models or files.

All λ row and column shuffles together are one permutation of positions. `Sketch.slots` follows each position through
them to the place where it ends, whose bin (place // (padded / K)) and Rademacher sign make a *slot*: the bin itself
for +1, bin + K for -1. Compressing is then one scatter-add into 2K slots, and one subtraction of their halves.
"""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from rapidindex.config import SketchConfig

FOLDABLE_K = 65_536
"""Every K up to this one pads gradients to one length, so that RapidGrads fold to any smaller K."""
LARGEST_DIVISOR = 2**20
"""Rows or columns that one shuffle moves, at most: the largest permutation in memory."""
_CHUNK = 2**18


class Sketch:
    """Compresses gradients of `size` entries (|v|) to `config.K`.

    `slots` is the whole map, where it was computed before (in memory that several processes share).
    """

    takes_factors = False

    def __init__(self, size: int, config: SketchConfig, slots: Int32[Tensor, " size"] | None = None) -> None:
        if size < 1:
            raise ValueError("a gradient has at least one entry")
        self.size = size
        self.config = config
        largest_K = max(config.K, FOLDABLE_K)
        self.padded = largest_K * -(-size // largest_K)
        self._whole = slots
        self._slots_of: dict[tuple[int, int, torch.device], Tensor] = {}
        self._tensors: dict[torch.device, tuple[list[tuple[Tensor, Tensor]], Tensor]] = {}

    @cached_property
    def shuffles(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The λ pairs (rows, columns) of Algorithm 1: old row i goes to row `rows[i]`, old column j to `columns[j]`.

        The number of rows and of columns is drawn among the padded length's divisors from 2 to 2^20: those that
        change something, and whose permutation is small beside the gradient.
        """
        candidates = np.arange(2, min(self.padded, LARGEST_DIVISOR) + 1)
        divisors = candidates[self.padded % candidates == 0]
        stream = self._stream(0)
        return [(_draw_order(stream, divisors), _draw_order(stream, divisors)) for _ in range(self.config.shuffles)]

    @cached_property
    def negative(self) -> np.ndarray:
        """The Rademacher signs: one bit a place, packed in uint8 with the lowest bit first; set for -1."""
        words = self._stream(1).random_raw(-(-self.padded // 64))
        return words.astype("<u8").view(np.uint8)

    def slots(self, start: int, stop: int, device: torch.device | str = "cpu") -> Int32[Tensor, " n"]:
        """Return the slot of each gradient position from `start` up to `stop`."""
        chunks = [self._slots(a, min(a + _CHUNK, stop), device) for a in range(start, stop, _CHUNK)]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int32, device=device)

    def empty(self, examples: int, device: torch.device | str = "cpu") -> Float[Tensor, "examples slots"]:
        """Return zeros that `add` sums into: float32 [examples, 2K]."""
        return torch.zeros(examples, 2 * self.config.K, device=device)

    def add(self, sums: Float[Tensor, "examples slots"], start: int, values: Float[Tensor, "examples n"]) -> None:
        """Add the gradient entries `start` to `start + n` of each example to `sums`, and keep their part of the map."""
        sums.index_add_(1, self._map(start, values.shape[1], values.device), values.to(sums.dtype))

    def finish(self, sums: Float[Tensor, "examples slots"]) -> Float[Tensor, "examples K"]:
        """Return the RapidGrads: the sums of sign +1 less those of sign -1."""
        K = self.config.K
        return sums[:, :K] - sums[:, K:]

    def transposed(self, row: Float[Tensor, " K"], start: int, n: int) -> Float[Tensor, " n"]:
        """Return the entries `start` to `start + n` of the gradient u for which ⟨u, g⟩ = ⟨row, RapidGrad of g⟩."""
        return torch.cat([row, -row])[self._map(start, n, row.device)]

    def compress(self, gradients: Float[Tensor, "examples size"]) -> Float[Tensor, "examples K"]:
        """Return the RapidGrads of whole gradients."""
        sums = self.empty(len(gradients), gradients.device)
        self.add(sums, 0, gradients)
        return self.finish(sums)

    def _map(self, start: int, n: int, device: torch.device) -> Tensor:
        """Return the slots of n positions as int64, which are kept for the next time."""
        key = (start, n, device)
        if key not in self._slots_of:
            known = self.slots(start, start + n, device) if self._whole is None else self._whole[start : start + n]
            self._slots_of[key] = known.to(device)
        # Kept as int32 to save memory; as int64 index_add_ is ten times faster (torch 2.13, two CPU threads).
        return self._slots_of[key].long()

    def _slots(self, start: int, stop: int, device: torch.device | str) -> Tensor:
        tables, negative = self._on(torch.device(device))
        place = torch.arange(start, stop, device=device, dtype=torch.int64)
        for rows, columns in tables:
            width = self.padded // len(rows)
            row = place // width
            place += (rows[row] - row) * width
            column = place % len(columns)
            place += columns[column] - column
        is_negative = negative[place >> 3] >> (place & 7).to(torch.uint8) & 1
        return (place // (self.padded // self.config.K) + self.config.K * is_negative.long()).to(torch.int32)

    def _on(self, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return the shuffles and the signs as tensors on a device."""
        if device not in self._tensors:
            tables = [(torch.from_numpy(rows), torch.from_numpy(columns)) for rows, columns in self.shuffles]
            moved = [(rows.to(device), columns.to(device)) for rows, columns in tables]
            self._tensors[device] = moved, torch.from_numpy(self.negative).to(device)
        return self._tensors[device]

    def _stream(self, purpose: int) -> np.random.Philox:
        # Raw Philox words are the same in every NumPy release, which the methods of Generator do not promise.
        return np.random.Philox(key=self.config.seed + (purpose << 64))


def _draw_order(stream: np.random.Philox, divisors: np.ndarray) -> np.ndarray:
    """Draw an order of a random number of rows, int64."""
    count = divisors[int(stream.random_raw()) % len(divisors)]
    return np.argsort(stream.random_raw(int(count)), kind="stable")
