"""EK-FAC (arXiv 2308.03296) over the LoRA layers, factors by kronfluence: the strongest peer.

Covariances and eigenvalues of the true Fisher, with labels drawn from the model; damping is kronfluence's own, a tenth
of the mean eigenvalue of each layer. Factors are kept in a folder, for an interrupted run to go on from.
`curvature.py` applies them to the whole gradients on disk, as kronfluence would to its own gradients.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    HEURISTIC_DAMPING_SCALE,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from bench.evidence.curvature import Eigenbasis
from rapidindex.gradients.losses import Batch, example_losses

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
    """Pad a batch on the right."""
    longest = max(ids.shape[1] for ids, _, _ in rows)
    return tuple(
        torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts]) for parts in zip(*rows, strict=True)
    )


class LanguageModelling(Task):
    """The package's loss of an example, for training and for measuring."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: Row, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the batch's summed loss; with `sample`, that of labels drawn from the model."""
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
        """Return the summed loss of the queries' chosen tokens."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the names of LoRA's A and B."""
        return self.modules

    def get_attention_mask(self, batch: Row) -> Tensor:
        """Return the mask of the positions that are not padding."""
        return batch[1]


def prepared(model: nn.Module, folder: Path) -> Analyzer:
    """Return kronfluence's analyzer of LoRA's A and B. It changes the model: drop it afterwards."""
    names = [name for name, module in model.named_modules() if ".lora_" in name and isinstance(module, nn.Linear)]
    task = LanguageModelling(names)
    return Analyzer("ekfac", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder))


def fit(analyzer: Analyzer, examples: Sequence[Batch], fitted: int, seed: int) -> dict[str, Eigenbasis]:
    """Return each parameter's eigenbasis, fitted on `fitted` of the examples or read from the analyzer's folder."""
    torch.manual_seed(seed)  # for the labels that are drawn
    drawn = np.random.default_rng(seed).permutation(len(examples))[:fitted]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*GradScaler.*", FutureWarning)  # kronfluence 1.0.1 with torch 2.13; 2026-11
        analyzer.fit_all_factors(
            factors_name="factors",
            dataset=Rows([examples[number] for number in drawn]),
            per_device_batch_size=8,
            factor_args=FactorArguments("ekfac", lambda_max_examples=fitted, covariance_max_examples=fitted),
            dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
        )
    factors = analyzer.load_all_factors("factors")
    bases = {}
    for name, total in factors[LAMBDA_MATRIX_NAME].items():
        eigenvalues = total.float() / factors[NUM_LAMBDA_PROCESSED][name]
        eigenvalues += HEURISTIC_DAMPING_SCALE * eigenvalues.mean()
        vectors = (factors[kind][name].float() for kind in (GRADIENT_EIGENVECTORS_NAME, ACTIVATION_EIGENVECTORS_NAME))
        bases[f"{name}.weight"] = Eigenbasis(*vectors, eigenvalues)
    return bases
