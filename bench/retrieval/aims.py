"""Which aims are met, drawn from bench/results/retrieval*.json alone."""

from collections.abc import Iterator

from bench.retrieval.figures import AIMS, LARGE, Figures, configurations, default, defaults, fits, ratios, worst


def aims(stores: dict[str, Figures], tracin: Figures | None) -> Iterator[str]:
    for figures in stores.values():
        for one in defaults(figures):
            if one["live"] >= LARGE:
                yield from _of_one(one, f"{one['live']:,} rows, K = {figures['K']:,}, `{default(figures)}`")
        if figures["live"] >= LARGE:
            yield from _reachable(figures)
    for K, (_, b, _) in fits(stores).items():
        yield _aim(f"K = {K:,}: exponent of latency", b, b < 1, "below 1")
    for n, K, threads, *_, ratio in ratios(tracin, stores) if tracin else ():
        said = f"{n:,} rows, K = {K:,}, {threads} threads: a whole retrieval, times as fast as TracIn"
        yield _aim(said, ratio, ratio > AIMS["tracin"], f"above {AIMS['tracin']:,}")


def _of_one(one: Figures, where: str) -> Iterator[str]:
    for way in ("proponents", "opponents"):
        found = worst(one["recall"][way]["10"])
        yield _aim(f"{where}: recall@10 of {way}", found, found >= AIMS[way], f"at least {AIMS[way]}")
        if one["recall"][way]["10"]["method"] == "exact":
            yield f"- {where}: {way} are searched exactly: none reached the target, or too many candidates"
    for threads, latency in one["latency"].items():
        for name in ("exact", "flat"):
            times, said = latency["times"][name], f"{where}, {threads} threads: times as fast as {name}"
            yield _aim(said, times, times >= AIMS[name], f"at least {AIMS[name]}")
    size = one["bytes_per_row"]
    yield _aim(f"{where}: bytes of memory a row", size, size <= AIMS["bytes_per_row"], "at most 600")


def _reachable(figures: Figures) -> Iterator[str]:
    """What each index small enough does at the least margin measured that finds enough, chosen by it or not."""
    for one in configurations(figures):
        exact, flat = (one["latency"]["1"][name]["median"] for name in ("exact", "flat"))
        for point in one.get("curve", ()) if one["bytes_per_row"] <= AIMS["bytes_per_row"] else ():
            found = {way: worst(recall) for way, recall in point.get("recall", {}).items()}
            if point.get("method") == "ann" and all(found[way] >= AIMS[way] for way in found):
                seconds = point["seconds"]["median"]
                where = f"{figures['live']:,} rows: `{one['factory']}` at {one['dim']}, margin {point['margin']}"
                recall = ", ".join(f"{value:.3f} of {way}" for way, value in found.items())
                yield f"- {where}: {recall}; {exact / seconds:.1f} times as fast as exact, {flat / seconds:.1f} as Flat"
                break


def _aim(what: str, found: float, met: bool, aim: str) -> str:
    return f"- {'met' if met else 'NOT met'}: {what}: {found:,.4g} (aim: {aim})"
