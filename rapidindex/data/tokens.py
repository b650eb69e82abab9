"""Which tokens of a response get a RapidGrad of their own: all, the first few, or those that carry content.

A token carries content where it has part of a word that is no English stop word. Knows text, not models.
"""

import re
from collections.abc import Sequence

from rapidindex.config import TokenConfig
from rapidindex.data.templates import Token

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
