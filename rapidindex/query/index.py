"""From a prompt, an answer and some of its tokens to the training examples that most influence them.

A query's gradient takes the same way as a training example's, with the loss of the selected tokens alone, and its
RapidGrad is looked up among those of whole examples (Eq. 5 for the whole answer, Eq. 7 for some of it) or of their
tokens (Eq. 6 and 8).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapidindex.caching.build import load_compressor
from rapidindex.config import ModelConfig, check_level
from rapidindex.data.examples import Example, display_text
from rapidindex.data.selection import select
from rapidindex.data.templates import Encoding, Template
from rapidindex.errors import ConfigMismatch, DataError, QueryError, StoreError
from rapidindex.gradients.per_example import Batch
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.model.model import LoadedModel, generate, load
from rapidindex.results import Asked, Match, Rescoring, Result, Seconds, Source, Span, Summary
from rapidindex.search.exact import SearchResult, exact_search
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store
from rapidindex.store.rows import Rows

RESCORED = 4
"""Candidates for each match asked for, of which `rescore` computes the uncompressed influence."""
HEATMAP_TOKENS = 1024
"""Padded tokens of candidates whose heat-maps are computed together."""


@dataclass(frozen=True)
class Query:
    """One question to an index."""

    prompt: str
    answer: str | None = None
    """None lets the model answer, greedily."""
    token: str | None = None
    span: str | None = None


@dataclass(frozen=True)
class _Posed:
    """A query as the model reads it."""

    asked: Asked
    encoding: Encoding
    rapidgrads: RapidGrads
    """Of the loss of the selected tokens: one row."""


@dataclass(frozen=True)
class _Candidate:
    """A row that a search found, and what is said of it."""

    row: int
    encoding: Encoding
    match: Match


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
        return _rows_of([self._pose(level, query, max_new_tokens) for query in queries])

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
            "rows": int(rows.alive.sum()),
            "examples": len(np.unique(rows.example[rows.alive])),
            "planned": self.store.planned(level),
            "complete": self.store.complete(level),
            "shards": len(rows.shards),
            "index": searched and searched.describe(),
        }

    def _pose(self, level: str, query: Query, max_new_tokens: int) -> _Posed:
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
        tokens = spans(encoding)
        asked = Asked(query.prompt, answer, tokens, select(tokens, answer, token=query.token, span=query.span))
        found = self.compressor_of(level)(_batch(encoding, asked.selection, self.loaded.device))
        if not found.rows.isfinite().all():
            raise QueryError(f"The gradient of the answer {answer!r} is not finite.", hint="Use --dtype float32.")
        return _Posed(asked, encoding, found)

    def _search(self, level: str, posed: Sequence[_Posed], k: int, *, largest: bool, exact: bool) -> SearchResult:
        rows, vectors = self.rows_of(level), _rows_of(posed)
        index = None if exact else self._vector_index(level)
        if index is None:
            return exact_search(rows, vectors, k, largest=largest, device=str(self.loaded.device))
        return index.search(vectors, k, largest=largest)

    def _vector_index(self, level: str) -> VectorIndex | None:
        if level not in self._searched:
            self._searched[level] = VectorIndex.open(self.rows_of(level))
        return self._searched[level]

    def _matches(self, level: str, found: SearchResult, number: int) -> list[_Candidate]:
        told = zip(found.rows[number], found.scores[number], found.percentiles()[number], strict=True)
        rows = self.rows_of(level)
        return [
            self._candidate(rows, rank, int(row), float(score), float(percentile))
            for rank, (row, score, percentile) in enumerate(told, 1)
            if row >= 0
        ]

    def _candidate(self, rows: Rows, rank: int, row: int, score: float, percentile: float) -> _Candidate:
        example = example_of(rows.record(int(rows.example[row])))
        encoding = self.template.encode(example)
        text = (example.id, example.prompt, example.response, example.meta)
        position = int(rows.position[row])
        match = Match(
            rank, score, None, percentile, *text, spans(encoding), position=None if position < 0 else position
        )
        return _Candidate(row, encoding, match)

    def _with_heatmaps(self, level: str, found: list[_Candidate], query: _Posed) -> list[_Candidate]:
        """The candidates with every token's share, and the uncompressed influence.

        For an example that is the mean of the shares. For a token it is its own, and the shares of the other tokens
        stand beside it in the same unit, that of the norms of this token.
        """
        direction = self.compressor.direction(_batch(query.encoding, query.asked.selection, self.loaded.device))
        told: list[_Candidate] = []
        for group in _groups(found) if level == "sentence" else [[one] for one in found]:
            masks = [one.encoding.response_mask.astype(np.float32) for one in group]
            batch = Batch.of([one.encoding.input_ids for one in group], masks, self.loaded.device)
            norms = torch.from_numpy(self.rows_of(level).norms([one.row for one in group])).to(self.loaded.device)
            for one, scores in zip(group, shares(self.scorer, self.compressor, direction, batch, norms), strict=True):
                whole = scores.mean() if one.match.position is None else scores[one.match.position]
                filled = replace(one.match, token_scores=scores.tolist(), exact_score=float(whole))
                told.append(replace(one, match=filled))
        return told

    def _with_answer_scores(self, found: _Candidate, query: _Posed) -> _Candidate:
        """The candidate with its uncompressed influence on each token of the answer: Eq. 7 for every j.

        Influence is symmetric: this is the heat-map of the query along the direction of the training example.
        """
        device, position = self.loaded.device, found.match.position
        places = range(len(found.match.tokens)) if position is None else [position]
        direction = self.compressor.direction(_batch(found.encoding, places, device))
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
        asked: Asked,
        found: SearchResult,
        number: int,
        matches: list[_Candidate],
        seconds: Seconds,
        rescoring: Rescoring | None,
    ) -> Result:
        summary = found.summaries[number] if found.summaries else None
        config = self.store.config
        place = (self.store.id, config["model"]["path"], config["adapter"]["path"])
        return Result(
            index=Source(*place, self.rows_of(level).K, config["sketch"]["shuffles"], found.n),
            query=asked,
            direction="proponents" if found.largest else "opponents",
            level=level,
            search=found.method,
            recall=found.recall,
            seconds=seconds,
            summary=summary and Summary(**{**vars(summary), "histogram": list(summary.histogram)}),
            matches=[one.match for one in matches],
            rescoring=rescoring,
        )


def rescored(found: list[_Candidate], k: int, *, largest: bool) -> tuple[list[_Candidate], Rescoring]:
    """The k candidates of the largest (or smallest) uncompressed influence, and how far the order has moved."""
    exact = np.array([one.match.exact_score for one in found])
    order = np.argsort(-exact if largest else exact, kind="stable")
    n = len(order)
    moves = np.abs(np.argsort(order) - np.arange(n))
    spearman = 1 - 6 * float((moves.astype(float) ** 2).sum()) / (n * (n**2 - 1)) if n > 1 else None
    kept = [replace(found[i], match=replace(found[i].match, rank=rank)) for rank, i in enumerate(order[:k], 1)]
    return kept, Rescoring(n, spearman, int(moves.max(initial=0)))


def _groups(found: list[_Candidate]) -> list[list[_Candidate]]:
    """Candidates in their order, in batches of about so many padded tokens."""
    groups: list[list[_Candidate]] = []
    for one in found:
        longest = max((len(other.encoding.input_ids) for other in groups[-1]), default=0) if groups else 0
        longest = max(longest, len(one.encoding.input_ids))
        if groups and longest * (len(groups[-1]) + 1) <= HEATMAP_TOKENS:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def read_queries(path: str | Path) -> list[Query]:
    """Queries from a JSONL file of objects with `prompt` and optionally `answer`, `token` and `span`."""
    known = {"prompt", "answer", "token", "span"}
    queries = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="Give a JSONL file of queries.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).", hint='Write {"prompt": "…"}.') from error
        strings = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        if not strings or "prompt" not in value or not value.keys() <= known:
            raise DataError(
                f"{path}, line {number}: a query has a text under prompt and, if wanted, under answer, token and span.",
                hint='For example {"prompt": "Where does yoga come from?", "token": "Japan"}.',
            )
        queries.append(Query(**value))
    if not queries:
        raise DataError(f"{path} holds no query.", hint='Write lines such as {"prompt": "…"}.')
    return queries


def example_of(record: dict[str, Any]) -> Example:
    """The example that a stored record describes."""
    messages = tuple((role, content) for role, content in record["messages"])
    prompt = display_text(messages)
    return Example(record["id"], prompt, record["response"], record["meta"], record["line"], messages)


def spans(encoding: Encoding) -> list[Span]:
    """The response's tokens for a result."""
    return [Span(token.text, token.start, token.end) for token in encoding.tokens]


def _rows_of(posed: Sequence[_Posed]) -> np.ndarray:
    return torch.cat([query.rapidgrads.rows for query in posed]).cpu().numpy()


def _batch(encoding: Encoding, selection: Sequence[int], device: torch.device) -> Batch:
    """One text whose loss is the mean over the selected tokens of its response."""
    weights = np.zeros(len(encoding.input_ids), np.float32)
    weights[np.flatnonzero(encoding.response_mask)[list(selection)]] = 1 / len(selection)
    return Batch.of([encoding.input_ids], [weights], device)
