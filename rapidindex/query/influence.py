"""Heat-maps and uncompressed influence of the rows that a search found (Eq. 6 to 8), and the order that they give."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float32

from rapidindex.data.templates import Encoding
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.token_scores import TokenScores, shares
from rapidindex.query.encode import EncodedQuery, selected_batch
from rapidindex.results import Match, QueryInfo, Rescoring

RESCORED = 4
"""Candidates for each match, of which `rescore` computes the uncompressed influence."""
HEATMAP_TOKENS = 1024
"""Padded tokens of candidates whose heat-maps a GPU computes together. On a CPU that saves nothing: one at a time."""

Norms = Callable[[Sequence[int]], Float32[np.ndarray, "rows layers"]]
"""Reads the stored norms of each layer in these rows."""


@dataclass(frozen=True)
class Candidate:
    """A stored row that a search found."""

    row: int
    encoding: Encoding
    """The row's example."""
    match: Match


class Influence:
    """Computes uncompressed influences with one model and recipe."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.scorer = TokenScores(compressor.gradients.model)
        self.device = compressor.device

    def heatmaps(
        self, candidates: Sequence[Candidate], query: EncodedQuery, norms: Norms, lock: AbstractContextManager
    ) -> Iterator[Candidate]:
        """Yield the candidates with every token's share and the uncompressed influence in their matches.

        An example's influence is the mean of the shares. A token's is its own share, and the shares of the other tokens
        are in the same unit: that of the norms of this token. `lock` is held while the model works.
        """
        known, selection = query.known, query.info.selection
        direction = cache(lambda: self.compressor.direction(selected_batch(query.encoding, selection, self.device)))
        for group in _groups(candidates, HEATMAP_TOKENS if self.device.type == "cuda" else 0):
            if new := [candidate for candidate in group if _key("heat-map", candidate) not in known]:
                with lock:
                    scores = self._shares(new, direction(), norms)
                known.update(zip((_key("heat-map", candidate) for candidate in new), scores, strict=True))
            yield from (_scored(candidate, known[_key("heat-map", candidate)]) for candidate in group)

    def _shares(self, group: Sequence[Candidate], direction: torch.Tensor, norms: Norms) -> list[torch.Tensor]:
        masks = [candidate.encoding.response_mask.astype(np.float32) for candidate in group]
        batch = Batch.of([candidate.encoding.input_ids for candidate in group], masks, self.device)
        lengths = torch.from_numpy(norms([candidate.row for candidate in group])).to(self.device)
        return shares(self.scorer, self.compressor, direction, batch, lengths)

    def with_answer_scores(self, candidate: Candidate, query: EncodedQuery) -> Candidate:
        """Add the influence on each token of the answer (Eq. 7 for every j) to the candidate's match.

        Influence is symmetric: this is the heat-map of the query along the direction of the training example.
        """
        key = _key("answer", candidate)
        if key not in query.known:
            position = candidate.match.position
            selection = range(len(candidate.match.tokens)) if position is None else [position]
            query.known[key] = self._on_answer(candidate, selection, query)
        return replace(candidate, match=replace(candidate.match, answer_scores=query.known[key].tolist()))

    def of_tokens(
        self, candidate: Candidate, tokens: Sequence[int], query: EncodedQuery, norms: Norms
    ) -> Float32[torch.Tensor, " answer"]:
        """Return what some tokens of a candidate do to each token of the answer: the sum of their shares in that.

        Over the tokens asked about it averages to the sum of their shares in the heat-map.
        """
        key = _key(f"tokens {sorted(tokens)}", candidate)
        if key not in query.known:
            (lengths,) = torch.from_numpy(norms([candidate.row])).to(self.device)
            query.known[key] = len(tokens) * self._on_answer(candidate, tokens, query, lengths)
        return query.known[key]

    def _on_answer(
        self, candidate: Candidate, tokens: Sequence[int], query: EncodedQuery, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what the mean loss of some tokens does to each token of the answer; `lengths` are those of the row."""
        direction = self.compressor.direction(selected_batch(candidate.encoding, tokens, self.device), lengths)
        mask = query.encoding.response_mask.astype(np.float32)
        whole = Batch.of([query.encoding.input_ids], [mask], self.device)
        return shares(self.scorer, self.compressor, direction, whole, query.rapidgrads.norms)[0]


def rescore(
    candidates: Sequence[Candidate], k: int, query: QueryInfo, *, largest: bool
) -> tuple[list[Candidate], Rescoring]:
    """Return the k candidates of the largest (or smallest) uncompressed influence, and how far the order has moved.

    Asked about words, a candidate counts by its strongest token: what taught a word is mostly one word of a row, which
    the mean over a long row hides.
    """
    by_token = not query.whole and all(candidate.match.position is None for candidate in candidates)
    strongest = max if largest else min
    influence = np.array(
        [strongest(one.match.token_scores) if by_token else one.match.exact_score for one in candidates]
    )
    order = np.argsort(-influence if largest else influence, kind="stable")
    best = [candidates[number] for number in order[:k]]
    ranked = [replace(one, match=replace(one.match, rank=rank)) for rank, one in enumerate(best, 1)]
    for_words = sum(one.match.percentile is None for one in candidates)
    return ranked, replace(rescoring_of(order, by_token=by_token), for_words=for_words)


def rescoring_of(order: np.ndarray, *, by_token: bool) -> Rescoring:
    """Return how far candidates have moved whose new order this is: their former places, best first."""
    n = len(order)
    moves = np.abs(np.argsort(order) - np.arange(n))
    spearman = 1 - 6 * float((moves.astype(float) ** 2).sum()) / (n * (n**2 - 1)) if n > 1 else None
    return Rescoring(n, spearman, int(moves.max(initial=0)), by_token)


def _key(what: str, candidate: Candidate) -> tuple[str, str, int | None]:
    return what, candidate.match.id, candidate.match.position


def _scored(candidate: Candidate, token_scores: torch.Tensor) -> Candidate:
    position = candidate.match.position
    influence = token_scores.mean() if position is None else token_scores[position]
    match = replace(candidate.match, token_scores=token_scores.tolist(), exact_score=float(influence))
    return replace(candidate, match=match)


def _groups(candidates: Sequence[Candidate], tokens: int) -> Iterator[list[Candidate]]:
    """Yield the candidates in their order, in batches of about `tokens`; one for one where they are tokens.

    Tokens of one example differ in their norms, and so in the unit of their heat-maps.
    """
    group: list[Candidate] = []
    longest = 0
    for candidate in candidates:
        longest = max(longest, len(candidate.encoding.input_ids))
        if group and (candidate.match.position is not None or longest * (len(group) + 1) > tokens):
            yield group
            group, longest = [], len(candidate.encoding.input_ids)
        group.append(candidate)
    if group:
        yield group
