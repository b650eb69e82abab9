"""The tables of `bench/caching.py`, in Markdown, from the saved JSON alone."""

import json
import statistics
from pathlib import Path
from typing import Any

from bench.common import RESULTS

HEADS = """| | rows | examples/s | padded tokens/s | time, of the floor | peak memory | bytes a row |
|---|---|---|---|---|---|---|"""
NAMES = {
    "floor": "(a) bare forward and backward pass",
    "ours": "(b) ours, to shards on disk",
    "literal": "(c) the paper's way, scaled by tokens",
}


def render(paths: list[Path] | None = None) -> str:
    """The tables of these result files, or of all there are."""
    return "\n\n".join(_table(path) for path in paths or sorted(RESULTS.glob("caching_*.json")))


def _table(path: Path) -> str:
    saved = json.loads(path.read_text())
    figures = saved["figures"]
    kind = "all parameters" if figures["full"] else "LoRA"
    told = f"`{path.name}`, {saved['commit']}, {kind}, {figures['threads']} threads"
    if "parts" in figures:
        return f"{told}\n\n{_profile(figures)}"
    if "spearman" in figures:
        return f"{told}\n\n{_dtypes(figures)}"
    return f"{told}, |v| = {figures['gradient_size']:,}, {figures['dtype']}\n\n{_ways(figures)}"


def _ways(figures: dict[str, Any]) -> str:
    floor, lines = figures["ways"]["floor"]["seconds"], [HEADS]
    for way, found in figures["ways"].items():
        rows, spent = figures["rows"], found["seconds"]
        tokens = figures["padded_tokens"]
        if way == "literal":
            rows = found["rows"]
            spent = [s / found["tokens"] * figures["tokens"] for s in spent]
            tokens = figures["tokens"]
        lines.append(_line(NAMES[way], rows, figures["rows"], tokens, spent, floor, found))
    for peer in figures["peers"]:
        if "error" in peer and "seconds" not in peer:
            lines.append(f"| {peer['name']} | did not run: {peer['error'][:200]} | | | | | |")
            continue
        n, spent, beside = peer["rows"], peer["seconds"], peer["floor_seconds"]
        kept = {**peer, "bytes_a_row": peer["written_bytes"] / n if peer["keeps_rows"] else 0}
        lines.append(_line(_peer_name(peer), n, n, peer["padded_tokens"], spent, beside, kept))
    return "\n".join(lines + _notes(figures))


def _line(name: str, rows: int, n: int, tokens: int, spent: list[float], floor: list[float], found: dict) -> str:
    ratios = [s / f for s, f in zip(spent, floor, strict=True)]
    memory = f"{found['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in found else "—"
    stored = f"{found['bytes_a_row']:,.0f}" if found.get("bytes_a_row") else "—"
    speeds = _spread([n / s for s in spent]), _spread([tokens / s for s in spent], 0)
    return f"| {name} | {rows} | {speeds[0]} | {speeds[1]} | {_spread(ratios)} | {memory} | {stored} |"


def _peer_name(peer: dict[str, Any]) -> str:
    return f"{peer['name']} ({peer['package']} {peer['versions'][peer['package']]})"


def _notes(figures: dict[str, Any]) -> list[str]:
    ways = {way: statistics.median(found["seconds"]) for way, found in figures["ways"].items()}
    scaled = ways["literal"] / figures["ways"]["literal"]["tokens"] * figures["tokens"]
    notes = ["", f"Ours is {scaled / ways['ours']:.1f} times as fast as (c)."]
    ours = ways["ours"] / ways["floor"]
    for peer in figures["peers"]:
        if "seconds" in peer:
            theirs = statistics.median(s / f for s, f in zip(peer["seconds"], peer["floor_seconds"], strict=True))
            notes.append(
                f"- {peer['name']}: {peer['computes']}. Ours takes {ours / theirs:.2f} of its time, by floors."
            )
    return notes


def _profile(figures: dict[str, Any]) -> str:
    lines = ["| part of ours | seconds | share | at the machine's speed |", "|---|---|---|---|"]
    for part, found in figures["parts"].items():
        least = f"{found['least_seconds']:.2f} s" if "least_seconds" in found else ""
        lines.append(f"| {part} | {found['seconds']:.2f} | {found['share']:.1%} | {least} |")
    floor, ours = figures["floor_seconds"], figures["ours_seconds"]
    told = f"{figures['rows']} rows, {figures['padded_tokens']} padded tokens, |v| = {figures['gradient_size']:,}"
    return "\n".join([*lines, "", f"{told}: the floor {floor:.1f} s, ours {ours:.1f} s ({ours / floor:.2f})."])


def _dtypes(figures: dict[str, Any]) -> str:
    spearman, overlap, spent = figures["spearman"], figures["top10_overlap"], figures["seconds"]
    lines = ["| bfloat16 against float32 | median or mean | lowest of the queries |", "|---|---|---|"]
    lines.append(f"| Spearman's rank correlation | {spearman['median']:.4f} | {spearman['lowest']:.4f} |")
    lines.append(f"| overlap of the top 10 | {overlap['mean']:.3f} | {overlap['lowest']:.2f} |")
    faster = spent["float32"] / spent["bfloat16"]
    told = f"{figures['queries']} queries, {figures['rows']} rows; CPU capability {figures['capability']}"
    times = f"float32 {spent['float32']:.1f} s, bfloat16 {spent['bfloat16']:.1f} s: {faster:.2f} times as fast"
    return "\n".join([*lines, "", f"{told}. {times}."])


def _spread(values: list[float], digits: int = 2) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
