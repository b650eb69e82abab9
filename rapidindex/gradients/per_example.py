"""Per-example gradients of a padded batch, one layer at a time, from hooks (a layer is one trainable parameter tensor).

The gradient of a linear layer for example b is Σ_t δ_bt ⊗ x_bt: one batched product of the layer's inputs x and the
gradients δ of its outputs. Embeddings and norms have rules of their own. `PerExampleGradients` compares each layer with
autograd when a batch first reaches it, and when it first has a gradient. A zero is certain: a parameter that the loss
depends on in a way that no hook sees is found in the graph. Where the comparison fails, or a trainable parameter has no
rule, gradients are computed one example at a time: slower, and right for any model. Knows nothing of sketches or files.

Prefixes of one text, each with the loss of its last token, share the text's forward pass where that is right: attention
is causal, so a prefix has the text's own activations. One backward pass, vectorised over the prefixes, follows.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from rapidindex.errors import ModelError, RapidIndexError
from rapidindex.gradients.factors import Factors
from rapidindex.gradients.losses import (
    Batch,
    example_losses,
    is_out_of_memory,
    layers_of,
    only_logits_at,
    positions_used,
    prefix_losses,
    trainable,
)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative error from which a batched gradient counts as wrong (a wrong rule is off by about 1)."""

_CHECKED = (48, 64)
"""Tokens of the two examples with which the first batch is compared with autograd: one is padded."""

_SUMS = 4096
"""Numbers that stand for a layer's gradient in the comparison: they give an error's length within a few per cent."""


Consume = Callable[[int, Tensor], None]
"""Receives a layer's number and its gradients, float [examples, size]; may change them in place. One that asks for
`factored` gradients receives Factors in the place of a tensor where they are smaller."""


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
        self._unverified = set(range(len(self.layers)))
        self._reached: frozenset[int] = frozenset()
        self._checked = False
        self._shares: bool | None = False if _turns_by_length(model) else None
        """Whether prefixes of one text share its forward pass; None until some were tried."""

    @property
    def batched(self) -> bool:
        """Whether gradients are computed in batches."""
        return not self.unbatched

    def __call__(self, batch: Batch, consume: Consume, *, factored: bool = False) -> Float[Tensor, " examples"]:
        """Pass every layer's gradients, float [examples, size], to `consume` once; with `factored`, some as Factors.

        Return the losses, float32 [examples].
        """
        if self.batched and not self._checked and len(batch) > 1:
            lengths = batch.attention.sum(1)
            self._attempt(self._check, batch, int(lengths.argmin()), int(lengths.argmax()), _CHECKED)
            self._checked = True
        if self.batched and self._checked:
            losses = self._verified(batch, consume, factored)
            if self.batched and self._shares is None and batch.are_prefixes:
                self._try_sharing(batch)
            return losses
        return self._single(batch, consume) if len(batch) == 1 else self._one_by_one(batch, consume)

    @contextmanager
    def forward(
        self, batch: Batch, consume: Consume, *, factored: bool = False
    ) -> Iterator[tuple[Tensor, "_Recorder"]]:
        """Yield the losses, float32 [examples], and keep what the batched backward pass needs within the block."""
        shared = bool(self._shares) and batch.are_prefixes
        with torch.enable_grad(), _Recorder(self, batch, consume, factored, shared) as recorder:
            losses = self._of_prefixes(batch, recorder) if shared else self._of_examples(batch)
            recorder.check_graph(losses)
            yield losses, recorder

    def _of_examples(self, batch: Batch) -> Tensor:
        positions = positions_used(batch.weights)
        with only_logits_at(self.model, positions) as is_narrow:
            return example_losses(self.model, batch, positions if is_narrow else None)

    def _of_prefixes(self, batch: Batch, recorder: "_Recorder") -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' backward passes cannot be vectorised
            return prefix_losses(self.model, batch, recorder.part)

    def _batched(self, batch: Batch, consume: Consume, factored: bool = False, *, rehearsal: bool = False) -> Tensor:
        """Compute a batch; raise _Unseen, before anything is passed on, where it reaches layers that none has reached.

        A `rehearsal`, whose gradients are only compared, may reach them.
        """
        with self.forward(batch, consume, factored=factored) as (losses, recorder):
            reached = frozenset(number for number, calls in enumerate(recorder.calls) if calls)
            if not (rehearsal or reached <= self._reached):
                raise _Unseen(reached - self._reached)
            self._reached |= reached
            recorder.backward(losses)
            recorder.flush()
        return losses.detach()

    def _verified(self, batch: Batch, consume: Consume, factored: bool) -> Tensor:
        """Compute a batch, and compare each layer with autograd when it first has a gradient.

        Where one is wrong, all layers that were not passed on yet are computed one example at a time. Those that were
        passed on have been right in a batch that reached the same modules.
        """
        passed: set[int] = set()
        unseen: dict[int, Tensor] = {}

        def pass_on(number: int, gradient: Tensor | Factors) -> None:
            if number in self._unverified and isinstance(gradient, Factors):
                gradient = gradient.dense()
            if number in self._unverified and _lengths(gradient).max() > self._rounding(number):
                unseen[number] = gradient
            else:
                passed.add(number)
                consume(number, gradient)

        try:
            losses = self._attempt(self._batched, batch, pass_on, factored)
        except _Unseen as unseen_layers:
            self._attempt(self._rehearse, batch, unseen_layers.numbers)
            losses = self._attempt(self._batched, batch, pass_on, factored) if self.batched else None
        if losses is not None and unseen:
            rows = {int(_lengths(gradient).argmax()) for gradient in unseen.values()}
            self._compare({n: _digest(gradient.clone()) for n, gradient in unseen.items()}, batch, sorted(rows))
        if losses is None or not self.batched:
            return self._one_by_one(batch, consume, passed)
        for number, gradient in unseen.items():
            consume(number, gradient)
        return losses

    def _try_sharing(self, batch: Batch) -> None:
        """Find out whether prefixes may share a forward pass: compare two, those of the largest losses, with autograd.

        What the vectorised pass could only do in a loop counts as wrong, too.
        """
        self._shares, ours = True, {}

        def compute() -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*batching rule")
                return self._batched(batch, lambda number, g: ours.__setitem__(number, _digest(g)), rehearsal=True)

        losses = self._attempt(compute)
        if losses is not None:
            self._compare(ours, batch, losses.topk(2).indices.tolist())
        self._shares, self.unbatched = self.batched, []

    def _attempt(self, compute: Callable, *arguments: Any) -> Any:
        """Compute something in batches; return None, and batch nothing any more, where no rule covers what is done.

        Whatever goes wrong but for memory counts as that: what is wrong with the model itself is met once more then.
        """
        try:
            return compute(*arguments)
        except Exception as error:
            if isinstance(error, _Unseen | RapidIndexError) or is_out_of_memory(error):
                raise
            self.unbatched.append(str(error) if isinstance(error, _NoRule) else f"{type(error).__name__}: {error}")
            return None

    def _single(self, batch: Batch, consume: Consume, passed: Collection[int] = ()) -> Tensor:
        """Compute one example by autograd, and pass each layer's gradient on as soon as it is complete."""
        missing = {number: layer for number, layer in enumerate(self.layers) if number not in passed}

        def pass_on(parameter: nn.Parameter, number: int) -> None:
            gradient, parameter.grad = parameter.grad, None
            if missing.pop(number, None):
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                consume(number, dense.float().reshape(1, -1))

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(pass_on, number=number))
            for number, parameter in enumerate(self._parameters)
        ]
        try:
            with torch.enable_grad():
                losses = example_losses(self.model, batch)
                if losses.requires_grad:
                    losses.sum().backward()
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise _impossible(self.model, error) from error
        finally:
            for handle in handles:
                handle.remove()
        for number, layer in missing.items():
            consume(number, torch.zeros(1, layer.size, device=losses.device))
        return losses.detach()

    def _one_by_one(self, batch: Batch, consume: Consume, passed: Collection[int] = ()) -> Tensor:
        """Compute the layers that are not among `passed`, one example at a time."""
        collected: list[list[Tensor]] = [[] for _ in self.layers]
        losses = [
            self._single(batch.example(row), lambda number, gradient: collected[number].append(gradient), passed)
            for row in range(len(batch))
        ]
        for number, gradients in enumerate(collected):
            if gradients:
                consume(number, torch.cat(gradients))
        return torch.cat(losses)

    def _rehearse(self, batch: Batch, numbers: Collection[int]) -> None:
        """Compare the examples in which each of these layers has its largest gradient with autograd."""
        lengths: dict[int, Tensor] = {}

        def measure(number: int, gradient: Tensor) -> None:
            if number in numbers:
                lengths[number] = _lengths(gradient)

        self._batched(_of_all_tokens(batch), measure, rehearsal=True)
        for row in sorted({int(length.argmax()) for length in lengths.values()}):
            self._check(batch, row, row)

    def _check(self, batch: Batch, first: int, second: int, most: tuple[int, ...] = ()) -> None:
        """Compare the batched gradients of two examples, or of so many of their tokens at most, with autograd's.

        The loss is of all tokens: the gradient of a single token that is all but certain is mostly rounding.
        """
        rows = [first, second if second != first else (first + 1) % len(batch)]
        attention = batch.attention[rows]
        for row, tokens in enumerate(most):
            attention[row, tokens:] = 0
        length = int(attention.sum(1).max())
        attention = attention[:, :length]
        pair = _of_all_tokens(Batch(batch.input_ids[rows, :length], attention, attention))
        ours: dict[int, Tensor] = {}
        self._batched(pair, lambda number, gradient: ours.__setitem__(number, _digest(gradient)), rehearsal=True)
        self._compare(ours, pair, [0, 1])

    def _compare(self, ours: dict[int, Tensor], batch: Batch, rows: Sequence[int]) -> None:
        """Compare layers of some examples of a batch, as `_digest` gives them, with autograd.

        A layer is verified where its gradient is more than rounding, and right; where it is wrong, nothing is batched
        any more.
        """
        tolerance = TOLERANCE[next(p.dtype for p in self.model.parameters() if p.is_floating_point())]
        others = set(range(len(self.layers))) - set(ours)
        wrong, right = set(), set()

        def compare(number: int, truth: Tensor, row: int) -> None:
            truth = _digest(truth)[0]
            error = (ours[number][row] - truth).norm()
            if error <= tolerance * truth.norm():
                right.update([number] if truth.norm() > self._rounding(number) else [])
            elif truth.isfinite().all() and not error <= self._rounding(number):
                wrong.add(number)

        for row in rows:
            self._single(batch.example(row), partial(compare, row=row), others)
        self._unverified -= right
        self.unbatched += [self.layers[number].name for number in sorted(wrong)]

    def _rounding(self, number: int) -> float:
        """Return the length up to which a layer's gradient may be pure rounding, as that of a key's bias is."""
        return 1e-7 * self.layers[number].size ** 0.5


def _lengths(gradients: Float[Tensor, "examples size"]) -> Float[Tensor, " examples"]:
    """Return the gradients' lengths; 0 for one that is not finite, with which nothing can be compared."""
    return gradients.norm(dim=1).nan_to_num(0.0, 0.0, 0.0)


def _of_all_tokens(batch: Batch) -> Batch:
    """Return the batch with the mean loss of all of its tokens, the prompt's too."""
    return Batch(batch.input_ids, batch.attention, batch.attention / batch.attention.sum(1, keepdim=True))


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


_ROW_BY_ROW = re.compile(
    r"(ToCopy|Relu|Gelu|Silu|Sigmoid|Tanh|Mul|Add|Sub|Div|Addmm|Mm|Pow|Rsqrt|NativeLayerNorm|Clone)Backward\d"
)
"""Names of steps of the graph that keep the rows of a matrix apart and in their order."""


def _holds_tokens(x: Tensor, examples: int, length: int) -> bool:
    """Return whether the rows of a matrix are certainly the tokens of each example, one example after another.

    They are where the graph leads by steps row by row back to the flattening of [examples, length, …]. A matrix of as
    many rows may hold tokens in another order: those that a router chose for an expert.
    """
    if len(x) != examples * length or x.grad_fn is None:
        return False
    todo = [x.grad_fn]
    while todo:
        node = todo.pop()
        name = node.name()
        if name in ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"):
            if tuple(node._saved_self_sym_sizes[:2]) != (examples, length):
                return False
            continue
        before = [node for node, _ in node.next_functions if node is not None]
        product = name in ("MmBackward0", "AddmmBackward0")
        if not before or not _ROW_BY_ROW.fullmatch(name) or (product and before != [node.next_functions[-2][0]]):
            return False
        todo += before
    return True


_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model raises that cannot be differentiated, or cannot take an example."""


def _impossible(model: nn.Module, error: Exception) -> ModelError:
    """Return the error of a model that fails for one example alone; it names the innermost module that failed."""
    names = {id(module): name for name, module in model.named_modules()}
    failed, trace = type(model).__name__, error.__traceback__
    while trace is not None:
        failed = names.get(id(trace.tb_frame.f_locals.get("self"))) or failed
        trace = trace.tb_next
    lines = str(error).splitlines() or ["no message"]
    return ModelError(
        f"The gradient of an example cannot be computed: {failed} fails ({type(error).__name__}: {lines[0]}).",
        hint="Check that the model computes a loss and its gradient by itself, with these transformers and peft.",
    )


class _NoRule(Exception):
    """A module was called in a way that its rule does not cover."""


class _Unseen(Exception):
    """A batch reaches layers that no batch has reached before."""

    def __init__(self, numbers: frozenset[int]) -> None:
        super().__init__()
        self.numbers = numbers


class _Recorder:
    """While open, hooks on the modules pass each layer's gradients on as soon as they are complete.

    A parameter requires no gradient while a module with a rule for it runs, so that autograd spends nothing on the
    batch's summed gradients, which are not used. Everywhere else it does: a use that no rule sees is then in the graph.

    Of prefixes that have `shared` a forward pass, the model sees one text up to its last hidden states, and the output
    layer sees an example of one position for each.
    """

    def __init__(
        self, owner: PerExampleGradients, batch: Batch, consume: Consume, factored: bool, shared: bool = False
    ) -> None:
        self.owner, self.consume, self.factored = owner, consume, factored
        self.shape = torch.Size([1, batch.input_ids.shape[1]]) if shared else batch.input_ids.shape
        self.examples = self.shape[0]
        self.in_text = shared
        """Whether the calls that are recorded are those of one text for all of its prefixes."""
        self.text: Tensor | None = None
        """The last hidden states of the text, float [1, T, width]."""
        self.starts: list[Tensor] = []
        self.numbers = {id(parameter): number for number, parameter in enumerate(owner._parameters)}
        self.calls = [0] * len(owner.layers)
        self.partial: list[Tensor | Factors | None] = [None] * len(owner.layers)
        self.replaying = False
        self.handles: list = []

    def __enter__(self) -> "_Recorder":
        for module in self.owner._rules:
            self.handles.append(module.register_forward_pre_hook(self._freeze))
        embeddings = {module for module in self.owner._rules if isinstance(module, nn.Embedding)}
        for module in embeddings | {self.owner.model.get_input_embeddings()}:
            self.handles.append(module.register_forward_hook(self._start_graph))
        for module in self.owner._rules:
            self.handles.append(module.register_forward_hook(self._record_call, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter in self.owner._parameters:
            parameter.requires_grad_(True)

    def _freeze(self, module: nn.Module, inputs: tuple) -> None:
        if not self.replaying:
            for parameter in self.owner._rules[module]:
                parameter.requires_grad_(False)

    def _start_graph(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Start the graph at an embedding's output, a copy for each example (positions are often looked up once).

        The copy is no leaf: some models scale it in place. A wrapper's output may have a graph already.
        """
        if self.replaying or output.requires_grad:
            return None
        if output.dim() == 2 and len(output) == self.shape[1]:  # positions, looked up without a batch
            output = output.unsqueeze(0)
        self.starts.append(output.expand(self.examples, *output.shape[1:]).detach().requires_grad_())
        return self.starts[-1].clone()

    def part(self, hidden: Float[Tensor, "1 T width"], positions: Int64[Tensor, " G"]) -> Float[Tensor, "G 1 width"]:
        """Return the hidden states at the prefixes' `positions`, from which on each prefix is an example."""
        self.text, self.positions, self.in_text = hidden, positions.to(hidden.device), False
        self.ends = hidden.detach()[0, self.positions].unsqueeze(1).requires_grad_()
        self.examples, self.shape = len(positions), self.ends.shape[:2]
        return self.ends

    def backward(self, losses: Float[Tensor, " examples"]) -> None:
        """Run the backward pass; of prefixes, first that of the output layer, and then the text's for all of them."""
        if losses.requires_grad:
            losses.sum().backward()
        if self.text is not None:
            text, starts = self.text, self.starts
            deltas = text.new_zeros(self.examples, *text.shape)
            deltas[torch.arange(self.examples, device=text.device), 0, self.positions] = self.ends.grad[:, 0]
            torch.vmap(lambda delta: _some(torch.autograd.grad(text, starts, delta, allow_unused=True)))(deltas)

    def check_graph(self, losses: Tensor) -> None:
        """Raise _NoRule where the losses depend on a parameter in a way that no recorded call tells."""
        todo = [root.grad_fn for root in (losses, self.text) if root is not None and root.grad_fn is not None]
        seen = set(todo)
        while todo:
            node = todo.pop()
            inputs = node.next_functions
            if not inputs and (number := self.numbers.get(id(getattr(node, "variable", None)))) is not None:
                raise _NoRule(f"{self.owner.layers[number].name}, used outside its module")
            new = {before for before, _ in inputs if before is not None} - seen
            seen |= new
            todo += new

    def flush(self) -> None:
        """Pass on the layers whose gradient is zero, or waits for calls that the loss does not depend on."""
        for number, layer in enumerate(self.owner.layers):
            if self.calls[number] >= 0:
                whole = self.partial[number]
                device = self.owner._parameters[number].device
                self._emit(number, torch.zeros(self.examples, layer.size, device=device) if whole is None else whole)

    def _record_call(self, module: nn.Module, inputs: tuple, options: dict, output: Tensor) -> None:
        if self.replaying:
            return
        rule = self.owner._rules[module]
        for parameter in rule:
            parameter.requires_grad_(True)
        own_way = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding  # a mask, a shape, positions
        if not isinstance(output, Tensor) or not (own_way or (len(inputs) == 1 and not options)):
            raise _NoRule(f"a {type(module).__name__} with more than one input or output")
        if not output.requires_grad:
            return
        if own_way:
            self._await(module, (inputs, options), output)
            return
        x = inputs[0].detach()
        if x.dim() == 2 and not isinstance(module, nn.Embedding) and _holds_tokens(inputs[0], *self.shape):
            x = x.unflatten(0, self.shape)
        elif len(output) != self.examples or (x.dim() == 2 and not isinstance(module, nn.Embedding)):
            raise _NoRule(f"a {type(module).__name__} that does not see the examples one after another")
        self._await(module, x, output)

    def _await(self, module: nn.Module, x: Any, output: Tensor) -> None:
        """Wait for the gradient of a call's output. `x` is its input, or all of its arguments: (inputs, options)."""
        for parameter in self.owner._rules[module]:
            self.calls[self.numbers[id(parameter)]] += 1
        receive = partial(self._receive, module, x, self.shape)
        output.register_hook(partial(_receive_all, receive) if self.in_text else receive)

    def _receive(self, module: nn.Module, x: Any, shape: torch.Size, delta: Tensor) -> None:
        if delta.dim() == 2:
            delta = delta.unflatten(0, shape)
        if isinstance(x, Tensor):
            x = x.expand(len(delta), *x.shape[1:])
        with torch.no_grad():
            for parameter, name in self.owner._rules[module].items():
                number = self.numbers[id(parameter)]
                gradient = self._gradient(module, name, x, shape[0], delta.detach())
                self.partial[number] = _sum(self.partial[number], gradient)
                self.calls[number] -= 1
                if self.calls[number] == 0:
                    self._emit(number, self.partial[number])

    def _emit(self, number: int, gradient: Tensor | Factors) -> None:
        self.partial[number] = None
        self.calls[number] = -1
        if isinstance(gradient, Factors) and not (self.factored and gradient.smaller):
            gradient = gradient.dense()
        self.consume(number, gradient)

    def _gradient(self, module: nn.Module, name: str, x: Any, examples: int, delta: Tensor) -> Tensor | Factors:
        """Return the gradients of a parameter; `examples` are those of the arguments in `x`, where it has several."""
        if type(module) is nn.Embedding:
            return _embedding(module, x, delta)
        if type(module) in (nn.Linear, Conv1D):
            return _linear(module, name, x.to(delta.dtype), delta)
        (inputs, options), examples = (x, examples) if isinstance(x, tuple) else (((x,), {}), len(x))
        self.replaying = True
        try:
            calls = (
                ([_of(b, one, examples) for one in inputs], {k: _of(b, one, examples) for k, one in options.items()})
                for b in range(len(delta))
            )
            parts = [_replay(module, name, *call, delta[b : b + 1]) for b, call in enumerate(calls)]
            return torch.cat(parts).reshape(len(delta), -1).float()
        finally:
            self.replaying = False


class _ReceiveAll(torch.autograd.Function):
    """Takes a gradient out of a vectorised backward pass: its rule for that sees the gradients of all prefixes."""

    @staticmethod
    def forward(delta: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        raise _NoRule("a gradient that is the same for all prefixes")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, delta: Tensor, receive: Callable[[Tensor], None]) -> tuple[Tensor, None]:
        rows = delta.movedim(in_dims[0], 0)
        receive(rows.flatten(0, 1) if rows.dim() > 3 else rows)  # [prefixes, 1, T, …], or [prefixes, T, …]
        return delta.new_empty(()), None


def _receive_all(receive: Callable[[Tensor], None], delta: Tensor) -> None:
    """Call `receive`, within a vectorised backward pass, with the gradients of all prefixes."""
    _ReceiveAll.apply(delta, receive)


def _some(gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(gradient for gradient in gradients if gradient is not None)


def _of(example: int, argument: Any, examples: int) -> Any:
    """Return one example's part of a module's argument, which has one for each of `examples` or is the same for all."""
    parted = examples > 1 and isinstance(argument, Tensor) and argument.dim() > 1 and len(argument) == examples
    return argument[example : example + 1] if parted else argument


def _turns_by_length(model: nn.Module) -> bool:
    """Return whether a text's rotary positions depend on its length, so that its prefixes have others."""
    kinds = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    return "dynamic" in kinds or "longrope" in kinds


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


def _sum(before: Tensor | Factors | None, more: Tensor | Factors) -> Tensor | Factors:
    """Return the gradients of a parameter's calls so far, and one more."""
    if before is None:
        return more
    if isinstance(before, Factors) and isinstance(more, Factors):
        return before.joined(more)
    before, more = (part.dense() if isinstance(part, Factors) else part for part in (before, more))
    return before.add_(more)


def _linear(module: nn.Module, name: str, x: Tensor, delta: Tensor) -> Tensor | Factors:
    x, delta = x.flatten(1, -2), delta.flatten(1, -2)
    if name == "bias":
        return delta.float().sum(1)
    pair = (x, delta) if type(module) is Conv1D else (delta, x)
    return Factors(tuple(module.weight.shape), [pair])


def _embedding(module: nn.Embedding, ids: Tensor, delta: Tensor) -> Factors:
    ids, delta = ids.flatten(1), delta.flatten(1, -2)
    if module.padding_idx is not None:
        delta = delta * (ids != module.padding_idx).unsqueeze(-1)
    return Factors(tuple(module.weight.shape), [(ids, delta)])


def _replay(module: nn.Module, name: str, inputs: Sequence[Any], options: dict[str, Any], delta: Tensor) -> Tensor:
    """Run the module once more for the gradient of one example: norms and scaled embeddings are cheap."""
    with torch.enable_grad():
        parameter = getattr(module, name).detach().requires_grad_()
        output = torch.func.functional_call(module, {name: parameter}, tuple(inputs), options)
        return torch.autograd.grad(output, parameter, delta.view_as(output))[0].unsqueeze(0)
