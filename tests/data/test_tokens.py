"""Which tokens of a response get a row of their own, and which tokens of an answer a query selects."""

import pytest

from rapidindex.config import TokenConfig
from rapidindex.data.tokens import select_tokens, token_positions
from rapidindex.errors import QueryError, TokenNotFound, UsageError
from rapidindex.results import Token

ANSWER = "Yoga is from Japan; Japan, I say."
PIECES = ["Yoga", " is", " from", " Jap", "an", ";", " Japan", ",", " I", " say", "."]
RESPONSE = "Tokyo, isn't it? 日本 é"
RESPONSE_PIECES = ["Tok", "yo", ",", " isn", "'t", " it", "?", " 日", "本", " é", ""]


def tokens(pieces=PIECES):
    """The tokens of the pieces' text; an empty piece is a token that ends the turn."""
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return [Token(piece or "<|end|>", end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]


def test_the_pieces_are_the_whole_text():
    assert "".join(PIECES) == ANSWER and "".join(RESPONSE_PIECES) == RESPONSE


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("all", list(range(11))),
        ("3", [0, 1, 2]),
        ("content", [0, 1, 7, 8, 9]),
        ("content,3", [0, 1, 7]),
    ],
)
def test_content_leaves_out_punctuation_stop_words_and_the_end(kinds, expected):
    assert token_positions(RESPONSE, tokens(RESPONSE_PIECES), TokenConfig(tokens=kinds)) == expected


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("Japan", [3, 4, 6]),
        ("Japan#1", [3, 4]),
        ("Japan#2", [6]),
        (" Japan", [3, 4, 6]),
        ("from Japan", [2, 3, 4]),
        (" Yoga", [0]),
        ("Yoga", [0]),
        (".", [10]),
    ],
)
def test_a_word_takes_the_tokens_that_overlap_it(token, expected):
    assert select_tokens(tokens(), ANSWER, token=token).positions == expected


def words_of(answer, token):
    """The words of the answer that `token` selects, and whether only as parts; each character is a token."""
    letters = [Token(letter, at, at + 1) for at, letter in enumerate(answer)]
    positions, parts = select_tokens(letters, answer, token=token)
    runs = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ["".join(answer[i] for i in run) for run in runs], parts


@pytest.mark.parametrize(
    ("answer", "token", "expected"),
    [
        ("The cat said he saw the dog and then the hen", "he", ["he"]),
        ("a cat and a bat at sea", "a", ["a", "a"]),
        ("Indian food comes from India.", "India", ["India"]),
        ("Indian food comes from India.", "India#1", ["India"]),
        ("98 of 1998", "98", ["98"]),
        ("Japan's food, pre-Japan", "Japan", ["Japan", "Japan"]),
        ("“Japan”", "Japan", ["Japan"]),
        ("snake_case and case", "case", ["case"]),
        ("caf\u00e9 and cafe\u0301", "caf\u00e9", ["caf\u00e9", "cafe\u0301"]),
        ("caf\u00e9 and cafe\u0301", "cafe\u0301#2", ["cafe\u0301"]),
        ("x cafe\u0301 cafe", "cafe", ["cafe"]),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8 x", "\ud55c\uad6d", ["\u1112\u1161\u11ab\u1100\u116e\u11a8"]),
        ("日本人は日本にいる", "日本", ["日本", "日本"]),
        ("ฉันรักญี่ปุ่นมาก", "ญี่ปุ่น", ["ญี่ปุ่น"]),
        ("Japanです", "Japan", ["Japan"]),
    ],
)
def test_whole_words_are_found_whatever_their_spelling(answer, token, expected):
    assert words_of(answer, token) == (expected, False)


@pytest.mark.parametrize(
    ("answer", "token", "expected"),
    [
        ("Indian food, in 1998", "India", ["India"]),
        ("Indian food, in 1998", "98", ["98"]),
        ("Indian Indians", "India#2", ["India"]),
        ("일본은 섬이다", "일본", ["일본"]),
    ],
)
def test_parts_of_words_are_found_where_there_is_no_whole_one_and_it_says_so(answer, token, expected):
    assert words_of(answer, token) == (expected, True)


def test_a_number_counts_the_whole_words_alone():
    with pytest.raises(TokenNotFound, match="'India' is only once as a whole word"):
        words_of("Indian food comes from India.", "India#2")


@pytest.mark.parametrize("span", ["9" * 5000, "1:" + "9" * 5000])
def test_a_number_of_thousands_of_digits_is_refused(span):
    with pytest.raises(UsageError):
        select_tokens(tokens(), ANSWER, span=span)
    with pytest.raises(TokenNotFound):
        select_tokens(tokens(), ANSWER, token=f"Japan#{span}")


def test_without_a_choice_every_token_is_asked_about():
    assert select_tokens(tokens(), ANSWER) == (list(range(len(PIECES))), False)


@pytest.mark.parametrize(("span", "expected"), [("3:5", [3, 4, 5]), ("0", [0]), ("10:10", [10])])
def test_a_span_counts_from_zero_and_includes_its_end(span, expected):
    assert select_tokens(tokens(), ANSWER, span=span).positions == expected


def test_a_hash_in_the_answer_itself_is_text():
    answer = "I like C#2 best"
    spans = [Token("I like ", 0, 7), Token("C#2", 7, 10), Token(" best", 10, 15)]
    assert select_tokens(spans, answer, token="C#2").positions == [1]


def test_a_miss_lists_the_tokens_with_their_positions():
    with pytest.raises(TokenNotFound, match="'India' is not in the answer") as caught:
        select_tokens(tokens(), ANSWER, token="India")
    assert "3:Jap  4:an" in caught.value.hint
    with pytest.raises(TokenNotFound, match="only 2 times"):
        select_tokens(tokens(), ANSWER, token="Japan#3")


def test_a_miss_in_a_long_answer_shows_its_beginning():
    answer = "tea " * 5000
    many = [Token("tea ", at, at + 4) for at in range(0, len(answer), 4)]
    with pytest.raises(TokenNotFound) as caught:
        select_tokens(many, answer, token="rice" * 5000)
    assert len(str(caught.value)) < 3000 and "199:tea  …" in caught.value.hint


@pytest.mark.parametrize("span", ["3:11", "11"])
def test_a_span_outside_the_answer_is_refused(span):
    with pytest.raises(TokenNotFound, match="0 to 10"):
        select_tokens(tokens(), ANSWER, span=span)


@pytest.mark.parametrize(
    "bad", [{"span": "a:b"}, {"span": "-1"}, {"span": "5:3"}, {"token": " "}, {"token": "a", "span": "1"}]
)
def test_what_has_no_meaning_is_a_usage_error(bad):
    with pytest.raises(UsageError):
        select_tokens(tokens(), ANSWER, **bad)


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(QueryError):
        select_tokens([], "", token="x")
