"""Per-example gradients of a padded batch, one layer at a time, from hooks (a layer is one trainable parameter tensor).

The gradient of a linear layer for example b is Σ_t δ_bt ⊗ x_bt: one batched product of the layer's inputs x and the
gradients δ of its outputs. Embeddings and norms have rules of their own. `PerExampleGradients` compares its first batch
with autograd. Where the comparison fails, or a trainable parameter has no rule, gradients are computed one example at a
time: slower, and right for any model. Knows nothing of sketches or files.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rapidindex.gradients.losses import Batch, example_losses, layers_of, only_logits_at, positions_used, trainable

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative error from which a batched gradient counts as wrong (a wrong rule is off by about 1)."""

_SUMS = 4096
"""Numbers that stand for a layer's gradient in the comparison: they give an error's length within a few per cent."""


Consume = Callable[[int, Tensor], None]
"""Receives a layer's number and its gradients, float [examples, size]; may change them in place."""


class PerExampleGradients:
    """Computes per-example gradients of one model.

    `batched` is False where they are computed one example at a time; `unbatched` then names the parameters that have no
    rule, or a wrong one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = layers_of(model)
        self._parameters = list(trainable(model).values())
        self._rules = _rules_of(model)
        covered = {id(parameter) for rule in self._rules.values() for parameter in rule}
        self.unbatched = [
            layer.name
            for layer, parameter in zip(self.layers, self._parameters, strict=True)
            if id(parameter) not in covered
        ]
        self.batched = not self.unbatched
        self._checked = False

    def __call__(self, batch: Batch, consume: Consume) -> Float[Tensor, " examples"]:
        """Pass every layer's gradients, float [examples, size], to `consume` once.

        Return the losses, float32 [examples].
        """
        if self.batched and not self._checked and len(batch) > 1:
            self._check(batch)
        if self.batched and self._checked:
            return self._batched(batch, consume)
        return self._single(batch, consume) if len(batch) == 1 else self._one_by_one(batch, consume)

    @contextmanager
    def forward(self, batch: Batch, consume: Consume) -> Iterator[tuple[Tensor, "_Recorder"]]:
        """Yield the losses, float32 [examples], and keep what the batched backward pass needs within the block."""
        positions = positions_used(batch.weights)
        narrowed = only_logits_at(self.model, positions)
        with torch.enable_grad(), _Recorder(self, len(batch), consume) as recorder, narrowed as is_narrow:
            yield example_losses(self.model, batch, positions if is_narrow else None), recorder

    def _batched(self, batch: Batch, consume: Consume) -> Tensor:
        with self.forward(batch, consume) as (losses, recorder):
            losses.sum().backward()
            recorder.flush()
        return losses.detach()

    def _single(self, batch: Batch, consume: Consume) -> Tensor:
        """Compute one example by autograd, and pass each layer's gradient on as soon as it is complete."""
        missing = dict(enumerate(self.layers))

        def pass_on(parameter: nn.Parameter, number: int) -> None:
            gradient, parameter.grad = parameter.grad, None
            del missing[number]
            consume(number, gradient.float().reshape(1, -1))

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(pass_on, number=number))
            for number, parameter in enumerate(self._parameters)
        ]
        try:
            with torch.enable_grad():
                losses = example_losses(self.model, batch)
                losses.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        for number, layer in missing.items():
            consume(number, torch.zeros(1, layer.size, device=losses.device))
        return losses.detach()

    def _one_by_one(self, batch: Batch, consume: Consume) -> Tensor:
        collected: list[list[Tensor]] = [[] for _ in self.layers]
        losses = [
            self._single(batch.example(row), lambda number, gradient: collected[number].append(gradient))
            for row in range(len(batch))
        ]
        for number, gradients in enumerate(collected):
            consume(number, torch.cat(gradients))
        return torch.cat(losses)

    def _check(self, batch: Batch) -> None:
        """Compare the batched gradients of the shortest and the longest example with autograd's, layer by layer.

        The loss is of all tokens: the gradient of a single token that is all but certain is mostly rounding.
        """
        lengths = batch.attention.sum(1)
        rows = [int(lengths.argmin()), int(lengths.argmax())]
        rows[1] = rows[1] if rows[1] != rows[0] else (rows[0] + 1) % len(batch)
        ids, attention = (part[rows, : int(lengths.max())] for part in (batch.input_ids, batch.attention))
        pair = Batch(ids, attention, attention / attention.sum(1, keepdim=True))
        ours: dict[int, Tensor] = {}
        try:
            self._batched(pair, lambda number, gradient: ours.__setitem__(number, _digest(gradient)))
        except _NoRule as reason:
            self.unbatched = [str(reason)]
        tolerance = TOLERANCE[next(p.dtype for p in self.model.parameters() if p.is_floating_point())]
        for row in range(2 if ours else 0):
            self._single(
                pair.example(row),
                lambda n, truth, row=row: self._compare(n, ours[n][row], truth, tolerance),
            )
        self.batched = not self.unbatched
        self._checked = True

    def _compare(self, number: int, ours: Tensor, truth: Tensor, tolerance: float) -> None:
        truth = _digest(truth)[0]
        error = (ours - truth).norm()
        # Gradients that are pure rounding (a key's bias, say) have no relative error worth the name.
        if error > tolerance * truth.norm() and error > 1e-7 * self.layers[number].size ** 0.5:
            self.unbatched.append(self.layers[number].name)


def _digest(gradients: Float[Tensor, "examples size"]) -> Float[Tensor, "examples sums"]:
    """Return a few signed sums of the entries, of nearly the same length, so that all layers fit into memory.

    Changes the entries in place.
    """
    examples, size = gradients.shape
    if size <= _SUMS:
        return gradients.clone()
    generator = torch.Generator(gradients.device).manual_seed(size)
    signs = torch.randint(0, 2, (size,), generator=generator, device=gradients.device, dtype=torch.int8)
    padded = F.pad(gradients.mul_(2 * signs - 1), (0, -size % _SUMS))
    return padded.view(examples, _SUMS, -1).sum(2)


class _NoRule(Exception):
    """A module was called in a way that its rule does not cover."""


class _Recorder:
    """While open, hooks on the modules pass each layer's gradients on as soon as they are complete."""

    def __init__(self, owner: PerExampleGradients, examples: int, consume: Consume) -> None:
        self.owner, self.examples, self.consume = owner, examples, consume
        self.numbers = {id(parameter): number for number, parameter in enumerate(owner._parameters)}
        self.calls = [0] * len(owner.layers)
        self.partial: list[Tensor | None] = [None] * len(owner.layers)
        self.replaying = False
        self.handles: list = []

    def __enter__(self) -> "_Recorder":
        for parameter in self.owner._parameters:
            # Autograd then spends nothing on the batch's summed gradients, which are not used.
            parameter.requires_grad_(False)
        embeddings = {module for module in self.owner._rules if isinstance(module, nn.Embedding)}
        for module in embeddings | {self.owner.model.get_input_embeddings()}:
            self.handles.append(module.register_forward_hook(self._start_graph))
        for module in self.owner._rules:
            self.handles.append(module.register_forward_hook(self._record_call))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter in self.owner._parameters:
            parameter.requires_grad_(True)

    def _start_graph(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Start the graph at an embedding's output, a copy for each example (positions are often looked up once)."""
        return None if self.replaying else output.expand(self.examples, *output.shape[1:]).detach().requires_grad_()

    def flush(self) -> None:
        """Pass on the layers whose gradient is zero, or waits for calls that the loss does not depend on."""
        for number, layer in enumerate(self.owner.layers):
            if self.calls[number] >= 0:
                whole = self.partial[number]
                device = self.owner._parameters[number].device
                self._emit(number, torch.zeros(self.examples, layer.size, device=device) if whole is None else whole)

    def _record_call(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.replaying:
            return
        rule = self.owner._rules[module]
        if not inputs or not isinstance(output, Tensor) or len(output) != self.examples:
            raise _NoRule(f"a {type(module).__name__} that does not see the examples one after another")
        if not output.requires_grad:
            return
        for parameter in rule:
            self.calls[self.numbers[id(parameter)]] += 1
        x = inputs[0].detach().expand(self.examples, *inputs[0].shape[1:])
        output.register_hook(lambda delta: self._receive(module, x, delta))

    def _receive(self, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        with torch.no_grad():
            for parameter, name in self.owner._rules[module].items():
                number = self.numbers[id(parameter)]
                partial = self.partial[number]
                if type(module) is nn.Embedding:  # large and nearly empty: only its rows are added
                    self.partial[number] = _embedding(module, x, delta.detach(), partial)
                else:
                    gradient = self._gradient(module, name, x, delta.detach()).reshape(self.examples, -1).float()
                    self.partial[number] = gradient if partial is None else partial.add_(gradient)
                self.calls[number] -= 1
                if self.calls[number] == 0:
                    self._emit(number, self.partial[number])

    def _emit(self, number: int, gradient: Tensor) -> None:
        self.partial[number] = None
        self.calls[number] = -1
        self.consume(number, gradient)

    def _gradient(self, module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Tensor:
        if type(module) in (nn.Linear, Conv1D):
            return _linear(module, name, x.to(delta.dtype), delta)
        self.replaying = True
        try:
            return torch.cat([_replay(module, name, x[b : b + 1], delta[b : b + 1]) for b in range(self.examples)])
        finally:
            self.replaying = False


def _rules_of(model: nn.Module) -> dict[nn.Module, dict[nn.Parameter, str]]:
    """Return the modules whose own trainable parameters have a batched rule, with the parameters' names in them."""
    rules = {}
    for module in model.modules():
        own = {p: name for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if own and (isinstance(module, nn.Embedding) or type(module) in (nn.Linear, Conv1D) or _is_norm(module)):
            rules[module] = own
    return rules


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and all(p.dim() == 1 for p in module.parameters())


def _linear(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Tensor:
    x, delta = x.flatten(1, -2), delta.flatten(1, -2)
    if name == "bias":
        return delta.float().sum(1)
    first, second = (x, delta) if type(module) is Conv1D else (delta, x)
    return first.transpose(1, 2) @ second


def _embedding(module: nn.Embedding, ids: Tensor, delta: Tensor, partial: Tensor | None) -> Tensor:
    """Return the gradients [examples, size], added to `partial`, which a tied layer may have made already."""
    weight = module.weight
    gradient = torch.zeros(len(ids), weight.numel(), device=delta.device) if partial is None else partial
    kept = delta.float() if module.padding_idx is None else delta.float() * (ids != module.padding_idx).unsqueeze(-1)
    for row in range(len(ids)):
        gradient[row].view_as(weight).index_add_(0, ids[row], kept[row])
    return gradient


def _replay(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Tensor:
    """Run the module once more for the gradient of one example: norms and scaled embeddings are cheap."""
    with torch.enable_grad():
        parameter = getattr(module, name).detach().requires_grad_()
        output = torch.func.functional_call(module, {name: parameter}, (x,))
        return torch.autograd.grad(output, parameter, delta)[0].unsqueeze(0)
