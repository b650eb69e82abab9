"""A build that is ready to run: its data and model, read and found to fit together, and the work that is left of it.

Computes no gradient, and writes nothing.
"""

import ctypes
import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rapidindex.caching.batches import Item, Unit, most_items, padded_tokens, plan_units
from rapidindex.config import BuildRequest, EncoderConfig, ModelConfig
from rapidindex.data.examples import Dataset, read_examples
from rapidindex.data.templates import Template, check_template, encode_examples
from rapidindex.data.tokens import token_positions
from rapidindex.encoder.embed import Encoder
from rapidindex.errors import DataError, UsageError
from rapidindex.gradients.losses import Layer
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.files import absolute_place, encoding_of, warn_if_trained_otherwise
from rapidindex.model.model import LoadedModel, adopt, load
from rapidindex.progress import Progress, silent
from rapidindex.recipe import Recipe, Source
from rapidindex.store import ROW_TYPE, Store, row_bytes


class ModelHandle:
    """A model and its gradients, which can be given back and are loaded again when they are next used."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.config = loaded.config
        self._loaded: LoadedModel | None = loaded
        self._gradients: PerExampleGradients | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        if self._loaded is None:
            self._loaded = load(self.config)
        return self._loaded

    @property
    def gradients(self) -> PerExampleGradients:
        """The per-example gradients of the model."""
        if self._gradients is None:
            self._gradients = PerExampleGradients(self.loaded.model)
        return self._gradients

    def compressor(self, recipe: Recipe, **arrays: Any) -> Compressor:
        """Return what turns a batch into rows; `arrays` as for `Compressor.of`."""
        return Compressor.of(recipe, self.gradients, **arrays)

    def release(self) -> None:
        """Give the model's memory back: worker processes load models of their own."""
        self._loaded = self._gradients = None
        gc.collect()
        with suppress(AttributeError, OSError, TypeError):  # glibc alone keeps what is freed: 0.5 GiB of SmolLM2's
            ctypes.CDLL(None).malloc_trim(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class EncoderHandle(ModelHandle):
    """An encoder in the place of a model: its embeddings are the rows, and nothing else is needed for them."""

    @property
    def loaded(self) -> Any:
        """The encoder."""
        if self._loaded is None:
            self._loaded = Encoder.load(self.config)
        return self._loaded

    gradients = loaded

    def compressor(self, recipe: Recipe, **arrays: Any) -> Any:
        """Return the encoder."""
        return self.loaded


def open_model(config: ModelConfig | EncoderConfig) -> ModelHandle:
    """Load a model or an encoder from disk."""
    return EncoderHandle(Encoder.load(config)) if isinstance(config, EncoderConfig) else ModelHandle(load(config))


@dataclass(frozen=True)
class Job:
    """A build whose data and model have been read and fit together."""

    request: BuildRequest
    recipe: Recipe
    dataset: Dataset
    model: ModelHandle
    device: torch.device
    layers: list[Layer]
    items: list[Item]
    """The examples, encoded; those without a response token left are among `skipped`."""
    skipped: list[dict[str, Any]]
    """{"line", "reason"} of each row of the data that is left out."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.model.loaded

    @property
    def gradients(self) -> PerExampleGradients:
        """The per-example gradients of the model."""
        return self.model.gradients

    @property
    def size(self) -> int:
        """|v|, the length of the flattened gradient."""
        return sum(layer.size for layer in self.layers)

    @property
    def most_items(self) -> int | None:
        """How many items a batch may hold; None where no layer's gradients are made whole."""
        whole = not self.embeds and self.recipe.sketch.projection == "rapidgrad"
        return most_items(self.layers) if whole else None

    @property
    def embeds(self) -> bool:
        """Whether the rows are embeddings."""
        return isinstance(self.model, EncoderHandle)

    def K(self, level: str) -> int:
        """Return the length of a row of that level."""
        return self.loaded.width if self.embeds else self.request.K(level)

    def examples_of(self, level: str) -> list[Item]:
        """Return the examples with rows on a level: for tokens, those that were asked for and have such a token."""
        if level == "sentence":
            return self.items
        ids = self.request.token_examples
        return [
            item
            for item in self.items
            if (ids is None or item.example.id in ids) and self.token_positions[item.example.id]
        ]

    @cached_property
    def token_positions(self) -> dict[str, list[int]]:
        """The response tokens of each example, by its id, that get rows of their own."""
        token = self.request.token
        return {
            item.example.id: token_positions(item.example.response, item.encoding.tokens, token) for item in self.items
        }


@dataclass(frozen=True)
class LevelPlan:
    """The work that a level of an index takes, computed once."""

    level: str
    K: int
    row_bytes: int
    """Bytes of a row's entries on disk."""
    planned: int
    """Examples that the level holds when the work is done."""
    examples: list[Item]
    """Examples to compute."""
    units: list[Unit]
    devices: list[str]
    """The device of each process; there are no more processes than units."""

    @cached_property
    def batches(self) -> list[list[Item]]:
        """The batches of all units."""
        return [batch for unit in self.units for batch in unit]

    @cached_property
    def rows(self) -> int:
        """Rows to compute."""
        return sum(map(len, self.batches))

    @cached_property
    def tokens(self) -> int:
        """Tokens to compute, padding included."""
        return sum(map(padded_tokens, self.batches))


_CHECKED = 16
"""Stored examples that are encoded again before others join them."""


def prepare(request: BuildRequest, progress: Progress = silent, *, added: bool = False) -> Job:
    """Read the data and the model, and turn every example into token ids.

    Examples that are `added` to an index are stored with the name of their data. Raises DataError, ModelError,
    UsageError or ResourceError where the data, the model or the options cannot be used.
    """
    progress("read", 0, 2)
    request = _as_trained(request)
    dataset = read_examples(request.data, limit=request.limit, loss=request.encoding.loss)
    request = replace(request, encoding=request.encoding.complete(texts=dataset.texts))
    if not added:
        warn_if_trained_otherwise(_trained_folder(request), request.encoding)
    model = _open(request)
    progress("read", 1, 2)
    loaded, encoding = model.loaded, request.encoding
    template = loaded
    if not isinstance(model, EncoderHandle):
        if not added:
            check_template(encoding.template)
        template = Template.of(encoding, loaded.tokenizer)
    items, skipped = _encode(dataset, template, dataset.path if added else "")
    for item in () if template is loaded else items:
        loaded.limits.check(item.encoding.input_ids, f"line {item.example.line} of {dataset.path}")
    progress("read", 2, 2)
    _check_listed(request.token_examples, items, dataset.path)
    recipe = _recipe(request, loaded, template, dataset)
    return Job(request, recipe, dataset, model, loaded.device, model.gradients.layers, items, skipped)


def _as_trained(request: BuildRequest) -> BuildRequest:
    """Return the request with the encoding that `finetune` recorded with its model on disk, where it gives none."""
    return request if request.encoding else replace(request, encoding=encoding_of(_trained_folder(request)))


def _trained_folder(request: BuildRequest) -> str | None:
    """Return where `finetune` may have recorded how it trained; None for a model in memory, and for an encoder."""
    model = request.model
    return (model.adapter or model.model) if isinstance(model, ModelConfig) else None


def _open(request: BuildRequest) -> ModelHandle:
    if isinstance(request.model, ModelConfig | EncoderConfig):
        return open_model(request.model)
    return ModelHandle(adopt(request.model, request.tokenizer))


def _recipe(request: BuildRequest, loaded: Any, template: Any, dataset: Dataset) -> Recipe:
    if isinstance(loaded, Encoder):
        source = Source(absolute_place(loaded.path), loaded.fingerprint)
        data = Source(dataset.path, dataset.fingerprint)
        return replace(loaded.recipe, encoder=source, data=data, added=(), token=None, tokens_of=None)
    config, fingerprints = loaded.config, loaded.fingerprints
    with_tokens = "token" in request.levels
    return Recipe(
        model=Source(absolute_place(config.model), fingerprints["model"]),
        adapter=Source(absolute_place(config.adapter), fingerprints["adapter"]),
        tokenizer=fingerprints["tokenizer"],
        quantize=config.quantize,
        dtype=config.dtype,
        encoding=replace(request.encoding, date=template.date),
        template=template.fingerprint,
        gradient=request.gradient,
        sketch=request.sketch,
        data=Source(dataset.path, dataset.fingerprint),
        token=request.token if with_tokens else None,
        tokens_of=("all" if request.token_examples is None else "listed") if with_tokens else None,
    )


def _encode(dataset: Dataset, template: Any, source: str) -> tuple[list[Item], list[dict[str, Any]]]:
    """Return the examples as token ids, and the rows that are left out: one that the template refuses ends no build."""
    encoded, refused = encode_examples(template, dataset.examples)
    items, left_out = [], [{"line": example.line, "reason": error.message.rstrip(".")} for example, error in refused]
    for example, encoding in encoded:
        if encoding.response_mask.any():
            items.append(Item(replace(example, response=encoding.response), encoding, source))
        else:
            reason = template.without_response(encoding)
            reason = "a text of one token has nothing to predict" if example.is_text else reason
            left_out.append({"line": example.line, "reason": reason})
    if not items:
        if refused:
            raise refused[0][1]
        raise DataError(
            f"{dataset.path} has no example with a response left to learn from.", hint="Give a larger --max-length."
        )
    skipped = [asdict(row) for row in dataset.skipped]
    return items, skipped + sorted(left_out, key=lambda row: row["line"])


def _check_listed(ids: frozenset[str] | None, items: Sequence[Item], data: str) -> None:
    unknown = sorted((ids or frozenset()) - {item.example.id for item in items})
    if unknown or ids == frozenset():
        some = f"{len(unknown)} ids that are not in {data}, {unknown[0]} for one" if unknown else "no id"
        raise UsageError(
            f"--token-examples gives {some}.", hint="Ids are those that `rapidindex query --json` shows of its matches."
        )


def read_existing(request: BuildRequest) -> Store | None:
    """Open the index at the request's output; None where there is none."""
    return Store.open(request.output) if Store.exists(request.output) else None


def same_day(request: BuildRequest, store: Store | None) -> BuildRequest:
    """Return the request with the day on which `store` was built, for a chat template that reads the clock."""
    request = _as_trained(request)
    if store is None or request.encoding.date:
        return request
    day = Recipe.from_manifest(store.config).day(store.manifest["created"])
    return replace(request, encoding=replace(request.encoding, date=day))


def check_recipe(job: Job, store: Store) -> None:
    """Raise ConfigMismatch where `store` was built by another recipe than the job's. Token rows may be new to it."""
    built = Recipe.from_manifest(store.config)
    encoding = job.recipe.encoding
    if not any(item.example.has_earlier_replies for item in job.items):  # --loss changes nothing here
        encoding = replace(encoding, loss=built.encoding.loss)
    token = job.recipe.token if built.token and job.recipe.token else built.token
    built.check(replace(job.recipe, token=token, encoding=encoding), store.path)


def check_tokens(job: Job, store: Store) -> None:
    """Encode some stored examples again. ConfigMismatch where one becomes other tokens than its row was made of.

    An encoder's fingerprint says which tokens its texts become.
    """
    if job.embeds:
        return
    template = Template.of(job.recipe.encoding, job.loaded.tokenizer)
    for level in store.levels[:1]:
        rows = store.rows(level)
        for number in range(0, len(rows.ids), len(rows.ids) // _CHECKED + 1):
            template.encode_stored(rows.record(number))


def plan_levels(job: Job, store: Store | None) -> list[LevelPlan]:
    """Plan the work on each level of the request that `store`, where there is one, lacks."""
    return [_plan_level(job, level, store) for level in job.request.levels]


def _plan_level(job: Job, level: str, store: Store | None) -> LevelPlan:
    rows = store.rows(level) if store is not None and level in store.levels else None
    done = store.done_ids(level) if store is not None and rows is not None else frozenset()
    removed = store.removed if store is not None else frozenset()
    examples = [item for item in job.examples_of(level) if item.example.id not in done | removed]
    items = examples
    if level == "token":
        positions = job.token_positions
        items = [replace(item, position=at) for item in examples for at in positions[item.example.id]]
    units, K = plan_units(items, job.request.work.batch_tokens, job.most_items), job.K(level)
    return LevelPlan(
        level,
        K,
        row_bytes(K, rows.row_type if rows is not None else ROW_TYPE),
        planned=len(done) + len(examples),
        examples=examples,
        units=units,
        devices=worker_devices(job.device, job.model.config, min(job.request.work.workers or 1, len(units)))
        if job.request.work.ray is None
        else [job.model.config.device] * min(job.request.work.workers or 1, len(units)),
    )


def map_of_slots(job: Job, K: int) -> Tensor | None:
    """Compute the whole map of a sketch of K, int32 [|v|]; None where a row is made without one."""
    if job.embeds or job.recipe.sketch.projection == "two-sided":
        return None
    return Sketch(job.size, replace(job.recipe.sketch, K=K)).slots(0, job.size)


def worker_devices(device: torch.device, config: ModelConfig, workers: int) -> list[str]:
    """Return the device of each worker: the GPUs in turn, or the one GPU that was asked for."""
    if device.type != "cuda" or ":" in config.device:
        return [str(device)] * workers
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]
