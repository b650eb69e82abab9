"""RapidGrads or the two-sided projection? Time, memory, and how well rows keep inner products, on one model.

    python -m bench.projection --data DATA -m MODEL [-a ADAPTER] --work FOLDER

Time is that of the processor, on one thread, so that other work on the machine counts little: the methods take turns on
the same batches, beside the bare forward and backward pass. Peak memory is that of a process for each method. Fidelity:
over all pairs of examples within a batch, the correlation of the rows' inner products with those of the whole
gradients, which have the same correction and length 1.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import parser, save
from bench.peers.measuring import bare, peak_bytes
from bench.setting import as_rows
from rapidindex.caching.batches import Item, as_batch, padded_tokens, plan_batches
from rapidindex.caching.estimate import model_bytes
from rapidindex.caching.job import Job, prepare
from rapidindex.config import BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.gradients.rapidgrad import Compressor, projection_of
from rapidindex.gradients.second_moment import RowColumn, preconditioner_of
from rapidindex.progress import Bars
from rapidindex.recipe import Recipe

METHODS = {
    "rapidgrad, estimate": ("rapidgrad", "estimate"),
    "rapidgrad, none": ("rapidgrad", "none"),
    "two-sided, factored": ("two-sided", "factored"),
    "two-sided, kfac": ("two-sided", "kfac"),
    "two-sided, none": ("two-sided", "none"),
    "two-sided, estimate": ("two-sided", "estimate"),
}
LENGTHS = (65_536, 16_384, 4_096)
CORRECTIONS = ("none", "factored")
PARTS = ("fidelity", "seconds", "memory")


@dataclass(frozen=True)
class Fold:
    """Rows of a K, and their folds: sums of neighbours."""

    rows: Tensor

    def of(self, K: int) -> Tensor:
        """Return the fold of K entries."""
        return self.rows.view(len(self.rows), K, -1).sum(2)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    model = ModelConfig(options.model, options.adapter, device="cpu")
    job = prepare(BuildRequest(options.data, str(options.work / "none"), model, limit=options.rows))
    batches = plan_batches(job.items, options.batch_tokens)
    if options.method:
        run(job, options.method, [min(batches, key=lambda batch: -padded_tokens(batch))])
        print(json.dumps(peak_bytes()))
        return
    with Bars() as bars:
        figures = {
            "gradient_size": job.size,
            "model_bytes": model_bytes(job.loaded.model),
            "layers": len(job.layers),
            "rows": len(job.items),
            "padded_tokens": sum(map(padded_tokens, batches)),
            "longest_batch_tokens": max(map(padded_tokens, batches)),
            "adapter": options.adapter is not None,
        }
        if "fidelity" in options.parts:
            figures["fidelity"] = fidelity(job, options, bars)
        if "seconds" in options.parts:
            figures["seconds"] = times(job, batches, options, bars)
        if "memory" in options.parts:
            figures["peak_bytes"] = {name: peak_of(name, options) for name in options.methods}
        name = f"projection_{'lora' if options.adapter else 'full'}"
        bars.say(f"written to {save(name, figures, options)}")


def parse() -> argparse.Namespace:
    add = (options := parser(__doc__, data=True)).add_argument
    add("-m", "--model", required=True)
    add("-a", "--adapter")
    add("--rows", type=int, default=24)
    add("--batch-tokens", type=int, default=512)
    add("--pairs", type=int, default=12, help="examples in a batch whose pairs are compared")
    add("--repeats", type=int, default=3)
    add("--methods", nargs="*", default=["floor", *METHODS], choices=["floor", *METHODS])
    add("--parts", nargs="*", default=PARTS, choices=PARTS)
    add("--method", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.smoke:
        given.rows, given.repeats, given.pairs = 6, 1, 3
    return given


def recipe_of(job: Job, projection: str, second_moment: str, K: int = 65_536) -> Recipe:
    """Return the job's recipe with these options."""
    asked = BuildRequest(
        "data",
        "index",
        "model",
        gradient=GradientConfig(second_moment=second_moment),
        sketch=SketchConfig(K, projection=projection),
    )
    return Recipe(**{**vars(job.recipe), "gradient": asked.gradient, "sketch": asked.sketch})


def compressor_of(job: Job, method: str) -> Compressor:
    """Return a method's compressor; its second moment is 1 everywhere, which takes the same time."""
    recipe = recipe_of(job, *METHODS[method])
    kind = preconditioner_of(recipe)
    v, vectors = np.ones(kind.moment_entries(job.layers), "f4"), np.zeros(kind.vector_entries(job.layers), "f4")
    return Compressor.of(recipe, job.gradients, v=v, vectors=vectors)


def run(job: Job, method: str, batches: list[list[Item]], compressor: Compressor | None = None) -> None:
    """Run a method, or the floor, over the batches."""
    if method != "floor":
        compressor = compressor or compressor_of(job, method)
    for batch in batches:
        if method == "floor":
            bare(job.loaded.model, *as_rows(batch).padded(list(range(len(batch)))))
        else:
            compressor(as_batch(batch, "cpu"))


def times(job: Job, batches: list[list[Item]], options: argparse.Namespace, bars: Bars) -> dict[str, list[float]]:
    """Return the processor's seconds of each method, one figure a repeat."""
    spent: dict[str, list[float]] = {method: [] for method in options.methods}
    for number, method in enumerate(options.methods):
        bars("time", number, len(options.methods))
        compressor = None if method == "floor" else compressor_of(job, method)
        run(job, method, batches[-1:], compressor)  # maps and signs are drawn, and gradients compared with autograd's
        floors = []
        for _ in range(options.repeats):
            floors.append(processor_seconds(lambda: run(job, "floor", batches)))
            work = floors[-1] if method == "floor" else None
            spent[method].append(work or processor_seconds(lambda m=method, c=compressor: run(job, m, batches, c)))
        spent[f"floor beside {method}"] = floors
    return spent


def processor_seconds(work: Any) -> float:
    """Return the seconds of the processor that `work` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_of(method: str, options: argparse.Namespace) -> int:
    """Return the peak bytes of a process that runs one method over the longest batch."""
    command = [sys.executable, "-m", "bench.projection", "--method", method, "--work", str(options.work)]
    command += ["--data", options.data, "-m", options.model, *(["-a", options.adapter] if options.adapter else [])]
    command += ["--rows", str(options.rows), "--batch-tokens", str(options.batch_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def fidelity(job: Job, options: argparse.Namespace, bars: Bars) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by correction and kind of row, the correlation of inner products with exact ones, and their error."""
    groups = [job.items[at : at + options.pairs] for at in range(0, len(job.items), options.pairs)]
    groups = [group for group in groups if len(group) > 1]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for correction in CORRECTIONS:
        pairs: dict[str, list[np.ndarray]] = {}
        apply = correction_of(job, correction, groups[0])
        for number, group in enumerate(groups):
            bars(f"fidelity, {correction}", number, len(groups))
            for name, products in products_of(job, apply, group):
                pairs.setdefault(name, []).append(products)
        exact = np.concatenate(pairs.pop("exact"))
        found[correction] = {name: agreement(np.concatenate(values), exact) for name, values in pairs.items()}
    return found


def correction_of(job: Job, correction: str, sample: list[Item]) -> Any:
    """Return the correction of one layer's gradients, estimated from these examples."""
    if correction == "none":
        return lambda number, values: values
    batches = [as_batch(sample[at : at + 4], "cpu") for at in range(0, len(sample), 4)]
    means, _ = RowColumn.estimate(job.gradients, batches, 0, lambda batches, stage: batches)
    return RowColumn(job.layers, RowColumn.factors_of(means, job.layers), None).apply


def products_of(job: Job, apply: Any, group: list[Item]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the inner products of all pairs of a group: exact, and of each kind of row, lengths 1 by the exact norm."""
    above = np.triu_indices(len(group), 1)
    kinds = {
        (projection, K): projection_of(recipe_of(job, projection, "none", K).sketch, job.layers)
        for projection in ("rapidgrad", "two-sided")
        for K in (LENGTHS if projection == "two-sided" else LENGTHS[:1])
    }
    sums = {kind: projection.empty(len(group)) for kind, projection in kinds.items()}
    exact = torch.zeros(len(group), len(group), dtype=torch.float64)

    def consume(number: int, values: Tensor) -> None:
        values = apply(number, values)
        exact.add_(values @ values.T)
        for kind, projection in kinds.items():
            projection.add(sums[kind], job.layers[number].start, values)

    job.gradients(as_batch(group, "cpu"), consume)
    lengths = exact.diagonal().sqrt()
    scale = (lengths[:, None] * lengths)[above].numpy()
    yield "exact", exact[above].numpy() / scale
    for (projection, K), total in sums.items():
        rows = Fold(kinds[projection, K].finish(total))
        for folded in LENGTHS:
            if folded == K or K == LENGTHS[0] and folded < K:
                name = f"{projection}, K = {folded}" + (
                    f" folded from {K}" if projection == "two-sided" and folded < K else ""
                )
                kept = rows.of(folded).double()
                yield name, (kept @ kept.T)[above].numpy() / scale


def agreement(products: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return how products agree with exact ones."""
    error = products - exact
    return {
        "pairs": len(exact),
        "pearson": float(np.corrcoef(products, exact)[0, 1]),
        "rms_error": float(np.sqrt(np.mean(error**2))),
        "spread": float(exact.std()),
    }


if __name__ == "__main__":
    main()
