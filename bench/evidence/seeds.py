"""All seeds of one task, and what they say together: means and 95 % intervals, written as JSON."""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import circumstances
from bench.evidence import metrics, tasks
from bench.evidence.measured import measured
from bench.evidence.run import Seed, score
from rapidindex.demo.demo import unpack_model
from rapidindex.progress import Bars

_DIGITS = 5
PARTS = {"counts": ("method", "group", "asked", "k"), "fidelity": ("method",)}
"""What is averaged over the seeds, and what a row of it is of."""


def run(task: str, options: argparse.Namespace) -> None:
    """Run what is not there yet, and write evidence_TASK.json."""
    rows = tasks.read_jsonl(options.data / "alpaca_9k.jsonl")
    questions = [row["qText"] for row in tasks.read_jsonl(options.data / "webquestions_test.jsonl")]
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.results / f"evidence_{task}.json"
    before = json.loads(file.read_text()) if options.add else None
    results = []
    for count, number in enumerate(options.seeds):
        with Bars() as bars:
            unpack_model(options.work / "model", bars)
            folder = options.work / task / f"seed-{number}"
            model = options.work / "model"
            seed = Seed(tasks.TASKS[task], number, options.sizes, model, folder, bars, (rows, questions))
            bars.say(f"{task}, seed {number}: {len(seed.examples)} rows, {len(seed.queries)} queries")
            score(seed, options.methods, product=count < options.product_seeds)
            results.append(measured(seed))
            if options.clean:
                for file in folder.glob("**/*.f32*"):
                    file.unlink()
            figures = {"task": task, "sizes": asdict(options.sizes), **together(results)}
            _write(file, added(before, figures) if before else {**circumstances(), "figures": figures})
            bars.say(_told(task, results[-1]))


def _write(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, default=str)
    tasks.write_text(file, text.replace('{"method"', '\n{"method"') + "\n")


def added(before: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Earlier results with the figures of what has been run now; those of other methods, or of more seeds, stay.

    SystemExit where a seed planted something else before: the figures would be of other data.
    """
    old = before["figures"]
    found = {seed["seed"]: seed for seed in old["seeds"]}
    for seed in figures["seeds"]:
        if seed["planted"] != found.get(seed["seed"], seed)["planted"]:
            raise SystemExit(f"Seed {seed['seed']} has other rows in the earlier results: leave out --add.")
        kept = found.setdefault(seed["seed"], seed)
        kept |= {name: kept[name] | seed[name] for name in ("notes", "seconds", "ann", "product")}
    together = old | {"seeds": list(found.values())}
    for part, keys in PARTS.items():
        rows = {tuple(row[key] for key in keys): row for row in old[part]}
        for row in figures[part]:
            at = tuple(row[key] for key in keys)
            if at not in rows or _of(row) >= _of(rows[at]):
                rows[at] = row
        together[part] = list(rows.values())
    methods = sorted({row["method"] for row in figures["counts"]})
    return before | {
        "figures": together,
        "added": [*before.get("added", []), {**circumstances(), "sizes": figures["sizes"], "methods": methods}],
    }


def _of(row: dict[str, Any]) -> int:
    """Of how many seeds a row of figures is."""
    return max(value["n"] for value in row.values() if isinstance(value, dict))


def together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and intervals over the seeds; what is not a figure stays seed by seed."""
    seeds = [{key: value for key, value in result.items() if key not in PARTS} for result in results]
    return {"seeds": seeds} | {
        part: _spread([row for result in results for row in result[part]], keys) for part, keys in PARTS.items()
    }


def _spread(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for metric in row.keys() - set(keys):
            values[tuple(row[key] for key in keys)][metric].append(row[metric])
    return [
        {**dict(zip(keys, key, strict=True)), **{metric: _rounded(found) for metric, found in sorted(each.items())}}
        for key, each in values.items()
    ]


def _rounded(values: Sequence[float]) -> dict[str, Any]:
    found = metrics.mean_interval(values)
    half = found["half"]
    return {"mean": round(found["mean"], _DIGITS), "half": half and round(half, _DIGITS), "n": found["n"]}


def _told(task: str, result: dict[str, Any]) -> str:
    """A line on the seed, and the first figures of the methods that count most."""
    metric, k = ("auPRC", 50) if task == "backdoor" else ("AP", 10)
    names = (
        "random",
        "bm25",
        "embedding",
        "full/none/none",
        "full/none/layer",
        "full/estimate/unit",
        "early full/none/layer",
        "early full/estimate/unit",
        "bm25-word",
        "datainf",
        "limit",
        "full/ekfac/unit",
    )
    shown = [
        f"{row['method']} {row['asked']} {row['group']}: {row[metric]:.3f}"
        for row in result["counts"]
        if row["k"] == k and row["method"] in names
    ]
    return f"own answers {result['own']}, success {result['success']}; {metric} at {k}\n  " + "\n  ".join(shown)
