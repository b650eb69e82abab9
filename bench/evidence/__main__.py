"""Does it find what was planted? The paper's two experiments on SmolLM2-135M, against every baseline.

    python -m bench.evidence --task backdoor --seeds 5 --rows 1000 --work FOLDER
    python -m bench.evidence --task tracing --seeds 5 --rows 1000 --work FOLDER
    python -m bench.evidence --smoke --work FOLDER           both tasks, tiny, in under 15 minutes
    python -m bench.render evidence                          tables and plots, from the JSON alone

Each stage is kept under FOLDER and skipped where it is there: the same command goes on after a kill. `--only` names
methods (text, full, rapidin, datainf, limit, early, product, lissa, ekfac, kronecker); further ones can be run later,
and with `--add` their figures join those in the JSON, wherever the earlier ones were computed. A seed takes 15 MB of
disk an example for its whole gradients at two models, removed with --clean when its methods are done.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.common import RESULTS


def main() -> None:
    options = parse()
    from bench.evidence.seeds import run

    for task in ("backdoor", "tracing") if options.task == "both" else (options.task,):
        run(task, options)


def parse() -> argparse.Namespace:
    """The command line; `sizes` holds what the run is sized by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("backdoor", "tracing", "both"), default="both")
    parser.add_argument("--seeds", type=_seeds, default=range(5), help="how many, or with commas between which ones")
    parser.add_argument("--work", type=Path, required=True, help="where every stage is kept")
    parser.add_argument("--only", help="methods, separated by commas")
    parser.add_argument("--product-seeds", type=int, default=1, help="seeds for which the product builds its own index")
    parser.add_argument("--smoke", action="store_true", help="everything, tiny, one seed; results go under --work")
    parser.add_argument("--clean", action="store_true", help="remove a seed's whole gradients when it is done")
    parser.add_argument("--add", action="store_true", help="keep the earlier results' other methods")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="alpaca_9k and webquestions_test")
    parser.add_argument("--results", type=Path, help="where the JSON goes; bench/results by default")
    sizes = ("rows", "epochs", "batch-size", "prompts", "queries")
    for name in (*sizes, "lissa-depth", "lissa-queries", "ekfac-rows", "max-length"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("Ks", "shuffles"):
        parser.add_argument(f"--{name}", type=lambda text: tuple(map(int, text.split(","))), help="with commas between")
    parser.add_argument("--share", type=float)
    for name in ("template", "dtype"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    options.results = options.results or (options.work / "results" if options.smoke else RESULTS)
    _size(options, parser)
    return options


def _size(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from bench.evidence.run import METHODS, SMOKE, Sizes

    options.methods = tuple(options.only.split(",")) if options.only else METHODS
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; choose among {', '.join(METHODS)}")
    options.seeds = range(1) if options.smoke else options.seeds
    sizes = SMOKE if options.smoke else Sizes()
    given = {name: getattr(options, name) for name in sizes.__dataclass_fields__ if hasattr(options, name)}
    options.sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    for name in ("alpaca_9k.jsonl", "webquestions_test.jsonl"):
        if not (options.data / name).exists():
            parser.error(f"{options.data / name} is not there: give its folder with --data")


def _seeds(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")] if "," in text else range(int(text))


if __name__ == "__main__":
    main()
