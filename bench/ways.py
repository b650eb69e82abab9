"""What `bench/caching.py` measures: the floor, ours, and the paper's way taken literally, on one set of batches.

The work folder holds SmolLM2-135M unpacked, a rank-16 LoRA on q, k, v and o whose B is drawn at random, the token ids
of the rows, and an index that `rapidindex build` made of its first few rows: ours writes its shards there.
"""

import itertools
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from bench.peers.measuring import Rows, bare
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.caching.build import build
from rapidindex.caching.shard_writer import ShardWriter, load_compressor
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.data.templates import Template
from rapidindex.demo.demo import unpack_model
from rapidindex.gradients.losses import Batch, example_losses, layers_of, trainable
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.model import LoadedModel, load
from rapidindex.progress import Progress, silent
from rapidindex.store import Store

WAYS = ("floor", "ours", "literal")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIRST_ROWS = 8
"""Rows that the index is begun with, and its second moment estimated from."""


@dataclass
class Setting:
    """The model, the rows as batches, and the index that ours writes to."""

    work: Path
    index: Path
    loaded: LoadedModel
    batches: list[list[Item]]
    shards: list[str] = field(default_factory=list)
    """Names of those that ours has written."""

    @cached_property
    def items(self) -> list[Item]:
        """The rows, longest first."""
        return [item for batch in self.batches for item in batch]

    @cached_property
    def sketch(self) -> Sketch:
        """The shuffles and signs of the literal way."""
        return Sketch(sum(layer.size for layer in layers_of(self.loaded.model)), SketchConfig())

    @cached_property
    def compressor(self) -> Compressor:
        """What turns batches into RapidGrads, as `rapidindex build` makes it."""
        return load_compressor(Store.open(self.index), self.loaded)

    @cached_property
    def numbers(self) -> itertools.count:
        """Numbers for the shards that are written; what another process has left there is removed."""
        for file in (self.index / "sentence").glob("shard-01*.h5"):
            file.unlink()
        return itertools.count(1_000)

    def floor(self, batches: list[list[Item]]) -> None:
        """(a) The forward and backward pass of ordinary training on each batch's summed loss."""
        for batch in batches:
            bare(self.loaded.model, *rows_of(batch).padded(list(range(len(batch)))))

    def ours(self, batches: list[list[Item]]) -> None:
        """(b) What `rapidindex build` does of a shard: RapidGrads, written to disk."""
        rows = Store.open(self.index).rows("sentence")
        writer = ShardWriter(rows, BuildConfig(shard_seconds=1e9), self.numbers, self.shards.append)
        for batch in batches:
            writer.add(batch, self.compressor(as_batch(batch, self.loaded.device)))
        writer.write()

    def literal(self, batches: list[list[Item]]) -> None:
        """(c) One example at a time, by Algorithm 1 step by step."""
        for batch in batches:
            for item in batch:
                self.shuffled(as_batch([item], self.loaded.device))

    def shuffled(self, one: Batch) -> np.ndarray:
        """The RapidGrad of one example: its gradient, normalised by layer, then λ shuffles of rows and columns."""
        model, sketch = self.loaded.model, self.sketch
        parts = torch.autograd.grad(example_losses(model, one).sum(), list(trainable(model).values()))
        flat = torch.cat([part.flatten().float() / part.norm() for part in parts])
        v = torch.nn.functional.pad(flat, (0, sketch.padded - len(flat)))
        for rows, columns in sketch.shuffles:
            v = v.view(len(rows), -1)[torch.from_numpy(rows)].flatten()
            v = v.view(-1, len(columns))[:, torch.from_numpy(columns)].flatten()
        return (v.numpy() * self.signs).reshape(sketch.config.K, -1).sum(1)

    @cached_property
    def signs(self) -> np.ndarray:
        """The Rademacher signs, float32 [padded]."""
        bits = np.unpackbits(self.sketch.negative, bitorder="little")[: self.sketch.padded]
        return np.subtract(1.0, 2.0 * bits, dtype=np.float32)


def make(work: Path, data: str, *, full: bool, dtype: str, progress: Progress = silent) -> None:
    """Make what the work folder lacks, and its index anew."""
    work.mkdir(parents=True, exist_ok=True)
    unpack_model(work / "model", progress)
    if not (work / "adapter").exists():
        write_adapter(work)
    index = index_of(work, full, dtype)
    shutil.rmtree(index, ignore_errors=True)
    gradient = GradientConfig(moment_examples=FIRST_ROWS)
    request = BuildRequest(data, str(index), config_of(work, full, dtype), gradient=gradient, limit=FIRST_ROWS)
    build(request, progress=progress)


def open_made(work: Path, data: str, rows: int, batch_tokens: int, *, full: bool, dtype: str) -> Setting:
    """Load what `make` made, and the first `rows` rows of the data."""
    loaded = load(config_of(work, full, dtype))
    template = Template("alpaca", loaded.tokenizer, 512)
    items = [Item(example, template.encode(example)) for example in read_examples(data, limit=rows).examples]
    return Setting(work, index_of(work, full, dtype), loaded, plan_batches(items, batch_tokens))


def config_of(work: Path, full: bool, dtype: str) -> ModelConfig:
    """The model with the adapter, or with all its parameters."""
    return ModelConfig(str(work / "model"), None if full else str(work / "adapter"), dtype=dtype, device="cpu")


def index_of(work: Path, full: bool, dtype: str) -> Path:
    """The folder of the index."""
    return work / f"index-{'full' if full else 'lora'}-{dtype}"


def write_adapter(work: Path) -> None:
    """A rank-16 LoRA with a random B: with B = 0, as training begins, half of all gradients would be zero."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM", base_model_name_or_path=str(work / "model")
    )
    model = peft.get_peft_model(load(ModelConfig(str(work / "model"))).model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(work / "adapter")


def rows_of(items: list[Item], batches: list[list[int]] | None = None) -> Rows:
    """Items as the peers get them."""
    ids = [[int(token) for token in item.encoding.input_ids] for item in items]
    return Rows(ids, [[bool(counts) for counts in item.encoding.response_mask] for item in items], batches or [])


def write_rows(setting: Setting) -> None:
    """The token ids, response masks and batches for the peers."""
    ends = np.cumsum([0, *map(len, setting.batches)]).tolist()
    rows = rows_of(setting.items, [list(range(a, b)) for a, b in itertools.pairwise(ends)])
    content = {"input_ids": rows.input_ids, "is_response": rows.is_response, "batches": rows.batches}
    (setting.work / "rows.json").write_text(json.dumps(content))
