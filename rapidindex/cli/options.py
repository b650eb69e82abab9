"""Options that several commands share, and the groups in which `--help` shows them."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

in_question = partial(typer.Option, rich_help_panel="Question")
in_data = partial(typer.Option, rich_help_panel="Data")
in_model = partial(typer.Option, rich_help_panel="Model")
in_training = partial(typer.Option, rich_help_panel="Training")
in_gradient = partial(typer.Option, rich_help_panel="Gradients")
in_token_rows = partial(typer.Option, rich_help_panel="Rows for single tokens")
in_search = partial(typer.Option, rich_help_panel="Search")
in_work = partial(typer.Option, rich_help_panel="Work")
in_output = partial(typer.Option, rich_help_panel="Output")


def in_home(path: Any) -> Path:
    """Return a path with its ~ replaced: a shell leaves that of --output=~/index as it is."""
    return Path(os.path.expanduser(path))


PATH: dict[str, Any] = {"parser": in_home, "metavar": "PATH"}
PLACE: dict[str, Any] = {"parser": os.path.expanduser, "metavar": "TEXT"}
"""For a text that may be a path."""


def values(*known: str) -> dict[str, Callable[[str], list[str]]]:
    """Return the setting of an option that makes a shell complete these values."""
    return {"autocompletion": lambda incomplete: [value for value in known if value.startswith(incomplete)]}


Answer = Annotated[str | None, in_question(help="What it said; without it the model answers now.")]
System = Annotated[str | None, in_question(help="The system turn before the prompt.")]
AnswerLength = Annotated[int, in_question("--max-new-tokens", help="Length of an answer that the model gives.")]
IndexPath = Annotated[
    Path, typer.Argument(parser=in_home, metavar="INDEX", help="The index folder.", show_default=False)
]
DataPath = Annotated[
    Path,
    typer.Argument(
        parser=in_home,
        metavar="DATA",
        help="JSONL, JSON, CSV (.gz, .zst), Parquet, .txt, .md, a folder of texts or of datasets, or several as "
        '"part-*.jsonl".',
        show_default=False,
    ),
]
Limit = Annotated[int | None, in_data(help="Take the first N usable examples only.", show_default=False)]

Model = Annotated[
    str, in_model("--model", "-m", **PLACE, help="Model folder, hub name or GGUF file.", show_default=False)
]
MovedModel = Annotated[
    str | None,
    in_model("--model", "-m", **PLACE, help="Where the model lies now, if not where it was.", show_default=False),
]
MovedAdapter = Annotated[
    str | None, in_model("--adapter", "-a", **PLACE, help="Where the adapter lies now.", show_default=False)
]
MovedEncoder = Annotated[
    str | None,
    in_model("--encoder", **PLACE, help="Where the encoder of an index of embeddings lies now.", show_default=False),
]
Quantize = Annotated[
    str | None,
    in_model(
        **values("4bit", "8bit"), help="Hold the base under the adapter in 4bit (NF4) or 8bit.", show_default=False
    ),
]
Dtype = Annotated[
    str,
    in_model(
        **values("float32", "bfloat16", "float16"), help="What the model computes in: float32, bfloat16, float16."
    ),
]
Device = Annotated[
    str,
    in_model(
        **values("auto", "cpu", "cuda", "mps"), help="cpu, cuda, cuda:1, mps, or auto: the GPU where there is one."
    ),
]

_TEMPLATES = values("alpaca", "chat", "plain", "raw")
_LOSSES = values("all", "last")
TemplateName = Annotated[
    str | None,
    in_data(
        "--template",
        **_TEMPLATES,
        help="alpaca, chat (the tokenizer's own), plain, raw (the prompt alone), or a text with {prompt} in it.",
        show_default="alpaca; of texts without prompts: raw",
    ),
]
MaxLength = Annotated[int, in_data(help="Tokens of an example; what is longer is cut, a text into passages.")]
Overlap = Annotated[
    int | None,
    in_data(help="Tokens that a passage of a long text repeats.", show_default="an eighth of --max-length"),
]
Loss = Annotated[str, in_data(**_LOSSES, help="Assistant turns in the loss: all, or the last.")]
TrainedTemplate = Annotated[
    str | None,
    in_data(
        "--template", **_TEMPLATES, help="As in finetune.", show_default="that of finetune, or alpaca; of texts: raw"
    ),
]
TrainedLength = Annotated[
    int | None,
    in_data(
        help="Tokens of an example; what is longer is cut, a text into passages.",
        show_default="that of finetune, or 512",
    ),
]
TrainedLoss = Annotated[
    str | None,
    in_data(**_LOSSES, help="Assistant turns in the loss: all, or the last.", show_default="that of finetune, or all"),
]

BatchTokens = Annotated[int, in_work(help="Tokens of a padded batch, at most.")]
Workers = Annotated[
    int | None,
    in_work(
        help="Processes, each with a model of its own; spread over the GPUs. With --ray, actors.",
        show_default="1; with --ray one a GPU, or a node",
    ),
]
Ray = Annotated[
    str | None,
    in_work(
        "--ray",
        metavar="ADDRESS",
        help="Compute on this Ray cluster: HOST:PORT, auto for the one this machine has joined, or local to start one.",
        show_default=False,
    ),
]
SearchRay = Annotated[
    str | None,
    in_search(
        "--ray",
        metavar="ADDRESS",
        help="Let the nodes of this Ray cluster scan a part of the shards each; addresses as in build.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    in_work(
        "--shard", metavar="I/N", help="Be job I of N on machines that share the index's folder.", show_default=False
    ),
]
ShardSeconds = Annotated[
    float, in_work(help="Work in a shard, in seconds at most: what a build that is killed can lose.")
]

Overwrite = Annotated[bool, in_output("--overwrite", help="Replace what is there instead of going on with it.")]
Json = Annotated[bool, in_output("--json", help="Print JSON.")]
Quiet = Annotated[bool, in_output("--quiet", "-q", help="No progress.")]
