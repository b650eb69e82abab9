"""From a prompt, an answer and some of its tokens to the training examples that most influence them.

A query's gradient takes the same way as a training example's, with the loss of the selected tokens alone, and its
RapidGrad is looked up among those of whole examples (Eq. 5 for the whole answer, Eq. 7 for some of it) or of their
tokens (Eq. 6 and 8).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidindex.caching.build import load_compressor
from rapidindex.config import ModelConfig, check_level
from rapidindex.data.examples import Example, display_text
from rapidindex.data.templates import Template
from rapidindex.data.tokens import select_tokens
from rapidindex.errors import ConfigMismatch, QueryError, StoreError
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.model.model import LoadedModel, generate, load
from rapidindex.query.encode import EncodedQuery, as_batch, rows_of
from rapidindex.query.influence import RESCORED, Candidate, groups, rescored
from rapidindex.query.questions import Query
from rapidindex.results import IndexInfo, Match, QueryInfo, Rescoring, Result, Seconds
from rapidindex.search.exact import SearchResult, exact_search
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Rows, Store


class Index:
    """An index on disk, and, once a query needs it, the model that it was built with."""

    def __init__(self, store: Store, model: ModelConfig) -> None:
        self.store = store
        self._model = model
        self._rows: dict[str, Rows] = {}
        self._compressors: dict[int, Compressor] = {}
        self._searched: dict[str, VectorIndex | None] = {}

    @classmethod
    def open(
        cls, path: str | Path, *, model: str | None = None, adapter: str | None = None, device: str = "auto"
    ) -> "Index":
        """Open the index at `path`; `model` and `adapter` say where they lie now, if not where they were.

        Raises NotAnIndex, NewerFormat or DamagedIndex. The model is loaded, and checked, by the first query.
        """
        store = Store.open(path)
        config = store.config
        return cls(
            store,
            ModelConfig(
                model=model or config["model"]["path"],
                adapter=adapter or config["adapter"]["path"],
                quantize=config["quantize"],
                dtype=config["dtype"],
                device=device,
            ),
        )

    def query(
        self,
        prompt: str,
        *,
        answer: str | None = None,
        token: str | None = None,
        span: str | None = None,
        k: int = 10,
        opponents: bool = False,
        exact: bool = False,
        heatmaps: bool = True,
        answer_scores: bool = False,
        rescore: bool = False,
        level: str | None = None,
        max_new_tokens: int = 64,
    ) -> Result:
        """The k training examples that most influence `answer`, or the tokens of it that `token` or `span` selects.

        Without an answer the model gives one. Opponents are those whose influence is the most negative. `exact` scans
        every stored RapidGrad; `heatmaps` adds every response token's share to the matches, and their uncompressed
        influence; `answer_scores` adds their influence on each token of the answer; `rescore` computes the uncompressed
        influence of four times k candidates and orders by it. With the level `token` matches are single tokens of
        training examples; by default they are examples, where the index holds them. Raises QueryError (TokenNotFound)
        for a query that cannot be answered, and StoreError for a level that the index does not hold.
        """
        how = {"k": k, "opponents": opponents, "exact": exact, "heatmaps": heatmaps, "answer_scores": answer_scores}
        asked = [Query(prompt, answer, token, span)]
        return self.query_many(asked, **how, rescore=rescore, level=level, max_new_tokens=max_new_tokens)[0]

    def query_many(
        self,
        queries: Sequence[Query],
        *,
        k: int = 10,
        opponents: bool = False,
        exact: bool = False,
        heatmaps: bool = True,
        answer_scores: bool = False,
        rescore: bool = False,
        level: str | None = None,
        max_new_tokens: int = 64,
    ) -> list[Result]:
        """As `query`, for many at once: one search."""
        level = level or self.store.levels[0]
        if not len(self.rows_of(level)) and self.store.planned(level):  # refused before the model is loaded
            raise StoreError(
                f"{self.store.path} holds the {level} rows of 0 of {self.store.planned(level):,} examples.",
                hint="Give its rapidindex build command again.",
            )
        started = time.perf_counter()
        posed = [self._pose(level, query, max_new_tokens) for query in queries]
        gradient = (time.perf_counter() - started) / max(1, len(posed))
        found = self._search(level, posed, RESCORED * k if rescore else k, largest=not opponents, exact=exact)
        results = []
        for number, query in enumerate(posed):
            matches = self._matches(level, found, number)
            started = time.perf_counter()
            rescoring = None
            if heatmaps or rescore:
                matches = self._with_heatmaps(level, matches, query)
            if rescore:
                matches, rescoring = rescored(matches, k, largest=not opponents)
            if answer_scores:
                matches = [self._with_answer_scores(match, query) for match in matches]
            seconds = Seconds(
                gradient,
                found.search_seconds / len(posed),
                found.rerank_seconds / len(posed),
                time.perf_counter() - started,
            )
            results.append(self._result(level, query.asked, found, number, matches, seconds, rescoring))
        return results

    def answer(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """What the model says to `prompt`, greedily."""
        text = self.template.render_prompt((("user", prompt),))
        special = self.template.add_special_tokens
        return generate(self.loaded, text, add_special_tokens=special, max_new_tokens=max_new_tokens)

    def vectors(self, queries: Sequence[Query], *, level: str | None = None, max_new_tokens: int = 64) -> np.ndarray:
        """What is looked up for the queries among a level's rows: float32 [queries, K]. Raises as `query` does."""
        level = level or self.store.levels[0]
        return rows_of([self._pose(level, query, max_new_tokens) for query in queries])

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model; ConfigMismatch where it is not the one that the index was built with."""
        loaded = load(self._model)
        for part in ("model", "adapter", "tokenizer"):
            built = self.store.config[part]
            if loaded.fingerprints[part] != built["fingerprint"]:
                where = getattr(self._model, part, None) or self._model.model
                flag = "-a" if part == "adapter" else "-m"
                raise ConfigMismatch(
                    f"The {part} at {where} is not the one that {self.store.path} was built with.",
                    hint=f"It was {built.get('path') or 'that of the model'}: give it with {flag}, or build anew.",
                )
        return loaded

    @cached_property
    def template(self) -> Template:
        """How prompts are written, as when the index was built."""
        encoding = self.store.config["encoding"]
        return Template(encoding["template"], self.loaded.tokenizer, encoding["max_length"])

    @property
    def compressor(self) -> Compressor:
        """What turns a query into its RapidGrad, and into a direction for heat-maps."""
        return self.compressor_of(self.store.levels[0])

    def compressor_of(self, level: str) -> Compressor:
        """What turns a query into a RapidGrad as long as the level's rows."""
        K = self.rows_of(level).K
        if K not in self._compressors:
            made = next(iter(self._compressors.values()), None)
            self._compressors[K] = load_compressor(self.store, self.loaded, made and made.gradients, K=K)
        return self._compressors[K]

    def rows_of(self, level: str) -> Rows:
        """The stored RapidGrads of a level. StoreError where the index does not hold it."""
        check_level(level)
        if level not in self._rows:
            self._rows[level] = self.store.rows(level)
        return self._rows[level]

    @property
    def rows(self) -> Rows:
        """The stored RapidGrads of whole examples."""
        return self.rows_of("sentence")

    def info(self) -> dict[str, Any]:
        """What the index holds and how it was built, as plain data; loads no model."""
        levels = {level: self._level_info(level) for level in self.store.levels}
        first = levels[self.store.levels[0]]
        rows = [self.rows_of(level) for level in self.store.levels]
        return {
            "path": str(self.store.path),
            "id": self.store.id,
            "created": self.store.manifest["created"],
            "examples": first["examples"],
            "planned": first["planned"],
            "complete": all(map(self.store.complete, self.store.levels)),
            "removed": len(self.store.removed),
            "rejected": list({record["id"]: record for level in rows for record in level.rejected}.values()),
            "skipped": self.store.manifest["skipped"],
            "levels": levels,
            "bytes": sum(file.stat().st_size for file in Path(self.store.path).rglob("*") if file.is_file()),
            "layers": len(self.store.layers),
            "gradient_size": sum(layer["size"] for layer in self.store.layers),
            "config": self.store.config,
            "versions": self.store.manifest["versions"],
        }

    def _level_info(self, level: str) -> dict[str, Any]:
        rows, searched = self.rows_of(level), self._vector_index(level)
        return {
            "K": rows.K,
            "row_type": rows.row_type,
            "rows": int(rows.live_mask.sum()),
            "examples": len(np.unique(rows.example[rows.live_mask])),
            "planned": self.store.planned(level),
            "complete": self.store.complete(level),
            "shards": len(rows.shards),
            "index": searched and searched.describe(),
        }

    def _pose(self, level: str, query: Query, max_new_tokens: int) -> EncodedQuery:
        if not query.prompt.strip():
            raise QueryError("The prompt is empty.", hint="Give the prompt that the model was asked.")
        messages = (("user", query.prompt),)
        answer = query.answer
        if answer is None:
            answer = self.answer(query.prompt, max_new_tokens=max_new_tokens)
            if not answer.strip():
                raise QueryError("The model's own answer to this prompt is empty.", hint="Give one with --answer.")
        if not answer.strip():
            raise QueryError("The answer is empty.", hint="Give its text with --answer, or leave --answer out.")
        example = Example("", display_text(messages), answer, {}, 0, messages)
        encoding = self.template.encode(example, end=False)
        if encoding.truncated:
            raise QueryError(
                f"Prompt and answer have more than the {self.template.max_length} tokens of --max-length.",
                hint="Shorten them, or build the index with a larger --max-length.",
            )
        tokens = encoding.tokens
        selection = select_tokens(tokens, answer, token=query.token, span=query.span)
        asked = QueryInfo(query.prompt, answer, tokens, selection)
        found = self.compressor_of(level)(as_batch(encoding, asked.selection, self.loaded.device))
        if not found.rows.isfinite().all():
            raise QueryError(f"The gradient of the answer {answer!r} is not finite.", hint="Use --dtype float32.")
        return EncodedQuery(asked, encoding, found)

    def _search(self, level: str, posed: Sequence[EncodedQuery], k: int, *, largest: bool, exact: bool) -> SearchResult:
        rows, vectors = self.rows_of(level), rows_of(posed)
        index = None if exact else self._vector_index(level)
        if index is None:
            return exact_search(rows, vectors, k, largest=largest, device=str(self.loaded.device))
        return index.search(vectors, k, largest=largest)

    def _vector_index(self, level: str) -> VectorIndex | None:
        if level not in self._searched:
            self._searched[level] = VectorIndex.open(self.rows_of(level))
        return self._searched[level]

    def _matches(self, level: str, found: SearchResult, number: int) -> list[Candidate]:
        told = zip(found.rows[number], found.scores[number], found.percentiles()[number], strict=True)
        rows = self.rows_of(level)
        return [
            self._candidate(rows, rank, int(row), float(score), float(percentile))
            for rank, (row, score, percentile) in enumerate(told, 1)
            if row >= 0
        ]

    def _candidate(self, rows: Rows, rank: int, row: int, score: float, percentile: float) -> Candidate:
        example = example_of(rows.record(int(rows.example[row])))
        encoding = self.template.encode(example)
        text = (example.id, example.prompt, example.response, example.meta)
        position = int(rows.position[row])
        match = Match(
            rank, score, None, percentile, *text, encoding.tokens, position=None if position < 0 else position
        )
        return Candidate(row, encoding, match)

    def _with_heatmaps(self, level: str, found: list[Candidate], query: EncodedQuery) -> list[Candidate]:
        """The candidates with every token's share, and the uncompressed influence.

        For an example that is the mean of the shares. For a token it is its own, and the shares of the other tokens
        stand beside it in the same unit, that of the norms of this token.
        """
        direction = self.compressor.direction(as_batch(query.encoding, query.asked.selection, self.loaded.device))
        told: list[Candidate] = []
        for group in groups(found) if level == "sentence" else [[one] for one in found]:
            masks = [one.encoding.response_mask.astype(np.float32) for one in group]
            batch = Batch.of([one.encoding.input_ids for one in group], masks, self.loaded.device)
            norms = torch.from_numpy(self.rows_of(level).norms([one.row for one in group])).to(self.loaded.device)
            for one, scores in zip(group, shares(self.scorer, self.compressor, direction, batch, norms), strict=True):
                whole = scores.mean() if one.match.position is None else scores[one.match.position]
                filled = replace(one.match, token_scores=scores.tolist(), exact_score=float(whole))
                told.append(replace(one, match=filled))
        return told

    def _with_answer_scores(self, found: Candidate, query: EncodedQuery) -> Candidate:
        """The candidate with its uncompressed influence on each token of the answer: Eq. 7 for every j.

        Influence is symmetric: this is the heat-map of the query along the direction of the training example.
        """
        device, position = self.loaded.device, found.match.position
        places = range(len(found.match.tokens)) if position is None else [position]
        direction = self.compressor.direction(as_batch(found.encoding, places, device))
        whole = Batch.of([query.encoding.input_ids], [query.encoding.response_mask.astype(np.float32)], device)
        scores = shares(self.scorer, self.compressor, direction, whole, query.rapidgrads.norms)[0]
        return replace(found, match=replace(found.match, answer_scores=scores.tolist()))

    @cached_property
    def scorer(self) -> TokenScores:
        """What computes heat-maps."""
        return TokenScores(self.loaded.model)

    def _result(
        self,
        level: str,
        asked: QueryInfo,
        found: SearchResult,
        number: int,
        matches: list[Candidate],
        seconds: Seconds,
        rescoring: Rescoring | None,
    ) -> Result:
        summary = found.summaries[number] if found.summaries else None
        config = self.store.config
        place = (self.store.id, config["model"]["path"], config["adapter"]["path"])
        return Result(
            index=IndexInfo(*place, self.rows_of(level).K, config["sketch"]["shuffles"], found.n),
            query=asked,
            direction="proponents" if found.largest else "opponents",
            level=level,
            search=found.method,
            recall=found.recall,
            seconds=seconds,
            summary=summary,
            matches=[one.match for one in matches],
            rescoring=rescoring,
        )


def example_of(record: dict[str, Any]) -> Example:
    """The example that a stored record describes."""
    messages = tuple((role, content) for role, content in record["messages"])
    prompt = display_text(messages)
    return Example(record["id"], prompt, record["response"], record["meta"], record["line"], messages)
