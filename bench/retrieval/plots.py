"""Recall against speed-up, and cost against the number of rows, as SVG."""

from pathlib import Path
from typing import Any

from bench.common import RESULTS

MARKERS = {"HR,RaBitQ": "o", "RaBitQ": "s", "SQ8": "^", "Flat": "D", "HNSW32": "v"}
COLOURS = {4096: "tab:blue", 8192: "tab:orange", 16_384: "tab:green"}
"""By fold."""


def plot(stores: dict[str, Any], fitted: dict[int, Any], latencies: dict[int, Any]) -> list[Path]:
    """Write them beside the figures; needs matplotlib.

    `fitted` is {K: (a, b, [(rows, seconds)])} of seconds = a · rows^b, `latencies` {K: [(rows, latency figures)]}.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rapidindex"  # the same figures draw the same file
    paths = [_recall(name, figures) for name, figures in stores.items()]
    return [*paths, _cost(fitted, latencies)] if fitted else paths


def _recall(name: str, figures: dict[str, Any]) -> Path:
    """A panel a direction; a line a configuration, its points the margins."""
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True, layout="constrained")
    for panel, way in zip(panels, ("proponents", "opponents"), strict=True):
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
    drawing.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    drawing.suptitle(f"{figures['live']:,} rows, K = {figures['K']:,}; one query, one thread; margins 0 to .04")
    return _saved(drawing, f"retrieval_recall_{name}")


def _cost(fitted: dict[int, Any], latencies: dict[int, Any]) -> Path:
    import matplotlib.pyplot as plt

    drawing, panel = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for K, (a, b, points) in fitted.items():
        sizes = [n for n, _ in points]
        (line,) = panel.plot(sizes, [1e3 * s for _, s in points], "o", label=f"HR,RaBitQ, K = {K:,}: N^{b:.2f}")
        panel.plot(sizes, [1e3 * a * n**b for n in sizes], "-", linewidth=0.8, color=line.get_color())
        for name, marker in (("exact", "^"), ("flat", "s")):
            known = sorted((n, latency[name]["median"]) for n, latency in latencies[K])
            label = f"{'exact scan' if name == 'exact' else 'FAISS Flat, same fold'}, K = {K:,}"
            colour = line.get_color()
            panel.plot(*zip(*[(n, 1e3 * s) for n, s in known], strict=True), marker + ":", color=colour, label=label)
    panel.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms, one query on one thread")
    panel.grid(True, which="both", linewidth=0.3)
    panel.legend(fontsize=7)
    return _saved(drawing, "retrieval_cost")


def _saved(drawing: Any, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = RESULTS / f"{name}.svg"
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)
    return path
