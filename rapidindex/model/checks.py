"""What a model and its tokenizer must be, or influence computed with them would be wrong.

Each check raises ModelError. None needs to know where the model came from, or changes it.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rapidindex.config import DTYPES
from rapidindex.errors import ModelError

_PROBE = 16
"""Tokens of the text with which causality is tried; all but the first four are exchanged."""

_POSITIONS = {"wpe", "pos", "position", "positions", "positional"}
"""Words in the names of tables that have a row for each position."""


def is_adapted(model: torch.nn.Module) -> bool:
    """Return whether `model` is a peft.PeftModel, without the slow import of peft where nobody has imported it."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a tokenizer that cannot map its tokens to characters."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} is not a fast one, so tokens cannot be mapped to characters.",
            hint="Give the model a tokenizer.json.",
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError where the tokenizer has more tokens than the model has embeddings.

    Tokens added past the vocabulary, such as a pad token, do not count.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model embeddings for {rows}.",
            hint="They do not belong together: give the model that the adapter was trained on.",
        )


@dataclass(frozen=True)
class Limits:
    """The token ids and the lengths that a model has rows for: beyond them is an IndexError, or on a GPU an abort."""

    tokenizer: PreTrainedTokenizerBase
    ids: int
    positions: int | None
    """None for a model that computes its positions, or takes them as distances."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> "Limits":
        """Read them off the model's embeddings, and off its tables of positions (GPT-2's wpe, say) if it has any."""
        output = model.get_output_embeddings()
        ids = min(len(model.get_input_embeddings().weight), getattr(output, "out_features", None) or 2**31)
        tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        tables += [name for name, _ in model.named_buffers()]
        parts = [set(re.split(r"[._]", name)) for name in tables]
        listed = any(words & _POSITIONS and "rotary" not in words for words in parts)
        return cls(tokenizer, ids, context_of(model) if listed else None)

    def check(self, ids: Sequence[int], text: str) -> None:
        """Raise ModelError, naming `text` ("line 3", say) and the token or the limit, where `ids` do not fit."""
        largest = int(max(ids))
        if largest >= self.ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(
                f"The token {token!r} in {text} is the tokenizer's {largest + 1:,}th, and the model has embeddings for"
                f" {self.ids:,}.",
                hint="Tokens were added and the tables not resized: call model.resize_token_embeddings(len(tokenizer))"
                " before training, or give the tokenizer that the model was trained with.",
            )
        if self.positions is not None and len(ids) > self.positions:
            raise ModelError(
                f"There are {len(ids):,} tokens in {text}, and the model has {self.positions:,} positions.",
                hint=f"Give --max-length {self.positions}, or a shorter text.",
            )


def context_of(model: nn.Module) -> int | None:
    """Return how many tokens the model's config says that it takes, or None."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context if context and context > 0 else None  # XLNet's is -1, for no limit


def check_language_model(base: nn.Module) -> None:
    """Raise ModelError unless `base` is a language model of transformers on one device, in a dtype of ours."""
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        raise ModelError(
            f"A {type(base).__name__} is no causal language model of transformers.",
            hint="Give what AutoModelForCausalLM makes, or a peft.PeftModel over it.",
        )
    devices = {str(value.device) for value in base.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ModelError(
            f"The model lies on {', '.join(sorted(devices))}.", hint="Load it onto one device, without device_map."
        )
    if str(base.dtype).removeprefix("torch.") not in DTYPES:
        raise ModelError(f"The model computes in {base.dtype}.", hint=f"Convert it to one of: {', '.join(DTYPES)}.")


def check_causal(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError where a token changes the logits before it, as in BERT.

    The loss of the next token means nothing then. Two short forward passes differ in all but the first four tokens.
    Takes a model in eval mode. Some logits that are not finite say nothing; ModelError where none is. Refuses Reformer,
    too, whose reversible layers have a gradient in training alone.
    """
    if model.config.model_type == "reformer":
        raise ModelError("Reformer's layers have no gradient outside of training.", hint="Give another causal model.")
    first, second = _probes(model, tokenizer)
    with torch.no_grad():
        logits = [model(input_ids=ids[None]).logits[0].float() for ids in (first, second)]
    if not any(each.isfinite().any() for each in logits):
        raise _not_finite(model)
    same = len(first) // 4
    before, moved = logits[0][:same].abs(), (logits[0] - logits[1])[:same].abs()
    # Experts see other numbers of tokens, and 8-bit products other outliers: that alone rounds differently.
    rounding = 100 * torch.finfo(torch.float32).eps if _is_exact(model) else 0.1
    if moved.max() > rounding * before.max():
        raise ModelError(
            f"{_name(model)} is no causal language model: a token changes what the model says before it.",
            hint="Give a model that was trained to predict the next token; is_decoder or is_causal in its config.json"
            " says so of architectures that can be both.",
        )


def _not_finite(model: nn.Module) -> ModelError:
    """Return the error for a model whose logits are all infinite or no numbers, with the tensor that makes them so."""
    tensors = (name for name, value in model.named_parameters() if not value.isfinite().all())
    if (spoilt := next(tensors, None)) is not None:
        return ModelError(
            f"{_name(model)} holds values in {spoilt} that are not finite numbers, and so is all that it says.",
            hint="Give a checkpoint from before its training failed, or copy the files again.",
        )
    return ModelError(
        f"All that {_name(model)} says in {model.dtype} overflows.", hint="Give --dtype float32, or bfloat16."
    )


def _name(model: nn.Module) -> str:
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return f"{name} under its adapter" if is_adapted(model) else name


def _probes(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two texts of the same length, int64 [T], whose first quarter is the same and the rest not."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [id for id in range(min(rows, tokenizer.vocab_size)) if id not in special]
    length = min(_PROBE, context_of(model) or _PROBE)
    chosen = torch.tensor(ordinary)[torch.linspace(0, len(ordinary) - 1, 2 * length).long()]
    first, second = chosen[::2].clone(), chosen[1::2].clone()
    second[: length // 4] = first[: length // 4]
    device = model.get_input_embeddings().weight.device
    return first.to(device), second.to(device)


def _is_exact(model: nn.Module) -> bool:
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
