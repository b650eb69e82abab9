"""Which training examples, and which words in them, made the language model say that?

from rapidindex import Index
index = Index.open("my-index")
result = index.query("What are the origins of yoga?", token="Japan", k=10)
"""

from typing import Any

from rapidindex.errors import RapidIndexError
from rapidindex.results import Match, Result

__all__ = ["Index", "Match", "Query", "RapidIndexError", "Result"]


def __getattr__(name: str) -> Any:
    # Index needs torch, which takes seconds to import: the command line's --help must not.
    if name in ("Index", "Query"):
        from rapidindex.query import index

        return getattr(index, name)
    raise AttributeError(f"module 'rapidindex' has no attribute {name!r}")
