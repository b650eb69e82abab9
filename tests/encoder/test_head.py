"""The head, against principal directions and kernel ridge regression written out."""

import numpy as np
import pytest
import torch

from rapidindex.encoder import head as module
from rapidindex.encoder.head import Head, coordinates, fit


@pytest.fixture
def rows():
    return np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)


@pytest.fixture
def features():
    """Two embeddings of 6 entries, one of them the same in all texts, and two lengths."""
    features = torch.randn(50, 14, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0.5
    return features


def test_coordinates_keep_the_inner_products_of_rows_that_lie_in_few_directions(rows):
    landmarks = list(range(40))
    found = coordinates(rows[landmarks] @ rows.T, landmarks)
    assert found.shape == (50, 30)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-3)


def test_of_many_directions_the_leading_ones_are_kept(rows, monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 5)
    found = coordinates(rows @ rows.T, list(range(50)))
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    nearest = left[:, :5] * values[:5] @ right[:5]
    np.testing.assert_allclose(found @ found.T, nearest @ nearest.T, atol=1e-3)


def test_with_every_text_a_landmark_it_is_kernel_ridge_regression(rows, features, monkeypatch):
    monkeypatch.setattr(module, "_GAMMAS", (0.3,))
    monkeypatch.setattr(module, "_PENALTIES", (0.7,))
    products, everything = rows @ rows.T, list(range(50))
    head, quality = fit(products, features, everything, lambda head: 0.25)
    x = features.double().numpy()
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 1e-6, spread, np.inf) / np.sqrt([6] * 12 + [2] * 2)
    kernel = np.exp(-0.3 * ((x[:, None] - x[None]) ** 2).sum(2))
    expected = kernel @ np.linalg.solve(kernel + 0.7 * np.eye(50), coordinates(products, everything))
    np.testing.assert_allclose(head(features).numpy(), expected, atol=2e-3)
    assert quality == 0.25


def test_the_head_of_the_best_quality_is_chosen_and_kept(rows, features, tmp_path):
    head, quality = fit(rows[:20] @ rows.T, features, list(range(20)), lambda head: -abs(float(head.gamma) - 0.6))
    assert float(head.gamma) == pytest.approx(0.6) and quality == pytest.approx(0, abs=1e-6)
    assert head.landmarks.shape == (20, 14) and head.weights.shape == (20, 20)
    assert Head.load(tmp_path) is None
    head.save(tmp_path)
    assert torch.equal(Head.load(tmp_path)(features), head(features))
