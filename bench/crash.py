"""Kill a build at random moments, resume it each time, and compare the index with that of an undisturbed build.

    python -m bench.crash --kills 25 --workers 2 --work /tmp/crash

Real processes of `rapidindex build`, killed with -9 at any moment, starting up included. Every shard that was finished
before a kill must be there after it, byte for byte. The finished index must hold every example once, and its rows must
equal the undisturbed ones to a step of their rounding. The model is a tiny Llama with random weights, so that a build
takes seconds. Tests use the functions that write data and compare indexes.
"""

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import parser, save, timed
from rapidindex.store import Store, check

WORDS = "tea yoga rice fish cats dogs sun moon sea sky".split()


def shards(index: Path) -> dict[str, str]:
    """Return the names of an index's finished shards, and their checksums."""
    files = sorted((index / "sentence").glob("shard-*.h5"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def rows_of(index: Path) -> dict[str, np.ndarray]:
    """Return each example's row, float32 [K], by its id. ValueError where an example has more than one."""
    rows = Store.open(index).rows("sentence")
    if len(set(rows.ids)) != len(rows.ids) or len(rows) != len(rows.ids):
        raise ValueError(f"{index} holds an example twice")
    return dict(zip([rows.ids[number] for number in rows.example], rows.take(np.arange(len(rows))), strict=True))


def largest_difference(index: Path, reference: Path) -> float:
    """Return the largest difference of two indexes' rows, relative to a row's length.

    ValueError where their examples differ.
    """
    ours, theirs = rows_of(index), rows_of(reference)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours.keys() ^ theirs.keys())} examples are in only one of the two")
    return max(float(np.linalg.norm(ours[id] - theirs[id]) / np.linalg.norm(theirs[id])) for id in theirs)


def write_data(path: Path, rows: int) -> Path:
    """Write examples of different lengths, with a column of metadata; return the path."""
    examples = [
        {"instruction": f"{WORDS[n % 10]} {n}", "output": "very " * (20 + n % 37), "group": WORDS[n % 10]}
        for n in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, examples)))
    return path


def write_model(folder: Path) -> Path:
    """Write a two-layer Llama with random weights and a tokenizer of single bytes; return its folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(alphabet), eos_token_id=0, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> None:
    add = (options := parser(__doc__)).add_argument
    add("--kills", type=int, default=25)
    add("--workers", type=int, default=1)
    add("--rows", type=int, default=3000)
    add("--seed", type=int, default=0)
    options = options.parse_args()
    if options.smoke:
        options.kills, options.rows = 1, 40
    options.work.mkdir(parents=True)  # the builds must not find an earlier one
    data, model = write_data(options.work / "data.jsonl", options.rows), write_model(options.work / "model")
    command = [sys.executable, "-m", "rapidindex", "build", str(data), "-m", str(model), "-K", "4096"]
    command += ["--batch-tokens", "512", "--shard-seconds", "0.3", "-q", "-o"]
    index, undisturbed = options.work / "index", options.work / "undisturbed"
    whole, _ = timed(lambda: subprocess.run([*command, undisturbed], check=True, stdout=subprocess.DEVNULL))
    disturbed = [*command, str(index), "--workers", str(options.workers)]
    figures = disturb(disturbed, index, options.kills, whole, random.Random(options.seed))
    figures |= {
        "workers": options.workers,
        "examples": len(rows_of(index)),
        "largest relative difference": largest_difference(index, undisturbed),
        "problems": [str(problem) for problem in check(index)],
    }
    print(json.dumps(figures, indent=1))
    save(f"crash-{options.workers}", figures, options)


def disturb(command: list[str], index: Path, kills: int, whole: float, rng: random.Random) -> dict[str, Any]:
    """Kill a build `kills` times, each within a third of the `whole` seconds that it takes, then let it end."""
    lost, moments = 0, []
    for number in range(kills + 1):
        before = shards(index)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as build:
            began, delay = time.monotonic(), rng.uniform(0.05, 0.35) * whole
            while build.poll() is None and (number == kills or time.monotonic() - began < delay):
                time.sleep(0.05)
            before |= shards(index)
            if number < kills:
                if build.poll() is not None:
                    sys.exit(f"The build ended after {number} kills: give more --rows.")
                build.kill()
                moments.append(round(time.monotonic() - began, 2))
            elif build.returncode:
                sys.exit(f"The build failed after {kills} kills, with exit status {build.returncode}.")
        after = shards(index)
        lost += sum(after.get(name) != checksum for name, checksum in before.items())
    return {
        "kills": kills,
        "seconds into the build": moments,
        "shards": len(after),
        "finished shards lost, changed or computed again": lost,
        "seconds undisturbed": round(whole, 1),
    }


if __name__ == "__main__":
    main()
