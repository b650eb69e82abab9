"""The two-sided projection, held against P_out g P_inᵀ of autograd's gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex import Index
from rapidindex.caching.build import build
from rapidindex.caching.estimate import estimate
from rapidindex.caching.update import add
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, SketchConfig
from rapidindex.data.examples import Example
from rapidindex.errors import ConfigMismatch, UsageError
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch, trainable
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import Diagonal, RowColumn, correction, read_second_moment
from rapidindex.gradients.two_sided import TwoSided, as_matrix
from rapidindex.model.model import adopt
from rapidindex.query.encode import selected_batch
from rapidindex.store import Store, check
from tests import oracles, tiny
from tests.gradients import zoo
from tests.gradients.test_architectures import DRAWN
from tests.oracles import all_rows, autograd, examples, make, oracle, request

K = 1024
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
TWO_SIDED = {
    "gradient": GradientConfig(second_moment="factored", moment_examples=6),
    "sketch": SketchConfig(K, projection="two-sided"),
}


def projected(parts, sides):
    """Each block's sum of P_out g P_inᵀ, from whole gradients and the projection's signs."""
    blocks = torch.zeros(len(sides.blocks), sides.m, sides.n)
    for number, part in enumerate(parts):
        out, into = (sides.signs(number, side).float().T for side in (0, 1))
        g = part.float().reshape(as_matrix(sides.layers[number].shape))
        blocks[sides.blocks.of[number]] += out / sides.m**0.5 @ g @ (into / sides.n**0.5).T
    return blocks.flatten()


def literal(model, ids, weights, means, normalize, sides):
    """One example: autograd, divided by the roots of its row and column means, normalised, projected."""
    _, parts = autograd(model, ids, weights)
    parts = [part.to_dense().float() for part in parts]
    if means is not None:
        size, total = sum(part.numel() for part in parts), 0.0
        total = sum(float(R.mean()) * part.numel() for part, (R, _) in zip(parts, means, strict=True))
        for number, (R, C) in enumerate(means):
            v = (R + 1e-3 * total / size)[:, None] * (C / C.mean() + 1e-3 if C.any() else torch.ones_like(C))
            parts[number] = parts[number].reshape(v.shape) / v.sqrt()
    norms = torch.stack([part.norm() for part in parts])
    if normalize == "layer":
        parts = [part / norm if norm > 0 else part for part, norm in zip(parts, norms, strict=True)]
    row = projected(parts, sides)
    return (row / norms.norm() if normalize == "unit" else row), norms


def sample_means(model, ids, weights):
    """The row and column means of the examples' mean squared gradients."""
    squares = [
        [g.to_dense().float().square() for g in autograd(model, *one)[1]] for one in zip(ids, weights, strict=True)
    ]
    for each in zip(*squares, strict=True):
        v = torch.stack(each).mean(0)
        v = v.flatten(0, -2) if v.dim() > 1 else v.reshape(-1, 1)
        yield v.mean(1), v.mean(0)


def compressor(gradients, normalize="unit", means=None, K=K):
    factors = None if means is None else RowColumn.factors_of(means, gradients.layers)
    preconditioner = None if means is None else RowColumn(gradients.layers, factors, None)
    sides = TwoSided(gradients.layers, SketchConfig(K, projection="two-sided", seed=3))
    return Compressor(gradients, sides, normalize=normalize, preconditioner=preconditioner)


def silent(batches, stage):
    return batches


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_and_norms_are_those_of_the_literal_projection(name, way, normalize, corrected):
    model = make(name, way)
    ids, weights = examples()
    gradients, means, pairs = PerExampleGradients(model), None, None
    if corrected:
        batches = [Batch.of(ids[:3], weights[:3]), Batch.of(ids[3:], weights[3:])]
        means, _ = RowColumn.estimate(gradients, batches, 0, silent)
        pairs = list(sample_means(model, ids, weights))
        torch.testing.assert_close(means, torch.cat([torch.cat(pair) for pair in pairs]), rtol=1e-4, atol=1e-9)
    ours = compressor(gradients, normalize, means)
    found = ours(Batch.of(ids, weights))
    assert gradients.batched
    for row, one in enumerate(zip(ids, weights, strict=True)):
        truth, norms = literal(model, *one, pairs, normalize, ours.sketch)
        assert (found.rows[row] - truth).norm() <= 2e-5 * truth.norm()
        assert (found.norms[row] - norms).norm() <= 1e-5 * norms.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_dtype_is_projected(name, dtype):
    model = make(name, "full", dtype)
    ids, weights = examples()
    ours = compressor(PerExampleGradients(model))
    found = ours(Batch.of(ids, weights)).rows
    for row, one in enumerate(zip(ids, weights, strict=True)):
        truth, _ = literal(make(name, "full", dtype).float(), *one, None, "unit", ours.sketch)
        assert (found[row] - truth).norm() <= TOLERANCE[dtype] * truth.norm()


def judge(model):
    """Rows of an architecture equal the literal projection, batched or not."""
    loaded = adopt(model, tiny.make_tokenizer())
    ids, weights = examples([(3, 4), (9, 2)])
    ours = compressor(PerExampleGradients(loaded.model))
    found = ours(Batch.of(ids, weights)).rows
    for row, one in enumerate(zip(ids, weights, strict=True)):
        truth, _ = literal(loaded.model, *one, None, "unit", ours.sketch)
        assert (found[row] - truth).norm() <= 2e-5 * truth.norm()


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", DRAWN[:4])
def test_some_architectures_equal_the_literal_projection(name, way):
    every_architecture(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_equals_the_literal_projection(name, way):
    every_architecture(name, way)


def every_architecture(name, way):
    try:
        judge(zoo.architecture(name, way))
    except (zoo.NotTiny, zoo.ModelError) as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", ["LoHa", "trainable tokens", "LoRA on embed_tokens", "LoRA with biases"])
def test_what_has_no_rule_is_made_whole_and_projected(name):
    judge(zoo.adapter(name))


def test_factors_of_a_tied_weight_are_summed_before_their_length_is_taken():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(2, 5, 50, generator=generator), torch.randn(2, 5, 6, generator=generator)
    looked_up = torch.randint(0, 50, (2, 9), generator=generator), torch.randn(2, 9, 6, generator=generator)
    factors = Factors((50, 6), [looked_up, head])
    dense = torch.zeros(2, 50, 6)
    for example in range(2):
        for token, vector in zip(looked_up[0][example], looked_up[1][example], strict=True):
            dense[example, token] += vector
        dense[example] += head[0][example].T @ head[1][example]
    torch.testing.assert_close(factors.dense(), dense.flatten(1))
    torch.testing.assert_close(factors.lengths(), dense.flatten(1).norm(dim=1))
    rows, columns = torch.rand(50, generator=generator), torch.rand(6, generator=generator)
    scaled = dense * rows[:, None] * columns
    torch.testing.assert_close(factors.scaled(rows, columns).dense(), scaled.flatten(1))
    torch.testing.assert_close(factors.example(1).dense(), dense[1:].flatten(1))


def test_large_layers_come_as_factors_and_small_ones_whole():
    ids, weights = examples([(3, 4), (2, 3)])
    gradients = PerExampleGradients(make("llama", "full"))
    gradients(Batch.of(ids, weights), lambda number, values: None)
    kinds = {}
    gradients(
        Batch.of(ids, weights),
        lambda number, values: kinds.__setitem__(gradients.layers[number].name, type(values)),
        factored=True,
    )
    assert kinds["model.layers.0.mlp.up_proj.weight"] is kinds["model.embed_tokens.weight"] is Factors
    assert kinds["model.norm.weight"] is torch.Tensor


def test_inner_products_are_kept_and_seeds_draw_apart():
    generator = torch.Generator().manual_seed(0)
    layers = PerExampleGradients(make("llama", "full")).layers
    size = layers[-1].start + layers[-1].size
    a, b = torch.randn(2, size, generator=generator)
    b += 0.5 * a
    draws = [TwoSided(layers, SketchConfig(4096, projection="two-sided", seed=seed)) for seed in range(20)]
    found = torch.stack([draw.compress(a[None])[0] @ draw.compress(b[None])[0] for draw in draws])
    assert found.mean() / (a @ b) == pytest.approx(1, abs=0.03)
    assert found.std() / (a.norm() * b.norm()) < 2 / 4096**0.5
    assert len({float(one) for one in found}) == 20
    again = TwoSided(layers, SketchConfig(4096, projection="two-sided", seed=5))
    assert torch.equal(again.compress(a[None]), draws[5].compress(a[None]))


def test_entry_by_entry_corrections_are_applied_to_whole_gradients():
    model = make("llama", "lora")
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    v = torch.rand(gradients.layers[-1].start + gradients.layers[-1].size, generator=torch.Generator().manual_seed(0))
    sides = TwoSided(gradients.layers, SketchConfig(K, projection="two-sided"))
    ours = Compressor(gradients, sides, normalize="unit", preconditioner=Diagonal(gradients.layers, correction(v)))
    truth = sides.compress(torch.stack([oracle(model, *one, v, "unit") for one in zip(ids, weights, strict=True)]))
    assert ((ours(Batch.of(ids, weights)).rows - truth).norm(dim=1) <= 2e-5 * truth.norm(dim=1)).all()


def after_a_step(model, optimizer, folder):
    model(input_ids=torch.arange(5, 15)[None]).logits.square().mean().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return read_second_moment(folder, model, PerExampleGradients(model).layers, RowColumn)


def test_adams_second_moment_is_reduced_to_row_and_column_means(tmp_path):
    model = make("llama", "full")
    first = next(iter(trainable(model).values()))
    optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=1e-4)
    means = after_a_step(model, optimizer, tmp_path)
    v = optimizer.state[first]["exp_avg_sq"] / (1 - 0.999)
    torch.testing.assert_close(means[: sum(v.shape)], torch.cat([v.mean(1), v.mean(0)]))


def test_adafactors_row_and_column_means_are_its_own(tmp_path):
    from transformers.optimization import Adafactor

    model = make("llama", "full")
    first = next(iter(trainable(model).values()))
    optimizer = Adafactor(list(trainable(model).values()), lr=1e-4, relative_step=False, scale_parameter=False)
    means = after_a_step(model, optimizer, tmp_path)
    state = optimizer.state[first]
    own = torch.cat([state["exp_avg_sq_row"], state["exp_avg_sq_col"]])
    torch.testing.assert_close(means[: sum(first.shape)], own, rtol=1e-4, atol=0)


# Through an index


@pytest.fixture(scope="module", params=["factored", "kfac"])
def built(request, data, llama_folders, tmp_path_factory):
    options = {**TWO_SIDED, "gradient": GradientConfig(second_moment=request.param, moment_examples=6)}
    asked = oracles.request(data, tmp_path_factory.mktemp("two_sided") / "index", llama_folders, **options)
    build(asked)
    return asked


def test_the_exact_score_is_the_mean_of_the_shares_and_the_uncompressed_influence(built):
    index = Index.open(built.output)
    compressor = index.compressor_of("sentence")
    result = index.query("Tell me about tea", answer="tea is nice", k=5, exact=True, rescore=True)
    assert result.rescoring is not None
    query = index.encode([{"prompt": "Tell me about tea", "answer": "tea is nice"}])[0]

    def unit(batch):
        flat, layers = [], compressor.gradients.layers
        compressor.gradients(batch, lambda n, g: flat.append((n, compressor.preconditioner.apply(n, g).flatten())))
        assert len(flat) == len(layers)
        whole = torch.cat([part for _, part in sorted(flat, key=lambda one: one[0])])
        return whole / whole.norm()

    asked = unit(selected_batch(query.encoding, query.info.selection, index.loaded.device))
    rows = index.rows_of("sentence")
    records = {rows.ids[n]: Example.from_record(rows.record(n)) for n in range(len(rows.ids))}
    for match in result.matches:
        found = index.template.encode(records[match.id])
        truth = float(asked @ unit(selected_batch(found, range(int(found.response_mask.sum())), index.loaded.device)))
        assert match.exact_score == pytest.approx(truth, abs=1e-4)
        assert np.mean(match.token_scores) == pytest.approx(match.exact_score, abs=1e-5)
        assert match.score == pytest.approx(truth, abs=0.35)


def test_a_build_that_stops_goes_on_and_workers_give_the_same_rows(built, tmp_path):
    def stop(stage, done, total):
        if stage == "cache" and done:
            raise KeyboardInterrupt

    asked = replace(built, output=str(tmp_path / "stopped"), work=BuildConfig(batch_tokens=100))
    with pytest.raises(KeyboardInterrupt):
        build(asked, progress=stop)
    assert build(asked).computed > 0
    two = replace(built, output=str(tmp_path / "two"), work=BuildConfig(batch_tokens=100, workers=2))
    build(two)
    whole = all_rows(built.output)
    for other in (asked, two):
        rows = all_rows(other.output)
        assert rows.keys() == whole.keys() and check(other.output) == []
        assert all(np.linalg.norm(rows[id] - whole[id]) <= 2e-2 * np.linalg.norm(whole[id]) for id in whole)


def test_added_rows_are_those_of_a_build_and_the_estimate_holds(data, llama_folders, tmp_path):
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:5]))
    options = {"gradient": GradientConfig(second_moment="none"), "sketch": TWO_SIDED["sketch"]}
    whole = request(data, tmp_path / "whole", llama_folders, **options)
    predicted = estimate(whole)
    assert not any("map" in part for part in predicted.seconds | predicted.memory)
    build(whole)
    build(request(tmp_path / "a.jsonl", tmp_path / "parts", llama_folders, **options))
    add(tmp_path / "parts", data)
    ours, theirs = all_rows(tmp_path / "parts"), all_rows(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(np.linalg.norm(ours[id] - theirs[id]) <= 2e-2 * np.linalg.norm(theirs[id]) for id in theirs)


def test_another_projection_is_named(built):
    with pytest.raises(ConfigMismatch, match="sketch.projection: 'two-sided' there, 'rapidgrad' asked for"):
        build(replace(built, sketch=SketchConfig(K)))


def test_an_old_manifest_without_a_projection_is_of_rapidgrads(data, llama_folders, tmp_path):
    asked = request(data, tmp_path / "index", llama_folders)
    build(asked)
    store = Store.open(asked.output)
    config = {**store.config, "sketch": {k: v for k, v in store.config["sketch"].items() if k != "projection"}}
    with store.lock():
        store.update_config(config)
    assert build(asked).computed == 0
    with pytest.raises(UsageError, match="RapidGrads mix"):
        Index.open(asked.output).blocks("sentence")


def test_an_index_says_which_entries_belong_to_a_block(built):
    blocks = Index.open(built.output).blocks("sentence")
    assert [part.stop for part in blocks.values()] == [512, 1024] and "layers 0-0, all" in blocks


def test_shuffles_are_refused():
    with pytest.raises(UsageError, match="--shuffles is about RapidGrads"):
        SketchConfig(K, shuffles=5, projection="two-sided")


def test_two_sided_rows_take_kfac_unless_another_is_given():
    def moment(recipe="default", **given):
        options = {name: given[name] for name in ("gradient",) if name in given}
        sketch = SketchConfig(projection=given.get("projection", "two-sided"))
        return BuildRequest("data", "index", "model", recipe=recipe, sketch=sketch, **options).gradient.second_moment

    assert moment() == "kfac" and moment("trackstar") == "factored" and moment("tracin") == "none"
    assert moment(projection="rapidgrad") == moment(gradient=GradientConfig(second_moment="estimate")) == "estimate"
