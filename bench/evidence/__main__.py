"""Does it find what was planted? The paper's two experiments on SmolLM2-135M, against every baseline.

    python -m bench.evidence --task backdoor --seeds 5 --rows 1000 --work FOLDER
    python -m bench.evidence --task tracing --seeds 5 --rows 1000 --work FOLDER
    python -m bench.evidence --smoke --work FOLDER           both tasks, tiny, in under 15 minutes
    python -m bench.render evidence                          tables and plots, from the JSON alone

Each stage is kept under FOLDER and skipped where it is there: after a kill the same command goes on. `--only` names
methods (text, full, rapidin, datainf, limit, early, product, rescored, encoder, lissa, ekfac, kronecker, rows,
representations). Others can be run later: with `--add` their figures join those in the JSON. The whole gradients of a
seed at two models take 15 MB of disk an example; --clean removes them when the seed is done.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from bench.common import parser, results_folder
from bench.evidence.end_to_end import recipe_names
from bench.evidence.lds import numbers
from bench.evidence.run import METHODS, SMOKE, Sizes
from bench.evidence.seeds import run


def main() -> None:
    options = parse()
    for task in ("backdoor", "tracing") if options.task == "both" else (options.task,):
        run(task, options)


def parse() -> argparse.Namespace:
    """Read the command line; `sizes` is the Sizes of the run."""
    add = (options := parser(__doc__)).add_argument
    add("--task", choices=("backdoor", "tracing", "both"), default="both")
    add("--seeds", type=_seeds, default=range(5), help="how many, or which ones with commas between them")
    add("--only", type=lambda text: tuple(text.split(",")), default=METHODS, help="methods, separated by commas")
    add("--product-seeds", type=int, default=1, help="seeds for which the product builds its own index")
    add("--clean", action="store_true", help="remove a seed's whole gradients when it is done")
    add("--add", action="store_true", help="keep the earlier results' other methods")
    add("--data", type=Path, default=Path("../shared/data"), help="alpaca_9k and webquestions_test")
    for field in fields(Sizes):
        kind = type(field.default)
        read = {"recipes": recipe_names, "Ks": numbers, "shuffles": numbers}.get(field.name, kind)
        add(f"--{field.name.replace('_', '-')}", type=read, help="with commas between" if kind is tuple else None)
    given = options.parse_args()
    if unknown := set(given.only) - set(METHODS):
        options.error(f"--only: unknown {', '.join(sorted(unknown))}; choose among {', '.join(METHODS)}")
    for name in ("alpaca_9k.jsonl", "webquestions_test.jsonl"):
        if not (given.data / name).exists():
            options.error(f"{given.data / name} is not there: give its folder with --data")
    changes = {field.name: getattr(given, field.name) for field in fields(Sizes)}
    changes = {name: value for name, value in changes.items() if value is not None}
    given.sizes = replace(SMOKE if given.smoke else Sizes(), **changes)
    given.seeds = range(1) if given.smoke else given.seeds
    given.results = results_folder(given)
    return given


def _seeds(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")] if "," in text else range(int(text))


if __name__ == "__main__":
    main()
