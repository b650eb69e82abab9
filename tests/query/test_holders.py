"""A question about a word: rows that hold it are candidates too. Held against plain Python over all rows."""

import json
import shutil

import numpy as np
import pytest

from rapidindex import Index, Query, remove
from rapidindex.caching.build import build
from rapidindex.config import GradientConfig
from rapidindex.query import holders
from rapidindex.results import QueryInfo, Token
from tests import tiny
from tests.oracles import ANSWER, PROMPT, request

K = 2
NUMBER = 4 * K
"""Candidates of a question for `K` matches."""


@pytest.fixture(scope="module")
def path(tmp_path_factory, llama_folders):
    rows = [
        {
            "instruction": f"Tell me about {word} Japan",
            "output": f"{word} is " + "very " * (number % 7) + ("Japan" if number % 3 == 0 else "nice"),
            "country": "Japan",
        }
        for number in range(5)
        for word in tiny.WORDS
        for number in [10 * number + tiny.WORDS.index(word)]
    ]
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path_factory.mktemp("index") / "index"
    build(request(file, path, llama_folders, gradient=GradientConfig("unit", "none")))
    return path


@pytest.mark.parametrize(("word", "opponents", "adds"), [("nice", False, 1), ("Japan", True, 6), ("Japan", False, 0)])
def test_the_rows_that_hold_the_word_are_candidates_beside_the_best(path, word, opponents, adds):
    index = Index.open(path)
    (asked,) = index.encode([Query("Tell me about cats", "tea is nice, not Japan", word)])
    options = {"opponents": opponents, "exact": True}
    every = index.query(asked, k=len(index), rescore=False, all=True, **options).matches
    holding = [match.id for match in every if word in match.response][: NUMBER * 3 // 4]
    best = [match.id for match in every[:NUMBER]]
    others = [id for id in best if id not in holding][: NUMBER - len(holding)]
    strongest = min if opponents else max
    expected = [match for match in every if match.id in {*holding, *others}]
    expected.sort(key=lambda match: strongest(match.token_scores), reverse=not opponents)
    result = index.query(asked, k=K, **options)
    assert [match.id for match in result.matches] == [match.id for match in expected[:K]]
    added = set(holding) - set(best)
    assert result.rescoring.for_words == len(added) == adds and result.rescoring.candidates == NUMBER
    for match in result.matches:
        assert (match.percentile is None) == (match.id in added)
        assert match.score == pytest.approx(next(one.score for one in every if one.id == match.id), abs=1e-6)


def test_removed_rows_are_no_candidates(path, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "index"
    shutil.copytree(path, copy)
    index = Index.open(copy)
    rows = index.rows_of("sentence")
    held = holders.holders(rows, rows.live_mask, {"Japan"})
    assert len(held) == len(rows)  # in the prompt and in another column, which the response alone decides on
    responding = [row for row in held if holders.respond_with(rows, int(row), {"Japan"})]
    assert len(responding) == sum(number % 3 == 0 for number in range(50))
    gone = [rows.ids[rows.example[row]] for row in responding]
    remove(copy, ids=gone)
    found = Index.open(copy).query(PROMPT, answer=ANSWER, token="Japan", k=K, exact=True)
    assert found.rescoring.for_words == 0 and not {match.id for match in found.matches} & set(gone)


def test_a_word_that_is_everywhere_adds_nothing(path, monkeypatch):
    monkeypatch.setattr(holders, "MOST_HOLDERS", 49)
    found = Index.open(path).query(PROMPT, answer=ANSWER, token="Japan", k=K, exact=True)
    assert found.rescoring.for_words == 0 and found.rescoring.candidates == NUMBER


def test_more_candidates_than_rows_are_all_rows(path):
    found = Index.open(path).query(PROMPT, answer=ANSWER, token="Japan", k=K, rescore=500, exact=True)
    assert found.rescoring.candidates == 50 and found.rescoring.for_words == 0


def test_the_words_of_a_question_are_its_stretches_of_the_answer():
    answer = "Nine days, then nine more days."
    texts = ["Nine", " days", ",", " then", " nine", " more", " days", ".", ""]
    starts = np.cumsum([0, *map(len, texts)])
    tokens = [Token(text, int(a), int(a) + len(text)) for text, a in zip(texts, starts, strict=False)]
    asked = QueryInfo("", answer, tokens, [4, 5, 0, 8, 2])
    assert holders.words_of(asked) == {"Nine", "nine", "nine more", "Nine more", ","}
    assert holders.words_of(QueryInfo("", answer, tokens, [8])) == set()
