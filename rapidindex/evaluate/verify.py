"""Put an attribution to the test: do its matches move the words that they are said to have made?

A step along a row's own gradient moves the words by about the product of two gradients, which is what the score
estimates: it shows that the row *can* move them, and how many nats a score is worth. What informs is the text baseline
beside it. Whether the model would have said it without the rows, only a retraining shows.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.caching.batches import batches_of
from rapidindex.config import QueryOptions, VerifyOptions
from rapidindex.encoder.parts import correlation
from rapidindex.errors import DataError, UsageError
from rapidindex.evaluate.controls import Pool
from rapidindex.evaluate.retrain import Announce, Training, read
from rapidindex.evaluate.steps import Effect, Gradient, OptimizerOf, Steps, adamw, sgd
from rapidindex.gradients.losses import layers_of
from rapidindex.gradients.second_moment import read_second_moment
from rapidindex.model.model import LoadedModel
from rapidindex.progress import Progress, silent
from rapidindex.query.checkpoints import CheckpointsIndex
from rapidindex.query.encode import EncodedQuery, selected_batch
from rapidindex.query.index import Index, model_work
from rapidindex.query.questions import Query, as_query
from rapidindex.results import Result, Trial, TrialGroup, Verification


def verify(
    index: Index,
    query: Any,
    options: VerifyOptions | None = None,
    *,
    announce: Announce = lambda runs, seconds: None,
    progress: Progress = silent,
    **changes: Any,
) -> Verification:
    """Measure what the first matches of a query do to the chosen words of its answer, beside what other rows do.

    `query` is what `Index.query` takes for one question; of an index of several checkpoints the first is asked, and its
    model alone is loaded. `options` may be given field by field: `top=5, optimizer="adamw"`. The model's weights are
    put back after each step, whatever happens. Before a retraining `announce` is told the number of trainings that are
    to come and the seconds that they will take together; it may raise to stop. `progress` gets ("take steps", done,
    total), or each training's steps.

    Raises as `Index.query` does, UsageError where there are too few examples for controls or it is not known how the
    model was trained, DataError where the training data is gone, and the errors of `finetune`.
    """
    started, options = time.perf_counter(), replace(options or VerifyOptions(), **changes)
    if isinstance(index, CheckpointsIndex):
        index = index.checkpoint(index.names[0])
    asked = QueryOptions(options.top, level="sentence", heatmaps=False, max_new_tokens=options.max_new_tokens)
    question = query if isinstance(query, EncodedQuery) else as_query(query)
    (encoded,) = index.encode([question], asked)
    found = index.query(encoded, options=asked)
    if options.method == "retrain":
        if isinstance(question, EncodedQuery):
            raise UsageError("A retraining takes a question with its prompt.", hint="Give a Query, a dict or a text.")
        measured = _retrained(index, question, encoded, found, options, announce, progress)
    else:
        measured = _stepped(index, encoded, found, options, progress)
    seconds = time.perf_counter() - started
    return Verification(options.method, found.index, encoded.info, **measured, seconds=seconds)


def _stepped(
    index: Index, query: EncodedQuery, found: Result, options: VerifyOptions, progress: Progress
) -> dict[str, Any]:
    """Return the fields of a verification by steps."""
    pool = Pool.of(index)
    pool.check(options.top)
    against = QueryOptions(options.top, level="sentence", heatmaps=False, opponents=True)
    top, opponents = (
        [pool.by_id[match.id] for match in result.matches] for result in (found, index.query(query, options=against))
    )
    patch = TailPatch(index, query, pool, options, progress)
    groups = {
        "top": top,
        "bm25": pool.found_by_words(query, options.top),
        "least": pool.least(index, query, options.top, options.seed),
        "opponents": opponents,
    }
    tried = patch.try_groups(groups, pool.draws(top, options.draws, options.seed))
    return {
        "log_probability": patch.steps.log_probability,
        "probability": exp(patch.steps.log_probability),
        "groups": tried,
        "optimizer": patch.optimizer,
        "learning_rate": patch.rate,
        **_calibration(list(patch.alone.values())),
    }


def _retrained(
    index: Index,
    question: Query,
    query: EncodedQuery,
    found: Result,
    options: VerifyOptions,
    announce: Announce,
    progress: Progress,
) -> dict[str, Any]:
    """Return the fields of a verification by retraining."""
    training = Training.of(index, options)
    pool = Pool.of(index).only({example.id for example in training.dataset.examples})
    top = [match.id for match in found.matches]
    if missing := [id for id in top if id not in pool.by_id]:
        raise DataError(
            f"{len(missing)} of the {len(top)} matches are not in {training.dataset.path}: they were not trained on.",
            hint="Give the data that the model was trained on, with --data, or build the index from it.",
        )
    pool.check(options.top)
    draws = pool.draws([pool.by_id[id] for id in top], options.repeats, options.seed)
    runs = {} if training.same_run else {"with all rows": frozenset()}
    runs["without the matches"] = frozenset(top)
    for number, draw in enumerate(draws, 1):
        runs[f"without random rows {number}"] = frozenset(pool.examples[place].id for place in draw)
    left = [without for without in runs.values() if not training.is_done(without)]
    if left:
        announce(len(left), len(left) * training.seconds(index))
    readings = {}
    for name, without in runs.items():
        model = training.run(without, partial(_as_stage, progress, f"train {name}"))
        readings[name] = read(index, model, query, question, options.max_new_tokens)
    before = readings.get("with all rows") or read(index, index.loaded, query, question, options.max_new_tokens)
    trials = [readings[name].change(before, without) for name, without in runs.items() if without]
    return {
        "log_probability": before.log_probability,
        "probability": exp(before.log_probability),
        "groups": [TrialGroup("top", [], trials[:1]), TrialGroup("random", [], trials[1:])],
        "answer": before.answer,
        "same_run": training.same_run,
    }


def _as_stage(progress: Progress, stage: str, _: str, done: int, total: int, note: str = "") -> None:
    """Report the progress of one training among several under its own name."""
    progress(stage, done, total, note)


class TailPatch:
    """Takes a step on single examples of an index, and on groups of them, and measures each on one query's words.

    An example's own step is taken once, whatever groups it is in. The model is free for others between two steps.
    """

    def __init__(
        self, index: Index, query: EncodedQuery, pool: Pool, options: VerifyOptions, progress: Progress = silent
    ) -> None:
        self.index, self.query, self.pool, self.options, self.progress = index, query, pool, options, progress
        self.optimizer, optimizer_of = _optimizer(options.optimizer, index.loaded)
        with model_work:
            question = selected_batch(query.encoding, query.info.selection, index.loaded.device)
            self.steps = Steps(index.loaded.model, question, optimizer_of)
        self.rate = options.learning_rate or 0.0
        """The step's learning rate; 0 until the first draws have set it."""
        self.alone: dict[int, Trial] = {}
        self.done = self.total = 0

    def try_groups(self, groups: dict[str, list[int]], draws: list[list[int]]) -> list[TrialGroup]:
        """Return the trials of these places of the pool, of the random draws, and of unlearning the first group."""
        firsts = [draw[0] for draw in draws]
        self.total = len({at for places in (firsts, *groups.values()) for at in places}) + len(draws) + len(groups) + 1
        self.rate = self.rate or self._default_rate(firsts)
        tried = [
            TrialGroup(name, list(map(self.alone_at, at)), [self.together(at)]) for name, at in groups.items() if at
        ]
        random = TrialGroup("random", list(map(self.alone_at, firsts)), list(map(self.together, draws)))
        unlearned = TrialGroup("unlearned", [], [self.together(next(iter(groups.values())), sign=-1.0)])
        return [*tried, random, unlearned]

    def alone_at(self, place: int) -> Trial:
        """Return the trial of one example."""
        if place not in self.alone:
            score = float(self.pool.scores(self.index, self.query, np.array([place]))[0])
            self.alone[place] = replace(self.together([place]), score=score)
        return self.alone[place]

    def together(self, places: Sequence[int], sign: float = 1.0) -> Trial:
        """Return the trial of one step on all of these examples, whose losses are summed; `sign` -1 unlearns them."""
        with model_work:
            gradient = self._gradient(places)
            effect = self.steps([sign * part for part in gradient], self.rate)
        self.done += 1
        self.progress("take steps", self.done, max(self.done, self.total))
        return _trial([self.pool.examples[place].id for place in places], effect)

    def _gradient(self, places: Sequence[int]) -> Gradient:
        examples = map(self.pool.examples.__getitem__, places)
        return self.steps.gradient(batches_of(examples, self.index.template, self.index.loaded.device))

    def _default_rate(self, places: Sequence[int]) -> float:
        with model_work:
            return self.steps.default_rate(self._gradient([place]) for place in places)


def _optimizer(name: str, loaded: LoadedModel) -> tuple[str, OptimizerOf]:
    """Return the optimizer in words, and what makes it."""
    if name == "sgd":
        return "SGD", sgd
    folder = Path(loaded.config.adapter or loaded.config.model)
    if not (folder / "optimizer.pt").is_file():
        return "AdamW without a state", adamw(None)
    moment = read_second_moment(folder, loaded.model, layers_of(loaded.model))
    return "AdamW with the checkpoint's second moment", adamw(moment.to(loaded.device))


def _trial(ids: list[str], effect: Effect) -> Trial:
    return Trial(ids, effect.log_probability, effect.probability, effect.predicted)


def _calibration(trials: list[Trial]) -> dict[str, float | None]:
    """Return how predictions and scores agree with what was measured, over rows that were tried alone."""
    measured, predicted, scores = (
        np.array([getattr(trial, name) for trial in trials]) for name in ("log_probability", "predicted", "score")
    )
    squares = float((scores**2).sum())
    return {
        "prediction_correlation": _correlation(predicted, measured),
        "score_correlation": _correlation(scores, measured),
        "nats_per_score": float((scores * measured).sum()) / squares if squares else None,
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Pearson's correlation; None for fewer than three values, or where one side is constant."""
    return correlation(one, other) if len(one) >= 3 else None
