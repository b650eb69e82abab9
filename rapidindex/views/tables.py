"""Describe the outcome of a command as titled tables: {title: {name: value}}, for `terminal.fields` to show.

A value named `next` is the command to type next.
"""

import shlex
from typing import Any

from rapidindex.config import EncodingConfig, ModelConfig

Tables = dict[str, dict[str, Any]]


def finetune_tables(
    summary: Any, unusable: int, data: str, base: ModelConfig, encoding: EncodingConfig, limit: int | None = None
) -> Tables:
    """Return one table about a fine-tuning run, from its FinetuneSummary and the number of unusable rows in `data`."""
    full = summary.method == "full"
    lines = {
        "examples": f"{summary.examples:,}, {summary.steps:,} steps",
        "trained": f"{summary.trainable_parameters:,} parameters ({summary.method})",
        "loss": " → ".join(f"{loss:.3f}" for loss in summary.epoch_losses),
        "time": "done before" if summary.already_there else f"{summary.seconds:.0f} s",
    }
    if summary.skipped or unusable:
        lines["left out"] = f"{unusable} unusable rows, {summary.skipped} without room for their response"
    if summary.refused:
        first = summary.refused[0]
        lines["refused"] = f"{len(summary.refused)} by the chat template; line {first['line']}: {first['reason']}"
    if summary.early_step:
        lines["early"] = f"{summary.output}/early, after step {summary.early_step:,}"
    quantize = base.quantize or ("4bit" if summary.method == "qlora" else None)
    options = {
        "-m": summary.output if full else base.model,
        "-a": None if full else summary.output,
        "--template": _unless(encoding.template, EncodingConfig.template),
        "--max-length": _unless(encoding.max_length, EncodingConfig.max_length),
        "--loss": _unless(encoding.loss, EncodingConfig.loss),
        "--overlap": encoding.overlap,
        "--quantize": quantize,
        "--dtype": _unless(base.dtype, ModelConfig.dtype),
        "--limit": limit,
        "-o": "INDEX",
    }
    given = [str(word) for option in options.items() if option[1] is not None for word in option]
    lines["next"] = shlex.join(["rapidindex", "build", data, *given])
    return {f"{'Model' if full else 'Adapter'} {summary.output}": lines}


def _unless(value: Any, default: Any) -> Any:
    return None if value == default else value


def distill_tables(summary: Any) -> Tables:
    """Return tables about a distillation and how well its encoder ranks, from its DistillSummary."""
    parts = (f"{summary.anchors[name]:,} × {summary.pool[name]:,} {name}" for name in summary.anchors)
    lines = {
        "encoder": f"{summary.encoder}, {summary.width} entries a row",
        "anchors × pool": "; ".join(parts),
        "learnt": f"in {len(summary.epoch_spearman)} epochs" if summary.epoch_spearman else "a head",
        "time": "done before" if summary.already_there else f"{summary.seconds:.0f} s",
    }
    if summary.truncated:
        lines["truncated"] = f"{summary.truncated:,} texts: their prompt or response is longer than the encoder reads"
    lines["next"] = shlex.join(["rapidindex", "build", "DATA", "--encoder", summary.output, "-o", "INDEX2"])
    ranks = {
        name: f"{value:.3f} per anchor, {summary.aggregated[name]:.3f} aggregated"
        for name, value in summary.per_anchor.items()
    }
    return {f"Encoder {summary.output}": lines, "Spearman with the gradients' ranking, held out": ranks}


def specialize_tables(summary: Any) -> Tables:
    """Return one table about a specialized index, from its SpecializeSummary."""
    by = f"where the spectra cross, at component {summary.component:,}" if summary.component else "as given"
    lines = {
        "rows": f"{summary.rows:,} of {summary.examples:,} examples of {summary.source}",
        "λ": f"{summary.weight:.4f}, {by}, for {summary.queries:,} queries",
        "blocks": f"{summary.K // summary.block:,} of {summary.block:,} entries, damping {summary.damping:g}",
        "time": "done before" if summary.already_there else f"{summary.seconds:.0f} s",
    }
    if summary.rows < summary.fewest_rows:
        fits = 2 ** max(4, (summary.rows * summary.block // summary.fewest_rows).bit_length() - 1)
        lines["warning"] = (
            f"blocks of {summary.block:,} want {summary.fewest_rows:,} rows: with fewer R is mostly noise, and its "
            f"root may hurt; {f'try --block {fits}' if fits < summary.block else 'add rows'}"
        )
    lines["next"] = f'rapidindex query {shlex.quote(summary.index)} "PROMPT" --token WORD'
    return {f"Index {summary.index}": lines}


def build_tables(summary: Any, asked: str | None = None) -> Tables:
    """Return one table about a finished build, from its BuildSummary; `asked` is the index to ask, if not this one."""
    lines = {
        "data": summary.data,
        "examples": f"{summary.examples:,} ({summary.computed:,} computed now, in {summary.seconds:.0f} s)",
    }
    if summary.layers:
        lines["gradient"] = f"{summary.gradient_size:,} entries in {summary.layers} layers"
    if summary.at_work:
        lines["others"] = f"{summary.at_work} The last one to end lists what all have written."
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
        commands = "; ".join(shlex.join(["rapidindex", "add", summary.index, path]) for path in summary.without_tokens)
        lines["no tokens"] = f"of data that was added: {commands}"
    about = f"--token WORD{'' if summary.tokens is None else ' --level token'}"
    if not summary.layers:
        about = '--answer "ANSWER"'  # embeddings are of whole answers, and no model is there to give one
    lines["next"] = f'rapidindex query {shlex.quote(asked or summary.index)} "PROMPT" {about}'
    return {f"Index {summary.index}": lines}


def estimate_tables(estimate: Any) -> Tables:
    """Return a table each for the time, disk, memory and GPU memory that a build will take."""
    seconds = {**estimate.seconds, "in all": estimate.total_seconds}
    free = {name: f"{size / 2**20:,.0f} MiB free" for name, size in estimate.free.items()}
    time = {
        "for": f"{estimate.rows:,} rows of {estimate.examples:,} examples",
        "workers": estimate.workers,
        "tokens": f"{estimate.tokens:,}, padding included",
        **{name: f"{value:,.1f} s" for name, value in seconds.items()},
    }
    tables = {
        "Time": time,
        f"Disk, of {free['disk']}": _sizes(estimate.disk),
        f"Memory, {free['memory']}": _sizes(estimate.memory),
    }
    if estimate.device_memory:
        tables[f"GPU memory, {free['device']}"] = _sizes(estimate.device_memory)
    return tables


def _sizes(parts: dict[str, int]) -> dict[str, str]:
    """Return numbers of bytes and their sum, all in the unit that suits the sum."""
    sizes = {**parts, "in all": sum(parts.values())}
    unit, name = (2**20, "MiB") if sizes["in all"] >= 2**24 else (2**10, "KiB")
    return {part: f"{size / unit:,.1f} {name}" for part, size in sizes.items()}


def checkpoints_tables(info: dict[str, Any]) -> Tables:
    """Return one table about an index of several checkpoints; each has those of `info_tables`, besides."""
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in info["weights"].items())
    of = "by learning rates" if info["weighted"] else "equal: their learning rates are not on record"
    lines = {"checkpoints": f"{len(info['checkpoints'])}; the first answers by default", "sum": f"{weights} ({of})"}
    return {f"Index {info['path']}": lines}


def info_tables(info: dict[str, Any]) -> Tables:
    """Return a table about an index, one for each of its levels, and one for each kind of row that was left out."""
    tables = {f"Index {info['path']}": _index_lines(info)}
    for level, state in info["levels"].items():
        tables[f"Level {level}"] = _level_lines(info["config"], level, state)
    for title, rows in (("Unusable rows of the data", info["skipped"]), ("No finite gradient", info["rejected"])):
        if rows:
            tables[title] = {f"{row.get('source', '')} line {row['line']}".strip(): row["reason"] for row in rows}
    return tables


def _index_lines(info: dict[str, Any]) -> dict[str, str]:
    config = info["config"]
    gradient, sketch = config["gradient"], config["sketch"]
    lines = {
        "examples": f"{info['examples']:,} ({_completeness(info['levels'])})",
        "size": f"{info['bytes'] / 2**20:,.1f} MiB",
        "gradient": f"{info['gradient_size']:,} entries in {info['layers']} layers",
        "model": f"{config['model']['path']} ({', '.join(filter(None, (config['dtype'], config['quantize'])))})",
        "adapter": config["adapter"]["path"] or "none: all parameters",
        "data": ", ".join(source["path"] for source in (config["data"], *config.get("added", []))),
        "template": config["encoding"]["template"],
        "recipe": f"{info['recipe']}: second moment {gradient['second_moment']}, normalize {gradient['normalize']}",
        "projection": f"{_projection(sketch)}, seed {sketch['seed']}",
        "created": info["created"],
    }
    if info.get("lost_second_moment"):
        lines["damaged"] = "the second moment is lost: nothing can be asked before the build command is given again"
    if task := config.get("task"):
        lines["task"] = f"{task['queries']['path']}: λ {_number(task['weight'])}, damping {task['damping']:g}"
        lines["made from"] = f"{task['index']['path']}, in blocks of {task['block']:,} entries"
    if config.get("encoder"):
        lines["encoder"] = f"{config['encoder']['path']}: the rows are its embeddings"
    return lines | ({"removed": f"{info['removed']:,} examples"} if info["removed"] else {})


def _number(value: float | None) -> str:
    return "not known yet: give the specialize command again" if value is None else f"{value:.4f}"


def _projection(sketch: dict[str, Any]) -> str:
    kind = sketch.get("projection", "rapidgrad")
    return f"RapidGrads of {sketch['shuffles']} shuffles" if kind == "rapidgrad" else kind


def _completeness(levels: dict[str, dict[str, Any]]) -> str:
    unfinished = {level: state["planned"] for level, state in levels.items() if not state["complete"]}
    planned = "; ".join(f"level {level}: {count:,} planned" for level, count in unfinished.items())
    return f"{planned}: give the build command again" if planned else "complete"


def _level_lines(config: dict[str, Any], level: str, state: dict[str, Any]) -> dict[str, Any]:
    lines = {
        "rows": f"{state['rows']:,} of {state['examples']:,} examples; shards: {state['shards']}",
        "K": f"{state['K']:,}, kept as {state['row_type']}",
    }
    if level == "token":
        lines["tokens"] = f"{config['token']['tokens']}, of {config['tokens_of']} examples"
    index = {name: value for name, value in (state["index"] or {}).items() if value not in (None, "", 0)}
    if index.get("factory") == "exact":
        index = {"method": "exhaustive"}
    index |= {name: _search_lines(index[name]) for name in ("proponents", "opponents") if name in index}
    return lines | {f"search {name}": value for name, value in index.items()}


def _search_lines(calibration: dict[str, Any]) -> str:
    """Return how a direction is searched, from its Calibration, whose recall says nothing of a scan."""
    if calibration["margin"] is None:
        return "exhaustive: the candidates of the index do not reach the target recall"
    recalls = f"recall@10 {calibration['recall_at_10']:.3f}, recall@100 {calibration['recall_at_100']:.3f}"
    return f"approximate, {recalls}, measured with {calibration['queries']} queries"
