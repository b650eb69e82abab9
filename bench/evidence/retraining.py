"""Retrain the model without some of its rows: the truth that the linear datamodeling score compares scores with.

Label-masked: every row keeps its place in every batch, and a row that is left out only has no loss there. So the order,
the number of steps, the learning rates and the divisor of the loss are the same for all subsets. A row without a loss
has a gradient of zero, so it is not computed: the step is the same but for rounding.

Only the last layers have an adapter. What the layers below them make of a row never changes: it is computed once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rapidindex.config import ModelConfig
from rapidindex.gradients.losses import Batch, example_losses, only_logits_at, positions_used, trainable
from rapidindex.model.model import load
from rapidindex.model.training import target_modules
from rapidindex.progress import Progress, silent

_EVALUATED = 25
"""Rows of a forward pass."""


@dataclass(frozen=True)
class Schedule:
    """How a model is trained."""

    epochs: int = 2
    batch_size: int = 20
    """Rows of a step, those without a loss counted."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate (without weight decay); it rises over the first steps, then falls along a cosine."""
    warmup: float = 0.05
    """Share of the steps over which it rises."""
    rank: int = 16
    """Rank of LoRA on the attention projections; alpha is twice the rank."""
    layers: int = 10
    """The last so many layers have an adapter."""
    dtype: str = "bfloat16"
    """Dtype of the frozen weights; LoRA's are float32."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    def batches(self, rows: int, seed: int) -> list[np.ndarray]:
        """Return the row numbers of each step."""
        draw = np.random.default_rng([seed, 5])
        ends = range(self.batch_size, rows, self.batch_size)
        return [batch for _ in range(self.epochs) for batch in np.split(draw.permutation(rows), ends)]


@dataclass(frozen=True)
class Row:
    """One example, with what reaches the first layer that has an adapter."""

    batch: Batch
    """A batch of one."""
    state: Tensor
    """Float [T, hidden]."""


class Retrainer:
    """The model under an adapter of its last layers, which it trains again and again."""

    def __init__(self, model: str, schedule: Schedule) -> None:
        # Eager attention: for such short rows the fused kernel takes longer in bfloat16.
        base = load(ModelConfig(model, device="cpu", dtype=schedule.dtype), attn_implementation="eager").model
        self.schedule, self.base = schedule, base.model
        self.blocks = base.model.layers
        self.first = max(0, len(self.blocks) - schedule.layers)
        settings = {"r": schedule.rank, "lora_alpha": 2 * schedule.rank, "task_type": "CAUSAL_LM"}
        settings |= {"layers_to_transform": list(range(self.first, len(self.blocks)))}
        config = peft.LoraConfig(**settings, target_modules=target_modules(base, None))
        self.model = peft.get_peft_model(base, config).eval()

    @torch.no_grad()
    def rows(self, batches: Sequence[Batch]) -> list[Row]:
        """Run `batches` of one through the layers without an adapter."""
        found: list[Tensor] = [torch.empty(0)] * len(batches)
        self.base.layers = self.blocks[: self.first + 1]
        for here in _of_like_length([batch.input_ids.shape[1] for batch in batches]):
            batch = _joined([batches[row] for row in here])
            states = self._entering(batch)
            for row, state in zip(here, states, strict=True):
                found[row] = state[: batches[row].input_ids.shape[1]].clone()
        return [Row(*pair) for pair in zip(batches, found, strict=True)]

    def _entering(self, batch: Batch) -> Tensor:
        """Return what enters the first layer with an adapter."""
        kept = []
        handle = self.blocks[self.first].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        self.base(input_ids=batch.input_ids, attention_mask=batch.attention, use_cache=False)
        handle.remove()
        return kept[0]

    def losses(self, rows: Sequence[Row]) -> Tensor:
        """Return the mean loss of each row's response tokens, float32 [rows]."""
        batch = _joined([row.batch for row in rows])
        states = pad_sequence([row.state for row in rows], batch_first=True)
        positions = positions_used(batch.weights)
        self.base.layers = self.blocks[self.first :]
        with _given(self.base.get_input_embeddings(), states), only_logits_at(self.model, positions):
            return example_losses(self.model, batch, positions)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Row]) -> np.ndarray:
        """Return the loss of each row, float64 [rows]."""
        found = np.empty(len(rows))
        for here in _of_like_length([len(row.state) for row in rows]):
            found[here] = self.losses([rows[row] for row in here]).double().numpy()
        return found

    def save(self, folder: Path) -> None:
        """Write the adapter."""
        self.base.layers = self.blocks
        self.model.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Read an adapter that `save` wrote."""
        self.base.layers = self.blocks
        peft.set_peft_model_state_dict(self.model, peft.load_peft_weights(str(folder), device="cpu"))

    def retrain(
        self,
        rows: Sequence[Row],
        kept: np.ndarray,
        seed: int,
        *,
        compute_masked: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Train the adapter from its beginning on `rows`, those with a loss marked in `kept`, bool [rows].

        `seed` draws LoRA's A and the order. `compute_masked` computes the rows without a loss too, with weight 0.
        """
        self.base.layers = self.blocks[self.first :]  # the parameters are named by what is in place
        restart(self.model, seed)
        parameters = list(trainable(self.model).values())
        self.optimizer = optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        batches = self.schedule.batches(len(rows), seed)
        for step, chosen in enumerate(batches):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)  # a batch without a loss has a gradient too, of zero
            if len(computed := [row for row in chosen if kept[row] or compute_masked]):
                losses = self.losses([rows[row] for row in computed]) * torch.from_numpy(kept[computed])
                (losses.sum() / self.schedule.batch_size).backward()
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.rate(step, len(batches))
            optimizer.step()
            progress("retrain", step + 1, len(batches))


def _of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of all rows, those of like length together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), _EVALUATED):
        yield order[first : first + _EVALUATED]


def _joined(batches: Sequence[Batch]) -> Batch:
    return Batch.of([batch.input_ids[0].numpy() for batch in batches], [b.weights[0].numpy() for b in batches])


@contextmanager
def _given(embedding: nn.Module, states: Tensor) -> Iterator[None]:
    """Let an embedding return `states`, whatever the tokens are."""
    handle = embedding.register_forward_hook(lambda *_: states)
    try:
        yield
    finally:
        handle.remove()


def restart(model: nn.Module, seed: int) -> None:
    """Draw LoRA's A by seed, and set its B to zero, as peft begins."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_((2 * torch.rand(parameter.shape, generator=draw) - 1) * bound)
