"""An index of embeddings: an encoder finds candidates, and the true gradients of the best of them give the order.

    prompt and answer ──encoder──> embedding ──search──> candidates          (no language model)
    candidates ──language model──> gradients, kept in INDEX/gradients by the examples' ids ──> influence, heat-maps

The first stage ignores which words of the answer are asked about: an encoder reads whole texts.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rapidindex.caching.batches import Item, most_items, padded_tokens, plan_units
from rapidindex.caching.shard_writer import ShardWriter, cache
from rapidindex.config import BuildConfig, EncoderConfig, ModelConfig, QueryOptions
from rapidindex.data.examples import Example
from rapidindex.encoder.embed import Encoder
from rapidindex.errors import ConfigMismatch, QueryError
from rapidindex.model.model import LoadedModel
from rapidindex.query.encode import EncodedQuery
from rapidindex.query.events import Answered, Event, Ranked
from rapidindex.query.index import Index, Stored, model_work
from rapidindex.query.influence import RESCORED, Candidate, rescore, rescoring_of
from rapidindex.query.questions import Query, as_query
from rapidindex.results import Match, QueryInfo, Result, Token
from rapidindex.search.exact import scores_of, top
from rapidindex.store import GRADIENTS, Rows, Store

CANDIDATES = 200
"""Candidates whose true gradients `rescore` compares, by default."""


@dataclass(frozen=True)
class EmbeddedQuery(EncodedQuery):
    """A query whose `rapidgrads` are its embedding."""

    asked: EncodedQuery | None = None
    """The query with its true gradient; None where the first stage answers alone."""


class EncoderIndex(Index):
    """An index of embeddings. Its model and its recipe are those of the second stage."""

    def __init__(
        self, store: Store, model: ModelConfig, loaded: LoadedModel | None = None, *, encoder: EncoderConfig
    ) -> None:
        super().__init__(store, model, loaded)
        self._encoder_config = encoder

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder; ConfigMismatch where it is not the one that the index was built with."""
        built, encoder = self.recipe.encoder, Encoder.load(self._encoder_config)
        if encoder.fingerprint != built.fingerprint:
            raise ConfigMismatch(
                f"The encoder at {encoder.path} is not the one that {self.store.path} was built with.",
                hint=f"It was {built.path}: give it with --encoder, or build anew.",
            )
        return encoder

    @cached_property
    def gradients(self) -> Index:
        """The index of the true gradients of the examples that were candidates before."""
        return Index(Store.open(self.store.path / GRADIENTS), self._model, self.__dict__.get("loaded"))

    def load(self, options: QueryOptions) -> None:
        """Load what queries need: the encoder, and for the second stage the language model."""
        self.encoder  # noqa: B018
        if options.rescore:
            self.gradients.load(options)

    def encode(self, queries: Iterable[Any], options: QueryOptions | None = None) -> list[EncodedQuery]:
        """Embed queries, and compute their gradients where `rescore` asks for the second stage."""
        options = options or QueryOptions()
        super().encode([], options)
        with model_work:
            return [query if isinstance(query, EmbeddedQuery) else self._embed(query, options) for query in queries]

    def _embed(self, query: Any, options: QueryOptions) -> EmbeddedQuery:
        started, asked = time.perf_counter(), None
        if options.rescore:
            (asked,) = self.gradients.encode([query], options)
        info = asked.info if asked else _whole_answer(as_query(query), options)
        encoding = self.encoder.encode_text(info.prompt, info.answer, anchor=True)
        row = self.encoder.rows([encoding])
        return EmbeddedQuery(info, encoding, row, time.perf_counter() - started, asked)

    def ask(self, queries: Sequence[Any], options: QueryOptions | None = None) -> Iterator[Event]:
        """Answer questions step by step: the first stage ranks, and with `rescore` the second gives the result."""
        options = options or QueryOptions()
        first = replace(options, heatmaps=False, answer_scores=False, rescore=False)
        if not options.rescore:
            yield from super().ask(queries, first)
            return
        encoded = self.encode(queries, options)
        for event in super().ask(encoded, replace(first, k=options.candidates(CANDIDATES))):
            if isinstance(event, Ranked):
                yield replace(event, result=replace(event.result, matches=event.result.matches[: options.k]))
            elif isinstance(event, Answered):
                with model_work:
                    result = self._second_stage(encoded[event.number], event.result, options)
                yield replace(event, result=result)
            else:
                yield event

    def _second_stage(self, query: EmbeddedQuery, found: Result, options: QueryOptions) -> Result:
        """Order the candidates by the inner products of their RapidGrads, and the best of those by their influence."""
        if query.asked is None:
            raise QueryError("The query was encoded without its gradient.", hint="Encode it with rescore=True.")
        started, largest = time.perf_counter(), not options.opponents
        rows = self._with_gradients(found.matches)
        row_of = {rows.ids[rows.example[row]]: row for row in range(len(rows))}
        matches = [match for match in found.matches if match.id in row_of]
        numbers = np.array([row_of[match.id] for match in matches], np.int64)
        scores = scores_of(rows, numbers, query.asked.rapidgrads.rows[0].cpu().numpy())
        order = top(scores, len(matches), largest)
        best = [self._true_candidate(matches[place], int(numbers[place])) for place in order[: RESCORED * options.k]]
        best = list(self.gradients.influence.heatmaps(best, query.asked, rows.norms, model_work))
        places = {candidate.match.id: int(place) for candidate, place in zip(best, order, strict=False)}
        best, rescoring = rescore(best, len(best), query.info, largest=largest)
        final = [places[candidate.match.id] for candidate in best] + order[len(best) :].tolist()
        rescoring = rescoring_of(np.array(final), by_token=rescoring.by_token)
        best = best[: options.k]
        if options.answer_scores:
            best = [self.gradients.influence.with_answer_scores(candidate, query.asked) for candidate in best]
        seconds = replace(found.seconds, heatmaps=time.perf_counter() - started)
        shown = [candidate.match for candidate in best]
        return replace(found, matches=shown, rescoring=rescoring, seconds=seconds)

    def _with_gradients(self, matches: Sequence[Match]) -> Rows:
        """Return the rows of true gradients, after those that are missing were computed and stored."""
        store, template = self.gradients.store, self.gradients.template
        with store.lock():
            rows = store.rows("sentence")
            missing = [match.id for match in matches if match.id not in rows.done_ids]
            items = [Item(example, template.encode(example)) for example in map(self._example, missing)]
            items = [
                Item(replace(item.example, response=item.encoding.response), item.encoding)
                for item in items
                if item.encoding.response_mask.any()
            ]
            if items:
                self._compute(items, rows)
                rows = store.rows("sentence")
        return rows

    def _compute(self, items: list[Item], rows: Rows) -> None:
        store, work = self.gradients.store, BuildConfig()
        compressor = self.gradients.compressor_of("sentence")
        units, done = plan_units(items, work.batch_tokens, most_items(compressor.gradients.layers)), 0
        total = sum(padded_tokens(batch) for unit in units for batch in unit)

        def report(batch: list[Item]) -> None:
            nonlocal done
            done += padded_tokens(batch)
            self.progress("gradients of candidates", done, total)

        numbers = itertools.count(rows.next_number())
        writer = ShardWriter(rows, work, numbers, lambda name: store.record_shard("sentence", name), len(items))
        cache(units, compressor, writer, report)

    def _example(self, id: str) -> Example:
        rows = self.rows_of("sentence")
        return Example.from_record(rows.record(self._numbers[id]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {id: number for number, id in enumerate(self.rows_of("sentence").ids)}

    def _candidate(
        self, rows: Rows, rank: int, row: int, score: float, percentile: float | None, stored: Stored
    ) -> Candidate:
        """Return a candidate of the first stage, which knows no tokens."""
        match = self._match(rows.record(int(rows.example[row])), rank, score, percentile)
        return Candidate(row, None, match)  # type: ignore[arg-type]

    def _true_candidate(self, match: Match, row: int) -> Candidate:
        encoding = self.gradients.template.encode(self._example(match.id))
        return Candidate(row, encoding, replace(match, tokens=encoding.tokens))

    @property
    def _named_device(self) -> str:
        return "auto" if self.encoder.config.device == "auto" else str(self.encoder.device)


def _whole_answer(query: Query, options: QueryOptions) -> QueryInfo:
    """Return a query as the first stage takes it. QueryError for what only the language model can answer."""
    if not query.turns[-1][1].strip():
        raise QueryError("The prompt is empty.", hint="Give the prompt that the model was asked.")
    if not (query.answer or "").strip():
        raise QueryError("An encoder reads the answer, too.", hint="Give --answer, or --rescore: the model answers.")
    if query.token is not None or query.span is not None:
        raise QueryError("An encoder reads whole answers, not words of them.", hint="Add --rescore to ask about words.")
    if options.answer_scores:
        raise QueryError("An encoder knows no tokens.", hint="Add --rescore for heat-maps, reports and answer scores.")
    return QueryInfo(query.text, query.answer, [Token(query.answer, 0, len(query.answer))], [0], meta=query.meta)
