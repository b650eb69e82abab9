"""The two-sided projection of TrackStar (arXiv 2410.17413) and LoGRA: each weight's gradient g becomes P_out g P_inᵀ.

P_out [m, rows] and P_in [n, columns] hold ±1/√m and ±1/√n, drawn for each layer by seed. The layers of a block
(`blocks.py`) are summed into the block's m · n entries, which is a projection of their concatenation. Inner products of
rows estimate those of gradients without bias. Where a gradient comes as factors it is never made: P_out l and P_in r
are multiplied instead. Only (seed, K, layers) are stored. Knows nothing of models or files.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from rapidindex.config import SketchConfig
from rapidindex.gradients.blocks import blocks_of
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Layer


class TwoSided:
    """Projects the gradients of these layers to `config.K` entries, an equal part for each block.

    Has what `sketch.Sketch` has for `Compressor`.
    """

    takes_factors = True

    def __init__(self, layers: Sequence[Layer], config: SketchConfig) -> None:
        self.layers, self.config = layers, config
        self.blocks = blocks_of([layer.name for layer in layers])
        self.size = layers[-1].start + layers[-1].size
        self._entries = config.K // len(self.blocks)
        self.n = 2 ** ((self._entries.bit_length() - 1) // 2)
        self.m = self._entries // self.n
        self._number = {layer.start: number for number, layer in enumerate(layers)}
        self._signs: dict[tuple[int, int, torch.device], Tensor] = {}

    def empty(self, examples: int, device: torch.device | str = "cpu") -> Float[Tensor, "examples K"]:
        """Return zeros that `add` sums into."""
        return torch.zeros(examples, self.config.K, device=device)

    def add(self, sums: Float[Tensor, "examples K"], start: int, values: Float[Tensor, "examples n"] | Factors) -> None:
        """Add the projected gradients of the layer that begins at `start` to its block of `sums`."""
        number = self._number[start]
        rows, columns = as_matrix(self.layers[number].shape)
        if isinstance(values, Factors):
            projected = values.projected(
                lambda left: self._project(number, 0, left), lambda right: self._project(number, 1, right)
            )
        else:
            right = self._project(number, 1, values.view(-1, rows, columns))
            projected = self._project(number, 0, right.transpose(1, 2)).transpose(1, 2)
        first = self.blocks.of[number] * self._entries
        sums[:, first : first + self._entries] += projected.flatten(1).mul_((self.m * self.n) ** -0.5)

    def finish(self, sums: Float[Tensor, "examples K"]) -> Float[Tensor, "examples K"]:
        """Return the rows."""
        return sums

    def transposed(self, row: Float[Tensor, " K"], start: int, n: int) -> Float[Tensor, " n"]:
        """Return the entries `start` to `start + n`, a layer, of the gradient u for which ⟨u, g⟩ = ⟨row, row of g⟩."""
        number = self._number[start]
        first = self.blocks.of[number] * self._entries
        own = row[first : first + self._entries].view(self.m, self.n) * (self.m * self.n) ** -0.5
        out, into = (self.signs(number, side).to(row.device).float() for side in (0, 1))
        return (out @ own @ into.T).flatten()

    def compress(self, gradients: Float[Tensor, "examples size"]) -> Float[Tensor, "examples K"]:
        """Return the rows of whole gradients."""
        sums = self.empty(len(gradients), gradients.device)
        for layer in self.layers:
            self.add(sums, layer.start, gradients[:, layer.start : layer.start + layer.size])
        return self.finish(sums)

    def signs(self, number: int, side: int) -> Int8[Tensor, "length m"]:
        """Return the signs of a layer's P_out (side 0) or P_in (side 1), transposed, on the CPU.

        Raw Philox words, as `sketch.Sketch` draws its own, from streams that are no sketch's.
        """
        length, width = as_matrix(self.layers[number].shape)[side], (self.m, self.n)[side]
        stream = np.random.Philox(key=self.config.seed + (2 + 2 * number + side << 64))
        words = stream.random_raw(-(-length * width // 64)).astype("<u8").view(np.uint8)
        bits = np.unpackbits(words, count=length * width, bitorder="little").astype(np.int8)
        return torch.from_numpy(1 - 2 * bits).view(length, width)

    def _project(self, number: int, side: int, values: Tensor) -> Tensor:
        """Multiply vectors [examples, T, length], or ids [examples, T], by the signs: float32 [examples, T, m or n]."""
        key = number, side, values.device
        if key not in self._signs:  # kept as int8: 4 bytes a sign would be a GiB for 7B
            self._signs[key] = self.signs(number, side).to(values.device)
        signs = self._signs[key]
        return values.float() @ signs.float() if values.is_floating_point() else signs[values].float()


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns by which a parameter is projected: its own, or those of the squarest matrix.

    A vector, such as a norm's weight, is cut into rows; further dimensions are rows, too.
    """
    if len(shape) > 1:
        return math.prod(shape[:-1]), shape[-1]
    size = math.prod(shape)
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    return rows, size // rows
