import numpy as np
import pytest
import torch

from rapidindex.gradients.losses import Batch, example_losses, layers_of, weighted_token_losses
from rapidindex.gradients.per_example import TOLERANCE, PerExampleGradients
from tests import tiny
from tests.gradients.zoo import assert_draws
from tests.oracles import LENGTHS, autograd, collected, examples, make

# Relative error of the whole gradient, and of each layer that has one.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_batched_gradients_equal_an_autograd_loop(name, way, dtype):
    model = make(name, way, dtype)
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    losses, ours = collected(gradients, Batch.of(ids, weights))
    assert gradients.batched, gradients.unbatched
    for row in range(len(ids)):
        loss, truth = autograd(model, ids[row], weights[row])
        flat = torch.cat([part.flatten().float() for part in truth])
        assert losses[row] == pytest.approx(float(loss), rel=LIMIT[dtype])
        assert (ours[row] - flat).norm() <= LIMIT[dtype] * flat.norm()


@pytest.mark.parametrize("way", ["lora", "full"])
def test_rows_do_not_depend_on_the_rest_of_the_batch_or_its_padding(way):
    gradients = PerExampleGradients(make("qwen3", way))
    ids, weights = examples()
    _, together = collected(gradients, Batch.of(ids, weights))
    long_ids, long_weights = examples([(30, 20)], seed=5)
    _, padded = collected(gradients, Batch.of([*long_ids, ids[0]], [*long_weights, weights[0]]))
    _, alone = collected(gradients, Batch.of(ids[:1], weights[:1]))
    for other in (padded[1], alone[0]):
        assert (together[0] - other).norm() <= 1e-5 * other.norm()


def test_selected_tokens_alone_carry_the_loss():
    model = make("llama", "lora")
    ids, weights = examples()
    for weight, (prompt, _) in zip(weights, LENGTHS, strict=True):
        weight[prompt + 1 :] = 0.0
        weight[prompt] = 1.0
    _, ours = collected(PerExampleGradients(model), Batch.of(ids, weights))
    for row in range(len(ids)):
        _, truth = autograd(model, ids[row], weights[row])
        flat = torch.cat([part.flatten() for part in truth])
        assert (ours[row] - flat).norm() <= 1e-5 * flat.norm()


def test_a_response_that_starts_at_the_second_token_counts_its_first_token():
    model = make("llama", "full")
    ids, weights = examples([(1, 1), (1, 5)])
    losses, _ = collected(PerExampleGradients(model), Batch.of(ids, weights))
    for row in range(2):
        assert float(losses[row]) == pytest.approx(float(autograd(model, ids[row], weights[row])[0]), rel=1e-5)


def test_layers_cover_every_trainable_parameter_and_tied_ones_once():
    model = make("gpt2", "full")
    layers = layers_of(model)
    assert sum(layer.size for layer in layers) == sum(p.numel() for p in model.parameters())
    assert [layer.start for layer in layers[1:]] == [layer.start + layer.size for layer in layers[:-1]]
    assert "lm_head.weight" not in [layer.name for layer in layers]


def test_parameters_without_a_rule_are_done_one_example_at_a_time():
    model = tiny.with_lora(tiny.make_model("llama"), use_dora=True)
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    _, ours = collected(gradients, Batch.of(ids, weights))
    assert not gradients.batched
    assert any("magnitude" in name for name in gradients.unbatched)
    _, truth = autograd(model, ids[1], weights[1])
    flat = torch.cat([part.flatten() for part in truth])
    assert (ours[1] - flat).norm() <= 1e-5 * flat.norm()


def test_a_model_whose_examples_mix_in_the_batch_is_found_out():
    model = make("llama", "full")

    def mix(module, inputs, output):
        return output + output.mean(0, keepdim=True)

    model.model.norm.register_forward_hook(mix)
    ids, weights = examples()
    gradients = PerExampleGradients(model)
    nothing = [weight * 0 for weight in weights]  # as the loss of tokens that are all but certain
    collected(gradients, Batch.of(ids, nothing))
    assert not gradients.batched
    _, ours = collected(gradients, Batch.of(ids, weights))
    _, truth = autograd(model, ids[2], weights[2])
    flat = torch.cat([part.flatten() for part in truth])
    assert (ours[2] - flat).norm() <= 1e-5 * flat.norm()


def test_the_first_comparison_is_of_the_starts_of_long_examples_of_which_one_is_padded():
    model, seen = make("llama", "lora"), []
    model.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["attention_mask"].sum(1).tolist()), with_kwargs=True
    )
    ids, weights = examples([(60, 30), (5, 20), (70, 10)])
    _, ours = collected(PerExampleGradients(model), Batch.of(ids, weights))
    assert seen == [[25, 64], [25], [64], [90, 25, 80]]
    ids, weights = ([part[row] for row in (0, 2)] for part in (ids, weights))
    seen.clear()
    collected(PerExampleGradients(model), Batch.of(ids, weights))
    assert seen == [[48, 64], [48], [64], [90, 80]]


RARE = 77
"""A token that the first batches lack."""


class Rarely(torch.nn.Module):
    """A part of a model that only `RARE` reaches."""

    def __init__(self, inner, width=32):
        super().__init__()
        self.inner, self.rare = inner, torch.nn.Linear(width, width)
        self.ids = None

    def forward(self, hidden):
        hidden = self.inner(hidden)
        places = self.ids == RARE
        return self.reach(hidden, places) if places.any() else hidden


class ByToken(Rarely):
    def reach(self, hidden, places):
        return hidden.index_put((places,), self.rare(hidden[places]))


class AllTokens(Rarely):
    def reach(self, hidden, places):
        return torch.where(places.unsqueeze(-1), self.rare(hidden), hidden)


class OutsideItsModule(Rarely):
    def reach(self, hidden, places):
        return torch.where(places.unsqueeze(-1), torch.nn.functional.linear(hidden, self.rare.weight), hidden)


class ForwardCalled(Rarely):
    def reach(self, hidden, places):
        return torch.where(places.unsqueeze(-1), self.rare.forward(hidden), hidden)


class MixesExamples(Rarely):
    def reach(self, hidden, places):
        return hidden + self.rare(hidden.mean(0, keepdim=True).expand_as(hidden))


class AlwaysCalled(Rarely):
    """The layer is called in every batch, and has a gradient where the token occurs."""

    def forward(self, hidden):
        hidden = self.inner(hidden)
        return hidden + self.rare(hidden) * (self.ids == RARE).unsqueeze(-1)


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("kind", Rarely.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_layer_that_only_later_batches_reach_is_right(kind, way):
    model = tiny.make_model("llama")
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp)
        torch.nn.init.normal_(layer.mlp.rare.weight, std=0.3)
    if way == "lora":
        model = tiny.with_lora(model, ["q_proj", "rare"])

    def tell(module, inputs, options):
        for part in model.modules():
            if isinstance(part, Rarely):
                part.ids = options["input_ids"]

    model.register_forward_pre_hook(tell, with_kwargs=True)
    gradients = PerExampleGradients(model)
    ids, weights = examples()
    for tokens in ids:
        tokens[tokens == RARE] = 5
    collected(gradients, Batch.of(ids, weights))
    assert gradients.batched
    ids[1][[4, 5, 6, 9]] = RARE  # as many as there are examples
    for _ in range(2):
        _, ours = collected(gradients, Batch.of(ids, weights))
        for row in range(len(ids)):
            _, truth = autograd(model, ids[row], weights[row])
            flat = torch.cat([part.flatten() for part in truth])
            assert (ours[row] - flat).norm() <= 1e-4 * flat.norm()
    through_modules = way == "lora" and kind in (OutsideItsModule, ForwardCalled)  # the adapter's, or no use of it
    assert gradients.batched == (kind in (AllTokens, AlwaysCalled) or through_modules)


def test_the_model_is_left_as_it_was():
    model = make("gemma3", "full")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    collected(PerExampleGradients(model), Batch.of(*examples()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_table_of_tolerances_covers_every_dtype_a_model_may_compute_in():
    assert set(TOLERANCE) == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_labels_drawn_in_a_pass_and_its_gradients_are_those_of_a_pass_of_their_own(name, way):
    gradients = PerExampleGradients(make(name, way))
    assert_draws(gradients, *examples())
    assert gradients.batched


@pytest.mark.parametrize("headless", [False, True])
def test_labels_are_drawn_where_examples_are_computed_one_by_one_and_where_no_output_layer_is_known(
    headless, monkeypatch
):
    model = tiny.make_model("llama") if headless else tiny.with_lora(tiny.make_model("llama"), use_dora=True)
    if headless:
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    gradients = PerExampleGradients(model)
    assert_draws(gradients, *examples())
    assert gradients.batched == headless


def test_labels_are_drawn_once_and_shared_by_a_batch_and_its_examples():
    model = make("llama", "lora")
    ids, weights = examples()
    batch = Batch.of(ids, weights).with_drawn_labels(5)
    alone = batch.example(2)
    example_losses(model, alone)
    first = alone.labels.clone()
    assert (batch.labels[:2] < 0).any()
    example_losses(model, batch)
    all_of_them = batch.labels.clone()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    example_losses(model, batch)
    assert torch.equal(batch.labels, all_of_them) and torch.equal(alone.labels, first) and (first >= 0).all()
    assert torch.equal(batch.labels[2, : len(ids[2])], first[0])
    again, other = (Batch.of(ids, weights).with_drawn_labels(seed) for seed in (5, 6))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    for each in (again, other):
        example_losses(model, each)
    assert torch.equal(again.labels, all_of_them) and not torch.equal(other.labels, all_of_them)


def test_an_example_draws_the_same_labels_whatever_is_batched_with_it():
    model = make("llama", "full")
    ids, weights = examples()
    weights = [np.array([0, *[1] * (len(each) - 1)]) for each in ids[:-1]] + list(weights[-1:])  # token 1 counts, too
    together = Batch.of(ids, weights).with_drawn_labels(5)
    example_losses(model, together)
    for row in range(len(ids)):
        alone = Batch.of([ids[row]], [weights[row]]).with_drawn_labels(5, first=row)
        weighted_token_losses(model, alone)  # its logits are of other positions
        assert torch.equal(alone.labels, together.example(row).labels)


def test_labels_are_drawn_as_often_as_the_model_says():
    model = make("llama", "full")
    with torch.no_grad():  # a model that is sure of a few tokens
        model.lm_head.weight.mul_(20)
    ids, weights = examples()
    batch = Batch.of([np.tile(ids[0], 1)] * 50, [weights[0]] * 50)
    place = int(weights[0].nonzero()[0][-1])
    batches = [batch.with_drawn_labels(seed) for seed in range(40)]
    for each in batches:
        example_losses(model, each)
    drawn = torch.cat([each.labels[:, place] for each in batches])
    chances = model(input_ids=batch.input_ids[:1]).logits[0, place - 1].float().softmax(-1)
    often = torch.bincount(drawn, minlength=len(chances)) / len(drawn)
    assert (often - chances).abs().sum() / 2 < 0.15
