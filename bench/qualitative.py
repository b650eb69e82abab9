"""Reports for the paper's prompts (Figures 4 and 8 to 21), to be looked at.

    python -m bench.qualitative --data ../shared/data/alpaca_9k.jsonl --work FOLDER

SmolLM2-135M is fine-tuned for an epoch (rank-16 LoRA) on a part of Alpaca: all rows that touch on the prompts' topics,
and others drawn at random; the topics' rows and some of the others are indexed. Each prompt is then answered by the
model, and asked about as `rapidindex query --html` does. What is there already is kept. The reports go to
FOLDER/reports; bench/results/qualitative.json says what was found, by scores and ids alone: Alpaca's text is not for
redistribution.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from bench.common import save
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
"""Each prompt, and what a training row of its topic says."""
TOPICS = (
    r"\bflu\b|influenza|artificial intelligence|relativity|einstein|mona lisa|leonardo|great wall|flat tire|hubble|"
    r"telescope|weather forecast|covid|polar bear|reduce stress|anxiety|internet work|leak|pizza|bedtime story"
)
"""Rows that the model is fine-tuned on whatever the draw."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a training file; the figures take alpaca_9k.jsonl")
    parser.add_argument(
        "--work", required=True, type=Path, help="where the adapter, the index and the reports are made"
    )
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--indexed", type=int, default=600, help="of these, those whose influence is asked about")
    parser.add_argument("--only", default=",".join(PROMPTS), help="names of prompts, by comma")
    parser.add_argument("-k", type=int, default=5)
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        make(options.data, work, options.rows, options.indexed, bars)
        index = Index.open(work / "index")
        told = {name: kept(index, name, options, bars) for name in options.only.split(",")}
        bars.say(f"written to {save('qualitative', told)}, and the reports to {work / 'reports'}")


def make(data: str, work: Path, rows: int, indexed: int, progress: Progress) -> None:
    """The part of the data, the adapter and the index, as far as they are not there."""
    unpack_model(work / "model", progress)
    part, fewer = work / "part.jsonl", work / "indexed.jsonl"
    for source, made, count in ((Path(data), part, rows), (part, fewer, indexed)):
        if not made.exists():
            made.write_text("".join(chosen(source.read_text().splitlines(keepends=True), count)))
    model = ModelConfig(str(work / "model"))
    dataset = read_examples(part)
    finetune(dataset, EncodingConfig(), model, FinetuneConfig(epochs=1), work / "adapter", progress=progress)
    adapted = ModelConfig(str(work / "model"), str(work / "adapter"))
    build(BuildRequest(str(fewer), str(work / "index"), adapted, work=BuildConfig(shard_seconds=60)), progress=progress)


def chosen(lines: list[str], rows: int) -> list[str]:
    """The rows of the topics, and others drawn at random, in the file's order."""
    of_topics = [number for number, line in enumerate(lines) if re.search(TOPICS, line, re.IGNORECASE)]
    others = sorted(set(range(len(lines))) - set(of_topics))
    random.Random(0).shuffle(others)
    return [lines[number] for number in sorted([*of_topics, *others[: rows - len(of_topics)]])]


def kept(index: Index, name: str, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """What `asked` says, from the work folder where it was said before."""
    path = options.work / "reports" / f"{name}.json"
    if not path.exists():
        told = asked(index, name, options, bars)
        path.write_text(json.dumps(told))
    return json.loads(path.read_text())


def asked(index: Index, name: str, options: argparse.Namespace, bars: Bars) -> dict[str, Any]:
    """Write the report on a prompt; what it holds, without its text."""
    prompt, topic = PROMPTS[name]
    bars.say(prompt)
    how = {"k": options.k, "max_new_tokens": 48, "answer_scores": True}
    result = index.query(prompt, **how)
    against = index.query(prompt, answer=result.query.answer, opponents=True, **how)
    reports = options.work / "reports"
    reports.mkdir(exist_ok=True)
    command = f"rapidindex query index {json.dumps(prompt)} --html reports/{name}.html"
    (reports / f"{name}.html").write_text(result.to_html(opponents=against, command=command), "utf-8")
    lines = (options.work / "indexed.jsonl").read_text().splitlines()
    base_rate = sum(bool(re.search(topic, line, re.IGNORECASE)) for line in lines) / len(lines)
    told = {"prompt": prompt, "answer": result.query.answer, "topic": topic, "base_rate": round(base_rate, 4)}
    return told | {found.direction: described(found, topic) for found in (result, against)}


def described(found: Result, topic: str) -> dict[str, Any]:
    """Of each match its scores and whether it is on the topic; and what the product says of them."""
    matches = [
        {
            "id": match.id,
            "score": round(match.score, 4),
            "exact_score": round(match.exact_score, 4),
            "on_topic": bool(re.search(topic, f"{match.prompt} {match.response}", re.IGNORECASE)),
        }
        for match in found.matches
    ]
    above = (found.matches[0].score - found.summary.mean) / found.summary.std if found.summary else None
    return {"matches": matches, "standard_deviations": above and round(above, 1), "verdict": verdict(found)}


if __name__ == "__main__":
    main()
