"""An index of several checkpoints of one training: each is asked as any other index, and so is their sum.

Which checkpoint gradients are of decides what they find: facts are found at a finished model, behaviours that many rows
taught alike at an early one. The first checkpoint answers, and is compared with the others; a question to all of them
is about the same answer, token for token. The sum is TracIn's (arXiv 2002.08484), over all rows: no search index has
it.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from shlex import quote
from typing import Any

import numpy as np

from rapidindex.config import QueryOptions
from rapidindex.errors import ConfigMismatch, UsageError
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.model.model import LoadedModel
from rapidindex.query.encode import EncodedQuery, selected_batch, stack_rows
from rapidindex.query.events import Answered, Event, Ranked
from rapidindex.query.index import Index, model_work
from rapidindex.query.influence import Candidate, Influence
from rapidindex.results import Agreement, Match, Result
from rapidindex.search.exact import SearchResult, live_scores, ranked
from rapidindex.store import Checkpoints, Rows

SUM, BEST = "sum", "best"
COMPARED = 10
"""Matches that checkpoints are compared by."""


@dataclass(frozen=True)
class EncodedAt(EncodedQuery):
    """A question at several checkpoints: its own fields are those of the first."""

    at: dict[str, EncodedQuery] = field(default_factory=dict)
    """The question at each checkpoint, by its name."""


class CheckpointsIndex(Index):
    """The indexes of several checkpoints. What is asked of no checkpoint in particular is asked of the first."""

    def __init__(
        self, several: Checkpoints, *, model: Any = None, adapter: Any = None, tokenizer: Any = None, device: str
    ) -> None:
        self.several = several
        self._places = {"model": model, "adapter": adapter, "tokenizer": tokenizer, "device": device}
        self._members: dict[str, Index] = {}
        self._opening, self._ray = threading.Lock(), None
        first = next((name for name, place in several.folders.items() if place.is_dir()), next(iter(several.weights)))
        self._first = self.checkpoint(first)
        super().__init__(self._first.store, self._first._model)

    @property
    def names(self) -> list[str]:
        """The names of the checkpoints, the default one first."""
        return list(self.several.weights)

    def checkpoint(self, name: str) -> Index:
        """Return the index of one checkpoint.

        UsageError where there is none of that name, StoreError where it is gone, ConfigMismatch where its gradients are
        not of the same layers, or its tokens not of the same tokenizer, as those of the first.
        """
        with self._opening:  # of two threads that ask at once, each would load a model of its own
            return self._member(name)

    def _member(self, name: str) -> Index:
        if name not in self.several.weights:
            known = ", ".join((*self.several.weights, SUM, BEST))
            raise UsageError(f"--checkpoint {name!r} is unknown.", hint=f"Choose one of: {known}.")
        if name not in self._members:
            opened = Index.open(self.several.folder(name), **self._places)
            if self._members and not _alike(opened, self._first):
                raise ConfigMismatch(
                    f"{opened.store.path} is not of the same training as {self._first.store.path}.",
                    hint=f"Ask it alone: rapidindex query {quote(str(opened.store.path))} …",
                )
            opened.ray = self._ray
            self._members[name] = opened
        return self._members[name]

    @property
    def ray(self) -> str | None:
        """The Ray cluster whose nodes search together, for each checkpoint."""
        return self._ray

    @ray.setter
    def ray(self, address: str | None) -> None:
        self._ray = address
        for index in self._members.values():
            index.ray = address

    @property
    def loaded(self) -> LoadedModel:
        """The model of the first checkpoint."""
        return self._first.loaded

    @property
    def is_loaded(self) -> bool:
        """Whether the model of the first checkpoint is in memory."""
        return self._first.is_loaded

    def use(self, loaded: LoadedModel) -> None:
        """Take the first checkpoint's model."""
        self._first.use(loaded)

    def compressor_of(self, level: str) -> Compressor:
        """Return the first checkpoint's compressor of queries to a level."""
        return self._first.compressor_of(level)

    @property
    def influence(self) -> Influence:
        """Computes uncompressed influences at the first checkpoint."""
        return self._first.influence

    def info(self) -> dict[str, Any]:
        """Return what `Index.info` says of the first checkpoint, and of each by its name under `checkpoints`."""
        each = {name: self.checkpoint(name).info() for name in self.names}
        weights = {"weights": self.several.weights, "weighted": self.several.weighted}
        return self._first.info() | {"path": str(self.several.path), "checkpoints": each, **weights}

    def load(self, options: QueryOptions) -> None:
        """Load the models of the checkpoints that are asked."""
        for name in self._asked(options):
            self.checkpoint(name).load(options)

    def encode(self, queries: Iterable[Any], options: QueryOptions | None = None) -> list[EncodedQuery]:
        """Answer queries at the checkpoint that is asked, or the first, and compute their gradients at each asked."""
        options = options or QueryOptions()
        names, alone = self._asked(options), replace(options, checkpoint=None)
        for name in names:
            self.checkpoint(name).encode([], alone)
        return [self._encode_at(query, names, alone) for query in queries]

    def ask(self, queries: Sequence[Any], options: QueryOptions | None = None) -> Iterator[Event]:
        """Answer questions step by step, as `Index.ask` does, at the checkpoint that is asked."""
        options = options or QueryOptions()
        encoded, alone = self.encode(queries, options), replace(options, checkpoint=None)
        for number, query in enumerate(encoded):
            name = self.best(query, alone) if options.checkpoint == BEST else options.checkpoint or self.names[0]
            index = self.sum if name == SUM else self.checkpoint(name)
            others = [] if options.checkpoint else self._agreements(query, alone)
            for event in index.ask([query if name == SUM else query.at[name]], alone):
                event = replace(event, number=number)
                if isinstance(event, Ranked | Answered):
                    event = replace(event, result=replace(event.result, checkpoint=name, agreements=others))
                yield event

    @cached_property
    def sum(self) -> Index:
        """The sum of all checkpoints, asked as an index: it loads the models of all of them."""
        return _Sum(self)

    @property
    def opened(self) -> dict[str, Index]:
        """The indexes that were opened until now, by their checkpoints' names."""
        return dict(self._members)

    def influence_of(self, tokens: Sequence[int], match: Match, query: EncodedAt, *, level: str) -> list[float]:
        """Return how some tokens of a match push each token of the answer at the first checkpoint that was asked."""
        name, asked = next(iter(query.at.items()))
        return self.checkpoint(name).influence_of(tokens, match, asked, level=level)

    def _asked(self, options: QueryOptions) -> list[str]:
        """Return the names of the checkpoints that a question is asked at, the one that answers first."""
        if options.checkpoint in (None, SUM, BEST):
            return self.names
        self.checkpoint(options.checkpoint)
        return [options.checkpoint]

    def _encode_at(self, query: Any, names: list[str], options: QueryOptions) -> EncodedAt:
        known = query.at if isinstance(query, EncodedAt) else {}
        if known:  # at other checkpoints, perhaps: the answer stays
            first = next(iter(known.values()))
        else:
            (first,) = self.checkpoint(names[0]).encode([query], options)
            known = {names[0]: first}
        at = {name: known.get(name) or self._again(first, name, self._level(options)) for name in names}
        return EncodedAt(first.info, first.encoding, first.rapidgrads, sum(one.seconds for one in at.values()), at)

    def _again(self, query: EncodedQuery, name: str, level: str) -> EncodedQuery:
        """Compute the gradient of the same answer at another checkpoint."""
        started, index = time.perf_counter(), self.checkpoint(name)
        with model_work:
            batch = selected_batch(query.encoding, query.info.selection, index.loaded.device)
            rapidgrads = index.compressor_of(level)(batch)
        return EncodedQuery(query.info, query.encoding, rapidgrads, time.perf_counter() - started)

    def _results(self, query: EncodedAt, options: QueryOptions) -> dict[str, Result]:
        """Return the best matches of a question at each checkpoint."""
        quick = replace(options, k=COMPARED, heatmaps=False, answer_scores=False, rescore=False)
        return {name: self.checkpoint(name)._answer([one], quick)[0] for name, one in query.at.items()}

    def _agreements(self, query: EncodedAt, options: QueryOptions) -> list[Agreement]:
        mine, *others = self._results(query, options).items()
        ids = {match.id for match in mine[1].matches}
        found = [(name, list(dict.fromkeys(match.id for match in result.matches))) for name, result in others]
        return [Agreement(name, len(ids.intersection(theirs)), theirs) for name, theirs in found]

    def best(self, query: EncodedAt, options: QueryOptions) -> str:
        """Return the checkpoint whose best ten lie the most standard deviations from the mean of all its scores.

        It is one of those that the query was encoded at.
        """
        return max(self._results(query, replace(options, exact=True)).items(), key=lambda item: _distance(item[1]))[0]


class _Sum(Index):
    """The first checkpoint's index with the scores, heat-maps and influences of all checkpoints, weighed and added."""

    def __init__(self, several: CheckpointsIndex) -> None:
        self._several = several
        first = several._first
        super().__init__(first.store, first._model)
        self._places: dict[str, dict[str, np.ndarray]] = {}
        self._parts = {name: (weight, several.checkpoint(name)) for name, weight in several.several.weights.items()}

    def encode(self, queries: Iterable[Any], options: QueryOptions | None = None) -> list[EncodedQuery]:
        """Encode queries at all checkpoints."""
        return self._several.encode(queries, replace(options or QueryOptions(), checkpoint=SUM))

    @property
    def loaded(self) -> LoadedModel:
        """The model of the first checkpoint."""
        return self._several.loaded

    @property
    def is_loaded(self) -> bool:
        """Whether the models of all checkpoints are in memory."""
        return all(index.is_loaded for _, index in self._parts.values())

    def compressor_of(self, level: str) -> Compressor:
        """Return the first checkpoint's."""
        return self._several.compressor_of(level)

    def _rows_at(self, level: str) -> dict[str, np.ndarray]:
        if level not in self._places:
            self._places[level] = _aligned({name: index.rows_of(level) for name, (_, index) in self._parts.items()})
        return self._places[level]

    def _search(
        self, level: str, queries: Sequence[EncodedQuery], k: int, options: QueryOptions
    ) -> Callable[[], SearchResult]:
        live = np.flatnonzero(self._searched(level))
        return partial(self._scan, level, queries, live, min(k, max(1, len(live))), largest=not options.opponents)

    def _scan(
        self, level: str, queries: Sequence[EncodedAt], live: np.ndarray, k: int, *, largest: bool
    ) -> SearchResult:
        """Score all rows at each checkpoint, and add the scores of those that each of them has."""
        started, sums = time.perf_counter(), np.zeros((len(queries), len(live)), np.float32)
        for name, (weight, index) in self._parts.items():
            rows, scores = index.rows_of(level), np.empty(len(index.rows_of(level)), np.float32)
            vectors = stack_rows([query.at[name] for query in queries])
            for number, own in enumerate(live_scores(rows, vectors, device=index._scan_device(level))):
                scores[rows.live_mask] = own
                sums[number] += weight * scores[self._rows_at(level)[name][live]]
        device = next(index._scan_device(level) for _, index in self._parts.values())
        return ranked(live, sums, len(queries), k, largest=largest, started=started, device=device)

    def _searched(self, level: str) -> np.ndarray:
        return np.all([rows >= 0 for rows in self._rows_at(level).values()], axis=0)

    def scores_of(self, numbers: np.ndarray, query: EncodedAt) -> np.ndarray:
        """Return the sum of the checkpoints' scores of n sentence rows, by the first one's numbers."""
        places = self._rows_at("sentence")
        each = [index.scores_of(places[name][numbers], query.at[name]) for name, (_, index) in self._parts.items()]
        return self._weighed(each)

    def _heatmaps(self, candidates: list[Candidate], query: EncodedAt, level: str) -> Iterator[Candidate]:
        parts = []
        for name, (_, index) in self._parts.items():
            rows = self._rows_at(level)[name]
            own = [replace(candidate, row=int(rows[candidate.row])) for candidate in candidates]
            parts.append(index._heatmaps(own, query.at[name], level))
        for candidate, *each in zip(candidates, *parts, strict=True):
            scores = self._weighed([one.match.token_scores for one in each])
            exact = self._weighed([one.match.exact_score for one in each])
            yield replace(
                candidate, match=replace(candidate.match, token_scores=scores.tolist(), exact_score=float(exact))
            )

    def _with_answer_scores(self, candidate: Candidate, query: EncodedAt) -> Candidate:
        each = [index._with_answer_scores(candidate, query.at[name]) for name, (_, index) in self._parts.items()]
        scores = self._weighed([one.match.answer_scores for one in each])
        return replace(candidate, match=replace(candidate.match, answer_scores=scores.tolist()))

    def influence_of(self, tokens: Sequence[int], match: Match, query: EncodedAt, *, level: str) -> list[float]:
        """Return the sum of how some tokens of a match push each token of the answer at the checkpoints."""
        parts = [
            index.influence_of(tokens, match, query.at[name], level=level) for name, (_, index) in self._parts.items()
        ]
        return self._weighed(parts).tolist()

    def _weighed(self, each: list[Any]) -> np.ndarray:
        return np.average(each, axis=0, weights=[weight for weight, _ in self._parts.values()])


def _aligned(rows_of: dict[str, Rows]) -> dict[str, np.ndarray]:
    """Return for each checkpoint the number of its row for each row of the first; -1 for none, or one removed."""
    named = {name: dict(zip(_keys(rows), range(len(rows)), strict=True)) for name, rows in rows_of.items()}
    keys = list(_keys(next(iter(rows_of.values()))))
    aligned = {name: np.array([rows.get(key, -1) for key in keys], np.int64) for name, rows in named.items()}
    for name, rows in rows_of.items():
        here = aligned[name]
        here[(here >= 0) & ~rows.live_mask[here]] = -1
    return aligned


def _keys(rows: Rows) -> Iterator[tuple[str, int]]:
    """Yield what each row is of: an example's id, and the position of a token."""
    return ((rows.ids[number], int(at)) for number, at in zip(rows.example, rows.position, strict=True))


def _alike(one: Index, other: Index) -> bool:
    """Return whether two indexes can be of one training: the same layers, tokenizer and kind of rows."""
    layers = one.store.layers == other.store.layers
    return layers and one.recipe.tokenizer == other.recipe.tokenizer and one.recipe.encoder is other.recipe.encoder


def _distance(result: Result) -> float:
    scores = [abs(result.summary.distance(match.score)) for match in result.matches]
    return float(np.mean(scores)) if scores else 0.0
