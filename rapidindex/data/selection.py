"""Which tokens of an answer a query asks about: `--token WORD`, `--token WORD#2`, `--span 3:5`, or all of them."""

import re
from collections.abc import Sequence

from rapidindex.errors import QueryError, TokenNotFound, UsageError
from rapidindex.results import Span


def select(tokens: Sequence[Span], answer: str, *, token: str | None = None, span: str | None = None) -> list[int]:
    """Positions in `tokens` that are asked about: every one unless `token` or `span` says otherwise.

    `token` names characters of the answer and takes every token that overlaps them, at every occurrence (the paper's
    Γ(E2), section 4.6), or at the n-th with `#n`. `span` is `FIRST:LAST`, or one position, counted from 0.
    """
    if token is not None and span is not None:
        raise UsageError("--token and --span cannot be used together.", hint="Give one of them.")
    if not tokens:
        raise QueryError("The answer has no tokens.", hint="Give an answer that is not empty with --answer.")
    if token is not None:
        return _by_word(tokens, answer, token)
    return list(range(len(tokens))) if span is None else _by_span(tokens, span)


def listing(tokens: Sequence[Span]) -> str:
    """The tokens with their positions, for a message."""
    return "  ".join(f"{number}:{token.text.strip() or repr(token.text)}" for number, token in enumerate(tokens))


def _by_word(tokens: Sequence[Span], answer: str, asked: str) -> list[int]:
    word, number = asked, None
    numbered = re.fullmatch(r"(.+)#([1-9]\d*)", asked, re.DOTALL)
    if numbered and asked not in answer:
        word, number = numbered[1], int(numbered[2])
    if not word.strip():
        raise UsageError("--token is empty.", hint="Give a word of the answer.")
    found = [(match.start(), match.end()) for match in re.finditer(re.escape(word), answer)]
    if not found or (number or 1) > len(found):
        times = f"only {len(found)} times" if found else "not"
        raise TokenNotFound(
            f"{word!r} is {times} in the answer {answer!r}.",
            hint=f"Its tokens are  {listing(tokens)}  (choose with --token WORD or --span FIRST:LAST).",
        )
    wanted = found if number is None else [found[number - 1]]
    return [
        position
        for position, token in enumerate(tokens)
        if any(token.start < end and token.end > start for start, end in wanted)
    ]


def _by_span(tokens: Sequence[Span], asked: str) -> list[int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", asked.strip())
    if not match:
        raise UsageError(f"--span {asked!r} is not FIRST:LAST.", hint="For example --span 3:5, or --span 4.")
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if first > last or last >= len(tokens):
        raise TokenNotFound(
            f"--span {asked} does not fit an answer of {len(tokens)} tokens (0 to {len(tokens) - 1}).",
            hint=f"Its tokens are  {listing(tokens)}",
        )
    return list(range(first, last + 1))
