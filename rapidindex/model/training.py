"""Train with transformers' Trainer, over peft: silent, resumable, with a loss on the response tokens only.

Writes checkpoints, the early model and the finished one into the folder that `finetune.py` has made ready.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import Dataset
from rapidindex.data.templates import Template, encode_examples
from rapidindex.errors import DataError, ModelError, ResourceError
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.model import loading
from rapidindex.model.checks import Limits, check_causal, check_vocabulary
from rapidindex.model.files import CHECKPOINTS, find_model
from rapidindex.model.model import resolve_device
from rapidindex.model.outputs import check_room
from rapidindex.progress import Progress

Row = dict[str, Tensor]
"""int64 tensors of an example, or of a padded batch, as the model takes them."""
_NO_LABEL = -100


def train(
    dataset: Dataset,
    encoding: EncodingConfig,
    model_config: ModelConfig,
    options: FinetuneConfig,
    output: Path,
    progress: Progress,
    option: str,
) -> dict[str, Any]:
    """Train, from the last checkpoint in `output` if there is one, and write the model there.

    Returns the fields of `FinetuneSummary` that training decides. Raises the errors of `finetune`, in which `option` is
    the name of the option for `output`.
    """
    files, device = find_model(model_config.model), resolve_device(model_config.device)
    with loading.quiet_libraries(), loading.translate_errors(model_config):
        tokenizer = loading.load_tokenizer(files, None)
        base = loading.load_base(files, model_config, device, None)
        check_vocabulary(base, tokenizer)
        check_causal(base, tokenizer)
    template = Template.of(encoding, tokenizer)
    rows, refused = _encode(dataset, template, Limits.of(base, tokenizer))
    with loading.quiet_libraries(), seeded(options.seed):
        model = _make_trainable(base, model_config, options)
        _check_disk(output, model, options, option)
        checkpoint = last_checkpoint(output / CHECKPOINTS)
        trainer = _Trainer(model, tokenizer, rows, options, output, progress)
        started = time.monotonic()
        trainer.run(checkpoint)
        trainer.save_model(output)
        if options.save_optimizer:
            torch.save(trainer.optimizer.state_dict(), output / "optimizer.pt")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "examples": len(rows),
        "skipped": len(dataset.examples) - len(rows) - len(refused),
        "refused": refused,
        "steps": trainer.state.global_step,
        "epoch_losses": [float(np.mean(epoch)) for epoch in np.array_split(losses, options.epochs)],
        "trainable_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "seconds": time.monotonic() - started,
        "early_step": trainer.early_step,
        "resumed_at": int(checkpoint.rpartition("-")[2]) if checkpoint else None,
    }


def _encode(dataset: Dataset, template: Template, limits: Limits) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return token ids and labels (-100 outside the response) of the examples that have a response token left.

    The second list has {"line", "reason"} of each example that the template refuses.
    """
    encoded, refused = encode_examples(template, dataset.examples)
    rows = []
    for example, encoding in encoded:
        # The first token is predicted from nothing, so it has no loss.
        if encoding.response_mask[1:].any():
            limits.check(encoding.input_ids, f"line {example.line}")
            ids = torch.from_numpy(encoding.input_ids).long()
            mask = torch.from_numpy(encoding.response_mask & (example.id not in dataset.masked))
            labels = ids.where(mask, _NO_LABEL)
            rows.append({"input_ids": ids, "labels": labels})
    if not rows and refused:
        raise refused[0][1]
    if not rows:
        raise DataError(
            f"None of {len(dataset.examples)} examples has a response token within {template.max_length} tokens.",
            hint="Give a larger --max-length.",
        )
    return rows, [{"line": example.line, "reason": error.message.rstrip(".")} for example, error in refused]


def collate(rows: list[Row]) -> Row:
    """Pad examples on the right to a batch: input_ids, attention_mask and labels, each int64 [examples, T].

    The padding is masked by position, never by its id: a pad token may be missing, or be the end token too.
    """
    ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_NO_LABEL),
    }


def _make_trainable(base: nn.Module, model_config: ModelConfig, options: FinetuneConfig) -> nn.Module:
    if options.method == "full":
        loading.train_everything(base, model_config)
        return base
    targets = target_modules(base, options.target_modules)
    adapted = [module for name, module in _linear_modules(base).items() if _matches(name, targets)]
    settings = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adapted),
    )
    return peft.get_peft_model(base, settings)


def target_modules(base: nn.Module, names: str | None) -> list[str]:
    """Return the module names for peft: `names` split at commas, or the linear modules inside attention blocks.

    Raises ModelError where a name fits no linear module, or nothing looks like an attention block.
    """
    linear = _linear_modules(base)
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    if names is not None:
        targets = [name.strip() for name in names.split(",") if name.strip()]
        unknown = [name for name in targets if not any(_matches(module, [name]) for module in linear)]
        if unknown or not targets:
            raise ModelError(
                f"The model has no linear module named {', '.join(unknown) or repr(names)}.",
                hint=f"Its linear modules: {', '.join(last_names)}. Name some with --target-modules.",
            )
        return targets
    attention = [name for name in linear if "att" in name.rpartition(".")[0].rpartition(".")[2].lower()]
    if not attention:
        raise ModelError(
            "The model's attention projections were not found.",
            hint=f"Name some: --target-modules {','.join(last_names[:2])}",
        )
    others = {name.rpartition(".")[2] for name in linear if name not in attention}
    # GPT-2's attention and MLP both have a c_proj: such names are given with their block's.
    return sorted({".".join(name.split(".")[-2 if name.rpartition(".")[2] in others else -1 :]) for name in attention})


def _linear_modules(base: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _matches(module: str, targets: list[str]) -> bool:
    return any(module == target or module.endswith("." + target) for target in targets)


class _EpochSampler(LengthGroupedSampler):
    """Group examples of like length, in an order that depends on seed and epoch only, so that resuming repeats it."""

    seed = epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class _Trainer(transformers.Trainer):
    """Trainer that repeats its order when it resumes, reports each step and stops at a loss that is not a number."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rows: list[Row],
        options: FinetuneConfig,
        output: Path,
        progress: Progress,
    ) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(output / CHECKPOINTS),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.warmup_ratio,
            weight_decay=options.weight_decay,
            optim="adamw_torch",
            seed=options.seed,
            save_strategy="no",  # `log` asks for checkpoints
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # the model is on one device; Trainer would copy it to every GPU
        super().__init__(model, arguments, data_collator=collate, train_dataset=rows)
        self.remove_callback(transformers.PrinterCallback)
        self.tokenizer, self.options, self.early, self.progress = tokenizer, options, output / "early", progress
        self.saved = time.monotonic()

    @property
    def early_step(self) -> int | None:
        """The step after which the early model is kept."""
        return max(1, round(self.options.early * self.state.max_steps)) if self.options.early else None

    def run(self, checkpoint: str | None) -> None:
        """Train to the last step; raise ResourceError where a batch does not fit into memory."""
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"A batch of {self.options.batch_size} examples does not fit into the memory of {self.args.device}.",
                hint="Give a smaller --batch-size (with a larger --accumulation), or --max-length.",
            ) from error

    def compute_loss(
        self, model: nn.Module, inputs: Row, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the labels of a step: zero, and not 0/0, where all its examples are masked."""
        if num_items_in_batch is not None and not num_items_in_batch:
            num_items_in_batch = num_items_in_batch + 1
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer calls this after each step, before it saves a checkpoint, and once more at the end."""
        super().log(logs, start_time)
        step, steps = self.state.global_step, self.state.max_steps
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ModelError(
                f"The loss is not a number any more, in step {step}.",
                hint=f"Lower the learning rate (it is {self.options.learning_rate:g}) and give --overwrite.",
            )
        if step == self.early_step:
            self._save_early()
        self.progress("fine-tune", step, steps, f"loss {logs['loss']:.2f}")
        self.control.should_save = step < steps and time.monotonic() - self.saved >= self.options.checkpoint_seconds

    def _save_early(self) -> None:
        """Write the folder of the early model whole or not at all."""
        part = self.early.with_suffix(".part")
        for leftover in (part, self.early):
            shutil.rmtree(leftover, ignore_errors=True)
        self.save_model(part)
        part.rename(self.early)

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        """Write the model and its tokenizer, ready to generate."""
        # Left to itself, peft asks the hub each time how large the base's vocabulary is.
        options = {"save_embedding_layers": False} if isinstance(self.model, peft.PeftModel) else {}
        self.model.config.use_cache = True
        self.model.save_pretrained(output_dir, **options)
        self.model.config.use_cache = False
        self.tokenizer.save_pretrained(output_dir)

    def _save_checkpoint(self, *arguments: Any) -> None:
        super()._save_checkpoint(*arguments)
        self.saved = time.monotonic()

    def _get_train_sampler(self, train_dataset: Any = None) -> _EpochSampler:
        # Trainer's own "group_by_length" draws from the global generator: a resumed epoch would be another one.
        sampler = _EpochSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, self.train_dataset)
        sampler.seed = self.args.seed
        return sampler


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint, and remove later ones that were cut short."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(folder)):
        try:
            transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")  # Trainer's last file
            return checkpoint
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return None


def _check_disk(output: Path, model: nn.Module, options: FinetuneConfig, option: str) -> None:
    """Raise ResourceError unless two checkpoints (weights and Adam's two moments) and the result fit into `output`."""
    size = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    check_room(output, size * (7 + 2 * options.save_optimizer + bool(options.early)), "Training", option)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
