"""What token-wise influence costs: rows for tokens beside the bare passes over their prefixes, and heat-maps.

    python -m bench.tokens --data ../shared/data/alpaca_9k.jsonl --work FOLDER

One run, pinned threads, the ways in turn and repeated, on SmolLM2-135M with a rank-16 LoRA on q, k, v and o. Caching:
(a) the bare forward and backward pass over the prefixes, in the same batches; (b) ours, to RapidGrads; (c) the naive
way, a row at a time, with one backward pass over the whole row for each of its tokens. Heat-maps: (d) a forward pass
over some examples; (e) ours, every token's share in an influence; (f) a backward pass for each token. Last, a build of
the token level through the product, beside what its --dry-run said.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import save
from bench.peers.measuring import Rows, bare, seconds
from bench.ways import Setting, config_of, make, open_made
from rapidindex.caching.batches import Item, as_batch, padded_tokens, plan_units
from rapidindex.caching.build import build
from rapidindex.caching.estimate import estimate
from rapidindex.caching.shard_writer import load_compressor
from rapidindex.config import BuildRequest, GradientConfig
from rapidindex.gradients.losses import Batch, trainable, weighted_token_losses
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.progress import Bars, Progress
from rapidindex.store import Store

K = 4096
LENGTHS = range(16, 49)
"""Response tokens of the rows that are taken: enough to matter, few enough to measure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a training file; the figures take alpaca_9k.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="where the model and the index are made")
    parser.add_argument("--rows", type=int, default=3, help="whose tokens are cached")
    parser.add_argument("--candidates", type=int, default=6, help="examples that get a heat-map")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with Bars() as bars:
        make(options.work, options.data, full=False, dtype="float32", progress=bars)
        setting = open_made(options.work, options.data, 256, 1024, full=False, dtype="float32")
        some = [item for item in setting.items if len(item.encoding.tokens) in LENGTHS]
        rows = some[:: len(some) // options.rows][: options.rows]
        figures = {"threads": options.threads, "rows": len(rows), "K": K}
        figures["caching"] = caching(setting, rows, options.repeats, bars)
        figures["heatmaps"] = heatmaps(setting, some[:: len(some) // options.candidates][: options.candidates], options)
        figures["build"] = built(options, rows, bars)
        bars.say(f"written to {save('tokens', figures)}")


def caching(setting: Setting, rows: list[Item], repeats: int, progress: Progress) -> dict[str, Any]:
    """Seconds of each way for the rows of all tokens of `rows`."""
    tokens = [replace(item, position=p) for item in rows for p in range(len(item.encoding.tokens))]
    batches = [batch for unit in plan_units(tokens, 1024) for batch in unit]
    model = setting.loaded.model
    compressor = load_compressor(Store.open(setting.index), setting.loaded, K=K)
    compressor(as_batch(batches[-1], "cpu"))  # once unmeasured: memory is taken, and the map of slots is made
    ways = {
        "floor": lambda: [bare(model, *prefixes(batch).padded(list(range(len(batch))))) for batch in batches],
        "ours": lambda: [compressor(as_batch(batch, "cpu")) for batch in batches],
        "naive": lambda: [one_by_one(compressor, model, item) for item in rows],
    }
    spent = in_turn(ways, repeats, progress, "rows for tokens")
    told = {"tokens": len(tokens), "batches": len(batches), "padded_tokens": sum(map(padded_tokens, batches))}
    told["prefix_tokens"] = sum(item.tokens for item in tokens)
    return {**told, "largest_difference": difference(compressor, model, rows[0]), "seconds": spent}


def prefixes(batch: list[Item]) -> Rows:
    """The prefixes of a batch as the bare pass takes them, with only their last token in the loss."""
    ids = [item.encoding.input_ids[: item.tokens].tolist() for item in batch]
    return Rows(ids, [[False] * (len(row) - 1) + [True] for row in ids], [])


def one_by_one(compressor: Compressor, model: torch.nn.Module, item: Item) -> torch.Tensor:
    """The RapidGrads of a row's tokens by a backward pass each, float32 [tokens, K]."""
    mask = item.encoding.response_mask.astype(np.float32)
    _, losses = weighted_token_losses(model, Batch.of([item.encoding.input_ids], [mask]))
    parameters, found = list(trainable(model).values()), []
    for loss in losses[0]:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True)
        flat = torch.cat([part.flatten() for part in parts]) * compressor.correction
        found.append(compressor.sketch.compress((flat / flat.norm())[None])[0])
    return torch.stack(found)


def difference(compressor: Compressor, model: torch.nn.Module, item: Item) -> float:
    """The largest relative difference between the two ways' rows, over the tokens of one row."""
    naive = one_by_one(compressor, model, item)
    tokens = [replace(item, position=position) for position in range(len(naive))]
    ours = torch.cat([compressor(as_batch([token], "cpu")).rows for token in tokens])
    return float(((ours - naive).norm(dim=1) / naive.norm(dim=1)).max())


def heatmaps(setting: Setting, items: list[Item], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way for the heat-maps of `items`, for a query that is one of them."""
    model, scorer = setting.loaded.model, TokenScores(setting.loaded.model)
    masks = [item.encoding.response_mask.astype(np.float32) for item in items]
    batches = [Batch.of([item.encoding.input_ids], [mask]) for item, mask in zip(items, masks, strict=True)]
    compressor = setting.compressor
    direction = compressor.direction(as_batch(items[:1], "cpu"))
    norms = torch.cat([compressor(as_batch([item], "cpu")).norms for item in items])
    few = list(range(0, len(items), 5))
    ways = {
        "forward": lambda: [forward(model, batch) for batch in batches],
        "ours": lambda: [
            shares(scorer, compressor, direction, batch, norm[None]) for batch, norm in zip(batches, norms, strict=True)
        ],
        "naive": lambda: [scorer._backward(batches[number], direction) for number in few],
    }
    shares(scorer, compressor, direction, batches[-1], norms[-1:])  # once unmeasured: the method is chosen
    spent = in_turn(ways, options.repeats, lambda *told: None, "heat-maps")
    tokens = [int((batch.weights != 0).sum()) for batch in batches]
    scale = sum(tokens) / sum(tokens[number] for number in few)
    spent["naive"] = [each * scale for each in spent["naive"]]
    told = {"examples": len(items), "tokens": sum(tokens), "naive_examples": len(few)}
    return {**told, "method": scorer.method, "seconds": spent}


@torch.no_grad()
def forward(model: torch.nn.Module, batch: Batch) -> None:
    """An ordinary forward pass, with all its logits."""
    model(input_ids=batch.input_ids, attention_mask=batch.attention)


def in_turn(ways: dict[str, Callable], repeats: int, progress: Progress, stage: str) -> dict[str, list[float]]:
    """Seconds of each way, repeat by repeat, each repeat beginning with another way."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        names = [*ways][repeat % len(ways) :] + [*ways][: repeat % len(ways)]
        for number, name in enumerate(names):
            progress(stage, repeat * len(ways) + number, repeats * len(ways))
            spent[name].append(seconds(ways[name]))
    return spent


def built(options: argparse.Namespace, rows: list[Item], progress: Progress) -> dict[str, Any]:
    """What --dry-run says of a build of the tokens of `rows`, and what the build takes."""
    data, index = options.work / "tokens.jsonl", options.work / "index-tokens"
    shutil.rmtree(index, ignore_errors=True)
    examples = [{"prompt": item.example.prompt, "response": item.example.response} for item in rows]
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    gradient = GradientConfig(moment_examples=len(rows))
    model = config_of(options.work, False, "float32")
    request = BuildRequest(str(data), str(index), model, gradient=gradient, levels=("token",))
    said = estimate(request, progress=progress)
    started = time.perf_counter()
    done = build(request, progress=progress)
    took = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.rglob("*") if file.is_file())
    told = {"rows": done.tokens, "bytes_a_row": size / done.tokens, "said_seconds": said.total_seconds}
    return {**told, "took_seconds": took, "said_bytes": said.total_disk, "took_bytes": size}


if __name__ == "__main__":
    main()
