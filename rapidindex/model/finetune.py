"""Fine-tune a model with LoRA, QLoRA or every parameter, after the paper's Table 8 where it fits our sizes.

Checks the options and the output folder; `training.py` trains. The folder holds everything from the first step on:

rapidindex-finetune.json   the settings; written again as the very last file, with a summary, when training is finished
checkpoints/               Trainer's own, until then: an interrupted run goes on from the last one
early/                     the model after the first tenth of the steps
*                          the adapter or model, with its tokenizer
"""

import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig, fingerprint
from rapidindex.data.examples import Dataset
from rapidindex.data.templates import check_template
from rapidindex.errors import UsageError
from rapidindex.model.files import CHECKPOINTS, FINETUNE_RECORD, absolute_place, find_model, model_fingerprint
from rapidindex.model.outputs import Output
from rapidindex.progress import Progress, silent

_OUTPUT = Output("finetune", FINETUNE_RECORD, "a model fine-tuned")


@dataclass(frozen=True)
class FinetuneSummary:
    """The outcome of a fine-tuning run."""

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
    """How many numbers were trained."""
    seconds: float
    """Training time of this call; the earlier calls of a resumed run do not count."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """{"line", "reason"} of each example that the chat template refuses."""
    early_step: int | None = None
    """The step whose model is in OUTPUT/early; None without such a model."""
    resumed_at: int | None = None
    """The step of the checkpoint from which this call went on; None if it began at the start."""
    already_there: bool = False
    """True if an earlier call finished OUTPUT with the same settings, and this one did nothing."""


def finetune(
    dataset: Dataset,
    encoding: EncodingConfig,
    model_config: ModelConfig,
    options: FinetuneConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    option: str = Output.option,
) -> FinetuneSummary:
    """Train on `dataset` and write an adapter (or a whole model) with its tokenizer to the folder `output`.

    A run that was killed goes on from its last checkpoint when it is called again with the same settings. `progress`
    gets ("fine-tune", step, steps, "loss 1.23") after each step. `option` is what errors call the option for `output`.

    Raises UsageError for options that exclude each other, ConfigMismatch where `output` was made with other settings,
    DataError if no response is left within `max_length`, ModelError for a model that cannot be trained or a loss that
    is not a number, and ResourceError for too little memory or disk space.
    """
    encoding = encoding.complete(texts=dataset.texts)
    check_template(encoding.template)
    model_config, options = _check(model_config, options.complete())
    output = Path(output).absolute()
    settings = _settings(dataset, encoding, model_config, options)
    kept = replace(_OUTPUT, option=option)
    with kept.locked(output):
        return _finetune(dataset, encoding, model_config, options, output, settings, overwrite, progress, kept)


def _finetune(
    dataset: Dataset,
    encoding: EncodingConfig,
    model_config: ModelConfig,
    options: FinetuneConfig,
    output: Path,
    settings: dict[str, Any],
    overwrite: bool,
    progress: Progress,
    kept: Output,
) -> FinetuneSummary:
    several = any(example.has_earlier_replies for example in dataset.examples)
    # Before there was --loss, the last turn alone was in it.
    record = kept.open(output, settings, overwrite, {"loss": "last" if several else encoding.loss, "overlap": None})
    if record and record.get("summary"):
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return replace(FinetuneSummary(**record["summary"]), output=str(output), already_there=True)
    from rapidindex.model.loading import quiet_libraries

    with quiet_libraries():  # importing Trainer imports bitsandbytes, which logs what it does not find
        from rapidindex.model.training import train
    sources = _sources(dataset, encoding, model_config)
    trained = train(dataset, encoding, model_config, options, output, progress, kept.option)
    summary = FinetuneSummary(output=str(output), method=options.method, **trained)
    kept.write(output, {"settings": settings, "sources": sources, "summary": asdict(summary)})
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return summary


def _check(model_config: ModelConfig, options: FinetuneConfig) -> tuple[ModelConfig, FinetuneConfig]:
    """Return both, `quantize` filled in for QLoRA; raise UsageError where they exclude each other."""
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
    """Return everything that decides the trained weights; data and model by their content, wherever they lie."""
    if dataset.loss != encoding.loss:
        raise UsageError(
            f"The data was read with the loss of {dataset.loss} assistant turns, and --loss is {encoding.loss}.",
            hint=f"Read it with read_examples(data, loss={encoding.loss!r}).",
        )
    training, encoded = asdict(options), asdict(encoding)
    del training["checkpoint_seconds"], encoded["date"]
    masked = {"masked": fingerprint(sorted(dataset.masked))} if dataset.masked else {}
    return {
        **masked,
        "data": fingerprint([example.id for example in dataset.examples]),
        "model": model_fingerprint(find_model(model_config.model)),
        "dtype": model_config.dtype,
        "quantize": model_config.quantize,
        **encoded,
        **training,
    }


def _sources(dataset: Dataset, encoding: EncodingConfig, model_config: ModelConfig) -> dict[str, Any]:
    """Return what is needed beside the settings to train again: where data and model lay, and the day."""
    return {
        "data": absolute_place(dataset.path),
        "examples": len(dataset.examples),
        "model": absolute_place(model_config.model),
        "date": encoding.date or date.today().isoformat(),
    }
