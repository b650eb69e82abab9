"""What an index was built from: typed, read from and written to the manifest, and compared with another recipe.

A recipe holds everything that changes a row: model, adapter, tokenizer, template, data, and every option of the
gradient and of the sketch. Two indexes with equal recipes hold equal rows, wherever their files lie.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rapidindex import typed
from rapidindex.config import EncodingConfig, GradientConfig, ModelConfig, SketchConfig, TokenConfig, recipe_name
from rapidindex.errors import ConfigMismatch, DamagedIndex, UsageError

_HINT = "Give the same options to go on with it, another -o, or --overwrite to build it anew."
_NOT_COMPARED = ("path", "added", "tokens_of", "date")


@dataclass(frozen=True)
class Source:
    """A model, an adapter or a data set: where it was, and what it holds."""

    path: str | None
    fingerprint: str
    """16 hexadecimal digits over the content; empty where there is none."""
    examples: int | None = None
    """Examples that added data brought; None for the data of the build."""


@dataclass(frozen=True)
class Task:
    """What an index was specialized for, and from which index: see `gradients/curvature.py`."""

    index: Source
    """The index whose rows were multiplied by R^-1/2; its fingerprint is over its manifest and its removed ids."""
    queries: Source
    """The file of the task's queries."""
    block: int
    """Entries of a block of R."""
    damping: float
    """What was added to the eigenvalues of a block, in units of their mean."""
    component: int | None
    """The component at which the spectra cross; None where the weight was given."""
    weight: float | None
    """λ, the weight of R_eval; None where it was not known yet."""


@dataclass(frozen=True)
class Recipe:
    """Everything that changes a row of an index."""

    model: Source
    adapter: Source
    tokenizer: str
    """The tokenizer's fingerprint."""
    quantize: str | None
    dtype: str
    encoding: EncodingConfig
    template: str
    """The template's fingerprint."""
    gradient: GradientConfig
    sketch: SketchConfig
    data: Source
    added: tuple[Source, ...] = ()
    """Data added after the build."""
    token: TokenConfig | None = None
    """Which tokens have rows; None for an index without token rows."""
    tokens_of: str | None = None
    """`all` examples have token rows, or those `listed` by the user."""
    task: Task | None = None
    """The task that the index was specialized for; None for one that was built."""
    encoder: Source | None = None
    """The encoder whose embeddings the rows are; the rest is the recipe of the gradients that it ranks."""

    @classmethod
    def from_manifest(cls, config: Mapping[str, Any]) -> "Recipe":
        """Read the manifest's `config`. DamagedIndex where it lacks a field or holds one of another kind."""
        try:
            changed = {
                "tokenizer": config["tokenizer"]["fingerprint"],
                "template": config["encoding"]["fingerprint"],
                "encoding": {"loss": "last", **config["encoding"]},  # without --loss it was the last turn
                "sketch": {"projection": "rapidgrad", **config["sketch"]},
            }
            recipe = typed.fit({**config, **changed}, cls, "config")
            known = dict(_fields(recipe.to_manifest()))
            if unknown := [name for name, _ in _fields(config) if "." in name and name not in known]:
                raise ValueError(f"{unknown[0]} is unknown")
            if unset := [name for name in known if known[name] is None and name.startswith(("gradient.", "sketch."))]:
                raise ValueError(f"{unset[0]} is null")
            return recipe
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise DamagedIndex(
                f"The manifest does not say how the index was built ({error}).",
                hint="Type `rapidindex check INDEX`.",
            ) from error

    def to_manifest(self) -> dict[str, Any]:
        """Return the manifest's `config`, as `from_manifest` reads it."""
        config = {
            "model": _place(self.model),
            "adapter": _place(self.adapter),
            "tokenizer": {"fingerprint": self.tokenizer},
            "quantize": self.quantize,
            "dtype": self.dtype,
            "encoding": {**asdict(self.encoding), "fingerprint": self.template},
            "gradient": asdict(self.gradient),
            "sketch": asdict(self.sketch),
            "data": _place(self.data),
        }
        if self.added:
            config["added"] = [asdict(source) for source in self.added]
        if self.token is not None:
            config |= {"token": asdict(self.token), "tokens_of": self.tokens_of}
        if self.encoder is not None:
            config["encoder"] = _place(self.encoder)
        if self.task is not None:
            config["task"] = asdict(self.task) | {
                "index": _place(self.task.index),
                "queries": _place(self.task.queries),
            }
        return config

    def day(self, created: str) -> str:
        """Return the day that a chat template which reads the clock is told; by default that of the build."""
        return self.encoding.date or created[:10]

    @property
    def name(self) -> str:
        """The name of the recipe of gradient and sketch, or `custom`."""
        return recipe_name(self.gradient, self.sketch, adapter=bool(self.adapter.fingerprint))

    def differences(self, other: "Recipe") -> list[tuple[str, Any, Any]]:
        """Name each field that differs from `other`'s, with both values. Paths and added data may differ."""
        mine, theirs = dict(_fields(self.to_manifest())), dict(_fields(other.to_manifest()))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [(name, mine.get(name), theirs.get(name)) for name in names]

    def check(self, request: "Recipe", index: Path, *, hint: str = _HINT) -> None:
        """Raise ConfigMismatch, naming the fields, where this recipe of `index` is not the one in `request`."""
        differences = self.differences(request)
        if not differences:
            return
        if self.task and not request.task:
            raise ConfigMismatch(
                f"{index} is no build: rapidindex specialize made it from {self.task.index.path}.",
                hint="Add rows to it with rapidindex add, or give another -o.",
            )
        listed = "; ".join(f"{name}: {built!r} there, {wanted!r} asked for" for name, built, wanted in differences)
        if [name for name, *_ in differences] == ["data.fingerprint"]:
            listed = (
                f"the data file has changed, is another one, or another --limit was given (it was {self.data.path})"
            )
            add = shlex.join(["rapidindex", "add", str(index), request.data.path])
            hint = f"Add its new rows with: {add}, or build anew with --overwrite."
        raise ConfigMismatch(f"The index {index} was built differently: {listed}.", hint=hint)

    def model_config(
        self, *, model: str | None = None, adapter: str | None = None, device: str = "auto"
    ) -> ModelConfig:
        """Return the options that load the index's model, from new places where these are given."""
        return ModelConfig(
            model or self.model.path, adapter or self.adapter.path, self.quantize, self.dtype, device, not model
        )


def _place(source: Source) -> dict[str, Any]:
    return {"path": source.path, "fingerprint": source.fingerprint}


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name not in _NOT_COMPARED:
            yield f"{prefix}{name}", value
