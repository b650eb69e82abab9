"""Numbers and findings in words, the same in every view."""

import re

from rapidindex.results import Match, QueryInfo, Result, Verification

_INDENTED = re.compile(r"^(?:\t| {2,})\s*(?![-*•+\s]|\d+[.)])", re.MULTILINE)


def word(text: str) -> str:
    """Return a token's text without the white space around it, or quoted where it is nothing else."""
    return text.strip() or repr(text)


def signed(value: float) -> str:
    """Return a share or score with its sign and at least three significant digits."""
    return f"{value:+.4f}" if value == 0 or 0.1 <= abs(value) < 1e4 else f"{value:+.3g}"


def percent(share: float, total: float) -> str:
    """Return a share in percent of an example's total influence, with its own sign; as a number where that is 0."""
    return f"{100 * share / abs(total):+.0f} %" if total else signed(share)


def meta(match: Match) -> dict[str, str]:
    """Return an example's metadata as texts, without what has no value: None, or a text of white space alone."""
    texts = ((str(name), str(value)) for name, value in match.meta.items() if value is not None)
    return {name: text for name, text in texts if text.strip()}


def is_code(text: str) -> bool:
    """Return whether a text holds code: a fence, or several indented lines that are no items of a list."""
    return "```" in text or len(_INDENTED.findall(text)) > 1


def selected(query: QueryInfo) -> str:
    """Return a sentence about which words of the answer are asked about."""
    if query.whole:
        return "The question is about the whole answer."
    if query.parts_of_words:
        return "The question is about the marked words, which hold the text that was asked about as a part."
    return "The question is about the marked words."


def unit_name(result: Result) -> str:
    """Return what was searched: `examples` or `tokens`."""
    return "tokens" if result.level == "token" else "examples"


def unfinished(result: Result | Verification) -> str:
    """Return a sentence where the index lacks examples that its build was to store, otherwise an empty text."""
    index = result.index
    if index.planned is None:
        return ""
    return f"The index holds {index.examples:,} of {index.planned:,} planned examples: its build has not ended."


def checkpoints(result: Result) -> str:
    """Return a line on how the checkpoints of an index agree, or which one was asked; "" where it has one."""
    if not result.agreements:
        return f"Checkpoint: {result.checkpoint}." if result.checkpoint else ""
    apart = [one for one in result.agreements if one.common < len(one.ids)]
    if not apart:
        return f"All checkpoints have the same best {len(result.agreements[0].ids)}."
    shared = "; ".join(f"{one.checkpoint} shares {one.common} of its best {len(one.ids)}" for one in apart)
    return (
        f"Checkpoints disagree: {shared} with {result.checkpoint}. Facts are found at a finished checkpoint, "
        f"behaviours that many rows taught at an early one: ask with --checkpoint {apart[0].checkpoint}, or sum."
    )


def matched_token(match: Match) -> str:
    """Return the token that matched, quoted, with its position; an empty text where an example matched."""
    if match.position is None:
        return ""
    return f"“{word(match.tokens[match.position].text)}” at {match.position}"


def place(match: Match) -> str:
    """Return where a match's row stands, `train.jsonl:17`; an empty text where that is not known."""
    return "" if match.line is None else f"{match.source or 'line'}:{match.line}"


def distance(result: Result, match: Match) -> str:
    """Return how far a match's score lies from the mean, `4.8 σ`; an empty text where that is not known."""
    return f"{abs(result.summary.distance(match.score)):.1f} σ" if result.summary and result.summary.std > 0 else ""


def percentile(match: Match) -> str:
    """Return the percent of all rows that score lower, `99.4`; an empty text where that is not known."""
    return "" if match.percentile is None else f"{match.percentile:.1f}"


def standing(result: Result) -> str:
    """Return the finding in a sentence: how many of the matches stand out, or that none does; empty if not known."""
    if nothing := verdict(result):
        return nothing
    if result.summary is None or result.summary.n < 2:
        return ""
    out = sum(map(bool, map(result.stands_out, result.matches)))
    of = f"{_count(out)} of the {len(result.matches)}" if len(result.matches) > 1 else "The"
    by_token = result.rescoring is not None and result.rescoring.by_token
    others = " The rest is there for its strongest word." if by_token and out < len(result.matches) else ""
    return (
        f"{of} {result.direction if len(result.matches) > 1 else result.direction[:-1]} shown "
        f"{'stand' if out > 1 else 'stands'} out: further from the mean than the {result.summary.chance:.1f} σ of the "
        f"most extreme of {result.summary.n:,} scores by chance.{others}"
    )


def _count(number: int) -> str:
    return {0: "None", 1: "One"}.get(number, f"{number:,}")


def folded(result: Result, every: bool = False) -> tuple[list[Match], list[Match], str]:
    """Return the matches that stand out, those at or below chance, and a heading for the latter.

    Where it is not known what chance gives, or `every` is set, all matches are among the first.
    """
    if every:
        return result.matches, [], ""
    out = [match for match in result.matches if result.stands_out(match) is not False]
    rest = [match for match in result.matches if result.stands_out(match) is False]
    return out, rest, f"{len(rest)} more, no further out than chance" if out else f"{len(rest)} within chance"


def search(result: Result) -> str:
    """Return how the search went: exhaustive, or approximate with its recall; and where, if not on the CPU."""
    where = "" if result.search_device == "cpu" else f" on {result.search_device}"
    if result.search == "exact":
        return f"exhaustive search{where}"
    recall = "recall not measured" if result.recall is None else f"recall {result.recall:.3f} measured"
    return f"approximate search{where}, {recall}"


def verdict(result: Result) -> str:
    """Return a sentence where nothing stands out among the scores, otherwise an empty text.

    Nothing stands out where the best score has the wrong sign, or is no further from the mean than the most extreme of
    as many draws from a normal distribution (`ScoreSummary.chance`).
    """
    unit = unit_name(result)
    if not result.matches:
        return f"There is nothing to compare: the search found no {unit[:-1]}."
    sign = 1 if result.direction == "proponents" else -1
    summary = result.summary
    best = sign * max(sign * match.score for match in result.matches)
    if summary is not None and result.rescoring is not None:  # the best score may not be among the matches
        best = summary.max if sign > 0 else summary.min
    if sign * best <= 0:
        return f"Nothing stands out: no {unit[:-1]} scores {'above' if sign > 0 else 'below'} zero."
    if summary is None or summary.n < 2:
        return ""
    if summary.std == 0:
        return f"Nothing stands out: all {summary.n:,} {unit} score the same."
    distance = sign * summary.distance(best)
    if distance > summary.chance:
        return ""
    return (
        f"Nothing stands out: the best score lies {distance:.1f} standard deviations from the mean, and the most "
        f"extreme of {summary.n:,} scores lies {summary.chance:.1f} away by chance."
    )


def exact(result: Result) -> str:
    """Return what the influence is that a heat-map adds up to: `uncompressed`, or `compressed` in a task's index."""
    return "compressed" if result.index.specialized else "uncompressed"


def rescored(result: Result) -> str:
    """Return a sentence about the order of the matches where their scores do not give it, otherwise an empty text."""
    if result.rescoring is None:
        return (
            "The scores are an encoder's estimates; --rescore orders by true gradients." if result.index.encoder else ""
        )
    correlation = result.rescoring.rank_correlation
    agreement = "" if correlation is None else f" The two orders have a rank correlation of {correlation:.2f};"
    moved = result.rescoring.largest_move
    of = "the strongest word's " if result.rescoring.by_token else ""
    added = (
        f", {result.rescoring.for_words:,} of them added for the words they hold" if result.rescoring.for_words else ""
    )
    return (
        f"Ordered by {of}{exact(result)} influence among {result.rescoring.candidates:,} candidates{added}.{agreement} "
        f"{'a' if agreement else 'A'} candidate moved by {moved:,} {'place' if moved == 1 else 'places'} at most."
    )
