"""All seeds of one task, and what they say together: means and 95 % intervals, written as JSON."""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.common import circumstances
from bench.evidence import metrics, tasks
from bench.evidence.measured import measured
from bench.evidence.run import Seed, score
from rapidindex.demo import unpack_model
from rapidindex.progress import Bars

_DIGITS = 5


def run(task: str, options: argparse.Namespace) -> None:
    """Run what is not there yet, and write evidence_TASK.json."""
    rows = tasks.read_jsonl(options.data / "alpaca_9k.jsonl")
    questions = [row["qText"] for row in tasks.read_jsonl(options.data / "webquestions_test.jsonl")]
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for count in range(options.seeds):
        with Bars() as bars:
            unpack_model(options.work / "model", bars)
            number = options.first_seed + count
            folder = options.work / task / f"seed-{number}"
            model = options.work / "model"
            seed = Seed(tasks.TASKS[task], number, options.sizes, model, folder, bars, (rows, questions))
            bars.say(f"{task}, seed {number}: {len(seed.examples)} rows, {len(seed.queries)} queries")
            score(seed, options.methods, product=count < options.product_seeds)
            results.append(measured(seed))
            if options.clean:
                for file in folder.glob("**/*.f32*"):
                    file.unlink()
            _write(task, options, results)
            bars.say(_told(task, results[-1]))


def _write(task: str, options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    options.results.mkdir(parents=True, exist_ok=True)
    value = {**circumstances(), "figures": {"task": task, "sizes": asdict(options.sizes), **together(results)}}
    text = json.dumps(value, ensure_ascii=False, default=str)
    tasks.write_text(options.results / f"evidence_{task}.json", text.replace('{"method"', '\n{"method"') + "\n")


def together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and intervals over the seeds; what is not a figure stays seed by seed."""
    counted = ("counts", "fidelity")
    return {
        "seeds": [{key: value for key, value in result.items() if key not in counted} for result in results],
        "counts": _spread([row for result in results for row in result["counts"]], ("method", "group", "asked", "k")),
        "fidelity": _spread([row for result in results for row in result["fidelity"]], ("method",)),
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
        "ekfac",
    )
    shown = [
        f"{row['method']} {row['asked']} {row['group']}: {row[metric]:.3f}"
        for row in result["counts"]
        if row["k"] == k and row["method"] in names
    ]
    return f"own answers {result['own']}, success {result['success']}; {metric} at {k}\n  " + "\n  ".join(shown)
