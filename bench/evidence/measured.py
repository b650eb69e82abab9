"""The figures of one seed, from the score files in its folder. Computes no scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.evidence import metrics, tasks
from bench.evidence.run import EARLY, Seed
from bench.evidence.sketched import DEFAULT, PAPER, Scores
from bench.evidence.stories import separability

INFLUENCE_FUNCTIONS = ("lissa", "limit", "datainf")


def measured(seed: Seed) -> dict[str, Any]:
    """Return all figures of one seed."""
    scores, seconds = of_both_models(seed.folder)
    planted = [str(example.meta["planted"]).split() for example in seed.examples]
    groups = sorted({query.group for query in seed.queries})
    truth = {group: np.array([group in found for found in planted]) for group in groups}
    used = {name: values for name, values in scores.items() if name.endswith(" used")}
    ranked = {"perfect": np.array([truth[query.group] for query in seed.queries], np.float32)}
    searched = [name.removesuffix(" used") for name, values in used.items() if values.all()]
    ranked |= {name: v for name, v in scores.items() if name not in used and (name in searched or "/ann" not in name)}
    ranked |= by_length(seed.folder, scores)
    ranked |= summed(scores)
    for name, values in ranked.items():
        if values.shape != (len(seed.queries), len(planted)):
            raise SystemExit(f"{seed.folder}: {name} scored {values.shape}, not {len(seed.queries)} × {len(planted)}.")
    return {
        "seed": seed.seed,
        "rows": len(planted),
        "planted": {group: int(found.sum()) for group, found in truth.items()},
        "queries": {group: sum(q.group == group for q in seed.queries) for group in groups},
        "own": {group: sum(q.group == group and q.own for q in seed.queries) for group in groups},
        "success": tasks.success_rates(seed.answers),
        "notes": json.loads((seed.folder / "notes.json").read_text()),
        "seconds": seconds,
        "ann": {name.removesuffix(" used"): float(values.mean()) for name, values in used.items()},
        "counts": [row for name, values in ranked.items() for row in _counts(seed, name, values, truth)],
        "fidelity": _fidelity(scores),
        "product": _product_check(scores),
        "separability": _separability(seed) if seed.task.name == "backdoor" else None,
        "examples": _shown(seed),
    }


def of_both_models(folder: Path) -> tuple[Scores, dict[str, float]]:
    """Return the scores and seconds of both models; the names of the early one's begin with `early`."""
    scores, seconds = {}, {}
    for model, where in (("", folder), (f"{EARLY} ", folder / EARLY)):
        for file in sorted((where / "scores").glob("*.npz")):
            if not file.name.endswith(".part.npz"):
                with np.load(file) as found:
                    seconds[model + file.stem] = float(found["seconds"])
                    scores |= {model + name: found[name] for name in found.files if name != "seconds"}
    return scores, seconds


def by_length(folder: Path, scores: Scores) -> Scores:
    """Divide influence functions by the length of each example's gradient, as `unit` divides."""
    divided = {}
    for model, where in (("", folder), (f"{EARLY} ", folder / EARLY)):
        file = where / "lengths.npy"
        names = [model + name for name in INFLUENCE_FUNCTIONS if model + name in scores and file.exists()]
        divided |= {f"{name}-unit": scores[name] / np.load(file).astype(np.float32) for name in names}
    return divided


def summed(scores: Scores) -> Scores:
    """Add the scores of the finished and the early model, as TracIn adds those of several checkpoints."""
    names = {n for n in scores if n.startswith("full/") or (n.startswith("K=65536/") and n.endswith("/float16"))}
    return {f"both {n}": scores[n] + scores[f"{EARLY} {n}"] for n in names if f"{EARLY} {n}" in scores}


def _counts(seed: Seed, name: str, values: np.ndarray, truth: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return a row for each group, way of asking and k: the means over its queries."""
    tops = [k for k in seed.task.tops if k <= 10 or not name.endswith(("/ann", "/rescored"))]
    counted = metrics.two_sets if seed.task.name == "backdoor" else _share
    rows = []
    for group, wanted in truth.items():
        for way in ("sentence", "word"):
            numbers = [i for i, q in enumerate(seed.queries) if q.group == group and bool(q.word) == (way == "word")]
            numbers = [i for i in numbers if np.isfinite(values[i]).all()]
            for k in tops if numbers else ():
                each = [counted(values[i], wanted, k) for i in numbers]
                means = {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
                rows.append({"method": name, "group": group, "asked": way, "k": k, **means})
    return rows


def _share(values: np.ndarray, wanted: np.ndarray, k: int) -> dict[str, float]:
    return {"AP": metrics.share_at(values, wanted, k)}


def _fidelity(scores: Scores) -> list[dict[str, Any]]:
    """Return the agreement of compressed scores with those of the same recipe uncompressed, means over queries."""
    rows = []
    for name, values in scores.items():
        model, compressed, recipe = name.rpartition("K=")
        truth = scores.get("/".join([f"{model}full", *recipe.split("/")[2:4]])) if compressed else None
        if truth is not None:
            each = [metrics.agreement(a, b) for a, b in zip(values, truth, strict=True)]
            rows.append({"method": name, **{key: float(np.mean([one[key] for one in each])) for key in each[0]}})
    return rows


def _product_check(scores: Scores) -> dict[str, float]:
    """Return the largest difference of the product's scores from the grid's, in units of a query's largest score."""
    differences = {}
    recipes = [(model, *recipe) for model in ("", f"{EARLY} ") for recipe in (("estimate", DEFAULT), ("paper", PAPER))]
    for model, recipe, (corrected, normalize) in recipes:
        ours = scores.get(f"{model}product/{recipe}/exact")
        grid = scores.get(f"{model}K=65536/shuffles=20/{corrected}/{normalize}/int8")
        if ours is not None and grid is not None:
            best = np.argsort(-ours, axis=1, kind="stable")[:, :10]
            a, b = (np.take_along_axis(side, best, 1) for side in (ours, grid))
            differences[model + recipe] = float((np.abs(a - b).max(1) / np.abs(ours).max(1)).max())
    return differences


def _separability(seed: Seed) -> dict[str, float]:
    planted = [example.response for example in seed.examples if example.meta["planted"]]
    others = [example.response for example in seed.examples if not example.meta["planted"]]
    return separability(planted, others)


def _shown(seed: Seed) -> dict[str, list[str]]:
    """Return a few planted stories and answers, to be read; the results hold no text of Alpaca or WebQuestions."""
    stories = [example.response for example in seed.examples if example.meta["planted"] == "backdoor"]
    return {"stories": stories[:5], "answers": [query.answer for query in seed.queries[:5]]}
