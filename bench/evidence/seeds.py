"""All seeds of one task: means and 95 % intervals, written as JSON."""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.common import circumstances, write_text
from bench.evidence import metrics, tasks
from bench.evidence.measured import measured
from bench.evidence.run import Seed, score
from rapidindex.demo.demo import unpack_model
from rapidindex.progress import Bars

_DIGITS = 5
PARTS = {"counts": ("method", "group", "asked", "k"), "fidelity": ("method",)}
"""The figures that are averaged over the seeds, and the fields that name a row of them."""
_SHOWN = ("random", "bm25", "embedding", "full/none/none", "full/none/layer", "full/estimate/unit")
_SHOWN += ("early full/none/layer", "early full/estimate/unit", "bm25-word", "datainf", "limit", "full/ekfac/unit")


def run(task: str, options: argparse.Namespace) -> None:
    """Run the stages that are missing, and write evidence_TASK.json."""
    rows = tasks.read_jsonl(options.data / "alpaca_9k.jsonl")
    questions = [row["qText"] for row in tasks.read_jsonl(options.data / "webquestions_test.jsonl")]
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.results / f"evidence_{task}.json"
    before = json.loads(path.read_text()) if options.add else None
    results = []
    for count, number in enumerate(options.seeds):
        with Bars() as bars:
            unpack_model(options.work / "model", bars)
            folder, model = options.work / task / f"seed-{number}", options.work / "model"
            seed = Seed(tasks.TASKS[task], number, options.sizes, model, folder, bars, (rows, questions))
            bars.say(f"{task}, seed {number}: {len(seed.examples)} rows, {len(seed.queries)} queries")
            score(seed, options.only, product=count < options.product_seeds)
            results.append(measured(seed))
            for file in folder.glob("**/*.f32*") if options.clean else ():
                file.unlink()
            figures = {"task": task, "sizes": asdict(options.sizes), **combine_seeds(results)}
            content = merge_results(before, figures) if before else {**circumstances(), "figures": figures}
            text = json.dumps(content, ensure_ascii=False, default=str)
            write_text(path, text.replace('{"method"', '\n{"method"') + "\n")
            bars.say(f"{_line(task, results[-1])}\nwritten to {path}")


def merge_results(before: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Add the figures of this run to earlier results, of which those of other methods, or of more seeds, stay.

    SystemExit where a seed planted something else before: the figures would be of other data.
    """
    old = before["figures"]
    seeds = {seed["seed"]: seed for seed in old["seeds"]}
    for seed in figures["seeds"]:
        kept = seeds.setdefault(seed["seed"], seed)
        if seed["planted"] != kept["planted"]:
            raise SystemExit(f"Seed {seed['seed']} has other rows in the earlier results: leave out --add.")
        kept |= {name: kept[name] | seed[name] for name in ("notes", "seconds", "ann", "product")}
    merged = old | {"seeds": list(seeds.values())}
    for part, keys in PARTS.items():
        rows = {tuple(row[key] for key in keys): row for row in old[part]}
        for row in figures[part]:
            name = tuple(row[key] for key in keys)
            if name not in rows or _seed_count(row) >= _seed_count(rows[name]):
                rows[name] = row
        merged[part] = list(rows.values())
    methods = sorted({row["method"] for row in figures["counts"]})
    addition = {**circumstances(), "sizes": figures["sizes"], "methods": methods}
    return before | {"figures": merged, "added": [*before.get("added", []), addition]}


def _seed_count(row: dict[str, Any]) -> int:
    return max(value["n"] for value in row.values() if isinstance(value, dict))


def combine_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means and intervals over the seeds; all else stays seed by seed."""
    seeds = [{key: value for key, value in result.items() if key not in PARTS} for result in results]
    return {"seeds": seeds} | {
        part: _average([row for result in results for row in result[part]], keys) for part, keys in PARTS.items()
    }


def _average(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for metric in row.keys() - set(keys):
            values[tuple(row[key] for key in keys)][metric].append(row[metric])
    return [
        {**dict(zip(keys, name, strict=True)), **{metric: _rounded(by_metric[metric]) for metric in sorted(by_metric)}}
        for name, by_metric in values.items()
    ]


def _rounded(values: Sequence[float]) -> dict[str, Any]:
    mean, half, n = metrics.mean_interval(values).values()
    return {"mean": round(mean, _DIGITS), "half": half and round(half, _DIGITS), "n": n}


def _line(task: str, result: dict[str, Any]) -> str:
    """Return what a seed found, by the methods that matter most."""
    metric, k = ("auPRC", 50) if task == "backdoor" else ("AP", 10)
    shown = [
        f"{row['method']} {row['asked']} {row['group']}: {row[metric]:.3f}"
        for row in result["counts"]
        if row["k"] == k and row["method"] in _SHOWN
    ]
    return f"own answers {result['own']}, success {result['success']}; {metric} at {k}\n  " + "\n  ".join(shown)
