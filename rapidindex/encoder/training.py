"""Train an encoder with sentence-transformers' trainer on blocks of anchors and candidates.

The loss compares a block's cosines with the targets (Influcoder): α (1 - Pearson over the block) + (1 - α) KL of the
rows' softmax at τ. Writes checkpoints into the folder that `distill.py` has made ready.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int64
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rapidindex.config import DistillConfig
from rapidindex.data.templates import Encoding
from rapidindex.encoder.embed import Encoder
from rapidindex.encoder.parts import Part, agreement
from rapidindex.errors import ModelError, ResourceError
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.model.files import CHECKPOINTS
from rapidindex.model.training import last_checkpoint, seeded
from rapidindex.progress import Progress

_BEST = 50
"""A hard candidate is among so many best for an anchor."""


def draw_blocks(
    part: Part, options: DistillConfig
) -> tuple[Int64[np.ndarray, "blocks anchors"], Int64[np.ndarray, "blocks candidates"]]:
    """Draw the blocks of all epochs: in each epoch every anchor once, with candidates of which some are hard.

    No anchor is among the candidates of its own block.
    """
    rng = np.random.default_rng(options.seed)
    size, hard = options.block_anchors, round(options.hard * options.block_candidates)
    ranked = np.where(np.isnan(part.targets), -np.inf, part.targets)
    best = np.argsort(-ranked, axis=1)[:, :_BEST]
    anchors, candidates = [], []
    for _ in range(options.epochs):
        order = rng.permutation(len(part.anchors))
        order = np.resize(order, -(-len(order) // size) * size)
        for block in order.reshape(-1, size):
            free = np.flatnonzero(~np.isnan(part.targets[block]).any(axis=0))
            near = rng.permutation(np.intersect1d(best[block], free))[:hard]
            others = rng.permutation(np.setdiff1d(free, near))[: options.block_candidates - len(near)]
            anchors.append(block)
            candidates.append(np.concatenate([near, others]))
    return np.array(anchors), np.array(candidates)


def block_loss(
    scores: Float[Tensor, "anchors candidates"], targets: Float[Tensor, "anchors candidates"], options: DistillConfig
) -> Float[Tensor, ""]:
    """Return α (1 - Pearson over the block) + (1 - α) KL(targets ‖ scores), each row's softmax at τ."""
    a, b = scores - scores.mean(), targets - targets.mean()
    pearson = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    loss = options.alpha * (1 - pearson)
    if options.alpha < 1:
        mine, wanted = (torch.log_softmax(x / options.temperature, dim=1) for x in (scores, targets))
        loss = loss + (1 - options.alpha) * (wanted.exp() * (wanted - mine)).sum(1).mean()
    return loss


def _tokenized(encoder: Encoder, part: Part) -> tuple[list[Encoding], list[Encoding]]:
    """Return the token ids of a part's anchors and pool, as they will be when they are embedded."""
    anchors = [encoder.encode_text(one.prompt, one.response, anchor=True) for one in part.anchors]
    return anchors, [encoder.encode_text(one.prompt, one.response) for one in part.pool]


class _Loss(nn.Module):
    """`block_loss` in the form that sentence-transformers' trainer takes."""

    def __init__(self, encoder: Encoder, options: DistillConfig) -> None:
        super().__init__()
        self.model, self.encoder, self.options = encoder.model, encoder, options

    def forward(self, features: list[dict[str, Tensor]], targets: Tensor) -> Tensor:
        anchors, candidates = (self.encoder.unit(one["input_ids"], one["attention_mask"]) for one in features)
        return block_loss(anchors @ candidates.T, targets, self.options)


class _Collator:
    """Makes a batch of a block's numbers: the texts are tokenized once."""

    valid_label_columns: Sequence[str] = ()

    def __init__(self, encoder: Encoder, part: Part) -> None:
        self.anchors, self.pool = _tokenized(encoder, part)
        self.targets = torch.from_numpy(part.targets)

    def __call__(self, blocks: list[dict[str, list[int]]]) -> dict[str, Any]:
        (block,) = blocks
        batch: dict[str, Any] = {"label": self.targets[block["anchors"]][:, block["candidates"]]}
        for column, texts in (("anchors", self.anchors), ("candidates", self.pool)):
            chosen = [torch.from_numpy(texts[number].input_ids).long() for number in block[column]]
            batch[f"{column}_input_ids"] = pad_sequence(chosen, batch_first=True)
            batch[f"{column}_attention_mask"] = pad_sequence([torch.ones_like(one) for one in chosen], batch_first=True)
        return batch


class _Measure(SentenceEvaluator):
    """Spearman's correlation of the encoder's scores with a part's targets; the texts are tokenized once."""

    def __init__(self, encoder: Encoder, part: Part) -> None:
        super().__init__()
        self.encoder, self.part = encoder, part
        self.anchors, self.pool = _tokenized(encoder, part)

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Return `spearman`, the mean over the anchors."""
        training, model = self.encoder.model.training, self.encoder.model.eval()
        try:
            scores = self.encoder.embed(self.anchors) @ self.encoder.embed(self.pool).T
        finally:
            model.train(training)
        return {"spearman": agreement(scores, self.part).per_anchor}


class _Report(transformers.TrainerCallback):
    """Reports each step, and stops where the loss is not a number any more."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.measured = progress, ""

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "eval_spearman" in logs:
            self.measured = f", Spearman {logs['eval_spearman']:.3f}"
        if "loss" not in logs:
            return
        if not np.isfinite(logs["loss"]):
            raise ModelError("The loss is not a number any more.", hint="Give a lower --learning-rate and --overwrite.")
        self.progress("distil", state.global_step, state.max_steps, f"loss {logs['loss']:.3f}{self.measured}")


class _Trainer(SentenceTransformerTrainer):
    """The trainer without the model card of its own, which draws bars and asks the hub."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir, create_model_card=False)


def train(
    encoder: Encoder, parts: dict[str, Part], options: DistillConfig, output: Path, progress: Progress
) -> dict[str, Any]:
    """Train the encoder in place, from the last checkpoint in `output` if there is one, and load its best epoch.

    Returns the Spearman of each epoch on the part that chooses, the best one's, and where training went on.
    """
    from datasets import Dataset

    anchors, candidates = draw_blocks(parts["train"], options)
    blocks = Dataset.from_dict({"anchors": anchors.tolist(), "candidates": candidates.tolist()})
    with seeded(options.seed):
        trainer = _Trainer(
            encoder.model,
            _arguments(encoder, options, output, len(anchors) // options.epochs),
            blocks,
            loss=_Loss(encoder, options),
            evaluator=_Measure(encoder, parts["choose"]),
            data_collator=_Collator(encoder, parts["train"]),
            callbacks=[_Report(progress)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        checkpoint = last_checkpoint(output / CHECKPOINTS)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(f"A block does not fit into the memory of {encoder.device}.") from error
    encoder.model.eval()
    measured = [entry["eval_spearman"] for entry in trainer.state.log_history if "eval_spearman" in entry]
    return {
        "epoch_spearman": measured[: options.epochs],
        "chosen_spearman": max(measured),
        "resumed_at": int(checkpoint.rpartition("-")[2]) if checkpoint else None,
    }


def _arguments(
    encoder: Encoder, options: DistillConfig, output: Path, epoch: int
) -> SentenceTransformerTrainingArguments:
    """Return the trainer's options; `epoch` is the number of blocks after which an epoch is measured and kept."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=1,  # the blocks of all epochs are one list
        per_device_train_batch_size=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup_ratio,
        optim="adamw_torch",
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=epoch,
        save_strategy="steps",
        save_steps=epoch,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_spearman",
        greater_is_better=True,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=encoder.device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
