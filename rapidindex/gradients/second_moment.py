"""The second-moment correction: each gradient entry divided by (v + 1e-3 · mean(v))^½ before it is normalised.

v is the mean squared gradient over a sample of training examples at the same checkpoint, or Adam's or Adafactor's
bias-corrected second moment from a training checkpoint (TrackStar's optimizer correction, arXiv 2410.17413). With
`kronecker` entries are those along each layer's eigenvectors, and a tenth of the layer's mean is added instead.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rapidindex.errors import ModelError
from rapidindex.gradients.eigenbases import Eigenbases
from rapidindex.gradients.losses import Batch, Layer, trainable
from rapidindex.gradients.per_example import PerExampleGradients

DAMPING = 1e-3
KRONECKER, KRONECKER_DAMPING = "kronecker", 0.1
_CHUNK = 2**20  # entries summed in double precision at a time


def correction(second_moment: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """The factor (v + 1e-3 · mean(v))^-½ of each gradient entry; 1 everywhere if v is zero everywhere."""
    mean = sum(part.double().sum().item() for part in second_moment.split(_CHUNK)) / len(second_moment)
    return (second_moment + DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(second_moment)


def kronecker_correction(second_moment: Float[Tensor, " size"], sizes: Sequence[int]) -> Float[Tensor, " size"]:
    """The factor (v + 0.1 · mean(v))^-½ of each entry along its layer's eigenvectors; the mean is the layer's own."""
    parts = []
    for v in second_moment.split(list(sizes)):
        mean = float(v.double().mean())
        parts.append((v + KRONECKER_DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(v))
    return torch.cat(parts)


def estimate_second_moment(
    gradients: PerExampleGradients, batches: Iterable[Batch], eigenbases: Eigenbases | None = None
) -> Float[Tensor, " size"]:
    """The mean squared gradient over the examples of `batches`, along `eigenbases` where they are given.

    Examples whose gradient is not finite are left out.
    """
    layers = gradients.layers
    total = torch.zeros(layers[-1].start + layers[-1].size)
    count = 0
    for batch in batches:
        finite = torch.ones(len(batch), dtype=torch.bool)
        squares = torch.zeros_like(total)

        def add(number: int, values: Tensor, squares: Tensor = squares, finite: Tensor = finite) -> None:
            finite &= values.isfinite().all(1).cpu()
            layer = layers[number]
            values = values if eigenbases is None else eigenbases.to_eigenbasis(number, values)
            squares[layer.start : layer.start + layer.size] = values.square().sum(0)

        gradients(batch, add)
        if finite.all():
            total += squares
            count += len(batch)
    if count == 0:
        raise ModelError(
            "No example of the sample has a finite gradient, so the second moment cannot be estimated.",
            hint="Check the model, or build with --second-moment none.",
        )
    return total.div_(count)


def read_second_moment(path: str | Path, model: nn.Module, layers: list[Layer]) -> Float[Tensor, " size"]:
    """Adam's or Adafactor's bias-corrected second moment from a Trainer checkpoint folder or its `optimizer.pt`.

    Raises ModelError if the file is missing, or is not the state of an optimizer of this model's trainable parameters.
    """
    file = Path(path) / "optimizer.pt" if Path(path).is_dir() else Path(path)
    hint = "Give the folder of a training checkpoint that holds optimizer.pt, `estimate`, `kronecker` or `none`."
    if not file.is_file():
        raise ModelError(f"--second-moment {path}: there is no optimizer state at {file}.", hint=hint)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        state, groups = saved["state"], saved["param_groups"]
    except Exception as error:  # a file that is no such state fails in as many ways as there are files
        raise ModelError(f"{file} is not an optimizer's saved state ({type(error).__name__}).", hint=hint) from error
    parameters = trainable(model)
    names = _names_by_group(model, parameters, len(groups))
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(names):
        raise ModelError(
            f"{file} holds the state of {len(numbers)} parameters; the model has {len(names)} trainable ones.",
            hint="Take the checkpoint of the same fine-tuning run, or `estimate`.",
        )
    found = {
        name: (state.get(number), group) for number, name, group in zip(numbers, names, _each(groups), strict=True)
    }
    return torch.cat([_second_moment(layer.name, *found[layer.name], parameters[layer.name]) for layer in layers])


def _names_by_group(model: nn.Module, parameters: dict[str, nn.Parameter], groups: int) -> list[str]:
    """Trainable names in the optimizer's order: Trainer puts those without weight decay into a second group."""
    if groups == 1:
        return list(parameters)
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return [n for n in parameters if n in decayed] + [n for n in parameters if n not in decayed]


def _each(groups: list[dict]) -> Iterable[dict]:
    return (group for group in groups for _ in group["params"])


def _second_moment(name: str, state: dict | None, group: dict, parameter: nn.Parameter) -> Tensor:
    hint = "Take the checkpoint of the same fine-tuning run, or `estimate`."
    if state is None:
        raise ModelError(f"The optimizer has no state for {name}.", hint=hint)
    if "exp_avg_sq_row" in state:
        row, column = state["exp_avg_sq_row"].float(), state["exp_avg_sq_col"].float()
        v = row.unsqueeze(-1) * column.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1).clamp_min(1e-30)
    elif "exp_avg_sq" in state:
        v = state["exp_avg_sq"].float()
        if "betas" in group:
            v = v / (1 - group["betas"][1] ** float(state["step"]))
    else:
        raise ModelError(f"The optimizer keeps no second moment of {name}; only Adam's and Adafactor's do.", hint=hint)
    if v.shape != parameter.shape:
        raise ModelError(
            f"The optimizer's state of {name} has shape {tuple(v.shape)}; the parameter has {tuple(parameter.shape)}.",
            hint=hint,
        )
    return v.flatten()
