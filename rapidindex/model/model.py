"""Base model, adapter and tokenizer, loaded as ordinary objects of transformers and peft; greedy generation.

What is trainable is what influence is about: the adapter's parameters, or every parameter where there is no adapter.
Knows nothing of examples or gradients. Where the files lie is `files.py`, how they are read `loading.py`.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rapidindex.config import ModelConfig, fingerprint
from rapidindex.errors import ModelError, ResourceError, UsageError
from rapidindex.model.files import adapter_fingerprint, find_adapter, find_model, model_fingerprint
from rapidindex.model.loading import (
    add_adapter,
    check_vocabulary,
    load_base,
    load_tokenizer,
    quiet_libraries,
    train_everything,
    translate_errors,
)


@dataclass
class LoadedModel:
    """A model ready for gradients: eval mode, no cache, and `requires_grad` on what is trainable and nothing else."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    fingerprints: dict[str, str]
    """16 hexadecimal digits each for `model`, `adapter` (empty without one) and `tokenizer`; paths do not enter."""
    device: torch.device

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name, in the model's order; tied ones stand once."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


def load(config: ModelConfig, *, attn_implementation: str | None = None) -> LoadedModel:
    """Load base, adapter and tokenizer. `attn_implementation`: None for the architecture's own (mostly sdpa), `eager`.

    UsageError for options that exclude each other, ResourceError for a missing device or too little memory, ModelError
    for files that are missing, damaged or do not belong together.
    """
    device = resolve_device(config.device)
    if config.quantize and not config.adapter:
        raise UsageError(
            f"--quantize {config.quantize} freezes the base, and without an adapter nothing is left to explain.",
            hint="Give --adapter FOLDER, or leave --quantize out.",
        )
    adapter = find_adapter(config.adapter) if config.adapter else None
    files = find_model(config.model)
    with quiet_libraries(), translate_errors(config):
        tokenizer = load_tokenizer(files, adapter)
        model = load_base(files, config, device, attn_implementation)
        check_vocabulary(model, tokenizer)
        if adapter:
            model = add_adapter(model, adapter)
        else:
            train_everything(model, config)
        model.eval()
    fingerprints = {
        "model": model_fingerprint(files),
        "adapter": adapter_fingerprint(adapter) if adapter else "",
        "tokenizer": _tokenizer_fingerprint(tokenizer),
    }
    loaded = LoadedModel(model, tokenizer, config, fingerprints, device)
    if not loaded.trainable:
        raise ModelError(f"Nothing is trainable in {config.adapter or config.model}.", hint="Give a LoRA adapter.")
    return loaded


def generate(
    loaded: LoadedModel, prompt_text: str, *, add_special_tokens: bool = True, max_new_tokens: int = 64
) -> str:
    """The model's greedy answer to `prompt_text` as it stands, without special tokens. The model is left as it was.

    UsageError for an empty prompt, ModelError for one that fills the model's context.
    """
    ids = loaded.tokenizer(prompt_text, add_special_tokens=add_special_tokens)["input_ids"]
    if not ids:
        raise UsageError("The prompt has no tokens.")
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if len(ids) >= longest:
        raise ModelError(f"The prompt has {len(ids)} tokens; the model takes {longest}.", hint="Shorten the prompt.")
    ends = _end_tokens(loaded)
    # What the model's own generation_config may set otherwise is named here, so that the answer is the greedy one.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    room = min(max_new_tokens, longest - len(ids))
    if room < 1:
        return ""
    prompt = torch.tensor([ids], device=loaded.device)
    with quiet_libraries(), torch.no_grad(), _evaluating(loaded.model):
        output = loaded.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=room,
            min_new_tokens=0,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
            **greedy,
        )
    return loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a device that is there; ResourceError where it is not."""
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


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return fingerprint({"backend": state, "special": special, "chat": tokenizer.chat_template})


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end an answer: the tokenizer's and those of the model's generation_config."""
    named = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return sorted({end for end in [loaded.tokenizer.eos_token_id, *ids] if end is not None})


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
