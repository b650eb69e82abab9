"""Builds the index of several checkpoints of one training: one index for each, in a folder that lists them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from rapidindex.caching.build import BuildSummary, build
from rapidindex.config import BuildRequest, ModelConfig
from rapidindex.errors import ConfigMismatch, DamagedIndex, StoreError, UsageError
from rapidindex.model.files import adapter_fingerprint, find_adapter, find_model, model_fingerprint, read_json
from rapidindex.model.schedule import weights_of
from rapidindex.progress import Progress, silent
from rapidindex.store import Checkpoints, Store, checkpoints_at

RESERVED = ("sum", "best")


def build_checkpoints(
    request: BuildRequest, models: Sequence[ModelConfig], *, overwrite: bool = False, progress: Progress = silent
) -> dict[str, BuildSummary]:
    """Build the index of each checkpoint beneath `request.output`, and return the summaries by the checkpoints' names.

    The first of `models` answers by default. Each index goes on where it stopped. Raises as `plan_checkpoints` does
    before anything is computed, and as `build` does.
    """
    several, requests = plan_checkpoints(request, models, overwrite=overwrite)
    several.create()
    return {name: build(own, overwrite=overwrite, progress=progress) for name, own in requests.items()}


def plan_checkpoints(
    request: BuildRequest, models: Sequence[ModelConfig], *, overwrite: bool = False
) -> tuple[Checkpoints, dict[str, BuildRequest]]:
    """Return the list of the checkpoints and the build of each, by its name. Writes nothing, and loads no model.

    Raises UsageError for the same checkpoint twice, or checkpoints of different bases or shapes, ConfigMismatch where
    the folder lists others, and StoreError where it holds other files.
    """
    output = Path(request.output)
    named = name_checkpoints(models)
    check_alike(models)
    if Store.exists(output):
        raise StoreError(f"{output} is an index of one checkpoint.", hint="Give -o a new folder for several.")
    there, damaged = None, False
    try:
        there = checkpoints_at(output)
    except DamagedIndex:  # its list is written anew
        damaged = True
    if there and not overwrite and (lacking := there.weights.keys() - named.keys()):
        raise ConfigMismatch(
            f"{output} has the checkpoints {', '.join(there.weights)}, and {', '.join(sorted(lacking))} is not given.",
            hint="Give them all, another -o, or --overwrite to build them anew.",
        )
    if not there and not damaged and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StoreError(f"{output} holds other files.", hint="Choose a new folder for the index.")
    weights, weighted = weights_of([config.adapter or config.model for config in models])
    requests = {name: replace(request, model=config, output=str(output / name)) for name, config in named.items()}
    return Checkpoints(output, dict(zip(named, weights, strict=True)), weighted), requests


def name_checkpoints(models: Sequence[ModelConfig]) -> dict[str, ModelConfig]:
    """Name each checkpoint by its folder, and where these are alike by the folder above it, too."""
    places = [Path(config.adapter or config.model).expanduser().resolve() for config in models]
    names = [_plain(place.name) for place in places]
    if len(set(names)) < len(names) or set(names) & set(RESERVED):
        names = [_plain(f"{place.parent.name}-{place.name}") for place in places]
    names = [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]
    return dict(zip(names, models, strict=True))


def check_alike(models: Sequence[ModelConfig]) -> None:
    """Raise UsageError where two checkpoints are the same, or cannot be of one training. Loads no model."""
    names = [config.adapter or config.model for config in models]
    folders = [find_adapter(config.adapter) if config.adapter else find_model(config.model).folder for config in models]
    prints = [
        adapter_fingerprint(folder) if config.adapter else model_fingerprint(find_model(config.model))
        for config, folder in zip(models, folders, strict=True)
    ]
    shapes, bases = [_shapes(folder) for folder in folders], [_base(folder) for folder in folders]
    for number in range(1, len(models)):
        if prints[number] in prints[:number]:
            same = names[prints.index(prints[number])]
            raise UsageError(f"{names[number]} and {same} are the same checkpoint.", hint="Give each once.")
        if shapes[0] and shapes[number] and shapes[number] != shapes[0]:
            odd = min(set(shapes[0].items()) ^ set(shapes[number].items()))[0]
            raise UsageError(
                f"{names[number]} is not of the same training as {names[0]}: they differ in {odd}.",
                hint="Build an index for each.",
            )
        if bases[number] != bases[0]:
            raise UsageError(
                f"{names[0]} was trained on {bases[0]}, and {names[number]} on {bases[number]}.",
                hint="Build an index for each, or correct base_model_name_or_path in adapter_config.json.",
            )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name, from the heads of safetensors files; {} where there are none."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    return shapes


def _base(folder: Path) -> str:
    """Return the name of the model that an adapter was trained on, without its folder; "" for a model."""
    config = folder / "adapter_config.json"
    name = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    return Path(name).name if isinstance(name, str) else ""


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name).lstrip(".-") or "checkpoint"
