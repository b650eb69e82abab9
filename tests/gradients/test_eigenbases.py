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
from rapidindex.gradients import eigenbases, second_moment
from rapidindex.gradients.eigenbases import Eigenbases, estimate_eigenbases
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import Eigenbasis, mean_over_sample
from rapidindex.gradients.sketch import Sketch
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.store import Store, check
from tests import tiny
from tests.oracles import all_rows, autograd, drawn, examples, make, request

KRONECKER = GradientConfig(second_moment="kronecker", moment_examples=6)


@pytest.fixture(params=[4, 64], ids=["four leading", "all"])
def leading(request, monkeypatch):
    """Sides with a rest beside their leading eigenvectors, and sides without."""
    monkeypatch.setattr(eigenbases, "LEADING", request.param)
    monkeypatch.setattr(eigenbases, "_COLUMNS", 1000)


def layers_of(model):
    return PerExampleGradients(model).layers


def fitted(model, ids, weights):
    """Layers, eigenvectors and v of a sample, as the product finds them."""
    gradients, batches = PerExampleGradients(model), [Batch.of(ids[:2], weights[:2]), Batch.of(ids[2:], weights[2:])]
    vectors = estimate_eigenbases(gradients, batches)
    bases = Eigenbases(gradients.layers, vectors)
    sizes = eigenbases.moment_sizes(gradients.layers)
    return gradients, vectors, mean_over_sample(gradients, batches, bases.squares, sizes)


class Parts:
    """One layer's directions, written out: an orthogonal matrix for each side, and the group of each of its columns."""

    def __init__(self, layer, vectors, keep=eigenbases.leading):
        self.shape = layer.shape if len(layer.shape) == 2 else (layer.size, 1)
        self.matrices, self.groups, self.used = [], [], 0
        for side in self.shape:
            kept = keep(side) if len(layer.shape) == 2 else 0
            U = vectors[self.used : self.used + side * kept].view(side, kept)
            self.used += side * kept
            full = torch.linalg.qr(torch.cat([U, torch.eye(side)], 1)).Q if kept else torch.eye(side)
            full[:, :kept] = U  # qr may turn them round
            self.matrices.append(full)
            self.groups.append(torch.arange(side).clamp_max(kept) if kept else torch.arange(side))

    def turned(self, g):
        return self.matrices[0].T @ g.reshape(-1, *self.shape) @ self.matrices[1]

    def back(self, turned):
        return self.matrices[0] @ turned @ self.matrices[1].T

    def means(self, squares):
        """The mean of each pair of groups, of a matrix of squares [rows, columns]."""
        rows, columns = (torch.nn.functional.one_hot(groups).float() for groups in self.groups)
        return (rows.T @ squares @ columns) / torch.outer(rows.sum(0), columns.sum(0))

    def spread(self, v):
        """Each direction's own v."""
        rows, columns = self.groups
        return v.view(int(rows.max()) + 1, int(columns.max()) + 1)[rows][:, columns]


def parts_of(layers, vectors, keep=eigenbases.leading):
    first = 0
    for layer in layers:
        parts = Parts(layer, vectors[first:], keep)
        first += parts.used
        yield parts
    assert first == len(vectors)


def moments_of(layers, v, keep=eigenbases.leading):
    return v.split(eigenbases.moment_sizes(layers, keep))


def oracle(model, ids, weights, layers, vectors, v, normalize, keep=eigenbases.leading):
    """One example: autograd, corrected direction by direction, normalised; no sketch."""
    parts, gradients = [], autograd(model, ids, weights)[1]
    for g, layer, mine, moment in zip(
        gradients, layers, parts_of(layers, vectors, keep), moments_of(layers, v, keep), strict=True
    ):
        spread = mine.spread(moment)
        factor = (spread + 0.1 * spread.mean()).rsqrt() if spread.any() else torch.ones_like(spread)
        part = mine.back(mine.turned(g) * factor).flatten()
        assert part.numel() == layer.size
        parts.append(part / part.norm() if normalize == "layer" and part.norm() > 0 else part)
    flat = torch.cat(parts)
    return flat / flat.norm() if normalize == "unit" else flat


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eigenvectors_are_the_leading_ones_of_the_samples_mean_products_and_v_is_that_along_them(name, way, leading):
    model = make(name, way)
    ids, weights = examples()
    gradients, vectors, v = fitted(model, ids, weights)
    layers = gradients.layers
    each = [autograd(model, i, w)[1] for i, w in zip(ids, weights, strict=True)]
    both = zip(layers, parts_of(layers, vectors), moments_of(layers, v), strict=True)
    for number, (layer, mine, moment) in enumerate(both):
        g = torch.stack([parts[number].float() for parts in each]).view(-1, *mine.shape)
        squares = mine.means(mine.turned(g).square().mean(0))
        torch.testing.assert_close(moment.view(squares.shape), squares, rtol=1e-3, atol=1e-6 * float(squares.max()))
        products = (torch.einsum("nij,nkj->ik", g, g), torch.einsum("nij,nik->jk", g, g))
        for matrix, product in zip(mine.matrices, products, strict=True):
            if len(layer.shape) == 2 and len(product) > 1:
                kept = matrix[:, : min(eigenbases.LEADING, len(product))]
                torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1]), rtol=0, atol=1e-5)
                best = torch.linalg.eigvalsh(product.double()).flip(0)[: kept.shape[1]]
                found = (kept * (product @ kept)).sum(0).double()
                torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5 * float(best[0]))


def test_eigenvectors_of_a_long_side_come_from_a_sketch_and_hold_nearly_what_the_best_hold(monkeypatch):
    monkeypatch.setattr(eigenbases, "LEADING", 8)
    monkeypatch.setattr(eigenbases, "_COLUMNS", 24)
    draw = torch.Generator().manual_seed(1)
    strengths = torch.linspace(0, 6, 200).neg().exp()
    g = torch.randn(40, 200, 5, generator=draw) * strengths[:, None]
    random = torch.randn(200, 24, generator=draw)
    U = eigenbases.leading_eigenvectors(eigenbases.times_its_transpose(g, random), 8, random)[0].float()
    product = torch.einsum("nij,nkj->ik", g, g)
    torch.testing.assert_close(U.T @ U, torch.eye(8), rtol=0, atol=1e-5)
    assert float((U * (product @ U)).sum()) > 0.95 * float(torch.linalg.eigvalsh(product)[-8:].sum())


@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_rapidgrads_are_the_compressed_oracle_and_heat_maps_average_to_it(way, normalize, leading):
    model = make("llama", way)
    ids, weights = examples()
    _, vectors, v = fitted(model, ids, weights)
    hold(model, ids, weights, vectors, v, normalize)


def hold(model, ids, weights, vectors, v, normalize, keep=eigenbases.leading):
    """Rows and heat-maps of a preconditioner beside the oracle's."""
    gradients = PerExampleGradients(model)
    layers = gradients.layers
    compressor = Compressor(
        gradients,
        Sketch(sum(layer.size for layer in layers), SketchConfig(K=1024)),
        normalize=normalize,
        preconditioner=Eigenbasis(layers, Eigenbasis.factors_of(v, layers), vectors),
    )
    everything = Batch.of(ids, weights)
    whole_rows = [oracle(model, i, w, layers, vectors, v, normalize, keep) for i, w in zip(ids, weights, strict=True)]
    found = compressor(everything)
    truth = compressor.sketch.compress(torch.stack(whole_rows))
    assert ((found.rows - truth).norm(dim=1) <= 1e-4 * truth.norm(dim=1)).all()
    direction = compressor.direction(Batch.of(ids[:1], weights[:1]))
    for row, scores in enumerate(shares(TokenScores(model), compressor, direction, everything, found.norms)):
        exact = float(torch.dot(whole_rows[0], whole_rows[row]))
        assert float(scores.mean()) == pytest.approx(
            exact, abs=1e-4 * float(whole_rows[0].norm() * whole_rows[row].norm())
        )


@pytest.mark.parametrize("longest", [4096, 50])
def test_an_index_of_an_earlier_version_holds_all_eigenvectors_and_v_entry_by_entry(longest, monkeypatch):
    monkeypatch.setattr(eigenbases, "LEADING", 4)
    monkeypatch.setattr(eigenbases, "_LONGEST_WHOLE", longest)
    model = make("llama", "full")
    layers, ids_and_weights = layers_of(model), examples()
    size = sum(layer.size for layer in layers)
    assert any(side > 50 for layer in layers for side in layer.shape)
    assert eigenbases.moment_entries(layers, eigenbases.whole) == size
    assert {eigenbases.whole(side) for side in (1, longest, longest + 1)} == {0, longest}
    draw = torch.Generator().manual_seed(0)
    sides = [side for layer in layers for side in eigenbases.sides_of(layer, eigenbases.whole) if side.kept]
    turned = [torch.linalg.qr(torch.randn(side.length, side.length, generator=draw)).Q.flatten() for side in sides]
    hold(model, *ids_and_weights, torch.cat(turned), torch.rand(size, generator=draw), "unit", keep=eigenbases.whole)


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


@pytest.mark.parametrize("room", [0, 2**30])
def test_a_sample_is_computed_once_where_its_gradients_can_be_kept_and_gives_the_same_either_way(monkeypatch, room):
    monkeypatch.setattr(second_moment, "KEPT_BYTES", room)
    model = make("llama", "lora")
    gradients, computed = PerExampleGradients(model), []
    once = PerExampleGradients.__call__
    monkeypatch.setattr(
        PerExampleGradients, "__call__", lambda self, *given, **more: computed.append(1) or once(self, *given, **more)
    )
    ids, weights = examples()
    sample = [Batch.of(ids[:2], weights[:2]), Batch.of(ids[2:], weights[2:])]
    v, vectors = Eigenbasis.estimate(gradients, sample, 0, lambda batches, _: batches)
    assert len(computed) == (2 if room else 4)
    assert Eigenbasis.sample_bytes(gradients.layers, 4) >= (4 * 4 * len(v) if room else 1)
    of_own_pass = [drawn(model, *one, 0, number) for number, one in enumerate(zip(ids, weights, strict=True))]
    batches = [
        replace(Batch.of([one], [root]), labels=labels[None])
        for one, (labels, root) in zip(ids, of_own_pass, strict=True)
    ]
    bases = Eigenbases(gradients.layers, vectors)
    sizes = eigenbases.moment_sizes(gradients.layers)
    torch.testing.assert_close(v, mean_over_sample(gradients, batches, bases.squares, sizes))
