"""Load models with transformers and bitsandbytes, but without their noise and with our errors.

A GGUF file becomes an ordinary model, and a quantized base one whose backward pass works on every device.
"""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapidindex.config import ModelConfig
from rapidindex.errors import ModelError, RapidIndexError, ResourceError
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.model.checks import check_fast
from rapidindex.model.files import ModelFiles, has_tokenizer

_NOISY_LOGGERS = ("accelerate", "bitsandbytes", "huggingface_hub", "peft")
_NO_CODE = {"trust_remote_code": False}
"""Without this transformers asks on stdout whether to run the code in a model's folder, and runs it after a `y`."""

_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that torch has on every device."""


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers, peft and their like draw no bars and log only errors; restore their settings afterwards.

    The one hidden warning that matters, about weights missing from a file, becomes an error where it can occur.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    log = transformers.utils.logging
    bars, hub_bars, level = log.is_progress_bar_enabled(), not are_progress_bars_disabled(), log.get_verbosity()
    loggers = {logger: logger.level for logger in map(logging.getLogger, _NOISY_LOGGERS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.disable_progress_bar()
        log.set_verbosity_error()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, before in loggers.items():
                logger.setLevel(before)
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
            if not hub_bars:
                disable_progress_bars()


@contextlib.contextmanager
def translate_errors(config: ModelConfig) -> Iterator[None]:
    """Turn the loaders' errors, whose many types change with each release, into ModelError or ResourceError."""
    try:
        yield
    except RapidIndexError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            smaller = "--dtype bfloat16 or --quantize 4bit" if config.adapter else "--dtype bfloat16"
            raise ResourceError(
                f"{config.model} does not fit into the memory of {config.device}.", hint=f"Try {smaller}."
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{config.model} needs program code of its own (`auto_map` in its config.json or"
                " tokenizer_config.json), which rapidindex never runs.",
                hint=f"Give a model that transformers {transformers.__version__} knows without it.",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise ModelError(f"{config.model} could not be loaded ({reason}).", hint=_advice(str(error))) from error


def _advice(text: str) -> str:
    if "AutoModelForCausalLM" in text:
        return "rapidindex works with causal language models only."
    return "Check that the files are complete, and that transformers is new enough for them."


def load_tokenizer(files: ModelFiles, adapter: Path | None) -> PreTrainedTokenizerBase:
    """Return the adapter's own tokenizer if it has a whole one (training may have added tokens), or the base's.

    Raises ModelError where neither has one, and for one that cannot map its tokens to characters.
    """
    own = adapter if adapter and has_tokenizer(adapter) and (adapter / "tokenizer_config.json").is_file() else None
    if own or has_tokenizer(files.folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(own or files.folder, **_NO_CODE)
    elif files.gguf:
        _need_gguf()
        tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf, **_NO_CODE)
    else:
        raise ModelError(
            f"{files.folder} holds no tokenizer.", hint="Copy tokenizer.json and tokenizer_config.json into it."
        )
    check_fast(tokenizer)
    return tokenizer


def load_base(
    files: ModelFiles, config: ModelConfig, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """Return the base model on `device`, from a folder or a GGUF file, quantized if `config` says so, without cache.

    `attn_implementation` is None for the architecture's own.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if files.gguf is None:
        model = _from_folder(files.folder, config, device, options)
    elif config.quantize is None:
        model = _from_gguf(files, config, device, options)
    else:
        with tempfile.TemporaryDirectory(prefix="rapidindex-") as folder:  # bitsandbytes quantizes while reading
            _from_gguf(files, replace(config, quantize=None), torch.device("cpu"), {}).save_pretrained(folder)
            model = _from_folder(Path(folder), config, device, options)
    model.name_or_path = model.config.name_or_path = config.model  # a saved adapter names it as its base
    disable_cache(model)
    return model


def disable_cache(model: PreTrainedModel) -> None:
    """Turn off the cache of keys and values, which training and gradients have no use for."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False


def _from_folder(folder: Path, config: ModelConfig, device: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    settings = transformers.AutoConfig.from_pretrained(folder, **_NO_CODE)
    if settings.is_encoder_decoder:
        raise ModelError(
            f"{config.model} is an encoder-decoder model ({settings.model_type}).",
            hint="rapidindex works with causal language models only: give one with -m.",
        )
    asked = {part._attn_implementation for part in (settings, settings.get_text_config())}
    if asked - {None, *_ATTENTION}:  # where it was trained, not here: another GPU's, or code from the hub
        settings._attn_implementation = None
    if config.quantize:
        options = {**options, "quantization_config": _quantization(config)}
    return _from_pretrained(folder, config, device, {**options, "config": settings})


def _from_gguf(
    files: ModelFiles, config: ModelConfig, device: torch.device, options: dict[str, Any]
) -> PreTrainedModel:
    """Return the model in a GGUF file with its weights unpacked, so that peft accepts it and it can be saved."""
    _need_gguf()
    options = {**options, "gguf_file": files.gguf}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x weights may stay packed, without a backward pass
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        model = _from_pretrained(files.folder, config, device, options)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _from_pretrained(
    folder: Path, config: ModelConfig, device: torch.device, options: dict[str, Any]
) -> PreTrainedModel:
    place = {} if device.type == "cpu" and not config.quantize else {"device_map": {"": str(device)}}
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_complete` does not ignore them
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, config.dtype), **told, **place, **options, **_NO_CODE
    )
    _check_complete(report, config.model)
    held = quantization_of(model)
    if config.quantize and held != config.quantize:
        raise ModelError(
            f"{config.model} was saved in {held or 'another format'}; --quantize {config.quantize} cannot change that.",
            hint="Leave --quantize out, or give the model before quantization.",
        )
    model.__dict__.pop("hf_device_map", None)  # so that peft and accelerate do not wrap the modules
    keep_differentiable(model)
    return model


def _check_complete(report: dict[str, Any], name: str) -> None:
    """Raise ModelError where the files lack a tensor, or hold one that transformers would leave out or draw anew."""
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    for tensor, held, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{name} holds {tensor} as {list(held)}, and its config.json makes it {list(expected)}.",
            hint="Give the weights and the config.json that were saved together.",
        )
    if missing:
        raise ModelError(
            f"{name} has no weights for {len(missing)} of its tensors, such as {missing[0]}.",
            hint="Download or save the model again.",
        )
    if extra:
        raise ModelError(
            f"The model has no place for {len(extra)} of the tensors in {name}, such as {extra[0]}: it would compute"
            " something else than what was trained.",
            hint="Correct its config.json, or save the causal language model alone.",
        )


def _quantization(config: ModelConfig) -> transformers.BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"--quantize {config.quantize} needs bitsandbytes.", hint="pip install bitsandbytes")
    if config.quantize == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, config.dtype)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def quantization_of(model: PreTrainedModel) -> str | None:
    """Return the name in `--quantize` of how bitsandbytes holds the model, or None."""
    kinds = {"4bit": "is_loaded_in_4bit", "8bit": "is_loaded_in_8bit"}
    return next((kind for kind, flag in kinds.items() if getattr(model, flag, False)), None)


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights for CPUs with AVX-512 BF16.

    It does so in the first forward pass in eval mode, for bfloat16 products that have no backward pass: gradients would
    silently be lost. Its 8-bit product also logs one line per layer for inputs that are not float16, by design.
    """
    if quantization_of(model):
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def train_everything(model: PreTrainedModel, config: ModelConfig) -> None:
    """Let every parameter require a gradient; raise ModelError for a quantized model."""
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{config.model} is quantized, so its weights cannot be trained, and there is no adapter.",
            hint="Give --adapter FOLDER, or the model before quantization.",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("Reading a GGUF file needs the package gguf.", hint="pip install gguf")
