"""Precision, average precision and BM25, held against their definitions."""

import math

import pytest

from rapidindex import Index, QueryOptions
from rapidindex.caching.build import build
from rapidindex.data.bm25 import BM25
from rapidindex.query.evaluation import average_precision, precision_at
from tests.oracles import request


def test_precision_and_average_precision_follow_their_definitions():
    ranking, relevant = ["a", "x", "b", "y", "c"], {"a", "b", "c", "d"}
    assert precision_at(ranking, relevant, 5) == pytest.approx(3 / 5)
    assert average_precision(ranking, relevant, 5) == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 4)
    assert average_precision(ranking, relevant, 2) == pytest.approx(1 / 2)
    assert average_precision(["x"], relevant, 1) == average_precision(["x"], set(), 1) == 0.0


def test_bm25_ranks_by_the_written_out_formula():
    texts = ["Tea from Japan", "tea tea tea", "a long text about fish and rice and the sea of Japan", "cats"]
    words = [text.lower().split() for text in texts]
    mean = sum(map(len, words)) / len(words)

    def score(number):
        total = 0.0
        for word in ("tea", "japan"):
            containing, count = sum(word in text for text in words), words[number].count(word)
            inverse = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            total += inverse * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(words[number]) / mean))
        return total

    expected = sorted(range(len(texts)), key=lambda number: (-score(number), number))
    assert BM25(texts).ranking("Tea, Japan", 4).tolist() == expected


def test_an_index_is_evaluated_beside_bm25(data, tmp_path, llama_folders):
    build(request(data, tmp_path / "index", llama_folders))
    index = Index.open(tmp_path / "index")
    queries = [{"prompt": "Tell me about tea", "answer": "tea is nice", "token": "tea"}]
    figures = index.evaluate(queries, lambda match: match.prompt.endswith("tea"), options=QueryOptions(k=4))
    first = index.query(queries[0], k=4)
    found = [match.prompt.endswith("tea") for match in first.matches]
    assert figures.precision == pytest.approx(sum(found) / 4)
    assert figures.bm25_precision == pytest.approx(1 / 4) and figures.bm25_average_precision == pytest.approx(1.0)
    assert figures.to_dict()["queries"] == 1
