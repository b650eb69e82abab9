"""Train again without some of the rows: would the model have said it without them?

Rows are taken out by masking their labels, so that order, batches and seed stay as they were. A step whose rows are all
taken out has a gradient of zero. Runs are kept: a second question about the same rows costs nothing.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from math import exp
from pathlib import Path
from typing import Any

import torch

from rapidindex.caching.batches import batches_of
from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig, VerifyOptions, fingerprint
from rapidindex.data.examples import Dataset, read_examples
from rapidindex.errors import DataError, UsageError
from rapidindex.gradients.losses import Batch, example_losses
from rapidindex.model.files import FINETUNE_RECORD, read_json
from rapidindex.model.finetune import finetune
from rapidindex.model.model import LoadedModel, load
from rapidindex.progress import Progress
from rapidindex.query.encode import EncodedQuery, generate_answer, selected_batch
from rapidindex.query.index import Index, model_work
from rapidindex.query.questions import Query
from rapidindex.recipe import Recipe
from rapidindex.results import Trial

Announce = Callable[[int, float], None]
"""Is told the number of trainings that are to come, and the seconds that they will take; it may raise to stop."""
_TIMED = 16
"""Examples whose training is timed for the estimate."""


@dataclass(frozen=True)
class Training:
    """How the indexed model was trained, and where the runs without some of its rows are kept."""

    dataset: Dataset
    encoding: EncodingConfig
    base: ModelConfig
    options: FinetuneConfig
    same_run: bool
    """Whether this is the model's own training, and not one like it."""
    early: bool
    """Whether the index was built with the early model of that training."""
    runs: Path
    recipe: Recipe
    """The index's, which says how a model is held for its answers."""

    @classmethod
    def of(cls, index: Index, options: VerifyOptions) -> "Training":
        """Read how the model of an index was trained, from the record of `finetune` or from `options`.

        UsageError where neither says it, DataError where the data is gone or is not what the record names.
        """
        folder = Path(index.loaded.config.adapter or index.loaded.config.model)
        record = _record(folder)
        runs = Path(options.runs or f"{index.store.path}-runs").absolute()
        if record is None:
            return cls._like(index, options, folder, runs)
        settings, sources = record["settings"], record.get("sources", {})
        encoding = EncodingConfig(**_those_of(EncodingConfig, settings), date=sources.get("date") or _day(index))
        training = FinetuneConfig(**_those_of(FinetuneConfig, settings))
        place = options.base or sources.get("model") or (index.recipe.model.path if training.method != "full" else None)
        base = replace(_base(index, place), dtype=settings["dtype"], quantize=settings["quantize"])
        data = options.data or sources.get("data") or index.recipe.data.path
        dataset = _read(data, sources.get("examples"), encoding.loss)
        if fingerprint([example.id for example in dataset.examples]) != settings["data"]:
            raise DataError(
                f"{dataset.path} is not the data that {folder} was trained on, or has changed.",
                hint="Give that with --data.",
            )
        return cls(dataset, encoding, base, training, True, folder.name == "early", runs, index.recipe)

    @classmethod
    def _like(cls, index: Index, options: VerifyOptions, folder: Path, runs: Path) -> "Training":
        if options.training is None:
            raise UsageError(
                f"{folder} was not made by `rapidindex finetune`, and so it is not on record how it was trained.",
                hint="Say it with --epochs, --peak and --batch-size: the result is then that of a training like it.",
            )
        encoding = replace(index.recipe.encoding, date=_day(index))
        method, adapter = "full", {}
        if (folder / "adapter_config.json").is_file():
            method = "qlora" if index.recipe.quantize else "lora"
            adapter = _lora(read_json(folder / "adapter_config.json"))
        training = replace(options.training, method=method, **adapter)
        base = _base(index, options.base or (index.recipe.model.path if method != "full" else None))
        dataset = _read(options.data or index.recipe.data.path, None, encoding.loss)
        return cls(dataset, encoding, base, training, False, False, runs, index.recipe)

    def folder(self, without: frozenset[str]) -> Path:
        """Return where the run without these examples is kept."""
        options = asdict(self._options)
        del options["checkpoint_seconds"]
        data = [example.id for example in self.dataset.examples]
        what = [sorted(without), data, asdict(self.encoding), self.base.model, self.base.dtype, options]
        return self.runs / f"run-{fingerprint(what)}"

    def is_done(self, without: frozenset[str]) -> bool:
        """Return whether the run without these examples is finished."""
        record = self.folder(without) / FINETUNE_RECORD
        return record.is_file() and bool(read_json(record).get("summary"))

    def run(self, without: frozenset[str], progress: Progress) -> LoadedModel:
        """Return the model trained without these examples: trained now, from where it was interrupted, or kept."""
        folder = self.folder(without)
        self.runs.mkdir(parents=True, exist_ok=True)
        dataset = replace(self.dataset, masked=without)
        finetune(dataset, self.encoding, self.base, self._options, folder, progress=progress, option="--runs")
        place = str(folder / "early" if self.early else folder)
        places = {"model": place} if self.options.method == "full" else {"model": self.base.model, "adapter": place}
        return load(self.recipe.model_config(**places, device=self.base.device))

    def seconds(self, index: Index) -> float:
        """Estimate how long one run takes here, from forward and backward passes over a few of its examples."""
        timed = self.dataset.examples[:: self._stride]
        batches = batches_of(timed, index.template, index.loaded.device)
        with model_work:
            model, started = index.loaded.model, time.perf_counter()
            for batch in batches:
                loss = example_losses(model, batch).sum()
                torch.autograd.grad(loss, list(index.loaded.trainable.values()), allow_unused=True)
        # Training batches examples of like length, so that next to nothing is padded.
        share = sum(int(b.attention.sum()) for b in batches) / sum(b.attention.numel() for b in batches)
        passes = len(self.dataset.examples) * self.options.epochs
        return (time.perf_counter() - started) / len(timed) * passes * share

    @property
    def _stride(self) -> int:
        return max(1, len(self.dataset.examples) // _TIMED)

    @property
    def _options(self) -> FinetuneConfig:
        """The options of a run: nothing is kept that is not looked at."""
        early = self.options.early if self.early else 0.0
        return replace(self.options, early=early, save_optimizer=False).complete()


@dataclass(frozen=True)
class Reading:
    """What a model says to a question."""

    log_probability: float
    """The mean of the chosen tokens."""
    answer: str

    def change(self, before: "Reading", rows: frozenset[str]) -> Trial:
        """Return the change since another model."""
        points = 100 * (exp(self.log_probability) - exp(before.log_probability))
        return Trial(sorted(rows), self.log_probability - before.log_probability, points, answer=self.answer)


def read(index: Index, loaded: LoadedModel, query: EncodedQuery, question: Query, max_new_tokens: int) -> Reading:
    """Return what a model of the index's kind says: the chosen tokens' log-probability, and its greedy answer."""
    batch: Batch = selected_batch(query.encoding, query.info.selection, loaded.device)
    with model_work, torch.no_grad():
        value = -float(example_losses(loaded.model, batch).sum())
        answer = generate_answer(question, loaded, index.template, max_new_tokens).text
    return Reading(value, answer)


def _record(folder: Path) -> dict[str, Any] | None:
    """Return the record of `finetune` for a folder that it wrote: OUTPUT, or OUTPUT/early."""
    for place in (folder, folder.parent) if folder.name == "early" else (folder,):
        if (place / FINETUNE_RECORD).is_file():
            return read_json(place / FINETUNE_RECORD)
    return None


def _those_of(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    return {field.name: settings[field.name] for field in fields(kind) if field.name in settings}


def _day(index: Index) -> str:
    return index.recipe.day(index.store.manifest["created"])


def _base(index: Index, place: str | None) -> ModelConfig:
    if place is None:
        raise UsageError("It is not on record which model the training began with.", hint="Give its place with --base.")
    recipe = index.recipe
    return ModelConfig(place, None, recipe.quantize, recipe.dtype, index.loaded.config.device)


def _read(data: Any, examples: int | None, loss: str) -> Dataset:
    try:
        return read_examples(data, limit=examples, loss=loss)
    except DataError as error:
        raise DataError(f"The training data is not there: {error.message}", hint="Give it with --data.") from error


def _lora(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of LoRA in an adapter_config.json."""
    targets = settings["target_modules"]
    return {
        "rank": settings["r"],
        "alpha": int(settings["lora_alpha"]),
        "dropout": settings.get("lora_dropout", 0.0),
        "target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
    }
