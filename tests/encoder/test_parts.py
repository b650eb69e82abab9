"""The split and the targets, against what they are by definition."""

import numpy as np
import pytest
import scipy.stats

from rapidindex.config import DistillConfig
from rapidindex.encoder.parts import Part, Text, agreement, read_parts
from rapidindex.errors import UsageError
from rapidindex.store import Store
from tests.oracles import all_rows


@pytest.fixture(scope="module")
def rows(gradient_index):
    return Store.open(gradient_index).rows("sentence")


@pytest.fixture(scope="module")
def parts(rows):
    return read_parts(rows, (), DistillConfig())


def test_no_text_lies_in_two_parts_and_none_is_lost(rows, parts):
    numbers = [{text.number for text in part.pool} for part in parts.values()]
    assert [len(mine) for mine in numbers] == [84, 12, 24]
    assert set.union(*numbers) == set(range(len(rows)))
    for part in parts.values():
        assert {anchor.number for anchor in part.anchors} <= {text.number for text in part.pool}


def test_equal_texts_stay_together_whatever_their_ids(rows, parts):
    twins = [Text("same", "text", row=np.zeros(rows.K, np.float32)) for _ in range(6)]
    asked = read_parts(rows, twins, DistillConfig())
    assert [len(part.anchors) - len(parts[name].anchors) for name, part in asked.items()].count(6) == 1


def test_another_seed_gives_another_split(rows, parts):
    other = read_parts(rows, (), DistillConfig(seed=1))
    assert {t.number for t in other["held out"].pool} != {t.number for t in parts["held out"].pool}


@pytest.mark.parametrize("name", ["train", "held out"])
def test_targets_are_the_inner_products_of_the_stored_rows(gradient_index, rows, parts, name):
    stored, part = all_rows(gradient_index), parts[name]
    of = {text.number: stored[rows.ids[rows.example[text.number]]] for text in part.pool}
    for i, anchor in enumerate(part.anchors):
        for j, text in enumerate(part.pool):
            if anchor.number == text.number and name == "held out":
                assert np.isnan(part.targets[i, j])
            else:
                expected = float(of[anchor.number] @ of[text.number])
                assert part.targets[i, j] == pytest.approx(expected, abs=1e-5)


def test_a_question_is_compared_by_its_own_row(rows, parts):
    row = np.random.default_rng(0).standard_normal(rows.K).astype(np.float32)
    questions = [Text(f"question {n}", "answer", row=row) for n in range(20)]
    part = read_parts(rows, questions, DistillConfig(anchors=0))["train"]
    assert 8 <= len(part.anchors) < 20 and not np.isnan(part.targets).any()
    examples, asked = part.pool[: -len(part.anchors)], part.pool[-len(part.anchors) :]
    expected = rows.take([text.number for text in examples]) @ row
    np.testing.assert_allclose(part.targets[0, : len(examples)], expected, rtol=1e-4, atol=1e-4)
    assert asked == part.anchors and part.targets[0, len(examples)] == pytest.approx(row @ row, rel=1e-4)


def test_agreement_is_scipys_spearman():
    rng = np.random.default_rng(0)
    targets, scores = rng.random((5, 30), np.float32), rng.integers(0, 6, (5, 30)).astype(float)
    targets[2, 3] = np.nan
    scores[4] = 1.0  # says nothing, and counts as 0
    part = Part([], [], targets)
    found, known = agreement(scores, part), ~np.isnan(targets)
    each = [scipy.stats.spearmanr(scores[i][known[i]], targets[i][known[i]]).statistic for i in range(4)]
    assert found.per_anchor == pytest.approx(np.mean([*each, 0]))
    assert found.aggregated == pytest.approx(scipy.stats.spearmanr(scores[known], targets[known]).statistic)


def test_an_index_that_is_too_small_says_how_many_examples_are_needed(rows, monkeypatch):
    monkeypatch.setattr("rapidindex.encoder.parts.LEAST", 121)
    with pytest.raises(UsageError, match="120 examples, and 121 are needed"):
        read_parts(rows, (), DistillConfig())
    with pytest.raises(UsageError, match="0 anchors are left"):
        monkeypatch.setattr("rapidindex.encoder.parts.LEAST", 1)
        read_parts(rows, (), DistillConfig(anchors=0))


def test_a_heads_anchors_are_among_the_texts_that_it_learns_from(rows):
    part = read_parts(rows, (), DistillConfig(pool=32))["train"]
    assert len(part.pool) == 32 and part.anchors == part.pool
    trained = read_parts(rows, (), DistillConfig("train", pool=32))["train"]
    assert len(trained.pool) == 32 and len(trained.anchors) == 84
