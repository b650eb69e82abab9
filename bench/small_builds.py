"""What does a whole small build take, its second moment included? Beside the bare passes over its rows.

    python -m bench.small_builds --data ../shared/data/alpaca_9k.jsonl --work FOLDER       small_builds.json

SmolLM2-135M with a LoRA of rank 16, one thread, in one process: seconds of the processor for the bare forward and
backward pass over the rows, before and after the rest, and for `build` by each correction, stage by stage, from the
data read to the last shard.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.common import parser, save
from bench.setting import make_model, model_config
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, GradientConfig
from rapidindex.data.examples import read_examples
from rapidindex.data.templates import Template
from rapidindex.gradients.losses import example_losses
from rapidindex.model.model import load
from rapidindex.progress import Bars

CORRECTIONS = ("none", "estimate", "kronecker", "kfac")


def main() -> None:
    add = (options := parser(__doc__, data=True)).add_argument
    add("--rows", type=int, default=160)
    add("--only", nargs="+", default=CORRECTIONS, choices=CORRECTIONS, help="corrections to build with")
    options = options.parse_args()
    if options.smoke:
        options.rows = 4
    torch.set_num_threads(1)
    with Bars() as bars:
        make_model(options.work, bars)
        for figures in measure(options, bars):
            bars.say(f"written to {save('small_builds', figures, options)}")


def measure(options: Any, bars: Bars) -> Iterator[dict[str, Any]]:
    """Yield the figures so far after each build and, the bare passes measured again, at the end."""
    config = model_config(options.work, False, "float32")
    loaded = load(config)
    template = Template("alpaca", loaded.tokenizer, 512)
    items = [Item(one, template.encode(one)) for one in read_examples(options.data, limit=options.rows).examples]
    batches = [as_batch(batch, "cpu") for batch in plan_batches(items, 1024)]

    def passes() -> None:
        for batch in batches:
            example_losses(loaded.model, batch).sum().backward()

    bare, builds = [processor_seconds(passes)], {}
    figures = {"rows": len(items), "tokens": sum(item.tokens for item in items), "bare": bare, "builds": builds}
    bars.say(f"bare: {bare}")
    for correction in options.only:
        folder, clock = options.work / "small-build", Stages()
        shutil.rmtree(folder, ignore_errors=True)
        gradient = GradientConfig(normalize="unit", second_moment=correction)
        build(BuildRequest(options.data, folder, config, gradient=gradient, limit=options.rows), progress=clock)
        builds[correction] = clock.seconds
        bars.say(f"{correction}: {clock.seconds}")
        yield figures
    bare.append(processor_seconds(passes))
    yield figures


class Stages:
    """Progress that keeps the seconds of the processor between the first and the last report of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.process_time()
        self.seconds[stage] = now - self._began.setdefault(stage, now)


def processor_seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
