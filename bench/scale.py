"""Builds by one process, by jobs and by actors, and what an index of up to a billion examples takes.

    python -m bench.scale --work /tmp/scale

Real processes of `rapidindex build` over one data file and a tiny Llama with random weights: plain, `--shard` with its
jobs at once, and `--ray local`. With more processes than cores this shows what the machinery costs, not what it gains.
Then the seconds that a row takes to be searched: by an exhaustive scan of rows of 65,536 entries and of 384 (an
encoder's), and by FAISS's scan of one bit a dimension over 16,384. From these `scale.md` computes what larger indexes
take. Ray starts no more actors than there are cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import parser, pin, results_folder, save, seconds, timed, write_text
from bench.crash import largest_difference, write_data, write_model
from rapidindex.search.exact import exact_search
from rapidindex.search.faiss_index import AnnIndex
from rapidindex.store import ShardContent, Store

FULL, FOLD, ENCODER = 65_536, 16_384, 384
SECONDS_PER_EXAMPLE = {"CPU": 0.5, "GPU": 0.036}
"""Two CPU cores with SmolLM2, measured (README); a GPU of 125 TFLOP/s with 7B parameters and LoRA, by arithmetic."""
TRACKSTAR = 87e12 / 365e6
"""Bytes a passage: 87 TB for 365 million (TrackStar)."""


def main() -> None:
    add = (options := parser(__doc__)).add_argument
    add("--examples", type=int, default=2000)
    add("--counts", type=int, nargs="+", default=[1, 2, 4], help="jobs, and actors")
    add("--rows", type=int, default=4000, help="rows of each kind that are searched")
    options = options.parse_args()
    if options.smoke:
        options.examples, options.rows = 30, 40
    options.work.mkdir(parents=True)  # the builds must not find an earlier one
    counts = (1,) if options.smoke else tuple(options.counts)
    figures = {"builds": builds(options.work, options.examples, counts, ray=not options.smoke)}
    figures["seconds a row and query, one thread"] = searches(options.work, options.rows)
    save("scale", figures, options)
    write_text(results_folder(options) / "scale.md", table(figures))
    print(json.dumps(figures, indent=1), table(figures), sep="\n")


def builds(work: Path, examples: int, counts: tuple[int, ...], *, ray: bool) -> list[dict[str, Any]]:
    """Build one index in each way; return the seconds, and the largest difference of a row from the plain build's."""
    data, model = write_data(work / "data.jsonl", examples), write_model(work / "model")
    plain = work / "plain"

    def run(index: Path, *options: str) -> subprocess.Popen:
        command = ["build", data, "-m", model, "-K", "4096", "--batch-tokens", "512", "-q", "-o", index, *options]
        return subprocess.Popen([sys.executable, "-m", "rapidindex", *map(str, command)], stdout=subprocess.DEVNULL)

    def finish(*started: subprocess.Popen) -> None:
        if any([process.wait() for process in started]):
            raise RuntimeError("a build failed: its message is above")

    found = [{"how": "plain", "seconds": timed(lambda: finish(run(plain)))[0], "difference": 0.0}]
    for count in counts:
        ways = {f"{count} jobs": [["--shard", f"{part}/{count}"] for part in range(1, count + 1)]}
        if ray and count <= (os.cpu_count() or 1):
            ways[f"{count} actors"] = [["--ray", "local", "--workers", str(count)]]
        for how, processes in ways.items():
            index = work / how.replace(" ", "-")
            taken, _ = timed(lambda: finish(*[run(index, *options) for options in processes]))  # noqa: B023
            found.append({"how": how, "seconds": taken, "difference": largest_difference(index, plain)})
    return found


def searches(work: Path, count: int) -> dict[str, float]:
    """Return the seconds that one row takes for one query on one thread, rows being in memory."""
    pin(1)
    draw, found = np.random.default_rng(0), {}
    for name, K in (("full", FULL), ("encoder", ENCODER)):
        rows_here = count * (1 if name == "full" else 25)
        rows = _store(work / name, K, rows_here, draw).rows("sentence")
        query = draw.standard_normal((1, K), np.float32)
        found[name] = min(seconds(lambda: exact_search(rows, query, 10)) for _ in range(3)) / rows_here  # noqa: B023
    ann = AnnIndex.create("HR,RaBitQ", FOLD, threads=1)
    rows = draw.standard_normal((count, FOLD), np.float32)
    ann.train(rows[: min(count, 1000)])
    ann.add(rows, np.arange(count))
    query = rows[:1] / np.linalg.norm(rows[0])
    found["one bit"] = min(seconds(lambda: ann.search(query, 10, None)) for _ in range(3)) / count
    return found


def _store(path: Path, K: int, count: int, draw: np.random.Generator) -> Store:
    store = Store.create(
        path, config={}, layers=[{"name": "w", "size": 8}], versions={}, planned={"sentence": (K, count)}
    )
    with store.lock():
        for number, first in enumerate(range(0, count, 2000)):
            part = min(2000, count - first)
            nothing = np.full(part, -1)
            content = ShardContent(
                rows=draw.standard_normal((part, K), np.float32),
                norms=np.ones((part, 1), np.float32),
                example=np.arange(part),
                position=nothing,
                token=nothing,
                examples=[{"id": f"{first + at:016x}"} for at in range(part)],
            )
            store.record_shard("sentence", store.rows("sentence").write_shard(number, content))
    return store


def table(figures: dict[str, Any]) -> str:
    """Return what 1 million, 100 million and 1 billion examples take, as Markdown."""
    slopes = figures["seconds a row and query, one thread"]
    kinds = {
        "full rows": ("full", FULL + 4),
        "one bit over 16,384": ("one bit", FOLD // 8),
        "encoder": ("encoder", 388),
    }
    lines = ["| how | s | largest difference |", "|---|---|---|"]
    lines += [f"| {one['how']} | {one['seconds']:.0f} | {one['difference']:.1e} |" for one in figures["builds"]]
    lines += ["", "| examples | CPU hours | GPU hours | rows | bytes | s a query, 1 node | 8 | 64 |", "|" + "---|" * 8]
    for n in (10**6, 10**8, 10**9):
        hours = [f"{n * per / 3600:,.0f}" for per in SECONDS_PER_EXAMPLE.values()]
        for name, (slope, size) in kinds.items():
            times = [f"{n * slopes[slope] / (16 * nodes):,.3g}" for nodes in (1, 8, 64)]
            lines.append(f"| {n:,} | {' | '.join(hours)} | {name} | {_size(n * size)} | {' | '.join(times)} |")
        lines.append(f"| {n:,} | | | TrackStar's | {_size(n * TRACKSTAR)} | | | |")
    return "\n".join(lines) + "\n"


def _size(count: float) -> str:
    power = min(4, int(np.log10(count) // 3))
    return f"{count / 1000**power:,.3g} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


if __name__ == "__main__":
    main()
