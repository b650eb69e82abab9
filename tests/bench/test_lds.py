"""The linear datamodeling score: retraining without some rows, the bank that keeps it, and the score itself."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.evidence.lds import SMOKE, subset
from bench.evidence.lds_scores import DEFAULT, lds_table, outcomes, reliability, spearman
from bench.evidence.representations import hidden_states, representations
from bench.evidence.retraining import Retrainer, Schedule
from rapidindex.config import ModelConfig
from rapidindex.gradients.losses import Batch, example_losses, trainable
from rapidindex.model.model import load
from tests import tiny

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs scipy")
SCHEDULE = Schedule(epochs=2, batch_size=4, learning_rate=1e-2, layers=1, rank=4, dtype="float32")


@pytest.fixture(scope="module")
def retrainer(tmp_path_factory):
    base, _ = tiny.save_model(tmp_path_factory.mktemp("lds"), "llama", lora=False)
    return Retrainer(str(base), SCHEDULE)


def batches(count):
    """Rows of 5 to 12 tokens, the last half of each in the loss."""
    draw = np.random.default_rng(0)
    for length in draw.integers(5, 13, count):
        weights = (np.arange(length) >= length // 2).astype(np.float32)
        yield Batch.of([draw.integers(3, tiny.VOCABULARY, length)], [weights / weights.sum()])


def adapter(retrainer):
    return {name: value.detach().clone() for name, value in trainable(retrainer.model).items()}


def test_losses_from_the_states_below_the_adapter_are_those_of_the_whole_model(retrainer, tmp_path):
    rows = retrainer.rows(list(batches(7)))
    retrainer.retrain(rows, np.ones(7, bool), 0)
    found = retrainer.evaluate(rows)
    retrainer.save(tmp_path / "adapter")
    whole = load(ModelConfig(retrainer.base.name_or_path, str(tmp_path / "adapter"), device="cpu")).model
    with torch.no_grad():
        expected = [float(example_losses(whole, row.batch)) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_row_without_a_loss_need_not_be_computed(retrainer):
    rows, kept = retrainer.rows(list(batches(16))), np.arange(16) % 2 == 0
    kept[retrainer.schedule.batches(16, 3)[2]] = False  # a step without any loss still moves, by its momentum
    retrainer.retrain(rows, kept, 3)
    skipped = adapter(retrainer)
    retrainer.retrain(rows, kept, 3, compute_masked=True)
    computed = adapter(retrainer)
    for name, value in computed.items():
        torch.testing.assert_close(skipped[name], value, rtol=1e-4, atol=1e-6)
    retrainer.retrain(rows, ~kept, 3)
    assert any((value - skipped[name]).abs().max() > 1e-3 for name, value in adapter(retrainer).items())


def test_a_retraining_is_a_function_of_rows_subset_and_seed(retrainer):
    rows, kept = retrainer.rows(list(batches(8))), np.arange(8) < 5
    found = []
    for seed in (1, 2, 1):
        retrainer.retrain(rows, kept, seed)
        found.append(retrainer.evaluate(rows))
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_the_first_retraining_trains_every_adapter_too(retrainer):
    whole = Retrainer(retrainer.base.name_or_path, replace(SCHEDULE, layers=2))
    rows, found = whole.rows(list(batches(8))), []
    for _ in range(2):
        whole.retrain(rows, np.ones(8, bool), 0)
        found.append(whole.evaluate(rows))
    np.testing.assert_array_equal(*found)
    grown = [name for name, value in adapter(whole).items() if "lora_B" in name and value.any()]
    assert len(grown) == 2 * len(tiny.TARGETS["llama"])


def test_the_rate_rises_and_then_falls_to_zero():
    rates = [SCHEDULE.rate(step, 40) for step in range(41)]
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2]) and rates[40] == pytest.approx(0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_subsets_are_halves_of_their_own():
    halves = [subset(SMOKE, number) for number in range(20)]
    assert {int(half.sum()) for half in halves} == {SMOKE.rows // 2}
    assert len({half.tobytes() for half in halves}) == 20
    assert subset(SMOKE, -1).all()


@pytest.mark.slow
@needs_scipy
def test_the_bank_goes_on_where_it_stopped(tmp_path):
    from tests.bench.test_smoke import examples, run, write_lines

    tiny.save_model(tmp_path, "llama", lora=False)[0].rename(tmp_path / "model")
    data = write_lines(tmp_path / "rows.jsonl", examples(60, 0))
    options = ("bank", "--data", data)
    figures = run(tmp_path, "bench.evidence.lds", *options, "--retrainings", 1, results=["lds_bank"])["lds_bank"]
    first = figures["retrainings"]
    assert [(one["seed"], one["subset"]) for one in first] == [(0, -1), (0, 0)]
    assert len(figures["rows"]) == SMOKE.rows and all(len(one["losses"]) == SMOKE.queries for one in first)
    figures = run(tmp_path, "bench.evidence.lds", *options, results=["lds_bank"])["lds_bank"]
    assert figures["retrainings"][:2] == first and [one["subset"] for one in figures["retrainings"]] == [-1, 0, 1, 2]
    text = json.dumps(figures)
    assert "rivers" not in text and "Question" not in text
    only = ("--only", "full,rapidin,kronecker,two-sided,representations,product", "--Ks", 1024)
    scored = run(tmp_path, "bench.evidence.lds", "scores", *options[1:], *only, results=["lds_bank", "lds"])["lds"]
    names = {row["method"] for row in scored["methods"]}
    assert {
        "full/estimate/unit",
        "K=1024/shuffles=20/kronecker/unit/int8",
        "rept/last",
        "two-sided=1024/kronecker/unit",
        "product/kronecker/exact",
        "product/two-sided kfac/exact",
    } <= names
    assert scored["subsets"] == 3 and all(-1 <= row["lds"] <= 1 for row in scored["methods"])


@needs_scipy
def test_scores_that_predict_the_losses_have_an_lds_of_one():
    draw = np.random.default_rng(0)
    subsets = np.stack([draw.permutation(40) < 20 for _ in range(30)])
    truth, noise = draw.normal(size=(2, 5, 40))
    losses = 3 - subsets @ truth.T
    table = lds_table({DEFAULT: truth, "opposite": -truth, "noise": noise}, subsets, losses)
    found = {row["method"]: row for row in table}
    assert found[DEFAULT]["lds"] == 1 and found[DEFAULT]["interval"] == [1, 1]
    assert found["opposite"]["lds"] == -1 and found["opposite"]["less_estimate"] == [-2, -2]
    low, high = found["noise"]["interval"]
    assert low < 0.3 and high > -0.3 and low < found["noise"]["lds"] < high and found["noise"]["less_estimate"][1] < 0


def test_spearman_is_scipys_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 6, (2, 20, 4)).astype(float)
    expected = [stats.spearmanr(a[:, query], b[:, query])[0] for query in range(4)]
    np.testing.assert_allclose(spearman(a, b), expected)
    assert not spearman(np.ones((5, 2)), b[:5, :2]).any()


@needs_scipy
def test_a_bank_gives_its_outcomes_and_its_ceiling():
    from types import SimpleNamespace

    draw = np.random.default_rng(2)
    losses = draw.normal(size=(4, 3))
    halves = [subset(SMOKE, number) for number in range(4)]
    runs = [{"seed": 0, "dtype": "float32", "subset": n, "losses": list(losses[n])} for n in (2, 0, 3, 1)]
    runs += [{"seed": 0, "dtype": "float32", "subset": -1, "losses": [9.0] * 3}]
    runs += [{"seed": 1, "dtype": "float32", "subset": n, "losses": list(losses[n] + 5)} for n in (0, 1, 2)]
    packed = [np.packbits(half).tobytes().hex() for half in halves]
    bank = {"rows": ["x"] * SMOKE.rows, "subsets": packed, "retrainings": runs}
    found, after = outcomes(bank, 0, "float32")
    np.testing.assert_array_equal(found, halves)
    np.testing.assert_array_equal(after, losses)
    known = reliability(bank, SimpleNamespace(seed=0, dtype="float32"))["agreement"]["seed 1, float32"]
    assert (known["subsets"], known["spearman"], known["of_the_difference"]) == (3, 1, 0)


def test_hidden_states_and_their_gradients_are_the_models(retrainer):
    model = load(ModelConfig(retrainer.base.name_or_path, device="cpu")).model
    batch = next(batches(1))
    states, gradients = hidden_states(model, batch)
    expected = model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    step = torch.zeros_like(gradients[0])
    step[0, 2] = 1e-2 * gradients[0][0, 2] / gradients[0][0, 2].norm()
    losses = []
    for sign in (1, -1):
        handle = model.get_input_embeddings().register_forward_hook(lambda _, i, out, sign=sign: out + sign * step)
        losses.append(example_losses(model, batch).item())
        handle.remove()
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradients[0][0, 2].norm()), rel=1e-2)


def test_representations_do_not_depend_on_the_batch(retrainer):
    from rapidindex.progress import silent

    model = load(ModelConfig(retrainer.base.name_or_path, device="cpu")).model
    rows = list(batches(6))
    together = representations(model, rows, silent)
    assert {name.partition("/")[0] for name in together} == {"repsim", "rept"} and len(together) == 8
    for number, row in enumerate(rows):
        for name, vectors in representations(model, [row], silent).items():
            torch.testing.assert_close(together[name][number], vectors[0], rtol=1e-4, atol=1e-5)
            assert float(vectors.norm()) == pytest.approx(1)
