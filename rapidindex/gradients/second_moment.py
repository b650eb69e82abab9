"""Second-moment corrections, applied to per-example gradients before they are normalised.

Each entry is divided by (v + 1e-3 · mean(v))^½. v is the mean squared gradient over a sample of training examples at
the same checkpoint, or Adam's or Adafactor's bias-corrected second moment from a training checkpoint (TrackStar's
optimizer correction, arXiv 2410.17413). `kronecker` divides along each layer's leading eigenvectors, and adds a tenth
of the layer's mean instead. `factored` is Adafactor's: v of a weight is the outer product of its row and column means,
which takes no |v| numbers, and corrects gradients that come as factors; `kfac` does so along eigenvectors. A
preconditioner applies the correction; `preconditioner_of` names its class.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rapidindex.errors import DamagedIndex, ModelError
from rapidindex.gradients.eigenbases import (
    Eigenbases,
    Kept,
    estimate_eigenbases,
    leading,
    leading_eigenvectors,
    moment_entries,
    moment_sizes,
    of_short,
    product_entries,
    products_of_sides,
    random_columns,
    sides_of,
    sizes_of_sides,
    vector_entries,
    whole,
)
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import Batch, Layer, trainable
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.recipe import Recipe

DAMPING = 1e-3
KRONECKER_DAMPING = 0.1
KFAC_DAMPING = 2.0
"""Of either side's mean eigenvalue."""
KEPT_BYTES = 2**30
"""Gradients of a sample that are kept from its first pass to the next, at most."""
_CHUNK = 2**20  # entries summed in double precision at a time

Track = Callable[[Sequence[Batch], str], Iterable[Batch]]
"""Yields the batches of a pass over the sample, and reports the progress of the pass, which is named."""


class Preconditioner:
    """The identity, and what the others share: they correct the gradients of one layer at a time."""

    takes_factors = True
    """Whether `apply` takes gradients as factors, too."""
    moment_of_means = False
    """Whether the second moment consists of means, and has not an entry for each parameter."""

    def __init__(self, layers: Sequence[Layer], factors: Tensor | None = None, vectors: Tensor | None = None) -> None:
        self.layers, self.factors = layers, factors

    @staticmethod
    def moment_entries(layers: Sequence[Layer]) -> int:
        """Count the entries of the second moment that is stored."""
        return 0

    @staticmethod
    def vector_entries(layers: Sequence[Layer]) -> int:
        """Count the entries of the eigenvectors that are stored beside it."""
        return 0

    @staticmethod
    def sample_passes(layers: Sequence[Layer], examples: int) -> int:
        """Return the number of passes over a sample of so many `examples` that `estimate` makes, with gradients."""
        return 1

    @staticmethod
    def sample_bytes(layers: Sequence[Layer], examples: int) -> int:
        """Return the bytes of what `estimate` holds beside the gradients of a batch and the moment itself."""
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

    def apply(self, number: int, gradients: Float[Tensor, "examples n"] | Factors) -> Tensor | Factors:
        """Return the corrected gradients of layer `number`; a tensor is corrected in place."""
        return gradients


class Diagonal(Preconditioner):
    """Multiplies each entry by (v + 1e-3 · mean(v))^-½."""

    takes_factors = False

    @staticmethod
    def moment_entries(layers: Sequence[Layer]) -> int:
        """Return |v|."""
        return sum(layer.size for layer in layers)

    @staticmethod
    def factors_of(v: Float[Tensor, " size"], layers: Sequence[Layer]) -> Float[Tensor, " size"]:
        """Return (v + 1e-3 · mean(v))^-½, float32 [|v|]."""
        return correction(v)

    def apply(self, number: int, gradients: Float[Tensor, "examples n"]) -> Tensor:
        """Return the corrected gradients of layer `number`, corrected in place."""
        return gradients.mul_(self._factors(number))

    def _factors(self, number: int) -> Tensor:
        layer = self.layers[number]
        return self.factors[layer.start : layer.start + layer.size]


class Eigenbasis(Preconditioner):
    """Multiplies the parts along each layer's eigenvectors by (v + 0.1 · the layer's mean squared gradient)^-½."""

    takes_factors = False
    moment_of_means = True
    moment_entries = staticmethod(moment_entries)
    kept = staticmethod(leading)
    """The eigenvectors of a side that a new index has."""

    def __init__(self, layers: Sequence[Layer], factors: Tensor, vectors: Tensor | None) -> None:
        super().__init__(layers, factors)
        self._parts, kept = self._split(factors)
        if vectors is None or len(vectors) != vector_entries(layers, kept):
            raise _other_layers()
        self.bases = Eigenbases(layers, vectors, kept)

    def _split(self, factors: Tensor) -> tuple[Sequence[Any], Kept]:
        """Return the factors of each layer, and the eigenvectors that they are along."""
        kept = _kept_in(factors, self.layers)
        return factors.split(moment_sizes(self.layers, kept)), kept

    @classmethod
    def vector_entries(cls, layers: Sequence[Layer]) -> int:
        """Count the entries of the eigenvectors."""
        return vector_entries(layers, cls.kept)

    @staticmethod
    def sample_passes(layers: Sequence[Layer], examples: int) -> int:
        """Return 1 where the gradients of the sample are kept, else 2."""
        return 1 if kept_bytes(layers, examples) else 2

    @classmethod
    def sample_bytes(cls, layers: Sequence[Layer], examples: int) -> int:
        """Return the bytes of the products that eigenvectors are found from, and of the gradients that are kept."""
        return 4 * product_entries(layers, cls.kept) + kept_bytes(layers, examples)

    @staticmethod
    def factors_of(v: Float[Tensor, " entries"], layers: Sequence[Layer]) -> Float[Tensor, " entries"]:
        """Return (v + 0.1 · the layer's mean squared gradient)^-½ of each entry of v."""
        return kronecker_correction(v, layers, _kept_in(v, layers))

    @classmethod
    def estimate(
        cls, gradients: PerExampleGradients, sample: Sequence[Batch], seed: int, track: Track
    ) -> tuple[Float[Tensor, " entries"], Float[Tensor, " entries"]]:
        """Return v and the eigenvectors from the loss of tokens that the model draws by `seed`, however it is batched.

        With the data's own tokens the correction would take out of the gradients what the sample itself taught.
        """
        batches = drawn_sample(sample, seed)
        once, layers = _Kept(gradients, batches), gradients.layers
        vectors = estimate_eigenbases(once, track(batches, "eigenvectors"), seed, cls.kept)
        bases = Eigenbases(layers, vectors.to(batches[0].input_ids.device), cls.kept)
        sizes = moment_sizes(layers, cls.kept)
        return mean_over_sample(once, track(batches, "second moment"), bases.squares, sizes), vectors

    def apply(self, number: int, gradients: Float[Tensor, "examples n"]) -> Tensor:
        """Return the corrected gradients of layer `number`, corrected in place."""
        return self.bases.multiply(number, gradients, self._parts[number])


def drawn_sample(sample: Sequence[Batch], seed: int) -> list[Batch]:
    """Return the sample with labels that its first pass draws from the model, the same however it is batched."""
    firsts = accumulate(map(len, sample), initial=0)
    return [batch.with_drawn_labels(seed, first) for batch, first in zip(sample, firsts, strict=False)]


class Kfac(Eigenbasis):
    """Multiplies rows by (G + 2 · its mean eigenvalue)^-½ and columns by (A + 2 · its mean eigenvalue)^-½.

    K-FAC's A and G (arXiv 1503.05671), as the mean gᵀ g and g gᵀ over the sample: where the Fisher matrix is A ⊗ G they
    are these but for a number (arXiv 2406.17748), and every parameter has them, however its gradient is computed. The
    leading eigenvectors of a side have a second moment each, and the rest one. A vector is a column; a vocabulary's
    side keeps its axes.
    """

    takes_factors = True
    sample_passes = staticmethod(Preconditioner.sample_passes)
    kept = staticmethod(of_short)

    def _split(self, factors: Tensor) -> tuple[Sequence[Any], Kept]:
        if len(factors) != self.moment_entries(self.layers):
            raise _other_layers()
        return _pairs(factors, map(_groups_of, self.layers)), of_short

    @staticmethod
    def moment_entries(layers: Sequence[Layer]) -> int:
        """Count the groups of the rows and columns of all layers."""
        return sum(map(sum, map(_groups_of, layers)))

    @staticmethod
    def factors_of(v: Float[Tensor, " entries"], layers: Sequence[Layer]) -> Float[Tensor, " entries"]:
        """Return (R + 2 · mean)^-½ and (C / mean + 2)^-½ of each layer, R and C its means in the groups of a side."""
        parts = []
        for layer, (R, C) in zip(layers, _pairs(v, map(_groups_of, layers)), strict=True):
            rows, columns = sides_of(layer, of_short)
            mean = float(R.double() @ rows.counts.double() / rows.length)
            parts.append((R + KFAC_DAMPING * mean).rsqrt() if mean > 0 else torch.ones_like(R))
            parts.append((C / mean + KFAC_DAMPING).rsqrt() if mean > 0 else torch.ones_like(C))
        return torch.cat(parts)

    @staticmethod
    def sample_bytes(layers: Sequence[Layer], examples: int) -> int:
        """Return the bytes of the products that eigenvectors are found from: a batch's, and their sum."""
        return 2 * 4 * sum(sum(sizes_of_sides(layer, of_short)) for layer in layers)

    @classmethod
    def estimate(
        cls, gradients: PerExampleGradients, sample: Sequence[Batch], seed: int, track: Track
    ) -> tuple[Float[Tensor, " entries"], Float[Tensor, " entries"]]:
        """Return the mean of v over each row's and each column's group, and the eigenvectors, of drawn tokens.

        An eigenvalue of a side's product is the sum of v along its eigenvector, so that one pass does.
        """
        layers = gradients.layers
        random, sizes = random_columns(layers, seed, of_short), [sizes_of_sides(layer, of_short) for layer in layers]

        def measure(number: int, values: Tensor | Factors) -> Tensor:
            return products_of_sides(values, layers[number], of_short, random)

        batches = track(drawn_sample(sample, seed), "second moment")
        found = mean_over_sample(gradients, batches, measure, [sum(size) for size in sizes], factored=True)
        means, vectors = [], []
        for layer, part, size in zip(layers, found.split([sum(size) for size in sizes]), sizes, strict=True):
            *products, squares = part.split(size)
            rows, columns = sides_of(layer, of_short)
            for side, other, product in ((rows, columns.length, products[0]), (columns, rows.length, products[1])):
                if not side.kept:
                    means.append(product / other)
                    continue
                U, own = leading_eigenvectors(product.view(side.length, -1), side.kept, random)
                vectors.append(U.flatten().float())
                means.append(own.float() / other)
                if side.groups > side.own:
                    rest = (squares.double() - own.sum()).clamp_min(0)
                    means.append((rest / (side.length - side.own) / other).float())
        return torch.cat(means), torch.cat(vectors) if vectors else torch.empty(0)

    def apply(self, number: int, gradients: Float[Tensor, "examples n"] | Factors) -> Tensor | Factors:
        """Return the corrected gradients of layer `number`; a tensor is corrected in place."""
        rows, columns = (
            partial(self.bases.multiply_side, number, side, factors=factors)
            for side, factors in enumerate(self._parts[number])
        )
        of_rows, of_columns = self.bases.sides[number]
        if isinstance(gradients, Factors) and of_rows.kept:
            return gradients.mapped(rows, columns)
        if isinstance(gradients, Factors):
            return gradients.mapped(None, columns).scaled(self._parts[number][0], torch.ones(()))
        g = columns(gradients.view(-1, of_rows.length, of_columns.length))
        return gradients.copy_(rows(g.mT).mT.flatten(1))


def _groups_of(layer: Layer) -> tuple[int, int]:
    rows, columns = sides_of(layer, of_short)
    return rows.groups, columns.groups


class _Kept:
    """Gradients of a sample's batches, which are computed once where they fit into memory."""

    def __init__(self, gradients: PerExampleGradients, batches: Sequence[Batch]) -> None:
        self.layers, self._gradients = gradients.layers, gradients
        fits = kept_bytes(self.layers, sum(map(len, batches))) > 0
        self._of: dict[int, list[tuple[int, Tensor]]] = {id(batch): [] for batch in batches} if fits else {}

    def __call__(self, batch: Batch, consume: Callable[[int, Tensor], None]) -> None:
        kept = self._of.get(id(batch))
        if kept:
            for number, values in kept:
                consume(number, values)
            return

        def keep(number: int, values: Tensor) -> None:
            if kept is not None:
                kept.append((number, values))
            consume(number, values)

        self._gradients(batch, keep)


def kept_bytes(layers: Sequence[Layer], examples: int) -> int:
    """Return the bytes of a sample's gradients; 0 where they are more than may be kept."""
    size = 4 * examples * sum(layer.size for layer in layers)
    return size if size <= KEPT_BYTES else 0


def _kept_in(v: Tensor, layers: Sequence[Layer]) -> Kept:
    """Return which eigenvectors a second moment is along: those of an earlier version are all, entry by entry."""
    for kept in (leading, whole):
        if len(v) == moment_entries(layers, kept):
            return kept
    raise _other_layers()


def _other_layers() -> DamagedIndex:
    hint = "Type `rapidindex check INDEX`."
    return DamagedIndex("The index does not hold the eigenvectors of this model's layers.", hint=hint)


class RowColumn(Preconditioner):
    """Multiplies each row by (R_i + 1e-3 · mean(v))^-½ and each column by (C_j / mean(C) + 1e-3)^-½.

    R and C are the row and column means of v over a weight, so that v ≈ R Cᵀ / mean(C), as Adafactor has it (arXiv
    1804.04235). The damping of either side is that of `estimate`. Every entry of a vector is a row.
    """

    moment_of_means = True

    def __init__(self, layers: Sequence[Layer], factors: Tensor, vectors: Tensor | None) -> None:
        super().__init__(layers, factors)
        if len(factors) != self.moment_entries(layers):
            raise DamagedIndex(
                "The index does not hold the row and column means of this model's layers.",
                hint="Type `rapidindex check INDEX`.",
            )
        self._sides = _pairs(factors, map(_sides_of, layers))

    @staticmethod
    def moment_entries(layers: Sequence[Layer]) -> int:
        """Count the rows and columns of all layers."""
        return sum(map(sum, map(_sides_of, layers)))

    @staticmethod
    def factors_of(v: Float[Tensor, " entries"], layers: Sequence[Layer]) -> Float[Tensor, " entries"]:
        """Return the factors of the rows and the columns of each layer, in the order of the means in `v`."""
        pairs = _pairs(v, map(_sides_of, layers))
        mean = sum(float(R.double().mean()) * layer.size for (R, _), layer in zip(pairs, layers, strict=True))
        mean /= sum(layer.size for layer in layers)
        parts = []
        for R, C in pairs:
            parts.append((R + DAMPING * mean).rsqrt() if mean > 0 else torch.ones_like(R))
            parts.append((C / C.mean() + DAMPING).rsqrt() if C.any() else torch.ones_like(C))
        return torch.cat(parts)

    @classmethod
    def estimate(
        cls, gradients: PerExampleGradients, sample: Sequence[Batch], seed: int, track: Track
    ) -> tuple[Float[Tensor, " entries"], None]:
        """Return the row and column means of the sample's mean squared gradient."""
        layers = gradients.layers

        def measure(number: int, values: Tensor | Factors) -> Tensor:
            if isinstance(values, Factors):  # one example after another: all of them may not fit into memory
                return sum(row_column_means(values.example(b).dense(), layers[number]) for b in range(len(values)))
            return row_column_means(values, layers[number])

        sizes = [sum(_sides_of(layer)) for layer in layers]
        return mean_over_sample(gradients, track(sample, "second moment"), measure, sizes, factored=True), None

    def apply(self, number: int, gradients: Float[Tensor, "examples n"] | Factors) -> Tensor | Factors:
        """Return the corrected gradients of layer `number`; a tensor is corrected in place."""
        rows, columns = self._sides[number]
        if isinstance(gradients, Factors):
            return gradients.scaled(rows, columns)
        gradients.view(-1, len(rows), len(columns)).mul_(rows.unsqueeze(1)).mul_(columns)
        return gradients


def _sides_of(layer: Layer) -> tuple[int, int]:
    """Return the rows and columns that have means of their own; a vector has rows of one entry."""
    columns = layer.shape[-1] if len(layer.shape) > 1 else 1
    return layer.size // columns, columns


def _pairs(flat: Tensor, sizes: Iterable[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    parts = iter(flat.split([size for pair in sizes for size in pair]))
    return list(zip(parts, parts, strict=True))


def row_column_means(gradients: Float[Tensor, "examples size"], layer: Layer) -> Float[Tensor, " sides"]:
    """Return the row means and column means of one layer's squared gradients, summed over the examples."""
    squares = gradients.view(-1, *_sides_of(layer)).square().sum(0)
    return torch.cat([squares.mean(1), squares.mean(0)])


def preconditioner_of(recipe: Recipe) -> type[Preconditioner]:
    """Return the class of a recipe's correction. Of a training checkpoint, two-sided rows take row and column means."""
    named = {"none": Preconditioner, "estimate": Diagonal, "factored": RowColumn, "kronecker": Eigenbasis, "kfac": Kfac}
    of_checkpoint = RowColumn if recipe.sketch.projection == "two-sided" else Diagonal
    return named.get(recipe.gradient.second_moment, of_checkpoint)


def correction(second_moment: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """Return the factor (v + 1e-3 · mean(v))^-½ of each gradient entry; 1 everywhere where v is zero everywhere."""
    mean = sum(part.double().sum().item() for part in second_moment.split(_CHUNK)) / len(second_moment)
    return (second_moment + DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(second_moment)


def kronecker_correction(
    v: Float[Tensor, " entries"], layers: Sequence[Layer], kept: Kept = leading
) -> Float[Tensor, " entries"]:
    """Return the factor (v + 0.1 · mean)^-½ of each pair of groups, with its layer's mean squared gradient."""
    parts = []
    for part, layer in zip(v.split(moment_sizes(layers, kept)), layers, strict=True):
        rows, columns = sides_of(layer, kept)
        counts = torch.outer(rows.counts, columns.counts).flatten().double()
        mean = float(part.double() @ counts / counts.sum())
        parts.append((part + KRONECKER_DAMPING * mean).rsqrt_() if mean > 0 else torch.ones_like(part))
    return torch.cat(parts)


def estimate_second_moment(gradients: PerExampleGradients, batches: Iterable[Batch]) -> Float[Tensor, " size"]:
    """Return the mean squared gradient over the examples of `batches`. Raises as `mean_over_sample` does."""
    sizes = [layer.size for layer in gradients.layers]
    return mean_over_sample(gradients, batches, lambda _, values: values.square().sum(0), sizes)


def mean_over_sample(
    gradients: PerExampleGradients,
    batches: Iterable[Batch],
    measure: Callable[[int, Tensor], Tensor],
    sizes: Sequence[int],
    **options: bool,
) -> Float[Tensor, " entries"]:
    """Return the mean over the examples of what `measure` sums over a batch, `sizes` numbers for each layer.

    `measure` is given a layer's number and gradients. An example whose gradient is not finite is left out: it has no
    row either. ModelError where none is left, and where a finite gradient's measure is too large for float32.
    """

    def summed(batch: Batch) -> tuple[Tensor, bool]:
        sums, finite = torch.zeros(sum(sizes)), True
        places = sums.split(list(sizes))

        def add(number: int, values: Tensor | Factors) -> None:
            nonlocal finite
            finite = finite and bool(values.isfinite().all())
            places[number].copy_(measure(number, values))

        gradients(batch, add, **options)
        return sums, finite

    total, count = torch.zeros(sum(sizes)), 0
    for batch in batches:
        sums, finite = summed(batch)
        parts = [batch] if sums.isfinite().all() else [batch.example(row) for row in range(len(batch))]
        for part in parts:
            if len(parts) > 1:
                sums, finite = summed(part)
            if sums.isfinite().all():
                total += sums
                count += len(part)
            elif finite:
                raise _too_large(part)
    if count == 0:
        raise ModelError(
            "No example of the sample has a finite gradient, so the second moment cannot be estimated.",
            hint="Check the model, or build with --second-moment none.",
        )
    return total.div_(count)


def _too_large(batch: Batch) -> ModelError:
    name = batch.names[0] if batch.names else "an example of the sample"
    return ModelError(
        f"The square of the gradient of {name} is too large for float32.",
        hint="Check the model and that example, or build with --second-moment none.",
    )


def read_second_moment(
    path: str | Path, model: nn.Module, layers: list[Layer], kind: type[Preconditioner] = Diagonal
) -> Float[Tensor, " entries"]:
    """Read Adam's or Adafactor's bias-corrected second moment from a Trainer checkpoint folder or its `optimizer.pt`.

    For a `RowColumn` it is reduced to row and column means, which are Adafactor's own. ModelError where the file is
    missing, or is not the state of an optimizer of this model's trainable parameters.
    """
    file = Path(path) / "optimizer.pt" if Path(path).is_dir() else Path(path)
    hint = "Give the folder of a training checkpoint that holds optimizer.pt, or `estimate`, `factored` or `none`."
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
    parts = []
    for layer in layers:
        v = _second_moment(layer.name, *states[layer.name], parameters[layer.name])
        parts.append(row_column_means(v.sqrt(), layer) if kind is RowColumn else v)
    return torch.cat(parts)


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
