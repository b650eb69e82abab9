"""The rows, the model and the floor that the scripts of all peers share, and the measurement.

Imported in the peers' environment too, so it imports nothing of rapidindex. A peer is a function that takes a `Setting`
and returns the function to time, which takes batches (lists of row numbers) and collects their gradients.
"""

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import seconds

LONGEST = 2
"""The number of longest batches on which memory is measured."""


@dataclass(frozen=True)
class Rows:
    """Token ids, their response masks, and the batches as lists of row numbers, longest first."""

    input_ids: list[list[int]]
    is_response: list[list[bool]]
    batches: list[list[int]]

    def padded(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, attention and labels (-100 for none) of a batch, int64 [examples, T] each."""
        T = max(len(self.input_ids[number]) for number in numbers)
        input_ids, attention = torch.zeros(2, len(numbers), T, dtype=torch.int64)
        labels = torch.full((len(numbers), T), -100)
        for row, number in enumerate(numbers):
            ids, wanted = torch.tensor(self.input_ids[number]), torch.tensor(self.is_response[number])
            input_ids[row, : len(ids)], attention[row, : len(ids)] = ids, 1
            labels[row, : len(ids)] = torch.where(wanted, ids, -100)
        return input_ids, attention, labels

    def padded_tokens(self, batches: list[list[int]]) -> int:
        """Return the tokens of the batches with their padding."""
        return sum(len(batch) * max(len(self.input_ids[number]) for number in batch) for batch in batches)


@dataclass(frozen=True)
class Setting:
    """The input of a peer: the folder with the model and the adapter, the rows, and a folder to write to."""

    work: Path
    rows: Rows
    full: bool
    out: Path

    def model(self) -> nn.Module:
        """Load the model with transformers and peft; the adapter is trainable, or every parameter."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.work / "model", dtype=torch.float32)
        if not self.full:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.work / "adapter", is_trainable=True)
        return model.eval()


def logits_of(model: nn.Module, input_ids: Tensor, attention: Tensor) -> Tensor:
    """Return the logits of every token but the first, float [examples, T - 1, vocabulary]."""
    return model(input_ids=input_ids, attention_mask=attention, use_cache=False).logits[:, :-1]


def mean_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each example's counted labels [examples, T], float32 [examples]."""
    labels = labels[:, 1:]
    entropies = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return entropies.sum(1) / (labels != -100).sum(1)


def losses(model: nn.Module, input_ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each example's response tokens, float32 [examples]."""
    return mean_entropies(logits_of(model, input_ids, attention), labels)


def bare(model: nn.Module, input_ids: Tensor, attention: Tensor, labels: Tensor) -> None:
    """Run the floor: the forward and backward pass of ordinary training on the summed loss of a batch."""
    losses(model, input_ids, attention, labels).sum().backward()
    model.zero_grad(set_to_none=True)


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    try:  # ru_maxrss keeps the peak of the parent over an exec; the kernel's own count for this image does not
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(name: str, prepare: Callable[[Setting], Callable], about: dict[str, Any]) -> None:
    """Time the peer and the floor in turn on the rows of the work folder, and write the figures as JSON."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = Rows(**json.loads((options.work / "rows.json").read_text()))
    if options.memory:
        rows = Rows(rows.input_ids, rows.is_response, rows.batches[:LONGEST])
    else:
        rows = Rows(rows.input_ids, rows.is_response, rows.batches[:: options.every])
    out = options.work / "peers-out"
    setting = Setting(options.work, rows, options.full, out)
    figures = {"name": name, **about, "threads": options.threads, "full": options.full}
    figures["versions"] = {part: version(part) for part in [about["package"], "torch", "transformers"]}
    figures |= _memory(setting, prepare) if options.memory else _times(setting, prepare, options.repeats)
    options.json.write_text(json.dumps(figures, indent=1))
    shutil.rmtree(out, ignore_errors=True)


def _memory(setting: Setting, prepare: Callable[[Setting], Callable]) -> dict[str, Any]:
    collect = prepare(setting)
    _emptied(setting.out)
    collect(setting.rows.batches)
    return {"peak_bytes": peak_bytes()}


def _times(setting: Setting, prepare: Callable[[Setting], Callable], repeats: int) -> dict[str, Any]:
    rows, collect, model = setting.rows, prepare(setting), setting.model()
    batches = [rows.padded(batch) for batch in rows.batches]
    _emptied(setting.out)
    bare(model, *batches[-1])  # both once unmeasured: matrices are drawn, memory is taken
    collect(rows.batches[-1:])
    spent: dict[str, list[float]] = {"floor_seconds": [], "seconds": []}
    for _ in range(repeats):
        _emptied(setting.out)
        spent["floor_seconds"].append(seconds(lambda: [bare(model, *batch) for batch in batches]))
        spent["seconds"].append(seconds(lambda: collect(rows.batches)))
    n = sum(map(len, rows.batches))
    written = sum(file.stat().st_size for file in setting.out.rglob("*") if file.is_file())
    return {**spent, "rows": n, "padded_tokens": rows.padded_tokens(rows.batches), "written_bytes": written}


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="with model/, adapter/ and rows.json")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take one batch of every so many")
    parser.add_argument("--full", action="store_true", help="all parameters instead of LoRA")
    parser.add_argument(
        "--memory", action="store_true", help="run the longest batches once, and report the peak memory"
    )
    return parser.parse_args()
