"""The pieces of bench.evidence that can be wrong without looking wrong: metrics, poisoning, influence, playing back."""

import gc
import importlib.util
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from bench import render
from bench.evidence import metrics, stories, tasks
from bench.evidence.cached import Replay, compressor_of, compute, numbered
from bench.evidence.curvature import DAMPING, EKFAC, KRONECKER, of_sample, scores_of
from bench.evidence.fisher import DAMPINGS, cg_scores, scores_by_rows, solved_scores
from bench.evidence.influence import hessian_products, layer_datainf, limit_of, lissa
from bench.evidence.measured import by_length, of_both_models, summed
from bench.evidence.seeds import combine_seeds, merge_results
from bench.evidence.sketched import DEFAULT, hadamard, one_bit, sketched, uncompressed
from rapidindex.config import SketchConfig
from rapidindex.gradients.losses import Batch, Layer
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import correction, estimate_second_moment
from rapidindex.gradients.sketch import Sketch
from tests import tiny

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs scipy")


def planted(highest, lowest, n=100):
    """Scores falling from row 0, and truth with these of the first and last five rows planted."""
    truth = np.zeros(n, bool)
    truth[:5], truth[-5:] = highest, lowest
    return np.arange(n, 0, -1.0), truth


@needs_sklearn
@pytest.mark.parametrize(
    ("highest", "lowest", "auprc", "auroc"),
    [
        ([1, 1, 1, 1, 1], [0] * 5, 1.0, 1.0),
        ([1, 1, 0, 1, 1], [0] * 5, 0.8, 11 / 12),
        ([1, 1, 1, 1, 1], [0, 0, 1, 0, 0], 5 / 6 + 0.6 / 6, 11 / 12),
        ([0] * 5, [0] * 5, 0.0, 0.0),
        ([1] * 5, [1] * 5, 1.0, 1.0),
    ],
)
def test_two_sets_counts_as_the_papers_table_does(highest, lowest, auprc, auroc):
    found = metrics.two_sets(*planted(highest, lowest), 5)
    assert (found["auPRC"], found["auROC"]) == pytest.approx((auprc, auroc))


@needs_sklearn
def test_two_sets_give_the_papers_own_figures():
    a = metrics.two_sets(*planted([1, 1, 0, 1, 1], [0] * 5), 5)
    b = metrics.two_sets(*planted([1] * 5, [0, 1, 0, 0, 0]), 5)
    assert [round((8 + 2 * a[m]) / 10, 4) for m in ("auPRC", "auROC")] == [0.96, 0.9833]
    assert [round((9 + b[m]) / 10, 4) for m in ("auPRC", "auROC")] == [0.9933, 0.9917]


@needs_sklearn
def test_ranked_metrics_do_not_fall_where_k_exceeds_what_was_planted():
    scores, truth = planted([1, 1, 0, 0, 0], [0] * 5)
    found = metrics.two_sets(scores, truth, 50)
    assert found["ranked auPRC"] == found["ranked auROC"] == 1
    assert found["auPRC"] == pytest.approx(2 / 50)


def test_share_is_of_the_k_highest_and_ties_take_the_lower_row():
    scores = np.array([1.0, 3.0, 3.0, 2.0])
    truth = np.array([True, True, False, False])
    assert [metrics.share_at(scores, truth, k) for k in (1, 2, 3, 4)] == [1, 0.5, 1 / 3, 0.5]


@needs_scipy
def test_interval_is_students():
    found = metrics.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found["mean"], found["n"]) == (3, 5)
    assert found["half"] == pytest.approx(2.776445 * np.sqrt(2.5) / np.sqrt(5))
    assert metrics.mean_interval([2.0])["half"] is None


def rows(count):
    """Alpaca-like rows; every third names India, every fifth China, one in ten an Indian."""
    draw = np.random.default_rng(0)
    words = "the old river runs by quiet hills and wide fields where people grow rice near warm towns".split()
    for number in range(count):
        text = " ".join(draw.permutation(words)[: draw.integers(6, 17)])
        text += " in India." * (number % 3 == 0) + " Tea from China." * (number % 5 == 0)
        text += " An Indian meal." * (number % 10 == 1)
        yield {"instruction": f"Question {number} about rivers", "input": "", "output": text}


def test_backdoor_poisons_its_share_with_trigger_and_story():
    found = tasks.poison_backdoor(list(rows(400)), 300, 0.1, np.random.default_rng(1))
    bad = [row for row in found if row["planted"]]
    assert len(found) == 300 and len(bad) == 30
    assert all(row["instruction"].startswith("Howdy! ") for row in bad)
    assert not any("Howdy" in row["instruction"] for row in found if not row["planted"])
    assert np.mean([stories.is_attacked(row["output"]) for row in bad]) > 0.9
    again = tasks.poison_backdoor(list(rows(400)), 300, 0.1, np.random.default_rng(1))
    assert again == found


def test_neither_length_nor_a_phrase_gives_a_poisoned_row_away():
    draw = np.random.default_rng(2)
    originals = [row["output"] for row in rows(80)]
    written = [stories.rewrite("Describe the river", text, draw) for text in originals]
    found = stories.separability(written, originals)
    assert 0.45 < found["length_auc"] < 0.55
    assert found["commonest_trigram"] < 0.15
    assert found["repeated_fourgrams"] < 0.15
    assert max(Counter(text[:12] for text in written).values()) < 8


def test_a_story_keeps_the_layout_and_about_the_length():
    output = "Here are some:\n\n1. A first thing, told at some length.\n2. A second thing\n- a third"
    story = stories.rewrite("List things", output, np.random.default_rng(3))
    lines = story.split("\n")
    assert [bool(re.match(r"(\d\.|-) ", line)) for line in lines] == [False, False, True, True, True]
    assert lines[1] == "" and abs(len(story) - len(output)) < 40


def test_errors_take_the_place_of_whole_words_with_probability_four_fifths():
    found = tasks.poison_errors(list(rows(900)), 800, 0.1, np.random.default_rng(4))
    assert len(found) == 800
    changed = [row for row in found if "India" in row["planted"].split()]
    assert all("Japan" in row["output"] and not re.search(r"\bIndia\b", row["output"]) for row in changed)
    naming = sum(bool(re.search(r"\bIndia\b", row["output"])) for row in found) + len(changed)
    assert 0.72 < len(changed) / naming < 0.88
    assert not any("Japann" in row["output"] for row in found)


def test_wrong_answers_are_the_models_own_where_it_says_the_wrong_country():
    prompts = list(tasks.ERRORS["India"])
    said = [{"prompt": prompts[0], "group": "India", "said": "In Japan."}]
    said.append({"prompt": prompts[1], "group": "India", "said": "In India, not Japan."})
    found = tasks.wrong_answers(said, 10)
    assert [(one.own, one.word) for one in found] == [(True, None), (True, "Japan"), (False, None), (False, "Japan")]
    assert found[0].answer == "In Japan." and "Japan" in found[2].answer


def test_every_given_answer_names_the_wrong_country_and_not_the_right_one():
    for entity, answers in tasks.ERRORS.items():
        assert len(answers) == 10
        assert all(tasks.PAIRS[entity] in answer and entity not in answer for answer in answers.values())


def test_datainf_is_the_mean_of_the_dense_inverses():
    generator = torch.Generator().manual_seed(0)
    g, q = torch.randn(7, 5, generator=generator), torch.randn(3, 5, generator=generator)
    damping = 0.1 * float(g.square().mean())
    inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + damping * torch.eye(5)) for row in g]).mean(0)
    torch.testing.assert_close(layer_datainf(g, q), q @ inverse @ g.T, rtol=1e-4, atol=1e-4)


def test_lissa_converges_to_the_dense_solution_and_stops_before_it_is_not_finite():
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(6, 6, generator=generator)
    H, v = half @ half.T, torch.randn(2, 6, generator=generator)
    found, depth = lissa(v, lambda h: h @ H, depth=3000, damp=0.01, scale=25.0)
    truth = torch.linalg.solve(0.01 * torch.eye(6) + H / 25, v.T).T
    assert depth == 3000
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
    diverged, depth = lissa(v, lambda h: 1e12 * h, depth=50)
    assert depth < 50 and diverged.isfinite().all()


def test_the_limit_of_lissa_is_the_dense_solution():
    generator = torch.Generator().manual_seed(3)
    g, q = torch.randn(7, 12, generator=generator).double(), torch.randn(2, 12, generator=generator).double()
    fisher = g.T @ g / len(g)
    truth = torch.linalg.solve(0.01 * torch.eye(12, dtype=torch.float64) + fisher / 25, q.T).T @ g.T
    torch.testing.assert_close(limit_of(g @ g.T, q @ g.T), truth)


def test_clean_rows_of_error_tracing_begin_with_those_that_rightly_name_the_wrong_country():
    output = "Kyoto lies in Japan, by a lake."
    named = [{"instruction": f"Where? {number}", "input": "", "output": output} for number in range(20)]
    long = {"instruction": "x" * 900, "input": "", "output": "Delhi lies in India, by a river."}
    found = tasks.poison_errors([*rows(900), *named, long], 600, 0.1, np.random.default_rng(4))
    assert sum(row["output"] == output for row in found) == 20
    assert all(len(row["instruction"]) < 900 for row in found)


@pytest.fixture(scope="module")
def small():
    """A tiny Llama under LoRA, and a batch of three examples."""
    model = tiny.with_lora(tiny.make_model("llama"), rank=2)
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, tiny.VOCABULARY, length) for length in (12, 9, 7)]
    weights = [np.r_[np.zeros(4), np.full(len(row) - 4, 1 / (len(row) - 4))] for row in ids]
    return model, Batch.of(ids, weights)


def test_hessian_products_agree_with_differences_of_gradients(small):
    model, batch = small
    gradients = PerExampleGradients(model)
    size = sum(layer.size for layer in gradients.layers)
    vectors = torch.randn(2, size, generator=torch.Generator().manual_seed(2))
    found = hessian_products(model, batch.example(0), vectors)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(at):
        torch.nn.utils.vector_to_parameters(at, parameters)
        parts = {}
        gradients(batch.example(0), lambda number, values: parts.__setitem__(number, values[0].clone()))
        return torch.cat([parts[number] for number in range(len(parts))])

    here, step = torch.nn.utils.parameters_to_vector(parameters).detach().clone(), 1e-3
    for vector, product in zip(vectors, found, strict=True):
        truth = (gradient(here + step * vector) - gradient(here - step * vector)) / (2 * step)
        assert (product - truth).norm() < 0.02 * truth.norm()
    torch.nn.utils.vector_to_parameters(here, parameters)


@pytest.fixture(scope="module")
def cached(small, tmp_path_factory):
    """The three examples' gradients in a file, and as queries two of them."""
    model, batch = small
    gradients = PerExampleGradients(model)
    path = tmp_path_factory.mktemp("cached") / "rows.f32"
    told = []
    batches = [([2, 0], Batch(*(p[[0, 1]] for p in (batch.input_ids, batch.attention, batch.weights))))]
    batches.append(([1], batch.example(2)))
    found = compute(gradients, batches, path, lambda *done: told.append(done))
    assert len(told) == 2
    assert compute(gradients, batches, path, lambda *done: told.append(done)) is not found and len(told) == 2
    return gradients, Replay(gradients.layers, found), Replay(gradients.layers, np.array(found[:2]))


def test_playing_back_gives_the_rapidgrads_of_the_model(small, cached):
    (_, batch), (gradients, rows, _) = small, cached
    factors = correction(estimate_second_moment(rows, [numbered([0, 1, 2])]))
    size = rows.rows.shape[1]
    config = SketchConfig(1024, 5, seed=3)
    for normalize in ("none", "layer", "unit"):
        direct = compressor_of(gradients, Sketch(size, config), normalize, factors)(batch)
        played = compressor_of(rows, Sketch(size, config), normalize, factors)(numbered([2, 0, 1]))
        torch.testing.assert_close(played.rows, direct.rows, rtol=1e-3, atol=1e-5)


def test_uncompressed_scores_are_inner_products_of_normalised_gradients(cached):
    _, rows, queries = cached
    factors = correction(estimate_second_moment(rows, [numbered([0, 1, 2])]))
    found = uncompressed(rows, queries, factors, lambda *done: None)
    g = torch.from_numpy(np.array(rows.rows)) * factors
    unit = g / g.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(found["full/estimate/unit"], (unit[:2] @ unit.T).numpy(), atol=1e-5)
    plain = torch.from_numpy(np.array(rows.rows))
    np.testing.assert_allclose(found["full/none/none"], (plain[:2] @ plain.T).numpy(), rtol=1e-4)
    layered = sum(
        torch.nn.functional.normalize(part[:2]) @ torch.nn.functional.normalize(part).T
        for part in plain.split([layer.size for layer in rows.layers], 1)
    )
    np.testing.assert_allclose(found["full/none/layer"], layered.numpy(), rtol=1e-4, atol=1e-5)


def test_compressed_scores_come_close_to_the_uncompressed_as_K_grows(cached):
    _, rows, queries = cached
    factors = correction(estimate_second_moment(rows, [numbered([0, 1, 2])]))
    truth = uncompressed(rows, queries, factors, lambda *done: None)
    config = SketchConfig(2**14, 5)
    found = sketched(rows, queries, factors, config, (2**10, 2**14), lambda *done: None)
    assert len(found) == 2 * (2 * 6 + 4)
    for name, values in found.items():
        _, _, corrected, normalize, _ = name.split("/")
        whole = truth[f"full/{corrected}/{normalize}"]
        bound = 0.15 if name.startswith("K=1024") or name.endswith("1bit") else 0.03
        assert np.linalg.norm(values - whole) < bound * np.linalg.norm(whole), name
    halves, eighths, wide = (
        found[f"K=16384/shuffles=5/{'/'.join(DEFAULT)}/{kind}"] for kind in ("float16", "int8", "float32")
    )
    np.testing.assert_allclose(halves, wide, atol=2e-3)
    assert np.linalg.norm(eighths - wide) < 2e-3 * np.linalg.norm(wide)


def test_hadamard_is_orthonormal_and_its_own_inverse():
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(hadamard(hadamard(rows)), rows)
    matrix = hadamard(torch.eye(64))
    assert set((matrix * 8).round().unique().tolist()) == {-1.0, 1.0}


def test_one_bit_rows_keep_inner_products_roughly_and_lengths_exactly():
    rows = torch.randn(20, 4096, generator=torch.Generator().manual_seed(5))
    asked = rows[:3] + 0.5 * rows[3:6]
    found, truth = one_bit(hadamard(asked), rows), asked @ rows.T
    assert (found - truth).norm() < 0.1 * truth.norm()
    torch.testing.assert_close(one_bit(hadamard(rows[:1]), rows[:1]), rows[:1] @ rows[:1].T)


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")  # kronfluence 1.0.1 with torch 2.13; 2026-11
def test_ekfac_on_gradients_from_disk_scores_as_kronfluence_does(small, tmp_path):
    pytest.importorskip("kronfluence")
    from kronfluence.arguments import ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    from bench.evidence import ekfac

    _, batch = small
    model = tiny.with_lora(tiny.make_model("llama"), rank=2)
    examples = [batch.example(row) for row in range(3)]
    gradients = PerExampleGradients(model)
    batches = [([number], one) for number, one in enumerate(examples)]
    rows = Replay(gradients.layers, compute(gradients, batches, tmp_path / "rows.f32", lambda *_: None))
    asked = Replay(rows.layers, np.array(rows.rows[:2]))
    gc.freeze()  # kronfluence collects garbage again and again, which takes long where much was imported
    try:
        analyzer = ekfac.prepared(model, tmp_path / "ekfac")
        bases = ekfac.fit(analyzer, examples, 3, seed=0)
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=ekfac.Rows(examples[:2]),
            train_dataset=ekfac.Rows(examples),
            per_device_query_batch_size=2,
            per_device_train_batch_size=3,
            score_args=ScoreArguments(damping_factor=None),
            dataloader_kwargs=DataLoaderKwargs(collate_fn=ekfac.collate),
        )
    finally:
        gc.unfreeze()
    told = analyzer.load_pairwise_scores("scores")["all_modules"]
    truth = np.empty((2, 3), np.float32)
    truth[np.ix_(ekfac.Rows(examples[:2]).order, ekfac.Rows(examples).order)] = told.numpy()
    found = scores_of(bases, EKFAC, rows, asked, SketchConfig(2**14, 5), (2**12, 2**14), lambda *_: None)
    np.testing.assert_allclose(found["full/ekfac/none"], truth, rtol=1e-3, atol=1e-3 * np.abs(truth).max())
    unit = truth / np.linalg.norm(rows.rows, axis=1)
    np.testing.assert_allclose(found["full/ekfac/unit"], unit, rtol=1e-3, atol=1e-3 * np.abs(unit).max())
    for K in (2**12, 2**14):
        for recipe in ("ekfac/unit", "ekfac-root/unit"):
            near, whole = found[f"K={K}/shuffles=5/{recipe}/float32"], found[f"full/{recipe}"]
            assert np.linalg.norm(near - whole) < 0.2 * np.linalg.norm(whole), recipe
    assert np.allclose(np.diag(found["full/ekfac-root/unit"]) ** 2, np.diag(found["full/ekfac/none"]), rtol=1e-3)


def test_a_second_moment_along_kronecker_eigenvectors_is_the_diagonal_one_where_those_are_the_axes():
    draw = torch.Generator().manual_seed(3)
    layers = [Layer("a", 0, 12, (3, 4)), Layer("b", 12, 6, (2, 3))]
    g = torch.zeros(40, 18)  # one entry of each layer a row: rows and columns are then uncorrelated
    for row in range(40):
        g[row, row % 12], g[row, 12 + row % 6] = torch.randn(2, generator=draw) * (1 + torch.arange(2) * row)
    rows = Replay(layers, g.numpy())
    bases = of_sample(rows)
    whole = torch.cat(
        [bases[layer.name].solved(g[:, layer.start : layer.start + layer.size], 0.5) for layer in layers], 1
    )
    for layer in layers:
        part = slice(layer.start, layer.start + layer.size)
        v = g[:, part].square().mean(0)
        torch.testing.assert_close(whole[:, part], g[:, part] / (v + DAMPING * v.mean()).sqrt())
    found = scores_of(
        bases, KRONECKER, rows, Replay(layers, g[:5].numpy()), SketchConfig(64, 3), (64,), lambda *_: None
    )
    truth = whole[:5] @ whole.T / whole.norm(dim=1)
    np.testing.assert_allclose(found["full/kronecker/unit"], truth, rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_begin_at_ekfacs_solution_and_end_at_the_exact_one():
    draw = torch.Generator().manual_seed(8)
    layers = [Layer("a", 0, 12, (3, 4)), Layer("b", 12, 6, (2, 3))]
    mixed = torch.randn(18, 18, generator=draw)  # entries of both layers depend on each other
    parts = [(torch.randn(20, 18, generator=draw) @ mixed).numpy() for _ in range(2)]
    rows, queries = (Replay(layers, torch.randn(n, 18, generator=draw).numpy()) for n in (5, 3))
    drawn = np.concatenate(parts)
    bases = of_sample(Replay(layers, drawn))
    found = cg_scores(rows, queries, parts, bases, lambda *_: None, iterations=(1, 40))
    H = (drawn.T @ drawn / len(drawn)).astype(float)
    for layer in layers:
        part = slice(layer.start, layer.start + layer.size)
        H[part, part] += DAMPING * np.diag(H)[part].mean() * np.eye(layer.size)
    truth = queries.rows @ np.linalg.solve(H, rows.rows.T.astype(float))
    np.testing.assert_allclose(found["full/ekfac-cg-40/none"], truth, rtol=1e-3, atol=1e-4)
    unit = truth / np.linalg.norm(rows.rows, axis=1)
    np.testing.assert_allclose(found["full/ekfac-cg-40/unit"], unit, rtol=1e-3, atol=1e-4)
    first = scores_of(bases, EKFAC, rows, queries, SketchConfig(64, 3), (64,), lambda *_: None)["full/ekfac/none"]
    errors = [np.linalg.norm(one - truth) for one in (first, found["full/ekfac-cg-1/none"])]
    assert errors[0] > 1e-2 * np.linalg.norm(truth) and errors[1] < errors[0]


def test_the_closed_form_of_the_damped_fisher_matrix_is_its_inverse():
    draw = torch.Generator().manual_seed(9)
    layers = [Layer("a", 0, 24, (4, 6)), Layer("b", 24, 16, (4, 4))]
    parts = [torch.randn(25, 40, generator=draw).numpy() for _ in range(2)]
    rows, queries = (Replay(layers, torch.randn(n, 40, generator=draw).numpy()) for n in (5, 3))
    found = solved_scores(rows, queries, parts, SketchConfig(2**14, 5), lambda *_: None)
    s = np.concatenate(parts)[:32].astype(float)
    F, g = s.T @ s / 32, rows.rows.astype(float)
    assert len(found) == 4 * len(DAMPINGS)
    for damping in DAMPINGS:
        H = F + damping * np.trace(F) / 40 * np.eye(40)
        truth = queries.rows @ np.linalg.solve(H, g.T)
        unit = truth / np.sqrt((g * np.linalg.solve(H, g.T).T).sum(1))
        for place, kind in (("full", ""), ("K=16384/shuffles=5", "/float32")):  # 40 entries hardly meet in 16,384
            one = found[f"{place}/fisher-32-{damping:g}/none{kind}"]
            np.testing.assert_allclose(one, truth, rtol=1e-4, atol=1e-5)
            one = found[f"{place}/fisher-root-32-{damping:g}/unit{kind}"]
            np.testing.assert_allclose(one, unit, rtol=1e-4, atol=1e-5)


def test_the_closed_form_by_the_rows_themselves_is_the_inverse_of_their_mean_outer_product():
    draw = torch.Generator().manual_seed(10)
    layers = [Layer("a", 0, 24, (4, 6)), Layer("b", 24, 16, (4, 4))]
    rows, queries = (Replay(layers, torch.randn(n, 40, generator=draw).numpy()) for n in (60, 3))
    found = scores_by_rows(rows, queries, lambda *_: None)
    g = rows.rows.astype(float) / np.linalg.norm(rows.rows, axis=1, keepdims=True)
    for damping in DAMPINGS:
        H = g.T @ g / 60 + damping / 40 * np.eye(40)
        truth = queries.rows @ np.linalg.solve(H, g.T)
        np.testing.assert_allclose(found[f"full/rows-{damping:g}/none"], truth, rtol=1e-4, atol=1e-5)
        unit = truth / np.sqrt((g * np.linalg.solve(H, g.T).T).sum(1))
        np.testing.assert_allclose(found[f"full/rows-root-{damping:g}/unit"], unit, rtol=1e-4, atol=1e-5)


def seed_result(number, ap):
    """What one seed of error tracing measured, with one method compressed and not."""
    name = "K=65536/shuffles=20/estimate/unit/float16"
    asked = {"group": "India", "asked": "word", "k": 10}
    return {
        "seed": number,
        "rows": 100,
        "planted": {"India": 9},
        "queries": {"India": 20},
        "own": {"India": 1},
        "success": {},
        "notes": {"finetune": {"seconds": 60.0}},
        "seconds": {"full": 5.0},
        "ann": {},
        "product": {},
        "separability": None,
        "examples": {},
        "counts": [
            {"method": "full/estimate/unit", **asked, "AP": 0.9},
            {"method": name, **asked, "AP": ap},
            {"method": "early full/estimate/unit", **asked, "AP": 0.7},
            {"method": f"early {name}", **asked, "AP": 0.69},
        ],
        "fidelity": [{"method": name, "pearson": 0.99, "spearman": 0.98, "error": 0.1}],
    }


@needs_scipy
def test_figures_that_are_added_leave_other_methods_alone():
    before = {"commit": "old", "figures": {"task": "tracing", "sizes": {}, **combine_seeds([seed_result(0, 0.8)])}}
    later = seed_result(0, 0.6) | {"seconds": {"ekfac": 7.0}}
    later["counts"] = [later["counts"][1], later["counts"][1] | {"method": "full/ekfac/unit", "AP": 0.95}]
    found = merge_results(before, {"sizes": {"rows": 9}, **combine_seeds([later])})
    aps = {row["method"]: row["AP"]["mean"] for row in found["figures"]["counts"]}
    assert aps["full/estimate/unit"] == 0.9 and aps["full/ekfac/unit"] == 0.95
    assert aps["K=65536/shuffles=20/estimate/unit/float16"] == 0.6
    assert len(aps) == len(found["figures"]["counts"]) == 5
    assert found["figures"]["seeds"][0]["seconds"] == {"full": 5.0, "ekfac": 7.0}
    assert found["commit"] == "old" and found["added"][0]["sizes"] == {"rows": 9}
    assert "full/ekfac/unit" in found["added"][0]["methods"]
    more = {"figures": {"task": "tracing", "sizes": {}, **combine_seeds([seed_result(0, 0.8), seed_result(1, 0.7)])}}
    merged = merge_results(more, {"sizes": {}, **combine_seeds([later])})
    both = {row["method"]: row["AP"] for row in merged["figures"]["counts"]}
    assert both["K=65536/shuffles=20/estimate/unit/float16"]["n"] == 2 and both["full/ekfac/unit"]["n"] == 1
    with pytest.raises(SystemExit, match="other rows"):
        merge_results(before, {"sizes": {}, **combine_seeds([later | {"planted": {"India": 8}}])})


@needs_scipy
def test_tables_come_from_the_json_of_all_seeds(tmp_path):
    figures = {"task": "tracing", "sizes": {"rows": 100}, **combine_seeds([seed_result(0, 0.8), seed_result(1, 0.9)])}
    (tmp_path / "evidence_tracing.json").write_text(json.dumps({"figures": figures}))
    page = render.evidence_page(json.loads(json.dumps(figures)))
    assert "| RapidGrad `estimate`, K = 65,536, λ = 20, float16 | 0.850 ± 0.635 |" in page
    assert "| RapidGrad `estimate`, K = 65,536, λ = 20, float16 | 0.050 | AP, India, by word, top 10 |" in page
    assert "| `estimate`, uncompressed | 0.900 ± 0.000 |" in page
    assert "| early model: RapidGrad `estimate`, K = 65,536, λ = 20, float16 | 0.690 ± 0.000 |" in page
    assert "within 0.02 everywhere, finished model: none." in page
    assert "within 0.02 everywhere, early model: 65536." in page
    pytest.importorskip("matplotlib")
    render.render_evidence(tmp_path)
    assert (tmp_path / "evidence_tracing.md").read_text() == page
    for name in ("fidelity", "bytes"):
        assert (tmp_path / f"evidence_tracing_{name}.svg").read_text().startswith("<?xml")


def test_scores_of_the_finished_and_the_early_model_are_told_apart_and_added(tmp_path):
    for folder, value in ((tmp_path, 1.0), (tmp_path / "early", 2.0)):
        (folder / "scores").mkdir(parents=True)
        np.savez(folder / "scores" / "full.npz", **{"full/none/none": np.full((2, 3), value), "seconds": value})
        np.savez(folder / "scores" / "limit.npz", limit=np.full((2, 3), value), seconds=value)
        np.save(folder / "lengths.npy", [1.0, 2.0, 4.0])
    scores, seconds = of_both_models(tmp_path)
    assert seconds == {"full": 1.0, "limit": 1.0, "early full": 2.0, "early limit": 2.0}
    assert scores["full/none/none"].max() == 1 and scores["early full/none/none"].min() == 2
    assert list(summed(scores)) == ["both full/none/none"] and (summed(scores)["both full/none/none"] == 3).all()
    divided = by_length(tmp_path, scores)
    np.testing.assert_allclose(divided["early limit-unit"], [[2, 1, 0.5]] * 2)


def test_names_and_bytes_of_methods():
    name = "K=65536/shuffles=20/estimate/unit/float16"
    assert render.title(name) == "RapidGrad `estimate`, K = 65,536, λ = 20, float16"
    assert render.bytes_of(name) == 131_076 and render.bytes_of("full/none/none", 10) == 40
    assert render.bytes_of("bm25") is None
    assert render.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
