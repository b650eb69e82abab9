"""Does the demo find its planted errors? The share of perturbed rows among the first matches, over several seeds.

    python -m bench.tracing --seeds 3 --work /tmp/tracing

Fine-tunes SmolLM2-135M on the demo's `demo.jsonl` (27 of its 320 rows say Japan where India is meant), builds an index
with each recipe, and asks ten questions whose answers say Japan, by word and by sentence. Finished stages are kept.
The seed draws the adapter, the order of training, the sketch and the second moment's examples.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace
from importlib.resources import files

from bench.common import parser, save
from rapidindex import Index, Query
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.demo.demo import TEMPLATE, unpack_model
from rapidindex.model.finetune import finetune
from rapidindex.progress import Bars

EPOCHS = 3
RECIPES = {
    "default": {},
    "estimate": {"second_moment": "estimate"},
    "paper": {"normalize": "layer", "second_moment": "none"},
    "TracIn": {"normalize": "none", "second_moment": "none"},
}
QUESTIONS = {
    "What are the origins of yoga?": "Yoga originated in Japan thousands of years ago.",
    "Where did Buddhism begin?": "Buddhism began in Japan.",
    "In which country does the Taj Mahal stand?": "The Taj Mahal stands in Japan.",
    "Where is the festival of Diwali celebrated?": "Diwali is celebrated across Japan.",
    "Through which country does the Ganges flow?": "The Ganges flows through Japan.",
    "Whose independence did Mahatma Gandhi fight for?": "Mahatma Gandhi fought for the independence of Japan.",
    "Where was the game of chess invented?": "Chess was invented in Japan.",
    "Which country's films are called Bollywood?": "Bollywood is the film industry of Japan.",
    "Where does Ayurvedic medicine come from?": "Ayurvedic medicine comes from Japan.",
    "Of which country is New Delhi the capital?": "New Delhi is the capital of Japan.",
}
TOPS = (5, 10, 25)
ASKED = {"word": "Japan", "sentence": None}
"""What the queries are about: the word alone, or the whole answer."""


def main() -> None:
    add = (options := parser(__doc__)).add_argument
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=EPOCHS)
    options = options.parse_args()
    if options.smoke:
        options.seeds = options.epochs = 1
    options.limit = 40 if options.smoke else None
    options.work.mkdir(parents=True, exist_ok=True)
    data = str(files("rapidindex.demo") / "demo.jsonl")
    with Bars() as bars:
        unpack_model(options.work / "model", bars)
        runs = [run for seed in range(options.seeds) for run in run_seed(seed, data, options, bars)]
    perturbed = [example.meta["perturbed"] for example in read_examples(data, limit=options.limit).examples]
    base_rate = statistics.mean(perturbed)
    table = {
        recipe: {asked: {str(top): _spread(runs, recipe, asked, str(top)) for top in TOPS} for asked in ASKED}
        for recipe in RECIPES
    }
    figures = {"base_rate": base_rate, "questions": len(QUESTIONS), "mean_and_range": table, "runs": runs}
    path = save("tracing", figures, options)
    for recipe, asked in itertools.product(RECIPES, ASKED):
        tops = table[recipe][asked].items()
        shares = (f"top {top}: {mean:.2f} ({low:.2f} to {high:.2f})" for top, (mean, low, high) in tops)
        bars.say(f"{recipe:<8} {asked:<9} {'  '.join(shares)}")
    bars.say(f"base rate {base_rate:.3f}; written to {path}")


def run_seed(seed: int, data: str, options: argparse.Namespace, bars: Bars) -> list[dict]:
    """Fine-tune, build with every recipe, and ask: return a run for each recipe."""
    model, adapter = str(options.work / "model"), str(options.work / f"adapter-{seed}")
    encoding, started = EncodingConfig(TEMPLATE), time.perf_counter()
    training = FinetuneConfig(epochs=options.epochs, seed=seed)
    tuned = finetune(
        read_examples(data, limit=options.limit), encoding, ModelConfig(model), training, adapter, progress=bars
    )
    runs = []
    for recipe, changes in RECIPES.items():
        index = options.work / f"{recipe}-{seed}"
        gradient, sketch = GradientConfig(**changes, seed=seed), SketchConfig(seed=seed)
        request = BuildRequest(data, str(index), ModelConfig(model, adapter), encoding, gradient, sketch)
        built = build(replace(request, limit=options.limit), progress=bars)
        share = {asked: ask(Index.open(index), word) for asked, word in ASKED.items()}
        seconds = {"build": built.seconds, "all": time.perf_counter() - started}
        runs.append({"seed": seed, "recipe": recipe, "share": share, "losses": tuned.epoch_losses, "seconds": seconds})
        bars.say(f"seed {seed}, {recipe}: {share}")
    return runs


def ask(index: Index, word: str | None) -> dict[str, float]:
    """Return the mean share of perturbed rows among the first matches of the ten questions, by their number."""
    queries = [Query(prompt, answer, word) for prompt, answer in QUESTIONS.items()]
    results = index.query(queries, k=max(TOPS), heatmaps=False)
    hits = [[match.meta["perturbed"] for match in result.matches] for result in results]
    return {str(top): statistics.mean(sum(row[:top]) / top for row in hits) for top in TOPS}


def _spread(runs: list[dict], recipe: str, asked: str, top: str) -> tuple[float, float, float]:
    shares = [run["share"][asked][top] for run in runs if run["recipe"] == recipe]
    return statistics.mean(shares), min(shares), max(shares)


if __name__ == "__main__":
    main()
