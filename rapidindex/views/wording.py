"""Numbers and findings in words, for every view."""

from statistics import NormalDist

from rapidindex.results import Match, Result


def word(text: str) -> str:
    """A token's text on its own: without the white space around it, or quoted where it is nothing else."""
    return text.strip() or repr(text)


def found_token(match: Match) -> str:
    """The token that was found, quoted, with its position; an empty text where an example was found."""
    if match.position is None:
        return ""
    return f"“{word(match.tokens[match.position].text)}” at {match.position}"


def signed(value: float) -> str:
    """A share or score with its sign and three digits that count, or more."""
    return f"{value:+.4f}" if value == 0 or 0.1 <= abs(value) < 1e4 else f"{value:+.3g}"


def verdict(found: Result) -> str:
    """A sentence where nothing stands out among the scores, and an empty text otherwise.

    Nothing stands out where the best score has the wrong sign, or lies no further from the mean than the most extreme
    of as many draws from a normal distribution would (Blom's approximation): 2.5 standard deviations for 100 examples,
    3.2 for 1,000, 3.9 for 10,000.
    """
    if not found.matches:
        return f"There is nothing to compare: the search found no {things(found)[:-1]}."
    proponents = found.direction == "proponents"
    first = (max if proponents else min)(match.score for match in found.matches)  # a rescored order is another
    if first == 0 or (first > 0) != proponents:
        return f"Nothing stands out: no {things(found)[:-1]} scores {'above' if proponents else 'below'} zero."
    summary = found.summary
    if summary is None or summary.n < 2:
        return ""
    if summary.std == 0:
        return f"Nothing stands out: all {summary.n:,} {things(found)} score the same."
    away = (first - summary.mean) / summary.std * (1 if proponents else -1)
    chance = NormalDist().inv_cdf((summary.n - 0.375) / (summary.n + 0.25))
    if away > chance:
        return ""
    return (
        f"Nothing stands out: the best score lies {away:.1f} standard deviations from the mean, and the most extreme "
        f"of {summary.n:,} scores lies {chance:.1f} away by chance."
    )


def things(found: Result) -> str:
    """What was searched: `examples` or `tokens`."""
    return "tokens" if found.level == "token" else "examples"


def rescored(found: Result) -> str:
    """A sentence about the order of the matches, where it is not that of their scores; an empty text otherwise."""
    if found.rescoring is None:
        return ""
    correlation = found.rescoring.rank_correlation
    agreed = "" if correlation is None else f" The two orders have a rank correlation of {correlation:.2f};"
    return (
        f"Ordered by uncompressed influence among {found.rescoring.candidates:,} candidates.{agreed} "
        f"{'a' if agreed else 'A'} candidate moved by {found.rescoring.largest_move:,} places at most."
    )
