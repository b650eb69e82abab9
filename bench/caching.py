"""How fast is caching? Ours beside the bare forward and backward pass, the paper's way taken literally, and peers.

    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER                      LoRA, with peers
    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER --full               all parameters
    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --work FOLDER --profile [--full]   where its time goes
    python -m bench.render caching                                                       the tables, from the JSON alone

One run, pinned threads, on SmolLM2-135M: (a) the bare forward and backward pass over the same batches, the floor;
(b) ours, through to shards on disk; (c) one example at a time, its whole gradient shuffled by λ = 20 row and column
shuffles (on a part of the rows). The ways take turns every few batches, and all of it is repeated. Each way's peak
memory is that of a process of its own, over the longest batches. Peers run in an environment of their own, which is
made in the work folder, on every sixth of the same batches, each with the floor measured beside it in its own process.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import caching_profile
from bench.common import save
from bench.peers import environment
from bench.peers.measuring import LONGEST, peak_bytes, seconds
from bench.ways import WAYS, Setting, make, open_made, write_rows
from rapidindex.caching.batches import Item, padded_tokens
from rapidindex.progress import Bars

GROUP = 4
"""Batches after which the ways take turns."""
EVERY = 6
"""Peers take every so-manieth batch."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(memory_here(options)))
        return
    with Bars() as bars:
        make(options.work, options.data, full=options.full, dtype=options.dtype, progress=bars)
        if options.profile:
            path = save(f"caching_profile_{options.kind}_{options.dtype}", caching_profile.profile(opened(options)))
        else:
            path = save(f"caching_{options.kind}_{options.dtype}", measure(options, bars))
        bars.say(f"written to {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a training file; the issue's figures take alpaca_9k.jsonl")
    parser.add_argument(
        "--work", type=Path, required=True, help="where the model, the index and the peers' environment are made"
    )
    parser.add_argument("--rows", type=int, help="256, with --full 48, with --profile 80")
    parser.add_argument("--literal-rows", type=int, help="12, with --full 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--full", action="store_true", help="all parameters instead of LoRA")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=environment.RUNS, help="all; none with --full or in bfloat16")
    parser.add_argument("--peer-repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="where ours spends its time")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kind = "full" if options.full else "lora"
    options.rows = options.rows or (80 if options.profile else 48 if options.full else 256)
    options.literal_rows = options.literal_rows or (2 if options.full else 12)
    if options.peers is None:
        options.peers = [] if options.full or options.dtype != "float32" else list(environment.RUNS)
    return options


def opened(options: argparse.Namespace) -> Setting:
    return open_made(
        options.work, options.data, options.rows, options.batch_tokens, full=options.full, dtype=options.dtype
    )


def measure(options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """The figures of all ways and peers."""
    peaks = {way: memory_of(way, options) for way in WAYS}
    setting = opened(options)
    write_rows(setting)
    figures = {**circumstances(setting, options), "ways": measured(setting, options, bars)}
    del setting  # a peer has the memory to itself
    for way in WAYS:
        figures["ways"][way]["peak_bytes"] = peaks[way]
    run = {"threads": options.threads, "repeats": options.peer_repeats, "every": EVERY, "full": options.full}
    peers = []
    for name in options.peers:
        bars.say(f"peer: {name}")
        peers.append(environment.run(name, options.work, **run))
    return {**figures, "peers": peers}


def circumstances(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of."""
    told = {name: getattr(options, name) for name in ("full", "dtype", "threads", "batch_tokens", "repeats")}
    told |= {"rows": len(setting.items), "tokens": sum(item.tokens for item in setting.items)}
    told |= {"batches": len(setting.batches), "padded_tokens": sum(map(padded_tokens, setting.batches))}
    return {**told, "gradient_size": setting.sketch.size, "K": setting.sketch.config.K}


def measured(setting: Setting, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Seconds of each way, and what ours writes."""
    few = setting.items[:: max(1, len(setting.items) // options.literal_rows)][: options.literal_rows]
    setting.floor(setting.batches[:1])  # once unmeasured: memory is taken, and for ours the map of slots is made
    first = seconds(lambda: setting.ours(setting.batches[:1]))
    tell_duration(setting, few, options, bars)
    setting.shards.clear()
    ways = {way: {"seconds": spent} for way, spent in timed(setting, few, options.repeats, bars).items()}
    stored = sum((setting.index / "sentence" / name).stat().st_size for name in setting.shards)
    ways["ours"] |= {"bytes_a_row": stored / len(setting.items) / options.repeats, "first_batch_seconds": first}
    ways["literal"] |= {"rows": len(few), "tokens": sum(item.tokens for item in few)}
    return ways


def timed(setting: Setting, few: list[Item], repeats: int, bars: Bars) -> dict[str, list[float]]:
    """Seconds of each way, one figure a repeat; the literal way's are those of the `few` rows alone."""
    groups = [setting.batches[at : at + GROUP] for at in range(0, len(setting.batches), GROUP)]
    found: dict[str, list[float]] = {way: [0.0] * repeats for way in WAYS}
    for repeat in range(repeats):
        for number, group in enumerate(groups):
            bars("caching", repeat * len(groups) + number, repeats * len(groups))
            work = {"floor": group, "ours": group, "literal": [[item] for item in few[number :: len(groups)]]}
            for way in [*work][number % 3 :] + [*work][: number % 3]:
                batches = work[way]
                found[way][repeat] += seconds(lambda way=way, batches=batches: getattr(setting, way)(batches))
    return found


def tell_duration(setting: Setting, few: list[Item], options: argparse.Namespace, bars: Bars) -> None:
    """Say how long it will take, from a batch of each way and a row of the literal one."""
    middle = [setting.batches[len(setting.batches) // 2]]
    share = sum(map(padded_tokens, setting.batches)) / padded_tokens(middle[0])
    floor, ours = (share * seconds(lambda way=way: getattr(setting, way)(middle)) for way in ("floor", "ours"))
    literal = len(few) * seconds(lambda: setting.literal([few[len(few) // 2 : len(few) // 2 + 1]]))
    whole = options.repeats * (floor + ours + literal)
    peers = len(options.peers) * (60 + 2.5 * floor / EVERY * (options.peer_repeats + 0.5))
    bars.say(
        f"{len(setting.items)} rows in {len(setting.batches)} batches; about {whole / 60:.0f} min for the ways"
        + (f" and {peers / 60:.0f} min for the peers" if options.peers else "")
    )


def memory_of(way: str, options: argparse.Namespace) -> int:
    """Peak bytes of a process that runs one way over the longest batches."""
    kept = ["data", "work", "rows", "batch_tokens", "threads", "dtype"]
    command = [sys.executable, "-m", "bench.caching", "--way", way, *(["--full"] if options.full else [])]
    for name in kept:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def memory_here(options: argparse.Namespace) -> dict[str, int]:
    """What `memory_of` asks a process for; the literal way takes the one longest row."""
    setting = opened(options)
    batches = [setting.items[:1]] if options.way == "literal" else setting.batches[:LONGEST]
    getattr(setting, options.way)(batches)
    return {"peak_bytes": peak_bytes()}


if __name__ == "__main__":
    main()
