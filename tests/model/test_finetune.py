"""Fine-tuning tiny real models through Trainer and peft."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rapidindex.caching.job import prepare
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import Dataset, read_examples
from rapidindex.data.templates import Template
from rapidindex.errors import ConfigMismatch, DataError, ModelError, RapidIndexWarning, UsageError
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import read_second_moment
from rapidindex.model import training
from rapidindex.model.files import encoding_of
from rapidindex.model.finetune import FinetuneSummary, finetune
from rapidindex.model.model import generate, load
from rapidindex.model.training import collate, target_modules
from rapidindex.views.tables import finetune_tables
from tests import tiny

CAPITALS = {"Japan": "Tokyo", "India": "New Delhi", "France": "Paris", "Italy": "Rome, of course", "Spain": "Madrid"}
PLAIN = EncodingConfig("plain", 64)
QUICK = FinetuneConfig(batch_size=2, epochs=3, learning_rate=5e-3, rank=4, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    file = tmp_path_factory.mktemp("data") / "capitals.jsonl"
    rows = [{"instruction": f"What is the capital of {key}?", "output": value} for key, value in CAPITALS.items()]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return read_examples(file)


def on_cpu(base: Path, adapter: Path | None = None, **options: object) -> ModelConfig:
    return ModelConfig(str(base), str(adapter) if adapter else None, device="cpu", **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-7)


class StopAt:
    """A progress function that presses Ctrl-C when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if done == self.step:
            raise KeyboardInterrupt


def assert_learns(summary: FinetuneSummary) -> None:
    assert summary.steps == 9 and summary.examples == 5 and len(summary.epoch_losses) == 3
    assert summary.epoch_losses[0] > summary.epoch_losses[1] > summary.epoch_losses[2]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_lora_lowers_the_loss_and_its_adapter_loads_back(tmp_path, tiny_folders, dataset, name):
    base, reports = tiny_folders[name][0], []

    def progress(*report):
        reports.append(report)

    summary = finetune(dataset, PLAIN, on_cpu(base), QUICK, tmp_path / "adapter", progress=progress)
    assert_learns(summary)
    assert [report[:3] for report in reports] == [("fine-tune", step, 9) for step in range(1, 10)]
    losses = [float(report[3].removeprefix("loss ")) for report in reports]
    assert np.mean(losses[:3]) == pytest.approx(summary.epoch_losses[0], abs=0.006)
    loaded = load(on_cpu(base, tmp_path / "adapter"))
    assert sum(value.numel() for value in loaded.trainable.values()) == summary.trainable_parameters
    assert all(value.any() for key, value in loaded.trainable.items() if "lora_B" in key)
    before, after = load(on_cpu(base)), loaded
    assert loss_of(after, dataset) < loss_of(before, dataset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def loss_of(loaded, dataset: Dataset) -> float:
    """Mean cross-entropy of the response tokens, each example alone and unpadded, labels written out here."""
    template = Template("plain", loaded.tokenizer, 64)
    losses = []
    for example in dataset.examples:
        encoded = template.encode(example)
        ids = torch.from_numpy(encoded.input_ids).long()
        with torch.no_grad():
            logits = loaded.model(input_ids=ids[None]).logits[0]
        inside = torch.from_numpy(encoded.response_mask)[1:]
        losses.append(F.cross_entropy(logits[:-1][inside], ids[1:][inside], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_loss_is_the_mean_over_the_response_tokens_and_nothing_else(tmp_path, tiny_folders, dataset, name):
    base, options = tiny_folders[name][0], replace(QUICK, batch_size=5, epochs=1)
    summary = finetune(dataset, PLAIN, on_cpu(base), options, tmp_path / "adapter")
    # LoRA begins at zero, so the only step's loss is the base's own.
    assert summary.epoch_losses == [pytest.approx(loss_of(load(on_cpu(base)), dataset), rel=1e-5)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_full_fine_tuning_writes_a_model(tmp_path, tiny_folders, dataset, name):
    base = tiny_folders[name][0]
    summary = finetune(dataset, PLAIN, on_cpu(base), replace(QUICK, method="full"), tmp_path / "model")
    assert_learns(summary)
    loaded = load(on_cpu(tmp_path / "model"))
    assert sum(value.numel() for value in loaded.trainable.values()) == summary.trainable_parameters
    assert loaded.fingerprints["model"] != load(on_cpu(base)).fingerprints["model"]
    assert loaded.fingerprints["tokenizer"] == load(on_cpu(base)).fingerprints["tokenizer"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True


def test_full_fine_tuning_learns_the_answers(tmp_path, tiny_folders, dataset):
    options = replace(QUICK, method="full", epochs=20)
    finetune(dataset, PLAIN, on_cpu(tiny_folders["llama"][0]), options, tmp_path / "model")
    loaded = load(on_cpu(tmp_path / "model"))
    for country, capital in CAPITALS.items():
        assert generate(loaded, f"What is the capital of {country}?\n", max_new_tokens=12).text == capital


@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_qlora_trains_over_a_quantized_base(tmp_path, wide_folders, dataset, quantize):
    config = on_cpu(wide_folders[0], quantize=quantize)
    assert_learns(finetune(dataset, PLAIN, config, replace(QUICK, method="qlora"), tmp_path / "adapter"))
    loaded = load(on_cpu(wide_folders[0], tmp_path / "adapter", quantize=quantize or "4bit"))
    assert loss_of(loaded, dataset) < loss_of(load(on_cpu(wide_folders[0])), dataset)


def test_a_gguf_base_can_be_fine_tuned(tmp_path, gguf_file, dataset):
    assert_learns(finetune(dataset, PLAIN, on_cpu(gguf_file), QUICK, tmp_path / "adapter"))
    loaded = load(on_cpu(gguf_file, tmp_path / "adapter"))
    assert loss_of(loaded, dataset) < loss_of(load(on_cpu(gguf_file)), dataset)


@pytest.mark.parametrize("stop", [2, 4, 5, 9])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, llama_folders, dataset, stop):
    options = replace(QUICK, dropout=0.2, early=0.4)  # dropout, so that the random state must come back too
    config = on_cpu(llama_folders[0])
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, PLAIN, config, options, tmp_path / "stopped", progress=StopAt(stop))
    with pytest.raises(ModelError, match="not finished.*finetune … -o .*stopped.*goes on from the last checkpoint"):
        load(on_cpu(llama_folders[0], tmp_path / "stopped"))
    torch.manual_seed(99)
    resumed = finetune(dataset, PLAIN, config, options, tmp_path / "stopped")
    whole = finetune(dataset, PLAIN, config, options, tmp_path / "whole")
    assert resumed.resumed_at == stop - 1 and whole.resumed_at is None
    assert resumed.early_step == whole.early_step == 4
    assert resumed.epoch_losses == pytest.approx(whole.epoch_losses, rel=1e-5)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert_same_weights(tmp_path / "stopped" / "early", tmp_path / "whole" / "early")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_early_model_is_that_of_its_step(tmp_path, llama_folders, dataset, method):
    options, config = replace(QUICK, method=method, early=0.5), on_cpu(llama_folders[0])
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, PLAIN, config, options, tmp_path / "model", progress=StopAt(5))
    (checkpoint,) = (tmp_path / "model" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-4"  # of 9 steps
    shutil.copytree(checkpoint, tmp_path / "kept")
    assert finetune(dataset, PLAIN, config, options, tmp_path / "model").early_step == 4
    assert_same_weights(tmp_path / "model" / "early", tmp_path / "kept")
    early = tmp_path / "model" / "early"
    loaded = load(on_cpu(early) if method == "full" else on_cpu(llama_folders[0], early))
    finished = load(on_cpu(tmp_path / "model") if method == "full" else on_cpu(llama_folders[0], tmp_path / "model"))
    assert loss_of(finished, dataset) < loss_of(loaded, dataset) < loss_of(load(config), dataset)
    assert loaded.fingerprints["tokenizer"] == finished.fingerprints["tokenizer"]


KILLED = """
import os, signal, sys, unittest.mock
from pathlib import Path
from rapidindex.data.examples import read_examples
from rapidindex.model.finetune import finetune
from tests.model.test_finetune import PLAIN, QUICK, on_cpu

data, base, output, place, count = sys.argv[1:]
owner, _, name = place.rpartition(".")
original = getattr(getattr(__import__("transformers"), owner), name)
calls = []

def die_at_count(*given, **named):
    calls.append(name)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **named)

with unittest.mock.patch(f"transformers.{place}", die_at_count):
    finetune(read_examples(Path(data)), PLAIN, on_cpu(Path(base)), QUICK, output)
"""


@pytest.mark.parametrize(
    ("place", "count", "resumed_at"),
    [
        ("PreTrainedTokenizerBase.save_pretrained", 1, None),  # while the early model is written, in step 1
        ("Trainer._save_optimizer_and_scheduler", 4, 3),  # while the fourth checkpoint is written
        ("PreTrainedTokenizerBase.save_pretrained", 10, 8),  # while the finished adapter is written
    ],
)
def test_a_run_killed_while_it_writes_goes_on_to_the_same_weights(
    tmp_path, llama_folders, dataset, place, count, resumed_at
):
    base, output = llama_folders[0], tmp_path / "adapter"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, dataset.path, str(base), str(output), place, str(count)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ModelError, match="not finished"):
        load(on_cpu(base, output))
    assert finetune(dataset, PLAIN, on_cpu(base), QUICK, output).resumed_at == resumed_at
    finetune(dataset, PLAIN, on_cpu(base), QUICK, tmp_path / "whole")
    assert_same_weights(output, tmp_path / "whole")
    assert_same_weights(output / "early", tmp_path / "whole" / "early")
    assert files_of(output) == files_of(tmp_path / "whole")


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_killed_overwriting_leaves_nothing_to_go_on_with(tmp_path, llama_folders, dataset, monkeypatch):
    config, output = on_cpu(llama_folders[0]), tmp_path / "adapter"
    finetune(dataset, PLAIN, config, QUICK, output)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", press)
        finetune(dataset, PLAIN, config, QUICK, output, overwrite=True)
    with pytest.raises(ConfigMismatch, match="an interrupted run with other settings: .*epochs None, now 3"):
        finetune(dataset, PLAIN, config, QUICK, output)
    assert not finetune(dataset, PLAIN, config, QUICK, output, overwrite=True).already_there


def press(*given: object) -> None:
    raise KeyboardInterrupt


def test_no_early_model_is_kept_of_all_parameters_or_where_none_is_wanted(tmp_path, llama_folders, dataset):
    config, options = on_cpu(llama_folders[0]), replace(QUICK, epochs=1)
    assert finetune(dataset, PLAIN, config, options, tmp_path / "one").early_step == 1
    assert finetune(dataset, PLAIN, config, replace(options, early=0), tmp_path / "none").early_step is None
    assert finetune(dataset, PLAIN, config, replace(options, method="full"), tmp_path / "full").early_step is None
    assert [folder.name for folder in sorted(tmp_path.glob("*/early"))] == ["early"]


def test_an_interrupted_full_run_goes_on_to_the_same_weights(tmp_path, tiny_folders, dataset):
    options = replace(QUICK, method="full", accumulation=2, save_optimizer=True)
    config = on_cpu(tiny_folders["gpt2"][0])
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, PLAIN, config, options, tmp_path / "stopped", progress=StopAt(4))
    assert finetune(dataset, PLAIN, config, options, tmp_path / "stopped").resumed_at == 3
    finetune(dataset, PLAIN, config, options, tmp_path / "whole")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_checkpoint_cut_short_is_not_used(tmp_path, llama_folders, dataset):
    config = on_cpu(llama_folders[0])
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, PLAIN, config, QUICK, tmp_path / "stopped", progress=StopAt(4))
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text("{")
    (checkpoints / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    assert finetune(dataset, PLAIN, config, QUICK, tmp_path / "stopped").resumed_at == 3
    finetune(dataset, PLAIN, config, QUICK, tmp_path / "whole")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_an_interrupted_run_with_other_settings_is_not_continued(tmp_path, llama_folders, dataset):
    config, output = on_cpu(llama_folders[0]), tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, PLAIN, config, QUICK, output, progress=StopAt(4))
    other = replace(QUICK, epochs=4, learning_rate=1e-3)
    with pytest.raises(ConfigMismatch, match="epochs 3, now 4; learning_rate 0.005, now 0.001.*--overwrite"):
        finetune(dataset, PLAIN, config, other, output)
    summary = finetune(dataset, PLAIN, config, other, output, overwrite=True)
    assert summary.resumed_at is None and summary.steps == 12


def test_a_run_that_trained_nothing_leaves_its_folder_to_another(tmp_path, llama_folders, dataset):
    config, output = on_cpu(llama_folders[0]), tmp_path / "adapter"
    with pytest.raises(ModelError, match="no linear module"):
        finetune(dataset, PLAIN, config, replace(QUICK, target_modules="nonsense"), output)
    assert not finetune(dataset, PLAIN, config, replace(QUICK, epochs=1), output).already_there


@pytest.mark.parametrize("size", [5_000, 100_000])
def test_a_disk_without_room_is_named_and_the_run_goes_on_when_there_is_some(
    tmp_path, llama_folders, dataset, zygote, size
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": one.prompt, "response": one.response}) for one in dataset.examples))
    command = ("finetune", rows, "-m", llama_folders[0], "-o", tmp_path / "out", "--method", "full", "-q")
    failed = zygote.run(*command, file_size=size)
    assert failed.code == 1 and failed.err.count("\n") == 1 and "has no more room" in failed.err
    assert zygote.run(*command).code == 0


def test_a_finished_output_is_left_as_it_is(tmp_path, llama_folders, dataset):
    config, output = on_cpu(llama_folders[0]), tmp_path / "adapter"
    first = finetune(dataset, PLAIN, config, QUICK, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = finetune(dataset, PLAIN, config, replace(QUICK, checkpoint_seconds=60), output)
    assert again.already_there and replace(again, already_there=False) == first
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(ConfigMismatch, match="max_length 64, now 32; seed 0, now 1"):
        finetune(dataset, replace(PLAIN, max_length=32), config, replace(QUICK, seed=1), output)
    old = weights(output)
    finetune(dataset, PLAIN, config, replace(QUICK, seed=1), output, overwrite=True)
    assert any(not torch.equal(value, old[key]) for key, value in weights(output).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_other_data_or_another_model_is_another_run(tmp_path, tiny_folders, dataset):
    output = tmp_path / "adapter"
    finetune(dataset, PLAIN, on_cpu(tiny_folders["llama"][0]), QUICK, output)
    with pytest.raises(ConfigMismatch, match="settings: model "):
        finetune(dataset, PLAIN, on_cpu(tiny_folders["qwen3"][0]), QUICK, output)
    fewer = replace(dataset, examples=dataset.examples[:3])
    with pytest.raises(ConfigMismatch, match="settings: data "):
        finetune(fewer, PLAIN, on_cpu(tiny_folders["llama"][0]), QUICK, output)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_someone_elses_is_never_replaced(tmp_path, llama_folders, dataset, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="finetune did not write it"):
        finetune(dataset, PLAIN, on_cpu(llama_folders[0]), QUICK, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_optimizer_state_can_be_kept_as_a_second_moment(tmp_path, llama_folders, dataset, method):
    options = replace(QUICK, method=method, save_optimizer=True)
    finetune(dataset, PLAIN, on_cpu(llama_folders[0]), options, tmp_path / "out")
    loaded = load(on_cpu(tmp_path / "out") if method == "full" else on_cpu(llama_folders[0], tmp_path / "out"))
    layers = PerExampleGradients(loaded.model).layers
    moment = read_second_moment(tmp_path / "out", loaded.model, layers)
    assert moment.shape == (sum(layer.size for layer in layers),)
    assert moment.isfinite().all() and (moment >= 0).all() and moment.any()


def test_without_being_asked_no_optimizer_state_is_kept(tmp_path, llama_folders, dataset):
    finetune(dataset, PLAIN, on_cpu(llama_folders[0]), QUICK, tmp_path / "out")
    assert not (tmp_path / "out" / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("qwen3", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gemma3", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt2", ["attn.c_proj", "c_attn"]),
        ("gpt_neox", ["dense", "query_key_value"]),
    ],
)
def test_the_attention_projections_are_found_in_every_architecture(name, expected):
    assert target_modules(tiny.make_model(name), None) == expected


def test_target_modules_can_be_named(tmp_path, llama_folders, dataset):
    options = replace(QUICK, target_modules="q_proj, mlp.down_proj")
    finetune(dataset, PLAIN, on_cpu(llama_folders[0]), options, tmp_path / "adapter")
    loaded = load(on_cpu(llama_folders[0], tmp_path / "adapter"))
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in loaded.trainable} == {"q_proj", "down_proj"}


def test_an_unknown_target_module_lists_the_linear_ones(tmp_path, llama_folders, dataset):
    options = replace(QUICK, target_modules="q_proj,c_attn")
    with pytest.raises(ModelError, match="no linear module named c_attn.*down_proj, gate_proj, k_proj, lm_head"):
        finetune(dataset, PLAIN, on_cpu(llama_folders[0]), options, tmp_path / "adapter")


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, llama_folders, dataset):
    base = Path(shutil.copytree(llama_folders[0], tmp_path / "base"))
    broken = load_file(base / "model.safetensors")
    broken["lm_head.weight"][7, 3] = float("nan")
    save_file(broken, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not a number any more, in step 1. Lower the learning rate"):
        finetune(dataset, PLAIN, on_cpu(base), QUICK, tmp_path / "adapter")
    assert files_of(tmp_path / "adapter") == ["checkpoints", "rapidindex-finetune.json"]


def test_examples_without_a_response_token_left_are_skipped(tmp_path, llama_folders, dataset):
    lengths = [len(tiny.make_tokenizer()(f"What is the capital of {country}?\n")["input_ids"]) for country in CAPITALS]
    encoding = EncodingConfig("plain", max(lengths))
    assert min(lengths) < max(lengths)
    summary = finetune(dataset, encoding, on_cpu(llama_folders[0]), QUICK, tmp_path / "adapter")
    assert summary.skipped == lengths.count(max(lengths)) and summary.examples == 5 - summary.skipped
    with pytest.raises(DataError, match="None of 5 examples has a response token.*--max-length"):
        finetune(dataset, EncodingConfig("plain", 8), on_cpu(llama_folders[0]), QUICK, tmp_path / "none")


def test_padding_is_masked_by_position_and_never_by_id():
    rows = [{"input_ids": [5, 0, 6], "labels": [-100, 0, 6]}, {"input_ids": [7], "labels": [-100]}]
    batch = collate([{key: torch.tensor(value) for key, value in row.items()} for row in rows])
    assert batch["input_ids"].tolist() == [[5, 0, 6], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 6], [-100, -100, -100]]


def test_options_that_exclude_each_other_are_refused(tmp_path, llama_folders, dataset):
    base, adapter = llama_folders
    for config, options, message in [
        (on_cpu(base, adapter), QUICK, "Leave --adapter out"),
        (on_cpu(base, quantize="4bit"), QUICK, "--method qlora"),
        (on_cpu(base, dtype="float16"), replace(QUICK, method="full"), "bfloat16"),
        (ModelConfig(str(base), device="cuda:1"), QUICK, "CUDA_VISIBLE_DEVICES=1"),
    ]:
        with pytest.raises(UsageError, match=message):
            finetune(dataset, PLAIN, config, options, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "dora"),
        ("rank", 0),
        ("alpha", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulation", -1),
        ("learning_rate", 0.0),
        ("learning_rate", 3.0),
        ("dropout", 1.0),
        ("warmup_ratio", -0.1),
        ("weight_decay", -1.0),
    ],
)
def test_impossible_options_name_their_flag(field, value):
    with pytest.raises(UsageError, match="--" + field.replace("_", "-")):
        FinetuneConfig(**{field: value})


def test_learning_rate_alpha_and_early_follow_the_method_and_the_rank():
    assert FinetuneConfig(rank=8).complete() == FinetuneConfig(rank=8, alpha=16, learning_rate=5e-4, early=0.1)
    assert FinetuneConfig(method="full").complete().learning_rate == 5e-5
    options = FinetuneConfig(learning_rate=1e-4, alpha=5, early=0.0)
    assert options.complete() == options


def test_training_is_silent_and_leaves_the_random_generators_alone(tmp_path, llama_folders, dataset, capfd):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    finetune(dataset, PLAIN, on_cpu(llama_folders[0]), replace(QUICK, dropout=0.1), tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_a_fresh_process_that_trains_says_nothing(tmp_path, llama_folders, dataset):
    code = (
        "from rapidindex.model.finetune import *; from rapidindex.data.examples import read_examples\n"
        f"finetune(read_examples({dataset.path!r}), EncodingConfig('plain', 64), "
        f"ModelConfig({str(llama_folders[0])!r}, device='cpu'), FinetuneConfig(epochs=1), {str(tmp_path / 'out')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_chat_template_can_be_trained_on(tmp_path, llama_folders, dataset):
    assert_learns(finetune(dataset, EncodingConfig("chat", 64), on_cpu(llama_folders[0]), QUICK, tmp_path / "adapter"))
    assert load(on_cpu(llama_folders[0], tmp_path / "adapter")).tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_each_epoch_sees_every_example_in_an_order_of_its_own(tmp_path, llama_folders, dataset, monkeypatch):
    orders = []
    collate_as_before = training.collate

    def collate(rows):
        orders.append(rows[0]["input_ids"].tolist())
        return collate_as_before(rows)

    monkeypatch.setattr(training, "collate", collate)
    finetune(dataset, PLAIN, on_cpu(llama_folders[0]), replace(QUICK, batch_size=1), tmp_path / "adapter")
    first, second, third = (orders[start : start + 5] for start in (0, 5, 10))
    assert len(orders) == 15 and len(set(map(tuple, first))) == 5 and sorted(first) == sorted(second) == sorted(third)
    assert first != second or second != third


def test_build_takes_template_and_length_from_the_record_of_finetune(tmp_path, llama_folders, dataset, data):
    encoding = EncodingConfig("Q: {prompt}\\nA: ", 64)
    config = on_cpu(llama_folders[0], dtype="bfloat16")
    summary = finetune(dataset, encoding, config, replace(QUICK, epochs=1, early=0.5), tmp_path / "my adapter")
    for folder in (tmp_path / "my adapter", tmp_path / "my adapter" / "early"):
        assert encoding_of(str(folder)) == encoding
        assert encoding_of(str(folder), template="plain", max_length=None) == EncodingConfig("plain", 64)
    model = ModelConfig(config.model, str(tmp_path / "my adapter"), device="cpu")
    assert prepare(BuildRequest(str(data), "unused", model)).request.encoding == encoding
    asked = EncodingConfig("plain", 64)
    with pytest.warns(RapidIndexWarning, match="my adapter was trained with --template 'Q: {prompt}.* not 'plain'"):
        assert prepare(BuildRequest(str(data), "unused", model, asked)).request.encoding == asked
    with pytest.warns(RapidIndexWarning) as warned:  # for these data the template that is not given is alpaca
        prepare(BuildRequest(str(data), "unused", model, EncodingConfig()))
    assert [re.search(r"--\S+", str(each.message))[0] for each in warned] == ["--template", "--max-length"]
    prepare(BuildRequest(str(data), "unused", model, encoding))
    assert encoding_of(str(llama_folders[0])) == EncodingConfig()
    table = next(iter(finetune_tables(summary, 0, "my data.jsonl", config, encoding, 7).values()))
    assert shlex.split(table["next"]) == [
        *["rapidindex", "build", "my data.jsonl", "-m", config.model, "-a", str(tmp_path / "my adapter")],
        *["--template", "Q: {prompt}\\nA: ", "--max-length", "64", "--dtype", "bfloat16", "--limit", "7"],
        *["-o", "INDEX"],
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_into_one_folder_is_refused_and_touches_nothing(tmp_path, llama_folders, dataset, overwrite):
    config, output = on_cpu(llama_folders[0]), tmp_path / "adapter"
    refused = []

    def second(*report):
        before = sorted(path.name for path in output.rglob("*"))
        with pytest.raises(ModelError, match="Another run of finetune is writing to .*choose another --output"):
            finetune(dataset, PLAIN, config, replace(QUICK, rank=2), output, overwrite=overwrite)
        refused.append(before == sorted(path.name for path in output.rglob("*")))

    finetune(dataset, PLAIN, config, replace(QUICK, epochs=1), output, progress=second)
    assert refused and all(refused)
    assert load(on_cpu(llama_folders[0], output)).trainable
    finetune(dataset, PLAIN, config, replace(QUICK, rank=2, epochs=1), output, overwrite=True)
