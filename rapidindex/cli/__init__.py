"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr.

app          the commands' common ground: help in groups, examples, errors as one sentence and an exit code
options      options that several commands share, and the groups in which help shows them
background   heat-map colours for the terminal's background
printing     what is written to stdout and stderr
training     finetune, distill
building     build
specializing specialize
updating     add, remove
querying     query
serving      serve
verifying    verify
inspecting   info, check, index
showing      demo

To add a command, write a file with its function under `@command(…)` and import it here: help lists the commands in the
order of these imports. Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

# isort: off
from rapidindex.cli.app import main
from rapidindex.cli import querying, serving, verifying, training, building, specializing, updating, inspecting, showing  # noqa: F401

# isort: on
__all__ = ["main"]
