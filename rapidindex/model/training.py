"""The training itself: transformers' Trainer over peft, silent, resumable, its loss on the response tokens only.

Knows nothing of OUTPUT: it works in the folder that `finetune.py` gives it, and leaves the result in its `finished`.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import get_length_grouped_indices

from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import Dataset
from rapidindex.data.templates import Template
from rapidindex.errors import DataError, ModelError, ResourceError
from rapidindex.model.files import find_model
from rapidindex.model.loading import as_our_errors, check_vocabulary, load_base, load_tokenizer, quiet, train_everything
from rapidindex.model.model import resolve_device
from rapidindex.progress import Progress

_IGNORED = -100
_CHECKPOINTS = "checkpoints"
_EARLY = "early"


def train(
    dataset: Dataset,
    encoding: EncodingConfig,
    model_config: ModelConfig,
    options: FinetuneConfig,
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train, from the last checkpoint in `work` if there is one; the result lies in `work/finished`.

    Returns what `FinetuneSummary` says of the training. Errors as for `finetune`.
    """
    device = resolve_device(model_config.device)
    files = find_model(model_config.model)
    with quiet(), as_our_errors(model_config):
        tokenizer = load_tokenizer(files, None)
        base = load_base(files, model_config, device, None)
        check_vocabulary(base, tokenizer)
    rows = _encoded(dataset, Template(encoding.template, tokenizer, encoding.max_length))
    with quiet(), _seeded(options.seed):
        model = _trainable(base, model_config, options)
        _check_disk(work, model, options)
        checkpoint = _last_checkpoint(work / _CHECKPOINTS)
        steps = _steps(len(rows), options)
        early = max(1, round(options.early * steps)) if options.early else None
        watch = _Watch(progress, options.checkpoint_seconds)
        keep = _KeepEarly(early, tokenizer, work / _EARLY)
        trainer = _trainer(model, rows, options, work / _CHECKPOINTS, device, [watch, keep])
        _run(trainer, checkpoint, model_config)
        _save(trainer, tokenizer, options, work / "finished")
        if early:
            # A copy: a run that is killed before `finished` is published saves anew, and needs it again.
            shutil.copytree(work / _EARLY, work / "finished" / _EARLY)
    return {
        "examples": len(rows),
        "skipped": len(dataset.examples) - len(rows),
        "steps": trainer.state.global_step,
        "epoch_losses": _epoch_losses(trainer.state, options.epochs),
        "trainable_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "seconds": time.monotonic() - watch.started,
        "early_step": early,
        "resumed_at": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
    }


def _encoded(dataset: Dataset, template: Template) -> list[dict[str, Any]]:
    """Token ids and labels (-100 outside the response) of the examples that have a response token left."""
    rows = []
    for example in dataset.examples:
        encoded = template.encode(example)
        # The first token is predicted from nothing, so it has no loss.
        if encoded.response_mask[1:].any():
            labels = np.where(encoded.response_mask, encoded.input_ids, _IGNORED)
            rows.append({"input_ids": encoded.input_ids.tolist(), "labels": labels.tolist()})
    if not rows:
        raise DataError(
            f"None of {len(dataset.examples)} examples has a response token within {template.max_length} tokens.",
            hint="Give a larger --max-length.",
        )
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad examples on the right to a batch: input_ids, attention_mask and labels, each int64 [examples, T].

    The padding is masked by position, never by its id: a pad token may be missing, or be the end token too.
    """
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for k, row in enumerate(rows):
        end = len(row["input_ids"])
        ids[k, :end], labels[k, :end] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[k, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _trainable(base: nn.Module, model_config: ModelConfig, options: FinetuneConfig) -> nn.Module:
    if options.method == "full":
        train_everything(base, model_config)
        return base
    import peft

    targets = target_modules(base, options.target_modules)
    linear = _linear_modules(base)
    settings = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in linear if _matches(name, targets)),
    )
    return peft.get_peft_model(base, settings)


def target_modules(base: nn.Module, wanted: str | None) -> list[str]:
    """The names peft is given: `wanted`, comma-separated, or the linear modules inside attention blocks.

    ModelError where a wanted name fits no linear module, or nothing looks like an attention block.
    """
    linear = _linear_modules(base)
    last = sorted({name.rpartition(".")[2] for name in linear})
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        unknown = [name for name in names if not any(_matches(module, [name]) for module in linear)]
        if unknown or not names:
            raise ModelError(
                f"The model has no linear module named {', '.join(unknown) or repr(wanted)}.",
                hint=f"Its linear modules: {', '.join(last)}. Name some with --target-modules.",
            )
        return names
    attention = [name for name in linear if "att" in name.rpartition(".")[0].rpartition(".")[2].lower()]
    if not attention:
        raise ModelError(
            "The model's attention projections were not found.",
            hint=f"Name some: --target-modules {','.join(last[:2])}",
        )
    others = {name.rpartition(".")[2] for name in linear if name not in attention}
    # GPT-2's attention and MLP both have a c_proj: such names are given with their block's.
    return sorted({".".join(name.split(".")[-2 if name.rpartition(".")[2] in others else -1 :]) for name in attention})


def _linear_modules(base: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _matches(module: str, targets: list[str]) -> bool:
    return any(module == target or module.endswith("." + target) for target in targets)


class _LengthSampler(torch.utils.data.Sampler[int]):
    """An epoch's order, examples of like length together: a function of seed and epoch, so that resuming repeats it."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


class _Trainer(transformers.Trainer):
    """Trainer with our order of examples, stopping at a loss that is not a number."""

    def _get_train_sampler(self, train_dataset: Any = None) -> _LengthSampler:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return _LengthSampler(
            lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As Trainer does, but peft would ask the hub, at each checkpoint, how large the base's vocabulary is."""
        _save_model(self.model, output_dir or self.args.output_dir)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **options)
        value = loss[0] if isinstance(loss, tuple) else loss
        if not torch.isfinite(value.detach()):
            raise ModelError(
                f"The loss is not a number any more, in step {self.state.global_step + 1}.",
                hint=f"Lower the learning rate (it is {self.args.learning_rate:g}) and give --overwrite.",
            )
        return loss


class _Watch(transformers.TrainerCallback):
    """Reports each step, and asks for a checkpoint when the last one is old."""

    def __init__(self, progress: Progress, seconds: float) -> None:
        self.progress, self.seconds = progress, seconds
        self.started = self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if time.monotonic() - self.saved >= self.seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.progress("fine-tune", state.global_step, state.max_steps, f"loss {logs['loss']:.2f}")


class _KeepEarly(transformers.TrainerCallback):
    """Writes the model as it is after one step, whole or not at all. A resumed run comes by that step, or has it."""

    def __init__(self, step: int | None, tokenizer: Any, folder: Path) -> None:
        self.step, self.tokenizer, self.folder = step, tokenizer, folder

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **rest: Any) -> None:
        if state.global_step == self.step:
            part = self.folder.with_name(f"{self.folder.name}.part")
            for old in (part, self.folder):
                shutil.rmtree(old, ignore_errors=True)
            _write(model, self.tokenizer, part)
            part.rename(self.folder)


def _steps(rows: int, options: FinetuneConfig) -> int:
    return options.epochs * math.ceil(math.ceil(rows / options.batch_size) / options.accumulation)


def _trainer(
    model: nn.Module,
    rows: list[dict[str, Any]],
    options: FinetuneConfig,
    folder: Path,
    device: torch.device,
    callbacks: list[transformers.TrainerCallback],
) -> _Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(options.warmup_ratio * _steps(len(rows), options)),
        weight_decay=options.weight_decay,
        optim="adamw_torch",
        seed=options.seed,
        save_strategy="no",  # _Watch asks for checkpoints
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the model is on one device; Trainer would copy it to every GPU
    trainer = _Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _run(trainer: _Trainer, checkpoint: Path | None, model_config: ModelConfig) -> None:
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (MemoryError, torch.OutOfMemoryError) as error:
        size = trainer.args.per_device_train_batch_size
        raise ResourceError(
            f"A batch of {size} examples does not fit into the memory of {model_config.device}.",
            hint="Give a smaller --batch-size (with a larger --accumulation), or --max-length.",
        ) from error


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; Trainer writes trainer_state.json last. Those cut short are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*") if folder.is_dir() else []:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            complete.append(checkpoint)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check_disk(work: Path, model: nn.Module, options: FinetuneConfig) -> None:
    """ResourceError unless two checkpoints (weights and Adam's two moments) and the result fit beside `work`."""
    size = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    needed, free = size * (7 + 2 * options.save_optimizer + 2 * bool(options.early)), shutil.disk_usage(work).free
    if free < needed:
        raise ResourceError(
            f"Training needs {needed / 2**30:.1f} GiB beside {work}, and {free / 2**30:.1f} GiB are free.",
            hint="Free some space, or choose another --output.",
        )


def _save(trainer: _Trainer, tokenizer: Any, options: FinetuneConfig, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _write(trainer.model.eval(), tokenizer, folder)
    if options.save_optimizer:
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")


def _write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The model and its tokenizer, for whoever loads them to generate or to take gradients."""
    used, model.config.use_cache = model.config.use_cache, True  # off for training; a saved whole model wants it
    _save_model(model, folder)
    model.config.use_cache = used
    tokenizer.save_pretrained(folder)


def _save_model(model: nn.Module, folder: str | Path) -> None:
    import peft

    model.save_pretrained(folder, **({"save_embedding_layers": False} if isinstance(model, peft.PeftModel) else {}))


def _epoch_losses(state: Any, epochs: int) -> list[float]:
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return [float(np.mean(part)) for part in np.array_split(losses, epochs) if len(part)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` within; Python's, NumPy's and torch's global generators come back as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
