"""Questions to an index, and files of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from rapidindex.errors import DataError


@dataclass(frozen=True)
class Query:
    """One question to an index."""

    prompt: str
    answer: str | None = None
    """None lets the model answer, greedily."""
    token: str | None = None
    span: str | None = None


def read_queries(path: str | Path) -> list[Query]:
    """Queries from a JSONL file of objects with `prompt` and optionally `answer`, `token` and `span`."""
    known = {"prompt", "answer", "token", "span"}
    queries = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a JSONL file of queries.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).", hint='Write {"prompt": "…"}.') from error
        strings = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        if not strings or "prompt" not in value or not value.keys() <= known:
            raise DataError(
                f"{path}, line {number}: a query has a text under prompt and, if wanted, under answer, token and span.",
                hint='For example {"prompt": "Where does yoga come from?", "token": "Japan"}.',
            )
        queries.append(Query(**value))
    if not queries:
        raise DataError(f"{path} holds no query.", hint='Write lines such as {"prompt": "…"}.')
    return queries
