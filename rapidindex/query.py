"""From a prompt, an answer and some of its tokens to the training examples that most influence them.

A query's gradient takes the same way as a training example's, with the loss of the selected tokens alone (Eq. 5 for
the whole answer, Eq. 7 for some of it), and its RapidGrad is looked up in the index.
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

from rapidindex.build import load_compressor
from rapidindex.config import ModelConfig
from rapidindex.errors import ConfigMismatch, DataError, QueryError
from rapidindex.exact import SearchResult, exact_search
from rapidindex.examples import Example, display_text
from rapidindex.gradients import Batch
from rapidindex.heatmaps import TokenScores, shares
from rapidindex.index import VectorIndex
from rapidindex.model import LoadedModel, generate, load
from rapidindex.rapidgrad import Compressor
from rapidindex.results import Asked, Match, Rescoring, Result, Seconds, Source, Span, Summary
from rapidindex.selection import select
from rapidindex.store import Store
from rapidindex.templates import Encoding, Template

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
        rescore: bool = False,
        max_new_tokens: int = 64,
    ) -> Result:
        """The k training examples that most influence `answer`, or the tokens of it that `token` or `span` selects.

        Without an answer the model gives one. Opponents are those whose influence is the most negative. `exact` scans
        every stored RapidGrad; `heatmaps` adds every response token's share to the matches, and their uncompressed
        influence; `rescore` computes that of four times k candidates and orders by it. Raises QueryError
        (TokenNotFound) for a query that cannot be answered.
        """
        asked = [Query(prompt, answer, token, span)]
        how = {"k": k, "opponents": opponents, "exact": exact, "heatmaps": heatmaps, "rescore": rescore}
        return self.query_many(asked, **how, max_new_tokens=max_new_tokens)[0]

    def query_many(
        self,
        queries: Sequence[Query],
        *,
        k: int = 10,
        opponents: bool = False,
        exact: bool = False,
        heatmaps: bool = True,
        rescore: bool = False,
        max_new_tokens: int = 64,
    ) -> list[Result]:
        """As `query`, for many at once: one search."""
        started = time.perf_counter()
        posed = [self._pose(query, max_new_tokens) for query in queries]
        vectors = self.vectors(posed)
        gradient = (time.perf_counter() - started) / max(1, len(posed))
        found = self._search(vectors, RESCORED * k if rescore else k, largest=not opponents, exact=exact)
        results = []
        for number, (asked, encoding) in enumerate(posed):
            matches = self._matches(found, number)
            started = time.perf_counter()
            rescoring = None
            if heatmaps or rescore:
                matches = self._with_heatmaps(matches, asked, encoding)
            if rescore:
                matches, rescoring = rescored(matches, k, largest=not opponents)
            seconds = Seconds(
                gradient,
                found.search_seconds / len(posed),
                found.rerank_seconds / len(posed),
                time.perf_counter() - started,
            )
            results.append(self._result(asked, found, number, matches, seconds, rescoring))
        return results

    def answer(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """What the model says to `prompt`, greedily."""
        text = self.template.render_prompt((("user", prompt),))
        special = self.template.add_special_tokens
        return generate(self.loaded, text, add_special_tokens=special, max_new_tokens=max_new_tokens)

    def vectors(self, posed: Sequence[tuple[Asked, Encoding]]) -> np.ndarray:
        """The queries' RapidGrads, float32 [queries, K]."""
        rows = [self.compressor(_batch(asked, encoding, self.loaded.device)).rows for asked, encoding in posed]
        vectors = torch.cat(rows).cpu().numpy()
        for (asked, _), vector in zip(posed, vectors, strict=True):
            if not np.isfinite(vector).all():
                raise QueryError(
                    f"The gradient of the answer {asked.answer!r} is not finite.", hint="Use --dtype float32."
                )
        return vectors

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

    @cached_property
    def compressor(self) -> Compressor:
        """What turns a query into its RapidGrad, as when the index was built."""
        return load_compressor(self.store, self.loaded)

    @cached_property
    def rows(self):
        """The stored RapidGrads of whole examples."""
        return self.store.rows("sentence")

    def info(self) -> dict[str, Any]:
        """What the index holds and how it was built, as plain data; loads no model."""
        rows = self.rows
        return {
            "path": str(self.store.path),
            "id": self.store.id,
            "created": self.store.manifest["created"],
            "examples": int(rows.alive.sum()),
            "planned": self.store.manifest["levels"]["sentence"]["planned"],
            "complete": self.store.complete("sentence"),
            "removed": int((~rows.alive).sum()),
            "rejected": rows.rejected,
            "skipped": self.store.manifest["skipped"],
            "shards": len(rows.shards),
            "bytes": sum(file.stat().st_size for file in Path(self.store.path).rglob("*") if file.is_file()),
            "layers": len(self.store.layers),
            "gradient_size": sum(layer["size"] for layer in self.store.layers),
            "config": self.store.config,
            "versions": self.store.manifest["versions"],
            "index": self._vector_index and self._vector_index.describe(),
        }

    def _pose(self, query: Query, max_new_tokens: int) -> tuple[Asked, Encoding]:
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
        return Asked(query.prompt, answer, tokens, select(tokens, answer, token=query.token, span=query.span)), encoding

    def _search(self, vectors: np.ndarray, k: int, *, largest: bool, exact: bool) -> SearchResult:
        index = None if exact else self._vector_index
        if index is None:
            return exact_search(self.rows, vectors, k, largest=largest, device=str(self.loaded.device))
        return index.search(vectors, k, largest=largest)

    @cached_property
    def _vector_index(self) -> VectorIndex | None:
        return VectorIndex.open(self.rows)

    def _matches(self, found: SearchResult, number: int) -> list[_Candidate]:
        told = zip(found.rows[number], found.scores[number], found.percentiles()[number], strict=True)
        return [
            self._candidate(rank, int(row), float(s), float(p)) for rank, (row, s, p) in enumerate(told, 1) if row >= 0
        ]

    def _candidate(self, rank: int, row: int, score: float, percentile: float) -> _Candidate:
        example = example_of(self.rows.record(int(self.rows.example[row])))
        encoding = self.template.encode(example)
        text = (example.id, example.prompt, example.response, example.meta)
        return _Candidate(row, encoding, Match(rank, score, None, percentile, *text, spans(encoding), []))

    def _with_heatmaps(self, found: list[_Candidate], asked: Asked, encoding: Encoding) -> list[_Candidate]:
        """The candidates with every token's share, and the uncompressed influence, their mean."""
        direction = self.compressor.direction(_batch(asked, encoding, self.loaded.device))
        told: list[_Candidate] = []
        for group in _groups(found):
            masks = [one.encoding.response_mask.astype(np.float32) for one in group]
            batch = Batch.of([one.encoding.input_ids for one in group], masks, self.loaded.device)
            norms = torch.from_numpy(self.rows.norms([one.row for one in group])).to(self.loaded.device)
            for one, scores in zip(group, shares(self.scorer, self.compressor, direction, batch, norms), strict=True):
                filled = replace(one.match, token_scores=scores.tolist(), exact_score=float(scores.mean()))
                told.append(replace(one, match=filled))
        return told

    @cached_property
    def scorer(self) -> TokenScores:
        """What computes heat-maps."""
        return TokenScores(self.loaded.model)

    def _result(
        self,
        asked: Asked,
        found: SearchResult,
        number: int,
        matches: list[_Candidate],
        seconds: Seconds,
        rescoring: Rescoring | None,
    ) -> Result:
        summary = found.summaries[number] if found.summaries else None
        config = self.store.config
        sketch = config["sketch"]
        place = (self.store.id, config["model"]["path"], config["adapter"]["path"])
        return Result(
            index=Source(*place, sketch["K"], sketch["shuffles"], found.n),
            query=asked,
            direction="proponents" if found.largest else "opponents",
            level="sentence",
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


def _batch(asked: Asked, encoding: Encoding, device: torch.device) -> Batch:
    """One query whose loss is the mean over the selected tokens."""
    weights = np.zeros(len(encoding.input_ids), np.float32)
    weights[np.flatnonzero(encoding.response_mask)[asked.selection]] = 1 / len(asked.selection)
    return Batch.of([encoding.input_ids], [weights], device)
