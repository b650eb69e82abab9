"""Baselines of hidden states, at four depths: RepSim and RepT. Scores are arrays [queries, examples].

`repsim/L` is the cosine of the mean hidden states after layer L, over prompt and response. `rept/L` (arXiv 2510.02334)
sets the hidden state of the last prompt token beside the loss's gradient with respect to the hidden state of the first
response token, either part brought to length 1; the paper chooses L on a probing set, here every L has its figure.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence.sketched import Scores
from rapidindex.gradients.losses import Batch, example_losses
from rapidindex.progress import Progress

_TOKENS = 1024
"""Padded tokens of a batch."""


def representation_scores(
    model: nn.Module, rows: Sequence[Batch], queries: Sequence[Batch], progress: Progress
) -> Scores:
    """Score `rows` for `queries`, batches of one each."""
    of_queries, of_rows = (representations(model, side, progress) for side in (queries, rows))
    return {name: (of_queries[name] @ of_rows[name].T).numpy() for name in of_rows}


def representations(model: nn.Module, examples: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
    """Return unit vectors float32 [examples, width] by name, width the hidden size or, for `rept`, twice that."""
    found: dict[str, list[Tensor]] = {}
    order = sorted(range(len(examples)), key=lambda number: -examples[number].input_ids.shape[1])
    for here in _batches(order, [batch.input_ids.shape[1] for batch in examples]):
        batch = Batch.of(
            [examples[n].input_ids[0].numpy() for n in here], [examples[n].weights[0].numpy() for n in here]
        )
        for name, vectors in _of_batch(model, batch).items():
            found.setdefault(name, []).append(vectors)
        progress("hidden states", sum(map(len, found["repsim/last"])), len(examples))
    back = torch.tensor(order).argsort()
    return {name: torch.cat(parts)[back] for name, parts in found.items()}


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    for number in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= _TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _of_batch(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    states, gradients = hidden_states(model, batch)
    last = len(states) - 1
    depths = {"quarter": (last + 2) // 4, "half": last // 2, "three quarters": 3 * last // 4, "last": last}
    mask = batch.attention.unsqueeze(-1).float()
    rows, first = torch.arange(len(batch)), (batch.weights != 0).int().argmax(1)
    # Of a single token in the loss, nothing depends on the state at that token: the one before decides.
    several = (batch.weights != 0).sum(1) > 1
    at = torch.where(several, first, first - 1)
    vectors = {}
    for name, depth in depths.items():
        state, gradient = states[depth].detach().float(), gradients[depth].float()
        vectors[f"repsim/{name}"] = F.normalize((state * mask).sum(1) / mask.sum(1), dim=1)
        pair = [F.normalize(part, dim=1) for part in (state[rows, first - 1], gradient[rows, at])]
        vectors[f"rept/{name}"] = F.normalize(torch.cat(pair, dim=1), dim=1)
    return vectors


def hidden_states(model: nn.Module, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the state before the first and after each layer, [examples, T, hidden] each, and the loss's gradients."""
    kept: list[Tensor] = []

    def ask(_: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        return inputs, named | {"output_hidden_states": True}

    handles = [
        model.get_input_embeddings().register_forward_hook(lambda _, i, output: output.requires_grad_()),
        model.register_forward_hook(lambda _, i, output: kept.extend(output.hidden_states)),
        model.register_forward_pre_hook(
            lambda _, i, named: (i, named | {"output_hidden_states": True}), with_kwargs=True
        ),
    ]
    try:
        with torch.enable_grad():
            loss = example_losses(model, batch).sum()
            gradients = torch.autograd.grad(loss, kept)
    finally:
        for handle in handles:
            handle.remove()
    return kept, list(gradients)
