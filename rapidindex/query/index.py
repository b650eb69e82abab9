"""An index on disk and its model: open it, ask it, and say what it holds."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.config import EncoderConfig, ModelConfig, QueryOptions, check_level
from rapidindex.data.bm25 import BM25
from rapidindex.data.examples import Example
from rapidindex.data.templates import Encoding, Template
from rapidindex.errors import ConfigMismatch, DamagedIndex, QueryError, StoreError, UsageError
from rapidindex.gradients.blocks import blocks_of
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.model.model import LoadedModel, adopt, load
from rapidindex.progress import Progress, silent
from rapidindex.query.encode import EncodedQuery, encode_query, generate_answer, selected_text, stack_rows
from rapidindex.query.evaluation import Evaluation, average_precision, precision_at
from rapidindex.query.events import Answered, Event, Posed, Ranked, Scored
from rapidindex.query.holders import SHARE, holders, joined, respond_with, words_of
from rapidindex.query.influence import RESCORED, Candidate, Influence, rescore
from rapidindex.query.questions import Query, as_query, is_conversation
from rapidindex.recipe import Recipe
from rapidindex.results import IndexInfo, Match, Result, Seconds
from rapidindex.search.exact import SearchResult, exact_search, scores_of, top
from rapidindex.search.metadata import IndexMetadata
from rapidindex.search.spread import SpreadSearch
from rapidindex.search.vector_index import VectorIndex, scan_device
from rapidindex.store import Rows, Store, checkpoints_at

Stored = Callable[[int], tuple[dict[str, Any], Encoding]]
"""Reads the record of the example of a number from the store, and encodes the example."""

model_work = threading.RLock()
"""Gradients are taken with hooks on the model, and its tokenizer keeps state: one thread at a time. The lock is that of
the process, because two indexes may share a model."""


class Index:
    """An index, and the model that it was built with, which the first query loads.

    Several threads may query it: their searches run in parallel, their work with the model one after the other.
    """

    def __init__(self, store: Store, model: ModelConfig, loaded: LoadedModel | None = None) -> None:
        if not store.levels:
            raise DamagedIndex(f"{store.path} holds no level of rows.", hint="Type its rapidindex build command.")
        self.store = store
        self.progress: Progress = silent
        """Hears of the gradients of stored examples that a query computes, where an index of embeddings lacks them."""
        self.ray: str | None = None
        """The Ray cluster whose nodes search together, an address as in `BuildConfig.ray`."""
        self.not_on_gpu: str | None = None
        """Why the last search index to be opened is searched on the CPU, where the model is on a GPU; else None."""
        self.recipe = Recipe.from_manifest(store.config)
        self._model = model
        if loaded is not None:
            self.use(loaded)
        self._rows: dict[str, Rows] = {}
        self._compressors: dict[int, Compressor] = {}
        self._vector_indexes: dict[str, VectorIndex | None] = {}
        self._spread: dict[str, SpreadSearch] = {}
        self._scan_devices: dict[str, str] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: Any = None,
        adapter: str | Path | None = None,
        encoder: str | Path | None = None,
        tokenizer: Any = None,
        device: str = "auto",
    ) -> "Index":
        """Open the index at `path`.

        `model` and `adapter` are where the index's model lies now, if it was moved; or `model` is the loaded model
        itself, a `PreTrainedModel` or `PeftModel`, with its `tokenizer`. `encoder` is where the encoder of an index of
        embeddings lies now. Raises NotAnIndex, NewerFormat or
        DamagedIndex, and ConfigMismatch where a loaded model is not the index's; a model on disk is loaded, and
        checked, by the first query.
        """
        if (several := checkpoints_at(path)) is not None:
            from rapidindex.query.checkpoints import CheckpointsIndex

            return CheckpointsIndex(several, model=model, adapter=adapter, tokenizer=tokenizer, device=device)
        store = Store.open(path)
        recipe = Recipe.from_manifest(store.config)
        if recipe.encoder is not None:
            from rapidindex.query.two_stages import EncoderIndex

            place = str(encoder or recipe.encoder.path)
            cls = partial(EncoderIndex, encoder=EncoderConfig(place, device))
        if model is None or isinstance(model, str | Path):
            places = {"model": model and str(model), "adapter": adapter and str(adapter)}
            return cls(store, recipe.model_config(**places, device=device))
        loaded = adopt(model, tokenizer, adapter=adapter)
        return cls(store, loaded.config, loaded)

    def __len__(self) -> int:
        """The number of examples, removed ones excluded."""
        return self._examples(self.store.levels[0])

    def __repr__(self) -> str:
        model = " + ".join(filter(None, (self.recipe.model.path, self.recipe.adapter.path)))
        return f"Index({str(self.store.path)!r}: {len(self):,} examples, {', '.join(self.store.levels)} rows, {model})"

    def query(
        self,
        prompt: Any,
        *,
        answer: str | None = None,
        token: str | None = None,
        span: str | None = None,
        system: str | None = None,
        options: QueryOptions | None = None,
        **changes: Any,
    ) -> Any:
        """Return the training examples that most influence an answer, or the words of it that are asked about.

        `prompt` is a text, a Query, a dict with its fields, a conversation (a list of {"role", "content"}), or an
        EncodedQuery; a list of these is answered with one search, and gives a list of Results. `answer`, `token` and
        `span` are those of Query, `system` is a turn before all others. `options` may be given field by field:
        `k=10, opponents=True`.

        Raises QueryError (TokenNotFound) for a query that cannot be answered, UsageError for an option without a
        meaning, and StoreError for a level that the index does not hold.
        """
        options = replace(options or QueryOptions(), **changes)
        if isinstance(prompt, Sequence) and not isinstance(prompt, str) and not is_conversation(prompt):
            return self._answer(self.encode(prompt, options), options)
        if not isinstance(prompt, EncodedQuery):
            prompt = as_query(prompt, system=system, answer=answer, token=token, span=span)
        return self._answer(self.encode([prompt], options), options)[0]

    def ask(self, queries: Sequence[Any], options: QueryOptions | None = None) -> Iterator[Event]:
        """Answer questions step by step: yield what is known as soon as it is known (`rapidindex.query.events`).

        The questions share one search, and are then completed one after the other. Whoever stops reading has cancelled
        the rest: no lock is held between two events. Raises as `query` does.
        """
        options, encoded = options or QueryOptions(), []
        level = self._level(options)
        for number, query in enumerate(queries):
            encoded += self.encode([query], options)
            yield Posed(number, encoded[-1])
        if not encoded:
            return
        rescored = [options.rescores(whole=query.info.whole, level=level) for query in encoded]
        k = options.candidates(RESCORED * options.k) if any(rescored) else options.k
        with model_work:
            search = self._search(level, encoded, k, options)
        found, rows = search(), self.rows_of(level)
        stored = cache(lambda number: self._stored(rows.record(number)))  # once, for all queries
        for number, query in enumerate(encoded):
            with model_work:  # tokenizers are not safe among threads
                candidates = self._candidates(rows, found, number, stored)
                ranked = self._ranked(level, encoded, found, number, candidates[: options.k])
                if not rescored[number]:
                    candidates = candidates[: options.k]
                elif level == "sentence" and not query.info.whole:
                    candidates = self._with_holders(candidates, rows, query, stored, largest=found.largest)
            yield ranked
            yield from self._complete(ranked, candidates, query, options, rescored[number])

    def encode(self, queries: Iterable[Any], options: QueryOptions | None = None) -> list[EncodedQuery]:
        """Answer queries and compute their gradients, once for several searches. Raises as `query` does."""
        options = options or QueryOptions()
        if options.checkpoint is not None:
            raise UsageError(f"{self.store.path} holds one checkpoint.", hint="Leave --checkpoint out.")
        level = self._level(options)
        if not len(self.rows_of(level)) and self.store.planned(level):  # refused before the model is loaded
            raise StoreError(
                f"{self.store.path} holds the {level} rows of 0 of {self.store.planned(level):,} examples.",
                hint="Give its rapidindex build command again.",
            )
        with model_work:
            return [
                query if isinstance(query, EncodedQuery) else self._encode(as_query(query), level, options)
                for query in queries
            ]

    def influence_of(self, tokens: Sequence[int], match: Match, query: EncodedQuery, *, level: str) -> list[float]:
        """Return how some response tokens of a match push each token of a question's answer (Eq. 7): one number each.

        The numbers are the tokens' part of the match's `answer_scores`: over the tokens asked about they average to the
        sum of these tokens' shares in its heat-map. `query` and `match` are of a search at `level`. QueryError where
        the match has no such tokens, or is no longer in the index.
        """
        rows = self.rows_of(level)
        example = rows.ids.index(match.id) if match.id in rows.ids else -1
        position = -1 if match.position is None else match.position
        found = np.flatnonzero(rows.live_mask & (rows.example == example) & (rows.position == position))
        if not len(found) or not tokens or not set(tokens) <= set(range(len(match.tokens))):
            raise QueryError("These are no tokens of an example in the index.", hint="Ask again.")
        with model_work:
            candidate = Candidate(int(found[0]), self._stored(rows.record(example))[1], match)
            return self.influence.of_tokens(candidate, tokens, query, rows.norms).tolist()

    def answer(self, prompt: Any, *, max_new_tokens: int = QueryOptions.max_new_tokens) -> str:
        """Return the model's greedy answer to a prompt or conversation."""
        with model_work:
            return generate_answer(as_query(prompt), self.loaded, self.template, max_new_tokens).text

    def evaluate(
        self, queries: Sequence[Any], relevant: Callable[[Match], bool], *, options: QueryOptions | None = None
    ) -> Evaluation:
        """Return precision at k and average precision over `queries`, beside BM25's over the same examples.

        `relevant` says of a match whether it should have been found: `lambda match: match.meta["perturbed"]`. BM25 is
        asked for the selected words, or the whole answer where all of it is selected.
        """
        options = replace(options or QueryOptions(), heatmaps=False)
        encoded = self.encode(queries, options)
        examples = self._all_examples(self._level(options))
        wanted = {match.id for match in examples if relevant(match)}
        bm25 = BM25([f"{match.prompt}\n{match.response}" for match in examples])
        rankings = [[match.id for match in result.matches] for result in self._answer(encoded, options)]
        words = [selected_text(query.info) for query in encoded]
        baseline = [[examples[number].id for number in bm25.ranking(text, options.k)] for text in words]
        figures = [
            float(np.mean([measure(ranking, wanted, options.k) for ranking in ranked]))
            for ranked in (rankings, baseline)
            for measure in (precision_at, average_precision)
        ]
        return Evaluation(len(encoded), options.k, *figures)

    def info(self) -> dict[str, Any]:
        """Return what the index holds and how it was built, as plain data. Loads no model and opens no FAISS."""
        store = self.store
        levels = {level: self._level_info(level) for level in store.levels}
        first = levels[store.levels[0]]
        rows = [self.rows_of(level) for level in store.levels]
        return {
            "path": str(store.path),
            "id": store.id,
            "created": store.manifest["created"],
            "examples": first["examples"],
            "planned": first["planned"],
            "complete": all(map(store.complete, store.levels)),
            "lost_second_moment": store.lost_second_moment,
            "removed": len(store.removed),
            "rejected": list({record["id"]: record for level in rows for record in level.rejected}.values()),
            "skipped": store.skipped,
            "levels": levels,
            "bytes": sum(file.stat().st_size for file in Path(store.path).rglob("*") if file.is_file()),
            "layers": len(store.layers),
            "gradient_size": sum(layer["size"] for layer in store.layers),
            "recipe": self.recipe.name,
            "config": store.config,
            "versions": store.manifest["versions"],
        }

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model; ConfigMismatch where it is not the one that the index was built with."""
        return _checked(load(self._model), self.recipe, self.store.path)

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return "loaded" in vars(self)

    def use(self, loaded: LoadedModel) -> None:
        """Take a model that is loaded, instead of loading it; ConfigMismatch where it is not the index's."""
        self.loaded = _checked(loaded, self.recipe, self.store.path)

    @cached_property
    def template(self) -> Template:
        """The template that prompts were written with when the index was built."""
        day = self.recipe.day(self.store.manifest["created"])
        return Template.of(self.recipe.encoding, self.loaded.tokenizer, date=day)

    def load(self, options: QueryOptions) -> None:
        """Load what queries need, so that a model that cannot be loaded is no fault of a query."""
        self.template  # noqa: B018

    def rows_of(self, level: str) -> Rows:
        """Return the stored rows of a level. StoreError where the index does not hold it."""
        check_level(level)
        if level not in self._rows:
            self._rows[level] = self.store.rows(level)
        return self._rows[level]

    def blocks(self, level: str) -> dict[str, slice]:
        """Return the entries of a row of that level that belong to each block of layers, by the block's name.

        UsageError where layers are not kept apart, as in RapidGrads.
        """
        if self.recipe.sketch.projection != "two-sided":
            raise UsageError("RapidGrads mix all layers.", hint="Build with --projection two-sided.")
        return blocks_of([layer["name"] for layer in self.store.layers]).slices(self.rows_of(level).K)

    def compressor_of(self, level: str) -> Compressor:
        """Return the compressor of queries to a level."""
        K = self.rows_of(level).K
        if K not in self._compressors:
            self.store.refuse_lost_moment()
            store = self.store
            moment = {"v": store.second_moment(), "vectors": store.eigenvectors(), "roots": store.roots()}
            self._compressors[K] = Compressor.of(self.recipe, self._gradients, **moment, K=K)
        return self._compressors[K]

    @cached_property
    def _gradients(self) -> PerExampleGradients:
        return PerExampleGradients(self.loaded.model)

    @property
    def _named_device(self) -> str:
        """The device that was named for model and search alike, or `auto`."""
        return "auto" if self.loaded.config.device == "auto" else str(self.loaded.device)

    def _scan_device(self, level: str) -> str:
        """Where the rows of a level are scanned: see `scan_device`."""
        if level not in self._scan_devices:
            self._scan_devices[level] = scan_device(self.rows_of(level), self._named_device)
        return self._scan_devices[level]

    @cached_property
    def influence(self) -> Influence:
        """Computes uncompressed influences."""
        return Influence(self.compressor_of(self.store.levels[0]))

    def _level(self, options: QueryOptions) -> str:
        return options.level or self.store.levels[0]

    def _encode(self, query: Query, level: str, options: QueryOptions) -> EncodedQuery:
        compressor = self.compressor_of(level)
        started = time.perf_counter()
        encoded = encode_query(query, self.loaded, self.template, compressor, options.max_new_tokens)
        return replace(encoded, seconds=time.perf_counter() - started)

    def _answer(self, queries: Sequence[EncodedQuery], options: QueryOptions) -> list[Result]:
        return [event.result for event in self.ask(queries, options) if isinstance(event, Answered)]

    def _ranked(
        self, level: str, queries: Sequence[EncodedQuery], found: SearchResult, number: int, first: list[Candidate]
    ) -> Ranked:
        query, share = queries[number], 1 / len(queries)
        result = Result(
            index=self._index_info(level, found.n),
            query=query.info,
            direction="proponents" if found.largest else "opponents",
            level=level,
            search=found.method,
            recall=found.recall,
            seconds=Seconds(query.seconds, found.search_seconds * share, found.rerank_seconds * share, 0.0),
            summary=found.summaries[number] if found.summaries else None,
            matches=[candidate.match for candidate in first],
            search_device=found.device,
        )
        return Ranked(number, result)

    def _complete(
        self,
        ranked: Ranked,
        candidates: list[Candidate],
        query: EncodedQuery,
        options: QueryOptions,
        rescored: bool,
    ) -> Iterator[Event]:
        """Yield the question's heat-maps, one after the other, and its result. The model is free between them.

        Matches within chance get them where `all` is set, or candidates are `rescored`, which needs all influences.
        """
        started, result, number = time.perf_counter(), ranked.result, ranked.number
        every = options.all or rescored
        shown = [at for at, one in enumerate(candidates) if every or result.stands_out(one.match) is not False]
        heatmaps = shown if options.heatmaps or rescored else []
        answers = [at for at in shown if at < options.k] if options.answer_scores else []
        done, total, rescoring = itertools.count(1), len(heatmaps) + len(answers), None
        drawn = self._heatmaps([candidates[at] for at in heatmaps], query, result.level) if heatmaps else ()
        for at, one in zip(heatmaps, drawn, strict=True):
            candidates[at] = one
            yield Scored(number, one.match, next(done), total)
        if rescored:
            largest = result.direction == "proponents"
            candidates, rescoring = rescore(candidates, options.k, query.info, largest=largest)
        for at in answers:
            with model_work:
                candidates[at] = self._with_answer_scores(candidates[at], query)
            yield Scored(number, candidates[at].match, next(done), total)
        seconds = replace(result.seconds, heatmaps=time.perf_counter() - started)
        matches = [candidate.match for candidate in candidates]
        yield Answered(number, replace(result, seconds=seconds, matches=matches, rescoring=rescoring))

    def _heatmaps(self, candidates: list[Candidate], query: EncodedQuery, level: str) -> Iterator[Candidate]:
        return self.influence.heatmaps(candidates, query, self.rows_of(level).norms, model_work)

    def _with_answer_scores(self, candidate: Candidate, query: EncodedQuery) -> Candidate:
        return self.influence.with_answer_scores(candidate, query)

    def _search(
        self, level: str, queries: Sequence[EncodedQuery], k: int, options: QueryOptions
    ) -> Callable[[], SearchResult]:
        """Return the search for k rows for each of the queries, which several threads may run at the same time."""
        rows, vectors = self.rows_of(level), stack_rows(queries)
        k = min(k, max(1, len(rows)))
        largest = not options.opponents
        if self.ray is not None:
            if level not in self._spread:
                self._spread[level] = SpreadSearch(str(self.store.path.absolute()), rows, self.ray)
            return partial(self._spread[level].search, vectors, k, largest=largest)
        index = None if options.exact else self._vector_index(level)
        if index is None:
            return partial(exact_search, rows, vectors, k, largest=largest, device=self._scan_device(level))
        return partial(index.search, vectors, k, largest=largest)

    def _vector_index(self, level: str) -> VectorIndex | None:
        if level not in self._vector_indexes:
            self._vector_indexes[level] = index = VectorIndex.open(self.rows_of(level), device=self._named_device)
            self.not_on_gpu = index and index.not_on_gpu
        return self._vector_indexes[level]

    def _candidates(self, rows: Rows, found: SearchResult, number: int, stored: Stored) -> list[Candidate]:
        """Return the candidates of one query, best first, with their examples from the store."""
        columns = zip(found.rows[number], found.scores[number], found.percentiles()[number], strict=True)
        return [
            self._candidate(rows, rank, int(row), float(score), float(percentile), stored)
            for rank, (row, score, percentile) in enumerate(columns, 1)
            if row >= 0
        ]

    def _with_holders(
        self, candidates: list[Candidate], rows: Rows, query: EncodedQuery, stored: Stored, *, largest: bool
    ) -> list[Candidate]:
        """Return as many candidates, among them the best of the rows whose responses hold the words asked about."""
        words = words_of(query.info)
        held = holders(rows, self._searched("sentence"), words)
        scores = self.scores_of(held, query)
        ordered = (at for at in top(scores, len(held), largest) if respond_with(rows, int(held[at]), words))
        best = itertools.islice(ordered, int(SHARE * len(candidates)))
        numbered = enumerate(best, len(candidates) + 1)
        holding = [self._candidate(rows, rank, int(held[at]), float(scores[at]), None, stored) for rank, at in numbered]
        return joined(candidates, holding)

    def _searched(self, level: str) -> np.ndarray:
        """Return bool [n]: which rows of a level a search sees."""
        return self.rows_of(level).live_mask

    def scores_of(self, numbers: np.ndarray, query: EncodedQuery) -> np.ndarray:
        """Return floats [n]: the scores of n sentence rows of these numbers."""
        return scores_of(self.rows_of("sentence"), numbers, stack_rows([query])[0])

    def _stored(self, record: dict[str, Any]) -> tuple[dict[str, Any], Encoding]:
        return record, self.template.encode_stored(record)[1]

    def _candidate(
        self, rows: Rows, rank: int, row: int, score: float, percentile: float | None, stored: Stored
    ) -> Candidate:
        record, encoding = stored(int(rows.example[row]))
        position = int(rows.position[row])
        match = self._match(record, rank, score, percentile)
        match = replace(match, tokens=encoding.tokens, position=None if position < 0 else position)
        return Candidate(row, encoding, match)

    def _match(self, record: dict[str, Any], rank: int, score: float, percentile: float | None) -> Match:
        """Return the match of a stored record, without tokens."""
        example = Example.from_record(record)
        columns = (example.id, example.prompt, example.response, example.meta)
        source = record.get("source") or self.recipe.data.path
        return Match(rank, score, None, percentile, *columns, source=source, line=example.line)

    def _all_examples(self, level: str) -> list[Match]:
        """Return the live examples of a level as matches without scores."""
        rows = self.rows_of(level)
        return [self._match(rows.record(int(number)), 0, 0.0, 0.0) for number in rows.live_examples]

    def _index_info(self, level: str, n: int) -> IndexInfo:
        recipe = self.recipe
        K = self.rows_of(level).K
        unfinished = () if self.store.complete(level) else (self._examples(level), self.store.planned(level))
        model, adapter = recipe.model.path, recipe.adapter.path
        how = {"encoder": recipe.encoder and recipe.encoder.path, "specialized": recipe.task is not None}
        return IndexInfo(self.store.id, model, adapter, K, recipe.sketch.shuffles, n, *unfinished, **how)

    def _examples(self, level: str) -> int:
        """Return how many examples have live rows of a level."""
        return len(self.rows_of(level).live_examples)

    def _level_info(self, level: str) -> dict[str, Any]:
        rows = self.rows_of(level)
        metadata = IndexMetadata.read(rows.path)
        return {
            "K": rows.K,
            "row_type": rows.row_type,
            "rows": int(rows.live_mask.sum()),
            "examples": self._examples(level),
            "planned": self.store.planned(level),
            "complete": self.store.complete(level),
            "shards": len(rows.shards),
            "index": metadata and metadata.describe(rows),
        }


def _checked(loaded: LoadedModel, recipe: Recipe, index: Path) -> LoadedModel:
    """Return the model; ConfigMismatch where the index was built with another."""
    built = {
        "model": (recipe.model.fingerprint, recipe.model.path, "-m"),
        "adapter": (recipe.adapter.fingerprint, recipe.adapter.path, "-a"),
        "tokenizer": (recipe.tokenizer, None, "-m"),
    }
    for part, (fingerprint, path, flag) in built.items():
        if loaded.fingerprint_of(part, fingerprint) != fingerprint:
            place = getattr(loaded.config, part, None) or loaded.config.model
            raise ConfigMismatch(
                f"The {part} at {place} is not the one that {index} was built with.",
                hint=f"It was {path or 'that of the model'}: give it with {flag}, or build anew.",
            )
    return loaded
