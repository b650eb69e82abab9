"""What a build was asked for, what its model and data turned out to be, and whether an index was built from the same.

A build is identified by everything that changes a row: model, adapter, tokenizer, template, data, and every option of
the gradient and of the sketch. Computes no gradient, and writes nothing.
"""

import ctypes
import gc
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidindex.caching.shard_writer import Item, Unit, padded_tokens, plan_units
from rapidindex.config import BuildConfig, EncodingConfig, GradientConfig, ModelConfig, SketchConfig, TokenConfig
from rapidindex.data.examples import Dataset, read_examples
from rapidindex.data.templates import Template
from rapidindex.data.tokens import chosen
from rapidindex.errors import ConfigMismatch, DataError, UsageError
from rapidindex.gradients.eigenbases import entries
from rapidindex.gradients.per_example import Layer, PerExampleGradients
from rapidindex.gradients.second_moment import KRONECKER
from rapidindex.model.model import LoadedModel, load
from rapidindex.progress import Progress, silent
from rapidindex.store import Store
from rapidindex.store.shards import ROW_TYPE, row_bytes


@dataclass(frozen=True)
class Request:
    """What `rapidindex build` was asked for."""

    data: str
    output: str
    model: ModelConfig
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    work: BuildConfig = field(default_factory=BuildConfig)
    limit: int | None = None
    levels: tuple[str, ...] = ("sentence",)
    """Whole examples (`sentence`), response tokens (`token`), or both."""
    token: TokenConfig = field(default_factory=TokenConfig)
    token_examples: frozenset[str] | None = None
    """Ids of the examples whose tokens are meant; None for all."""

    def K(self, level: str) -> int:
        """Length of a row of that level."""
        return self.token.K if level == "token" else self.sketch.K


@dataclass(frozen=True)
class Plan:
    """The work that a level of an index takes."""

    level: str
    K: int
    row_bytes: int
    """What the numbers of a row take on the disk."""
    examples: list[Item]
    units: list[Unit]

    @property
    def batches(self) -> list[list[Item]]:
        """Those of all units."""
        return [batch for unit in self.units for batch in unit]

    @property
    def rows(self) -> int:
        """How many it makes."""
        return sum(map(len, self.batches))

    @property
    def tokens(self) -> int:
        """All that is computed, padding included."""
        return sum(map(padded_tokens, self.batches))


@dataclass
class Job:
    """A build whose model and data have been read and found to fit together."""

    request: Request
    dataset: Dataset
    loaded: LoadedModel
    gradients: PerExampleGradients
    layers: list[Layer]
    items: list[Item]
    skipped: list[dict[str, Any]]
    identity: dict[str, Any]
    device: torch.device
    has_moment: bool = False
    """Whether the index holds its second moment already."""
    row_types: dict[str, str] = field(default_factory=dict)
    """How the index keeps the rows of the levels that it has already."""

    @property
    def size(self) -> int:
        """|v|, the length of the flattened gradient."""
        return sum(layer.size for layer in self.layers)

    @property
    def eigen_entries(self) -> int:
        """How many numbers the eigenvectors are along which the gradients are corrected; 0 for none."""
        return entries(self.layers) if self.request.gradient.second_moment == KRONECKER else 0

    def wanted(self, level: str) -> list[Item]:
        """The examples that the level is to hold: for tokens, those that were asked for and have such a token."""
        if level == "sentence":
            return self.items
        ids = self.request.token_examples
        listed = (item for item in self.items if ids is None or item.example.id in ids)
        return [item for item in listed if self.positions[item.example.id]]

    def meet(self, store: Store) -> None:
        """Note what the index holds already."""
        self.has_moment = store.second_moment() is not None
        self.row_types = {level: store.rows(level).row_type for level in store.levels}

    @property
    def lacks_moment(self) -> bool:
        """Whether a second moment has to be made."""
        return self.request.gradient.second_moment != "none" and not self.has_moment

    def plan(self, level: str, examples: Sequence[Item]) -> "Plan":
        """What is computed for these examples: a row each, or one for each of their tokens."""
        items = list(examples)
        if level == "token":
            items = [
                replace(item, position=position) for item in examples for position in self.positions[item.example.id]
            ]
        units = plan_units(items, self.request.work.batch_tokens)
        K = self.request.K(level)
        return Plan(level, K, row_bytes(K, self.row_types.get(level, ROW_TYPE)), list(examples), units)

    @cached_property
    def positions(self) -> dict[str, list[int]]:
        """The tokens of each example, by its id, that are to have rows of their own."""
        token = self.request.token
        return {i.example.id: chosen(i.example.response, i.encoding.tokens, token) for i in self.items}

    def hold_model(self) -> None:
        """Load the model again where it was released."""
        if not hasattr(self, "loaded"):
            self.loaded = load(self.request.model)
            self.gradients = PerExampleGradients(self.loaded.model)

    def release_model(self) -> None:
        """Give its memory back: workers have models of their own."""
        if not hasattr(self, "loaded"):
            return
        del self.loaded, self.gradients
        gc.collect()
        with suppress(AttributeError, OSError, TypeError):  # glibc alone keeps what is freed: 0.5 GiB of SmolLM2's
            ctypes.CDLL(None).malloc_trim(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prepare(request: Request, progress: Progress = silent) -> Job:
    """Read the data and the model, and turn every example into token ids."""
    progress("read", 0, 2)
    dataset = read_examples(request.data, limit=request.limit)
    loaded = load(request.model)
    progress("read", 1, 2)
    template = Template(request.encoding.template, loaded.tokenizer, request.encoding.max_length)
    items, skipped = _encode(dataset, template)
    gradients = PerExampleGradients(loaded.model)
    identity = {
        "model": {"path": request.model.model, "fingerprint": loaded.fingerprints["model"]},
        "adapter": {"path": request.model.adapter, "fingerprint": loaded.fingerprints["adapter"]},
        "tokenizer": {"fingerprint": loaded.fingerprints["tokenizer"]},
        "quantize": request.model.quantize,
        "dtype": request.model.dtype,
        "encoding": {**asdict(request.encoding), "fingerprint": template.fingerprint},
        "gradient": asdict(request.gradient),
        "sketch": asdict(request.sketch),
        "data": {"path": request.data, "fingerprint": dataset.fingerprint},
    }
    progress("read", 2, 2)
    _check_listed(request.token_examples, items, request.data)
    return Job(request, dataset, loaded, gradients, gradients.layers, items, skipped, identity, loaded.device)


def _check_listed(ids: frozenset[str] | None, items: Sequence[Item], data: str) -> None:
    unknown = sorted((ids or frozenset()) - {item.example.id for item in items})
    if unknown or ids == frozenset():
        some = f"{len(unknown)} ids that are not in {data}, {unknown[0]} for one" if unknown else "no id"
        raise UsageError(
            f"--token-examples gives {some}.", hint="Ids are those that `rapidindex query --json` shows of its matches."
        )


def drawn(job: Job) -> list[Item]:
    """The examples from which the second moment is estimated: drawn by seed, whatever their order."""
    options = job.request.gradient
    ordered = sorted(job.items, key=lambda item: item.example.id)
    numbers = np.random.default_rng(options.seed).permutation(len(ordered))[: options.moment_examples]
    return [ordered[number] for number in numbers]


_GO_ON = "Give the same options to go on with it, another -o, or --overwrite to build it anew."


def check_identity(built: dict[str, Any], asked: dict[str, Any], path: Path, *, hint: str = _GO_ON) -> None:
    """Raise ConfigMismatch, naming the fields, where an index was built from something else. Paths may differ.

    Data that was added to the index later is none of its build's.
    """
    before, now = dict(_fields(built)), dict(_fields(asked))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not differing:
        return
    told = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in differing)
    if differing == ["data.fingerprint"]:
        told = (
            f"the data file has changed, is another one, or another --limit was given (it was {built['data']['path']})"
        )
        hint = f"Add its new rows with: rapidindex add {path} {asked['data']['path']}, or build anew with --overwrite."
    raise ConfigMismatch(f"The index {path} was built differently: {told}.", hint=hint)


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name not in ("path", "added", "tokens_of"):
            yield f"{prefix}{name}", value


def _encode(dataset: Dataset, template: Template) -> tuple[list[Item], list[dict[str, Any]]]:
    items, skipped = [], [asdict(row) for row in dataset.skipped]
    for example in dataset.examples:
        encoding = template.encode(example)
        if encoding.response_mask.any():
            items.append(Item(example, encoding))
        else:
            reason = f"the prompt alone has {encoding.prompt_tokens} tokens, and --max-length is {template.max_length}"
            skipped.append({"line": example.line, "reason": reason})
    if not items:
        raise DataError(
            f"{dataset.path} has no example with a response left to learn from.", hint="Give a larger --max-length."
        )
    return items, skipped
