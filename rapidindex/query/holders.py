"""The rows that hold the words a question is about: candidates for what taught them, which the search may have missed.

What taught a word is mostly one word of a row. Beside the mean over a long row it is too faint for the search to find,
and is known once the row's heat-map is drawn.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from rapidindex.data.examples import Example
from rapidindex.query.influence import Candidate
from rapidindex.results import QueryInfo
from rapidindex.store import Rows

SHARE = 0.75
"""Of the candidates, how many may be there because they hold the words."""
MOST_HOLDERS = 10_000
"""Rows whose scores are computed for their words alone: what more rows hold tells none of them from others."""


def words_of(query: QueryInfo) -> set[str]:
    """Return the texts that a question is about, each also with its first letter small and large."""
    chosen = enumerate(sorted(set(query.selection)))  # place and position grow alike within a stretch
    stretches = [[position for _, position in run] for _, run in groupby(chosen, lambda pair: pair[1] - pair[0])]
    spans = [(query.tokens[run[0]].start, query.tokens[run[-1]].end) for run in stretches]
    texts = filter(None, (query.answer[start:end].strip() for start, end in spans))
    return {form for text in texts for form in (text, text[0].lower() + text[1:], text[0].upper() + text[1:])}


def holders(rows: Rows, searched: np.ndarray, words: set[str]) -> np.ndarray:
    """Return int64: the rows, of those that are `searched` (bool [n]), of examples whose records hold any of the words.

    None where more than `MOST_HOLDERS` do.
    """
    held = np.flatnonzero(np.isin(rows.example, list(rows.holding(words))) & searched)
    return held if len(held) <= MOST_HOLDERS else held[:0]


def respond_with(rows: Rows, row: int, words: set[str]) -> bool:
    """Return whether a row's response holds any of the words. A record also has its prompt, and other columns."""
    response = Example.from_record(rows.record(int(rows.example[row]))).response
    return any(word in response for word in words)


def joined(found: Sequence[Candidate], holding: Sequence[Candidate]) -> list[Candidate]:
    """Return as many candidates as were found: those of `holding` are among them, in the place of the last others."""
    known, held = ({one.row for one in candidates} for candidates in (found, holding))
    extra = [one for one in holding if one.row not in known]
    others = [one.row for one in found if one.row not in held]
    dropped = set(others[len(others) - len(extra) :])
    return [one for one in found if one.row not in dropped] + extra
