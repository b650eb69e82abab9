"""Results show themselves in a line, as a frame and as JSON."""

import functools
import json
import random
import sys
from dataclasses import replace

import pytest

from rapidindex.errors import DataError, UsageError
from rapidindex.results import Rescoring, Result, ScoreSummary
from tests.views import shown

COLUMNS = ["rank", "score", "exact_score", "percentile", "id", "prompt", "response"]


def test_a_result_is_shown_in_a_line():
    expected = "'Yoga originated in Japan thousands of years ago.': 6 proponents of 1,000 examples, the first scores"
    assert repr(shown.result()) == f"<Result {expected} +0.3900>"
    query = replace(shown.result().query, answer="yoga " * 500)
    nothing = repr(shown.result("opponents", [], level="token", query=query))
    assert nothing.endswith("…': 0 opponents of 1,000 tokens>") and len(nothing) < 120


def test_a_frame_has_a_row_for_each_match_and_a_column_for_each_key():
    pytest.importorskip("pandas")
    result = shown.result()
    result = replace(result, matches=[match for match in result.matches if "\ud800" not in match.response])
    frame = result.to_pandas()
    assert list(frame.columns) == [*COLUMNS, "perturbed", "<b>name</b>", "line"]
    assert list(frame["rank"]) == [match.rank for match in result.matches]
    assert list(frame["exact_score"]) == [match.exact_score for match in result.matches]
    assert list(frame["response"]) == [match.response for match in result.matches]
    assert (frame["perturbed"][0], frame["perturbed"][1], frame["line"][1]) == (True, None, 7)


def test_a_frame_of_tokens_has_their_positions_and_renames_keys_that_are_taken():
    pytest.importorskip("pandas")
    matches = [replace(match, meta={"id": "a", "n": 1}) for match in shown.tokens().matches]
    frame = replace(shown.tokens(), matches=matches).to_pandas()
    assert list(frame.columns) == [*COLUMNS, "position", "meta.id", "n"]
    assert list(frame["position"]) == [match.position for match in matches]
    assert list(frame["id"]) == [match.id for match in matches]


def test_a_frame_of_no_match_has_its_columns():
    pytest.importorskip("pandas")
    assert list(shown.result(matches=[]).to_pandas().columns) == COLUMNS


def test_without_pandas_a_frame_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="needs the package pandas. pip install pandas"):
        shown.result().to_pandas()


@pytest.mark.parametrize("fields", [{}, {"summary": None, "recall": None}, {"rescoring": Rescoring(40, None, 7)}])
def test_json_gives_the_result_back(fields):
    result = shown.result(**fields)
    assert Result.from_json(result.to_json()) == result


def test_json_says_what_stands_out_and_how_the_search_went_in_plain_words():
    matches = [shown.match(1, "Yoga.", score=0.4), shown.match(2, "Pi.", score=0.19), shown.match(3, "e", score=-0.4)]
    value = json.loads(shown.result(matches=matches).to_json())
    assert [match["stands_out"] for match in value["matches"]] == [True, False, False]
    assert [match["uncompressed_score"] for match in value["matches"]] == [match.exact_score for match in matches]
    assert (value["exhaustive"], value["search"]) == (True, "exact")
    assert shown.result(summary=None).stands_out(matches[1]) is None
    old = json.loads(shown.result().to_json())
    for match in old["matches"]:
        del match["source"], match["line"], match["uncompressed_score"], match["stands_out"]
    del old["exhaustive"]
    assert Result.from_json(json.dumps(old)) == shown.result()


def test_json_without_a_rescoring_is_read():
    value = json.loads(shown.result().to_json())
    del value["rescoring"]
    assert Result.from_json(json.dumps(value)) == shown.result()


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"schema": "rapidindex.result/9"}'])
def test_other_json_is_refused(text):
    with pytest.raises(DataError, match="not a rapidindex result|has the schema 'rapidindex.result/9'"):
        Result.from_json(text)


def places(value, before=()):
    """The path of each value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from places(inner, (*before, key))


def spoiled(text, rng):
    """A JSON text in which one value is another one, or gone."""
    value = json.loads(text)
    *path, last = rng.choice(list(places(value)))
    holder = functools.reduce(lambda inner, key: inner[key], path, value)
    if rng.random() < 0.25:
        del holder[last]
    else:
        holder[last] = rng.choice([None, 1, -1, "x", [], {}, 1e308, float("inf"), True, [1], {"a": 1}, 2**70])
    return json.dumps(value)


def test_a_result_that_was_changed_is_refused_or_can_be_shown():
    rng, refused = random.Random(0), 0
    text = shown.result(matches=shown.result().matches[:2]).to_json()
    for _ in range(120):
        changed = spoiled(text, rng)
        try:
            Result.from_json(changed).to_html()
        except DataError:
            refused += 1
    assert 40 < refused < 115


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matches": [3]}, r"result\.matches\[0\] is 3"),
        ({"recall": "x"}, r"result\.recall is 'x'"),
        ({"seconds": {"gradient": 1.0}}, r"result\.seconds is .*: Object missing required field search"),
        ({"seconds": None}, r"result\.seconds is None"),
        ({"matches": [{"meta": {}}]}, r"result\.matches\[0\] is {'meta': {}}"),
        ({"summary": {"n": 1.5}}, r"result\.summary\.n is 1\.5: Expected int, got float"),
    ],
)
def test_a_field_of_another_type_is_named(change, message):
    with pytest.raises(DataError, match=message):
        Result.from_json(json.dumps(json.loads(shown.result().to_json()) | change))


@pytest.mark.parametrize(("score", "place"), [(-2.0, 0.0), (-1.0, 0.0), (0.0, 0.25), (3.0, 1.0), (9.0, 1.0)])
def test_a_score_has_a_place_between_the_least_and_the_largest(score, place):
    assert ScoreSummary(9, -1.0, 3.0, 0.0, 1.0, []).place(score) == place
    assert ScoreSummary(9, 1.0, 1.0, 1.0, 0.0, []).place(score) == 0.5
