import numpy as np
import pytest
import torch

from rapidindex.config import SketchConfig
from rapidindex.errors import ModelError
from rapidindex.gradients.losses import Batch, trainable
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import (
    Diagonal,
    Eigenbasis,
    Kfac,
    RowColumn,
    correction,
    estimate_second_moment,
    read_second_moment,
)
from rapidindex.gradients.sketch import Sketch
from tests import tiny
from tests.oracles import autograd, examples, make, oracle


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_rapidgrads_are_the_compressed_oracle(way, normalize, corrected):
    model = make("llama", way)
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    v = estimate_second_moment(gradients, [Batch.of(ids, weights)]) if corrected else None
    sketch = Sketch(sum(layer.size for layer in gradients.layers), SketchConfig(K=1024))
    compressor = Compressor(
        gradients,
        sketch,
        normalize=normalize,
        preconditioner=Diagonal(gradients.layers, correction(v)) if corrected else None,
    )
    ours = compressor(Batch.of(ids, weights)).rows
    truth = sketch.compress(torch.stack([oracle(model, i, w, v, normalize) for i, w in zip(ids, weights, strict=True)]))
    assert ((ours - truth).norm(dim=1) <= 2e-5 * truth.norm(dim=1)).all()


def test_the_estimate_is_the_mean_squared_gradient():
    model = make("qwen3", "lora")
    ids, weights = examples()
    v = estimate_second_moment(
        PerExampleGradients(model), [Batch.of(ids[:3], weights[:3]), Batch.of(ids[3:], weights[3:])]
    )
    squares = [
        torch.cat([p.flatten() for p in autograd(model, i, w)[1]]).square() for i, w in zip(ids, weights, strict=True)
    ]
    torch.testing.assert_close(v, torch.stack(squares).mean(0), rtol=1e-4, atol=1e-9)


def test_an_example_with_a_nan_leaves_the_others_whole():
    model = make("llama", "lora")
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    sketch = Sketch(sum(layer.size for layer in gradients.layers), SketchConfig(K=256))
    compressor = Compressor(gradients, sketch, normalize="unit")
    clean = compressor(Batch.of(ids, weights))
    weights[1] = weights[1] * float("nan")
    poisoned = compressor(Batch.of(ids, weights))
    assert not poisoned.norms[1].isfinite().all()
    torch.testing.assert_close(poisoned.rows[[0, 2, 3]], clean.rows[[0, 2, 3]], rtol=1e-5, atol=1e-6)


def trained(model, optimizer, steps=3):
    ids, weights = examples()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=torch.as_tensor(ids[0]).long()[None]).logits
        logits.square().mean().backward()
        optimizer.step()


def scaled_batches(scale):
    """Two examples and then two, the third of which has its loss multiplied by `scale`."""
    ids, weights = examples()
    weights = [*weights[:2], weights[2] * np.float32(scale), weights[3]]
    names = [f"example {number}" for number in range(4)]
    return [Batch.of(ids[at], weights[at], names=names[at]) for at in (slice(0, 2), slice(2, 4))]


@pytest.mark.parametrize("kind", [Diagonal, RowColumn, Eigenbasis, Kfac])
def test_an_example_of_the_sample_without_a_finite_gradient_is_left_out_alone(kind):
    gradients = PerExampleGradients(make("llama", "full"))

    def moment(batches):
        return kind.estimate(gradients, batches, 0, lambda batches, stage: batches)[0]

    found = moment(scaled_batches(np.nan))
    if kind not in (Eigenbasis, Kfac):  # whose draws follow the example's place in the sample
        first, second = scaled_batches(1)
        torch.testing.assert_close(found, moment([first, second.example(1)]))
    assert found.isfinite().all() and found.any()
    with pytest.raises(ModelError, match="No example of the sample"):
        moment([batch.example(0) for batch in scaled_batches(np.nan)[1:]])


@pytest.mark.parametrize("kind", [Diagonal, RowColumn])
def test_a_square_that_float32_does_not_hold_is_said_with_the_examples_name(kind):
    gradients = PerExampleGradients(make("llama", "full"))
    with pytest.raises(ModelError, match="square of the gradient of example 2 is too large"):
        kind.estimate(gradients, scaled_batches(1e25), 0, lambda batches, stage: batches)


def test_adams_second_moment_is_read_with_its_bias_corrected(tmp_path):
    model = make("llama", "full")
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    v = read_second_moment(tmp_path, model, PerExampleGradients(model).layers)
    truth = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parameters]) / (1 - 0.999**3)
    torch.testing.assert_close(v, truth)


def test_adafactors_second_moment_is_the_product_of_its_rows_and_columns(tmp_path):
    from transformers.optimization import Adafactor

    model = make("llama", "lora")
    optimizer = Adafactor(list(trainable(model).values()), lr=1e-4, relative_step=False, scale_parameter=False)
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    gradients = PerExampleGradients(model)
    v = read_second_moment(tmp_path / "optimizer.pt", model, gradients.layers)
    first = trainable(model)[gradients.layers[0].name]
    state = optimizer.state[first]
    truth = torch.outer(state["exp_avg_sq_row"], state["exp_avg_sq_col"]) / state["exp_avg_sq_row"].mean()
    torch.testing.assert_close(v[: first.numel()].view_as(first), truth)


def test_another_models_optimizer_state_is_refused(tmp_path):
    model = make("llama", "full")
    optimizer = torch.optim.AdamW(list(trainable(model).values())[:3], lr=1e-4)
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    layers = PerExampleGradients(model).layers
    with pytest.raises(ModelError, match="state of 3 parameters"):
        read_second_moment(tmp_path, model, layers)
    with pytest.raises(ModelError, match="no optimizer state"):
        read_second_moment(tmp_path / "nowhere", model, layers)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ModelError, match="not an optimizer's saved state"):
        read_second_moment(tmp_path / "junk.pt", model, layers)


def test_trainers_checkpoint_groups_are_told_apart(tmp_path):
    from transformers import Trainer

    model = tiny.make_model("gpt2")
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = trainable(model)
    groups = [[p for n, p in named.items() if n in decayed], [p for n, p in named.items() if n not in decayed]]
    assert all(groups)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-4)
    trained(model, optimizer, steps=1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    gradients = PerExampleGradients(model)
    v = read_second_moment(tmp_path, model, gradients.layers)
    for layer in gradients.layers:
        truth = optimizer.state[named[layer.name]]["exp_avg_sq"].flatten() / (1 - 0.999)
        torch.testing.assert_close(v[layer.start : layer.start + layer.size], truth)
