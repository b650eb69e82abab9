"""The steps of an answer to a question, in the order in which `Index.ask` yields them.

Posed, Ranked, then a Scored for each match as its heat-map is ready, and Answered. A caller who stops reading between
two of them has cancelled the rest.
"""

from dataclasses import dataclass

from rapidindex.query.encode import EncodedQuery
from rapidindex.results import Match, Result


@dataclass(frozen=True)
class Posed:
    """The question has its answer, its selected tokens and its gradient."""

    number: int
    """The question's place among those that were asked, from 0; likewise below."""
    query: EncodedQuery


@dataclass(frozen=True)
class Ranked:
    """The search has ended."""

    number: int
    result: Result
    """Its first `k` matches in the order of their scores, without heat-maps and uncompressed influence."""


@dataclass(frozen=True)
class Scored:
    """A match has its heat-map, or its influence on the tokens of the answer."""

    number: int
    match: Match
    """With `rescore` its rank is that of the search, and may lie past `k`."""
    done: int
    total: int
    """Of this question's heat-maps, and answers where they are asked for."""


@dataclass(frozen=True)
class Answered:
    """The result is complete."""

    number: int
    result: Result


Event = Posed | Ranked | Scored | Answered
