"""What commands did, as titled tables of names and values."""

from typing import Any


def finetune_lines(summary: Any, unusable: int, data: str, model: str, template: str) -> dict[str, dict[str, Any]]:
    """What a fine-tuning run did."""
    lines = {
        "examples": f"{summary.examples:,}, {summary.steps:,} steps",
        "trained": f"{summary.trainable_parameters:,} parameters ({summary.method})",
        "loss": " → ".join(f"{loss:.3f}" for loss in summary.epoch_losses),
        "time": "done before" if summary.already_there else f"{summary.seconds:.0f} s",
    }
    if summary.skipped or unusable:
        lines["left out"] = f"{unusable} unusable rows, {summary.skipped} without room for their response"
    if summary.early_step:
        lines["early"] = f"{summary.output}/early, after step {summary.early_step:,}"
    trained = f"-m {summary.output}" if summary.method == "full" else f"-m {model} -a {summary.output}"
    chosen = "" if template == "alpaca" else f" --template {template!r}"
    lines["next"] = f"rapidindex build {data} {trained}{chosen} -o INDEX"
    return {f"{'Model' if summary.method == 'full' else 'Adapter'} {summary.output}": lines}


def build_lines(summary: Any) -> dict[str, dict[str, Any]]:
    """What a build did."""
    lines = {
        "examples": f"{summary.examples:,} ({summary.computed:,} computed now, in {summary.seconds:.0f} s)",
        "gradient": f"{summary.gradient_size:,} entries in {summary.layers} layers",
    }
    if summary.restored:
        lines["restored"] = f"{summary.restored:,} examples that had been removed"
    if summary.rejected or summary.skipped:
        lines["left out"] = f"{summary.skipped} unusable rows, {summary.rejected} without a finite gradient: see info"
    if summary.truncated:
        first, more = ", ".join(map(str, summary.truncated[:10])), ", …" * (len(summary.truncated) > 10)
        lines["truncated"] = f"{len(summary.truncated)} examples were cut to --max-length (lines {first}{more})"
    if not summary.batched:
        lines["note"] = "this model's gradients had to be computed one example at a time"
    if summary.tokens is not None:
        lines["tokens"] = f"{summary.tokens:,} with a row of their own"
    if summary.without_tokens:
        commands = "; ".join(f"rapidindex add {summary.index} {path}" for path in summary.without_tokens)
        lines["no tokens"] = f"of data that was added: {commands}"
    of_tokens = "" if summary.tokens is None else " --level token"
    lines["next"] = f'rapidindex query {summary.index} "PROMPT" --token WORD{of_tokens}'
    return {f"Index {summary.index}": lines}


def estimate_lines(found: Any) -> dict[str, dict[str, Any]]:
    """What a build will take."""

    def sizes(parts: dict[str, int]) -> dict[str, str]:
        whole = {**parts, "in all": sum(parts.values())}
        unit, name = (2**20, "MiB") if whole["in all"] >= 2**24 else (2**10, "KiB")
        return {part: f"{size / unit:,.1f} {name}" for part, size in whole.items()}

    time = {"for": f"{found.rows:,} rows of {found.examples:,} examples", "workers": found.workers}
    time["tokens"] = f"{found.tokens:,}, padding included"
    time |= {name: f"{seconds:,.1f} s" for name, seconds in {**found.seconds, "in all": found.total_seconds}.items()}
    free = {name: size / 2**20 for name, size in found.free.items()}
    tables = {
        "Time": time,
        f"Disk, of {free['disk']:,.0f} MiB free": sizes(found.disk),
        f"Memory, {free['memory']:,.0f} MiB free": sizes(found.memory),
    }
    if found.device_memory:
        tables[f"GPU memory, {free['device']:,.0f} MiB free"] = sizes(found.device_memory)
    return tables


def info_lines(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an index holds."""
    config = found["config"]
    gradient, sketch = config["gradient"], config["sketch"]
    short = [(level, held["planned"]) for level, held in found["levels"].items() if not held["complete"]]
    state = "; ".join(f"level {level}: {planned:,} planned" for level, planned in short) or "complete"
    state += ": give the build command again" if short else ""
    lines = {
        "examples": f"{found['examples']:,} ({state})",
        "size": f"{found['bytes'] / 2**20:,.1f} MiB",
        "gradient": f"{found['gradient_size']:,} entries in {found['layers']} layers",
        "model": f"{config['model']['path']} ({', '.join(filter(None, (config['dtype'], config['quantize'])))})",
        "adapter": config["adapter"]["path"] or "none: all parameters",
        "data": ", ".join(source["path"] for source in (config["data"], *config.get("added", []))),
        "template": config["encoding"]["template"],
        "recipe": f"second moment {gradient['second_moment']}, normalize {gradient['normalize']}",
        "RapidGrad": f"{sketch['shuffles']} shuffles, seed {sketch['seed']}",
        "created": found["created"],
    }
    if found["removed"]:
        lines["removed"] = f"{found['removed']:,} examples"
    tables = {f"Index {found['path']}": lines}
    for level, held in found["levels"].items():
        what = {
            "rows": f"{held['rows']:,} of {held['examples']:,} examples; shards: {held['shards']}",
            "K": f"{held['K']:,}, kept as {held['row_type']}",
        }
        if level == "token":
            what["tokens"] = f"{config['token']['tokens']}, of {config['tokens_of']} examples"
        searched = {name: value for name, value in (held["index"] or {}).items() if value not in (None, "", 0)}
        if searched.get("factory") == "exact":
            searched = {"factory": "exact"}
        tables[f"Level {level}"] = what | {f"search {name}": value for name, value in searched.items()}
    for title, rows in (("Unusable rows of the data", found["skipped"]), ("No finite gradient", found["rejected"])):
        if rows:
            tables[title] = {f"{row.get('source', '')} line {row['line']}".strip(): row["reason"] for row in rows}
    return tables
