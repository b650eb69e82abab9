"""Heat-maps and uncompressed influence of the rows that a search found."""

from dataclasses import dataclass, replace

import numpy as np

from rapidindex.data.templates import Encoding
from rapidindex.results import Match, Rescoring

RESCORED = 4
"""Candidates for each match asked for, of which `rescore` computes the uncompressed influence."""

HEATMAP_TOKENS = 1024
"""Padded tokens of candidates whose heat-maps are computed together."""


@dataclass(frozen=True)
class Candidate:
    """A row that a search found, and what is said of it."""

    row: int
    encoding: Encoding
    match: Match


def rescored(found: list[Candidate], k: int, *, largest: bool) -> tuple[list[Candidate], Rescoring]:
    """The k candidates of the largest (or smallest) uncompressed influence, and how far the order has moved."""
    exact = np.array([one.match.exact_score for one in found])
    order = np.argsort(-exact if largest else exact, kind="stable")
    n = len(order)
    moves = np.abs(np.argsort(order) - np.arange(n))
    spearman = 1 - 6 * float((moves.astype(float) ** 2).sum()) / (n * (n**2 - 1)) if n > 1 else None
    kept = [replace(found[i], match=replace(found[i].match, rank=rank)) for rank, i in enumerate(order[:k], 1)]
    return kept, Rescoring(n, spearman, int(moves.max(initial=0)))


def groups(found: list[Candidate]) -> list[list[Candidate]]:
    """Candidates in their order, in batches of about so many padded tokens."""
    groups: list[list[Candidate]] = []
    for one in found:
        longest = max((len(other.encoding.input_ids) for other in groups[-1]), default=0) if groups else 0
        longest = max(longest, len(one.encoding.input_ids))
        if groups and longest * (len(groups[-1]) + 1) <= HEATMAP_TOKENS:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups
