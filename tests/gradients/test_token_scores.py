import pytest
import torch

from rapidindex.config import ModelConfig, SketchConfig
from rapidindex.gradients.losses import Batch, trainable
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.second_moment import Diagonal, correction, estimate_second_moment
from rapidindex.gradients.sketch import Sketch
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.model.model import load
from tests import tiny
from tests.oracles import LENGTHS, autograd, examples, make, oracle


def token_by_token(model, ids, weights, direction):
    """One backward pass for each token's own loss."""
    scores = []
    for position in weights.nonzero()[0]:
        alone = weights * 0
        alone[position] = 1.0
        parts = autograd(model, ids, alone)[1]
        scores.append(float(torch.dot(torch.cat([p.flatten().float() for p in parts]), direction)))
    return torch.tensor(scores)


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_scores_equal_a_backward_pass_for_every_token(name, way):
    model = make(name, way)
    size = sum(p.numel() for p in trainable(model).values())
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1)) / size**0.5
    ids, weights = examples()
    scorer = TokenScores(model)
    found = scorer(Batch.of(ids, weights), direction)
    assert scorer.method == "forward-mode"
    for row, scores in enumerate(found):
        truth = token_by_token(model, ids[row], weights[row], direction)
        assert len(scores) == LENGTHS[row][1]
        assert (scores - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_shares_average_to_the_uncompressed_influence(way, normalize, corrected):
    model = make("llama", way)
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    v = estimate_second_moment(gradients, [Batch.of(ids, weights)]) if corrected else None
    sketch = Sketch(sum(layer.size for layer in gradients.layers), SketchConfig(K=256))
    compressor = Compressor(
        gradients,
        sketch,
        normalize=normalize,
        preconditioner=Diagonal(gradients.layers, correction(v)) if corrected else None,
    )
    query = Batch.of(ids[:1], weights[:1])
    everything = Batch.of(ids, weights)
    stored = compressor(everything).norms
    found = shares(TokenScores(model), compressor, compressor.direction(query), everything, stored)
    asked = oracle(model, ids[0], weights[0], v, normalize)
    for row, scores in enumerate(found):
        trained = oracle(model, ids[row], weights[row], v, normalize)
        truth, size = float(torch.dot(asked, trained)), float(asked.norm() * trained.norm())
        assert float(scores.mean()) == pytest.approx(truth, abs=2e-5 * size)


class OneWay(torch.autograd.Function):
    """The identity, with a backward rule and no forward-mode rule, as a kernel of somebody's might be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta


def check_against_backward(model, method, limit):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    size = sum(p.numel() for p in trainable(model).values())
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1))
    ids, weights = examples()
    scorer = TokenScores(model)
    found = scorer(Batch.of(ids, weights), direction)
    assert scorer.method == method
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for row, scores in enumerate(found):
        truth = token_by_token(model, ids[row], weights[row], direction)
        assert (scores - truth).norm() <= limit * truth.norm()


def test_a_central_difference_stands_in_where_there_is_no_forward_mode():
    model = make("llama", "lora")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: OneWay.apply(output))
    check_against_backward(model, "central difference", 5e-3)


@pytest.mark.parametrize(("quantize", "method"), [("4bit", "central difference"), ("8bit", "backward per token")])
def test_a_quantized_base_has_heat_maps(tmp_path, quantize, method):
    base, adapter = tiny.save_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    check_against_backward(load(ModelConfig(str(base), str(adapter), quantize=quantize)).model, method, 1e-2)


class Dropping(torch.autograd.Function):
    """The identity, whose forward-mode rule silently loses a tenth of the derivative."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, delta):
        return delta

    @staticmethod
    def jvp(ctx, tangent):
        return 0.9 * tangent


def test_a_forward_mode_that_loses_a_part_is_found_out():
    model = make("llama", "lora")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: Dropping.apply(output))
    check_against_backward(model, "central difference", 5e-3)


def test_a_zero_direction_gives_zeros():
    model = make("llama", "lora")
    size = sum(p.numel() for p in trainable(model).values())
    found = TokenScores(model)(Batch.of(*examples()), torch.zeros(size))
    assert [len(scores) for scores in found] == [g for _, g in LENGTHS]
    assert not any(scores.any() for scores in found)
