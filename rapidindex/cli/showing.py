"""The command that shows the whole tool on a small model."""

from pathlib import Path
from typing import Annotated

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import show


@command("Make", "rapidindex demo", "rapidindex demo --folder /tmp/demo")
def demo(
    folder: Annotated[
        Path, opt.in_output("--folder", **opt.PATH, help="Where the demo keeps its files.")
    ] = "rapidindex-demo",  # type: ignore[assignment]  # the parser makes a path of it
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a small model on data with planted errors, index the data, and ask where an error came from."""
    from rapidindex.demo.demo import run
    from rapidindex.progress import Bars

    with Bars(quiet=quiet) as bars:
        run(folder, overwrite=overwrite, say=bars.say, show=show, progress=bars)
