"""Builds by one process, by jobs and by actors, and what an index of up to a billion examples takes.

    python -m bench.scale --work /tmp/scale

Real processes of `rapidindex build` over one data file and a tiny Llama with random weights: plain, `--shard` with its
jobs at once, and `--ray` on a cluster of one node that says it has a core for each actor. With more processes than
cores this shows what the machinery costs, not what it gains. Then `scale.md` computes what larger indexes take: from
the scan's processor seconds a row in `retrieval_scan.json` (`bench.retrieval --stage scan`) for rows of 65,536 entries,
from the index's for one bit a dimension over 16,384, and from a scan of rows of 384, an encoder's, that is made here.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import RESULTS, parser, pin, results_folder, save, timed, write_text
from bench.crash import largest_difference, write_data, write_model
from rapidindex.cluster import import_ray
from rapidindex.search.exact import exact_search
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
    add("--rows", type=int, default=500_000, help="rows of an encoder's length that are searched")
    add("--stage", choices=["builds", "slopes"], help="one of the two; by default both")
    options = options.parse_args()
    if options.smoke:
        options.examples, options.rows = 30, 1000
    options.work.mkdir(parents=True)  # the builds must not find an earlier one
    counts = (1,) if options.smoke else tuple(options.counts)
    if options.stage in (None, "builds"):
        save("scale", {"builds": builds(options.work, options.examples, counts, ray=not options.smoke)}, options)
    if options.stage in (None, "slopes"):
        save("scale_slopes", slopes(short_rows(options.work, options.rows)), options)
    folder = results_folder(options)
    files = [folder / f"{name}.json" for name in ("scale", "scale_slopes")]
    if not all(file.exists() for file in files):
        return  # scale.md takes both stages
    built, slopes_of = (json.loads(file.read_text())["figures"] for file in files)
    text = table(built["builds"], slopes_of)
    write_text(folder / "scale.md", text)
    print(text)


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
    with cluster(max(counts)) if ray else nullcontext() as address:
        for count in counts:
            ways = {f"{count} jobs": [["--shard", f"{part}/{count}"] for part in range(1, count + 1)]}
            if address:
                ways[f"{count} actors"] = [["--ray", address, "--workers", str(count)]]
            for how, processes in ways.items():
                index = work / how.replace(" ", "-")
                taken, _ = timed(lambda: finish(*[run(index, *options) for options in processes]))  # noqa: B023
                found.append({"how": how, "seconds": taken, "difference": largest_difference(index, plain)})
    return found


@contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """Start a Ray cluster of one node that says it has so many CPUs; yield its address."""
    import_ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield started.address
    finally:
        started.shutdown()


def slopes(encoder: float) -> dict[str, float]:
    """Return the processor seconds that a row takes for a query on one thread, by kind; `encoder` was measured here."""
    scanned = json.loads((RESULTS / "retrieval_scan.json").read_text())["figures"]
    most = scanned[max((n for n in scanned if n.isdecimal()), key=int)]
    spent, entries = most["threads"]["1"], most["rows"] * most["K"]
    ways = {"full": ("one", FULL), "one bit": ("index", FOLD)}
    found = {name: spent[method]["processor"] / entries * length for name, (method, length) in ways.items()}
    return {**found, "encoder": encoder}


def short_rows(work: Path, count: int) -> float:
    """Return the processor seconds that a row of an encoder's length takes for a query on one thread, in memory."""
    pin(1)
    draw = np.random.default_rng(0)
    rows, query = _store(work / "encoder", ENCODER, count, draw).rows("sentence"), draw.standard_normal((1, ENCODER))
    spent = []
    for _ in range(5):
        started = time.process_time()
        exact_search(rows, query, 10)
        spent.append(time.process_time() - started)
    return min(spent) / count


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


def table(builds: list[dict[str, Any]], slopes: dict[str, float]) -> str:
    """Return what the builds took, and what 1 million, 100 million and 1 billion examples take, as Markdown."""
    kinds = {
        "full rows": ("full", FULL + 4),
        "one bit over 16,384": ("one bit", FOLD // 8),
        "encoder": ("encoder", 388),
    }
    lines = ["| how | s | largest difference |", "|---|---|---|"]
    lines += [f"| {one['how']} | {one['seconds']:.0f} | {one['difference']:.1e} |" for one in builds]
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
