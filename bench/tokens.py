"""What token-wise influence costs: rows for tokens beside the bare passes over their prefixes, and heat-maps.

    python -m bench.tokens --data ../shared/data/alpaca_9k.jsonl --work FOLDER

One run, threads pinned, the methods in turn and repeated, on SmolLM2-135M with a rank-16 LoRA on q, k, v and o. Times
are processor seconds, which other work on the machine changes little. Caching: (a) the bare forward and backward pass
over the prefixes, in the same batches; (b) ours, to RapidGrads; (c) the naive method, with one forward pass over a row
and one backward pass for each of its tokens. Heat-maps: (d) a forward pass over some examples; (e) ours, every token's
share in an influence; (f) a backward pass for each token. Last, a build of the token level beside its --dry-run, in
seconds.
"""

import argparse
import copy
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.common import parser, save, timed
from bench.peers.measuring import Rows, bare
from bench.setting import Setting, model_config
from rapidindex.caching.batches import Item, as_batch, padded_tokens, plan_units
from rapidindex.caching.build import build
from rapidindex.caching.estimate import estimate
from rapidindex.config import BuildRequest, GradientConfig
from rapidindex.gradients.losses import Batch, trainable, weighted_token_losses
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.progress import Bars, Progress, silent

K = 4096
LENGTHS = range(16, 49)
"""Response tokens of the rows that are taken: enough to matter, few enough to measure."""
NAIVE_EVERY = 5
"""The naive heat-maps are those of every fifth example, and their time is scaled."""


def main() -> None:
    add = (options := parser(__doc__, data=True)).add_argument
    add("--rows", type=int, default=3, help="whose tokens are cached")
    add("--candidates", type=int, default=6, help="examples that get a heat-map")
    add("--repeats", type=int, default=2)
    add("--threads", type=int, default=1)
    options = options.parse_args()
    if options.smoke:
        options.rows = options.candidates = options.repeats = 1
    torch.set_num_threads(options.threads)
    with Bars() as bars:
        setting = Setting.make(options.work, options.data, 256, 1024, bars, K=K)
        some = [item for item in setting.items if len(item.encoding.tokens) in LENGTHS]
        rows = some[:: len(some) // options.rows][: options.rows]
        candidates = some[:: len(some) // options.candidates][: options.candidates]
        figures = {"threads": options.threads, "rows": len(rows), "K": K}
        figures["caching"] = measure_caching(setting, rows, options.repeats, bars)
        figures["heatmaps"] = measure_heatmaps(setting, candidates, options.repeats)
        figures["build"] = measure_build(options, rows, bars)
        bars.say(f"written to {save('tokens', figures, options)}")


def measure_caching(setting: Setting, rows: list[Item], repeats: int, progress: Progress) -> dict[str, Any]:
    """Return the processor seconds that each method takes for the rows of all tokens of `rows`."""
    tokens = [token for item in rows for token in tokens_of(item)]
    batches = [batch for unit in plan_units(tokens, 1024) for batch in unit]
    model, compressor = setting.model, setting.compressor
    compressor(as_batch(batches[-1], "cpu"))  # once unmeasured: memory is taken, the map of slots made, the way chosen
    methods = {
        "floor": lambda: [bare(model, *prefixes(batch).padded(list(range(len(batch))))) for batch in batches],
        "ours": lambda: [compressor(as_batch(batch, "cpu")) for batch in batches],
        "naive": lambda: [one_by_one(compressor, model, item) for item in rows],
    }
    sizes = {"tokens": len(tokens), "batches": len(batches), "padded_tokens": sum(map(padded_tokens, batches))}
    sizes["prefix_tokens"] = sum(item.tokens for item in tokens)
    spent = in_turn(methods, repeats, progress, "rows for tokens")
    return {**sizes, "largest_difference": largest_difference(compressor, model, rows[0]), "seconds": spent}


def tokens_of(item: Item) -> list[Item]:
    return [replace(item, position=position) for position in range(len(item.encoding.tokens))]


def prefixes(batch: list[Item]) -> Rows:
    """Return the prefixes of a batch for the bare pass, with only their last token in the loss."""
    ids = [item.encoding.input_ids[: item.tokens].tolist() for item in batch]
    return Rows(ids, [[False] * (len(row) - 1) + [True] for row in ids], [])


def one_by_one(compressor: Compressor, model: torch.nn.Module, item: Item) -> Tensor:
    """Return the RapidGrads of a row's tokens, float32 [tokens, K], by a backward pass each."""
    naive, batch = copy.copy(compressor), as_batch([item], "cpu")
    rows = []
    for parts in token_gradients(model, batch):
        naive.gradients = Given(compressor, parts)
        rows.append(naive(batch).rows)
    return torch.cat(rows)


def token_gradients(model: torch.nn.Module, batch: Batch) -> Iterator[list[Tensor]]:
    """Yield the gradient of each token's loss, parameter by parameter, from one forward pass over one example."""
    _, losses = weighted_token_losses(model, batch)
    parameters = list(trainable(model).values())
    return (list(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses[0])


class Given:
    """The gradient of one example that is known already, in the place of `PerExampleGradients`."""

    def __init__(self, compressor: Compressor, parts: list[Tensor]) -> None:
        self.layers, self.parts = compressor.gradients.layers, parts

    def __call__(self, batch: Batch, consume: Callable[[int, Tensor], None]) -> Tensor:
        for number, part in enumerate(self.parts):
            consume(number, part.float().reshape(1, -1))
        return torch.zeros(1)


def largest_difference(compressor: Compressor, model: torch.nn.Module, item: Item) -> float:
    """Return the largest relative difference between the rows of the two methods, over the tokens of one row."""
    naive = one_by_one(compressor, model, item)
    batches = [batch for unit in plan_units(tokens_of(item), 1024) for batch in unit]
    ours = torch.cat([compressor(as_batch(batch, "cpu")).rows for batch in batches])
    naive = naive[[token.position for batch in batches for token in batch]]
    return float(((ours - naive).norm(dim=1) / naive.norm(dim=1)).max())


def measure_heatmaps(setting: Setting, items: list[Item], repeats: int) -> dict[str, Any]:
    """Return the seconds that each method takes for the heat-maps of `items`, for a query that is the first of them."""
    model, compressor, scorer, naive = setting.model, setting.compressor, *map(TokenScores, [setting.model] * 2)
    naive.method = "backward per token"
    batches = [as_batch([item], "cpu") for item in items]
    batches = [replace(batch, weights=(batch.weights != 0).float()) for batch in batches]
    direction = compressor.direction(as_batch(items[:1], "cpu"))
    norms = [compressor(as_batch([item], "cpu")).norms for item in items]
    few = batches[::NAIVE_EVERY]
    shares(scorer, compressor, direction, batches[-1], norms[-1])  # once unmeasured: the method is chosen
    methods = {
        "forward": lambda: [forward(model, batch) for batch in batches],
        "ours": lambda: [shares(scorer, compressor, direction, *pair) for pair in zip(batches, norms, strict=True)],
        "naive": lambda: [naive(batch, direction) for batch in few],
    }
    spent = in_turn(methods, repeats, silent, "heat-maps")
    tokens, of_few = (sum(int((batch.weights != 0).sum()) for batch in some) for some in (batches, few))
    spent["naive"] = [taken * tokens / of_few for taken in spent["naive"]]
    sizes = {"examples": len(items), "tokens": tokens, "naive_examples": len(few)}
    return {**sizes, "method": scorer.method, "seconds": spent}


@torch.no_grad()
def forward(model: torch.nn.Module, batch: Batch) -> None:
    """Run an ordinary forward pass, with all its logits."""
    model(input_ids=batch.input_ids, attention_mask=batch.attention)


def in_turn(methods: dict[str, Callable], repeats: int, progress: Progress, stage: str) -> dict[str, list[float]]:
    """Return the processor seconds of each method, repeat by repeat; each repeat begins with another method."""
    spent: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats):
        first = repeat % len(methods)
        for number, name in enumerate([*methods][first:] + [*methods][:first]):
            progress(stage, repeat * len(methods) + number, repeats * len(methods))
            gc.collect()
            started = time.process_time()
            methods[name]()
            spent[name].append(time.process_time() - started)
    return spent


def measure_build(options: argparse.Namespace, rows: list[Item], progress: Progress) -> dict[str, Any]:
    """Return what --dry-run says of a build of the tokens of `rows`, and what the build takes."""
    data, index = options.work / "tokens.jsonl", options.work / "index-tokens"
    shutil.rmtree(index, ignore_errors=True)
    examples = [{"prompt": item.example.prompt, "response": item.example.response} for item in rows]
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    gradient, model = GradientConfig(moment_examples=len(rows)), model_config(options.work, False, "float32")
    request = BuildRequest(str(data), str(index), model, gradient=gradient, levels=("token",))
    predicted = estimate(request, progress=progress)
    took, done = timed(lambda: build(request, progress=progress))
    size = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    figures = {"rows": done.tokens, "bytes_a_row": size / done.tokens, "said_seconds": predicted.total_seconds}
    return {**figures, "took_seconds": took, "said_bytes": predicted.total_disk, "took_bytes": size}


if __name__ == "__main__":
    main()
