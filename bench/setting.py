"""The model, rows and index of the benches of caching, and the three methods that they compare on the same batches.

The work folder holds SmolLM2-135M unpacked, a rank-16 LoRA on q, k, v and o whose B is drawn at random, the token ids
of the rows, and an index of the first few rows: our method writes its shards there.
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
from rapidindex import Index
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.caching.build import build
from rapidindex.caching.shard_writer import ShardWriter
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.demo.demo import unpack_model
from rapidindex.gradients.losses import Batch, example_losses, trainable
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.model import load
from rapidindex.progress import Progress

METHODS = ("floor", "ours", "literal")
FIRST_ROWS = 8
"""Rows of the index when it is built; its second moment is estimated from them."""


@dataclass
class Setting:
    """The model, the rows in batches, and the index that our method writes to."""

    work: Path
    index: Index
    batches: list[list[Item]]
    shards: list[str] = field(default_factory=list)
    """Names of the shards that our method has written."""

    @classmethod
    def make(
        cls,
        work: Path,
        data: str,
        rows: int,
        batch_tokens: int,
        progress: Progress,
        *,
        full: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        quantize: str | None = None,
        K: int = SketchConfig.K,
    ) -> "Setting":
        """Make the model and the adapter where they are missing, and the index anew; read `rows` rows of the data."""
        make_model(work, progress)
        folder = index_folder(work, full, quantize or dtype)
        shutil.rmtree(folder, ignore_errors=True)
        gradient, model = GradientConfig(moment_examples=FIRST_ROWS), model_config(work, full, dtype, device, quantize)
        request = BuildRequest(data, str(folder), model, gradient=gradient, sketch=SketchConfig(K), limit=FIRST_ROWS)
        build(request, progress=progress)
        return cls.open(work, data, rows, batch_tokens, full=full, dtype=dtype, device=device, quantize=quantize)

    @classmethod
    def open(
        cls,
        work: Path,
        data: str,
        rows: int,
        batch_tokens: int,
        *,
        full: bool,
        dtype: str,
        device: str = "cpu",
        quantize: str | None = None,
    ) -> "Setting":
        """Open what `make` made."""
        index = Index.open(index_folder(work, full, quantize or dtype), device=device)
        items = [Item(example, index.template.encode(example)) for example in read_examples(data, limit=rows).examples]
        return cls(work, index, plan_batches(items, batch_tokens))

    @cached_property
    def items(self) -> list[Item]:
        """The rows, longest first."""
        return [item for batch in self.batches for item in batch]

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model of the index."""
        return self.index.loaded.model

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor of the index."""
        return self.index.compressor_of("sentence")

    @cached_property
    def numbers(self) -> itertools.count:
        """Numbers for the shards that are written; those that another process has left are removed."""
        for file in (self.index.store.path / "sentence").glob("shard-01*.h5"):
            file.unlink()
        return itertools.count(1_000)

    def run(self, method: str, batches: list[list[Item]]) -> None:
        """Run one of `METHODS` over the batches."""
        getattr(self, method)(batches)

    def floor(self, batches: list[list[Item]]) -> None:
        """(a) The forward and backward pass of ordinary training on each batch's summed loss."""
        for batch in batches:
            padded = as_rows(batch).padded(list(range(len(batch))))
            bare(self.model, *(tensor.to(self.index.loaded.device) for tensor in padded))

    def ours(self, batches: list[list[Item]]) -> None:
        """(b) The work of `rapidindex build` on one shard: RapidGrads, written to disk."""
        rows = self.index.store.rows("sentence")
        writer = ShardWriter(rows, BuildConfig(shard_seconds=1e9), self.numbers, self.shards.append)
        for batch in batches:
            writer.add(batch, self.compressor(as_batch(batch, self.index.loaded.device)))
        writer.write()

    def literal(self, batches: list[list[Item]]) -> None:
        """(c) One example at a time, by Algorithm 1 step by step."""
        for item in itertools.chain(*batches):
            self._shuffled(as_batch([item], self.index.loaded.device))

    def _shuffled(self, example: Batch) -> np.ndarray:
        """Return the RapidGrad of a gradient that is normalised by layer and shuffled λ times by row and column."""
        sketch: Sketch = self.compressor.sketch
        parts = torch.autograd.grad(example_losses(self.model, example).sum(), list(trainable(self.model).values()))
        flat = torch.cat([part.flatten().float() / part.norm() for part in parts])
        v = torch.nn.functional.pad(flat, (0, sketch.padded - len(flat)))
        for rows, columns in sketch.shuffles:
            v = v.view(len(rows), -1)[torch.from_numpy(rows)].flatten()
            v = v.view(-1, len(columns))[:, torch.from_numpy(columns)].flatten()
        return (v.cpu().numpy() * self._signs).reshape(sketch.config.K, -1).sum(1)

    @cached_property
    def _signs(self) -> np.ndarray:
        """The Rademacher signs, float32 [padded]."""
        sketch = self.compressor.sketch
        bits = np.unpackbits(sketch.negative, bitorder="little")[: sketch.padded]
        return np.subtract(1.0, 2.0 * bits, dtype=np.float32)

    def write_rows(self) -> None:
        """Write the token ids, response masks and batches for the peers."""
        ends = np.cumsum([0, *map(len, self.batches)]).tolist()
        rows = as_rows(self.items, [list(range(a, b)) for a, b in itertools.pairwise(ends)])
        (self.work / "rows.json").write_text(json.dumps(vars(rows)))


def as_rows(items: list[Item], batches: list[list[int]] | None = None) -> Rows:
    """Return items in the form that the peers read."""
    ids = [item.encoding.input_ids.tolist() for item in items]
    return Rows(ids, [item.encoding.response_mask.tolist() for item in items], batches or [])


def model_config(work: Path, full: bool, dtype: str, device: str = "cpu", quantize: str | None = None) -> ModelConfig:
    """Return the model with its adapter, or with all parameters trainable."""
    places = str(work / "model"), None if full else str(work / "adapter")
    return ModelConfig(*places, quantize=quantize, dtype=dtype, device=device)


def index_folder(work: Path, full: bool, dtype: str) -> Path:
    return work / f"index-{'full' if full else 'lora'}-{dtype}"


def make_model(work: Path, progress: Progress) -> None:
    """Unpack the model, and write a rank-16 LoRA with a random B: with B = 0 half of all gradients would be zero."""
    work.mkdir(parents=True, exist_ok=True)
    unpack_model(work / "model", progress)
    if (work / "adapter").exists():
        return
    import peft

    torch.manual_seed(0)
    base, targets = str(work / "model"), ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = {"r": 16, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**lora, base_model_name_or_path=base)
    model = peft.get_peft_model(load(ModelConfig(base)).model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(work / "adapter")
