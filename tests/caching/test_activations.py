"""Memory that is told before it is taken, beside what is alive when it is."""

import pytest
import torch

from rapidindex.caching.estimate import LiveTensorMeter, measure_activations
from rapidindex.config import ModelConfig
from rapidindex.gradients.losses import Batch, example_losses
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import correction
from rapidindex.model.model import load
from tests import tiny
from tests.oracles import collected, examples, make

LONG = [(3, 118), (30, 90), (7, 101), (60, 60), (1, 119), (2, 2)]


def alive_in_forward(gradients, lengths):
    """Bytes alive at the fullest moment of a forward pass over examples of these (prompt, response) lengths."""
    batch = Batch.of(*examples(lengths))
    with LiveTensorMeter() as alive, gradients.forward(batch, lambda number, values: None):
        return alive.peak


def last_token_only(lengths):
    return [(prompt + response - 1, 1) for prompt, response in lengths]


def test_what_is_alive_is_counted_once_and_until_it_is_freed():
    before = torch.zeros(1000)
    with LiveTensorMeter() as alive:
        a = before + 1
        b, c = a.view(10, 100)[2:], before[:7]
        a.mul_(2)
        assert (alive.now, alive.peak) == (4000, 4000)
        a = a + b.sum()  # 4 bytes for the sum, freed again
        assert (alive.now, alive.peak) == (8000, 8004)
        del b
        assert alive.now == 4000
    assert len(c) == 7


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_short_passes_tell_what_a_long_batch_keeps(name, way):
    gradients = PerExampleGradients(make(name, way))
    told = measure_activations(gradients).of(len(LONG), 121)
    assert told == pytest.approx(alive_in_forward(gradients, last_token_only(LONG)), rel=0.05)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_keeps_its_weights_is_told(llama_folders, attention):
    loaded = load(ModelConfig(*map(str, llama_folders), device="cpu"), attn_implementation=attention)
    gradients = PerExampleGradients(loaded.model)
    told = measure_activations(gradients).of(len(LONG), 121)
    assert told == pytest.approx(alive_in_forward(gradients, last_token_only(LONG)), rel=0.1)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"quantize": "4bit"}, {"quantize": "8bit"}], ids=str)
def test_half_precision_and_quantized_bases_are_told(wide_folders, changes):
    gradients = PerExampleGradients(load(ModelConfig(*map(str, wide_folders), device="cpu", **changes)).model)
    told = measure_activations(gradients).of(len(LONG), 121)
    assert told == pytest.approx(alive_in_forward(gradients, last_token_only(LONG)), rel=0.15)


def test_measuring_changes_no_gradient_and_leaves_no_hook():
    gradients = PerExampleGradients(make("llama", "lora"))
    batch = Batch.of(*examples())
    before = collected(gradients, batch)
    flags = {name: parameter.requires_grad for name, parameter in gradients.model.named_parameters()}
    measure_activations(gradients)
    assert flags == {name: parameter.requires_grad for name, parameter in gradients.model.named_parameters()}
    assert not any(module._forward_hooks for module in gradients.model.modules())
    assert all(torch.equal(*pair) for pair in zip(before, collected(gradients, batch), strict=True))


def test_a_model_without_batched_rules_is_measured_as_it_is_computed():
    model = tiny.make_model("llama")
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    gradients = PerExampleGradients(model)
    assert not gradients.batched
    batch = Batch.of(*examples([(100, 21)]))
    with LiveTensorMeter() as alive:
        losses = example_losses(model, batch)
    assert measure_activations(gradients).of(len(losses), 121) == pytest.approx(alive.peak, rel=0.15)


def test_the_first_batch_whose_gradients_are_compared_takes_no_more_than_a_later_one():
    gradients = PerExampleGradients(
        tiny.make_model("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    )
    batch, peaks = Batch.of(*examples([(2, 4)] * 6)), []
    for _ in range(2):
        with LiveTensorMeter() as alive:
            gradients(batch, lambda number, values: None)
        peaks.append(alive.peak)
    size = sum(layer.size for layer in gradients.layers)
    assert gradients.batched and peaks[0] <= 1.1 * peaks[1] < 4 * size


def test_the_correction_takes_no_more_than_its_own_memory():
    moment = torch.rand(10 * 2**20)
    with LiveTensorMeter() as alive:
        factors = correction(moment)
    assert alive.now == 4 * len(factors) and alive.peak <= 4 * len(factors) + 2**24
    assert torch.allclose(factors, (moment + 1e-3 * moment.double().mean()).rsqrt())
