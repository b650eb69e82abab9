"""A verification, held against a step that is written out in plain torch."""

import copy

import numpy as np
import pytest
import torch

from rapidindex import Index, Verification, VerifyOptions, verify
from rapidindex.caching.build import build
from rapidindex.errors import DataError, ModelError, UsageError
from rapidindex.gradients.losses import trainable
from tests.oracles import ANSWER, PROMPT, autograd, request

TOKEN, TOP, DRAWS = "Japan", 3, 4


@pytest.fixture(scope="module")
def index(data, tmp_path_factory, llama_folders):
    path = tmp_path_factory.mktemp("index") / "index"
    build(request(data, path, llama_folders))
    return Index.open(path)


@pytest.fixture(scope="module")
def question(index):
    (encoded,) = index.encode([{"prompt": PROMPT, "answer": ANSWER, "token": TOKEN}])
    return encoded


@pytest.fixture(scope="module")
def found(index, question):
    return verify(index, question, top=TOP, draws=DRAWS)


def example_of(index, id):
    """Token ids and weights of an indexed example, from its stored record."""
    from rapidindex.data.examples import Example

    rows = index.rows_of("sentence")
    encoding = index.template.encode(Example.from_record(rows.record(rows.ids.index(id))))
    return encoding.input_ids, encoding.response_mask / encoding.response_mask.sum()


def log_probability(model, question):
    """The mean log-probability of the chosen tokens, from the logits of the whole text."""
    ids = torch.tensor(question.encoding.input_ids).long()
    places = np.flatnonzero(question.encoding.response_mask)[question.info.selection]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return float(np.mean([logits[at - 1, ids[at]].item() for at in places]))


def stepped(index, question, ids, rate, make=None):
    """Plain torch: copy the model, sum the rows' gradients, step, and read the logits. Returns the change in nats."""
    model = copy.deepcopy(index.loaded.model)
    before = log_probability(model, question)
    rows = [autograd(model, *example_of(index, id))[1] for id in ids]
    with torch.no_grad():
        for number, parameter in enumerate(trainable(model).values()):
            gradient = sum(row[number] for row in rows)
            parameter -= rate * (gradient if make is None else make(number, gradient))
    return log_probability(model, question) - before


def close(value):
    return pytest.approx(value, rel=2e-3, abs=2e-6)


def trials(found):
    return [trial for group in found.groups if group.name != "unlearned" for trial in (*group.alone, *group.together)]


def test_each_step_is_that_of_plain_torch(index, question, found):
    assert found.log_probability == pytest.approx(log_probability(index.loaded.model, question), abs=1e-6)
    assert len(trials(found)) == 4 * (TOP + 1) + 2 * DRAWS
    for trial in trials(found):
        assert trial.log_probability == close(stepped(index, question, trial.rows, found.learning_rate))
    [unlearned] = found.group("unlearned").together
    assert unlearned.log_probability == close(stepped(index, question, unlearned.rows, -found.learning_rate))


def test_the_change_of_probability_is_in_points(found):
    before = np.exp(found.log_probability)
    assert found.probability == pytest.approx(before)
    for trial in trials(found):
        after = np.exp(found.log_probability + trial.log_probability)
        assert trial.probability == pytest.approx(100 * (after - before), abs=1e-6)


def test_the_prediction_is_the_product_of_two_gradients(index, question, found):
    weights = np.zeros(len(question.encoding.input_ids))
    chosen = np.flatnonzero(question.encoding.response_mask)[question.info.selection]
    weights[chosen] = 1 / len(chosen)
    own = autograd(index.loaded.model, question.encoding.input_ids, weights)[1]
    for trial in found.group("top").alone:
        row = autograd(index.loaded.model, *example_of(index, trial.rows[0]))[1]
        product = sum(float((a * b).sum()) for a, b in zip(own, row, strict=True))
        assert trial.predicted == close(found.learning_rate * product)


def test_small_steps_do_what_is_predicted(index, question, found):
    small = verify(index, question, top=TOP, draws=DRAWS, learning_rate=found.learning_rate / 1000)
    assert small.prediction_correlation > 0.999
    for trial in trials(small):
        assert trial.log_probability == pytest.approx(trial.predicted, rel=0.05, abs=5e-6)


def test_the_default_rate_lowers_a_random_rows_own_loss_by_a_tenth_of_a_nat(index, found):
    lowered = []
    for trial in found.group("random").alone:
        row = autograd(index.loaded.model, *example_of(index, trial.rows[0]))[1]
        lowered.append(found.learning_rate * sum(float((part**2).sum()) for part in row))
    assert np.mean(lowered) == pytest.approx(0.1, rel=1e-3)


def test_the_groups_are_what_their_names_say(index, question, found):
    scores = {match.id: match.score for match in index.query(question, k=10, heatmaps=False).matches}
    order = sorted(scores, key=scores.get)
    by_name = {group.name: [trial.rows[0] for trial in group.alone] for group in found.groups}
    assert by_name["top"] == order[: -TOP - 1 : -1] and by_name["opponents"] == order[:TOP]
    assert by_name["least"] == sorted(scores, key=lambda id: abs(scores[id]))[:TOP]
    assert len(by_name["bm25"]) == TOP
    for draw in found.group("random").together:
        assert len(set(draw.rows)) == TOP and not set(draw.rows) & set(by_name["top"])
    for trial in found.group("top").alone:
        assert trial.score == pytest.approx(scores[trial.rows[0]], abs=1e-5)


def test_the_calibration_is_that_of_the_rows_tried_alone(found):
    rows = {trial.rows[0]: trial for group in found.groups for trial in group.alone}.values()
    scores, nats = np.array([trial.score for trial in rows]), np.array([trial.log_probability for trial in rows])
    assert found.score_correlation == pytest.approx(np.corrcoef(scores, nats)[0, 1])
    assert found.nats_per_score == pytest.approx(np.linalg.lstsq(scores[:, None], nats, rcond=None)[0][0])


def test_adamw_without_a_state_is_torchs_own_first_step(index, question):
    found = verify(index, question, top=2, draws=2, optimizer="adamw")
    assert found.optimizer == "AdamW without a state"
    for trial in trials(found):
        expected = stepped(index, question, trial.rows, found.learning_rate, lambda _, g: g / (g.abs() + 1e-8))
        assert trial.log_probability == pytest.approx(expected, rel=0.02, abs=1e-5)  # rounding decides signs


def test_adamw_takes_the_second_moment_of_the_checkpoint(data, llama_folders, tmp_path, question):
    from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig
    from rapidindex.data.examples import read_examples
    from rapidindex.gradients.losses import layers_of
    from rapidindex.gradients.second_moment import read_second_moment
    from rapidindex.model.finetune import finetune

    training = FinetuneConfig(epochs=1, rank=4, early=0, save_optimizer=True)
    base = ModelConfig(str(llama_folders[0]))
    finetune(read_examples(data), EncodingConfig(), base, training, tmp_path / "adapter")
    build(request(data, tmp_path / "index", (llama_folders[0], tmp_path / "adapter")))
    index = Index.open(tmp_path / "index")
    found = verify(index, {"prompt": PROMPT, "answer": ANSWER, "token": TOKEN}, top=2, draws=2, optimizer="adamw")
    assert found.optimizer == "AdamW with the checkpoint's second moment"
    model = index.loaded.model
    v = read_second_moment(tmp_path / "adapter", model, layers_of(model))
    parts = v.split([parameter.numel() for parameter in trainable(model).values()])

    def update(number, gradient):
        part = parts[number].view_as(gradient)
        return 0.1 * gradient / ((0.999 * part + 0.001 * gradient**2).sqrt() + 1e-8)

    for trial in trials(found):
        assert trial.log_probability == close(stepped(index, question, trial.rows, found.learning_rate, update))


class Interrupt:
    """A progress that interrupts after so many steps."""

    def __init__(self, steps, error=KeyboardInterrupt):
        self.steps, self.error = steps, error

    def __call__(self, stage, done, total, note=""):
        if done == self.steps:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_weights_are_put_back_bit_by_bit_whatever_happens(index, question, error, monkeypatch):
    from rapidindex.evaluate import steps

    before = [parameter.detach().clone() for parameter in index.loaded.model.parameters()]
    with pytest.raises(error):
        verify(index, question, top=TOP, draws=DRAWS, progress=Interrupt(5, error))
    measured, calls = steps.example_losses, []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) > 12 and not torch.is_grad_enabled():  # the weights are those after a step
            assert any(map(lambda a, b: not torch.equal(a, b), before, model.parameters()))
            raise error
        return measured(model, batch)

    monkeypatch.setattr(steps, "example_losses", interrupted)
    with pytest.raises(error):
        verify(index, question, top=TOP, draws=DRAWS)
    assert all(map(torch.equal, before, index.loaded.model.parameters()))
    assert all(parameter.grad is None for parameter in index.loaded.model.parameters())


def test_a_model_that_somebody_else_changes_is_refused(index, question):
    weight = next(iter(trainable(index.loaded.model).values()))
    kept = weight.detach().clone()

    def disturb(stage, done, total, note=""):
        with torch.no_grad():
            weight.add_(1e-3)

    with pytest.raises(ModelError, match="something else changes them"):
        verify(index, question, top=TOP, draws=DRAWS, progress=disturb)
    with torch.no_grad():
        weight.copy_(kept)


def test_a_step_that_is_too_long_is_an_error_and_leaves_the_weights(index, question):
    before = [parameter.detach().clone() for parameter in index.loaded.model.parameters()]
    with pytest.raises(ModelError, match="--learning-rate"):
        verify(index, question, top=TOP, draws=DRAWS, learning_rate=1e30)
    assert all(map(torch.equal, before, index.loaded.model.parameters()))


def test_too_few_examples_for_controls_are_refused(index, question):
    with pytest.raises(UsageError, match="--top 5"):
        verify(index, question, top=6)


@pytest.mark.parametrize(
    "options", [{"method": "guess"}, {"optimizer": "lion"}, {"top": 0}, {"draws": 0}, {"learning_rate": -1.0}]
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(UsageError):
        VerifyOptions(**options)


def test_json_gives_the_same_verification_back(found):
    assert Verification.from_json(found.to_json()) == found
    with pytest.raises(DataError):
        Verification.from_json("{}")


def test_the_same_seed_draws_the_same_rows_and_another_one_others(index, question, found):
    again = verify(index, question, top=TOP, draws=DRAWS)
    assert trials(again) == trials(found)
    other = verify(index, question, top=TOP, draws=DRAWS, seed=1)
    assert [t.rows for t in other.group("random").together] != [t.rows for t in found.group("random").together]
