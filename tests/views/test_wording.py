"""Numbers and findings read the same in every view."""

from dataclasses import replace

import pytest

from rapidindex.results import Rescoring
from rapidindex.views import wording
from rapidindex.views.html import page
from tests.views import shown


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "+0.0000"), (0.41, "+0.4100"), (-0.012345, "-0.0123"), (3e-7, "+3e-07")]
)
def test_numbers_have_a_sign_and_digits_that_count(value, text):
    assert wording.signed(value) == text


def test_a_first_score_far_from_all_others_stands_out():
    assert wording.verdict(shown.result()) == ""
    result = shown.result(matches=[shown.match(1, "Yoga.", score=0.4)])
    sentence = (
        "The proponent shown stands out: further from the mean than the 3.2 σ of the most extreme of 1,000 scores"
    )
    assert wording.standing(result).startswith(sentence)
    assert wording.distance(result, result.matches[0]) == "6.7 σ"


def test_a_search_on_a_gpu_says_so():
    assert wording.search(shown.result()) == "exhaustive search"
    assert wording.search(shown.result(search_device="cuda")) == "exhaustive search on cuda"
    approximate = shown.result(search="ann", recall=0.991, search_device="cuda:1")
    assert wording.search(approximate) == "approximate search on cuda:1, recall 0.991 measured"


@pytest.mark.parametrize(
    ("share", "whole", "text"), [(3.3, 3.0, "+110 %"), (-0.2, -2.0, "-10 %"), (0.1, 0.0, "+0.1000")]
)
def test_a_share_is_given_in_percent_with_its_own_sign(share, whole, text):
    assert wording.percent(share, whole) == text


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
    result = shown.result(direction, [shown.match(1, "Yoga.", score=score)])
    assert words in wording.verdict(result)


def test_a_rescored_order_is_explained_and_does_not_hide_what_stands_out():
    matches = [shown.match(1, "Yoga.", score=0.01), shown.match(2, "Japan.", score=0.4)]
    result = shown.result(matches=matches, rescoring=Rescoring(40, 0.873, 7))
    assert wording.verdict(result) == ""
    sentence = "among 40 candidates. The two orders have a rank correlation of 0.87; a candidate"
    assert sentence in wording.rescored(result)
    assert "moved by 7 places at most" in result.to_html()
    assert "candidates. A candidate" in wording.rescored(shown.result(rescoring=Rescoring(1, None, 0)))
    assert "moved by 1 place at most" in wording.rescored(shown.result(rescoring=Rescoring(2, 1.0, 1)))


def test_the_influence_in_a_tasks_index_is_of_compressed_gradients():
    result = shown.result(rescoring=Rescoring(40, 0.873, 7))
    task = replace(result, index=replace(result.index, specialized=True))
    assert "Ordered by uncompressed influence" in wording.rescored(result)
    of_a_word = shown.result(rescoring=Rescoring(40, 0.873, 7, by_token=True))
    assert "Ordered by the strongest word's uncompressed influence among 40 candidates. " in wording.rescored(of_a_word)
    matches = [shown.match(1, "Yoga.", score=0.01), shown.match(2, "Japan.", score=0.4)]
    said = wording.standing(replace(of_a_word, matches=matches))
    assert said.startswith("One of the 2") and said.endswith("by chance. The rest is there for its strongest word.")
    added = replace(of_a_word, rescoring=Rescoring(40, 0.873, 7, by_token=True, for_words=3))
    assert "among 40 candidates, 3 of them added for the words they hold. " in wording.rescored(added)
    assert "Ordered by compressed influence" in wording.rescored(task)
    assert "uncompressed" not in page(task, None, "") and "uncompressed" in page(result, None, "")


def test_without_a_summary_only_the_sign_is_judged():
    assert wording.verdict(shown.result(matches=[shown.match(1, "Yoga.", score=0.01)], summary=None)) == ""
    assert "nothing to compare" in wording.verdict(shown.result(matches=[]))
