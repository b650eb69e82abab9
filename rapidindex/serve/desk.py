"""What the page asks, answered from one index. Every method yields or returns plain data for JSON.

Work with the model is queued by the index; between two pieces of an answer nothing is held, so that an answer which
nobody reads on is cancelled there. No path of this machine is in anything that is returned.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.config import QueryOptions, VerifyOptions
from rapidindex.errors import QueryError, RapidIndexError, UsageError
from rapidindex.evaluate.verify import verify
from rapidindex.query.checkpoints import BEST, SUM, CheckpointsIndex
from rapidindex.query.encode import EncodedQuery, example_of, generate_answer
from rapidindex.query.events import Answered, Ranked, Scored
from rapidindex.query.index import Index, model_work
from rapidindex.query.questions import Query, as_query
from rapidindex.results import Match, Result, Token
from rapidindex.store import Store, checkpoints_at
from rapidindex.views import heatmap, trials, wording
from rapidindex.views.sanitize import paragraph

Piece = dict[str, Any]

KEPT = 24
"""Questions whose gradients and results are kept: the report, the other direction and a repetition take no model."""
MOST_MATCHES = 50
LONGEST = 20_000
"""Characters of a prompt or an answer."""
MOST_TOKENS = 256
"""Tokens of an answer that the model gives."""


@dataclass(frozen=True)
class Posed:
    """A question at one checkpoint, or at their sum."""

    index: Index
    """The index that answers it."""
    checkpoint: str | None
    """None where the index has one checkpoint."""
    encoded: EncodedQuery


class Desk:
    """Answers a page's questions to the index at `path`, which `reload` opens again. UsageError for embeddings."""

    def __init__(self, open_index: Callable[[], Index]) -> None:
        self._open = open_index
        self.index = open_index()
        if self.index.recipe.encoder is not None:
            raise UsageError(
                "This is an index of an encoder's embeddings, which know no single words; the page asks about words.",
                hint="Ask it with rapidindex query, or serve the index of gradients that the encoder learnt from.",
            )
        self.loaded, self.failed = threading.Event(), ""
        self._answers = started_thread()
        """Where the model answers."""
        self._posed: OrderedDict[str, Posed] = OrderedDict()
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._matches: OrderedDict[str, tuple[str, dict[str, Match]]] = OrderedDict()
        """The level of a question, and its matches of both directions by `_name`."""

    def load(self) -> None:
        """Load the model, of several checkpoints the first's; where that fails, `state` says why.

        Another checkpoint's model is loaded beside it by the first question that needs it.
        """
        try:
            with model_work:
                first = _at(self.index, self._checkpoint({}))
                first.load(QueryOptions())
                for level in first.store.levels:
                    first.compressor_of(level)
            self.loaded.set()
        except Exception as error:
            self.failed = self.public(str(error) or type(error).__name__)

    def state(self) -> Piece:
        """Return what the index holds, whether its model is loaded, and whether it has changed on disk."""
        index, recipe = self.index, self.index.recipe
        return {
            "id": index.store.id,
            "folder": _path(index).name,
            "model": _last(recipe.model.path),
            "adapter": _last(recipe.adapter.path),
            "checkpoints": self._names,
            "examples": len(index),
            "levels": list(index.store.levels),
            "loaded": self.loaded.is_set(),
            "failed": self.failed,
            "changed": self._changed(),
        }

    def reload(self) -> Piece:
        """Open the index again, with the models that are loaded and still its own, and return the state."""
        fresh = self._open()
        for name, before in self._opened().items():
            with suppress(RapidIndexError):  # it is gone, or has another model, which its first question loads
                if before.is_loaded:
                    _at(fresh, name).use(before.loaded)
        self.index = fresh
        self._posed.clear()
        self._results.clear()
        self._matches.clear()
        return self.state()

    def words(self, asked: Piece) -> Piece:
        """Return an answer cut into its tokens, as the page shows and selects them."""
        query = self._query(asked)
        with model_work:
            encoding = self.index.template.encode(example_of(query), end=False)
        if encoding.truncated:
            raise QueryError("Prompt and answer are longer than the index's --max-length.", hint="Shorten them.")
        return {"kind": "words", "words": _pieces(query.answer or "", encoding.tokens)}

    def answer(self, asked: Piece) -> Iterator[Piece]:
        """Yield the model's own answer as it grows, and then its words; greedy, or drawn by the seed `seed`."""
        query, grown, stop = self._query(asked | {"answer": None}), queue.Queue(), threading.Event()
        name = self._checkpoint(asked)
        name = self._names[0] if name in (SUM, BEST) else name
        index = _at(self.index, name)
        seed = asked.get("seed")
        if not (seed is None or type(seed) is int and 0 <= seed < 2**63):
            raise UsageError("A seed is a whole number from 0.")

        def grow(text: str) -> bool:
            grown.put(text)
            return stop.is_set()

        def work() -> None:
            try:
                with model_work:
                    loaded, template = index.loaded, index.template
                    done = generate_answer(query, loaded, template, MOST_TOKENS, seed=seed, each=grow)
                grown.put((done.text,))
            except Exception as error:
                grown.put(error)

        yield from self._loading(name)
        self._answers.submit(work)
        try:
            while isinstance(piece := grown.get(), str):
                yield {"kind": "text", "text": paragraph(piece)}
        finally:
            stop.set()
        if isinstance(piece, Exception):
            raise piece
        text = piece[0]
        yield {"kind": "answered", "text": text, "checkpoint": name}
        if text.strip():
            yield self.words(asked | {"answer": text})

    def ask(self, asked: Piece) -> Iterator[Piece]:
        """Yield the ranking of both directions, each match's heat-map, and its influence on the answer's words.

        Heat-maps are those of the direction `direction`. The other is asked for with the same question, and so are
        those of the matches within chance, with `all`; what was computed before is not computed again.
        """
        options = self._options(asked)
        yield from self._loading(options.checkpoint)
        key, posed = self._pose(asked, options)
        yield {"kind": "posed", "selection": posed.encoded.info.selection, "key": key, "checkpoint": posed.checkpoint}
        options, results = replace(options, checkpoint=None), {}
        for opponents in (False, True):
            one = replace(options, opponents=opponents, heatmaps=False)
            result = next(event.result for event in posed.index.ask([posed.encoded], one) if isinstance(event, Ranked))
            results[opponents] = replace(result, checkpoint=posed.checkpoint)
            yield self._ranking(results[opponents])
        found = {_name(match): match for result in results.values() for match in result.matches}
        _keep(self._matches, key, (results[False].level, found))
        name = "opponents" if options.opponents else "proponents"
        for event in posed.index.ask([posed.encoded], replace(options, answer_scores=True)):
            if isinstance(event, Scored):
                yield _scored(event, name)
            elif isinstance(event, Answered):
                result = replace(event.result, checkpoint=posed.checkpoint)
                _keep(self._results, f"{key} {name}", result)
                if result.rescoring:  # in another order, and of others, than the search has said
                    found |= {_name(match): match for match in result.matches}
                    yield self._ranking(result)
                    yield from (_scored(Scored(0, match, 1, 1), name) for match in result.matches)
        yield {"kind": "done", "direction": name}

    def word(self, asked: Piece) -> Iterator[Piece]:
        """Yield what some tokens of a match, a word of its response, do to each token of a question's answer.

        Until the model is free, pieces without it come: whoever no longer reads them has left the queue.
        """
        key, tokens = str(asked.get("key")), asked.get("tokens")
        level, matches = self._matches.get(key) or ("", {})
        match, posed = matches.get(str(asked.get("match"))), self._posed.get(key)
        if match is None or posed is None:
            raise QueryError("This question is no longer kept.", hint="Ask again.")
        if not isinstance(tokens, list) or not all(type(one) is int for one in tokens):
            raise UsageError("The tokens of a word are a list of positions.")
        yield {"kind": "queued"}
        while not model_work.acquire(timeout=0.2):
            yield {"kind": "queued"}
        try:
            scores = posed.index.influence_of(tokens, match, posed.encoded, level=level)
        finally:
            model_work.release()
        yield {"kind": "pushed", "answer": scores}

    def result(self, key: str, direction: str) -> Result:
        """Return a finished result. QueryError where there is none."""
        result = self._results.get(f"{key} {direction}")
        if result is None:
            raise QueryError("This result is no longer kept.", hint="Ask again.")
        info = replace(result.index, model=_last(result.index.model), adapter=_last(result.index.adapter))
        return replace(result, index=info, matches=list(map(_public_match, result.matches)))

    def report(self, asked: Piece) -> str:
        """Return the report of a finished result as one HTML file."""
        key = str(asked.get("key"))
        found = [name for name in ("proponents", "opponents") if f"{key} {name}" in self._results]
        results = [self.result(key, name) for name in found or ["proponents"]]
        return results[0].to_html(opponents=results[1] if len(results) > 1 else None)

    def verify(self, asked: Piece) -> Piece:
        """Return in words what a step on the matches does to the words of a question, beside other rows."""
        posed = self._posed.get(str(asked.get("key")))
        if posed is None:
            raise QueryError("This question is no longer kept.", hint="Ask again.")
        if posed.checkpoint == SUM:
            raise UsageError("A step of training starts from one checkpoint, not from their sum.", hint="Choose one.")
        options = VerifyOptions(top=max(1, min(5, len(posed.index) // 2)), draws=10)  # half: somebody waits
        verdict = paragraph(trials.verdict(verify(posed.index, posed.encoded, options)))
        return {"verdict": f"At the checkpoint {posed.checkpoint}: {verdict}" if posed.checkpoint else verdict}

    def public(self, text: str) -> str:
        """Return a message in which the places of index, model and adapter are their last names."""
        places = [str(_path(self.index)), str(Path.home())]
        for one in self._opened().values():
            places += [str(one.store.path), one.recipe.model.path, one.recipe.adapter.path]
        for place in sorted(filter(None, places), key=len, reverse=True):
            text = text.replace(place, _last(place))
        return text

    @property
    def _names(self) -> list[str]:
        """The checkpoints, the first one first; empty where there is one without a name."""
        return self.index.names if isinstance(self.index, CheckpointsIndex) else []

    def _opened(self) -> dict[str | None, Index]:
        """Return the indexes that are open, by their checkpoints' names."""
        return self.index.opened if isinstance(self.index, CheckpointsIndex) else {None: self.index}

    def _loading(self, checkpoint: str | None) -> Iterator[Piece]:
        """Yield for whom a model is loaded first, where a question has to wait for that."""
        names = self._names if checkpoint in (SUM, BEST) else [checkpoint]
        waited = [name for name in names if not _at(self.index, name).is_loaded]
        if waited:
            yield {"kind": "loading", "checkpoints": waited}

    def _pose(self, asked: Piece, options: QueryOptions) -> tuple[str, Posed]:
        query, name = self._query(asked), options.checkpoint
        key = f"{abs(hash((query.text, query.turns, query.answer, query.span, options.k, options.level, name))):x}"
        if key not in self._posed:
            alone = replace(options, checkpoint=None, opponents=False)
            if name == BEST:
                (at_each,) = self.index.encode([query], options)
                name = self.index.best(at_each, alone)
                posed = Posed(self.index.checkpoint(name), name, at_each.at[name])
            else:
                index = _at(self.index, name)
                posed = Posed(index, name, index.encode([query], alone)[0])
            _keep(self._posed, key, posed)
        return key, self._posed[key]

    def _checkpoint(self, asked: Piece) -> str | None:
        """Return the checkpoint that is asked: the first by default. UsageError for one that there is not."""
        name = asked.get("checkpoint")
        if name is None:
            return next(iter(self._names), None)
        if not self._names or name not in (*self._names, SUM, BEST):
            raise UsageError("The index has no such checkpoint.", hint="Load the page again, and choose another.")
        return name

    def _query(self, asked: Piece) -> Query:
        fields = {name: asked.get(name) or None for name in ("prompt", "answer", "span", "system")}
        for name, value in fields.items():
            if value is not None and (not isinstance(value, str) or len(value) > LONGEST):
                raise UsageError(f"The {name} is a text of at most {LONGEST:,} characters.")
        if not (fields["prompt"] or "").strip():
            raise QueryError("The prompt is empty.", hint="Type what the model was asked.")
        system = fields.pop("system")
        return as_query(fields.pop("prompt"), system=system, **fields)

    def _options(self, asked: Piece) -> QueryOptions:
        k, direction = asked.get("k", 10), asked.get("direction", "proponents")
        if type(k) is not int or not 1 <= k <= MOST_MATCHES:
            raise UsageError(f"The number of matches is from 1 to {MOST_MATCHES}.")
        if direction not in ("proponents", "opponents"):
            raise UsageError("The direction is proponents or opponents.")
        every = asked.get("all") is True
        checkpoint = self._checkpoint(asked)
        opponents = direction == "opponents"
        return QueryOptions(k=k, opponents=opponents, level=asked.get("level"), all=every, checkpoint=checkpoint)

    def _ranking(self, result: Result) -> Piece:
        return {
            "kind": "ranked",
            "direction": result.direction,
            "checkpoint": result.checkpoint,
            "n": result.index.n,
            "unit": wording.unit_name(result),
            "search": wording.search(result),
            "seconds": asdict(result.seconds),
            "standing": " ".join(filter(None, (wording.standing(result), wording.rescored(result)))),
            "final": result.rescoring is not None,
            "folded": wording.folded(result)[2],
            "unfinished": wording.unfinished(result),
            "matches": [_match(result, match) for match in result.matches],
        }

    def _changed(self) -> bool:
        listed = self.index.several if self._names else None
        stores = [one.store for one in self._opened().values()]
        try:
            there = [Store.open(store.path) for store in stores]
            return checkpoints_at(_path(self.index)) != listed or list(map(_version, there)) != list(
                map(_version, stores)
            )
        except Exception:
            return True


def started_thread() -> ThreadPoolExecutor:
    """Return a thread for work to come, running already.

    Where memory is short, a thread may end before it says that it has begun, and `Thread.start` waits for ever.
    """
    thread = ThreadPoolExecutor(1)
    thread.submit(bool).result()
    return thread


def _at(index: Index, checkpoint: str | None) -> Index:
    """Return the index that answers at a checkpoint, at their sum, or where there is but one."""
    if not isinstance(index, CheckpointsIndex):
        return index
    return index.sum if checkpoint == SUM else index.checkpoint(checkpoint)


def _path(index: Index) -> Path:
    return index.several.path if isinstance(index, CheckpointsIndex) else Path(index.store.path)


def _version(store: Store) -> tuple[Any, ...]:
    return store.id, store.manifest["revision"], store.removed


def _match(result: Result, match: Match) -> Piece:
    return {
        "rank": match.rank,
        "name": _name(match),
        "id": match.id,
        "score": wording.signed(match.score),
        "percentile": match.percentile,
        "distance": wording.distance(result, match),
        "beyond": result.stands_out(match) is not False,
        "place": paragraph(wording.place(_public_match(match))),
        "prompt": paragraph(match.prompt),
        "response": paragraph(match.response[: heatmap.LONGEST]),
        "hidden": max(0, len(match.response) - heatmap.LONGEST),
        "token": paragraph(wording.matched_token(match)),
        "meta": {paragraph(name): paragraph(text) for name, text in wording.meta(match).items()},
    }


def _scored(event: Scored, direction: str) -> Piece:
    match = event.match
    piece = {"kind": "scored", "direction": direction, "name": _name(match), "id": match.id, "rank": match.rank}
    piece |= {"done": event.done, "total": event.total}
    if match.exact_score is not None:
        piece["influence"] = wording.signed(match.exact_score)
        shown = heatmap.beginning(match.response, match.tokens, match.token_scores)
        piece["whole"] = heatmap.total(match)
        piece["heat"] = _pieces(*shown, piece["whole"])
    if match.answer_scores:
        piece["answer"] = match.answer_scores
    return piece


def _pieces(text: str, tokens: list[Token], scores: list[float] | None = None, total: float = 0.0) -> list[list[Any]]:
    """Return a text's words and the rest of it: [text before, text, text after, positions, share, its percent], [rest].

    Without `scores`, share and percent are left out. White space alone and tokens without characters are no words.
    """
    pieces, rest = heatmap.segments(text, tokens, [0.0] * len(tokens) if scores is None else scores)
    shown, space = [], ""
    for piece in pieces:
        if piece.special or not piece.text:
            space += piece.before + piece.after
            continue
        texts = map(paragraph, (space + piece.before, piece.text, piece.after))
        share = [] if scores is None else [piece.score, wording.percent(piece.score, total)]
        shown.append([*texts, [token.position for token in piece.shares], *share])
        space = ""
    return [*shown, [paragraph(space + rest)]]


def _name(match: Match) -> str:
    """Return a name that no other match of a question has: tokens of one example share its id."""
    return match.id if match.position is None else f"{match.id}:{match.position}"


def _public_match(match: Match) -> Match:
    return replace(match, source=_last(match.source) or None)


def _keep(kept: OrderedDict, key: str, value: Any) -> None:
    kept[key] = value
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _last(path: str | None) -> str:
    return Path(path).name if path else ""
