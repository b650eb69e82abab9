"""Load base model, adapter and tokenizer as ordinary objects of transformers and peft, or adopt them; generate.

Influence is measured on the trainable parameters: the adapter's, or all of them where there is no adapter. Knows
nothing of examples or gradients. `files.py` finds the files, and `loading.py` reads them.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rapidindex.config import ModelConfig
from rapidindex.data.templates import continuation
from rapidindex.errors import ModelError, RapidIndexError, ResourceError, UsageError
from rapidindex.model.adapters import add_adapter, check_adapter, train_adapter
from rapidindex.model.checks import (
    Limits,
    check_causal,
    check_fast,
    check_language_model,
    check_vocabulary,
    context_of,
    is_adapted,
)
from rapidindex.model.files import adapter_fingerprint, find_adapter, find_model, model_fingerprint
from rapidindex.model.fingerprints import WEIGHTS, tokenizer_fingerprint, weights_fingerprints
from rapidindex.model.loading import (
    disable_cache,
    keep_differentiable,
    load_base,
    load_tokenizer,
    quantization_of,
    quiet_libraries,
    train_everything,
    translate_errors,
)

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LoadedModel:
    """A model ready for gradients: eval mode, no cache, and `requires_grad` on what is trainable and nothing else."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    """The options with which `load` gives the same model, as far as they are known."""
    fingerprints: dict[str, str]
    """Of `model`, `adapter` (empty without one) and `tokenizer`: 16 hexadecimal digits over files, or, for a model that
    `adopt` took from memory, `weights:` and 16 digits. Where the files lie does not matter."""
    device: torch.device

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name, in the model's order; tied ones occur once."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @cached_property
    def limits(self) -> Limits:
        """The token ids and lengths that the model takes."""
        return Limits.of(self.model, self.tokenizer)

    def fingerprint_of(self, part: str, like: str) -> str:
        """Return the fingerprint of `model`, `adapter` or `tokenizer` in the kind of `like`: of files or of weights.

        Raises ModelError where `like` is of files and this model was taken from memory, unless the files that its
        `config` names hold the same weights.
        """
        own = self.fingerprints[part]
        if not own or not like or own.startswith(WEIGHTS) == like.startswith(WEIGHTS):
            return own
        if like.startswith(WEIGHTS):
            return self._weights[part]
        if part not in self._files:
            raise ModelError(
                f"The {part} was given as an object, and the index was built from files: whether they are the same"
                f" cannot be told, because {getattr(self.config, part) or 'no known folder'} holds other weights.",
                hint="Open the index with the paths of model and adapter.",
            )
        return self._files[part]

    @cached_property
    def _weights(self) -> dict[str, str]:
        return weights_fingerprints(self.model)

    @cached_property
    def _files(self) -> dict[str, str]:
        """The fingerprints of the files that `config` names, for those parts that hold the same weights as this model.

        The model is loaded a second time for that, into the computer's memory unless it is quantized.
        """
        device = self.config.device if self.config.quantize else "cpu"
        try:
            saved = load(replace(self.config, device=device)) if self.config.model else None
        except RapidIndexError:  # the files are gone, or were never there
            saved = None
        weights = weights_fingerprints(saved.model) if saved else {}
        return {part: saved.fingerprints[part] for part, value in weights.items() if value == self._weights[part]}


def load(config: ModelConfig, *, attn_implementation: str | None = None) -> LoadedModel:
    """Load base, adapter and tokenizer.

    `attn_implementation` is None for the architecture's own (mostly sdpa), or `eager`. Raises UsageError for options
    that exclude each other, ResourceError for a missing device or too little memory, and ModelError for files that are
    missing, damaged or do not belong together.
    """
    device = resolve_device(config.device)
    if config.quantize and not config.adapter:
        raise UsageError(
            f"--quantize {config.quantize} freezes the base, and without an adapter nothing is left to explain.",
            hint="Give --adapter FOLDER, or leave --quantize out.",
        )
    adapter = find_adapter(config.adapter) if config.adapter else None
    files = find_model(config.model, download=not config.recorded)
    with quiet_libraries(), translate_errors(config):
        tokenizer = load_tokenizer(files, adapter)
        model = load_base(files, config, device, attn_implementation)
        check_vocabulary(model, tokenizer)
        if adapter:
            model = add_adapter(model, adapter)
        else:
            train_everything(model, config)
        check_causal(model.eval(), tokenizer)
    fingerprints = {
        "model": model_fingerprint(files),
        "adapter": adapter_fingerprint(adapter) if adapter else "",
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    loaded = LoadedModel(model, tokenizer, config, fingerprints, device)
    if not loaded.trainable:
        raise ModelError(f"Nothing is trainable in {config.adapter or config.model}.", hint="Give a LoRA adapter.")
    return loaded


def adopt(
    model: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase, *, adapter: str | Path | None = None
) -> LoadedModel:
    """Take a model from memory, and leave it in place as `load` leaves its own: see `LoadedModel`.

    The active adapter of a PeftModel becomes trainable, or every parameter of another model. `adapter` is the folder in
    which that adapter is saved, if it is. Raises ModelError for a model or tokenizer that `load` would refuse.
    """
    base = model.get_base_model() if is_adapted(model) else model
    check_language_model(base)
    if tokenizer is None:
        raise UsageError("A loaded model comes with its tokenizer, and none was given.", hint="Give tokenizer=….")
    check_fast(tokenizer)
    check_vocabulary(base, tokenizer)
    dtype, device = str(base.dtype).removeprefix("torch."), next(model.parameters()).device
    saved = str(adapter) if adapter else None
    config = ModelConfig(base.name_or_path, saved, quantization_of(base), dtype, str(device))
    if model is base:
        train_everything(base, config)
    else:
        check_adapter(model.active_peft_config, "The model's adapter")
        train_adapter(model)
    keep_differentiable(base)
    disable_cache(base)
    with quiet_libraries(), translate_errors(config):
        check_causal(model.eval(), tokenizer)
    fingerprints = {**weights_fingerprints(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    return LoadedModel(model, tokenizer, config, fingerprints, device)


@dataclass(frozen=True)
class Generated:
    """A model's own answer, as it was given."""

    prompt_ids: list[int]
    """The tokens that it continues."""
    ids: list[int]
    """Its tokens, without the one that ended it."""
    text: str


def generate(
    loaded: LoadedModel,
    prompt_text: str,
    *,
    add_special_tokens: bool = True,
    max_new_tokens: int = 64,
    seed: int | None = None,
    each: Callable[[str], bool] | None = None,
) -> Generated:
    """Return the model's answer to `prompt_text`, to which no template is applied: greedy, or drawn by `seed`.

    `each` is called with the answer so far after each token, and ends it by returning True.

    The model's state does not change, and nothing but the tokens that end an answer is taken from its
    generation_config. Raises UsageError for an empty prompt, and ModelError for one that fills the model's context.
    """
    prompt_ids = _open_ended(loaded.tokenizer, prompt_text, add_special_tokens)
    if not prompt_ids:
        raise UsageError("The prompt has no tokens.")
    loaded.limits.check(prompt_ids, "the prompt")
    context = context_of(loaded.model) or 2**31
    if len(prompt_ids) >= context:
        raise ModelError(
            f"The prompt has {len(prompt_ids)} tokens; the model takes {context}.", hint="Shorten the prompt."
        )
    ends, prompt = _end_tokens(loaded), torch.tensor([prompt_ids], device=loaded.device)
    options = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - len(prompt_ids)),
        do_sample=seed is not None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    criteria = StoppingCriteriaList([_Each(loaded, prompt_ids, each)] if each else [])
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with quiet_libraries(), torch.no_grad(), _generating(loaded.model, options), torch.random.fork_rng(devices):
        torch.manual_seed(seed or 0)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        output = loaded.model.generate(**inputs, stopping_criteria=criteria)
    ids = list(itertools.takewhile(lambda id: id not in ends, output[0, len(prompt_ids) :].tolist()))
    return Generated(prompt_ids, ids, continuation(loaded.tokenizer, prompt_ids, ids)[0])


class _Each(StoppingCriteria):
    """Calls a function with the text of an answer after each of its tokens; the answer ends where it returns True."""

    def __init__(self, loaded: LoadedModel, prompt_ids: list[int], each: Callable[[str], bool]) -> None:
        self.loaded, self.prompt_ids, self.each = loaded, prompt_ids, each
        self.ends = _end_tokens(loaded)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        given = input_ids[0, len(self.prompt_ids) :].tolist()
        ids = list(itertools.takewhile(lambda id: id not in self.ends, given))
        stop = self.each(continuation(self.loaded.tokenizer, self.prompt_ids, ids)[0])
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)


def _open_ended(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of `text` without those that the tokenizer adds behind it: an answer must follow."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_special_tokens_mask=True, verbose=False)
    ids = encoded["input_ids"]
    while ids and encoded["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    return ids


def resolve_device(name: str) -> torch.device:
    """Return the device named `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises UsageError for another name, and ResourceError where this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name!r} is unknown.", hint="Choose auto, cpu, cuda, cuda:1 (and so on) or mps.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(f"--device {name}: this machine has {count} CUDA devices.", hint="Use --device auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("--device mps: this machine has no Metal device.", hint="Use --device auto.")
    return device


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Return the ids that end an answer: the tokenizer's and those of the model's generation_config."""
    configured = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [loaded.tokenizer.eos_token_id, *ids] if end is not None})


@contextlib.contextmanager
def _generating(model: torch.nn.Module, options: GenerationConfig) -> Iterator[None]:
    """Put the model into eval mode, with these options of generation alone; restore every module's own afterwards."""
    modules = [module for _, module in model.named_modules()]
    training = [module.training for module in modules]
    configured = [(module, module.generation_config) for module in modules if hasattr(module, "generation_config")]
    model.eval()
    for module, _ in configured:
        module.generation_config = options
    try:
        yield
    finally:
        for module, before in configured:
            module.generation_config = before
        for module, before in zip(modules, training, strict=True):
            module.training = before
