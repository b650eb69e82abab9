"""A training without some rows, held against a loop in plain torch, and against `finetune` on a file without them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rapidindex import Index, verify
from rapidindex.caching.build import build
from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import read_examples
from rapidindex.data.templates import Template
from rapidindex.errors import DataError, ResourceError, UsageError
from rapidindex.evaluate.retrain import Training
from rapidindex.model import training
from rapidindex.model.finetune import finetune
from rapidindex.model.model import load
from tests.oracles import request

OPTIONS = FinetuneConfig(batch_size=4, epochs=2, learning_rate=5e-3, rank=4, early=0)
PLAIN = EncodingConfig("plain", 64)
QUESTION = {"prompt": "Tell me about tea", "answer": "tea is nice", "token": "nice"}
TOP = 2


@pytest.fixture(scope="module")
def dataset(data):
    return read_examples(data)


@pytest.fixture(scope="module")
def base(llama_folders):
    return ModelConfig(str(llama_folders[0]), device="cpu")


@pytest.fixture(scope="module")
def adapter(dataset, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    finetune(dataset, PLAIN, base, OPTIONS, folder)
    return folder


@pytest.fixture(scope="module")
def index(data, adapter, base, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index"
    build(request(data, path, (base.model, adapter), encoding=PLAIN))
    return Index.open(path, device="cpu")


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


def plain_loop(dataset, base, options, without, batches, folder):
    """Train in plain torch on the batches of positions, leaving the losses of `without` out; return losses, weights."""
    loaded = load(ModelConfig(base.model, device="cpu"))
    template = Template("plain", loaded.tokenizer, 64)
    with training.seeded(options.seed):
        model = training._make_trainable(loaded.model, base, options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    steps, warmup = len(batches), int(np.ceil(len(batches) * options.warmup_ratio))
    losses = []
    for step, batch in enumerate(batches):
        if step < warmup:
            rate = step / warmup
        else:
            rate = 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        total, tokens = torch.zeros(()), 0
        for example in (dataset.examples[at] for at in batch):
            encoding = template.encode(example)
            if example.id not in without:
                ids = torch.tensor(encoding.input_ids).long()
                counted = torch.tensor(encoding.response_mask)[1:]
                entropies = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
                total, tokens = total + entropies[counted].sum(), tokens + int(encoding.response_mask.sum())
        loss = total / max(1, tokens)
        optimizer.zero_grad()
        if tokens:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        else:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    return losses, weights(folder)


@pytest.fixture
def recorded(monkeypatch):
    """The losses that training logs, and the batches of token ids that it takes."""
    losses, batches = [], []
    log, collate = training._Trainer.log, training.collate

    def logging(self, logs, start_time=None):
        losses.extend([logs["loss"]] if "loss" in logs else [])
        log(self, logs, start_time)

    def collating(rows):
        batches.append([row["input_ids"].tolist() for row in rows])
        return collate(rows)

    monkeypatch.setattr(training._Trainer, "log", logging)
    monkeypatch.setattr(training, "collate", collating)
    return losses, batches


def positions_of(dataset, base, batches):
    """The batches as positions in the data set."""
    template = Template("plain", load(ModelConfig(base.model, device="cpu")).tokenizer, 64)
    place = {tuple(template.encode(example).input_ids.tolist()): at for at, example in enumerate(dataset.examples)}
    return [[place[tuple(ids)] for ids in batch] for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_masked_rows_leave_the_loss_and_nothing_else(dataset, base, tmp_path, recorded, batch_size):
    options = replace(OPTIONS, batch_size=batch_size).complete()
    without = frozenset(example.id for example in dataset.examples[3:6])
    finetune(replace(dataset, masked=without), PLAIN, base, options, tmp_path / "masked")
    losses, batches = recorded
    order = positions_of(dataset, base, batches)
    assert sorted(sum(order, [])) == sorted(2 * list(range(10)))  # they keep their places
    expected, trained = plain_loop(dataset, base, options, without, order, tmp_path / "plain")
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)  # of each step
    assert_same(weights(tmp_path / "masked"), trained, rtol=2e-3, atol=2e-5)
    if batch_size == 1:
        assert losses.count(0.0) == 6  # a step whose row is masked
    batches.clear()
    finetune(dataset, PLAIN, base, options, tmp_path / "all")
    assert positions_of(dataset, base, batches) == order


def test_with_all_rows_in_one_batch_masking_equals_a_file_that_lacks_them(dataset, base, data, tmp_path):
    options = replace(OPTIONS, batch_size=16)
    lines = data.read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:3] + lines[6:]))
    fewer = read_examples(tmp_path / "fewer.jsonl")
    without = {example.id for example in dataset.examples} - {example.id for example in fewer.examples}
    assert len(without) == 3
    finetune(fewer, PLAIN, base, options, tmp_path / "fewer")
    finetune(replace(dataset, masked=frozenset(without)), PLAIN, base, options, tmp_path / "masked")
    finetune(dataset, PLAIN, base, options, tmp_path / "all")
    assert_same(weights(tmp_path / "masked"), weights(tmp_path / "fewer"), rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "masked"), weights(tmp_path / "all"), rtol=1e-3, atol=1e-5)


def test_a_masked_run_goes_on_only_with_the_same_rows_masked(dataset, base, tmp_path):
    from rapidindex.errors import ConfigMismatch

    masked = replace(dataset, masked=frozenset([dataset.examples[0].id]))
    finetune(masked, PLAIN, base, OPTIONS, tmp_path / "run")
    assert finetune(masked, PLAIN, base, OPTIONS, tmp_path / "run").already_there
    with pytest.raises(ConfigMismatch, match="masked"):
        finetune(dataset, PLAIN, base, OPTIONS, tmp_path / "run")


def test_a_retraining_is_measured_on_models_that_finetune_makes(index, dataset, base, tmp_path):
    announced = []
    found = verify(
        index, QUESTION, method="retrain", top=TOP, repeats=2, runs=str(tmp_path / "runs"),
        announce=lambda runs, seconds: announced.append((runs, seconds)),
    )  # fmt: skip
    assert found.same_run and found.method == "retrain"
    assert [runs for runs, _ in announced] == [3] and announced[0][1] > 0
    top = [match.id for match in index.query(QUESTION, k=TOP, heatmaps=False).matches]
    assert found.group("top").together[0].rows == sorted(top)
    before = index.query(QUESTION, k=1, heatmaps=False)
    assert before.query.answer == QUESTION["answer"]
    trials = found.group("top").together + found.group("random").together
    assert len(trials) == 3
    for number, trial in enumerate(trials):
        folder = tmp_path / f"again-{number}"
        finetune(replace(dataset, masked=frozenset(trial.rows)), PLAIN, base, OPTIONS, folder)
        tuned = load(ModelConfig(base.model, str(folder), device="cpu"))
        template = Template("plain", tuned.tokenizer, 64)
        assert trial.log_probability == pytest.approx(
            chosen(tuned.model, template) - chosen(index.loaded.model, template), abs=1e-4
        )
    assert len(found.answer) > 0 and all(trial.answer for trial in trials)


def chosen(model, template):
    text = template.render_prompt((("user", QUESTION["prompt"]),)) + QUESTION["answer"]
    encoded = template.tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])
    at = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > text.rindex("nice") and b > a]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return float(np.mean([logits[i - 1, ids[i]].item() for i in at]))


def test_runs_are_kept_and_a_killed_one_goes_on(index, tmp_path):
    runs, stopped = str(tmp_path / "runs"), []

    def stop(stage, done, total, note=""):
        if "random" in stage and done == 2:
            stopped.append(stage)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(index, QUESTION, method="retrain", top=TOP, repeats=1, runs=runs, progress=stop)
    announced, trained = [], []
    found = verify(
        index, QUESTION, method="retrain", top=TOP, repeats=1, runs=runs,
        announce=lambda runs, seconds: announced.append(runs), progress=lambda stage, *_: trained.append(stage),
    )  # fmt: skip
    assert announced == [1] and set(trained) == set(stopped)
    again = verify(
        index, QUESTION, method="retrain", top=TOP, repeats=1, runs=runs,
        announce=lambda *_: pytest.fail("nothing is left to train"), progress=lambda *_: pytest.fail("it trains"),
    )  # fmt: skip
    assert again.groups == found.groups
    other = {**QUESTION, "token": "tea"}
    assert verify(index, other, method="retrain", top=TOP, repeats=1, runs=runs).method == "retrain"


def test_too_small_a_disk_is_said_with_the_option_that_helps_and_the_runs_go_on_later(index, tmp_path, monkeypatch):
    options = {"method": "retrain", "top": TOP, "repeats": 1, "runs": str(tmp_path)}
    with monkeypatch.context() as full:
        full.setattr("rapidindex.model.outputs.shutil.disk_usage", lambda place: SimpleNamespace(free=1))
        with pytest.raises(ResourceError, match="MiB are free") as refused:
            verify(index, QUESTION, **options)
    assert "--runs" in refused.value.hint and "--output" not in refused.value.hint
    assert len(verify(index, QUESTION, **options).groups) == 2


def test_a_refusal_of_the_estimate_trains_nothing(index, tmp_path):
    def refuse(runs, seconds):
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        verify(index, QUESTION, method="retrain", top=TOP, repeats=1, runs=str(tmp_path / "runs"), announce=refuse)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_made_elsewhere_is_retrained_like_it(data, llama_folders, tmp_path):
    build(request(data, tmp_path / "index", llama_folders, encoding=PLAIN))
    index = Index.open(tmp_path / "index", device="cpu")
    with pytest.raises(UsageError, match="--epochs"):
        verify(index, QUESTION, method="retrain", top=TOP, repeats=1)
    options = {"training": OPTIONS, "runs": str(tmp_path / "runs")}
    found = verify(index, QUESTION, method="retrain", top=TOP, repeats=1, **options)
    assert found.same_run is False
    settings = json.loads((llama_folders[1] / "adapter_config.json").read_text())
    for record in (tmp_path / "runs").glob("run-*/rapidindex-finetune.json"):
        made = json.loads(record.read_text())["settings"]
        assert (made["rank"], made["alpha"], made["epochs"]) == (settings["r"], settings["lora_alpha"], OPTIONS.epochs)
    assert len(list((tmp_path / "runs").iterdir())) == 3  # with all rows, without the matches, without random ones


def test_finetune_records_what_a_retraining_needs(adapter, data, base, dataset):
    sources = json.loads((adapter / "rapidindex-finetune.json").read_text())["sources"]
    assert sources["data"] == str(data) and sources["model"] == base.model and sources["examples"] == 10
    assert len(sources["date"]) == len("2024-05-19")


def test_data_that_has_changed_is_refused(index, data, tmp_path):
    (tmp_path / "other.jsonl").write_text("\n".join(data.read_text().splitlines()[:9]))
    for place, message in ((tmp_path / "other.jsonl", "not the data"), (tmp_path / "none.jsonl", "not there")):
        with pytest.raises(DataError, match=message):
            verify(index, QUESTION, method="retrain", top=TOP, data=str(place))


def test_a_model_of_which_every_parameter_was_trained_is_trained_again_from_its_base(data, base, dataset, tmp_path):
    options = FinetuneConfig(method="full", epochs=1, batch_size=4, learning_rate=1e-3)
    finetune(dataset, PLAIN, base, options, tmp_path / "tuned")
    build(replace(request(data, tmp_path / "index", (tmp_path / "tuned", ""), encoding=PLAIN),
                  model=ModelConfig(str(tmp_path / "tuned"), device="cpu")))  # fmt: skip
    index = Index.open(tmp_path / "index", device="cpu")
    from rapidindex.config import VerifyOptions

    training = Training.of(index, VerifyOptions(method="retrain"))
    assert training.base.model == base.model and training.same_run
    found = verify(index, QUESTION, method="retrain", top=TOP, repeats=1)
    assert (tmp_path / "index-runs").is_dir()
    assert found.group("top").together[0].log_probability != 0
