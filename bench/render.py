"""All tables and plots of bench/results, from the JSON there alone.

    python -m bench.render [PART …] [--results FOLDER]

Parts: evidence, retrieval, caching, lds, facts, verify, retrained, influcoder.

All but `caching` write Markdown (and SVG) beside their JSON; `caching` prints the tables of caching and of token rows.
Plots need matplotlib. The same JSON gives the same files, byte for byte.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.common import RESULTS
from bench.retrieval.scan import RERANKED
from rapidindex.store import ROW_TYPE

Figures = dict[str, Any]
WAYS = ("proponents", "opponents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is, and where the files go")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; choose among {', '.join(PARTS)}")
    for part in options.parts or PARTS:
        PARTS[part](options.results)


def markdown(head: Sequence[Any], body: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *body])


def read(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of `folder` that fit `pattern`, by name. SystemExit where there is none."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(f"{pattern}.json"))}
    if not files:
        raise SystemExit(f"{folder} has no {pattern}.json: run its bench first.")
    return files


def write(path: Path, text: str) -> None:
    path.write_text(text)
    print(f"written to {path}")


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing SVG that is the same for the same figures. SystemExit without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("The tables are written; the plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rapidindex"
    import matplotlib.pyplot as plt

    return plt


def save_plot(plot: Any, path: Path) -> None:
    plot.savefig(path, metadata={"Date": None})
    pyplot().close(plot)
    print(f"written to {path}")


# --- the evidence ---

GRADIENT = 1_843_200
"""Entries of a whole gradient."""
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
    "full/kronecker/unit": "`kronecker`, uncompressed",
    "full/none/none": "TracIn",
    "full/none/layer": "TracIn, layer-wise (the paper's recipe, uncompressed)",
    "full/estimate/unit": "`estimate`, uncompressed",
    "product/estimate/exact": "the product's index, `estimate`",
    "product/estimate/ann": "the product's index, `estimate`, through FAISS",
    "product/kronecker/exact": "the product's index, `kronecker`",
    "product/kronecker/ann": "the product's index, `kronecker`, through FAISS",
    "product/kronecker/rescored": "the same, `--rescore` (five of the questions)",
    "product/kronecker 16/exact": "the product's index, `kronecker` of 16 examples",
    "encoder/kronecker": "the product's index, `kronecker`, once more",
    "encoder/first": "an encoder distilled from it, alone",
    "encoder/second": "the same, `--rescore 200`",
    "product/kfac/exact": "the product's index, `kfac`",
    "product/two-sided factored/exact": "the product's index, two-sided, `factored`",
    "product/two-sided kfac/exact": "the product's index, two-sided, `kfac`",
    "product/two-sided none/exact": "the product's index, two-sided, uncorrected",
    "product/paper/exact": "the product's index, paper's recipe",
    "product/paper/ann": "the product's index, paper's recipe, through FAISS",
}
DEPTHS = ("quarter", "half", "three quarters", "last")
"""Of the layer whose hidden states stand for a row."""
MODELS = {"early ": "early model: ", "both ": "finished and early added: "}
"""Prefixes of method names that say whose gradients were taken, where not the finished model's."""
CLOSE, DEFAULT_ROWS = 0.02, r"K=\d+/shuffles=20/estimate/unit/(int8|float16)"
ROWS_KEPT = ("int8", "float16")
"""The row types of the store's formats 2 and 1; some runs have only the latter."""
RECIPES = {
    "estimate/unit": "`estimate`",
    "none/layer": "paper",
    "ekfac/unit": "EK-FAC of the query",
    "ekfac-root/unit": "EK-FAC",
    "kronecker/unit": "`kronecker`",
}
CORRECTED = [
    f"{correction}/{normalize}" for correction in ("none", "estimate") for normalize in ("none", "layer", "unit")
]


def render_evidence(folder: Path) -> None:
    """Write evidence_TASK.md and two plots for every evidence_TASK.json."""
    files = read(folder, "evidence_*")
    for name, content in files.items():
        write(folder / f"{name}.md", evidence_page(content["figures"]))
    for name, content in files.items():
        plot_fidelity(content["figures"], folder / f"{name}_fidelity.svg")
        plot_bytes(content["figures"], folder / f"{name}_bytes.svg")


def evidence_page(figures: Figures) -> str:
    """Return all tables of one task."""
    counts = counts_of(figures)
    parts = [f"# {figures['task']}: {len(figures['seeds'])} seeds\n", _setting(figures), _overview(figures, counts)]
    shown = dict.fromkeys([*_shown(), *_compressed(counts)])
    pairs = [name for pair in CORRECTED for name in (f"full/{pair}", f"K=65536/shuffles=20/{pair}/float16")]
    recipes = [model + name for model in ("", *MODELS) for name in pairs]
    for metric in _metrics(figures):
        for group, asked in _questions(counts):
            where = f"{metric}, {group}, by {asked}"
            cells = counts[(counts.metric == metric) & (counts.group == group) & (counts.asked == asked)]
            parts += [f"## {where}\n", _by_k(cells, shown)]
            parts += [f"### Every recipe, K = 65,536 beside uncompressed: {where}\n", _by_k(cells, recipes)]
    parts += ["## What compression costs\n", _costs(counts)]
    parts += ["## Fidelity to the same recipe uncompressed\n", _fidelity(figures), "## Seconds\n", _seconds(figures)]
    return "\n".join(parts)


def counts_of(figures: Figures) -> pd.DataFrame:
    """Return the figures as a frame: a row for each method, metric, group, way of asking and k, over all seeds."""
    keys = ("method", "group", "asked", "k")
    rows = ((row, metric) for row in figures["counts"] for metric in _metrics(figures))
    frame = pd.DataFrame([{**{key: row[key] for key in keys}, "metric": m, **row[m]} for row, m in rows])
    return frame.assign(text=[_mean_text(row) for row in frame.to_dict("records")])


def _mean_text(value: dict[str, Any]) -> str:
    half = value["half"]
    return f"{value['mean']:.3f}" + ("" if half is None or np.isnan(half) else f" ± {half:.3f}")


def _setting(figures: Figures) -> str:
    lines = [f"Sizes: {json.dumps(figures['sizes'])}\n"]
    for seed in figures["seeds"]:
        parts = [f"Seed {seed['seed']}: {seed['rows']} rows, planted {seed['planted']}, queries {seed['queries']}"]
        parts.append(f"of which the model's own answers {seed['own']}")
        if seed["success"]:
            rates = ", ".join(f"{name} the trigger {rate:.0%}" for name, rate in seed["success"].items())
            parts.append(f"attack success {rates}")
        if seed["separability"]:
            parts.append(f"planted against clean { ({k: round(v, 3) for k, v in seed['separability'].items()}) }")
        if seed["product"]:
            parts.append(f"largest difference of the product's scores from the grid's {seed['product']}")
        if seed["ann"]:
            parts.append(f"share of queries that FAISS answered {seed['ann']}")
        lines.append("- " + "; ".join(parts))
    for kind, texts in figures["seeds"][0]["examples"].items():
        if texts:
            lines.append(f"\nThe first {kind}:\n" + "".join(f"\n- {' '.join(text.split())}" for text in texts))
    return "\n".join(lines) + "\n"


def _metrics(figures: Figures) -> list[str]:
    return ["auPRC", "auROC", "ranked auPRC"] if figures["task"] == "backdoor" else ["AP"]


def _aim(figures: Figures) -> tuple[str, int]:
    """Return the metric and the k that a task's aim is about."""
    return ("auPRC", 50) if figures["task"] == "backdoor" else ("AP", 10)


def _questions(counts: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted(set(zip(counts.group, counts.asked, strict=True)))


def _overview(figures: Figures, counts: pd.DataFrame) -> str:
    """Return every method's figure of the aim, all groups side by side, with the number of seeds behind it."""
    metric, k = _aim(figures)
    cells = counts[(counts.metric == metric) & (counts.k == k)]
    texts = cells.pivot(index="method", columns=["asked", "group"], values="text").sort_index(axis=1)
    seeds = cells.pivot(index="method", columns=["asked", "group"], values="n").sort_index(axis=1).bfill(axis=1)
    names = [name for name in _shown() if name in texts.index]
    body = [[title(name), int(seeds.loc[name].iloc[0]), *texts.loc[name].fillna("")] for name in names]
    head = ["method", "seeds", *(f"{group}, by {asked}" for asked, group in texts)]
    return f"## {metric} at top {k}\n\n{markdown(head, body)}\n"


def _shown() -> list[str]:
    """Return the names of all methods, RapidGrads at K = 65,536 alone: finished model, early model, both added."""
    names = [*NAMES, *(f"{kind}/{depth}" for kind in ("repsim", "rept") for depth in DEPTHS)]
    names += [f"K=65536/shuffles=20/{recipe}/{kind}" for recipe in RECIPES for kind in ROWS_KEPT]
    return names + [model + name for model in MODELS for name in names]


def _compressed(counts: pd.DataFrame) -> list[str]:
    """Return the names of the named recipes at every K and λ; float32 is left out, for it finds what float16 does."""
    names = [n for n in counts.method.unique() if "K=" in n and _recipe(n) in RECIPES and not n.endswith("/float32")]
    names = [name for name in names if not name.startswith("both ")]
    return sorted(names, key=lambda name: (name.startswith("early "), _recipe(name), _K(name), name))


def _K(name: str) -> int:
    return int(name.split("/")[0].rpartition("K=")[2])


def _recipe(name: str) -> str:
    return "/".join(name.split("/")[2:4])


def title(name: str) -> str:
    """Return the name of a method that readers know."""
    for prefix, label in MODELS.items():
        if name.startswith(prefix):
            return label + title(name.removeprefix(prefix))
    if name in NAMES:
        return NAMES[name]
    if name.startswith(("repsim/", "rept/")):
        kind, _, depth = name.partition("/")
        return f"{'RepSim' if kind == 'repsim' else 'RepT'} (hidden states), depth: {depth}"
    if name.startswith("two-sided="):
        K, corrected, normalize = name.removeprefix("two-sided=").split("/")
        return f"two-sided, K = {int(K):,}, correction {corrected}, normalise {normalize}, float32"
    if name.startswith("full/fisher-"):
        *root, sample, damping = name.split("/")[1].removeprefix("fisher-").split("-")
        kind = f"root of the Fisher matrix on either side, {name.split('/')[2]}" if root else "Fisher matrix's inverse"
        return f"{kind}, {sample} drawn gradients, damping {damping} mean eigenvalues"
    if name.startswith("full/rows-"):
        *root, damping = name.split("/")[1].removeprefix("rows-").split("-")
        kind = "root on either side, unit" if root else "inverse on the query's side"
        return f"second moment of the rows at length 1, {kind}, damping {damping} mean eigenvalues"
    if name.startswith("full/ekfac-cg-"):
        _, steps, normalize = name.replace("full/ekfac-cg-", "cg/").split("/")
        kind = "" if normalize == "none" else " / length of the gradient"
        return f"EK-FAC with {steps} steps of conjugate gradients{kind}"
    if name.startswith("full/"):
        return f"uncompressed, correction {name.split('/')[1]}, normalise {name.split('/')[2]}"
    _, shuffles, corrected, normalize, kind = name.split("/")
    recipe = RECIPES.get(f"{corrected}/{normalize}", f"correction {corrected}, normalise {normalize}")
    return f"RapidGrad {recipe}, K = {_K(name):,}, λ = {shuffles.removeprefix('shuffles=')}, {kind}"


def _by_k(cells: pd.DataFrame, names: Iterable[str]) -> str:
    table = cells.pivot(index="method", columns="k", values="text").fillna("")
    body = [[title(name), *table.loc[name]] for name in names if name in table.index]
    return markdown(["method", *(f"top {k}" for k in table)], body) + "\n"


def _costs(counts: pd.DataFrame) -> str:
    """Return how far each K falls behind, where most, the same recipe uncompressed over as many seeds."""
    names = _compressed(counts)
    some = counts[counts.method.isin(names)]
    whole = some.method.map(lambda name: f"{name.rpartition('K=')[0]}full/{_recipe(name)}")
    where = ["metric", "group", "asked", "k", "n"]
    pairs = some.assign(whole=whole).merge(
        counts, left_on=["whole", *where], right_on=["method", *where], suffixes=("", "_whole")
    )
    pairs["behind"] = pairs.mean_whole - pairs["mean"]
    most = pairs.loc[pairs.groupby("method").behind.idxmax()].set_index("method")
    worst = [(name, most.loc[name]) for name in names if name in most.index]
    body = [
        [title(name), f"{row.behind:.3f}", f"{row.metric}, {row.group}, by {row.asked}, top {row.k}"]
        for name, row in worst
    ]
    lines = []
    for prefix, model in (("", "finished model"), ("early ", "early model")):
        close = [_K(n) for n, row in worst if re.fullmatch(prefix + DEFAULT_ROWS, n) and row.behind <= CLOSE]
        smallest = min(close, default="none")
        lines.append(f"The smallest K of `estimate`, λ = 20, within {CLOSE} everywhere, {model}: {smallest}")
    return markdown(["", "most behind", "where"], body) + "\n" + "".join(f"\n{line}.\n" for line in lines)


def _fidelity(figures: Figures) -> str:
    rows = sorted(figures["fidelity"], key=lambda row: (_recipe(row["method"]), _K(row["method"]), row["method"]))
    keys = ("pearson", "spearman", "error")
    return (
        markdown(["", *keys], [[title(row["method"]), *(_mean_text(row[key]) for key in keys)] for row in rows]) + "\n"
    )


def _seconds(figures: Figures) -> str:
    first = figures["seeds"][0]
    seconds = {f"{name} (stage)": note["seconds"] for name, note in first["notes"].items() if "seconds" in note}
    body = [[name, f"{taken:.0f}"] for name, taken in (seconds | first["seconds"]).items()]
    return markdown(["first seed", "seconds"], body) + "\n"


def bytes_of(name: str, size: int = GRADIENT) -> int | None:
    """Return the bytes that a method keeps of a training example, scales included; None where it keeps no gradient."""
    if name.startswith("full/"):
        return 4 * size
    if "K=" not in name:
        return None
    bits = {"float32": 32, "float16": 16, "int8": 8, "1bit": 1}[name.rpartition("/")[2]]
    return _K(name) * bits // 8 + 4 * (bits < 32)


def plot_fidelity(figures: Figures, path: Path) -> None:
    """Draw how the error falls as K grows, for every recipe, λ and precision."""
    plot, axes = pyplot().subplots(figsize=(6.4, 4.2))
    rows = [row for row in figures["fidelity"] if row["method"].startswith("K=")]
    _draw_lines(axes, rows, "error")
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="error of the scores / their length")
    _finish(plot, axes, path)


def plot_bytes(figures: Figures, path: Path) -> None:
    """Draw auPRC at top 50, or AP at top 10 by word, against the bytes that a training example takes; λ = 20."""
    metric, k = _aim(figures)
    asked = "sentence" if figures["task"] == "backdoor" else "word"
    groups = sorted({row["group"] for row in figures["counts"] if row["asked"] == asked})
    plot, panels = pyplot().subplots(1, len(groups), figsize=(5.2 * len(groups), 4.2), squeeze=False)
    for axes, group in zip(panels[0], groups, strict=True):
        rows = [row for row in figures["counts"] if (row["group"], row["asked"], row["k"]) == (group, asked, k)]
        drawn = [row for row in rows if "/shuffles=20/" in row["method"] and not row["method"].startswith("both ")]
        _draw_lines(axes, [row for row in drawn if not row["method"].endswith("/float32")], metric, by_bytes=True)
        level = {row["method"]: row[metric]["mean"] for row in rows}
        for name, style in (("bm25", "--"), ("embedding", ":"), ("full/estimate/unit", "-")):
            if name in level:
                axes.axhline(level[name], linestyle=style, linewidth=1, color="grey", label=title(name))
        axes.set(xscale="log", xlabel="bytes an example", ylabel=f"{metric} at top {k}", title=group)
        _finish(plot, axes, path)


def _draw_lines(axes: Any, rows: Sequence[dict], metric: str, *, by_bytes: bool = False) -> None:
    """Draw a line of (K or bytes, mean, half width of the interval) for each recipe, λ and precision."""
    lines: dict[str, list[tuple]] = {}
    for row in rows:
        name = row["method"]
        if "K=" in name and _recipe(name) in RECIPES:
            _, shuffles, *_, kind = name.split("/")
            model = MODELS.get(name.partition("K=")[0], "")
            label = f"{model}{RECIPES[_recipe(name)]}, {shuffles.replace('shuffles=', 'λ = ')}, {kind}"
            x = bytes_of(name) if by_bytes else _K(name)
            lines.setdefault(label, []).append((x, row[metric]["mean"], row[metric]["half"] or 0.0))
    for label, points in sorted(lines.items()):
        axes.errorbar(*zip(*sorted(points), strict=True), label=label, marker="o", markersize=3, linewidth=1)


def _finish(plot: Any, axes: Any, path: Path) -> None:
    axes.grid(True, linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:  # none where --only left no method that is a line
        axes.legend(fontsize=6)
    plot.tight_layout()
    save_plot(plot, path)


# --- retrieval ---

AIMS = {"proponents": 0.99, "opponents": 0.98, "exact": 25, "flat": 10, "bytes_per_row": 600, "tracin": 6326}
LARGE = 100_000
DEFAULT_FACTORY, DIM = "HR,RaBitQ", 16_384
"""The index that a large store gets by default, and the fold that it is over, where K is no smaller."""
MARKERS = {"HR,RaBitQ": "o", "RaBitQ": "s", "SQ8": "^", "Flat": "D", "HNSW32": "v"}
COLOURS = {4096: "tab:blue", 8192: "tab:orange", 16_384: "tab:green"}
"""By fold."""


def render_retrieval(folder: Path) -> None:
    """Write retrieval.md and its plots, and print which aims are met."""
    files = {name.split("_", 1)[1]: content["figures"] for name, content in read(folder, "retrieval_*").items()}
    stores = {name: figures for name, figures in files.items() if "live" in figures}
    stores = dict(sorted(stores.items(), key=lambda item: item[1]["live"]))
    others = {name: figures for name, figures in files.items() if name not in stores}
    aims = list(aims_of(stores, others.get("tracin")))
    print("\n".join(aims))
    write(folder / "retrieval.md", retrieval_page(stores, others, aims))
    for name, figures in stores.items():
        plot_recall(figures, folder / f"retrieval_recall_{name}.svg")
    if fits(stores):
        plot_cost(stores, folder / "retrieval_cost.svg")


def retrieval_page(stores: dict[str, Figures], others: dict[str, Figures], aims: list[str]) -> str:
    """Return all tables of retrieval, and which aims are met."""
    parts = ["# Retrieval"]
    for name, figures in stores.items():
        parts += [_store_table(name, figures), _likeness(figures)]
    if "tracin" in others:
        parts += [_table_1(others["tracin"]), _table_2(others["tracin"], stores), _whole(others["tracin"], stores)]
    if "rows" in others:
        parts.append(_smallest(others["rows"]))
    parts += [scan_table(others[name]) for name in ("scan", "scan_gpu") if name in others]
    parts += [_growth(stores), "## Aims", "\n".join(aims)]
    return "\n\n".join(part for part in parts if part) + "\n"


def scan_table(sizes: Figures) -> str:
    """Return the exhaustive scan beside its floors, the index and re-ranking, and what a GPU took."""
    body, gpu = [], []
    for figures in sizes.values():
        for threads, measured in figures["threads"].items():
            least = {name: each["processor"] / int(threads) for name, each in measured.items()}
            rate = figures["multiplied"] / least["multiply"]
            computing = figures["products"]["batch"] / rate
            reranked = ""
            if "rerank" in least:
                floor = least["read"] * min(RERANKED, figures["rows"]) / figures["rows"]
                reranked = f"{1e3 * least['rerank']:.1f} ({floor / least['rerank']:.2f})"
            body.append(
                [
                    f"{figures['rows']:,} × {figures['K']:,}",
                    threads,
                    f"{1e3 * least['read']:.1f} ({figures['bytes'] / least['read'] / 1e9:.0f} GB/s)",
                    f"{1e3 * least['one']:.1f} ({least['read'] / least['one']:.2f})",
                    f"{1e3 * computing:.0f} ({rate / 1e9:.0f} G/s)",
                    f"{1e3 * least['batch']:.0f} ({computing / least['batch']:.2f})",
                    f"{least['batch'] / least['one']:.1f}",
                    f"{1e3 * least['index']:.1f} ({least['one'] / least['index']:.1f} ×)",
                    reranked,
                    f"{1e3 * measured['one']['clock']:.0f} / {1e3 * measured['batch']['clock']:.0f}",
                ]
            )
        for name, each in figures.get("gpu", {}).items():
            if name != "device":
                gpu.append([f"{figures['rows']:,}", name, f"{1e3 * each['clock']:.2f}"])
    head = ["rows", "threads", "reading, ms", "one query, ms (of reading)", "multiplying for 100, ms"]
    head += [
        "100 queries, ms (of multiplying)",
        "100 / one",
        "index, one query, ms",
        "1,000 rows re-ranked, ms (of reading)",
    ]
    text = (
        "## The exhaustive scan\n\nLeast milliseconds of the processor, divided by the threads; last, of the clock.\n\n"
    )
    text += markdown([*head, "one / 100 by the clock"], body)
    return text + ("\n\n" + markdown(["rows", "method", "ms"], gpu) if gpu else "")


def default_of(figures: Figures) -> str:
    """Return the name under which a store's figures hold those of its default index."""
    return f"{DEFAULT_FACTORY}@{min(DIM, figures['K'])}"


def configurations(figures: Figures) -> list[Figures]:
    """Return the figures of each factory over each fold."""
    return [value for name, value in figures.items() if "@" in name and not name.startswith("alone")]


def defaults(figures: Figures) -> list[Figures]:
    """Return the figures of the default index at every size of a store, the smallest first."""
    values = [value for name, value in figures.items() if name.startswith("at ") or name == default_of(figures)]
    return sorted(values, key=lambda value: value["live"])


def latencies(stores: dict[str, Figures]) -> dict[int, list[tuple[int, Figures]]]:
    """Return, by K, (live rows, latency on one thread) of the default index over rows of the present type.

    Exact scans that stood in for it are left out.
    """
    by_K: dict[int, list[tuple[int, Figures]]] = {}
    for figures in stores.values():
        if figures.get("row_type") == ROW_TYPE:
            pairs = [(value["live"], value["latency"]["1"]) for value in defaults(figures)]
            by_K.setdefault(figures["K"], []).extend(pair for pair in pairs if "search" in pair[1])
    return {K: sorted(pairs, key=lambda pair: pair[0]) for K, pairs in by_K.items()}


def fits(stores: dict[str, Figures]) -> dict[int, tuple[float, float, list[tuple[int, float]]]]:
    """Return, by K, (a, b, points) of seconds = a · N^b, fitted to the latency of the default index."""
    fitted = {}
    for K, pairs in latencies(stores).items():
        points = [(n, latency["proponents"]["median"]) for n, latency in pairs]
        if len({n for n, _ in points}) > 1:
            b, log_a = np.polyfit(*np.log(np.array(points)).T, 1)
            fitted[K] = (float(np.exp(log_a)), float(b), points)
    return fitted


def worst(recall: Figures) -> float:
    """Return the recall of the worst kind of query."""
    return min(value for kind, value in recall.items() if kind != "method")


def against_tracin(tracin: Figures, stores: dict[str, Figures]) -> pd.DataFrame:
    """Return a whole retrieval beside TracIn, a row for each store and number of threads; times are in seconds."""
    rows = [
        {
            "rows": figures["live"],
            "K": figures["K"],
            "threads": threads,
            "gradient": spent["query_gradient_seconds"]["whole answer"]["median"],
            "search": figures[default_of(figures)]["latency"][threads]["proponents"]["median"],
            "per_row": spent["seconds_per_row"]["tracin"],
        }
        for figures in stores.values()
        for threads, spent in tracin["threads"].items()
        if default_of(figures) in figures
    ]
    frame = pd.DataFrame(rows)
    retrieval = frame.gradient + frame.search
    passed_at = AIMS["tracin"] * retrieval / frame.per_row
    return frame.assign(tracin=frame["rows"] * frame.per_row, passed_at=passed_at).assign(
        ratio=lambda f: f.tracin / retrieval, distance=np.log(passed_at / frame["rows"]).abs()
    )


def aims_of(stores: dict[str, Figures], tracin: Figures | None) -> Iterator[str]:
    """Yield a line for each aim: met or not, the figure, and the aim."""
    for figures in stores.values():
        for one in defaults(figures):
            if one["live"] >= LARGE:
                yield from _aims_of_default(one, f"{one['live']:,} rows, K = {figures['K']:,}, `{default_of(figures)}`")
        if figures["live"] >= LARGE:
            yield from _reachable(figures)
    for K, (_, b, _) in fits(stores).items():
        yield _aim_line(f"K = {K:,}: exponent of latency", b, b < 1, "below 1")
    for row in against_tracin(tracin, stores).itertuples() if tracin else ():
        what = f"{row.rows:,} rows, K = {row.K:,}, {row.threads} threads: a whole retrieval, times as fast as TracIn"
        yield _aim_line(what, row.ratio, row.ratio > AIMS["tracin"], f"above {AIMS['tracin']:,}")


def _aims_of_default(one: Figures, where: str) -> Iterator[str]:
    for way in WAYS:
        recall = worst(one["recall"][way]["10"])
        yield _aim_line(f"{where}: recall@10 of {way}", recall, recall >= AIMS[way], f"at least {AIMS[way]}")
        if one["recall"][way]["10"]["method"] == "exact":
            yield f"- {where}: {way} are searched exactly: none reached the target, or too many candidates"
    for threads, latency in one["latency"].items():
        for name in ("exact", "flat"):
            times, what = latency["times"][name], f"{where}, {threads} threads: times as fast as {name}"
            yield _aim_line(what, times, times >= AIMS[name], f"at least {AIMS[name]}")
    size = one["bytes_per_row"]
    yield _aim_line(f"{where}: bytes of memory a row", size, size <= AIMS["bytes_per_row"], "at most 600")


def _reachable(figures: Figures) -> Iterator[str]:
    """Yield what each index small enough does at the smallest measured margin that reaches the recall aimed at."""
    for one in configurations(figures):
        exact, flat = (one["latency"]["1"][name]["median"] for name in ("exact", "flat"))
        for point in one.get("curve", ()) if one["bytes_per_row"] <= AIMS["bytes_per_row"] else ():
            recall = {way: worst(values) for way, values in point.get("recall", {}).items()}
            if point.get("method") == "ann" and all(recall[way] >= AIMS[way] for way in recall):
                seconds = point["seconds"]["median"]
                where = f"{figures['live']:,} rows: `{one['factory']}` at {one['dim']}, margin {point['margin']}"
                values = ", ".join(f"{value:.3f} of {way}" for way, value in recall.items())
                yield f"- {where}: {values}; {exact / seconds:.1f} times as fast as exact, {flat / seconds:.1f} as Flat"
                break


def _aim_line(what: str, figure: float, met: bool, aim: str) -> str:
    return f"- {'met' if met else 'NOT met'}: {what}: {figure:,.4g} (aim: {aim})"


def _store_table(name: str, figures: Figures) -> str:
    body = [_exact_line(figures)]
    body += [
        _flat_line(key.split("@")[1], value, figures) for key, value in figures.items() if key.startswith("alone@")
    ]
    body += [_index_line(one) for one in configurations(figures)]
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures["queries"].items())
    rows = f"{figures['live']:,} rows, K = {figures['K']:,}, {figures['real']:,} of them real"
    synthetic = "" if name == "real" else f", {max(0, figures['live'] - figures['real']):,} synthetic"
    note = (
        f"{rows}{synthetic}. Queries: {kinds}. Recall is that of the worst kind of query; times are of one query for "
        "10 rows on one thread, files in the cache: the median (tenth to ninetieth percentile). Rows read: by half of "
        "the held-out queries, at most, for proponents / opponents."
    )
    head = ["index", "fold", "rows read", "recall@10 / @100", "opponents", "stated", "one query, ms"]
    head += ["of it search + re-rank", "× exact", "× Flat", "100 queries, s", "bytes a row", "build, s"]
    left = [f"{key[11:]}: {', '.join(v)}" for key, v in figures.items() if key.startswith("no room at") and v]
    skipped = f"\n\nNot measured for want of memory: {'; '.join(left)}." if left else ""
    return f"## {figures['live']:,} rows\n\n{note}\n\n{markdown(head, body)}{skipped}"


def _exact_line(figures: Figures) -> list[Any]:
    one = next(iter(configurations(figures)), None)
    batch = _median(figures["exact"]["batch_seconds"]["1"])
    time = _ms(one["latency"]["1"]["exact"]) if one else ""
    return ["exact scan", figures["K"], "", "1 / 1", "1 / 1", "", time, "", 1, "", batch, "(none)", ""]


def _flat_line(dim: str, alone: Figures, figures: Figures) -> list[Any]:
    latency = next((one["latency"]["1"] for one in configurations(figures) if str(one["dim"]) == dim), None)
    recall = [_recalls(alone["recall"][way]) if "recall" in alone else "" for way in WAYS]
    label = "FAISS Flat alone" + (f", {alone['rows']:,} rows × {alone['scale']:.2f}" if alone["scale"] > 1 else "")
    ratio = f"{latency['exact']['median'] / latency['flat']['median']:.1f}" if latency else ""
    line = [label, dim, "", *recall, "", _ms(latency["flat"]) if latency else "", "", ratio, 1]
    return [*line, _median(alone["batch_seconds"]["1"]), alone["bytes_per_row"], ""]


def _index_line(one: Figures) -> list[Any]:
    latency, stated = one["latency"]["1"], [one["stated"][way] for way in WAYS]
    read = " / ".join("exact" if not c or c["margin"] is None else f"{c['rows_read'][0]:.0f}" for c in stated)
    promised = " / ".join(f"{c['recall_at_10']:.3f}" if c else "" for c in stated)
    recall = [_recalls(one["recall"][way]) for way in WAYS]
    parts = " + ".join(f"{1e3 * latency[part]['median']:.1f}" for part in ("search", "rerank") if part in latency)
    times = [f"{latency['times'][name]:.1f}" for name in ("exact", "flat")]
    line = [f"`{one['factory']}`", one["dim"], read, *recall, promised, _ms(latency["proponents"]), parts, *times]
    return [*line, _median(one["batch_seconds"]["1"]), round(one["bytes_per_row"]), f"{one['build_seconds']:.0f}"]


def _likeness(figures: Figures) -> str:
    if "likeness" not in figures:
        return ""
    both = [figures["likeness"][kind] for kind in ("real", "synthetic")]
    body = [["effective rank", *[f"{one['effective rank of those drawn']:.0f}" for one in both]]]
    for name in both[0]["quantiles"]:
        body.append([name, *[" ".join(f"{v:.3f}" for v in one["quantiles"][name].values()) for one in both]])
    note = (
        f"Real and synthetic rows among themselves, {both[0]['rows']:,} of each: quantiles .05, .25, .5, .75 and .95."
    )
    return f"{note}\n\n{markdown(['', 'real', 'synthetic'], body)}"


def _table_1(tracin: Figures) -> str:
    sizes = {"LoRA": tracin["gradient_size"], "full-parameter": tracin["all_parameters"]}
    head = ["Method", *[f"{name}: {what}" for name in sizes for what in ("Length", "Size (# times)")]]
    whole = [cell for n in sizes.values() for cell in (f"{n:,}", f"{_size(4 * n)} (1x)")]
    forms = [(f"RapidGrad (K=2^{p})", 2**p, 2 * 2**p) for p in (16, 20, 24)]
    forms += [(f"RapidGrad (K=2^{p}), a fold", 2**p, 2 * 2**p) for p in (12, 10)]
    forms += [(f"in memory: 1 bit of a fold to 2^{DIM.bit_length() - 1}", DIM, DIM // 8 + 16)]
    body = [["Full Grad. (full-precise)", *whole]]
    for label, length, size in forms:
        cells = ((f"{length:,}", f"{_size(size)} ({4 * n / size:,.1f}x)") for n in sizes.values())
        body.append([label, *[cell for pair in cells for cell in pair]])
    return f"## Table 1: length and memory of the gradient vector of each training example\n\n{markdown(head, body)}"


def _table_2(tracin: Figures, stores: dict[str, Figures]) -> str:
    """Return the paper's Table 2, for two threads."""
    n, hours, spent = tracin["rows"], 3600, tracin["threads"]["2"]
    gradient = spent["query_gradient_seconds"]["whole answer"]["median"]
    body = [["TracIn", "-", f"{n * spent['seconds_per_row']['tracin'] / hours:.3f}"]]
    real = stores["real"].get(default_of(stores["real"])) if "real" in stores else None
    for label, way in (("exact scan", "exact"), ("vector index", "proponents")) if real else ():
        seconds = gradient + real["latency"]["2"][way]["median"]
        cached = f"{n * spent['seconds_per_row']['caching'] / hours:.3f}"
        body.append([f"ours (K={tracin['K']:,}), {label}", cached, f"{seconds / hours:.6f}"])
    part = f"Caching and TracIn were measured on {tracin['rows_measured']} rows and multiplied up."
    note = f"Hours, one query on {n:,} rows, LoRA, two threads. {part}"
    return f"## Table 2: time of influence estimation\n\n{note}\n\n{markdown(['Method', 'Caching', 'Retrieval'], body)}"


def _whole(tracin: Figures, stores: dict[str, Figures]) -> str:
    frame = against_tracin(tracin, stores)
    body = [
        [f"{row.rows:,}", f"{row.K:,}", row.threads, f"{row.gradient:.3f}", f"{1e3 * row.search:.1f}"]
        + [f"{row.tracin:,.0f}", f"{row.ratio:,.0f}"]
        for row in frame.itertuples()
    ]
    head = ["rows", "K", "threads", "query gradient, s", "search + re-rank, ms", "TracIn, s (multiplied up)", "times"]
    nearest = frame.loc[frame.groupby("threads").distance.idxmin()]  # a search costs what it cost at the nearest size
    beyond = ", ".join(
        f"{row.passed_at:,.0f} rows on {row.threads} thread{'s' * (row.threads != '1')}" for row in nearest.itertuples()
    )
    note = f"{AIMS['tracin']:,} times is passed from {beyond}." if beyond else ""
    return f"## A whole retrieval and TracIn\n\n{markdown(head, body)}\n\n{note}"


def _smallest(rows: Figures) -> str:
    body = []
    for one in sorted(rows["forms"], key=lambda one: -one["bytes_per_row"]):
        recall = [f"{min(one['recall_at_10'][way].values()):.3f}" for way in WAYS]
        agreement = [f"{one[name]:.3f}" for name in ("spearman", "true_best_10", "true_worst_10")]
        body.append([f"{one['K']:,}", one["form"], f"{one['bytes_per_row']:,}", *recall, *agreement])
    head = ["K", "kept as", "bytes a row", "recall@10 of full rows", "opponents", "rank correlation with the truth"]
    head += ["of its best 10", "of its worst 10"]
    note = (
        f"{rows['rows']:,} real rows, {rows['queries']} queries (recall is that of the worst kind). The truth is the "
        f"uncompressed influence of {rows['true_rows']} rows on {rows['true_queries']} queries, half of them drawn at "
        "random and half among the best and worst."
    )
    return f"## The smallest row\n\n{note}\n\n{markdown(head, body)}"


def _growth(stores: dict[str, Figures]) -> str:
    body = [
        [f"{K:,}", " ".join(f"{n:,}: {1e3 * s:.1f} ms;" for n, s in points).rstrip(";"), f"{b:.2f}"]
        for K, (_, b, points) in fits(stores).items()
    ]
    head = ["K", f"`{DEFAULT_FACTORY}`, one query on one thread", "exponent"]
    return f"## Cost against the number of rows\n\n{markdown(head, body)}"


def _recalls(recall: Figures) -> str:
    return " / ".join(f"{worst(recall[k]):.3f}" for k in ("10", "100"))


def _ms(spread: Figures) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['p10']:.1f} to {1e3 * spread['p90']:.1f})"


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f}"


def _size(count: float) -> str:
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def plot_recall(figures: Figures, path: Path) -> None:
    """Draw recall against speed: a panel a direction, a line a configuration, its points the margins."""
    plot, panels = pyplot().subplots(1, 2, figsize=(13, 4.8), sharey=True, layout="constrained")
    for panel, way in zip(panels, WAYS, strict=True):
        for label, one in figures.items():
            if "@" not in label or "curve" not in one:
                continue
            exact = one["latency"]["1"]["exact"]["median"]
            curve = [point for point in one["curve"] if point.get("method") == "ann"]
            speed = [exact / point["seconds"]["median"] for point in curve]
            recall = [min(point["recall"][way].values()) for point in curve]
            marker = MARKERS.get(one["factory"], "x" if "Flat" in one["factory"] else "+")
            colour = COLOURS.get(one["dim"], "black")
            panel.plot(speed, recall, marker=marker, color=colour, markersize=4, linewidth=0.8, label=label)
        panel.set(xscale="log", xlabel="times as fast as the exact scan at full K", title=way)
        panel.grid(True, linewidth=0.3)
    panels[0].set_ylabel("recall@10, worst kind of query")
    plot.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    plot.suptitle(f"{figures['live']:,} rows, K = {figures['K']:,}; one query, one thread; margins 0 to .04")
    save_plot(plot, path)


def plot_cost(stores: dict[str, Figures], path: Path) -> None:
    """Draw the latency of the default index, the exact scan and Flat against the number of rows."""
    plot, panel = pyplot().subplots(figsize=(7, 4.8), layout="constrained")
    measured = latencies(stores)
    for K, (a, b, points) in fits(stores).items():
        sizes = [n for n, _ in points]
        (line,) = panel.plot(sizes, [1e3 * s for _, s in points], "o", label=f"HR,RaBitQ, K = {K:,}: N^{b:.2f}")
        colour = line.get_color()
        panel.plot(sizes, [1e3 * a * n**b for n in sizes], "-", linewidth=0.8, color=colour)
        for name, marker in (("exact", "^"), ("flat", "s")):
            known = sorted((n, latency[name]["median"]) for n, latency in measured[K])
            label = f"{'exact scan' if name == 'exact' else 'FAISS Flat, same fold'}, K = {K:,}"
            panel.plot(*zip(*[(n, 1e3 * s) for n, s in known], strict=True), marker + ":", color=colour, label=label)
    panel.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms, one query on one thread")
    panel.grid(True, which="both", linewidth=0.3)
    panel.legend(fontsize=7)
    save_plot(plot, path)


# --- caching, and rows for tokens ---

CACHING = {
    "floor": "(a) bare forward and backward pass",
    "ours": "(b) ours, to shards on disk",
    "literal": "(c) the paper's way, scaled by tokens",
}


def render_caching(folder: Path) -> None:
    """Print the tables of caching_*.json and of tokens.json."""
    for name, content in read(folder, "caching_*").items():
        print(caching_table(name, content), end="\n\n")
    if (folder / "tokens.json").exists():
        print(tokens_table(read(folder, "tokens")["tokens"]["figures"]))


def caching_table(name: str, content: dict[str, Any]) -> str:
    """Return the table of one caching_*.json: of the methods, of the profile, or of bfloat16 beside float32."""
    figures = content["figures"]
    kind = "all parameters" if figures["full"] else "LoRA"
    where = content["machine"]["gpu"] if figures.get("device") == "cuda" else f"{figures['threads']} threads"
    about = f"`{name}.json`, {content['commit']}, {kind}, {where}"
    if "parts" in figures:
        return f"{about}\n\n{_profile(figures)}"
    if "spearman" in figures:
        return f"{about}\n\n{_dtypes(figures)}"
    weights = figures.get("quantize") or figures["dtype"]
    return f"{about}, |v| = {figures['gradient_size']:,}, {weights}\n\n{_caching_methods(figures)}"


def _caching_methods(figures: Figures) -> str:
    floor, body = figures["ways"]["floor"]["seconds"], []
    for method, measured in figures["ways"].items():
        spent, rows, tokens = measured["seconds"], figures["rows"], figures["padded_tokens"]
        if method == "literal":  # measured on a few rows, one at a time
            rows, tokens = measured["rows"], figures["tokens"]
            spent = [s / measured["tokens"] * tokens for s in spent]
        body.append(_caching_line(CACHING[method], rows, figures["rows"], tokens, spent, floor, measured))
    for peer in figures["peers"]:
        if "error" in peer and "seconds" not in peer:
            body.append([peer["name"], f"did not run: {peer['error'][:200]}", *[""] * 5])
            continue
        n, name = peer["rows"], f"{peer['name']} ({peer['package']} {peer['versions'][peer['package']]})"
        kept = {**peer, "bytes_a_row": peer["written_bytes"] / n if peer["keeps_rows"] else 0}
        body.append(_caching_line(name, n, n, peer["padded_tokens"], peer["seconds"], peer["floor_seconds"], kept))
    head = ["", "rows", "examples/s", "padded tokens/s", "time, of the floor", "peak memory", "bytes a row"]
    return "\n".join([markdown(head, body), *_caching_notes(figures)])


def _caching_line(
    name: str, rows: int, n: int, tokens: int, spent: list[float], floor: list[float], measured: Figures
) -> list[Any]:
    ratios = [s / f for s, f in zip(spent, floor, strict=True)]
    memory = f"{measured['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in measured else "—"
    stored = f"{measured['bytes_a_row']:,.0f}" if measured.get("bytes_a_row") else "—"
    speeds = [_spread([n / s for s in spent]), _spread([tokens / s for s in spent], 0)]
    return [name, rows, *speeds, _spread(ratios), memory, stored]


def _caching_notes(figures: Figures) -> list[str]:
    medians = {method: statistics.median(measured["seconds"]) for method, measured in figures["ways"].items()}
    scaled = medians["literal"] / figures["ways"]["literal"]["tokens"] * figures["tokens"]
    notes, ours = (
        ["", f"Ours is {scaled / medians['ours']:.1f} times as fast as (c)."],
        medians["ours"] / medians["floor"],
    )
    for peer in figures["peers"]:
        if "seconds" in peer:
            theirs = statistics.median(s / f for s, f in zip(peer["seconds"], peer["floor_seconds"], strict=True))
            notes.append(
                f"- {peer['name']}: {peer['computes']}. Ours takes {ours / theirs:.2f} of its time, by floors."
            )
    return notes


def _profile(figures: Figures) -> str:
    body = [
        [
            part,
            f"{s['seconds']:.2f}",
            f"{s['share']:.1%}",
            f"{s['least_seconds']:.2f} s" if "least_seconds" in s else "",
        ]
        for part, s in figures["parts"].items()
    ]
    floor, ours = figures["floor_seconds"], figures["ours_seconds"]
    rows = f"{figures['rows']} rows, {figures['padded_tokens']} padded tokens, |v| = {figures['gradient_size']:,}"
    table = markdown(["part of ours", "seconds", "share", "at the machine's speed"], body)
    return f"{table}\n\n{rows}: the floor {floor:.1f} s, ours {ours:.1f} s ({ours / floor:.2f})."


def _dtypes(figures: Figures) -> str:
    spearman, overlap, spent = figures["spearman"], figures["top10_overlap"], figures["seconds"]
    body = [["Spearman's rank correlation", f"{spearman['median']:.4f}", f"{spearman['lowest']:.4f}"]]
    body += [["overlap of the top 10", f"{overlap['mean']:.3f}", f"{overlap['lowest']:.2f}"]]
    faster = spent["float32"] / spent["bfloat16"]
    rows = f"{figures['queries']} queries, {figures['rows']} rows; CPU capability {figures['capability']}"
    times = f"float32 {spent['float32']:.1f} s, bfloat16 {spent['bfloat16']:.1f} s: {faster:.2f} times as fast"
    table = markdown(["bfloat16 against float32", "median or mean", "lowest of the queries"], body)
    return f"{table}\n\n{rows}. {times}."


def tokens_table(figures: Figures) -> str:
    """Return the tables of tokens.json: rows for tokens, heat-maps, and a build beside its estimate."""
    parts = []
    for part, label, base in (("caching", "rows for tokens", "floor"), ("heatmaps", "heat-maps", "forward")):
        spent, tokens = figures[part]["seconds"], figures[part]["tokens"]
        medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
        body = [
            [name, _spread(spent[name], 1), f"{tokens / median:.2f}", f"{median / medians[base]:.2f}"]
            for name, median in medians.items()
        ]
        parts.append(markdown([label, "processor seconds (lowest–highest)", "tokens/s", f"of the {base}"], body))
    build = figures["build"]
    seconds = f"{build['took_seconds']:.0f} s, --dry-run said {build['said_seconds']:.0f} s"
    size = f"{build['took_bytes']:,} bytes, said {build['said_bytes']:,}"
    return "\n\n".join([*parts, f"Build of {build['rows']} tokens: {seconds}; {size}."])


def _spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# --- the linear datamodeling score ---


def lds_page(figures: Figures) -> str:
    """Return the LDS of every method, the best first."""
    agreement = [
        f"- {name}: Spearman {found['spearman']:.3f} ({_ends(found['interval'])}), Pearson {found['pearson']:.3f}, over"
        f" {found['subsets']} subsets. Standard deviation of a query's loss over the subsets"
        f" {found['standard_deviations'][0]:.3f} and {found['standard_deviations'][1]:.3f}, of the difference of the"
        f" two {found['of_the_difference']:.3f}."
        for name, found in figures["agreement"].items()
    ]
    schedule = figures["setting"]["schedule"]
    parts = [
        f"# LDS over {figures['subsets']} retrainings\n",
        f"{figures['setting']['choice']['rows']} rows, {figures['queries']} queries; {schedule['epochs']} epochs at"
        f" {schedule['learning_rate']:g}, LoRA of rank {schedule['rank']} on the last {schedule['layers']} layers.\n",
        "The losses of the same subsets trained otherwise agree with the bank's:\n",
        "\n".join(agreement) + "\n",
        *_scored(figures),
    ]
    for dtype, other in figures.get("other_models", {}).items():
        parts += [f"Of a model that was trained on all rows in {dtype}, by the same retrainings:\n", *_scored(other)]
    return "\n".join(parts)


def _scored(figures: Figures) -> list[str]:
    body = [
        [title(row["method"]), f"{row['lds']:.3f}", _ends(row["interval"]), _ends(row.get("less_estimate"))]
        for row in sorted(figures["methods"], key=lambda row: -row["lds"])
    ]
    head = ["method", "LDS", "95 %", "less `estimate`'s, 95 %"]
    return [markdown(head, body) + "\n", _stages(figures)]


def _stages(figures: Figures) -> str:
    """Return the table of what each stage took."""
    return markdown(["stage", "seconds"], [[name, f"{spent:.0f}"] for name, spent in figures["seconds"].items()]) + "\n"


def _ends(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "—"


# --- fact tracing ---

TRACED = {
    "perfect": "(the right rows first)",
    "random": "random",
    "bm25": "BM25",
    "embedding": "embeddings",
    "repsim/half": "RepSim, half the depth",
    "repsim/last": "RepSim, last layer",
    "rept/three quarters": "RepT, three quarters of the depth",
    "rept/last": "RepT, last layer",
    "trak": "TRAK-like, two-sided rows of 1,024",
    "full/none/none": "gradient dot product, uncompressed",
    "R=none/none/none": "gradient dot product, two-sided",
    "R=none/none/unit": "+ unit",
    "R=none/estimate/unit": "+ second moment (64 examples)",
    "R=none/adam/unit": "the same with AdamW's own",
    "R=train/none/unit": "+ R of the rows, without second moment",
    "R=train/estimate/unit": "+ R of the rows",
    "R=train/estimate/unit/0.1": "the same, damping .1",
    "R=mixed/none/unit": "+ mixed R, without second moment",
    "R=mixed/estimate/unit": "+ mixed R (TrackStar)",
    "R=mixed/estimate/unit/0.1": "the same, damping .1",
    "R=mixed/adam/unit": "the same with AdamW's own second moment",
    "full/none/layer": "layer-wise (RapidIn's recipe), uncompressed",
    "K=65536/shuffles=20/none/layer/int8": "the same, RapidGrad",
    "full/estimate/unit": "`estimate`, `unit`, uncompressed",
    "K=65536/shuffles=20/estimate/unit/int8": "the same, RapidGrad",
    "full/kronecker/unit": "`kronecker`, `unit`, uncompressed",
    "K=65536/shuffles=20/kronecker/unit/int8": "the same, RapidGrad",
    "full/kronecker-half/unit": "the same of 16 examples, uncompressed",
    "full/kronecker-mixed/unit": "the same of 16 examples and 16 of the task's questions, uncompressed",
    "limit": "empirical Fisher's inverse, uncompressed",
    "full/ekfac/none": "influence function, EK-FAC, uncompressed",
    "full/ekfac/unit": "the same / length of the gradient",
    "full/ekfac-root/unit": "EK-FAC's root on either side, `unit`",
}
"""The methods of facts.md in its order: TrackStar's ablations one after the other."""


def facts_page(figures: Figures) -> str:
    """Return the table of fact tracing, and what it was measured on."""
    found = {row["method"]: row for row in figures["methods"]}
    others = [name for name in found if name not in TRACED and not name.startswith("K=")]
    names = [name for name in TRACED if name in found] + others
    metrics = [name for name in figures["methods"][0] if name not in ("method", "bytes", "less_estimate")]
    head = [
        "method",
        *(name.replace("_", " ").replace("mrr", "MRR").replace("recall", "recall@10") for name in metrics),
    ]
    body = [[_traced(name), *(_cell(found[name][m]) for m in metrics), f"{found[name]['bytes']:,}"] for name in names]
    right, steps = figures["right"], ""
    if rate := figures["last_rate"]:
        rights = ["—" if value is None else f"{value:.2f}" for value in figures["tail_patch_of_right_rows"].values()]
        steps = (
            f" Tail-patch in percentage points, at the run's last learning rate ({rate:g}) times .3, 1 and 3; of the"
            f" right rows themselves {', '.join(rights)}."
        )
    parts = [
        f"# Fact tracing: {figures['queries']} queries, {figures['rows']} rows\n",
        f"{figures['facts']} facts; right answers to the third paraphrase: base {right['base']:.0%}, fine-tuned"
        f" {right['tuned']:.0%}.{steps} 95 % intervals over the queries.\n",
        markdown([*head, "bytes a row"], body) + "\n",
    ]
    if costs := figures["cpu_seconds_a_row"]:
        body = [[name, f"{spent:.4f}"] for name, spent in costs.items()]
        parts.append(markdown(["what is made of a row", "CPU seconds a row"], body) + "\n")
    parts.append(_stages(figures))
    return "\n".join(parts)


def render_facts(folder: Path) -> None:
    """Write the page of every file of fact tracing, and facts_seeds.md of those that differ in their seed alone."""
    render_page("facts*", facts_page, folder)
    seeds = [content["figures"] for content in read(folder, "facts*").values() if content["figures"]["last_rate"]]
    if len(seeds) > 1:
        write(folder / "facts_seeds.md", facts_seeds_page(sorted(seeds, key=lambda figures: figures["seed"])))


def facts_seeds_page(seeds: list[Figures]) -> str:
    """Return the table of the methods that were measured for all seeds."""
    found = [{row["method"]: row for row in figures["methods"]} for figures in seeds]
    common = [name for name in found[0] if all(name in one for one in found) and not name.startswith("K=")]
    names = [name for name in TRACED if all(name in one for one in found)]
    metrics = {"mrr": "MRR", "recall": "recall@10", "tail_patch_1": "tail-patch"}
    body = []
    for name in (*names, *(name for name in common if name not in TRACED)):
        values = [[one[name][metric]["mean"] for one in found] for metric in metrics]
        body.append([_traced(name), *("—" if None in some else _mean_and_range(some, 3, "") for some in values)])
    parts = [
        f"# Fact tracing: seeds {', '.join(str(figures['seed']) for figures in seeds)}\n",
        "Each seed draws facts, rows, the order of training and projections. The mean over the seeds, the lowest and"
        " the highest; tail-patch in percentage points, at the run's last learning rate.\n",
        markdown(["method", *metrics.values()], body) + "\n",
    ]
    return "\n".join(parts)


def _traced(name: str) -> str:
    if name in TRACED:
        return TRACED[name]
    return f"`{name}`" if name.startswith("R=") else title(name)


def _cell(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "—"
    return f"{value['mean']:.3f} ({value['interval'][0]:.3f} to {value['interval'][1]:.3f})"


# --- verification ---

TRIED = {
    "kronecker": "**`kronecker`**",
    "estimate": "**`estimate`**",
    "rapidin": "the paper's recipe (`--recipe rapidin`)",
    "bm25": "BM25 for the word",
    "bm25-text": "BM25 for question and answer",
    "embedding": "embeddings of question and answer",
    "random": "random",
}
"""The methods of verify.md in its order."""


def verify_page(figures: Figures) -> str:
    """Return the tables of steps on the methods' rows by the word that is asked about."""
    parts = [
        f"# Steps on the first {figures['top']} of {figures['rows']} rows by each method\n",
        "Change of the word's log-probability in nats: the mean over the questions, the lowest and the highest.\n",
    ]
    for word in dict.fromkeys(one["question"]["word"] for one in figures["questions"]):
        asked = [one for one in figures["questions"] if one["question"]["word"] == word]
        parts += [f"## “{word}”: {len(asked)} questions\n", _steps_table(asked, figures["top"]) + "\n"]
    return "\n".join(parts)


def _steps_table(asked: list[Figures], top: int) -> str:
    """Return the change of the word's log-probability: mean over the questions, and the lowest and highest of them."""
    optimizers = [name for name in asked[0]["methods"]["random"] if name not in ("rows", "planted")]
    ways = [(name, way) for name in optimizers for way in ("alone", "together")]
    head = [f"{name}, {'one row' if way == 'alone' else f'all {top}'}" for name, way in ways]
    body = []
    for method, title in TRIED.items():
        found = [one["methods"][method] for one in asked if method in one["methods"]]
        if found:
            planted = f"{top * statistics.mean(one['planted'] for one in found):.1f}"
            body.append([title, planted, *(_nats([one[name][way] for one in found]) for name, way in ways)])
    return markdown(["rows by", f"planted of {top}", *head], body)


def _nats(changes: list[list[list[float]]]) -> str:
    return _mean_and_range([statistics.mean(nats for _, nats in groups) for groups in changes], 3)


def _mean_and_range(values: Sequence[float], digits: int, sign: str = "+") -> str:
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def retrained_page(figures: Figures) -> str:
    """Return what the model says after trainings without some rows: a table for each set of questions."""
    parts = [f"# Trainings without {figures['rows']} of {figures['of']} rows\n"]
    for asked in figures["asked"]:
        first, *more = asked["questions"]
        word = first["word"]
        title = f"“{word}”: {1 + len(more)} questions" if more else f"“{first['prompt']}”"
        head = ["taken out", "planted among them", f"“{word}”", "change in nats" if more else "the model's own answer"]
        runs = {_taken_out(name, figures["rows"]): run for name, run in asked["runs"].items()}
        runs = {"nothing": {"planted": "—", "said": asked["before"]}, **runs}
        body = [[name, run["planted"], *_said(run["said"], asked["before"])] for name, run in runs.items()]
        parts += [f"## {title}\n", markdown(head, body) + "\n"]
    return "\n".join(parts)


def _said(said: list[Figures], before: list[Figures]) -> tuple[str, str]:
    """Return a word's probability, and what is said to one question, or how several have changed."""
    chances = [one["probability"] for one in said]
    chance = f"{statistics.mean(chances):.1%}"
    if len(said) == 1:
        return chance, said[0]["answer"]
    nats = [log(now / one["probability"]) for now, one in zip(chances, before, strict=True)]
    return chance, _mean_and_range(nats, 2)


def _taken_out(name: str, rows: int) -> str:
    method, _, number = name.partition(" ")
    return f"{rows} at random, draw {number}" if number else f"{rows} by {TRIED[method].replace('*', '')}"


def influcoder_page(figures: Figures) -> str:
    """Return how encoders, and rankings beside them, agree with the gradients'."""
    ranks = figures["ranks"]
    sizes = next(iter(ranks.values()))
    names = dict.fromkeys(name for found in ranks.values() for name, one in found.items() if isinstance(one, dict))
    of = {"held_out": sizes["pool"], "candidates": sizes["rows"]}
    first = sizes[next(iter(names))]
    ways = ("per_anchor", "aggregated", *((kind, count) for kind in of for count in first.get(kind, ())))
    body = [[name, *(_by_seed(ranks, name, way) for way in ways)] for name in names]
    head = [
        "ranking",
        "per anchor",
        "all pairs",
        *(f"best ten of {of[kind]:,} among {count}" for kind, count in ways[2:]),
    ]
    parts = [
        f"# {figures['examples']:,} examples; {sizes['anchors']} held-out anchors × {sizes['pool']} examples; "
        f"seeds {', '.join(ranks)}\n",
        markdown(head, body) + "\n",
    ]
    for index, found in figures["carry_over"].items():
        measured = {name: one for name, one in found.items() if isinstance(one, dict)}
        rows = [[name, *(f"{one[way]:.3f}" for way in ways[:2])] for name, one in measured.items()]
        title = f"## {index}: {found['anchors']} anchors × {found['pool']} examples\n"
        parts += [title, markdown(head[:3], rows) + "\n"]
    return "\n".join(parts)


def _by_seed(ranks: Figures, name: str, way: str | tuple[str, str]) -> str:
    found = [one[name] for one in ranks.values() if name in one]
    values = [one[way] if isinstance(way, str) else one.get(way[0], {}).get(way[1]) for one in found]
    return " ".join("—" if value is None else f"{value:.3f}" for value in values)


def render_page(pattern: str, page: Callable[[Figures], str], folder: Path) -> None:
    """Write NAME.md, which `page` returns, for every NAME.json that fits the pattern."""
    for name, content in read(folder, pattern).items():
        write(folder / f"{name}.md", page(content["figures"]))


PARTS = {
    "evidence": render_evidence,
    "retrieval": render_retrieval,
    "caching": render_caching,
    "lds": partial(render_page, "lds", lds_page),
    "facts": render_facts,
    "verify": partial(render_page, "verify", verify_page),
    "influcoder": partial(render_page, "influcoder", influcoder_page),
    "retrained": partial(render_page, "verify_retrained", retrained_page),
}

if __name__ == "__main__":
    main()
