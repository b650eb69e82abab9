"""Memory that gradients take, by the live tensors."""

import mmap

import pytest
import torch

from rapidindex.gradients.losses import Batch, is_out_of_memory
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import correction
from tests import tiny
from tests.oracles import LiveTensorMeter, examples


def test_a_live_tensor_counts_once_and_until_it_is_freed():
    before = torch.zeros(1000)
    with LiveTensorMeter() as meter:
        a = before + 1
        b, c = a.view(10, 100)[2:], before[:7]
        a.mul_(2)
        assert (meter.now, meter.peak) == (4000, 4000)
        a = a + b.sum()  # 4 bytes for the sum, freed again
        assert (meter.now, meter.peak) == (8000, 8004)
        del b
        assert meter.now == 4000
    assert len(c) == 7


def test_too_little_memory_is_known_whoever_says_it():
    for take in (lambda: bytearray(2**46), lambda: torch.empty(2**46), lambda: mmap.mmap(-1, 2**46)):
        with pytest.raises((MemoryError, RuntimeError, OSError)) as said:
            take()
        assert is_out_of_memory(said.value)
    assert not is_out_of_memory(OSError(2, "No such file or directory"))


def test_the_first_batch_whose_gradients_are_compared_takes_no_more_than_a_later_one():
    gradients = PerExampleGradients(
        tiny.make_model("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    )
    batch, peaks = Batch.of(*examples([(2, 4)] * 6)), []
    for _ in range(2):
        with LiveTensorMeter() as meter:
            gradients(batch, lambda number, values: None)
        peaks.append(meter.peak)
    size = sum(layer.size for layer in gradients.layers)
    assert gradients.batched and peaks[0] <= 1.1 * peaks[1] < 4 * size


def test_the_correction_takes_no_more_than_its_own_memory():
    moment = torch.rand(10 * 2**20)
    with LiveTensorMeter() as meter:
        factors = correction(moment)
    assert meter.now == 4 * len(factors) and meter.peak <= 4 * len(factors) + 2**24
    assert torch.allclose(factors, (moment + 1e-3 * moment.double().mean()).rsqrt())
