"""The command that makes an index of another one and of a task's queries."""

from pathlib import Path
from typing import Annotated

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import print_plain
from rapidindex.config import ModelConfig, SpecializeOptions
from rapidindex.views.tables import specialize_tables


@command(
    "Make",
    "rapidindex specialize index --queries questions.jsonl -o index2",
    "rapidindex specialize index --queries questions.jsonl --weight 0.9 --damping 10 -o index2",
)
def specialize(
    path: opt.IndexPath,
    queries: Annotated[
        Path,
        opt.in_data(**opt.PATH, help="JSONL of the task's questions, as query takes it.", show_default=False),
    ],
    output: Annotated[
        Path, opt.in_output("--output", "-o", **opt.PATH, help="The new index's folder.", show_default=False)
    ],
    weight: Annotated[
        float | None,
        opt.in_gradient(
            help="λ, the weight of the questions' curvature beside that of the rows.",
            show_default="the spectra cross at --component",
        ),
    ] = None,
    component: Annotated[
        int | None,
        opt.in_gradient(help="Components that the task is to lose.", show_default="1,000 of 65,536, if it has them"),
    ] = None,
    damping: Annotated[
        float, opt.in_gradient(help="Added to a block's eigenvalues, in units of their mean.")
    ] = SpecializeOptions.damping,
    block: Annotated[
        int | None,
        opt.in_gradient(
            help="Entries of a block of the curvature, at most.", show_default="4096, or a fifth of the rows"
        ),
    ] = None,
    level: Annotated[
        str | None,
        opt.in_search(
            **opt.values("sentence", "token"),
            help="Rows of whole examples (sentence) or tokens (token).",
            show_default="the index's first",
        ),
    ] = None,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    device: opt.Device = ModelConfig.device,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make an index for a task: what its questions have in common counts less. Given again, it goes on."""
    options = SpecializeOptions(weight=weight, component=component, damping=damping, block=block, level=level)

    from rapidindex.progress import Bars
    from rapidindex.query.specialize import specialize as run  # takes seconds: wrong options are refused before

    moved = {"model": model, "adapter": adapter, "device": device}
    with Bars(quiet=quiet) as bars:
        summary = run(path, queries, output, options, **moved, overwrite=overwrite, progress=bars)
    print_plain(summary, as_json, specialize_tables(summary))
