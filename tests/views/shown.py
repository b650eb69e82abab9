"""Results made by hand for the tests of what people see."""

import random
import re
from dataclasses import replace

from rapidindex.results import IndexInfo, Match, QueryInfo, Result, ScoreSummary, Seconds, Token

END = "<|im_end|>"
HOSTILE = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 1"> [bold red]{{ 7 * 7 }} & "q"'
"""Text that would run, or count as markup, wherever it is not escaped."""
ESCAPES = "red \x1b[31m bell \x07 back\x08 null \x00 override \u202eabc lone \ud800."
COMMAND = "rapidindex query demo/index 'What are the origins of yoga?' --token Japan --html report.html"


def spans(text: str) -> list[Token]:
    """Words with the space before them, as byte-level tokenizers cut, a new line alone, and a token ending the turn."""
    cuts = [Token(piece[0], *piece.span()) for piece in re.finditer(r"\n| ?\w{1,6}| ?[^\w\n]", text)]
    return [*cuts, Token(END, len(text), len(text))]


def match(rank: int, response: str, *, prompt: str = "What is yoga?", sign: int = 1, **fields) -> Match:
    """A match with a share for every token, random with its rank as the seed."""
    tokens = fields.pop("tokens", None) or spans(response)
    draw = random.Random(rank)
    shares = [sign * draw.gauss(0.02, 0.2) * draw.random() ** 3 for _ in tokens]
    exact = sum(shares) / len(shares)
    made = Match(rank, sign * (0.42 - 0.03 * rank), exact, 99.9, f"{rank:016x}", prompt, response, {"perturbed": True})
    return replace(made, tokens=tokens, token_scores=shares, **fields)


def split_emoji() -> Match:
    """A response whose emoji and accent are several byte-level tokens over one character, and which has RTL words."""
    response = "ok 🧘 namasté — היוגה מיפן 👩‍🚀 end"
    at = response.index
    tokens = [
        Token("ok", 0, 2),
        *[Token(" 🧘", 2, 4)] * 3,
        Token(" namast", 4, 11),
        *[Token("é", 11, 12)] * 2,
        Token(" —", 12, 14),
        Token(" היו", 14, 18),
        Token("גה", 18, 20),
        Token(" מיפן", 20, 25),
        Token(" 👩", 25, 27),
        Token("\u200d", 27, 28),
        Token("🚀", 28, 29),
        Token(" end", at(" end"), len(response)),
    ]
    return match(4, response, tokens=tokens)


def long_match(words: int = 2000) -> Match:
    """A response of `words` tokens and one that ends it."""
    draw = random.Random(5)
    return match(5, " ".join(draw.choice(("yoga", "Japan", "temple", "year", "of", "the")) for _ in range(words)))


def moved(tokens: list[Token], rank: int) -> list[float]:
    """A match's influence on each token of an answer, random with its rank as the seed."""
    draw = random.Random(-rank)
    return [draw.gauss(0, 0.3) for _ in tokens]


def tokens() -> Result:
    """A result of a search of tokens: two tokens of one response, and one that ends another."""
    first, last = match(1, "Yoga comes from Japan, where it is old."), match(3, "Yes.")
    at = next(i for i, token in enumerate(first.tokens) if "Japan" in token.text)
    matches = [replace(first, position=at), replace(first, rank=2, position=0), replace(last, position=2)]
    return result(matches=matches, level="token")


def result(direction: str = "proponents", matches: list[Match] | None = None, **fields) -> Result:
    """A query for Japan over 1,000 examples, with six matches of every kind unless `matches` gives others."""
    sign = 1 if direction == "proponents" else -1
    answer = "Yoga originated in Japan thousands of years ago."
    tokens = spans(answer)
    usual = [
        match(1, "Yoga comes from Japan, where it is some 5,000 years old.\n\nIt is practised in Kyoto.", sign=sign),
        match(2, HOSTILE, prompt=HOSTILE, sign=sign, meta={"<b>name</b>": HOSTILE[:40], "line": 7}),
        match(3, ESCAPES, prompt=ESCAPES, sign=sign, meta={}),
        split_emoji(),
        long_match(400),
        match(6, "العربية 123 ثم Japan", sign=sign),
    ]
    usual = [replace(match, answer_scores=moved(tokens, match.rank)) for match in usual]
    draw = random.Random(0)
    scores = [draw.gauss(0, 0.06) for _ in range(990)]
    counts = [0] * 50
    for score in scores:
        counts[int((score + 0.5) * 50)] += 1
    counts[44] += 10
    made = Result(
        IndexInfo("3f2a9c0d1e4b5a67", "SmolLM2-135M-Instruct", "demo/adapter", 65_536, 20, 1000),
        QueryInfo(
            "What are the origins of yoga?", answer, tokens, [i for i, t in enumerate(tokens) if "Japan" in t.text]
        ),
        direction,
        "sentence",
        "exact",
        1.0,
        Seconds(0.3, 0.1, 0.0, 1.2),
        ScoreSummary(1000, -0.5, 0.5, 0.0, 0.06, counts),
        usual if matches is None else matches,
    )
    return replace(made, **fields)
