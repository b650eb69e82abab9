"""The correction along eigenvectors, held against each layer's U, V and v written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex import Index
from rapidindex.caching.build import build
from rapidindex.caching.update import add
from rapidindex.config import BuildConfig, GradientConfig, SketchConfig
from rapidindex.errors import DamagedIndex
from rapidindex.gradients import eigenbases
from rapidindex.gradients.eigenbases import Eigenbases, estimate_eigenbases, vector_entries
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import Eigenbasis, estimate_second_moment
from rapidindex.gradients.sketch import Sketch
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.store import Store, check
from tests import tiny
from tests.oracles import all_rows, autograd, examples, make, request

KRONECKER = GradientConfig(second_moment="kronecker", moment_examples=6)


def layers_of(model):
    return PerExampleGradients(model).layers


def fitted(model, ids, weights):
    """Layers, eigenvectors and v of a sample, as the product finds them."""
    gradients, batches = PerExampleGradients(model), [Batch.of(ids[:2], weights[:2]), Batch.of(ids[2:], weights[2:])]
    vectors = estimate_eigenbases(gradients, batches)
    v = estimate_second_moment(gradients, batches, Eigenbases(gradients.layers, vectors))
    return gradients, vectors, v


def pairs(layers, vectors):
    """(U, V) of each layer from the flat vectors; the identity where there is none."""
    first = 0
    for layer in layers:
        shape = layer.shape if len(layer.shape) == 2 else (layer.size, 1)
        sides = []
        for side in shape:
            kept = len(layer.shape) == 2 and 1 < side <= eigenbases.LONGEST_SIDE
            sides.append(vectors[first : first + side**2].view(side, side) if kept else torch.eye(side))
            first += side**2 * kept
        yield sides
    assert first == len(vectors)


def oracle(model, ids, weights, layers, vectors, v, normalize):
    """One example: autograd, corrected along U and V layer by layer, normalised; no sketch."""
    parts = []
    gradients = autograd(model, ids, weights)[1]
    for g, layer, (U, V) in zip(gradients, layers, pairs(layers, vectors), strict=True):
        mine = v[layer.start : layer.start + layer.size]
        factor = (mine + 0.1 * mine.mean()).rsqrt() if mine.any() else torch.ones_like(mine)
        seen = U.T @ g.reshape(len(U), len(V)) @ V * factor.view(len(U), len(V))
        part = (U @ seen @ V.T).flatten()
        parts.append(part / part.norm() if normalize == "layer" and part.norm() > 0 else part)
    flat = torch.cat(parts)
    return flat / flat.norm() if normalize == "unit" else flat


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eigenvectors_are_orthonormal_and_those_of_the_samples_mean_products(name, way):
    model = make(name, way)
    ids, weights = examples()
    gradients, vectors, v = fitted(model, ids, weights)
    each = [autograd(model, i, w)[1] for i, w in zip(ids, weights, strict=True)]
    for number, (layer, (U, V)) in enumerate(zip(gradients.layers, pairs(gradients.layers, vectors), strict=True)):
        g = torch.stack([parts[number].float() for parts in each])
        g = g.view(len(g), len(U), len(V))
        seen = U.T @ g @ V
        torch.testing.assert_close(
            v[layer.start : layer.start + layer.size].view(seen.shape[1:]), seen.square().mean(0), rtol=1e-3, atol=1e-9
        )
        products = ((U, torch.einsum("nij,nkj->ik", g, g)), (V, torch.einsum("nij,nik->jk", g, g)))
        for vectors_of_side, product in products if len(layer.shape) == 2 else ():
            torch.testing.assert_close(vectors_of_side.T @ vectors_of_side, torch.eye(len(product)), rtol=0, atol=1e-5)
            turned = vectors_of_side.T @ product @ vectors_of_side
            assert (turned - turned.diag().diag()).norm() <= 1e-5 * product.norm()


@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_rapidgrads_are_the_compressed_oracle_and_heat_maps_average_to_it(way, normalize):
    model = make("llama", way)
    ids, weights = examples()
    gradients, vectors, v = fitted(model, ids, weights)
    layers = gradients.layers
    compressor = Compressor(
        gradients,
        Sketch(sum(layer.size for layer in layers), SketchConfig(K=1024)),
        normalize=normalize,
        preconditioner=Eigenbasis(layers, Eigenbasis.factors_of(v, layers), vectors),
    )
    everything = Batch.of(ids, weights)
    whole = [oracle(model, i, w, layers, vectors, v, normalize) for i, w in zip(ids, weights, strict=True)]
    found = compressor(everything)
    truth = compressor.sketch.compress(torch.stack(whole))
    assert ((found.rows - truth).norm(dim=1) <= 1e-4 * truth.norm(dim=1)).all()
    direction = compressor.direction(Batch.of(ids[:1], weights[:1]))
    for row, scores in enumerate(shares(TokenScores(model), compressor, direction, everything, found.norms)):
        exact = float(torch.dot(whole[0], whole[row]))
        assert float(scores.mean()) == pytest.approx(exact, abs=1e-4 * float(whole[0].norm() * whole[row].norm()))


def test_a_side_that_is_too_long_and_what_is_no_matrix_keep_their_axes(monkeypatch):
    layers = layers_of(make("llama", "full"))
    assert any(len(layer.shape) == 1 for layer in layers)
    longest = max(max(layer.shape) for layer in layers)
    squares = [side**2 for layer in layers if len(layer.shape) == 2 for side in layer.shape]
    assert vector_entries(layers) == sum(squares)
    monkeypatch.setattr(eigenbases, "LONGEST_SIDE", longest - 1)
    assert vector_entries(layers) == sum(square for square in squares if square < longest**2)
    model = make("llama", "full")
    ids, weights = examples()
    gradients, vectors, _ = fitted(model, ids, weights)
    number = next(n for n, layer in enumerate(layers) if longest in layer.shape)
    values = torch.randn(3, layers[number].size, generator=torch.Generator().manual_seed(0))
    bases = Eigenbases(layers, vectors)
    U, V = list(pairs(layers, vectors))[number]
    seen = (U.T @ values.view(3, *layers[number].shape) @ V).flatten(1)
    torch.testing.assert_close(bases.to_eigenbasis(number, values), seen)
    torch.testing.assert_close(bases.from_eigenbasis(number, seen), values, rtol=1e-4, atol=1e-5)
    vector = next(n for n, layer in enumerate(layers) if len(layer.shape) == 1)
    assert bases.to_eigenbasis(vector, values) is values


def test_an_index_is_built_by_one_process_or_two_added_to_and_asked(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders, gradient=KRONECKER, limit=8)
    assert build(asked).computed == 8
    store = Store.open(tmp_path / "index")
    assert len(store.eigenvectors()) > 0 and check(tmp_path / "index") == []
    two = replace(asked, output=str(tmp_path / "two"), work=BuildConfig(workers=2))
    build(two)
    ours, theirs = all_rows(tmp_path / "index"), all_rows(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for id, row in ours.items():
        assert np.abs(row - theirs[id]).max() <= np.abs(row).max() / 127 * (1 + 1e-3)
    assert add(tmp_path / "index", str(data)).computed == 2
    found = Index.open(tmp_path / "index").query(
        f"Tell me about {tiny.WORDS[0]}", answer=f"{tiny.WORDS[0]} is nice", k=3, all=True
    )
    for match in found.matches:
        assert match.score == pytest.approx(match.exact_score, abs=0.15)


def test_eigenvectors_of_other_layers_are_damage(data, tmp_path, llama_folders):
    build(request(data, tmp_path / "index", llama_folders, gradient=KRONECKER, limit=3))
    index = Index.open(tmp_path / "index")
    index.store.eigenvectors = lambda: np.zeros(7, np.float32)
    with pytest.raises(DamagedIndex, match="eigenvectors of this model's layers"):
        index.query("Tell me about tea", answer="tea is nice", k=1)


def test_an_index_is_the_same_however_its_sample_is_batched(tmp_path, data, llama_folders):
    moments = []
    for tokens in (16, 4096):
        asked = request(data, tmp_path / str(tokens), llama_folders, gradient=KRONECKER, work=BuildConfig(tokens))
        build(asked)
        moments.append(Store.open(asked.output).second_moment())
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-3, atol=1e-5 * moments[0].max())
