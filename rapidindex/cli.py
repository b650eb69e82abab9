"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

import json
import os
import shlex
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rapidindex.config import (
    DIM,
    TARGET_RECALL,
    BuildConfig,
    BuildRequest,
    EncodingConfig,
    FinetuneConfig,
    GradientConfig,
    ModelConfig,
    QueryOptions,
    SketchConfig,
    TokenConfig,
    check_level,
    levels_of,
)
from rapidindex.errors import ModelError, QueryError, RapidIndexError, UsageError
from rapidindex.views.sanitize import json_text, line
from rapidindex.views.tables import build_tables, estimate_tables, finetune_tables, info_tables

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which training examples, and which words in them, made the language model say that?",
)

_INTERRUPTED = 130
_ParserError = typer.BadParameter.__base__.__base__
"""ClickException, which Typer takes from its own copy of Click or from the package, as its version has it."""


def _in_home(path: Any) -> Path:
    return Path(os.path.expanduser(path))


# A shell leaves the ~ of --output=~/index as it is.
_PATH: dict[str, Any] = {"parser": _in_home, "metavar": "PATH"}
_PLACE: dict[str, Any] = {"parser": os.path.expanduser, "metavar": "TEXT"}

IndexPath = Annotated[
    Path, typer.Argument(parser=_in_home, metavar="INDEX", help="The index folder.", show_default=False)
]
DataPath = Annotated[
    Path,
    typer.Argument(
        parser=_in_home,
        metavar="DATA",
        help='JSONL, JSON, CSV (.gz, .zst), Parquet, a saved datasets folder, or "part-*.jsonl".',
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", **_PLACE, help="Model folder, hub name or GGUF file.", show_default=False)
]
MovedModel = Annotated[
    str | None,
    typer.Option("--model", "-m", **_PLACE, help="Where the model lies now, if not where it was.", show_default=False),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", **_PLACE, help="PEFT adapter folder; none: all parameters.", show_default=False),
]
MovedAdapter = Annotated[
    str | None, typer.Option("--adapter", "-a", **_PLACE, help="Where the adapter lies now.", show_default=False)
]
Quantize = Annotated[
    str | None, typer.Option(help="Hold the base under the adapter in 4bit (NF4) or 8bit.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: the GPU where there is one.")]
TemplateName = Annotated[
    str, typer.Option("--template", help="alpaca, chat (the tokenizer's own), plain, or a text with {prompt} in it.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens of an example; what is longer is cut.")]
Loss = Annotated[str, typer.Option(help="Assistant turns in the loss: all, or the last.")]
TrainedTemplate = Annotated[
    str | None,
    typer.Option("--template", help="As in finetune.", show_default="that of finetune, or alpaca"),
]
TrainedLength = Annotated[
    int | None,
    typer.Option(help="Tokens of an example; what is longer is cut.", show_default="that of finetune, or 512"),
]
TrainedLoss = Annotated[
    str | None,
    typer.Option(help="Assistant turns in the loss: all, or the last.", show_default="that of finetune, or all"),
]
BatchTokens = Annotated[int, typer.Option(help="Tokens of a padded batch, at most.")]
Workers = Annotated[int, typer.Option(help="Processes, each with a model of its own; spread over the GPUs.")]
ShardSeconds = Annotated[
    float, typer.Option(help="Work in a shard, in seconds at most: what a build that is killed can lose.")
]
Limit = Annotated[int | None, typer.Option(help="Take the first N usable examples only.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there instead of going on with it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("rapidindex"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def finetune(
    data: DataPath,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", **_PATH, help="Folder for the adapter, or the model.", show_default=False)
    ],
    method: Annotated[str, typer.Option(help="lora, qlora (4-bit base) or full.")] = FinetuneConfig.method,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA matrices.")] = FinetuneConfig.rank,
    alpha: Annotated[
        int | None, typer.Option(help="LoRA's alpha: its update is scaled by alpha / rank.", show_default="2 · rank")
    ] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = FinetuneConfig.dropout,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Linear modules to adapt, separated by commas.", show_default="attention projections"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = FinetuneConfig.epochs,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the learning rate.", show_default="5e-4; full: 5e-5")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = FinetuneConfig.batch_size,
    accumulation: Annotated[int, typer.Option(help="Batches in a step.")] = FinetuneConfig.accumulation,
    quantize: Quantize = None,
    template: TemplateName = EncodingConfig.template,
    max_length: MaxLength = EncodingConfig.max_length,
    loss: Loss = EncodingConfig.loss,
    seed: Annotated[
        int, typer.Option(help="Seed of the adapter's start and of the order of the examples.")
    ] = FinetuneConfig.seed,
    early: Annotated[
        float | None,
        typer.Option(
            help="Also save the model after this share of the steps, to OUTPUT/early.",
            show_default="0.1; full: 0",
        ),
    ] = None,
    save_optimizer: Annotated[
        bool, typer.Option("--save-optimizer", help="Save Adam's state, for build --second-moment.")
    ] = False,
    dtype: Dtype = ModelConfig.dtype,
    device: Device = ModelConfig.device,
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on the data: LoRA, QLoRA or all parameters. The same command goes on after an interruption."""
    from rapidindex.data.examples import read_examples
    from rapidindex.model.finetune import finetune as run
    from rapidindex.progress import Bars

    options = FinetuneConfig(
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        early=early,
        save_optimizer=save_optimizer,
    )
    encoding, base = EncodingConfig(template, max_length, loss), ModelConfig(model, None, quantize, dtype, device)
    dataset = read_examples(data, limit=limit, loss=loss)
    with Bars(quiet=quiet) as bars:
        summary = run(dataset, encoding, base, options, output, overwrite=overwrite, progress=bars)
    _print(summary, as_json, finetune_tables(summary, len(dataset.skipped), str(data), base, encoding, limit))


@app.command()
def build(
    data: DataPath,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", **_PATH, help="The index folder.", show_default=False)],
    adapter: Adapter = None,
    K: Annotated[int, typer.Option("-K", help="Length of a RapidGrad, a power of two.")] = SketchConfig.K,
    shuffles: Annotated[int, typer.Option(help="Row and column shuffles (the paper's λ).")] = SketchConfig.shuffles,
    quantize: Quantize = None,
    template: TrainedTemplate = None,
    max_length: TrainedLength = None,
    loss: TrainedLoss = None,
    normalize: Annotated[
        str, typer.Option(help="unit, layer (the paper's) or none (TracIn).")
    ] = GradientConfig.normalize,
    second_moment: Annotated[
        str,
        typer.Option(
            **_PLACE,
            help="Divide gradients by its root: estimate; kronecker (along each layer's eigenvectors: finds more, "
            "takes more room); none; or a training checkpoint's path.",
        ),
    ] = GradientConfig.second_moment,
    moment_examples: Annotated[
        int, typer.Option(help="Examples that estimate and kronecker take.")
    ] = GradientConfig.moment_examples,
    level: Annotated[str, typer.Option(help="Rows for whole examples (sentence), for tokens (token), or both.")] = (
        "sentence"
    ),
    tokens: Annotated[
        str, typer.Option(help="Which tokens: all, content (no punctuation, no stop words), the first N, or content,N.")
    ] = TokenConfig.tokens,
    token_K: Annotated[int, typer.Option("--token-K", help="Length of a token's RapidGrad.")] = TokenConfig.K,
    token_examples: Annotated[
        list[str] | None,
        typer.Option(**_PLACE, help="Tokens of this id alone, or of a file with an id a line; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws shuffles, signs and the estimate's examples.")] = SketchConfig.seed,
    dtype: Dtype = ModelConfig.dtype,
    device: Device = ModelConfig.device,
    batch_tokens: BatchTokens = BuildConfig.batch_tokens,
    workers: Workers = BuildConfig.workers,
    shard_seconds: ShardSeconds = BuildConfig.shard_seconds,
    limit: Limit = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take, in time, disk and memory; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cache the gradient of every training example, and index them. Given again, it goes on where it stopped."""
    from rapidindex.caching.build import build as run
    from rapidindex.data.examples import listed_ids
    from rapidindex.progress import Bars

    levels, token = levels_of(level), TokenConfig(token_K, tokens)
    if "token" not in levels and (token != TokenConfig() or token_examples):
        raise UsageError(
            "--tokens, --token-K and --token-examples are about tokens.", hint="Add --level token, or both."
        )
    request = BuildRequest(
        data=str(data),
        output=str(output),
        model=ModelConfig(model, adapter, quantize, dtype, device),
        encoding=_encoding(adapter or model, template=template, max_length=max_length, loss=loss),
        gradient=GradientConfig(normalize, second_moment, moment_examples, seed),
        sketch=SketchConfig(K, shuffles, seed),
        work=BuildConfig(batch_tokens, workers, shard_seconds),
        limit=limit,
        levels=levels,
        token=token,
        token_examples=None if token_examples is None else frozenset(listed_ids(token_examples, "--token-examples")),
    )
    with Bars(quiet=quiet) as bars:
        if not dry_run:
            summary = run(request, overwrite=overwrite, progress=bars)
        else:
            from rapidindex.caching.estimate import estimate

            summary = estimate(request, overwrite=overwrite, progress=bars)
    _print(summary, as_json, estimate_tables(summary) if dry_run else build_tables(summary))


def _encoding(model: str, **asked: str | int | None) -> EncodingConfig:
    """Return how examples are encoded: as asked for, or else as `finetune` did for this model or adapter."""
    from rapidindex.model.files import trained_encoding

    trained = trained_encoding(model)
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value != trained.get(name, value):
            flag = f"--{name.replace('_', '-')}"
            print(f"{model} was trained with {flag} {trained[name]!r}, not {value!r}.", file=sys.stderr)
    return EncodingConfig(**{**trained, **given})


@app.command()
def add(
    path: IndexPath,
    data: DataPath,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    device: Device = ModelConfig.device,
    batch_tokens: BatchTokens = BuildConfig.batch_tokens,
    workers: Workers = BuildConfig.workers,
    shard_seconds: ShardSeconds = BuildConfig.shard_seconds,
    limit: Limit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add data to an index, with the model and the options that it was built with. What it holds is not added twice.

    Building from A and adding B gives the rows of building from A and B: exactly with --second-moment none, and
    otherwise but for the second moment, which stays that of A. Examples that were removed, and are in the data, come
    back.
    """
    from rapidindex.caching.update import add as run
    from rapidindex.progress import Bars

    work = BuildConfig(batch_tokens, workers, shard_seconds)
    moved = {"model": model, "adapter": adapter, "device": device}
    with Bars(quiet=quiet) as bars:
        summary = run(path, str(data), **moved, work=work, limit=limit, progress=bars)
    _print(summary, as_json, build_tables(summary))


@app.command()
def remove(
    path: IndexPath,
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", **_PLACE, help="An example's id, or a file with one a line; may be repeated."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Examples like this; repeated: all of it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take examples out of an index: no search finds them any more. Adding their data again brings them back."""
    from rapidindex.caching.update import remove as run
    from rapidindex.progress import Bars

    with Bars(quiet=quiet) as bars:
        removal = run(path, ids=ids or (), where=where or (), progress=bars)
    lines = {"removed": f"{removal.removed:,} examples", "examples": f"{removal.examples:,} are left"}
    _print(removal, as_json, {f"Index {removal.index}": lines})


@app.command()
def index(
    path: IndexPath,
    factory: Annotated[
        str | None, typer.Option(help='FAISS factory such as Flat or "HR,RaBitQ", or exact.', show_default="by size")
    ] = None,
    dim: Annotated[int, typer.Option(help="Length of the folded rows; divides K.")] = DIM,
    target_recall: Annotated[float, typer.Option(help="Recall@10 to reach.")] = TARGET_RECALL,
    level: Annotated[
        str | None, typer.Option(help="Of whole examples (sentence) or tokens (token).", show_default="all")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Build and search on the GPU (flat and IVF).")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild the search index from the stored RapidGrads."""
    from rapidindex.progress import Bars
    from rapidindex.search.vector_index import VectorIndex
    from rapidindex.store import Store

    check_level(level)
    store = Store.open(path)
    described = {}
    with store.lock(), Bars(quiet=quiet) as bars:
        options = {"factory": factory, "dim": dim, "target_recall": target_recall, "gpu": gpu, "progress": bars}
        for name in [level] if level else store.levels:
            described[name] = VectorIndex.build(store.rows(name), **options).describe()
    _print(described, as_json, {f"Search index of {name}s": card for name, card in described.items()})


@app.command()
def query(
    path: IndexPath,
    prompt: Annotated[str | None, typer.Argument(help="What the model was asked; - reads it from stdin.")] = None,
    answer: Annotated[str | None, typer.Option(help="What it said; without it the model answers now.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Ask about WORD of the answer, every time it occurs, or the n-th: WORD#n.")
    ] = None,
    span: Annotated[str | None, typer.Option(help="Ask about the answer's tokens FIRST:LAST, counted from 0.")] = None,
    system: Annotated[str | None, typer.Option(help="The system turn before the prompt.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many examples.")] = QueryOptions.k,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="The examples that speak against the answer instead.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Scan every stored RapidGrad.")] = False,
    heatmaps: Annotated[
        bool, typer.Option("--heatmaps/--no-heatmaps", help="Each training token's share in the influence.")
    ] = True,
    answer_scores: Annotated[
        bool, typer.Option("--answer-scores", help="Each match's influence on every token of the answer, too.")
    ] = False,
    level: Annotated[
        str | None,
        typer.Option(help="Find whole examples (sentence) or single tokens of them (token).", show_default="sentence"),
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Order four times as many candidates by their uncompressed influence.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(**_PATH, help="Write a report with both directions to this file.", show_default=False)
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            **_PATH,
            help="JSONL of {prompt or messages, system, answer, token, span}: many queries at once. Further keys, such "
            "as an id, come back in the JSON.",
        ),
    ] = None,
    model: MovedModel = None,
    adapter: MovedAdapter = None,
    device: Device = ModelConfig.device,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of an answer that the model gives.")
    ] = QueryOptions.max_new_tokens,
    as_json: Json = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print JSON, one result a line.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find the training examples that most influenced an answer, or a word of it."""
    from rapidindex.query.index import Index
    from rapidindex.query.questions import as_query, read_queries
    from rapidindex.views import terminal, wording

    if (prompt is None) == (queries is None):
        raise UsageError(
            "Give either a PROMPT or --queries FILE.", hint='For example: rapidindex query INDEX "…" --token WORD'
        )
    if queries is not None and not (answer is token is span is system is None):
        raise UsageError(
            "--answer, --token, --span and --system stand in the lines of --queries.", hint="Leave them out here."
        )
    if html is not None and queries is not None:
        raise UsageError("--html takes one query, not --queries.", hint="Give a PROMPT.")
    if html is not None:
        _check_report(html)
    options = QueryOptions(
        k=k,
        opponents=opponents,
        exact=exact,
        heatmaps=heatmaps,
        answer_scores=answer_scores or html is not None,
        rescore=rescore,
        level=level,
        max_new_tokens=max_new_tokens,
    )
    index = Index.open(path, model=model, adapter=adapter, device=device)
    if queries is not None:
        asked = read_queries(queries)
    else:
        prompt = _stdin() if prompt == "-" else prompt
        asked = {0: as_query(prompt, system=system, answer=answer, token=token, span=span)}
    if not quiet:
        _say("Loading the model …")
    encoded, failed = _encode_each(index, asked, options, queries)
    results = dict(zip(encoded, index.query(list(encoded.values()), options=options), strict=True))
    first = next(iter(results.values()), None)
    if first and (missing := wording.unfinished(first)):
        _say(f"{missing} Give its rapidindex build command again to search them all.")
    if as_jsonl or (as_json and queries is not None):
        lines = [results[at].to_json() if at in results else _error_json(failed[at]) for at in asked]
        _echo_json("\n".join(lines) if as_jsonl else "[" + ",\n".join(lines) + "]")
    elif as_json:
        _echo_json(first.to_json(indent=2))
    else:
        _show(*(terminal.result(result) for result in results.values()))
    if html is not None:
        other = index.query(encoded[0], options=replace(options, opponents=not opponents))
        best, worst = (other, first) if opponents else (first, other)
        html.write_text(best.to_html(opponents=worst, command=shlex.join(["rapidindex", *sys.argv[1:]])), "utf-8")
        if not quiet:
            _say(f"Wrote {html}")
    if failed:
        raise typer.Exit(1)


def _encode_each(index: Any, asked: dict[int, Any], options: QueryOptions, file: Path | None) -> tuple[dict, dict]:
    """Return the queries of a file that can be answered, encoded, and the errors of the others, both by line.

    An error is printed as soon as it is met. A query of the command line (no `file`) raises it instead.
    """
    encoded, failed = {}, {}
    index.encode([], options)
    index.template  # noqa: B018 - loads the model: one that cannot be loaded is no fault of a line
    for number, query in asked.items():
        try:
            (encoded[number],) = index.encode([query], options)
        except (QueryError, UsageError, ModelError) as error:
            if file is None:
                raise
            failed[number] = type(error)(f"{file}, line {number}: {error.message}", hint=error.hint)
            _fail(failed[number])
    return encoded, failed


def _check_report(file: Path) -> None:
    """Raise UsageError where a report cannot be written to `file`, or would replace anything but an older report."""
    from rapidindex.store import Store

    hint = "Give --html a new file in a folder that is there."
    if not file.parent.is_dir():
        raise UsageError(f"The folder {file.parent} does not exist.", hint=hint)
    if inside := next((folder for folder in file.resolve().parents if Store.exists(folder)), None):
        raise UsageError(f"{file} lies in the index {inside}.", hint=hint)
    if not file.exists():
        return
    with open(file, "rb") if file.is_file() else nullcontext() as old:
        start = old.read(4096) if old else b"?"
    if start and b"<title>Influences on" not in start:
        raise UsageError(f"{file} is there, and is no report of rapidindex: it is left as it is.", hint=hint)


def _stdin() -> str:
    """Return what stdin holds, without the line break at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not UTF-8 ({error}).", hint="Give text in UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")


@app.command()
def info(path: IndexPath, as_json: Json = False) -> None:
    """Say what an index holds and how it was built."""
    from rapidindex.query.index import Index

    found = Index.open(path).info()
    _print(found, as_json, info_tables(found))


@app.command()
def check(
    path: IndexPath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is damaged aside, so that the build can make it anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every byte of an index and say what is damaged, and how to mend it."""
    from rapidindex.search.check import check as run

    problems = run(path, repair=repair)
    if as_json:
        _echo_json(json.dumps([vars(problem) for problem in problems], default=str, indent=2))
    elif not problems:
        _echo(f"{path}: all files are as they were written.")
    for problem in () if as_json else problems:
        _echo(f"{problem.where} {problem.what.rstrip('.')}: {problem.mend.rstrip('.')}.")
    if problems and not repair:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--folder", **_PATH, help="Where the demo keeps its files.")
    ] = "rapidindex-demo",  # type: ignore[assignment]  # the parser makes a path of it
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a small model on data with planted errors, index the data, and ask where an error came from."""
    from rapidindex.demo.demo import run
    from rapidindex.progress import Bars

    with Bars(quiet=quiet) as bars:
        run(folder, overwrite=overwrite, say=bars.say, show=_show, progress=bars)


def main() -> None:
    """Run the command line, and turn every expected failure into one sentence and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # no result is lost to a character that the terminal lacks
    try:
        _check_encoding(sys.argv[1:])
        code = app(prog_name="rapidindex", standalone_mode=False)
    except RapidIndexError as error:
        _fail(error)
        code = error.exit_code
    except _ParserError as error:
        code = error.exit_code
        _fail_to_parse(error)
    except typer.Abort:
        code = _INTERRUPTED
    except OSError as error:
        _fail(RapidIndexError(f"{error.strerror or error}: {error.filename or 'a file'}."))
        code = 1
    if code == _INTERRUPTED:  # Typer's own exit code for Ctrl-C
        _say("Interrupted; what was finished is kept. Type the same command again to go on.")
    sys.exit(code or 0)


def _check_encoding(arguments: list[str]) -> None:
    """Raise UsageError for bytes that are not UTF-8: no model reads them, and no manifest can hold them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            hint = "Give text in UTF-8, and rename a file whose name is not."
            raise UsageError(f"The argument {argument!r} is not UTF-8.", hint=hint) from error


def _terminate(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` and others send it twice
    raise KeyboardInterrupt


def _fail_to_parse(error: Any) -> None:
    """Print what Typer says of a command line that it cannot read; its help for one without arguments."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    command = error.ctx.command_path if getattr(error, "ctx", None) else "rapidindex"
    _fail(UsageError(f"{message.rstrip('.')}.", hint=f"Type `{command} --help`."))


def _fail(error: RapidIndexError) -> None:
    if "--json" in sys.argv or "--jsonl" in sys.argv:
        print(json_text(_error_json(error), sys.stderr.encoding), file=sys.stderr)
    else:
        _say(f"Error: {error}")


def _error_json(error: RapidIndexError) -> str:
    said = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    return json.dumps({"error": said}, ensure_ascii=False)


def _say(text: str) -> None:
    """Print a line on stderr, whatever characters it holds."""
    print(line(text), file=sys.stderr, flush=True)


def _echo(text: str) -> None:
    """Print a line on stdout, whatever characters it holds."""
    typer.echo(line(text))


def _echo_json(text: str) -> None:
    typer.echo(json_text(text, sys.stdout.encoding))


def _print(value: Any, as_json: bool, tables: dict[str, dict[str, Any]]) -> None:
    """Print plain data: as JSON, or as titled tables of names and values."""
    from rapidindex.views import terminal

    if as_json:
        plain = value if isinstance(value, dict) else vars(value)
        _echo_json(json.dumps(plain, ensure_ascii=False, indent=2, default=str))
    else:
        _show(*(terminal.fields(title, values) for title, values in tables.items()))
        for command in (values["next"] for values in tables.values() if "next" in values):
            _echo(f" next: {command}")  # on one line, whatever the terminal's width, so that it can be copied


def _show(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    for part in parts:
        console.print(part)
