import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapidindex.config import SketchConfig
from rapidindex.errors import UsageError
from rapidindex.gradients.sketch import Sketch
from rapidindex.search.vector_index import fold


def literal_algorithm_1(gradient, sketch):
    """The paper's text, step by step: pad, shuffle rows and columns λ times, multiply by ρ, sum every |v|/K."""
    v = np.zeros(sketch.padded, dtype=np.float64)
    v[: len(gradient)] = gradient
    for rows, columns in sketch.shuffles:
        shuffled = np.empty((len(rows), sketch.padded // len(rows)))
        shuffled[rows] = v.reshape(len(rows), -1)
        v = shuffled.reshape(-1)
        shuffled = np.empty((sketch.padded // len(columns), len(columns)))
        shuffled[:, columns] = v.reshape(-1, len(columns))
        v = shuffled.reshape(-1)
    rho = 1.0 - 2.0 * np.unpackbits(sketch.negative, bitorder="little")[: sketch.padded]
    return (v * rho).reshape(sketch.config.K, -1).sum(1)


@settings(deadline=None, max_examples=10)
@given(
    size=st.integers(1, 200_000),
    K=st.sampled_from([16, 256, 4096, 65_536]),
    shuffles=st.integers(0, 25),
    seed=st.integers(0, 2**63),
)
def test_composed_form_equals_the_literal_algorithm(size, K, shuffles, seed):
    sketch = Sketch(size, SketchConfig(K=K, shuffles=shuffles, seed=seed))
    gradient = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    ours = sketch.compress(torch.from_numpy(gradient)[None])[0]
    truth = literal_algorithm_1(gradient, sketch)
    assert np.linalg.norm(ours.numpy() - truth) <= 1e-5 * np.linalg.norm(gradient)


def test_every_place_is_used_once():
    sketch = Sketch(131_072, SketchConfig(K=65_536))
    bins = sketch.slots(0, sketch.padded) % 65_536
    assert torch.equal(torch.bincount(bins), torch.full((65_536,), 2))


def test_gradients_added_in_parts_make_the_same_rapidgrads():
    sketch = Sketch(10_000, SketchConfig(K=256))
    gradients = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    sums = sketch.empty(3)
    for start, stop in ((4_000, 10_000), (0, 1), (1, 4_000)):
        sketch.add(sums, start, gradients[:, start:stop])
    torch.testing.assert_close(sketch.finish(sums), sketch.compress(gradients), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [5_000, 70_000])
def test_folding_commutes_with_compression(size):
    gradients = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    full = Sketch(size, SketchConfig(K=65_536)).compress(gradients)
    for K in (32_768, 4_096, 64):
        small = Sketch(size, SketchConfig(K=K)).compress(gradients)
        torch.testing.assert_close(fold(full, K), small, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(fold(full.numpy(), K), small.numpy(), rtol=1e-5, atol=1e-3)


def test_inner_products_are_unbiased_and_their_error_shrinks_with_the_root_of_K():
    size, pairs = 4_000, 200
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(pairs, size, generator=generator))
    b = torch.nn.functional.normalize(
        a + 1.5 * torch.nn.functional.normalize(torch.randn(pairs, size, generator=generator))
    )
    truth = (a * b).sum(1)
    products = {256: [], 4_096: []}
    for seed in range(pairs):
        sketch = Sketch(size, SketchConfig(K=4_096, shuffles=5, seed=seed))
        both = sketch.compress(torch.stack([a[seed], b[seed]]))
        for K, found in products.items():
            found.append(torch.dot(*fold(both, K)))
    spread = {}
    for K, found in products.items():
        errors = torch.stack(found) - truth
        assert abs(errors.mean()) <= 3 * errors.std() / pairs**0.5
        spread[K] = float(errors.std())
    assert 3.0 <= spread[256] / spread[4_096] <= 5.3  # √(4096/256) = 4


def test_the_same_seed_gives_the_same_slots_for_ever():
    slots = Sketch(100_000, SketchConfig(K=1024, shuffles=20, seed=7)).slots(0, 100_000)
    assert slots[[0, 1, 2, 50_000, 99_999]].tolist() == GOLDEN_SLOTS
    assert not torch.equal(slots, Sketch(100_000, SketchConfig(K=1024, shuffles=20, seed=8)).slots(0, 100_000))


GOLDEN_SLOTS = [1141, 1136, 1480, 2043, 1117]


@pytest.mark.parametrize("K", [0, 8, 100, 65_535, 2**25])
def test_a_K_that_cannot_fold_is_refused(K):
    with pytest.raises(UsageError, match="power of two"):
        SketchConfig(K=K)


@pytest.mark.gpu
def test_the_gpu_makes_the_same_rapidgrads():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    sketch = Sketch(300_000, SketchConfig(K=4_096))
    gradients = torch.randn(4, 300_000, generator=torch.Generator().manual_seed(0))
    there = sketch.compress(gradients.cuda()).cpu()
    torch.testing.assert_close(there, sketch.compress(gradients), rtol=1e-4, atol=1e-3)


def test_a_map_of_slots_that_was_computed_before_gives_the_same_rapidgrads():
    config = SketchConfig(K=64)
    ours = Sketch(1000, config)
    gradients = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    again = Sketch(1000, config, ours.slots(0, 1000))
    assert torch.equal(again.compress(gradients), ours.compress(gradients))
    assert "shuffles" not in vars(again), "the map was computed anew"
