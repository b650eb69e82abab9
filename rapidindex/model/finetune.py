"""Fine-tuning: LoRA, QLoRA or every parameter, with the recipe of the paper's Table 8 where it fits our sizes.

Knows options, folders and resuming; `training.py` does the training. Everything is written to OUTPUT.part, which takes
the place of OUTPUT when the last step is done: what is in OUTPUT is always finished. A run that was interrupted goes on
from its last checkpoint when it is started again with the same settings.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig, fingerprint
from rapidindex.data.examples import Dataset
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.model.files import find_model, model_fingerprint
from rapidindex.progress import Progress, silent

RECORD = "rapidindex-finetune.json"
"""In OUTPUT: the settings and the summary. In OUTPUT.part: the settings."""
_NO_MATTER = ("checkpoint_seconds",)


@dataclass(frozen=True)
class FinetuneSummary:
    """What a fine-tuning run did."""

    output: str
    method: str
    examples: int
    """Trained on."""
    skipped: int
    """Left out, because `max_length` leaves no token of their response."""
    steps: int
    epoch_losses: list[float]
    """Mean training loss of each epoch, in nats a response token."""
    trainable_parameters: int
    """Numbers that were trained."""
    seconds: float
    """This call's; a resumed run's earlier calls are not in it."""
    early_step: int | None = None
    """The step whose model is in OUTPUT/early, if one is."""
    resumed_at: int | None = None
    """The step that this call went on from, if it did."""
    already_there: bool = False
    """True if OUTPUT was finished before, with the same settings, and nothing was done."""


def finetune(
    dataset: Dataset,
    encoding: EncodingConfig,
    model_config: ModelConfig,
    options: FinetuneConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> FinetuneSummary:
    """Train on `dataset` and write an adapter (or a whole model) with its tokenizer to the folder `output`.

    `progress` gets ("fine-tune", step, steps, "loss 1.23") after each step.
    UsageError for options that exclude each other, ConfigMismatch where `output` or an interrupted run holds other
    settings, DataError if no response is left within `max_length`, ModelError for a model that cannot be trained or a
    loss that is not a number, ResourceError for too little memory or disk.
    """
    model_config, options = _checked(model_config, options.complete())
    output = Path(output).absolute()
    work = output.with_name(output.name + ".part")
    settings = _settings(dataset, encoding, model_config, options)
    finished = _finished(output, settings, overwrite)
    if finished:
        return finished
    _prepare(work, settings, overwrite)
    from rapidindex.model.loading import quiet

    with quiet():  # importing Trainer imports bitsandbytes, which logs what it does not find
        from rapidindex.model.training import train
    result = train(dataset, encoding, model_config, options, work, progress)
    summary = FinetuneSummary(output=str(output), method=options.method, **result)
    _write_json(work / "finished" / RECORD, {"settings": settings, "summary": asdict(summary)})
    _publish(work, output)
    return summary


def _checked(model_config: ModelConfig, options: FinetuneConfig) -> tuple[ModelConfig, FinetuneConfig]:
    if model_config.adapter:
        raise UsageError("finetune makes a new adapter; it takes none.", hint="Leave --adapter out.")
    if model_config.quantize and options.method != "qlora":
        raise UsageError(
            f"--quantize {model_config.quantize} and --method {options.method} exclude each other.",
            hint="Use --method qlora, or leave --quantize out.",
        )
    if model_config.dtype == "float16" and options.method == "full":
        raise UsageError("--method full in float16 loses its updates to rounding.", hint="Use --dtype bfloat16.")
    if model_config.device.startswith("cuda:") and model_config.device != "cuda:0":
        number = model_config.device.removeprefix("cuda:")
        raise UsageError(
            f"finetune trains on the first GPU that it sees, not on {model_config.device}.",
            hint=f"Set CUDA_VISIBLE_DEVICES={number} and use --device cuda.",
        )
    if options.method == "qlora" and model_config.quantize is None:
        model_config = replace(model_config, quantize="4bit")
    return model_config, options


def _settings(
    dataset: Dataset, encoding: EncodingConfig, model_config: ModelConfig, options: FinetuneConfig
) -> dict[str, Any]:
    """What decides the trained weights, by content and not by place."""
    return {
        "data": fingerprint([example.id for example in dataset.examples]),
        "model": model_fingerprint(find_model(model_config.model)),
        "dtype": model_config.dtype,
        "quantize": model_config.quantize,
        **asdict(encoding),
        **{key: value for key, value in asdict(options).items() if key not in _NO_MATTER},
    }


def _finished(output: Path, settings: dict[str, Any], overwrite: bool) -> FinetuneSummary | None:
    """The summary of a finished run with the same settings, or None if training is to begin."""
    if not output.exists():
        return None
    record = _read_record(output)
    if record is None:
        if output.is_dir() and not any(output.iterdir()):
            return None
        raise UsageError(f"{output} exists, and finetune did not write it.", hint="Choose another --output.")
    if overwrite:
        return None
    if record["settings"] != settings:
        raise ConfigMismatch(
            f"{output} holds a model fine-tuned with other settings: {_differences(record['settings'], settings)}.",
            hint="Choose another --output, or give --overwrite.",
        )
    return replace(FinetuneSummary(**record["summary"]), output=str(output), already_there=True)


def _prepare(work: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make OUTPUT.part ready: a new folder, or that of an interrupted run with the same settings."""
    record = _read_record(work) if work.exists() else None
    if work.exists() and record is None and any(work.iterdir()):
        raise UsageError(f"{work} exists, and finetune did not write it.", hint="Choose another --output.")
    if record and record["settings"] != settings and not overwrite:
        raise ConfigMismatch(
            f"{work} holds an interrupted run with other settings: {_differences(record['settings'], settings)}.",
            hint="Give the same options to go on with it, or --overwrite to start again.",
        )
    if record and overwrite:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    _write_json(work / RECORD, {"settings": settings})


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Such as `epochs 3, now 5`."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {before.get(key)}, now {now.get(key)}" for key in keys)


def _publish(work: Path, output: Path) -> None:
    """Move OUTPUT.part/finished to OUTPUT, and remove what is left."""
    if output.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)
        output.rename(work / "replaced")
    (work / "finished").rename(output)
    shutil.rmtree(work)


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged.", hint=f"Remove {folder} and start again.") from error
    return record


def _write_json(file: Path, value: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
