import math
import random

import pytest

from rapidindex.errors import DataError
from rapidindex.results import Rescoring, Token
from rapidindex.views import heatmap, wording
from tests.views import shown


def luminance(colour):
    def linear(value):
        value /= 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    """WCAG 2's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def together(pieces, rest):
    return "".join(p.before + ("" if p.special else p.text) + p.after for p in pieces) + rest


@pytest.mark.parametrize("theme", [heatmap.LIGHT, heatmap.DARK])
def test_text_stays_readable_on_every_step_of_the_ramp(theme):
    steps = range(-heatmap.STEPS, heatmap.STEPS + 1)
    assert min(contrast(theme.text, heatmap.blend(theme, step)) for step in steps) >= 4.5
    assert heatmap.blend(theme, 0) == theme.background
    assert heatmap.blend(theme, heatmap.STEPS) == theme.positive
    assert heatmap.blend(theme, -heatmap.STEPS) == theme.negative


@pytest.mark.parametrize("match", shown.result().matches)
def test_chips_hold_the_whole_text_and_every_share(match):
    pieces, rest = heatmap.cut(match.response, match.tokens, match.token_scores)
    assert together(pieces, rest) == match.response
    shares = {share.position: share.score for piece in pieces for share in piece.shares}
    assert shares == dict(enumerate(match.token_scores))
    assert math.isclose(sum(piece.score for piece in pieces) / len(match.tokens), match.exact_score)


def test_white_space_stays_outside_the_chip():
    pieces, _ = heatmap.cut("a  b\n", [Token("a", 0, 1), Token("  b\n", 1, 5)], [0.1, 0.2])
    assert [(p.before, p.text, p.after) for p in pieces] == [("", "a", ""), ("  ", "b", "\n")]


def test_a_token_of_white_space_alone_gets_a_mark():
    pieces, _ = heatmap.cut(
        "a\n b", [Token("a", 0, 1), Token("\n", 1, 2), Token(" ", 2, 3), Token("b", 3, 4)], [0.0] * 4
    )
    assert [p.label for p in pieces] == ["a", "↵", "␣", "b"]


def test_the_token_that_ends_the_turn_is_a_chip_beside_the_text():
    (first, end), rest = heatmap.cut("Hi", [Token("Hi", 0, 2), Token(shown.END, 2, 2)], [0.1, 0.2])
    assert (first.text, first.special, end.text, end.special, rest) == ("Hi", False, shown.END, True, "")


def test_tokens_over_one_character_become_one_chip_that_lists_each():
    match = shown.split_emoji()
    pieces, _ = heatmap.cut(match.response, match.tokens, match.token_scores)
    by_text = {piece.text: [share.position for share in piece.shares] for piece in pieces}
    assert by_text["🧘"] == [1, 2, 3]
    assert by_text["é"] == [5, 6]
    assert by_text["👩‍🚀"] == [11, 12, 13]


def test_spans_that_overlap_in_any_order_lose_nothing():
    draw = random.Random(0)
    text = "a é\u0301 b 👍🏽 c\n"
    for _ in range(300):
        cuts = [sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1))) for _ in range(6)]
        tokens = [Token(text[start:end], start, end) for start, end in cuts]
        pieces, rest = heatmap.cut(text, tokens, [float(i) for i in range(6)])
        assert together(pieces, rest) == text
        assert sorted(share.position for piece in pieces for share in piece.shares) == list(range(6))


def test_as_many_shares_as_tokens_are_needed():
    with pytest.raises(DataError, match="1 tokens and 2 shares"):
        heatmap.cut("a", [Token("a", 0, 1)], [0.1, 0.2])


def test_colour_grows_with_the_share_and_has_its_sign():
    steps = [heatmap.step(score / 100, 1.0) for score in range(-100, 101)]
    assert steps == sorted(steps)
    assert (steps[0], steps[100], steps[-1]) == (-heatmap.STEPS, 0, heatmap.STEPS)
    assert heatmap.step(0.3, 0.0) == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "+0.0000"), (0.41, "+0.4100"), (-0.012345, "-0.0123"), (3e-7, "+3e-07")]
)
def test_numbers_have_a_sign_and_digits_that_count(value, text):
    assert wording.signed(value) == text


def test_a_first_score_far_from_all_others_stands_out():
    assert wording.verdict(shown.result()) == ""


@pytest.mark.parametrize(
    ("score", "direction", "words"),
    [
        (
            0.15,
            "proponents",
            "best score lies 2.5 standard deviations from the mean, and the most extreme of 1,000 scores lies 3.2",
        ),
        (-0.15, "opponents", "2.5 standard deviations"),
        (-0.15, "proponents", "no example scores above zero"),
        (0.15, "opponents", "no example scores below zero"),
    ],
)
def test_a_sentence_says_that_nothing_stands_out(score, direction, words):
    found = shown.result(direction, [shown.match(1, "Yoga.", score=score)])
    assert words in wording.verdict(found)


def test_a_rescored_order_is_explained_and_does_not_hide_what_stands_out():
    matches = [shown.match(1, "Yoga.", score=0.01), shown.match(2, "Japan.", score=0.4)]
    found = shown.result(matches=matches, rescoring=Rescoring(40, 0.873, 7))
    assert wording.verdict(found) == ""
    assert "among 40 candidates. The two orders have a rank correlation of 0.87; a candidate" in wording.rescored(found)
    assert "moved by 7 places at most" in found.to_html()
    assert "candidates. A candidate" in wording.rescored(shown.result(rescoring=Rescoring(1, None, 0)))


def test_without_a_summary_only_the_sign_is_judged():
    assert wording.verdict(shown.result(matches=[shown.match(1, "Yoga.", score=0.01)], summary=None)) == ""
    assert "nothing to compare" in wording.verdict(shown.result(matches=[]))
