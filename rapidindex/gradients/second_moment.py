"""Second-moment corrections, applied to per-example gradients before they are normalised.

Each entry is divided by (v + 1e-3 · mean(v))^½. v is the mean squared gradient over a sample of training examples at
the same checkpoint, or Adam's or Adafactor's bias-corrected second moment from a training checkpoint (TrackStar's
optimizer correction, arXiv 2410.17413). `kronecker` divides along each layer's eigenvectors, and adds a tenth of the
layer's mean instead. A preconditioner applies the correction; `preconditioner_of` names its class.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rapidindex.errors import DamagedIndex, ModelError
from rapidindex.gradients.eigenbases import Eigenbases, estimate_eigenbases, vector_entries
from rapidindex.gradients.losses import Batch, Layer, trainable, with_drawn_labels
from rapidindex.gradients.per_example import PerExampleGradients

DAMPING = 1e-3
KRONECKER_DAMPING = 0.1
_CHUNK = 2**20  # entries summed in double precision at a time

Track = Callable[[Sequence[Batch], str], Iterable[Batch]]
"""Yields the batches of a pass over the sample, and reports the progress of the pass, which is named."""


class Preconditioner:
    """The identity, and what the others share: they correct the gradients of one layer at a time."""

    sample_passes = 0
    """Passes over the sample that `estimate` makes."""

    def __init__(self, layers: Sequence[Layer], factors: Tensor | None = None, vectors: Tensor | None = None) -> None:
        self.layers, self.factors = layers, factors

    @staticmethod
    def vector_entries(layers: Sequence[Layer]) -> int:
        """Count the entries of the eigenvectors that are stored beside v."""
        return 0

    @staticmethod
    def factors_of(v: Float[Tensor, " size"], layers: Sequence[Layer]) -> Float[Tensor, " size"] | None:
        """Return the factor of each gradient entry, float32 [|v|]; None for the identity."""
        return None

    @classmethod
    def estimate(
        cls, gradients: PerExampleGradients, sample: Sequence[Batch], seed: int, track: Track
    ) -> tuple[Float[Tensor, " size"], Float[Tensor, " entries"] | None]:
        """Return v and the eigenvectors along which it was taken, None for the axes. ModelError if v has no value."""
        return estimate_second_moment(gradients, track(sample, "second moment")), None

    def apply(self, number: int, gradients: Float[Tensor, "examples n"]) -> None:
        """Correct the gradients of layer `number` in place."""


class Diagonal(Preconditioner):
    """Multiplies each entry by (v + 1e-3 · mean(v))^-½."""

    sample_passes = 1

    @staticmethod
    def factors_of(v: Float[Tensor, " size"], layers: Sequence[Layer]) -> Float[Tensor, " size"]:
        """Return (v + 1e-3 · mean(v))^-½, float32 [|v|]."""
        return correction(v)

    def apply(self, number: int, gradients: Float[Tensor, "examples n"]) -> None:
        """Correct the gradients of layer `number` in place."""
        gradients.mul_(self._factors(number))

    def _factors(self, number: int) -> Tensor:
        layer = self.layers[number]
        return self.factors[layer.start : layer.start + layer.size]


class Eigenbasis(Diagonal):
    """Multiplies the entries along each layer's eigenvectors by (v + 0.1 · the layer's mean of v)^-½."""

    sample_passes = 2

    def __init__(self, layers: Sequence[Layer], factors: Tensor, vectors: Tensor | None) -> None:
        super().__init__(layers, factors)
        if vectors is None or len(vectors) != vector_entries(layers):
            raise DamagedIndex(
                "The index does not hold the eigenvectors of this model's layers.",
                hint="Type `rapidindex check INDEX`.",
            )
        self.bases = Eigenbases(layers, vectors)

    vector_entries = staticmethod(vector_entries)

    @staticmethod
    def factors_of(v: Float[Tensor, " size"], layers: Sequence[Layer]) -> Float[Tensor, " size"]:
        """Return (v + 0.1 · the layer's mean of v)^-½, float32 [|v|], along the eigenvectors."""
        return kronecker_correction(v, [layer.size for layer in layers])

    @classmethod
    def estimate(
        cls, gradients: PerExampleGradients, sample: Sequence[Batch], seed: int, track: Track
    ) -> tuple[Float[Tensor, " size"], Float[Tensor, " entries"]]:
        """Return v and the eigenvectors from the loss of tokens that the model draws, by `seed`.

        With the data's own tokens the correction would take out of the gradients what the sample itself taught.
        """
        numbered = enumerate(track(sample, "draw tokens"))
        batches = [with_drawn_labels(gradients.model, batch, 2**20 * seed + number) for number, batch in numbered]
        vectors = estimate_eigenbases(gradients, track(batches, "eigenvectors"))
        bases = Eigenbases(gradients.layers, vectors.to(batches[0].input_ids.device))
        return estimate_second_moment(gradients, track(batches, "second moment"), bases), vectors

    def apply(self, number: int, gradients: Float[Tensor, "examples n"]) -> None:
        """Correct the gradients of layer `number` in place."""
        rotated = self.bases.to_eigenbasis(number, gradients) * self._factors(number)
        gradients.copy_(self.bases.from_eigenbasis(number, rotated))


def preconditioner_of(second_moment: str) -> type[Preconditioner]:
    """Return the class for a value of `GradientConfig.second_moment`."""
    return {"none": Preconditioner, "kronecker": Eigenbasis}.get(second_moment, Diagonal)


def correction(second_moment: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """Return the factor (v + 1e-3 · mean(v))^-½ of each gradient entry; 1 everywhere where v is zero everywhere."""
    mean = sum(part.double().sum().item() for part in second_moment.split(_CHUNK)) / len(second_moment)
    return (second_moment + DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(second_moment)


def kronecker_correction(second_moment: Float[Tensor, " size"], sizes: Sequence[int]) -> Float[Tensor, " size"]:
    """Return the factor (v + 0.1 · mean(v))^-½ of each entry along its layer's eigenvectors, with the layer's mean."""
    parts = []
    for v in second_moment.split(list(sizes)):
        mean = float(v.double().mean())
        parts.append((v + KRONECKER_DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(v))
    return torch.cat(parts)


def estimate_second_moment(
    gradients: PerExampleGradients, batches: Iterable[Batch], eigenbases: Eigenbases | None = None
) -> Float[Tensor, " size"]:
    """Return the mean squared gradient over the examples of `batches`, along `eigenbases` where they are given.

    A batch with a gradient that is not finite is left out. ModelError where no batch is left.
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
    """Read Adam's or Adafactor's bias-corrected second moment from a Trainer checkpoint folder or its `optimizer.pt`.

    ModelError where the file is missing, or is not the state of an optimizer of this model's trainable parameters.
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
    states = {
        name: (state.get(number), group)
        for number, name, group in zip(numbers, names, _group_of_each(groups), strict=True)
    }
    return torch.cat([_second_moment(layer.name, *states[layer.name], parameters[layer.name]) for layer in layers])


def _names_by_group(model: nn.Module, parameters: dict[str, nn.Parameter], groups: int) -> list[str]:
    """Return the trainable names in the optimizer's order: Trainer's second group has no weight decay."""
    if groups == 1:
        return list(parameters)
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return [n for n in parameters if n in decayed] + [n for n in parameters if n not in decayed]


def _group_of_each(groups: list[dict]) -> Iterable[dict]:
    """Yield the group of each parameter."""
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
