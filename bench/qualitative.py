"""Reports for the paper's prompts (Figures 4 and 8 to 21), to be looked at.

    python -m bench.qualitative --data ../shared/data/alpaca_9k.jsonl --work FOLDER

SmolLM2-135M is fine-tuned for an epoch (rank-16 LoRA) on a part of Alpaca: all rows on the prompts' topics, and others
drawn at random. The rows on the topics and some of the others are indexed. The model answers each prompt, and the index
is asked about the answer as `rapidindex query --html` asks. Finished stages are kept. The reports go to FOLDER/reports;
bench/results/qualitative.json has scores and ids alone, for Alpaca's text may not be redistributed.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from bench.common import parser, save
from rapidindex.caching.build import build
from rapidindex.config import BuildConfig, BuildRequest, EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import read_examples
from rapidindex.demo.demo import unpack_model
from rapidindex.model.finetune import finetune
from rapidindex.progress import Bars, Progress
from rapidindex.query.index import Index
from rapidindex.results import Result
from rapidindex.views.wording import verdict

PROMPTS = {
    "flu": ("What are the symptoms of the flu?", r"\bflu\b|influenza"),
    "artificial-intelligence": ("What is artificial intelligence?", r"artificial intelligence|\bAI\b"),
    "relativity": ("Explain the theory of relativity.", r"relativity|einstein"),
    "mona-lisa": ("Who painted the Mona Lisa?", r"mona lisa|leonardo|painting"),
    "great-wall": ("What's the history of the Great Wall of China?", r"great wall|china|chinese"),
    "flat-tire": ("How do I change a flat tire?", r"\btires?\b|\bcar\b"),
    "hubble": ("What is the Hubble Space Telescope?", r"hubble|telescope|\bspace\b"),
    "weather": ("What is the weather forecast for today?", r"weather|forecast"),
    "covid": ("What's the latest news on COVID-19?", r"covid|pandemic|coronavirus"),
    "polar-bears": ("What are the effects of climate change on polar bears?", r"climate change|polar bear"),
    "stress": ("How do I reduce stress and anxiety?", r"stress|anxiety"),
    "internet": ("How does the internet work?", r"internet"),
    "faucet": ("How do I fix a leaking faucet?", r"faucet|leak|plumb"),
    "pizza": ("How do I make homemade pizza dough?", r"pizza|dough"),
    "bedtime-story": ("Tell me a bedtime story.", r"bedtime|\bstory\b"),
}
"""Each prompt, and the pattern of the training rows on its topic."""
TOPICS = (
    r"\bflu\b|influenza|artificial intelligence|relativity|einstein|mona lisa|leonardo|great wall|flat tire|hubble|"
    r"telescope|weather forecast|covid|polar bear|reduce stress|anxiety|internet work|leak|pizza|bedtime story"
)
"""The pattern of the rows that the model is always fine-tuned on."""


def main() -> None:
    add = (options := parser(__doc__, data=True)).add_argument
    add("--rows", type=int, default=1600)
    add("--indexed", type=int, default=600, help="rows of these whose influence is asked about")
    add("--only", default=",".join(PROMPTS), help="names of prompts, separated by commas")
    add("-k", type=int, default=5)
    options = options.parse_args()
    if options.smoke:
        options.rows, options.indexed, options.only = 24, 16, "pizza"
    (options.work / "reports").mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        make(options, bars)
        index = Index.open(options.work / "index")
        figures = {name: report_once(index, name, options, bars) for name in options.only.split(",")}
        path = save("qualitative", figures, options)
        bars.say(f"written to {path}, and the reports to {options.work / 'reports'}")


def make(options: argparse.Namespace, progress: Progress) -> None:
    """Make the part of the data, the adapter and the index, as far as they are missing."""
    work = options.work
    unpack_model(work / "model", progress)
    part, indexed = work / "part.jsonl", work / "indexed.jsonl"
    for source, made, count in ((Path(options.data), part, options.rows), (part, indexed, options.indexed)):
        if not made.exists():
            made.write_text("".join(choose(source.read_text().splitlines(keepends=True), count)))
    base, adapter = ModelConfig(str(work / "model")), work / "adapter"
    finetune(read_examples(part), EncodingConfig(), base, FinetuneConfig(epochs=1), adapter, progress=progress)
    pace, model = BuildConfig(shard_seconds=60), ModelConfig(base.model, str(adapter))
    build(BuildRequest(str(indexed), str(work / "index"), model, work=pace), progress=progress)


def choose(lines: list[str], rows: int) -> list[str]:
    """Return the rows of the topics, and others drawn at random, in the file's order."""
    of_topics = [number for number, line in enumerate(lines) if re.search(TOPICS, line, re.IGNORECASE)]
    others = sorted(set(range(len(lines))) - set(of_topics))
    random.Random(0).shuffle(others)
    return [lines[number] for number in sorted([*of_topics, *others[: max(0, rows - len(of_topics))]])]


def report_once(index: Index, name: str, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Return the figures of the report on a prompt, from the work folder where it was made before."""
    path = options.work / "reports" / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(report(index, name, options, bars)))
    return json.loads(path.read_text())


def report(index: Index, name: str, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write the report on a prompt; return its figures, without its text."""
    prompt, topic = PROMPTS[name]
    bars.say(prompt)
    how = {"k": options.k, "max_new_tokens": 48, "answer_scores": True, "all": True}
    result = index.query(prompt, **how)
    opponents = index.query(prompt, answer=result.query.answer, opponents=True, **how)
    command = f"rapidindex query index {json.dumps(prompt)} --html reports/{name}.html"
    page = result.to_html(opponents=opponents, command=command)
    (options.work / "reports" / f"{name}.html").write_text(page, "utf-8")
    lines = (options.work / "indexed.jsonl").read_text().splitlines()
    base_rate = sum(bool(re.search(topic, line, re.IGNORECASE)) for line in lines) / len(lines)
    about = {"prompt": prompt, "answer": result.query.answer, "topic": topic, "base_rate": round(base_rate, 4)}
    return about | {one.direction: summarize(one, topic) for one in (result, opponents)}


def summarize(result: Result, topic: str) -> dict[str, Any]:
    """Return the scores of each match, whether it is on the topic, and the product's verdict on all."""
    matches = [
        {
            "id": match.id,
            "score": round(match.score, 4),
            "exact_score": round(match.exact_score, 4),
            "on_topic": bool(re.search(topic, f"{match.prompt} {match.response}", re.IGNORECASE)),
        }
        for match in result.matches
    ]
    above = (result.matches[0].score - result.summary.mean) / result.summary.std if result.summary else None
    return {"matches": matches, "standard_deviations": above and round(above, 1), "verdict": verdict(result)}


if __name__ == "__main__":
    main()
