"""What a build was asked for, what its model and data turned out to be, and whether an index was built from the same.

A build is identified by everything that changes a row: model, adapter, tokenizer, template, data, and every option of
the gradient and of the sketch. Computes no gradient, and writes nothing.
"""

import ctypes
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from rapidindex.caching.batches import Item, Unit, padded_tokens, plan_units
from rapidindex.config import (
    BuildRequest,
)
from rapidindex.data.examples import Dataset, read_examples
from rapidindex.data.templates import Template
from rapidindex.data.tokens import chosen
from rapidindex.errors import DataError, UsageError
from rapidindex.gradients.eigenbases import entries
from rapidindex.gradients.losses import Layer
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.second_moment import KRONECKER
from rapidindex.model.model import LoadedModel, load
from rapidindex.progress import Progress, silent
from rapidindex.recipe import check_identity
from rapidindex.store import ROW_TYPE, Store, row_bytes


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

    request: BuildRequest
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


def prepare(request: BuildRequest, progress: Progress = silent) -> Job:
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


def left(job: Job, level: str, store: Store | None) -> list[Item]:
    """The examples that `store`, where there is one, lacks of a level."""
    wanted = job.wanted(level)
    if store is None:
        return wanted
    done = store.removed | (store.rows(level).done_ids if level in store.levels else frozenset())
    return [item for item in wanted if item.example.id not in done]


def existing(job: Job) -> Store | None:
    """The index that is there already, if any; ConfigMismatch where it was built from something else."""
    if not Store.exists(job.request.output):
        return None
    store = Store.open(job.request.output)
    token = store.config.get("token")
    if token is not None and "token" in job.request.levels:
        token = asdict(job.request.token)
    check_identity(store.config, {**job.identity, "token": token}, store.path)
    job.meet(store)
    return store


def places(job: Job, plan: Plan) -> list[str]:
    """The device of each process: no more of them than there are units."""
    return devices(job.device, job.request.model.device, min(job.request.work.workers, len(plan.units)))


def devices(device: torch.device, asked: str, workers: int) -> list[str]:
    """Where each worker computes: round robin over the GPUs, unless one of them was asked for."""
    if device.type != "cuda" or ":" in asked:
        return [str(device)] * workers
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]
