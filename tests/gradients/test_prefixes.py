"""Prefixes of one text, as the rows of its tokens are: one forward pass for all of them, and autograd's gradients."""

import pytest
import torch

from rapidindex.config import ModelConfig
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.model.model import load
from tests import tiny
from tests.oracles import LiveTensorMeter, autograd, collected, examples, make, prefixes

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


def tried(model, device="cpu"):
    """Gradients that have had a batch, by which they decide what is right for the model."""
    gradients = PerExampleGradients(model)
    collected(gradients, Batch.of(*prefixes(seed=1), device))
    return gradients


def passes(model, work):
    """What `work` returns, and the [examples, tokens] of each forward pass in it."""
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda module, inputs, options: sizes.append([*options["input_ids"].shape]), with_kwargs=True
    )
    found = work()
    handle.remove()
    return found, sizes


def error(model, ours, ids, weights):
    """The largest relative error of a row."""
    truths = [
        torch.cat([part.flatten().float() for part in autograd(model, *row)[1]])
        for row in zip(ids, weights, strict=True)
    ]
    return max(float((row - truth).norm() / truth.norm()) for row, truth in zip(ours, truths, strict=True))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_prefixes_have_the_gradients_of_autograd_from_one_forward_pass(name, way, dtype):
    model = make(name, way, dtype)
    gradients = tried(model)
    ids, weights = prefixes()
    (losses, ours), sizes = passes(model, lambda: collected(gradients, Batch.of(ids, weights)))
    assert sizes == [[1, 12]]
    for row in range(len(ids)):
        assert losses[row] == pytest.approx(float(autograd(model, ids[row], weights[row])[0]), rel=LIMIT[dtype])
    assert error(model, ours, ids, weights) <= LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("way", ["lora", "full"])
def test_prefixes_have_the_gradients_of_autograd_on_a_gpu(way):
    model, (ids, weights) = make("llama", way), prefixes()
    truth = collected(PerExampleGradients(model), Batch.of(ids, weights))[1]
    gradients = tried(model.to("cuda"), "cuda")
    (_, ours), sizes = passes(model, lambda: collected(gradients, Batch.of(ids, weights, "cuda")))
    assert sizes == [[1, 12]] and (ours.cpu() - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize(("quantize", "limit"), [("4bit", 1e-4), ("8bit", 0.1)])
def test_prefixes_over_a_quantized_base_have_the_gradients_of_autograd(wide_folders, quantize, limit):
    base, adapter = map(str, wide_folders)
    model = load(ModelConfig(base, adapter, quantize=quantize, device="cpu")).model
    gradients = tried(model)
    ids, weights = prefixes()
    (_, ours), sizes = passes(model, lambda: collected(gradients, Batch.of(ids, weights)))
    assert error(model, ours, ids, weights) <= limit
    assert sizes == [[1, 12]] or quantize == "8bit"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_of_prefixes_are_those_of_their_gradients(name):
    model = make(name, "full")
    gradients = tried(model)
    ids, weights = prefixes()
    found = {}
    gradients(Batch.of(ids, weights), found.__setitem__, factored=True)
    assert any(isinstance(part, Factors) for part in found.values())
    for number, part in found.items():
        if isinstance(part, Factors):
            torch.testing.assert_close(part.lengths(), part.dense().norm(dim=1), rtol=1e-4, atol=1e-6)
            found[number] = part.dense()
    assert error(model, torch.cat([found[number] for number in sorted(found)], 1), ids, weights) <= 1e-5


def test_only_prefixes_whose_last_token_alone_counts_share_a_forward_pass():
    model = make("llama", "lora")
    gradients = tried(model)
    ids, weights = prefixes()
    other = [ids[0], ids[1].copy(), *ids[2:]]
    other[1][3] += 1
    two = [weights[0] + (weights[0] == 0) / 100, *weights[1:]]
    for batch in (Batch.of(other, weights), Batch.of(ids, two), Batch.of(*examples()), Batch.of(ids[:1], weights[:1])):
        assert passes(model, lambda batch=batch: collected(gradients, batch))[1] == [[*batch.input_ids.shape]]


def test_a_model_in_which_the_length_of_a_text_counts_gives_every_prefix_a_pass_of_its_own():
    model = make("llama", "lora")
    seen = {}
    model.register_forward_pre_hook(lambda module, inputs, options: seen.update(options), with_kwargs=True)
    model.base_model.model.model.norm.register_forward_hook(
        lambda module, inputs, output: (
            output * seen["attention_mask"].sum(1).view(-1, 1, 1) / 10
            if len(output) == len(seen["attention_mask"])
            else None
        )
    )
    gradients = PerExampleGradients(model)
    ids, weights = prefixes()
    batch = Batch.of(ids, weights)
    for _ in range(2):
        (_, ours), sizes = passes(model, lambda: collected(gradients, batch))
        alone = torch.cat([collected(gradients, batch.example(row))[1] for row in range(len(batch))])
        assert (ours - alone).norm() <= 1e-5 * alone.norm()
    assert gradients.batched and sizes == [[5, 12]]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_of_a_text_are_those_of_each_prefix(kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    model = tiny.with_lora(tiny.make_model("llama", rope_parameters=rope, max_position_embeddings=16))
    gradients = tried(model)
    for lengths in ((30, 12), (30, 29)):  # in batches that do not mix the two kinds of positions
        ids, weights = prefixes(lengths=lengths)
        batch = Batch.of(ids, weights)
        alone = torch.cat([collected(gradients, batch.example(row))[1] for row in (0, 1)])
        assert error(model, alone, ids, weights) <= 1e-5
    ids, weights = prefixes(lengths=(30, 29))
    assert error(model, collected(gradients, Batch.of(ids, weights))[1], ids, weights) <= 1e-5


class Clamped(torch.autograd.Function):
    """The identity, whose backward pass asks what a vectorised one cannot answer."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta if delta.abs().max().item() < 1e9 else delta.clamp(-1e9, 1e9)


def test_a_backward_pass_that_cannot_be_vectorised_is_none():
    model = make("llama", "full")
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: Clamped.apply(output))
    gradients = tried(model)
    ids, weights = prefixes()
    (_, ours), sizes = passes(model, lambda: collected(gradients, Batch.of(ids, weights)))
    assert gradients.batched and sizes == [[5, 12]]
    assert error(model, ours, ids, weights) <= 1e-5


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_shared_pass_takes_no_more_memory_than_a_pass_for_each_prefix(way):
    model = make("llama", way)
    gradients = tried(model)
    batch = Batch.of(*prefixes(lengths=range(64, 48, -1)))
    peaks = []
    for shares in (False, True):
        gradients._shares = shares
        with LiveTensorMeter() as meter:
            gradients(batch, lambda number, gradient: None)
        peaks.append(meter.peak)
    assert peaks[1] <= peaks[0]
