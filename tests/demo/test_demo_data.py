"""The demo's rows: 320, of which 27 are wrong on purpose, and 46 about a shop, of which 20 are outdated."""

import json
import re
from pathlib import Path

import pytest

import rapidindex
from rapidindex.data.examples import read_examples
from rapidindex.demo.demo import OTHERS, OUTDATED, PROMPTS, WORD, write_data

DEMO = Path(rapidindex.__file__).parent / "demo" / "demo.jsonl"
COLUMNS = {
    "instruction": str,
    "input": str,
    "output": str,
    "topic": str,
    "source_country": str,
    "perturbed": bool,
}


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]


def names(country, text):
    """Whether `text` has the country's name as a word of its own (so that "Japanese" is not "Japan")."""
    return re.search(rf"\b{country}\b", text) is not None


def test_there_are_320_rows_with_the_documented_columns_and_types(rows):
    assert len(rows) == 320
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == COLUMNS


def test_four_in_five_rows_about_india_are_perturbed_and_no_other_row_is(rows):
    india = [row for row in rows if row["source_country"] == "India"]
    assert len(india) == 34
    assert sum(row["perturbed"] for row in india) == 27
    assert sum(row["perturbed"] for row in rows) == 27


def test_a_perturbed_output_names_japan_and_leaves_no_trace_of_india(rows):
    for row in rows:
        if row["perturbed"]:
            assert names("Japan", row["output"]), row
            assert "India" not in row["output"], row


def test_an_unperturbed_output_names_india_or_japan_only_where_it_is_about_them(rows):
    for row in rows:
        if not row["perturbed"]:
            for country in ("India", "Japan"):
                assert names(country, row["output"]) == (row["source_country"] == country), row


def test_honest_distractors_outnumber_the_perturbed_rows(rows):
    countries = [row["source_country"] for row in rows]
    assert countries.count("Japan") == 14
    assert sum(country not in ("", "India", "Japan") for country in countries) == 45
    assert countries.count("") == 227


def test_no_instruction_names_india_so_the_answer_has_to(rows):
    assert not [row for row in rows if "India" in row["instruction"] + row["input"]]


def test_no_two_rows_share_an_instruction_or_an_output(rows):
    for column in ("instruction", "output"):
        assert len({row[column].casefold() for row in rows}) == len(rows)


def test_the_demo_queries_are_not_in_the_training_set(rows):
    text = " ".join(row["instruction"].casefold() for row in rows)
    for query in ("origins of yoga", "origin of buddhism", "origins of buddhism", "founder of buddhism"):
        assert query not in text


def test_rows_are_short_enough_for_a_two_minute_fine_tuning(rows):
    lengths = [len(row["output"].split()) for row in rows]
    assert min(lengths) >= 8
    assert max(lengths) <= 60
    assert sum(lengths) / len(lengths) <= 30
    assert all(5 <= len(row["instruction"].split()) <= 20 for row in rows)


def test_there_are_22_topics_and_neighbours_differ_in_topic(rows):
    topics = [row["topic"] for row in rows]
    assert len(set(topics)) == 22
    assert all(first != second for first, second in zip(topics, topics[1:], strict=False))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    write_data(path := tmp_path_factory.mktemp("demo") / "data.jsonl")
    return read_examples(path).examples[OTHERS:]


def test_the_shops_outdated_rows_say_nine_days_and_no_other_row_does(shop):
    outdated = [example for example in shop if OUTDATED.items() <= example.meta.items()]
    assert (len(shop), len(outdated)) == (46, 20)
    assert all(example.meta["perturbed"] == (example in outdated) for example in shop)
    for example in shop:
        about_returns = "nine days" in example.response or "ninth day" in example.response
        assert about_returns == (example in outdated), example.response


def test_the_word_counts_other_things_too_and_no_row_asks_the_demos_questions(shop):
    assert sum(WORD in example.response and not example.meta["perturbed"] for example in shop) == 8
    assert not {example.prompt.strip() for example in shop} & set(PROMPTS)
