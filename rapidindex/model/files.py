"""Find the files of models and adapters on disk, and fingerprint their content.

Knows files, not tensors, and imports no torch. Only a hub name that is not in the cache needs a network.
"""

import hashlib
import json
import os
import re
import shlex
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidindex.config import EncodingConfig, fingerprint
from rapidindex.errors import ModelError, RapidIndexWarning

_MIB = 2**20
_SLICES = 16
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CONFIG_AND_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FINETUNE_RECORD = "rapidindex-finetune.json"
"""The file in which `finetune` records its settings and, when it is finished, its summary."""
CHECKPOINTS = "checkpoints"
"""The folder inside `finetune`'s output that holds Trainer's checkpoints until training is finished."""
_NOT_CONTENT = {
    "_name_or_path",
    "_attn_implementation",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "peft_version",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Entries of a config.json or adapter_config.json that do not change the function that the model computes."""
_PAIR = ("vocab.json", "merges.txt")
_POINTER = b"version https://git-lfs"
_NUMBERED = re.compile(r"(\D*)(\d*)")
_GIVE_FOLDER = "Give -m the folder that holds its config.json and weights, or a .gguf file."


@dataclass(frozen=True)
class ModelFiles:
    """A base model on disk."""

    folder: Path
    gguf: str | None
    """The file's name in `folder`, or None for an ordinary model."""


def find_model(model: str, *, download: bool = True) -> ModelFiles:
    """Find the files of `model`: a folder, a .gguf file, a folder with one .gguf file, or a hub name.

    A hub model is downloaded unless the cache holds it, or `download` forbids it. Raises ModelError, saying where it
    looked, if there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _check_finished(path)
        return _in_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelFiles(path.parent, path.name)
        raise ModelError(f"{model} is a file, but no GGUF file.", hint=_GIVE_FOLDER)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or os.sep != "/" and os.sep in model:
        raise ModelError(f"There is no model at {model}.", hint=_GIVE_FOLDER)
    if model.lower().endswith(".gguf"):
        raise ModelError(f"There is no file {model}.", hint=_GIVE_FOLDER)
    return ModelFiles(_snapshot(model, download), None)


def _in_folder(folder: Path) -> ModelFiles:
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise ModelError(
            f"{folder} holds an adapter, not a whole model.",
            hint=f"Give the base model and the adapter: -m {base} -a {folder}",
        )
    weights = weight_files(folder)
    absent = [file.name for file in weights if not file.is_file()]
    if len(absent) < len(weights):
        if absent:
            raise ModelError(f"{folder} lacks {absent[0]}.", hint="Download or save the model again.")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds weights, but no config.json.", hint=_GIVE_FOLDER)
        _check_pointers(weights)
        return ModelFiles(folder, None)
    ggufs = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if len(ggufs) == 1:
        return ModelFiles(folder, ggufs[0])
    if ggufs:
        names = ", ".join(ggufs[:5])
        raise ModelError(f"{folder} holds {len(ggufs)} GGUF files: {names}.", hint=f"Name one: -m {folder / ggufs[0]}")
    models = [child for child in _folders(folder) if (child / "config.json").is_file()]
    hint = f"It has models in its subfolders: -m {models[-1]}" if models else _GIVE_FOLDER
    raise ModelError(f"{folder} holds no model weights (*.safetensors, pytorch_model.bin or *.gguf).", hint=hint)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads weights from, whether or not they are there; the first kind counts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file() and isinstance(shards := read_json(index).get("weight_map"), dict):
            files = [folder / str(shard) for shard in sorted(set(shards.values()))]
            if any(file.is_file() for file in files):
                return files
    return []


def has_weights(folder: Path) -> bool:
    """Return whether the folder holds a model's weights, every shard that an index file names included."""
    files = weight_files(folder)
    return bool(files) and all(file.is_file() for file in files)


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder holds a tokenizer's vocabulary, without which its other files say nothing."""
    whole = ("tokenizer.json", "*.model", "vocab.txt", "tekken.json", "*.tiktoken")
    return any(any(folder.glob(name)) for name in whole) or all((folder / name).is_file() for name in _PAIR)


def _check_pointers(files: Iterable[Path]) -> None:
    """Raise ModelError for a file that Git has not fetched the content of."""
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ModelError(
                    f"{file} is a pointer of Git LFS, not the weights themselves.",
                    hint=f"Fetch them: git -C {shlex.quote(str(file.parent))} lfs pull",
                )


def _folders(folder: Path) -> list[Path]:
    """Return the folders in it, checkpoint-20 before checkpoint-1000."""
    folders = [child for child in folder.iterdir() if child.is_dir()]
    return sorted(
        folders, key=lambda child: [(text, int(number or 0)) for text, number in _NUMBERED.findall(child.name)]
    )


def _snapshot(name: str, download: bool) -> Path:
    """Return the folder of a hub model in the cache; download it first if it is not there."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # a name that the hub does not allow
        raise ModelError(f"{name!r} is neither a folder here nor a hub name.", hint=_GIVE_FOLDER) from error
    if isinstance(cached, str) and has_weights(Path(cached).parent):
        return Path(cached).parent
    missing = f"{name} is no folder here, and not (completely) in the Hugging Face cache {constants.HF_HUB_CACHE}"
    if not download:
        raise ModelError(
            f"{missing}, where the index was built with it.",
            hint=f"Say where it lies now with -m FOLDER (or download it: -m {name}).",
        )
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{missing}; HF_HUB_OFFLINE forbids a download.",
            hint=f"Download it where there is a network (`hf download {name}`), or give its folder: -m FOLDER",
        )
    try:
        for weights in ("*.safetensors", "*.bin"):  # the same weights are often there in both formats
            patterns = [weights, *_CONFIG_AND_TOKENIZER]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns="*/*"))
            if has_weights(folder):
                break
        return folder
    except Exception as error:  # a dozen types: no network, no such model, no permission, no space
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{missing}, and the download failed ({type(error).__name__}: {reason}).",
            hint="Give its folder (-m FOLDER), or set HF_HUB_OFFLINE=1 to use only what the cache holds.",
        ) from error


def find_adapter(adapter: str) -> Path:
    """Return the folder of a PEFT adapter; raise ModelError, naming adapters in subfolders, if there is none."""
    folder = Path(adapter).expanduser()
    if not folder.exists():
        raise ModelError(
            f"There is no adapter at {adapter}.", hint="Give --adapter the folder with adapter_config.json."
        )
    if not folder.is_dir():
        raise ModelError(f"{adapter} is a file.", hint=f"Give its folder: --adapter {folder.parent}")
    _check_finished(folder)
    if not (folder / "adapter_config.json").is_file():
        raise _no_adapter(folder)
    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ModelError(
            f"{folder} has an adapter_config.json, but no adapter_model.safetensors.",
            hint="The adapter was not saved completely: save or copy it again.",
        )
    read_json(folder / "adapter_config.json")
    _check_pointers(folder / name for name in _ADAPTER_WEIGHTS if (folder / name).is_file())
    return folder


def _no_adapter(folder: Path) -> ModelError:
    adapters = [child for child in _folders(folder) if (child / "adapter_config.json").is_file()]
    if adapters:
        names = ", ".join(child.name for child in adapters[:8])
        hint = f"Name one: --adapter {adapters[-1]}"
        return ModelError(f"{folder} is no adapter, but holds some: {names}.", hint=hint)
    if (folder / "config.json").is_file():
        return ModelError(f"{folder} is a whole model, not an adapter.", hint=f"Leave --adapter out: -m {folder}")
    return ModelError(
        f"{folder} is no adapter: it has no adapter_config.json.",
        hint="Give --adapter the folder that PEFT's save_pretrained wrote.",
    )


def _check_finished(folder: Path) -> None:
    """Raise ModelError for an output folder of `finetune` in which training is not finished."""
    record = folder / FINETUNE_RECORD
    if record.is_file() and not read_json(record).get("summary"):
        raise ModelError(
            f"Fine-tuning of {folder} is not finished.",
            hint=f"Type its command again, `rapidindex finetune … -o {folder}`: it goes on from the last checkpoint.",
        )


def trained_encoding(folder: str | None) -> dict[str, Any]:
    """Return template, max_length, loss and overlap of `finetune` for this model or adapter; {} if it made neither."""
    place = Path(folder).expanduser() if folder else Path()
    for record in (place / FINETUNE_RECORD, place.parent / FINETUNE_RECORD) if folder else ():  # OUTPUT, OUTPUT/early
        if record.is_file():
            settings = read_json(record).get("settings")
            known = {"loss": "last", **settings} if isinstance(settings, dict) else {}  # as it was without --loss
            return {name: known[name] for name in ("template", "max_length", "loss", "overlap") if name in known}
    return {}


def encoding_of(folder: str | None, **asked: Any) -> EncodingConfig:
    """Return how examples are encoded: as `asked`, where that is not None, or else as `trained_encoding` has it."""
    given = {name: value for name, value in asked.items() if value is not None}
    return EncodingConfig(**{**trained_encoding(folder), **given})


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; raise ModelError if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}.", hint="Save or download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object.", hint="Save or download it again.")
    return value


def warn_if_trained_otherwise(folder: str | None, encoding: EncodingConfig) -> None:
    """Warn, RapidIndexWarning, where `encoding` is not what `trained_encoding` has for this model or adapter."""
    for name, trained in trained_encoding(folder).items():
        if (value := getattr(encoding, name)) != trained:
            text = f"{folder} was trained with --{name.replace('_', '-')} {trained!r}, not {value!r}."
            warnings.warn(text, RapidIndexWarning, stacklevel=5)  # the caller of build or estimate


def model_fingerprint(files: ModelFiles) -> str:
    """Return 16 hexadecimal digits over a model's config and weights (sixteen slices of 1 MiB of each file)."""
    if files.gguf:
        return fingerprint({"gguf": _digest(files.folder / files.gguf)})
    matching = next((found for pattern in _WEIGHTS if (found := sorted(files.folder.glob(pattern)))), [])
    weights = sorted({*matching, *weight_files(files.folder)})
    config = _content(read_json(files.folder / "config.json"))
    return fingerprint({"config": config, "weights": {file.name: _digest(file) for file in weights}})


def adapter_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits over an adapter's settings and every byte of its weights."""
    weights = next(folder / name for name in _ADAPTER_WEIGHTS if (folder / name).is_file())
    settings = _content(read_json(folder / "adapter_config.json"))
    return fingerprint({"config": settings, "weights": content_digest(weights)})


def content_digest(file: Path) -> str:
    """Return the SHA-256 of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def absolute_place(place: str | None) -> str | None:
    """Return an existing path as an absolute one, which is found from anywhere; a hub name as it is."""
    path = Path(place).expanduser() if place else None
    return str(path.absolute()) if path and path.exists() else place


def _content(value: Any) -> Any:
    """Return a config without `_NOT_CONTENT`, and with lists of names sorted, because peft writes them from sets."""
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items() if key not in _NOT_CONTENT}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return [_content(item) for item in value] if isinstance(value, list) else value


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file's size and of slices from its first byte to its last, 16 MiB at most."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _SLICES * _MIB:
            digest.update(stream.read())
            return digest.hexdigest()
        for k in range(_SLICES):
            stream.seek((size - _MIB) * k // (_SLICES - 1))
            digest.update(stream.read(_MIB))
    return digest.hexdigest()
