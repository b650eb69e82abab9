"""Put peft's adapters on a base, or refuse them: what peft would fill with random values, or leave out, is an error.

`fingerprints.py` tells the weights of an adapter from those of its base.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from rapidindex.errors import ModelError
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.model.fingerprints import tensors_fingerprint

if TYPE_CHECKING:
    from peft import PeftModel

_REPEATABLE = ("pissa", "olora")
"""Ways in which LoRA begins by changing its base, but always alike: a whole SVD or QR of each weight."""
_STARTS_FROM_DATA = ("corda", "loftq", "lora_ga")
"""Ways in which LoRA begins by changing its base after data, or a GPU, that nobody has when the adapter is loaded. peft
leaves the base of `lora_ga` as it is, without a word: it would be another model than was trained."""
_CONVERT = (
    "Convert it to plain LoRA where it was trained: model.save_pretrained(FOLDER,"
    " path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)."
)
_WRAPPED = "base_model.model."
"""What peft puts before the names of a base."""


def add_adapter(model: PreTrainedModel, folder: Path) -> "PeftModel":
    """Return `model` under the adapter in `folder`.

    Raises ModelError for an adapter that is damaged, does not fit, or is another each time it is loaded.
    """
    import peft

    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # of safetensors, of peft's own, KeyError for a kind that peft does not know
        raise ModelError(
            f"The adapter {folder} cannot be loaded ({type(error).__name__}: {_first_line(error)}).",
            hint=f"Save or copy it again; peft {peft.__version__} has to know its kind.",
        ) from error
    check_adapter(settings, str(folder))
    start = getattr(settings, "init_lora_weights", None)
    if start in _STARTS_FROM_DATA:
        raise ModelError(
            f"The adapter {folder} belongs to a base that was changed before training (init_lora_weights={start!r}),"
            " and the change cannot be made again from its files.",
            hint=f"{_CONVERT} Or save the changed base with it, write true for init_lora_weights in its"
            " adapter_config.json, and give that base with -m.",
        )
    _check_sizes(model, folder, weights)
    its_base = settings.base_model_name_or_path or "another model"
    hint = f"The adapter names {its_base} as its base: give it with -m." if its_base != model.name_or_path else ""
    untouched = {name: value for name, value in model.named_parameters() if _WRAPPED + name not in weights}
    before = tensors_fingerprint(untouched)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        result = peft.set_peft_model_state_dict(adapted, weights)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ModelError(f"The adapter {folder} does not fit {model.name_or_path}: {reason}", hint=hint) from error
    missing, extra = _never_loaded(adapted, result.missing_keys), sorted(result.unexpected_keys)
    if missing or extra:
        odd = f"it lacks {missing[0]}" if missing else f"the model has no place for {extra[0]}"
        raise ModelError(f"The adapter {folder} does not fit {model.name_or_path}: {odd}.", hint=hint)
    if start not in _REPEATABLE and tensors_fingerprint(untouched) != before:
        raise ModelError(
            f"The adapter {folder} changes the weights of its base when it is loaded (init_lora_weights={start!r}),"
            " and never twice in the same way.",
            hint=_CONVERT,
        )
    return adapted


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].strip()


def _check_sizes(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Raise ModelError where the adapter's own copy of an embedding has another number of tokens than the model."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is one for one in embeddings)]
    rows = len(embeddings[0].weight)
    for key, value in weights.items():
        if any(key == f"{_WRAPPED}{name}.weight" for name in names) and len(value) != rows:
            raise ModelError(
                f"The adapter {folder} was trained over {len(value)} tokens, and {model.name_or_path} has {rows}.",
                hint="Resize the base as before that training, with model.resize_token_embeddings"
                f"({len(value)}), save it with its tokenizer, and give that folder with -m.",
            )


def _never_loaded(adapted: "PeftModel", missing: list[str]) -> list[str]:
    """Return the names of trainable parameters that got no value; layers may share one, under a name each."""
    names: dict[int, list[str]] = {}
    for name, value in adapted.named_parameters(remove_duplicate=False):
        if value.requires_grad:
            names.setdefault(id(value), []).append(name)
    return sorted(group[0] for group in names.values() if set(group) <= set(missing))


def check_adapter(settings: Any, name: str) -> None:
    """Raise ModelError for a kind of adapter that is no change of weights (`settings`: its peft.PeftConfig)."""
    kind = settings.peft_type.value
    if settings.is_prompt_learning or kind == "ADAPTION_PROMPT":
        fault = "its virtual tokens belong to no response"
    elif kind == "XLORA":
        fault = "it weighs its parts by the whole text, so that a token changes what the model says before it"
    else:
        return
    raise ModelError(
        f"{name} is of the kind {kind}: {fault}.",
        hint="Give an adapter that changes the model's weights, such as LoRA.",
    )


def train_adapter(model: Any) -> None:
    """Let the active adapter of a peft.PeftModel, and nothing else, require a gradient.

    Raises ModelError where it is merged into the base.
    """
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ModelError(
            "The adapter is merged into the base, so it has no gradient.", hint="Call model.unmerge_adapter() first."
        )
    model.set_adapter(model.active_adapter)
    model.base_model._mark_only_adapters_as_trainable(model.base_model.model)  # no public way frees biases as well
