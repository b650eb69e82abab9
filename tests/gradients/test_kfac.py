"""K-FAC's root, held against (A ⊗ G)^-1/2 of autograd's gradients written out."""

import numpy as np
import pytest
import torch

from rapidindex.config import SketchConfig
from rapidindex.gradients import eigenbases
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch, Layer, trainable
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor, projection_of
from rapidindex.gradients.second_moment import Kfac
from rapidindex.gradients.token_scores import TokenScores, shares
from tests import tiny
from tests.gradients.test_two_sided import projected
from tests.oracles import autograd, drawn, examples, make

DAMPING = 2.0


@pytest.fixture(params=[(4, 30), (64, 16_384)], ids=["leading and rest, long sides' axes", "all"])
def sides(request, monkeypatch):
    """The eigenvectors of a side, and the longest side that has any."""
    monkeypatch.setattr(eigenbases, "LEADING", request.param[0])
    monkeypatch.setattr(eigenbases, "_LONGEST_SHORT", request.param[1])
    monkeypatch.setattr(eigenbases, "_COLUMNS", 1000)
    return request.param


def drawn_gradients(model, ids, weights):
    """Every layer's gradients of the examples, with drawn tokens in their loss: float32 [examples, rows, columns]."""
    found = []
    for number, (one, weight) in enumerate(zip(ids, weights, strict=True)):
        labels, roots = drawn(model, one, weight, 0, number)
        found.append([g.to_dense() for g in autograd(model, one, roots, labels)[1]])
    return [torch.stack(each).view(len(each), *as_two(each[0])) for each in zip(*found, strict=True)]


def as_two(parameter):
    return tuple(parameter.shape) if parameter.dim() == 2 else (parameter.numel(), 1)


def inverse_root(product, is_matrix, sides):
    """(P / mean + damping)^-½ of a side's mean product P, whose smaller eigenvalues are their mean."""
    leading, longest = sides
    values, vectors = torch.linalg.eigh(product.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if not is_matrix or len(values) > longest or len(values) == 1:
        values, vectors = product.double().diagonal().clone(), torch.eye(len(product)).double()
    elif leading < len(values):
        values[leading:] = values[leading:].mean()
    if not values.any():
        return torch.eye(len(values)).double()
    return vectors @ torch.diag((values / values.mean() + DAMPING).rsqrt()) @ vectors.T


def roots(model, ids, weights, sides):
    """G^-½ and A^-½ of every layer; a mean of all squared gradients goes into the former."""
    for g, parameter in zip(drawn_gradients(model, ids, weights), trainable(model).values(), strict=True):
        G, A = torch.einsum("nij,nkj->ik", g, g), torch.einsum("nij,nik->jk", g, g)
        mean = float(g.double().square().mean())
        out, into = (inverse_root(product, parameter.dim() == 2, sides) for product in (G, A))
        yield out / (mean**0.5 or 1.0), into


def literal(model, ids, weights, pairs, normalize, sketch):
    """One example: autograd, G^-½ g A^-½, normalised, projected; and the norms."""
    parts = [g.to_dense().double().view(as_two(g)) for g in autograd(model, ids, weights)[1]]
    parts = [(out @ g @ into).float().flatten() for (out, into), g in zip(pairs, parts, strict=True)]
    norms = torch.stack([part.norm() for part in parts])
    if normalize == "layer":
        parts = [part / norm if norm > 0 else part for part, norm in zip(parts, norms, strict=True)]
    flat = torch.cat(parts) / (norms.norm() if normalize == "unit" else 1)
    if sketch.config.projection == "two-sided":
        return flat, norms, projected(flat.split([part.numel() for part in parts]), sketch)
    return flat, norms, sketch.compress(flat[None])[0]


def compressor_of(model, ids, weights, projection, normalize):
    gradients = PerExampleGradients(model)
    batches = [Batch.of(ids[:3], weights[:3]), Batch.of(ids[3:], weights[3:])]
    means, vectors = Kfac.estimate(gradients, batches, 0, lambda batches, stage: batches)
    layers = gradients.layers
    assert len(means) == Kfac.moment_entries(layers) and len(vectors) == Kfac.vector_entries(layers)
    sketch = projection_of(SketchConfig(1024, projection=projection), layers)
    preconditioner = Kfac(layers, Kfac.factors_of(means, layers), vectors)
    return Compressor(gradients, sketch, normalize=normalize, preconditioner=preconditioner)


@pytest.mark.parametrize("projection", ["rapidgrad", "two-sided"])
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_are_those_of_the_literal_roots(name, way, projection, sides):
    model = make(name, way)
    ids, weights = examples()
    pairs = list(roots(model, ids, weights, sides))
    for normalize in ("unit", "layer", "none"):
        ours = compressor_of(model, ids, weights, projection, normalize)
        found = ours(Batch.of(ids, weights))
        for row, one in enumerate(zip(ids, weights, strict=True)):
            _, norms, truth = literal(model, *one, pairs, normalize, ours.sketch)
            assert (found.rows[row] - truth).norm() <= 2e-5 * truth.norm()
            assert (found.norms[row] - norms).norm() <= 2e-5 * norms.norm()


@pytest.mark.parametrize("projection", ["rapidgrad", "two-sided"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_heat_maps_average_to_the_uncompressed_influence(way, projection, sides):
    model = make("llama", way)
    ids, weights = examples()
    pairs = list(roots(model, ids, weights, sides))
    compressor = compressor_of(model, ids, weights, projection, "unit")
    everything = Batch.of(ids, weights)
    direction = compressor.direction(Batch.of(ids[:1], weights[:1]))
    norms = compressor(everything).norms
    whole = [literal(model, *one, pairs, "unit", compressor.sketch)[0] for one in zip(ids, weights, strict=True)]
    for row, scores in enumerate(shares(TokenScores(model), compressor, direction, everything, norms)):
        assert float(scores.mean()) == pytest.approx(float(whole[0] @ whole[row]), abs=1e-4)


@pytest.mark.parametrize("longest", [30, 16_384])
@pytest.mark.parametrize("columns", [5, 1000], ids=["sketched", "whole"])
def test_products_of_factors_are_those_of_the_gradients(longest, columns, monkeypatch):
    monkeypatch.setattr(eigenbases, "_LONGEST_SHORT", longest)
    monkeypatch.setattr(eigenbases, "_COLUMNS", columns)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (3, 2), generator=draw), torch.randn(3, 2, 20, generator=draw)
    head = torch.randn(3, 4, 50, generator=draw), torch.randn(3, 4, 20, generator=draw)
    factors, layer = Factors((50, 20), [ids, head]), Layer("w", 0, 1000, (50, 20))
    assert factors.smaller
    for transposed, x in ((False, torch.randn(20, 7, generator=draw)), (True, torch.randn(3, 50, 7, generator=draw))):
        g = factors.dense().view(3, 50, 20)
        truth = (g.mT if transposed else g) @ x
        torch.testing.assert_close(factors.times(x, transposed=transposed), truth, rtol=1e-4, atol=1e-4)
    random = eigenbases.random_columns([layer], 0, eigenbases.of_short)
    ours, truth = (
        eigenbases.products_of_sides(one, layer, eigenbases.of_short, random) for one in (factors, factors.dense())
    )
    assert len(ours) == sum(eigenbases.sizes_of_sides(layer, eigenbases.of_short))
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("longest", [30, 16_384])
def test_factors_of_a_tied_weight_are_corrected_as_the_gradients_are(longest, monkeypatch):
    monkeypatch.setattr(eigenbases, "LEADING", 4)
    monkeypatch.setattr(eigenbases, "_LONGEST_SHORT", longest)
    layers, draw = PerExampleGradients(make("gpt2", "full")).layers, torch.Generator().manual_seed(0)
    (number,) = (n for n, layer in enumerate(layers) if layer.name.endswith("wte.weight"))
    rows, columns = layers[number].shape
    looked_up = torch.randint(0, rows, (2, 9), generator=draw), torch.randn(2, 9, columns, generator=draw)
    head = torch.randn(2, 5, rows, generator=draw), torch.randn(2, 5, columns, generator=draw)
    factors = Factors((rows, columns), [looked_up, head])
    means = torch.rand(Kfac.moment_entries(layers), generator=draw)
    vectors = torch.randn(Kfac.vector_entries(layers), generator=draw)
    kfac = Kfac(layers, Kfac.factors_of(means, layers), vectors)
    whole = kfac.apply(number, factors.dense())
    assert (rows > longest) == (not kfac.bases.sides[number][0].kept)
    torch.testing.assert_close(
        kfac.apply(number, factors).dense(), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max())
    )
    assert np.isfinite(float(whole.sum())) and not torch.equal(whole, factors.dense())
