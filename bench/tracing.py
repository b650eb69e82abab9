"""Does the demo find its planted errors? The share of perturbed rows among the first matches, over several seeds.

    python -m bench.tracing --seeds 3 --work /tmp/tracing

Fine-tunes SmolLM2-135M on the demo's data (27 of whose 320 rows say Japan where India is meant), builds an index with
each recipe, and asks ten questions answered with Japan, by word and by sentence. Stage by stage in the work folder,
through the product's own functions; what is there already is kept. Seeds draw the adapter, the order of training, the
sketch and the second moment's examples.
"""

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

from bench.common import save
from rapidindex import Index, Query
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.demo.demo import EPOCHS, TEMPLATE, unpack_model
from rapidindex.model.finetune import finetune
from rapidindex.progress import Bars

RECIPES = {
    "default": {},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="where models and indexes are kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = str(files("rapidindex.demo") / "demo.jsonl")
    with Bars() as bars:
        unpack_model(options.work / "model", bars)
        runs = [run for seed in range(options.seeds) for run in one_seed(seed, data, options.work, bars)]
    examples = read_examples(data).examples
    base_rate = sum(example.meta["perturbed"] for example in examples) / len(examples)
    table = {
        recipe: {
            way: {
                str(top): _spread([run["share"][way][str(top)] for run in runs if run["recipe"] == recipe])
                for top in TOPS
            }
            for way in ("word", "sentence")
        }
        for recipe in RECIPES
    }
    path = save("tracing", {"base_rate": base_rate, "questions": len(QUESTIONS), "mean_and_range": table, "runs": runs})
    for recipe, ways in table.items():
        for way, tops in ways.items():
            told = "  ".join(
                f"top {top}: {mean:.2f} ({low:.2f} to {high:.2f})" for top, (mean, low, high) in tops.items()
            )
            bars.say(f"{recipe:<8} {way:<9} {told}")
    bars.say(f"base rate {base_rate:.3f}; written to {path}")


def one_seed(seed: int, data: str, work: Path, bars: Bars) -> list[dict]:
    """Fine-tune, build with every recipe, and ask: one run a recipe."""
    model, adapter = str(work / "model"), str(work / f"adapter-{seed}")
    encoding, started = EncodingConfig(TEMPLATE), time.perf_counter()
    options = FinetuneConfig(epochs=EPOCHS, seed=seed)
    tuned = finetune(read_examples(data), encoding, ModelConfig(model), options, adapter, progress=bars)
    runs = []
    for recipe, changes in RECIPES.items():
        index = work / f"{recipe}-{seed}"
        gradient, sketch = GradientConfig(**changes, seed=seed), SketchConfig(seed=seed)
        built = build(
            BuildRequest(data, str(index), ModelConfig(model, adapter), encoding, gradient, sketch), progress=bars
        )
        shares = {way: ask(Index.open(index), word) for way, word in (("word", "Japan"), ("sentence", None))}
        seconds = {"build": built.seconds, "all": time.perf_counter() - started}
        runs.append({"seed": seed, "recipe": recipe, "share": shares, "losses": tuned.epoch_losses, "seconds": seconds})
        bars.say(f"seed {seed}, {recipe}: {shares}")
    return runs


def ask(index: Index, word: str | None) -> dict[str, float]:
    """The mean share of perturbed rows among the first matches of the ten questions."""
    queries = [Query(prompt, answer, word) for prompt, answer in QUESTIONS.items()]
    results = index.query_many(queries, k=max(TOPS), heatmaps=False)
    hits = [[match.meta["perturbed"] for match in result.matches] for result in results]
    return {str(top): statistics.mean(sum(row[:top]) / top for row in hits) for top in TOPS}


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.mean(values), min(values), max(values)


if __name__ == "__main__":
    main()
