"""The command that puts an attribution to the test."""

import sys
from functools import partial
from typing import Annotated

import typer

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import echo_json, say, show
from rapidindex.cli.querying import read_stdin
from rapidindex.config import FinetuneConfig, ModelConfig, VerifyOptions
from rapidindex.errors import UsageError

in_test = partial(typer.Option, rich_help_panel="Test")
in_retraining = partial(typer.Option, rich_help_panel="Retraining", show_default=False)


@command(
    "Ask",
    'rapidindex verify index "Where is yoga from?" --answer "From Japan." --token Japan',
    'rapidindex verify index "Where is yoga from?" --token Japan --top 5 --optimizer adamw',
    'rapidindex verify index "Where is yoga from?" --answer "From Japan." --token Japan --method retrain',
)
def verify(
    path: opt.IndexPath,
    prompt: Annotated[str, typer.Argument(help="What the model was asked; - reads it from stdin.")],
    answer: opt.Answer = None,
    token: Annotated[
        str | None, opt.in_question(help="Words of the answer, every time they occur, or the n-th: WORD#n.")
    ] = None,
    span: Annotated[str | None, opt.in_question(help="The answer's tokens FIRST:LAST, counted from 0.")] = None,
    system: opt.System = None,
    method: Annotated[
        str,
        in_test(
            **opt.values("tail-patch", "retrain"),
            help="tail-patch: a step of training on the matches; retrain: the whole training without them.",
        ),
    ] = VerifyOptions.method,
    top: Annotated[
        int, in_test(help="How many matches are put to the test, and as many rows as controls.")
    ] = VerifyOptions.top,
    draws: Annotated[int, in_test(help="Random draws of as many rows, of like length.")] = VerifyOptions.draws,
    seed: Annotated[int, in_test(help="Draws the random rows.")] = VerifyOptions.seed,
    optimizer: Annotated[
        str,
        in_test(**opt.values("sgd", "adamw"), help="sgd, or adamw with the checkpoint's optimizer.pt if it has one."),
    ] = VerifyOptions.optimizer,
    learning_rate: Annotated[
        float | None,
        in_test(help="Of the step.", show_default="a random row's own loss falls by .1 nats"),
    ] = None,
    repeats: Annotated[
        int, in_retraining(help="Trainings without random rows instead.", show_default=True)
    ] = VerifyOptions.repeats,
    yes: Annotated[bool, in_retraining("--yes", "-y", help="Train without asking, however long it takes.")] = False,
    runs: Annotated[
        str | None, in_retraining(**opt.PLACE, help="Where trainings are kept.", show_default="INDEX-runs")
    ] = None,
    data: Annotated[
        str | None, in_retraining(**opt.PLACE, help="The training data, if it is not where it was.")
    ] = None,
    base: Annotated[
        str | None, in_retraining(**opt.PLACE, help="The model that training began with, if it is not on record.")
    ] = None,
    epochs: Annotated[
        int | None, in_retraining(help="Of a training that is not on record: passes over the data.")
    ] = None,
    peak: Annotated[float | None, in_retraining(help="Its learning rate, at the peak.")] = None,
    batch_size: Annotated[int | None, in_retraining(help="Examples in its batches.")] = None,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    device: opt.Device = ModelConfig.device,
    max_new_tokens: opt.AnswerLength = VerifyOptions.max_new_tokens,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure what the matches of a query do to the answer, beside random rows and those that a text search finds.

    tail-patch takes one optimizer step on them from the indexed checkpoint, and takes it back: it shows whether these
    rows can move the words, and how much a score is worth. retrain repeats the fine-tuning without them, and without
    random rows: it shows whether the model would have said it without them.
    """
    from rapidindex.query.questions import as_query

    options = VerifyOptions(
        top=top,
        draws=draws,
        seed=seed,
        optimizer=optimizer,
        learning_rate=learning_rate,
        method=method,
        repeats=repeats,
        runs=runs,
        data=data,
        base=base,
        training=_training(epochs=epochs, learning_rate=peak, batch_size=batch_size),
        max_new_tokens=max_new_tokens,
    )
    question = as_query(read_stdin() if prompt == "-" else prompt, system=system, answer=answer, token=token, span=span)

    # Takes seconds: what the words alone give away is refused before.
    from rapidindex.evaluate.verify import verify as run
    from rapidindex.progress import Bars
    from rapidindex.query.index import Index
    from rapidindex.views import trials, wording

    index = Index.open(path, model=model, adapter=adapter, device=device)
    if not quiet:
        say("Loading the model …")
    with Bars(quiet=quiet) as bars:
        found = run(index, question, options, announce=partial(_ask, yes=yes, quiet=quiet), progress=bars)
    if missing := wording.unfinished(found):
        say(f"{missing} If none is at work, give its rapidindex build command again.")
    if as_json:
        echo_json(found.to_json(indent=2))
    else:
        show(trials.terminal(found))


def _training(**given: float | None) -> FinetuneConfig | None:
    """Return the options of a training that is not on record; None where none is given."""
    known = {name: value for name, value in given.items() if value is not None}
    return FinetuneConfig(**known) if known else None  # type: ignore[arg-type]


def _ask(runs: int, seconds: float, *, yes: bool, quiet: bool) -> None:
    """Say how long it will take, and ask unless `yes`; UsageError where nobody can answer, typer.Abort for a no."""
    said = f"{runs} training{'s' if runs > 1 else ''} of the model, about {_duration(seconds)} in all on this machine."
    if yes:
        if not quiet:
            say(said)
        return
    if not sys.stdin.isatty():
        raise UsageError(said, hint="Give --yes to train.")
    typer.confirm(f"{said} Train?", abort=True, err=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
