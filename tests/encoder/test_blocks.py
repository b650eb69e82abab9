"""The split, the targets and the blocks, against what they are by definition."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from rapidindex.config import DistillConfig
from rapidindex.encoder.blocks import Part, Text, agreement, draw_blocks, read_parts
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


def test_targets_are_the_inner_products_of_the_stored_rows(gradient_index, rows, parts):
    stored, part = all_rows(gradient_index), parts["train"]
    of = {text.number: stored[rows.ids[rows.example[text.number]]] for text in part.pool}
    for i, anchor in enumerate(part.anchors):
        for j, text in enumerate(part.pool):
            if anchor.number == text.number:
                assert np.isnan(part.targets[i, j])
            else:
                expected = float(of[anchor.number] @ of[text.number])
                assert part.targets[i, j] == pytest.approx(expected, abs=1e-5)


def test_a_question_is_compared_by_its_own_row(rows, parts):
    row = np.random.default_rng(0).standard_normal(rows.K).astype(np.float32)
    questions = [Text(f"question {n}", "answer", row=row) for n in range(20)]
    part = read_parts(rows, questions, DistillConfig(anchors=0))["train"]
    assert 8 <= len(part.anchors) < 20 and not np.isnan(part.targets).any()
    expected = rows.take([text.number for text in part.pool]) @ row
    np.testing.assert_allclose(part.targets[0], expected, rtol=1e-4, atol=1e-4)


def test_each_epoch_has_every_anchor_and_no_block_has_an_anchor_as_candidate(parts):
    options, part = DistillConfig(epochs=3, hard=0.5), parts["train"]
    anchors, candidates = draw_blocks(part, options)
    assert anchors.shape == (33, 8) and candidates.shape == (33, 16)
    for epoch in np.split(anchors, 3):
        assert set(epoch.ravel()) == set(range(len(part.anchors)))
    assert not np.isnan(np.take_along_axis(part.targets[anchors[0]], candidates[:1].repeat(8, 0), 1)).any()
    for mine, others in zip(anchors, candidates, strict=True):
        assert len(set(others)) == 16
        assert not {part.anchors[a].number for a in mine} & {part.pool[c].number for c in others}


def test_hard_candidates_are_nearer_than_others():
    rng = np.random.default_rng(0)
    texts = [Text(str(n), "", n) for n in range(400)]
    part = Part([Text(f"a{n}", "", -2 - n) for n in range(8)], texts, rng.random((8, 400), np.float32))
    means = []
    for hard in (0.0, 1.0):
        anchors, candidates = draw_blocks(part, replace(DistillConfig(epochs=5), hard=hard))
        means.append(np.mean([part.targets[a][:, c].max(0).mean() for a, c in zip(anchors, candidates, strict=True)]))
    assert means[1] > means[0] + 0.05


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
    monkeypatch.setattr("rapidindex.encoder.blocks.LEAST", 121)
    with pytest.raises(UsageError, match="120 examples, and 121 are needed"):
        read_parts(rows, (), DistillConfig())
    with pytest.raises(UsageError, match="0 anchors are left"):
        monkeypatch.setattr("rapidindex.encoder.blocks.LEAST", 1)
        read_parts(rows, (), DistillConfig(anchors=0))
