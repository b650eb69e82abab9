"""The linear datamodeling score: do summed scores of half of the rows predict the losses of a model trained on them?

    python -m bench.evidence.lds bank --retrainings 50 --work FOLDER          retrain on random halves
    python -m bench.evidence.lds bank --seed 1 --retrainings 10 --work FOLDER the same halves, another seed: the ceiling
    python -m bench.evidence.lds bank --dtype float32 --retrainings 2 …       does bfloat16 change what is found?
    python -m bench.evidence.lds scores --work FOLDER                         every method against the bank: lds.json

The bank is `lds_bank.json`: every retraining joins it as soon as it is done, and those that are there are never
repeated, so that several processes (one with `--first 25`), or later sessions, add to one bank. Rows are kept
by the id of their content alone: their texts are read from the data (`--data`).
"""

import argparse
import fcntl
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import circumstances, parser, results_folder, write_text
from bench.evidence.end_to_end import RECIPES, recipe_names
from bench.evidence.retraining import Retrainer, Row, Schedule
from rapidindex.caching.batches import Item, as_batch
from rapidindex.data.examples import Example, read_examples
from rapidindex.data.templates import Template
from rapidindex.demo.demo import unpack_model
from rapidindex.gradients.losses import Batch
from rapidindex.model.loading import quiet_libraries
from rapidindex.progress import Bars

BANK = "lds_bank"
TEMPLATE = "plain"
ORDER = ("text", "full", "kronecker", "two-sided", "rapidin", "representations", "datainf", "limit", "ekfac")
ORDER += ("rows", "fisher", "cg", "product")
"""The methods that are scored, those that take longest last."""
KS = (2**10, 2**12, 2**14, 2**16)


@dataclass(frozen=True)
class Choice:
    """Which rows are trained on, and which are asked about."""

    rows: int = 500
    queries: int = 100
    tokens: tuple[int, int] = (8, 28)
    """Bounds of a row's length, prompt and response."""
    response_tokens: int = 4
    """A response's tokens, at least."""
    seed: int = 0
    """Draws rows and queries."""


SMOKE = Choice(rows=24, queries=6, tokens=(4, 200))
SMOKE_SCHEDULE = Schedule(epochs=1, batch_size=8, layers=1, dtype="float32")


@dataclass(frozen=True)
class Chosen:
    """The rows and the queries, as examples and encoded (batches of one)."""

    rows: list[Example]
    queries: list[Example]
    row_batches: list[Batch]
    query_batches: list[Batch]


def choose(data: Path, tokenizer: Any, choice: Choice) -> Chosen:
    """Draw rows and queries among the examples of fitting length."""
    template, fitting = Template(TEMPLATE, tokenizer, choice.tokens[1] + 1), []
    for example in read_examples(str(data)).examples:
        encoding = template.encode(example)
        if choice.tokens[0] <= len(encoding.input_ids) <= choice.tokens[1]:
            if encoding.response_mask.sum() >= choice.response_tokens:
                fitting.append((example, as_batch([Item(example, encoding)], "cpu")))
    order = np.random.default_rng([choice.seed, 6]).permutation(len(fitting))
    drawn = [fitting[number] for number in order[: choice.rows + choice.queries]]
    if len(drawn) < choice.rows + choice.queries:
        raise SystemExit(f"{data} has {len(drawn)} fitting rows, not {choice.rows} + {choice.queries}.")
    examples, batches = zip(*drawn, strict=True)
    n = choice.rows
    return Chosen(list(examples[:n]), list(examples[n:]), list(batches[:n]), list(batches[n:]))


def subset(choice: Choice, number: int) -> np.ndarray:
    """Return the half of the rows that retraining `number` keeps, bool [rows]; all rows for -1."""
    kept = np.ones(choice.rows, bool)
    if number >= 0:
        kept[np.random.default_rng([choice.seed, 7, number]).permutation(choice.rows)[choice.rows // 2 :]] = False
    return kept


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        unpack_model(options.work / "model", bars)
        if options.what == "bank":
            fill(options, bars)
        else:
            from bench.evidence.lds_scores import score

            score(options, bars)


def parse() -> argparse.Namespace:
    """Read the command line; `choice` and `schedule` are the settings of the bank."""
    add = (options := parser(__doc__)).add_argument
    add("what", choices=("bank", "scores"))
    add("--data", type=Path, default=Path("../shared/data/alpaca_9k.jsonl"), help="the rows, alpaca_9k.jsonl")
    add("--seed", type=int, default=0, help="draws LoRA's A and the order of training")
    add("--first", type=int, default=-1, help="number of the first subset; -1 for all rows")
    add("--retrainings", type=int, default=50, help="number of subsets, those before --first counted")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the frozen weights")
    add("--model-dtype", choices=("bfloat16", "float32"), help="that of the model that is scored, if not the bank's")
    add("--only", type=lambda text: tuple(text.split(",")), default=ORDER, help="methods to score")
    add("--Ks", type=numbers, default=KS, help="lengths of RapidGrads, with commas between")
    add("--recipes", type=recipe_names, default=tuple(RECIPES), help="of the product's indexes, with commas between")
    given = options.parse_args()
    given.results_folder = results_folder(given)
    given.choice, given.schedule = (SMOKE, SMOKE_SCHEDULE) if given.smoke else (Choice(), Schedule())
    if given.smoke:
        given.retrainings = min(given.retrainings, 3)
    given.dtype = given.dtype or given.schedule.dtype
    given.model_dtype = given.model_dtype or given.dtype
    return given


def numbers(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them, for a command line."""
    return tuple(map(int, text.split(",")))


def fill(options: argparse.Namespace, bars: Bars) -> None:
    """Retrain on every subset that the bank lacks: all rows first, then the halves."""
    path = options.results_folder / f"{BANK}.json"
    retrainer, chosen = None, None
    for number in range(options.first, options.retrainings):
        if (options.seed, options.dtype, number) in done(path):
            continue
        if retrainer is None:
            retrainer = Retrainer(str(options.work / "model"), replace(options.schedule, dtype=options.dtype))
            chosen = choose(options.data, load_tokenizer(options.work / "model"), options.choice)
            rows, queries = retrainer.rows(chosen.row_batches), retrainer.rows(chosen.query_batches)
            begin(path, options, chosen)
        run = _retrained(retrainer, rows, queries, options, number, bars)
        append(path, run)
        if number < 0:
            retrainer.save(options.work / f"full-{options.dtype}-{options.seed}")
        bars.say(f"seed {options.seed}, {options.dtype}, {number}: {run['seconds']} s, {np.mean(run['losses']):.4f}")


def _retrained(
    retrainer: Retrainer, rows: list[Row], queries: list[Row], options: argparse.Namespace, number: int, bars: Bars
) -> dict[str, Any]:
    started, worked = time.perf_counter(), time.process_time()
    retrainer.retrain(rows, subset(options.choice, number), options.seed, progress=bars)
    losses = retrainer.evaluate(queries)
    return {
        "seed": options.seed,
        "dtype": options.dtype,
        "subset": number,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "losses": [round(float(loss), 5) for loss in losses],
    }


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer alone."""
    from transformers import AutoTokenizer

    with quiet_libraries():
        return AutoTokenizer.from_pretrained(model)


def done(path: Path) -> set[tuple[int, str, int]]:
    """Return (seed, dtype, subset) of every retraining in the bank."""
    runs = json.loads(path.read_text())["figures"]["retrainings"] if path.exists() else []
    return {(run["seed"], run["dtype"], run["subset"]) for run in runs}


def begin(path: Path, options: argparse.Namespace, chosen: Chosen) -> None:
    """Start the bank where there is none. SystemExit where it is of other rows or another schedule."""
    schedule = {name: value for name, value in asdict(options.schedule).items() if name != "dtype"}
    fixed = {
        "choice": asdict(options.choice) | {"tokens": list(options.choice.tokens)},
        "schedule": schedule,
        "template": TEMPLATE,
        "rows": [example.id for example in chosen.rows],
        "queries": [example.id for example in chosen.queries],
    }
    with _locked(path):
        if not path.exists():
            subsets = [np.packbits(subset(options.choice, number)).tobytes().hex() for number in range(100)]
            _write(path, {**circumstances(), "figures": {**fixed, "subsets": subsets, "retrainings": []}})
    found = json.loads(path.read_text())["figures"]
    if different := [name for name, value in fixed.items() if found[name] != value]:
        raise SystemExit(f"{path} is a bank of other {', '.join(different)}: give another --results.")


def append(path: Path, run: dict[str, Any]) -> None:
    """Add a retraining to the bank, whatever other processes add meanwhile."""
    with _locked(path):
        content = json.loads(path.read_text())
        content["figures"]["retrainings"].append(run)
        content |= {name: value for name, value in circumstances().items() if name in ("command", "commit", "time")}
        _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content)
    write_text(path, text.replace('{"seed"', '\n{"seed"').replace('"subsets"', '\n"subsets"') + "\n")


class _locked:
    """Keeps other processes from changing the bank."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.name}.lock")

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: Any) -> None:
        self.file.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
