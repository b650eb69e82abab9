"""Which tokens of a response get a RapidGrad of their own: all, the first few, or those that carry content.

A token carries content where it has part of a word that is no English stop word. Knows text, not models.
"""

import re
from collections.abc import Sequence

from rapidindex.config import TokenConfig
from rapidindex.errors import QueryError, TokenNotFound, UsageError
from rapidindex.results import Token

_WORD = re.compile(r"\w+(?:['’]\w+)*")

_STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are aren't as at be because been before being below between
    both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either else ever
    every few for from further had hadn't has hasn't have haven't having he he'd he'll he's hence her here here's hers
    herself him himself his how however i i'd i'll i'm i've if in into is isn't it it'd it'll it's its itself just let
    let's may me might mine more most must my myself neither no nor not now of off on once only or other our ours
    ourselves out over own per quite rather same shall she she'd she'll she's should shouldn't since so some such than
    that that's the their theirs them themselves then there there's these they they'd they'll they're they've this those
    through thus to too under until up upon us very via was wasn't we we'd we'll we're we've were weren't what what's
    when where whether which while who who's whom whose why will with within without won't would wouldn't yet you you'd
    you'll you're you've your yours yourself yourselves
    """.split()
)


def chosen(response: str, tokens: Sequence[Token], config: TokenConfig) -> list[int]:
    """Positions in `tokens`, those of `response`, that get a RapidGrad of their own, in their order."""
    positions = _content(response, tokens) if config.content else list(range(len(tokens)))
    return positions[: config.first]


def _content(response: str, tokens: Sequence[Token]) -> list[int]:
    carries = [False] * len(response)
    for word in _WORD.finditer(response):
        told = word[0].lower().replace("’", "'")
        if told not in _STOP_WORDS and any(letter.isalnum() for letter in told):
            carries[word.start() : word.end()] = [True] * len(word[0])
    return [position for position, token in enumerate(tokens) if any(carries[token.start : token.end])]


def select(tokens: Sequence[Token], answer: str, *, token: str | None = None, span: str | None = None) -> list[int]:
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


def listing(tokens: Sequence[Token]) -> str:
    """The tokens with their positions, for a message."""
    return "  ".join(f"{number}:{token.text.strip() or repr(token.text)}" for number, token in enumerate(tokens))


def _by_word(tokens: Sequence[Token], answer: str, asked: str) -> list[int]:
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


def _by_span(tokens: Sequence[Token], asked: str) -> list[int]:
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
