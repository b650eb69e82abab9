"""Markdown tables and SVG plots from the results' JSON alone."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GRADIENT = 1_843_200
"""Entries of a whole gradient, where the notes do not say."""
NAMES = {
    "perfect": "(the most that can be had)",
    "random": "random",
    "bm25": "BM25",
    "bm25-response": "BM25, responses only",
    "embedding": "embedding",
    "embedding-response": "embedding, responses only",
    "bm25-word": "BM25, the word alone in responses",
    "embedding-word": "embedding, the word alone and responses",
    "lissa": "influence function, LiSSA, few steps and queries",
    "lissa-unit": "the same / length of the gradient",
    "limit": "influence function, LiSSA's limit by the empirical Fisher",
    "limit-unit": "the same / length of the gradient",
    "datainf": "influence function, DataInf",
    "datainf-unit": "the same / length of the gradient",
    "full/ekfac/none": "influence function, EK-FAC",
    "full/ekfac/unit": "the same / length of the gradient",
    "full/ekfac-root/unit": "EK-FAC, its root on either side, unit length",
    "full/kronecker/unit": "second moment along Kronecker eigenvectors, unit length",
    "full/none/none": "TracIn",
    "full/none/layer": "TracIn, layer-wise (the paper's recipe, uncompressed)",
    "full/estimate/unit": "the default, uncompressed",
    "product/default/exact": "**the product's index, default**",
    "product/default/ann": "the product's index, default, through FAISS",
    "product/kronecker/exact": "the product's index, Kronecker second moment",
    "product/kronecker/ann": "the product's index, Kronecker second moment, through FAISS",
    "product/paper/exact": "the product's index, paper's recipe",
    "product/paper/ann": "the product's index, paper's recipe, through FAISS",
}
MODELS = {"early ": "early model: ", "both ": "finished and early added: "}
"""Names' beginnings: whose gradients they are of, where not the finished model's."""
CLOSE, _AIMED = 0.02, r"K=\d+/shuffles=20/estimate/unit/(int8|float16)"
STORED = ("int8", "float16")
"""How rows are kept, and how format 1 kept them: of some runs there is only the latter."""
RECIPES = {
    "estimate/unit": "default",
    "none/layer": "paper",
    "ekfac/unit": "EK-FAC of the query",
    "ekfac-root/unit": "EK-FAC",
    "kronecker/unit": "Kronecker second moment",
}
CORRECTIONS, NORMALIZATIONS = ("none", "estimate"), ("none", "layer", "unit")


def write_tables(folder: Path) -> None:
    """Write evidence_TASK.md, and two plots of each task, for every evidence_TASK.json in `folder`."""
    found = sorted(folder.glob("evidence_*.json"))
    if not found:
        raise SystemExit(f"{folder} has no evidence_*.json: run python -m bench.evidence first.")
    for file in found:
        figures = json.loads(file.read_text())["figures"]
        file.with_suffix(".md").write_text(page(figures))
        for name, draw in (("fidelity", draw_fidelity), ("bytes", draw_bytes)):
            draw(figures, file.with_name(f"{file.stem}_{name}.svg"))
        print(f"written: {file.with_suffix('.md')}")


def page(figures: dict[str, Any]) -> str:
    """All tables of one task."""
    parts = [f"# {figures['task']}: {len(figures['seeds'])} seeds\n", _setting(figures), _overview(figures)]
    for metric in _metrics(figures):
        for group, asked in _questions(figures):
            parts.append(f"## {metric}, {group}, by {asked}\n")
            parts.append(_table(figures, metric, group, asked, dict.fromkeys([*_shown(), *_compressed(figures)])))
            parts.append(f"### Every recipe, K = 65,536 beside uncompressed: {metric}, {group}, by {asked}\n")
            recipes = [begins + name for begins in ("", *MODELS) for name in _recipes()]
            parts.append(_table(figures, metric, group, asked, recipes))
    parts += ["## What compression costs\n", _costs(figures)]
    parts += ["## Fidelity to the same recipe uncompressed\n", _fidelity(figures), "## Seconds\n", _seconds(figures)]
    return "\n".join(parts)


def _setting(figures: dict[str, Any]) -> str:
    told = [f"Sizes: {json.dumps(figures['sizes'])}\n"]
    for seed in figures["seeds"]:
        lines = [f"Seed {seed['seed']}: {seed['rows']} rows, planted {seed['planted']}, queries {seed['queries']}"]
        lines.append(f"of which the model's own answers {seed['own']}")
        if seed["success"]:
            lines.append(f"attack success {_percent(seed['success'])}")
        if seed["separability"]:
            lines.append(f"planted against clean { ({k: round(v, 3) for k, v in seed['separability'].items()}) }")
        if seed["product"]:
            lines.append(f"largest difference of the product's scores from the grid's {seed['product']}")
        if seed["ann"]:
            lines.append(f"share of queries that FAISS answered {seed['ann']}")
        told.append("- " + "; ".join(lines))
    for kind, texts in figures["seeds"][0]["examples"].items():
        if texts:
            told.append(f"\nThe first {kind}:\n" + "".join(f"\n- {' '.join(text.split())}" for text in texts))
    return "\n".join(told) + "\n"


def _percent(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} the trigger {rate:.0%}" for name, rate in rates.items())


def _metrics(figures: dict[str, Any]) -> list[str]:
    return ["auPRC", "auROC", "ranked auPRC"] if figures["task"] == "backdoor" else ["AP"]


def _questions(figures: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted({(row["group"], row["asked"]) for row in figures["counts"]})


def _aimed_at(figures: dict[str, Any]) -> tuple[str, int]:
    """The metric and the k by which a task's aim is told."""
    return ("auPRC", 50) if figures["task"] == "backdoor" else ("AP", 10)


def _overview(figures: dict[str, Any]) -> str:
    """Every method's figure of the aim, of all groups side by side, with the number of seeds that it was run on."""
    metric, k = _aimed_at(figures)
    questions = sorted(_questions(figures), key=lambda question: (question[1], question[0]))
    cells = {(row["method"], row["group"], row["asked"]): row[metric] for row in figures["counts"] if row["k"] == k}
    body = []
    for name in _shown():
        found = [cells.get((name, *question)) for question in questions]
        if any(found):
            body.append([title(name), str(next(one["n"] for one in found if one)), *map(told, found)])
    head = ["method", "seeds", *(f"{group}, by {asked}" for group, asked in questions)]
    return f"## {metric} at top {k}\n\n{markdown(head, body)}"


def _shown() -> list[str]:
    """Names of every method, RapidGrads at K = 65,536 alone: of the finished model, of the early one, of both."""
    names = [*NAMES, *(f"K=65536/shuffles=20/{recipe}/{kind}" for recipe in RECIPES for kind in STORED)]
    return names + [begins + name for begins in MODELS for name in names]


def _compressed(figures: dict[str, Any]) -> list[str]:
    """Names of the two recipes at every K and λ, in the order of K; float32 finds what float16 does."""
    names = {row["method"] for row in figures["counts"]}
    kept = [n for n in names if "K=" in n and _recipe(n) in RECIPES and not n.endswith("/float32")]
    kept = [n for n in kept if not n.startswith("both ")]
    return sorted(kept, key=lambda name: (name.startswith("early "), _recipe(name), _K(name), name))


def _recipes() -> list[str]:
    pairs = [f"{c}/{n}" for c in CORRECTIONS for n in NORMALIZATIONS]
    return [name for pair in pairs for name in (f"full/{pair}", f"K=65536/shuffles=20/{pair}/float16")]


def _K(name: str) -> int:
    return int(name.split("/")[0].rpartition("K=")[2])


def _recipe(name: str) -> str:
    return "/".join(name.split("/")[2:4])


def _whole(name: str) -> str:
    """The same recipe at the same model, uncompressed."""
    return f"{name.rpartition('K=')[0]}full/{_recipe(name)}"


def title(name: str) -> str:
    """A method's name as a reader knows it."""
    for begins, said in MODELS.items():
        if name.startswith(begins):
            return said + title(name.removeprefix(begins))
    if name in NAMES:
        return NAMES[name]
    if name.startswith("full/"):
        return f"uncompressed, correction {name.split('/')[1]}, normalise {name.split('/')[2]}"
    _, shuffles, corrected, normalize, kind = name.split("/")
    recipe = RECIPES.get(f"{corrected}/{normalize}", f"correction {corrected}, normalise {normalize}")
    return f"RapidGrad {recipe}, K = {_K(name):,}, λ = {shuffles.removeprefix('shuffles=')}, {kind}"


def _table(figures: dict[str, Any], metric: str, group: str, asked: str, names: Iterable[str]) -> str:
    rows = [row for row in figures["counts"] if (row["group"], row["asked"]) == (group, asked)]
    tops = sorted({row["k"] for row in rows})
    cells = {(row["method"], row["k"]): row[metric] for row in rows}
    body = [
        [title(name), *(told(cells.get((name, k))) for k in tops)]
        for name in names
        if any((name, k) in cells for k in tops)
    ]
    return markdown(["method", *(f"top {k}" for k in tops)], body)


def told(value: dict[str, Any] | None) -> str:
    """A mean with the half width of its interval."""
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + (f" ± {value['half']:.3f}" if value["half"] is not None else "")


def _costs(figures: dict[str, Any]) -> str:
    """How far each K falls behind, and where most, the same recipe uncompressed over as many seeds."""
    found = {
        (row["method"], metric, row["group"], row["asked"], row["k"]): row[metric]
        for row in figures["counts"]
        for metric in _metrics(figures)
    }
    most: dict[str, tuple[float, tuple]] = {}
    for name in _compressed(figures):
        behind = {
            where: found[_whole(name), *where]["mean"] - value["mean"]
            for (method, *rest), value in found.items()
            if method == name
            and (whole := found.get((_whole(name), *(where := tuple(rest)))))
            and whole["n"] == value["n"]
        }
        if behind:
            worst = max(behind, key=lambda where: behind[where])
            most[name] = behind[worst], worst
    body = [
        [title(name), f"{by:.3f}", f"{metric}, {group}, by {asked}, top {k}"]
        for name, (by, (metric, group, asked, k)) in most.items()
    ]
    said = []
    for begins, model in (("", "finished model"), ("early ", "early model")):
        within = [_K(n) for n, (by, _) in most.items() if re.fullmatch(begins + _AIMED, n) and by <= CLOSE]
        smallest = min(within, default="none")
        said.append(f"The smallest K of the default, λ = 20, within {CLOSE} everywhere, {model}: {smallest}")
    return markdown(["", "most behind", "where"], body) + "".join(f"\n{line}.\n" for line in said)


def _fidelity(figures: dict[str, Any]) -> str:
    rows = sorted(figures["fidelity"], key=lambda row: (_recipe(row["method"]), _K(row["method"]), row["method"]))
    keys = ("pearson", "spearman", "error")
    return markdown(["", *keys], [[title(row["method"]), *(told(row[key]) for key in keys)] for row in rows])


def _seconds(figures: dict[str, Any]) -> str:
    seeds = figures["seeds"]
    taken = {f"{name} (stage)": note["seconds"] for name, note in seeds[0]["notes"].items() if "seconds" in note}
    taken |= seeds[0]["seconds"]
    return markdown(["first seed", "seconds"], [[name, f"{seconds:.0f}"] for name, seconds in taken.items()])


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def bytes_of(name: str, size: int = GRADIENT) -> int | None:
    """Bytes a training example takes: scales and factors included; None for what keeps no gradient."""
    if name.startswith("full/"):
        return 4 * size
    if "K=" not in name:
        return None
    bits = {"float32": 32, "float16": 16, "int8": 8, "1bit": 1}[name.rpartition("/")[2]]
    return _K(name) * bits // 8 + 4 * (bits < 32)


def draw_fidelity(figures: dict[str, Any], file: Path) -> None:
    """How the error falls as K grows, for two recipes, every λ and the three precisions."""
    plt = _pyplot()
    picture, axes = plt.subplots(figsize=(6.4, 4.2))
    rows = [row for row in figures["fidelity"] if row["method"].startswith("K=")]
    for label, points in _lines(rows, "error").items():
        axes.errorbar(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="error of the scores / their length")
    _finish(plt, picture, axes, file)


def draw_bytes(figures: dict[str, Any], file: Path) -> None:
    """auPRC at top 50, or AP at top 10 by word, against the bytes that a training example takes; λ = 20."""
    metric, k = _aimed_at(figures)
    asked = "sentence" if figures["task"] == "backdoor" else "word"
    plt = _pyplot()
    groups = [group for group, way in _questions(figures) if way == asked]
    picture, found = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.2), squeeze=False)
    for axes, group in zip(found[0], groups, strict=True):
        rows = [r for r in figures["counts"] if (r["group"], r["asked"], r["k"]) == (group, asked, k)]
        drawn = [r for r in rows if "/shuffles=20/" in r["method"] and not r["method"].startswith("both ")]
        drawn = [r for r in drawn if not r["method"].endswith("/float32")]
        for label, points in _lines(drawn, metric, by_bytes=True).items():
            axes.errorbar(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1)
        level = {row["method"]: row[metric]["mean"] for row in rows}
        for name, style in (("bm25", "--"), ("embedding", ":"), ("full/estimate/unit", "-")):
            if name in level:
                axes.axhline(level[name], linestyle=style, linewidth=1, color="grey", label=title(name))
        axes.set(xscale="log", xlabel="bytes an example", ylabel=f"{metric} at top {k}", title=group)
        _finish(plt, picture, axes, file)


def _lines(rows: Sequence[dict], metric: str, *, by_bytes: bool = False) -> dict[str, list[tuple]]:
    """Points (x, mean, half width) by the name of their line."""
    lines: dict[str, list[tuple]] = {}
    for row in rows:
        name = row["method"]
        if "K=" not in name or _recipe(name) not in RECIPES:
            continue
        x = bytes_of(name) if by_bytes else _K(name)
        _, shuffles, *_, kind = name.split("/")
        label = f"{MODELS.get(name.partition('K=')[0], '')}{RECIPES[_recipe(name)]}"
        label += f", {shuffles.replace('shuffles=', 'λ = ')}, {kind}"
        lines.setdefault(label, []).append((x, row[metric]["mean"], row[metric]["half"] or 0.0))
    return {label: sorted(points) for label, points in sorted(lines.items())}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rapidindex"  # the same figures make the same file
    import matplotlib.pyplot as plt

    return plt


def _finish(plt: Any, picture: Any, axes: Any, file: Path) -> None:
    axes.grid(True, linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:  # none where no method of --only is a line
        axes.legend(fontsize=6)
    picture.tight_layout()
    picture.savefig(file, metadata={"Date": None})
    plt.close(picture)
