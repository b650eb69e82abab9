"""How fast is caching? Ours beside the bare forward and backward pass, the paper's way taken literally, and peers.

    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER                      LoRA, with peers
    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER --full               all parameters
    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER --device cuda --peers    on a GPU
    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER --profile [--full]   where its time goes
    python -m bench.render caching                                                                   the tables

On SmolLM2-135M, threads pinned, in one run: (a) the bare forward and backward pass over the same batches, the floor;
(b) ours, through to shards on disk; (c) one example at a time, its whole gradient shuffled by λ = 20 row and column
shuffles (on a part of the rows). The methods take turns every few batches, and all of it is repeated. The peak memory
of each method is measured in a process of its own, over the longest batches. Peers run in an environment of their own,
which is made in the work folder, on every sixth of the same batches, each beside the floor in its own process.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from bench import caching_profile
from bench.common import parser, save, seconds
from bench.peers import environment
from bench.peers.measuring import LONGEST, peak_bytes
from bench.setting import METHODS, Setting
from rapidindex.caching.batches import Item, padded_tokens
from rapidindex.progress import Bars

GROUP = 4
"""Batches after which the methods take turns."""
EVERY = 6
"""Peers run on one batch of every six."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    read = (options.work, options.data, options.rows, options.batch_tokens)
    kind = {name: getattr(options, name) for name in ("full", "dtype", "device", "quantize")}
    if options.method:
        print(json.dumps(peak_here(Setting.open(*read, **kind), options.method)))
        return
    with Bars() as bars:
        setting = Setting.make(*read, bars, **kind)
        name = f"{'full' if options.full else 'lora'}_{options.quantize or options.dtype}"
        name += "_gpu" if options.device != "cpu" else ""
        if options.profile:
            path = save(f"caching_profile_{name}", caching_profile.profile(setting), options)
        else:
            path = save(f"caching_{name}", measure(setting, options, bars), options)
        bars.say(f"written to {path}")


def parse() -> argparse.Namespace:
    add = (options := parser(__doc__, data=True)).add_argument
    add("--rows", type=int, help="256, with --full 48, with --profile 80")
    add("--literal-rows", type=int, help="12, with --full 2")
    add("--repeats", type=int, default=3)
    add("--batch-tokens", type=int, default=1024)
    add("--threads", type=int, default=os.cpu_count())
    add("--full", action="store_true", help="all parameters instead of LoRA")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--quantize", choices=["4bit"])
    add("--peers", nargs="*", choices=environment.RUNS, help="all; none with --full, in bfloat16 or on a GPU")
    add("--peer-repeats", type=int, default=2)
    add("--profile", action="store_true", help="where our method spends its time")
    add("--method", choices=METHODS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.smoke:
        given.rows, given.literal_rows, given.repeats, given.peers = given.rows or 4, 1, 1, given.peers or []
    given.rows = given.rows or (80 if given.profile else 48 if given.full else 256)
    given.literal_rows = given.literal_rows or (2 if given.full else 12)
    if given.peers is None:
        usual = given.dtype == "float32" and given.device == "cpu" and not given.full and not given.quantize
        given.peers = list(environment.RUNS) if usual else []
    return given


def measure(setting: Setting, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Return the figures of all methods and peers."""
    peaks = {method: peak_of(method, options) for method in METHODS}
    setting.write_rows()
    figures = {**circumstances(setting, options), "ways": measure_methods(setting, options, bars)}
    del setting  # a peer has the memory to itself
    for method in METHODS:
        figures["ways"][method]["peak_bytes"] = peaks[method]
    how = {"threads": options.threads, "repeats": options.peer_repeats, "every": EVERY, "full": options.full}
    peers = []
    for name in options.peers:
        bars.say(f"peer: {name}")
        peers.append(environment.run(name, options.work, **how))
    return {**figures, "peers": peers}


def circumstances(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that the figures belong to."""
    sketch = setting.compressor.sketch
    return {
        **{
            name: getattr(options, name)
            for name in ("full", "dtype", "device", "quantize", "threads", "batch_tokens", "repeats")
        },
        **{"rows": len(setting.items), "tokens": sum(item.tokens for item in setting.items)},
        **{"batches": len(setting.batches), "padded_tokens": sum(map(padded_tokens, setting.batches))},
        **{"gradient_size": sketch.size, "K": sketch.config.K},
    }


def measure_methods(setting: Setting, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Return the seconds of each method, and the bytes that ours writes."""
    few = setting.items[:: max(1, len(setting.items) // options.literal_rows)][: options.literal_rows]
    setting.floor(setting.batches[:1])  # once unmeasured: memory is taken, and for ours the map of slots is made
    first = seconds(lambda: setting.ours(setting.batches[:1]))
    setting.shards.clear()
    spent = take_turns(setting, few, options.repeats, bars)
    methods: dict[str, dict[str, Any]] = {method: {"seconds": spent[method]} for method in METHODS}
    stored = sum((setting.index.store.path / "sentence" / name).stat().st_size for name in setting.shards)
    methods["ours"] |= {"bytes_a_row": stored / len(setting.items) / options.repeats, "first_batch_seconds": first}
    methods["literal"] |= {"rows": len(few), "tokens": sum(item.tokens for item in few)}
    return methods


def take_turns(setting: Setting, few: list[Item], repeats: int, bars: Bars) -> dict[str, list[float]]:
    """Return the seconds of each method, one figure a repeat; the literal method takes the `few` rows alone."""
    groups = [setting.batches[at : at + GROUP] for at in range(0, len(setting.batches), GROUP)]
    spent: dict[str, list[float]] = {method: [0.0] * repeats for method in METHODS}
    for repeat in range(repeats):
        for number, group in enumerate(groups):
            bars("caching", repeat * len(groups) + number, repeats * len(groups))
            work = {"floor": group, "ours": group, "literal": [[item] for item in few[number :: len(groups)]]}
            for method in [*work][number % 3 :] + [*work][: number % 3]:
                spent[method][repeat] += seconds(lambda m=method, work=work: setting.run(m, work[m]))
    return spent


def peak_of(method: str, options: argparse.Namespace) -> int:
    """Return the peak bytes of a process that runs one method over the longest batches."""
    command = [sys.executable, "-m", "bench.caching", "--method", method, *(["--full"] if options.full else [])]
    command += ["--quantize", options.quantize] if options.quantize else []
    for name in ("data", "work", "rows", "batch_tokens", "threads", "dtype", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def peak_here(setting: Setting, method: str) -> dict[str, int]:
    """Run a method over the longest batches, the literal one over the longest row, and return the peak memory."""
    setting.run(method, [setting.items[:1]] if method == "literal" else setting.batches[:LONGEST])
    on_gpu = setting.index.loaded.device.type == "cuda"
    return {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()}


if __name__ == "__main__":
    main()
