"""EK-FAC (arXiv 2308.03296) over the LoRA layers, through kronfluence: the strongest peer.

Covariances and eigenvalues of the true Fisher, with labels drawn from the model; damping is kronfluence's own, a tenth
of the mean eigenvalue of each layer. Factors are kept in a folder, so an interrupted run goes on from them.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from rapidindex.gradients import Batch, example_losses

Row = tuple[Tensor, Tensor, Tensor]
"""One example: input ids, attention and loss weights, each [1, T]."""


class Rows(torch.utils.data.Dataset):
    """Examples, longest first: kronfluence takes them in order, so its batches hold examples of like length."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.order = sorted(range(len(batches)), key=lambda i: -batches[i].input_ids.shape[1])
        self.rows = [(b.input_ids, b.attention, b.weights) for b in (batches[i] for i in self.order)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]


def collate(rows: list[Row]) -> Row:
    """A batch padded on the right."""
    longest = max(ids.shape[1] for ids, _, _ in rows)
    return tuple(
        torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts]) for parts in zip(*rows, strict=True)
    )


class LanguageModelling(Task):
    """The product's loss of an example, for training and for measuring."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: Row, model: nn.Module, sample: bool = False) -> Tensor:
        """The batch's summed loss; with `sample`, of labels that are drawn from the model."""
        if not sample:
            return example_losses(model, Batch(*batch)).sum()
        ids, attention, weights = batch
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
        rows, places = (weights[:, 1:] != 0).nonzero(as_tuple=True)
        wanted = logits[rows, places]
        with torch.no_grad():
            drawn = torch.multinomial(wanted.softmax(-1), 1).squeeze(-1)
        # Labels are drawn independently, so that losses weighted by √w have gradients whose mean outer product weighs
        # each token by w, as the Gauss-Newton matrix of the mean loss does.
        return (weights[rows, places + 1].sqrt() * F.cross_entropy(wanted, drawn, reduction="none")).sum()

    def compute_measurement(self, batch: Row, model: nn.Module) -> Tensor:
        """The summed loss of the queries' chosen tokens."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """LoRA's A and B."""
        return self.modules

    def get_attention_mask(self, batch: Row) -> Tensor:
        """Which positions are no padding."""
        return batch[1]


def ekfac(
    model: nn.Module, examples: Sequence[Batch], queries: Sequence[Batch], folder: Path, fitted: int, seed: int
) -> np.ndarray:
    """Scores [queries, examples]; the factors are fitted on `fitted` examples. The model is changed: drop it."""
    torch.manual_seed(seed)  # for the labels that are drawn
    names = [name for name, module in model.named_modules() if ".lora_" in name and isinstance(module, nn.Linear)]
    task = LanguageModelling(names)
    data, asked = Rows(examples), Rows(queries)
    drawn = np.random.default_rng(seed).permutation(len(examples))[:fitted]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*GradScaler.*", FutureWarning)  # kronfluence 1.0.1 with torch 2.13; 2026-11
        analyzer = Analyzer(
            "ekfac", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder)
        )
        _fit(analyzer, Rows([examples[number] for number in drawn]))
        found = _scored(analyzer, asked, data)
    scores = np.empty_like(found)
    scores[np.ix_(asked.order, data.order)] = found
    return scores


def _fit(analyzer: Analyzer, data: Rows) -> None:
    """Covariances, eigenvectors and eigenvalues, unless the folder has them."""
    most = len(data)
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=data,
        per_device_batch_size=8,
        factor_args=FactorArguments(strategy="ekfac", lambda_max_examples=most, covariance_max_examples=most),
        dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
    )


def _scored(analyzer: Analyzer, queries: Rows, data: Rows) -> np.ndarray:
    """Scores in the orders of `queries` and `data`; all queries share one pass over the data."""
    steps = len(queries) // 4 + 1
    analyzer.compute_pairwise_scores(
        scores_name="scores",
        factors_name="factors",
        query_dataset=queries,
        train_dataset=data,
        per_device_query_batch_size=4,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None, query_gradient_accumulation_steps=steps),
        dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
