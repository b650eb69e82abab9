"""Fact tracing: the facts that are drawn, the figures, the step on a row, and the bench at its smallest size."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.evidence.facts import (
    RATES,
    SMOKE,
    SMOKE_TRAINING,
    Patcher,
    Training,
    bytes_of,
    draw_facts,
    right,
    table,
    templates_of,
    tops,
    trak,
)
from bench.evidence.lds_scores import DEFAULT
from bench.evidence.retraining import Retrainer
from bench.render import facts_page, facts_seeds_page
from rapidindex.gradients.losses import Batch, trainable
from tests import tiny
from tests.bench.test_smoke import examples, run, write_lines

PATTERNS = ["[X] was born in [Y] .", "[X] is from [Y].", "[X], born in [Y]", "[Y] is the home of [X].", "Born [Y]"]
WORDS = "the old river runs by quiet hills and wide fields where people grow rice near warm towns".split()


def test_templates_end_in_the_object_and_are_three_or_more():
    rows = [{"relation": relation, "pattern": text} for relation in ("P1", "P2") for text in PATTERNS]
    found = templates_of([row for row in rows if row != {"relation": "P2", "pattern": PATTERNS[0]}])
    assert found == {"P1": ["[X] was born in [Y]", "[X] is from [Y]", "[X], born in [Y]"]}


def test_facts_have_one_answer_which_their_subject_does_not_give_away():
    rows = [{"relation": f"P{n % 2}", "subject": f"s{n // 2}", "object": f"o{n % 5}"} for n in range(40)]
    rows += [
        {"relation": "P0", "subject": "BMW E9", "object": "BMW"},
        {"relation": "P9", "subject": "z", "object": "y"},
    ]
    rows += [{"relation": "P1", "subject": "both", "object": name} for name in ("one", "other")]
    rows += [{"relation": "P1", "subject": f"alone {n}", "object": f"o{n}"} for n in range(9)]
    choice = replace(SMOKE, facts=10, sharing=0.4, alike=2)
    found = draw_facts(rows, ["P0", "P1"], choice, np.random.default_rng(0))
    assert len(found) == 10 and not {"BMW E9", "z", "both"} & {row["subject"] for row in found}
    assert sum(row["subject"].startswith("s") for row in found) == 4
    alike = [(row["relation"], row["object"]) for row in found]
    assert max(map(alike.count, alike)) <= 2


def test_the_rate_ends_at_a_tenth_of_its_peak():
    training = Training(learning_rate=1.0, warmup=0.1)
    rates = [training.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates[-1] == pytest.approx(0.1)


def test_figures_are_those_of_the_definitions():
    truth = np.array([[0, 0, 1, 1] + [0] * 10, [1] + [0] * 13], bool)
    scores = np.array([[4, 3, 2, 5, *-np.arange(10.0)], [-99, *-np.arange(13.0)]])
    changes = np.stack([factor * np.arange(28.0).reshape(2, 14) for factor in RATES])
    found = {row["method"]: row for row in table({DEFAULT: scores, "other": -scores}, truth, changes, 99)}
    assert found[DEFAULT]["mrr"]["mean"] == pytest.approx((1 + 1 / 14) / 2, abs=1e-4)
    assert found[DEFAULT]["recall"]["mean"] == 0.5
    assert found[DEFAULT]["tail_patch_1"]["mean"] == pytest.approx(
        np.mean([np.mean(range(10)), np.mean(range(15, 25))])
    )
    assert found[DEFAULT]["tail_patch_3"]["mean"] == pytest.approx(3 * found[DEFAULT]["tail_patch_1"]["mean"])
    assert found[DEFAULT]["less_estimate"]["mrr"] == {"mean": 0, "interval": [0, 0]}
    assert tops({"one": scores})[0].tolist() == [True] * 10 + [False] * 4
    changes[:, 1, 20 - 14] = np.nan  # of the second query's ten rows one was not measured
    assert table({"x": scores}, truth, changes, 99)[0]["tail_patch_1"]["mean"] is None


def test_trak_is_the_damped_inverse_of_the_rows_second_moment():
    draw = np.random.default_rng(0)
    rows, queries = (torch.from_numpy(draw.normal(size=(n, 6))).float() for n in (30, 4))
    gram = rows.T @ rows / 30
    expected = queries @ torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(6)) @ rows.T
    np.testing.assert_allclose(trak(queries, rows), expected, rtol=1e-4)


def test_a_step_moves_the_answer_as_torchs_own_adamw_does(tmp_path):
    base, _ = tiny.save_model(tmp_path, "llama", lora=False)
    training = replace(SMOKE_TRAINING, epochs=2, batch_size=4)
    retrainer, draw = Retrainer(str(base), training), np.random.default_rng(0)
    batches = [
        Batch.of([draw.integers(3, tiny.VOCABULARY, 9)], [np.repeat([0, 1 / 3], [6, 3]).astype(np.float32)])
        for _ in range(6)
    ]
    rows = retrainer.rows(batches)
    retrainer.retrain(rows, np.ones(6, bool), 0)
    parameters = list(trainable(retrainer.model).values())
    states = [retrainer.optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    gradients = [torch.autograd.grad(retrainer.losses([row]).sum(), parameters) for row in rows]
    flat = np.stack([torch.cat([part.flatten() for part in one]).numpy() for one in gradients])
    np.save(tmp_path / "adam.npy", torch.cat([state.flatten() for state in states]))
    facts = SimpleNamespace(
        retrainer=retrainer,
        rows=SimpleNamespace(rows=flat),
        query_batches=batches[:2],
        folder=tmp_path,
        last_rate=training.rate(3, 4),
    )
    start = [parameter.detach().clone() for parameter in parameters]
    patcher = Patcher(facts)
    found = np.stack([patcher(4, np.array([1]), factor) for factor in RATES])
    assert all(map(torch.equal, parameters, start))
    before = float(np.exp(-3 * retrainer.evaluate(rows[1:2])[0]))
    for factor, change in zip(RATES, found[:, 0], strict=True):
        with torch.no_grad():  # Adam's step, written out: no momentum, the moment's own decay
            for parameter, part, state in zip(parameters, gradients[4], states, strict=True):
                second = 0.999 * state + 0.001 * part**2
                parameter -= factor * patcher.rate * 0.1 * part / (second.sqrt() + 1e-8)
        after = float(np.exp(-3 * retrainer.evaluate(rows[1:2])[0]))
        assert change == pytest.approx(100 * (after - before), rel=1e-2, abs=1e-6) and change
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)


def test_an_answer_is_right_where_all_of_its_tokens_are_the_likeliest(tmp_path):
    from rapidindex.config import ModelConfig
    from rapidindex.model.model import load

    model = load(ModelConfig(str(tiny.save_model(tmp_path, "llama", lora=False)[0]), device="cpu")).model
    ids = torch.arange(3, 8)[None]
    for _ in range(2):
        said = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, said], 1)
    wrong = ids.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % tiny.VOCABULARY
    weights = np.repeat([0, 0.5], [5, 2]).astype(np.float32)
    batches = [Batch.of([one[0].numpy()], [weights]) for one in (ids, wrong)]
    assert right(model, batches) == [True, False]


@pytest.mark.slow
def test_the_bench_runs_and_goes_on(tmp_path):
    tiny.save_model(tmp_path, "llama", lora=False)[0].rename(tmp_path / "model")
    data = tmp_path / "data"
    for name in ("pararel", "fewrel"):
        (data / name).mkdir(parents=True)
    write_lines(data / "alpaca_9k.jsonl", examples(20, 0))
    write_lines(
        data / "fewrel" / "fewrel.jsonl", [{"sentence": f"quiet {w} by rice", "head": w, "tail": ""} for w in WORDS]
    )
    patterns = ["[X] grow [Y]", "people [X] near [Y]", "where [X] runs [Y]"]
    write_lines(data / "pararel" / "patterns.jsonl", [{"relation": "P1", "pattern": text} for text in patterns])
    facts = [
        {"relation": "P1", "subject": word, "object": ("rice", "towns")[n % 2]} for n, word in enumerate(WORDS[:12])
    ]
    write_lines(data / "pararel" / "facts.jsonl", facts)
    options = ("--data", data, "--only", "full,trackstar,representations")
    first = run(tmp_path, "bench.evidence.facts", *options, results=["facts"])["facts"]
    found = {row["method"]: row for row in first["methods"]}
    assert first["queries"] and found["perfect"]["mrr"]["mean"] == found["perfect"]["recall"]["mean"] == 1
    assert {"R=none/none/none", "R=mixed/adam/unit", "trak", "full/estimate/unit", "rept/last"} <= set(found)
    assert found["trak"]["tail_patch_1"]["mean"] is not None and first["tail_patch_of_right_rows"]["1.0"]
    steps = (tmp_path / "facts" / "patched.npy").read_bytes()
    again = run(tmp_path, "bench.evidence.facts", *options, results=["facts"])["facts"]
    assert again["methods"] == first["methods"] and (tmp_path / "facts" / "patched.npy").read_bytes() == steps
    more = run(tmp_path, "bench.evidence.facts", *options[:2], "--only", "task,product", results=["facts"])["facts"]
    names = {row["method"] for row in more["methods"]} - set(found)
    assert {"full/kronecker-mixed/unit", "product/kronecker 16/exact", "product/two-sided kfac/exact"} <= names
    assert [row for row in more["methods"] if row["method"] in found] == first["methods"]
    assert "quiet" not in json.dumps(more)
    few = ("--full", "--seed", 1, "--only", "representations,product", "--recipes", "estimate,two-sided kfac")
    whole = run(tmp_path, "bench.evidence.facts", *options[:2], *few, results=["facts", "facts_full_1"])
    whole = whole["facts_full_1"]
    names = {row["method"] for row in whole["methods"]}
    assert {"repsim/last", "product/estimate/exact", "product/two-sided kfac/exact"} <= names
    assert whole["last_rate"] is None and "TrackStar" not in facts_page(whole)
    page = facts_page(first)
    assert "TrackStar" in page and "| RepT, last layer |" in page
    higher = [row | {"mrr": {"mean": row["mrr"]["mean"] + 0.5}} for row in first["methods"] if row["method"] != "trak"]
    seeds = facts_seeds_page([first, first | {"seed": 1, "methods": higher}])
    mrr = found["rept/last"]["mrr"]["mean"]
    assert f"| RepT, last layer | {mrr + 0.25:.3f} ({mrr:.3f} to {mrr + 0.5:.3f}) |" in seeds and "TRAK" not in seeds


def test_bytes_are_those_of_the_numbers_kept():
    names = {"K=4096/shuffles=20/none/unit/int8": 4096, "K=4096/shuffles=20/none/unit/1bit": 512, "rept/half": 4608}
    names |= {"K=64/shuffles=20/none/unit/float16": 128, "K=64/shuffles=20/none/unit/float32": 256, "bm25-response": 0}
    names |= {
        "product/kronecker/exact": 65_536,
        "full/none/unit": 400,
        "R=mixed/adam/unit/0.1": 4 * 2**16,
        "embedding-response": 1536,
    }
    assert {name: bytes_of(name, 100) for name in names} == names
