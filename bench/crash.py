"""Kill a build at random moments, resume it each time, and compare what comes out with an undisturbed one.

    python -m bench.crash --kills 25 --workers 2 --work /tmp/crash

Real processes of `rapidindex build`, killed with -9 wherever they are, starting up included. Every shard that was
finished before a kill must be there, byte for byte, after it; the finished index must hold every example once and equal
the undisturbed one's to a step of their rounding. On a tiny Llama with random weights, so that a build takes seconds.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.common import save
from rapidindex.store import Store, check

WORDS = "tea yoga rice fish cats dogs sun moon sea sky".split()


def shards(index: Path) -> dict[str, str]:
    """The finished shards in the folder of an index, by name, and their checksums."""
    found = {}
    for file in sorted((index / "sentence").glob("shard-*.h5")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def rows_of(index: Path) -> dict[str, np.ndarray]:
    """Each example's row, float32 [K], by its id. ValueError where an example has more than one."""
    rows = Store.open(index).rows("sentence")
    if len(set(rows.ids)) != len(rows.ids) or len(rows) != len(rows.ids):
        raise ValueError(f"{index} holds an example twice")
    return dict(zip([rows.ids[number] for number in rows.example], rows.take(np.arange(len(rows))), strict=True))


def largest_difference(index: Path, reference: Path) -> float:
    """Between the rows of two indexes, relative to each row's length. ValueError where their examples differ."""
    ours, theirs = rows_of(index), rows_of(reference)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours.keys() ^ theirs.keys())} examples are in only one of the two")
    return max(float(np.linalg.norm(ours[id] - theirs[id]) / np.linalg.norm(theirs[id])) for id in theirs)


def write_data(path: Path, rows: int) -> Path:
    """Examples of different lengths, and a column."""
    texts = [
        {"instruction": f"{WORDS[n % 10]} {n}", "output": "very " * (20 + n % 37), "group": WORDS[n % 10]}
        for n in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, texts)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args()
    from tests import tiny

    options.work.mkdir(parents=True)
    base, adapter = tiny.save_model(options.work, "llama")
    data = write_data(options.work / "data.jsonl", options.rows)
    command = [sys.executable, "-m", "rapidindex", "build", data, "-m", base, "-a", adapter, "-K", 4096]
    command += ["--batch-tokens", 512, "--shard-seconds", 0.3, "-q"]
    command = list(map(str, command))
    began = time.monotonic()
    subprocess.run([*command, "-o", str(options.work / "undisturbed")], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    disturbed = [*command, "-o", str(options.work / "index"), "--workers", str(options.workers)]
    found = _disturb(disturbed, options.work / "index", options.kills, whole, random.Random(options.seed))
    found |= {
        "workers": options.workers,
        "examples": len(rows_of(options.work / "index")),
        "largest relative difference": largest_difference(options.work / "index", options.work / "undisturbed"),
        "problems": [str(problem) for problem in check(options.work / "index")],
    }
    print(json.dumps(found, indent=1))
    save(f"crash-{options.workers}", found)


def _disturb(command: list[str], index: Path, kills: int, whole: float, rng: random.Random) -> dict[str, object]:
    """Kill the build `kills` times, each within a third of the time that it takes undisturbed, then let it end."""
    done = lost = 0
    moments = []
    while done < kills:
        before = shards(index)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as build:
            began, delay = time.monotonic(), rng.uniform(0.05, 0.35) * whole
            while time.monotonic() - began < delay and build.poll() is None:
                time.sleep(0.05)
            seen = before | shards(index)
            if build.poll() is not None:
                sys.exit(f"the build ended after {done} kills: give more --rows")
            build.kill()
        done += 1
        moments.append(round(time.monotonic() - began, 2))
        after = shards(index)
        lost += sum(after.get(name) != checksum for name, checksum in seen.items())
    before = shards(index)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = shards(index)
    lost += sum(after.get(name) != checksum for name, checksum in before.items())
    return {
        "kills": done,
        "seconds into the build": moments,
        "shards": len(after),
        "finished shards lost, changed or computed again": lost,
        "seconds undisturbed": round(whole, 1),
    }


if __name__ == "__main__":
    main()
