"""The command that shows the whole tool on a small model."""

from pathlib import Path
from typing import Annotated

import typer

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import show
from rapidindex.cli.serving import serve


@command("Make", "rapidindex demo", "rapidindex demo --folder /tmp/demo", "rapidindex demo --serve")
def demo(
    folder: Annotated[
        Path, opt.in_output("--folder", **opt.PATH, help="Where the demo keeps its files.")
    ] = "rapidindex-demo",  # type: ignore[assignment]  # the parser makes a path of it
    browse: Annotated[bool, typer.Option("--serve", help="Then serve the page over the index, and open it.")] = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a small model on data with planted errors, ask where its error came from, verify, remove."""
    from rapidindex.demo.demo import run
    from rapidindex.progress import Bars

    with Bars(quiet=quiet) as bars:
        index = run(folder, overwrite=overwrite, say=bars.say, show=show, progress=bars)
    if browse:
        serve(index, browse=True)
