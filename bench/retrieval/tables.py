"""Tables and aims, drawn from bench/results/retrieval*.json alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.common import RESULTS
from bench.retrieval.aims import aims
from bench.retrieval.figures import (
    AIMS,
    DEFAULT_FACTORY,
    DIM,
    Figures,
    configurations,
    default,
    fits,
    latencies,
    passes,
    ratios,
    read,
    worst,
)
from bench.retrieval.plots import plot

KIB = 1024


def report(say: Callable[[str], None]) -> None:
    """Write retrieval.md and the plots beside the JSON, and say which aims are met."""
    stores, others = read()
    parts = ["# Retrieval"]
    for name, figures in stores.items():
        parts += [_configurations(name, figures), _likeness(figures)]
    if "tracin" in others:
        parts += [_table_1(others["tracin"]), _table_2(others["tracin"], stores), _whole(others["tracin"], stores)]
    if "rows" in others:
        parts.append(_smallest(others["rows"]))
    plots = plot(stores, fits(stores), latencies(stores))
    met = list(aims(stores, others.get("tracin")))
    path = RESULTS / "retrieval.md"
    parts += [_growth(stores), "## Aims", "\n".join(met)]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    for line in met:
        say(line)
    say(f"written to {path} and {', '.join(str(p.name) for p in plots)}")


def table(header: list[str], lines: list[list[Any]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *lines])


def _configurations(name: str, figures: Figures) -> str:
    lines = [_exact_line(figures)]
    for dim, alone in ((k.split("@")[1], v) for k, v in figures.items() if k.startswith("alone@")):
        lines.append(_flat_line(dim, alone, figures))
    lines += [_line(one) for one in configurations(figures)]
    kinds = ", ".join(f"{count} {kind}" for kind, count in figures["queries"].items())
    synthetic = max(0, figures["live"] - figures["real"])
    told = f"{figures['live']:,} rows, K = {figures['K']:,}, {figures['real']:,} of them real"
    note = f"{told}{f', {synthetic:,} synthetic' if name != 'real' else ''}. Queries: {kinds}. " + (
        "Recall is that of the worst kind of query; times are of one query for 10 rows on one thread, files in the "
        "cache: the median (tenth to ninetieth percentile). Rows read: by half of the held-out queries, at most, for "
        "proponents / opponents."
    )
    header = [
        "index",
        "fold",
        "rows read",
        "recall@10 / @100",
        "opponents",
        "stated",
        "one query, ms",
        "of it search + re-rank",
    ]
    header += ["× exact", "× Flat", "100 queries, s", "bytes a row", "build, s"]
    left = [f"{k[11:]}: {', '.join(v)}" for k, v in figures.items() if k.startswith("no room at") and v]
    skipped = f"\n\nNot measured for want of memory: {'; '.join(left)}." if left else ""
    return f"## {figures['live']:,} rows\n\n{note}\n\n{table(header, lines)}{skipped}"


def _exact_line(figures: Figures) -> list[Any]:
    one = next(configurations(figures), None)
    batch = _median(figures["exact"]["batch_seconds"]["1"])
    time = _ms(one["latency"]["1"]["exact"]) if one else ""
    return ["exact scan", figures["K"], "", "1 / 1", "1 / 1", "", time, "", 1, "", batch, "(none)", ""]


def _flat_line(dim: str, alone: Figures, figures: Figures) -> list[Any]:
    same = [one for one in configurations(figures) if str(one["dim"]) == dim]
    times = same[0]["latency"]["1"] if same else None
    recall = [_two(alone["recall"][way]) if "recall" in alone else "" for way in ("proponents", "opponents")]
    label = "FAISS Flat alone" + (f", {alone['rows']:,} rows × {alone['scale']:.2f}" if alone["scale"] > 1 else "")
    ratio = f"{times['exact']['median'] / times['flat']['median']:.1f}" if times else ""
    line = [label, dim, "", *recall, "", _ms(times["flat"]) if times else "", "", ratio, 1]
    return [*line, _median(alone["batch_seconds"]["1"]), alone["bytes_per_row"], ""]


def _line(one: Figures) -> list[Any]:
    stated, latency = one["stated"], one["latency"]["1"]
    both = [stated[way] for way in ("proponents", "opponents")]
    read = " / ".join("exact" if not c or c["margin"] is None else f"{c['rows_read'][0]:.0f}" for c in both)
    said = " / ".join(f"{c['recall_at_10']:.3f}" if c else "" for c in both)
    recall = [_two(one["recall"][way]) for way in ("proponents", "opponents")]
    parts = " + ".join(f"{1e3 * latency[part]['median']:.1f}" for part in ("search", "rerank") if part in latency)
    times = [f"{latency['times'][name]:.1f}" for name in ("exact", "flat")]
    line = [f"`{one['factory']}`", one["dim"], read, *recall, said, _ms(latency["proponents"]), parts, *times]
    return [*line, _median(one["batch_seconds"]["1"]), round(one["bytes_per_row"]), f"{one['build_seconds']:.0f}"]


def _likeness(figures: Figures) -> str:
    if "likeness" not in figures:
        return ""
    real, drawn = figures["likeness"]["real"], figures["likeness"]["synthetic"]
    lines = [["effective rank", *[f"{one['effective rank of those drawn']:.0f}" for one in (real, drawn)]]]
    for name in real["quantiles"]:
        lines.append([name, *[" ".join(f"{v:.3f}" for v in one["quantiles"][name].values()) for one in (real, drawn)]])
    said = f"Real and synthetic rows among themselves, {real['rows']:,} of each: quantiles .05, .25, .5, .75 and .95."
    return f"{said}\n\n{table(['', 'real', 'synthetic'], lines)}"


def _table_1(tracin: Figures) -> str:
    sizes = {"LoRA": tracin["gradient_size"], "full-parameter": tracin["all_parameters"]}
    header = ["Method", *[f"{name}: {what}" for name in sizes for what in ("Length", "Size (# times)")]]
    lines: list[list[Any]] = [
        ["Full Grad. (full-precise)", *[c for n in sizes.values() for c in (f"{n:,}", f"{_size(4 * n)} (1x)")]]
    ]
    for label, length, size in (
        *[(f"RapidGrad (K=2^{p})", 2**p, 2 * 2**p) for p in (16, 20, 24)],
        *[(f"RapidGrad (K=2^{p}), a fold", 2**p, 2 * 2**p) for p in (12, 10)],
        (f"in memory: 1 bit of a fold to 2^{DIM.bit_length() - 1}", DIM, DIM // 8 + 16),
    ):
        lines.append(
            [label, *[c for n in sizes.values() for c in (f"{length:,}", f"{_size(size)} ({4 * n / size:,.1f}x)")]]
        )
    return f"## Table 1: length and memory of the gradient vector of each training example\n\n{table(header, lines)}"


def _table_2(tracin: Figures, stores: dict[str, Figures]) -> str:
    """The paper's form; two threads."""
    n, hours = tracin["rows"], 3600
    spent = tracin["threads"]["2"]
    gradient = spent["query_gradient_seconds"]["whole answer"]["median"]
    lines = [["TracIn", "-", f"{n * spent['seconds_per_row']['tracin'] / hours:.3f}"]]
    real = stores["real"].get(default(stores["real"])) if "real" in stores else None
    if real:
        cached = f"{n * spent['seconds_per_row']['caching'] / hours:.3f}"
        for label, way in (("exact scan", "exact"), ("vector index", "proponents")):
            seconds = gradient + real["latency"]["2"][way]["median"]
            lines.append([f"ours (K={tracin['K']:,}), {label}", cached, f"{seconds / hours:.6f}"])
    part = f"Caching and TracIn were measured on {tracin['rows_measured']} rows and multiplied up."
    note = f"Hours, one query on {n:,} rows, LoRA, two threads. {part}"
    return f"## Table 2: time of influence estimation\n\n{note}\n\n{table(['Method', 'Caching', 'Retrieval'], lines)}"


def _whole(tracin: Figures, stores: dict[str, Figures]) -> str:
    lines = [
        [
            f"{n:,}",
            f"{K:,}",
            threads,
            f"{gradient:.3f}",
            f"{1e3 * search:.1f}",
            f"{tracin_seconds:,.0f}",
            f"{ratio:,.0f}",
        ]
        for n, K, threads, gradient, search, tracin_seconds, ratio in ratios(tracin, stores)
    ]
    header = ["rows", "K", "threads", "query gradient, s", "search + re-rank, ms", "TracIn, s (multiplied up)", "times"]
    beyond = ", ".join(
        f"{n:,.0f} rows on {threads} thread{'s' * (threads != '1')}" for threads, n in passes(tracin, stores)
    )
    said = f"{AIMS['tracin']:,} times is passed from {beyond}." if beyond else ""
    return f"## A whole retrieval and TracIn\n\n{table(header, lines)}\n\n{said}"


def _smallest(rows: Figures) -> str:
    lines = []
    for one in sorted(rows["forms"], key=lambda one: -one["bytes_per_row"]):
        recall = [f"{min(one['recall_at_10'][way].values()):.3f}" for way in ("proponents", "opponents")]
        agreement = [f"{one[name]:.3f}" for name in ("spearman", "true_best_10", "true_worst_10")]
        lines.append([f"{one['K']:,}", one["form"], f"{one['bytes_per_row']:,}", *recall, *agreement])
    header = ["K", "kept as", "bytes a row", "recall@10 of full rows", "opponents", "rank correlation with the truth"]
    header += ["of its best 10", "of its worst 10"]
    note = (
        f"{rows['rows']:,} real rows, {rows['queries']} queries (recall is that of the worst kind). The truth is the "
        f"uncompressed influence of {rows['true_rows']} rows on {rows['true_queries']} queries, half of them drawn at "
        "random and half among the best and worst."
    )
    return f"## The smallest row\n\n{note}\n\n{table(header, lines)}"


def _growth(stores: dict[str, Figures]) -> str:
    lines = [
        [f"{K:,}", " ".join(f"{n:,}: {1e3 * s:.1f} ms;" for n, s in pairs).rstrip(";"), f"{b:.2f}"]
        for K, (_, b, pairs) in fits(stores).items()
    ]
    header = ["K", f"`{DEFAULT_FACTORY}`, one query on one thread", "exponent"]
    return f"## Cost against the number of rows\n\n{table(header, lines)}"


def _two(recall: Figures) -> str:
    return " / ".join(f"{worst(recall[k]):.3f}" for k in ("10", "100"))


def _ms(spread: Figures) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['p10']:.1f} to {1e3 * spread['p90']:.1f})"


def _median(seconds: list[float]) -> str:
    return f"{float(np.median(seconds)):.2f}"


def _size(count: float) -> str:
    for unit, size in (("GB", KIB**3), ("MB", KIB**2), ("KB", KIB)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
