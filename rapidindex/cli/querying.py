"""The command that asks which training examples made an answer."""

import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.background import THEMES
from rapidindex.cli.background import theme as theme_of
from rapidindex.cli.printing import echo_json, error_json, fail, say, show
from rapidindex.config import ModelConfig, QueryOptions
from rapidindex.errors import ModelError, QueryError, UsageError
from rapidindex.views.heatmap import Theme


@command(
    "Ask",
    'rapidindex query index "Where is yoga from?" --token Japan',
    'rapidindex query index "Where is yoga from?" --answer "From Japan." --token Japan --html report.html',
    "rapidindex query index --queries questions.jsonl --jsonl > results.jsonl",
)
def query(
    path: opt.IndexPath,
    prompt: Annotated[str | None, typer.Argument(help="What the model was asked; - reads it from stdin.")] = None,
    answer: opt.Answer = None,
    token: Annotated[
        str | None, opt.in_question(help="Ask about WORD of the answer, every time it occurs, or the n-th: WORD#n.")
    ] = None,
    span: Annotated[
        str | None, opt.in_question(help="Ask about the answer's tokens FIRST:LAST, counted from 0.")
    ] = None,
    system: opt.System = None,
    k: Annotated[int, opt.in_search("-k", help="How many examples.")] = QueryOptions.k,
    opponents: Annotated[
        bool, opt.in_search("--opponents", help="The examples that speak against the answer instead.")
    ] = False,
    exact: Annotated[bool, opt.in_search("--exhaustive", "--exact", help="Score every stored RapidGrad.")] = False,
    heatmaps: Annotated[
        bool, opt.in_output("--heatmaps/--no-heatmaps", help="Each training token's share in the influence.")
    ] = True,
    answer_scores: Annotated[
        bool, opt.in_output("--answer-scores", help="Each match's influence on every token of the answer, too.")
    ] = False,
    every: Annotated[bool, opt.in_output("--all", help="Matches within chance have cards and heat-maps, too.")] = False,
    level: Annotated[
        str | None,
        opt.in_search(
            **opt.values("sentence", "token"),
            help="Find whole examples (sentence) or single tokens of them (token).",
            show_default="sentence",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        opt.in_search(
            **opt.values("sum", "best"),
            help="Of an index of several: a checkpoint's name; sum, weighed by learning rates; best: where matches "
            "stand out most.",
            show_default="the first, compared with the others",
        ),
    ] = None,
    rescore: Annotated[
        int | None,
        opt.in_search(
            metavar="[N]",
            help="Order N candidates by their uncompressed influence, asked about a word by their strongest word's; "
            "without N four times as many as -k, or 200 of those that an encoder finds.",
            show_default="of a question about a word, where heat-maps are drawn",
        ),
    ] = None,
    no_rescore: Annotated[
        bool, opt.in_search("--no-rescore", help="Order by the search's scores, asked about a word, too.")
    ] = False,
    ids_out: Annotated[
        Path | None,
        opt.in_output(**opt.PATH, help="Write the matches' ids to this file, for `remove --ids`.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        opt.in_output(**opt.PATH, help="Write a report with both directions to this file.", show_default=False),
    ] = None,
    queries: Annotated[
        Path | None,
        opt.in_question(
            **opt.PATH,
            help="JSONL of {prompt or messages, system, answer, token, span}: many queries at once. Further keys, such "
            "as an id, come back in the JSON.",
        ),
    ] = None,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    encoder: opt.MovedEncoder = None,
    device: opt.Device = ModelConfig.device,
    ray: opt.SearchRay = None,
    max_new_tokens: opt.AnswerLength = QueryOptions.max_new_tokens,
    as_json: opt.Json = False,
    as_jsonl: Annotated[bool, opt.in_output("--jsonl", help="Print JSON, one result a line.")] = False,
    theme: Annotated[
        str,
        opt.in_output(
            **opt.values(*THEMES), help="Heat-map colours for a light or dark terminal; auto finds out which it is."
        ),
    ] = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Find the training examples that most influenced an answer, or a word of it."""
    from rapidindex.query.questions import as_query, read_queries
    from rapidindex.views import wording

    if (prompt is None) == (queries is None):
        raise UsageError(
            "Give either a PROMPT or --queries FILE.", hint='For example: rapidindex query INDEX "…" --token WORD'
        )
    if queries is not None and not (answer is token is span is system is None):
        raise UsageError(
            "--answer, --token, --span and --system stand in the lines of --queries.", hint="Leave them out here."
        )
    if no_rescore and rescore is not None:
        raise UsageError("--rescore and --no-rescore are both given.", hint="Leave out one.")
    if html is not None and queries is not None:
        raise UsageError("--html takes one query, not --queries.", hint="Give a PROMPT.")
    if html is not None:
        _check_output(html, "--html", _is_report)
    if ids_out is not None:
        _check_output(ids_out, "--ids-out", _is_list_of_ids)
    options = QueryOptions(
        k=k,
        opponents=opponents,
        exact=exact,
        heatmaps=heatmaps,
        answer_scores=answer_scores or html is not None,
        all=every,
        rescore=False if no_rescore else None if rescore is None else rescore or True,
        level=level,
        checkpoint=checkpoint,
        max_new_tokens=max_new_tokens,
    )
    if queries is not None:
        asked = read_queries(queries)
    else:
        prompt = read_stdin() if prompt == "-" else prompt
        asked = {0: as_query(prompt, system=system, answer=answer, token=token, span=span)}
    as_text = not (as_json or as_jsonl)
    colours = theme_of(theme, ask=as_text and heatmaps)

    from rapidindex.progress import Bars
    from rapidindex.query.index import Index  # takes seconds: what the words alone give away is refused before

    index = Index.open(path, model=model, adapter=adapter, encoder=encoder, device=device)
    index.progress, index.ray = Bars(quiet=quiet), ray
    if not quiet:
        say("Loading the model …")
    encoded, failed = _encode_each(index, asked, options, queries)
    answers = _answer(index, list(encoded.values()), options, colours if as_text else None, quiet)
    results = dict(zip(encoded, answers, strict=True))
    if device.startswith("cuda") and (why := getattr(index, "not_on_gpu", None)) and not quiet:
        say(f"The search ran on the CPU: {why}.")
    first = next(iter(results.values()), None)
    if first and (missing := wording.unfinished(first)):
        say(f"{missing} If none is at work, give its rapidindex build command again.")
    for line in dict.fromkeys(wording.checkpoints(result) for result in results.values()) if as_text else ():
        if line:
            say(line)
    if as_jsonl or (as_json and queries is not None):
        lines = [results[at].to_json() if at in results else error_json(failed[at]) for at in asked]
        echo_json("\n".join(lines) if as_jsonl else "[" + ",\n".join(lines) + "]")
    elif as_json:
        echo_json(first.to_json(indent=2))
    if html is not None:
        other = index.query(encoded[0], options=replace(options, opponents=not opponents))
        best, worst = (other, first) if opponents else (first, other)
        _write(html, best.to_html(opponents=worst, command=shlex.join(["rapidindex", *sys.argv[1:]])))
        if not quiet:
            say(f"Wrote {html}")
    if ids_out is not None:
        _write_ids(ids_out, results.values(), quiet)
    if failed:
        raise typer.Exit(1)


def _encode_each(index: Any, asked: dict[int, Any], options: QueryOptions, file: Path | None) -> tuple[dict, dict]:
    """Return the queries of a file that can be answered, encoded, and the errors of the others, both by line.

    An error is printed as soon as it is met. A query of the command line (no `file`) raises it instead.
    """
    encoded, failed = {}, {}
    index.encode([], options)
    index.load(options)  # a model that cannot be loaded is no fault of a line
    for number, query in asked.items():
        try:
            (encoded[number],) = index.encode([query], options)
        except (QueryError, UsageError, ModelError) as error:
            if file is None:
                raise
            failed[number] = type(error)(f"{file}, line {number}: {error.message}", hint=error.hint)
            fail(failed[number])
    return encoded, failed


def _answer(index: Any, encoded: list[Any], options: QueryOptions, theme: Theme | None, quiet: bool) -> list[Any]:
    """Return the results; with a `theme` they are shown: each ranking as soon as it is known, then heat-maps."""
    from rapidindex.query.events import Ranked
    from rapidindex.views import terminal

    results, events = [], index.ask(encoded, options)
    for event in events:
        if isinstance(event, Ranked):
            rescored = options.rescores(whole=event.result.query.whole, level=event.result.level)
            early = theme and options.heatmaps and not rescored
            if early:
                show(terminal.result(event.result, every=options.all))
            results.append(_completed(events, quiet=quiet or not theme))
            if early and any(match.token_scores for match in results[-1].matches):  # an encoder alone gives none
                show(terminal.cards(results[-1], theme, every=options.all))
            elif theme and not early:
                show(terminal.result(results[-1], theme, every=options.all))
    return results


def _completed(events: Any, *, quiet: bool) -> Any:
    """Return the next result of the events, after its heat-maps."""
    from rapidindex.progress import Bars
    from rapidindex.query.events import Answered

    with Bars(quiet=quiet) as bars:
        for event in events:
            if isinstance(event, Answered):
                return event.result
            bars("heat-maps", event.done, event.total)


def _check_output(file: Path, flag: str, is_ours: Callable[[bytes], bool]) -> None:
    """Raise UsageError where `file` cannot be written, or would replace anything but what this option wrote before."""
    from rapidindex.store import Store

    hint = f"Give {flag} a new file in a folder that is there."
    if not file.parent.is_dir():
        raise UsageError(f"The folder {file.parent} does not exist.", hint=hint)
    if inside := next((folder for folder in file.resolve().parents if Store.exists(folder)), None):
        raise UsageError(f"{file} lies in the index {inside}.", hint=hint)
    if not file.exists():
        return
    with open(file, "rb") if file.is_file() else nullcontext() as old:
        start = old.read(4096) if old else b"?"
    if start and not is_ours(start):
        raise UsageError(f"{file} is there, and {flag} did not write it: it is left as it is.", hint=hint)


def _is_report(start: bytes) -> bool:
    return b"<title>Influences on" in start


def _is_list_of_ids(start: bytes) -> bool:
    return re.fullmatch(rb"([0-9a-f]{16}\n)*[0-9a-f]{0,16}", start) is not None


def _write_ids(file: Path, results: Iterable[Any], quiet: bool) -> None:
    """Write the id of each example that matched once, best first, and say how many of them stand out."""
    matches = [(match, result.stands_out(match)) for result in results for match in result.matches]
    ids = dict.fromkeys(match.id for match, _ in matches)
    _write(file, "".join(f"{id}\n" for id in ids))
    if not quiet:
        within = len(ids) - len({match.id for match, out in matches if out is not False})
        say(f"Wrote {len(ids)} ids to {file}{f'; {within} of them are within chance' if within else ''}")


def _write(file: Path, text: str) -> None:
    """Write a text, whole or not at all: on a full disk the older report stays."""
    from rapidindex.store import replace_file

    replace_file(file.resolve(), text.encode())


def read_stdin() -> str:
    """Return what stdin holds, without the line break at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt on stdin is not UTF-8 ({error}).", hint="Give text in UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")
