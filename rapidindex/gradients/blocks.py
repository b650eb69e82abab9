"""The blocks that layers are grouped into, and the slice of a row that belongs to each.

As in TrackStar (arXiv 2410.17413), a block is the attention, or all else, of one eighth of the model's depth. A layer's
depth is the first number in its name. What stands outside the numbered modules belongs to all else of the first eighth
(an embedding) or of the last (the final norm, the output layer). Every layer is in one block. Knows names alone, which
a stored index has too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

MOST_GROUPS = 8
_ATTENTION = re.compile(r"(?!.*norm|ln_).*(attn|attention)")
"""A part of a layer's name; `post_attention_layernorm` comes before the MLP."""
_KINDS = ("attention", "rest")


@dataclass(frozen=True)
class Blocks:
    """Groups of layers, each with an equal, contiguous share of a row. Their number is a power of two, 16 at most."""

    names: tuple[str, ...]
    of: tuple[int, ...]
    """The block of each layer, in the order of the flattened gradient."""

    def __len__(self) -> int:
        return len(self.names)

    def slices(self, K: int) -> dict[str, slice]:
        """Return the entries of a row of K that belong to each block, by the block's name."""
        size = K // len(self)
        return {name: slice(number * size, (number + 1) * size) for number, name in enumerate(self.names)}


def blocks_of(names: Sequence[str]) -> Blocks:
    """Group layers by their names, which stand in the order of the flattened gradient.

    A model of fewer than eight numbered modules has 4, 2 or 1 groups by depth. Where not every group has both kinds, as
    under LoRA on the attention alone, kinds are not told apart.
    """
    return _blocks_of(tuple(names))


@lru_cache(maxsize=8)
def _blocks_of(names: tuple[str, ...]) -> Blocks:
    depths = _depths(names)
    numbers = sorted({depth for depth in depths if depth is not None}) or [0]
    groups = 2 ** (min(MOST_GROUPS, len(numbers)).bit_length() - 1)
    group_of = {number: rank * groups // len(numbers) for rank, number in enumerate(numbers)}
    first = next((at for at, depth in enumerate(depths) if depth is not None), 0)
    places = []
    for at, (name, depth) in enumerate(zip(names, depths, strict=True)):
        group = (0 if at < first else groups - 1) if depth is None else group_of[depth]
        places.append((group, any(map(_ATTENTION.match, name.split(".")))))
    kinds = 2 if len(set(places)) == 2 * groups else 1
    of = tuple(kinds * group + (kinds == 2 and not attention) for group, attention in places)
    spans = [[number for number in numbers if group_of[number] == group] for group in range(groups)]
    return Blocks(tuple(_name(span, kind) for span in spans for kind in (_KINDS if kinds == 2 else ("all",))), of)


def _depths(names: Sequence[str]) -> list[int | None]:
    """Return the first number in each name; None where there is none."""
    found = [re.search(r"(?<=\.)\d+(?=\.)", name) for name in names]
    return [None if match is None else int(match[0]) for match in found]


def _name(span: Sequence[int], kind: str) -> str:
    return f"layers {span[0]}-{span[-1]}, {kind}"
