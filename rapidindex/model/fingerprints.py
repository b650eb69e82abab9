"""Fingerprints of a model and a tokenizer in memory, wherever they came from.

The fingerprints of files are in `files.py`. A model's two kinds differ: a file also holds its config, and dtypes may
change while it is loaded. `weights:` marks those of tensors.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rapidindex.config import fingerprint
from rapidindex.model.checks import is_adapted

WEIGHTS = "weights:"
_SLICES = 16
_BASE_BYTES = 64 * 2**20


def weights_fingerprints(model: nn.Module) -> dict[str, str]:
    """Return the fingerprints of `model` and `adapter` (empty without one): `weights:` and 16 hexadecimal digits.

    They cover names, shapes, dtypes and content: every byte of the active adapter with its scaling, and of a base of
    more than 64 MiB evenly spaced slices of each tensor, 64 MiB in all.
    """
    if not is_adapted(model):
        return {"model": _digest(model.named_parameters(), _BASE_BYTES), "adapter": ""}
    import peft

    active = model.active_adapter
    state = peft.get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    scales = {
        name: module.scaling[active]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and active in module.scaling
    }
    return {
        "model": _digest(_base_parameters(model), _BASE_BYTES),
        "adapter": _digest(state.items(), None, json.dumps([model.peft_config[active].peft_type, scales])),
    }


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a base with these parameters, as `weights_fingerprints` does."""
    return _digest(tensors.items(), _BASE_BYTES)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hexadecimal digits over a fast tokenizer's rules, vocabulary, special tokens and chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return fingerprint({"backend": state, "special": special, "chat": tokenizer.chat_template})


def _base_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield the parameters of the base under the names that they have without an adapter."""
    of_adapters = (f".{model.base_model.prefix}", ".modules_to_save.", ".trainable_tokens_")
    for name, value in model.get_base_model().named_parameters():
        if not any(part in f".{name}" for part in of_adapters):
            yield re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name), value


def _digest(tensors: Iterable[tuple[str, Tensor]], limit: int | None, settings: str = "") -> str:
    """Hash the tensors in the order of their names; read `limit` bytes of them at most, unless it is None."""
    named = dict(tensors)
    size = sum(value.numel() * value.element_size() for value in named.values())
    share = size if limit is None or size <= limit else limit // len(named)
    digest = hashlib.sha256(settings.encode())
    for name, value in sorted(named.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_bytes(value.detach().reshape(-1), share))
    return WEIGHTS + digest.hexdigest()[:16]


def _bytes(flat: Tensor, limit: int) -> bytes:
    """Return the bytes of a tensor of one axis, or of sixteen slices of it, from its first entry to its last."""
    if flat.numel() * flat.element_size() > limit:
        length = max(1, limit // _SLICES // flat.element_size())
        starts = [(len(flat) - length) * k // (_SLICES - 1) for k in range(_SLICES)]
        flat = torch.cat([flat[start : start + length] for start in starts])
    return flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
