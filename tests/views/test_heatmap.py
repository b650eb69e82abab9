"""Segments lose no text and no share; colours stay readable."""

import math
import random

import pytest

from rapidindex.errors import DataError
from rapidindex.results import QueryInfo, Token
from rapidindex.views import heatmap
from tests.views import shown


def luminance(colour):
    def linear(value):
        value /= 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(colour, other):
    """WCAG 2's contrast ratio."""
    low, high = sorted((luminance(colour), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def together(pieces, rest):
    return "".join(p.before + ("" if p.special else p.text) + p.after for p in pieces) + rest


@pytest.mark.parametrize("theme", [heatmap.LIGHT, heatmap.DARK])
def test_text_stays_readable_on_every_step_of_the_ramp(theme):
    steps = range(-heatmap.STEPS, heatmap.STEPS + 1)
    assert min(contrast(theme.text, heatmap.step_colour(theme, step)) for step in steps) >= 4.5
    assert heatmap.step_colour(theme, 0) == theme.background
    assert heatmap.step_colour(theme, heatmap.STEPS) == theme.positive
    assert heatmap.step_colour(theme, -heatmap.STEPS) == theme.negative


@pytest.mark.parametrize("match", shown.result().matches)
def test_segments_hold_the_whole_text_and_every_share(match):
    pieces, rest = heatmap.segments(match.response, match.tokens, match.token_scores)
    assert together(pieces, rest) == match.response
    shares = {share.position: share.score for piece in pieces for share in piece.shares}
    assert shares == dict(enumerate(match.token_scores))
    assert math.isclose(sum(piece.score for piece in pieces) / len(match.tokens), match.exact_score)


def test_a_heat_map_shows_the_beginning_of_a_long_text():
    match = shown.long_match(20_000)
    text, tokens, scores = heatmap.beginning(match.response, match.tokens, match.token_scores)
    assert match.response.startswith(text) and len(text) == heatmap.LONGEST
    assert len(tokens) == len(scores) and len(text) - 10 < tokens[-1].end <= len(text)
    assert together(*heatmap.segments(text, tokens, scores)) == text
    short = shown.match(1, "Yoga.")
    assert heatmap.beginning(short.response, short.tokens, []) == (short.response, short.tokens, [])


def test_white_space_stays_outside_the_segment():
    pieces, _ = heatmap.segments("a  b\n", [Token("a", 0, 1), Token("  b\n", 1, 5)], [0.1, 0.2])
    assert [(p.before, p.text, p.after) for p in pieces] == [("", "a", ""), ("  ", "b", "\n")]


def test_a_token_of_white_space_alone_gets_a_mark():
    pieces, _ = heatmap.segments(
        "a\n b", [Token("a", 0, 1), Token("\n", 1, 2), Token(" ", 2, 3), Token("b", 3, 4)], [0.0] * 4
    )
    assert [p.label for p in pieces] == ["a", "↵", "␣", "b"]


def test_the_token_that_ends_the_turn_is_a_segment_beside_the_text():
    (first, end), rest = heatmap.segments("Hi", [Token("Hi", 0, 2), Token(shown.END, 2, 2)], [0.1, 0.2])
    assert (first.text, first.special, end.text, end.special, rest) == ("Hi", False, shown.END, True, "")


def test_tokens_over_one_character_become_one_segment_that_lists_each():
    match = shown.split_emoji()
    pieces, _ = heatmap.segments(match.response, match.tokens, match.token_scores)
    by_text = {piece.text: [share.position for share in piece.shares] for piece in pieces}
    assert by_text["🧘"] == [1, 2, 3]
    assert by_text["namasté"] == [4, 5, 6]
    assert by_text["👩‍🚀"] == [11, 12, 13]


def test_tokens_of_a_word_are_one_segment_where_words_are_known_by_their_spaces():
    text = "rain-coats, ryokan_x 日本から ภาษา"
    tokens = [Token(text[at : at + 2], at, at + 2) for at in range(0, len(text), 2)]
    whole = [piece.text for piece in heatmap.segments(text, tokens, [1.0] * len(tokens))[0]]
    assert (
        whole[0] == "rain" and "-c" not in whole and "oats" in "".join(whole) and not {"日本から", "ภาษา"} & set(whole)
    )
    apart = heatmap.segments(text, tokens, [1.0] * len(tokens), words=False)[0]
    assert [piece.before + piece.text + piece.after for piece in apart] == [token.text for token in tokens]
    assert heatmap.colour_step(0.09, 1.0) == 0 < heatmap.colour_step(0.1, 1.0)


def test_spans_that_overlap_in_any_order_lose_nothing():
    draw = random.Random(0)
    text = "a é\u0301 b 👍🏽 c\n"
    for _ in range(300):
        cuts = [sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1))) for _ in range(6)]
        tokens = [Token(text[start:end], start, end) for start, end in cuts]
        pieces, rest = heatmap.segments(text, tokens, [float(i) for i in range(6)])
        assert together(pieces, rest) == text
        assert sorted(share.position for piece in pieces for share in piece.shares) == list(range(6))


def test_as_many_shares_as_tokens_are_needed():
    with pytest.raises(DataError, match="1 tokens and 2 shares"):
        heatmap.segments("a", [Token("a", 0, 1)], [0.1, 0.2])


def test_colour_grows_with_the_share_and_has_its_sign():
    steps = [heatmap.colour_step(score / 100, 1.0) for score in range(-100, 101)]
    assert steps == sorted(steps)
    assert (steps[0], steps[100], steps[-1]) == (-heatmap.STEPS, 0, heatmap.STEPS)
    assert heatmap.colour_step(0.3, 0.0) == 0


def test_selected_tokens_are_marked_as_one_piece_without_the_white_space_around_them():
    tokens = [Token("From", 0, 4), Token(" Jap", 4, 8), Token("an", 8, 10), Token(" now", 10, 14)]
    tokens.append(Token("</s>", 14, 14))

    def marked(*selection):
        return heatmap.marked_answer(QueryInfo("Where?", "From Japan now.", tokens, list(selection)))

    assert marked(1, 2) == [("From ", False), ("Japan", True), (" now.", False)]
    assert marked(3, 4) == [("From Japan ", False), ("now</s>", True), (".", False)]
    assert marked(0, 1, 2, 3, 4) == [("From Japan now.", False)]
