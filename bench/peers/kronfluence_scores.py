"""kronfluence: it keeps nothing of an example, so one pass over per-example gradients is compared.

    python -m bench.peers.kronfluence_scores --what self|factors ...

`self` is self-influence with the identity for the Hessian: one gradient an example, and its squared length. `factors`
fits EK-FAC on the rows, which comes before its scores; every query then costs a pass over all rows.
"""

import sys
from collections.abc import Callable

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from bench.peers.measuring import Setting, logits_of, main, mean_entropies


class Responses(Task):
    """The mean cross-entropy of the response tokens, summed over a batch."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def compute_train_loss(self, batch: tuple[Tensor, ...], model: nn.Module, sample: bool = False) -> Tensor:
        """Return the loss; with `sample` the labels are drawn from the model, as for the Fisher matrix."""
        input_ids, attention, labels = batch
        logits = logits_of(model, input_ids, attention)
        if sample:
            drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1).view(len(labels), -1)
            labels = torch.cat([labels[:, :1], torch.where(labels[:, 1:] == -100, -100, drawn)], dim=1)
        return mean_entropies(logits, labels).sum()

    def compute_measurement(self, batch: tuple[Tensor, ...], model: nn.Module) -> Tensor:
        """Return the loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the names of the linear modules with a trainable weight."""
        return self.modules

    def get_attention_mask(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the attention mask."""
        return batch[1]


def preparing(what: str) -> Callable:
    """Return the function that prepares one of the two."""

    def prepare(setting: Setting) -> Callable[[list[list[int]]], None]:
        model = setting.model()
        modules = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad and "lm_head" not in name
        ]
        task = Responses(modules)
        analyzer = Analyzer("rows", prepare_model(model, task), task, cpu=True, output_dir=str(setting.out))
        # One item of its data set is one whole batch, so that its batches are those of the others.
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda items: items[0]))
        strategy = "identity" if what == "self" else "ekfac"

        def collect(batches: list[list[int]]) -> None:
            data = [setting.rows.padded(batch) for batch in batches]
            each = {"per_device_batch_size": 1, "overwrite_output_dir": True}
            analyzer.fit_all_factors("factors", data, factor_args=FactorArguments(strategy), **each)
            if what == "self":
                how = {"per_device_train_batch_size": 1, "overwrite_output_dir": True}
                analyzer.compute_self_scores("scores", "factors", data, score_args=ScoreArguments(), **how)

        return collect

    return prepare


if __name__ == "__main__":
    what = sys.argv.pop(sys.argv.index("--what") + 1)
    sys.argv.remove("--what")
    computes = {
        "self": "squared length of each example's gradient of the linear modules; keeps one number a row",
        "factors": "EK-FAC factors of the linear modules, fitted on the rows; keeps nothing of a row",
    }
    about = {"package": "kronfluence", "computes": computes[what], "keeps_rows": False}
    main(f"kronfluence, {what}", preparing(what), about)
