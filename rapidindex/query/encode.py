"""A query as the model reads it: its answer, its tokens, and the RapidGrad of the loss of those asked about.

A query's gradient is computed as a training example's is, with the loss of the selected tokens alone (Eq. 5 for the
whole answer, Eq. 7 for some of it).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rapidindex.data.examples import Example
from rapidindex.data.templates import Encoding, Template
from rapidindex.data.tokens import Selection, select_tokens
from rapidindex.errors import QueryError, TokenNotFound
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import Compressor, RapidGrads
from rapidindex.model.model import Generated, LoadedModel, generate
from rapidindex.query.questions import Query
from rapidindex.results import QueryInfo


@dataclass(frozen=True)
class EncodedQuery:
    """A query as the model reads it."""

    info: QueryInfo
    encoding: Encoding
    rapidgrads: RapidGrads
    """One row: the RapidGrad of the loss of the selected tokens."""
    seconds: float = 0.0
    """Seconds that the answer and the gradient took."""
    known: dict[tuple[str, str, int | None], torch.Tensor] = field(
        default_factory=dict, kw_only=True, repr=False, compare=False
    )
    """Token scores that were computed before, so that the same question takes none twice: by what they are (`heat-map`
    or `answer`), and by the match's example and position."""


def encode_query(
    query: Query, loaded: LoadedModel, template: Template, compressor: Compressor, max_new_tokens: int
) -> EncodedQuery:
    """Answer the query where it has no answer, select its tokens, and compute its RapidGrad.

    QueryError for an empty prompt or answer, a text longer than the template's limit, or a gradient that is not finite;
    TokenNotFound where the token is not in the answer.
    """
    if not query.turns[-1][1].strip():
        raise QueryError("The prompt is empty.", hint="Give the prompt that the model was asked.")
    answer, encoding = _answer(query, loaded, template, max_new_tokens)
    if encoding.truncated:
        raise QueryError(
            f"Prompt and answer have more than the {template.max_length} tokens of --max-length.",
            hint="Shorten them, or build the index with a larger --max-length.",
        )
    loaded.limits.check(encoding.input_ids, "prompt and answer")
    selection = _selection(query, answer, encoding)
    rapidgrads = compressor(selected_batch(encoding, selection.positions, loaded.device))
    if not rapidgrads.rows.isfinite().all():
        raise QueryError(f"The gradient of the answer {answer!r} is not finite.", hint="Use --dtype float32.")
    info = QueryInfo(query.text, answer, encoding.tokens, *selection, query.meta)
    return EncodedQuery(info, encoding, rapidgrads)


def _selection(query: Query, answer: str, encoding: Encoding) -> Selection:
    """Return the tokens that are asked about. TokenNotFound says where the answer is the model's own."""
    try:
        return select_tokens(encoding.tokens, answer, token=query.token, span=query.span)
    except TokenNotFound as error:
        if query.answer is not None:
            raise
        hint = f'To ask about what it said before, give that with --answer "…". {error.hint}'
        raise TokenNotFound(f"The model was asked for its own answer. {error.message}", hint=hint) from error


def _answer(query: Query, loaded: LoadedModel, template: Template, max_new_tokens: int) -> tuple[str, Encoding]:
    """Return the answer as text and as token ids: the model's own is read as it was given, token for token."""
    template.check_plain(query.turns, query.tools)
    if query.answer is None:
        generated = generate_answer(query, loaded, template, max_new_tokens)
        if not generated.text.strip():
            raise QueryError("The model's own answer to this prompt is empty.", hint="Give one with --answer.")
        return template.encode_generated(generated.prompt_ids, generated.ids)
    if not query.answer.strip():
        raise QueryError("The answer is empty.", hint="Give its text with --answer, or leave --answer out.")
    return query.answer, template.encode(example_of(query), end=False)


def example_of(query: Query) -> Example:
    """Return a query and its answer as the example whose gradient is compared with those of training examples."""
    return Example("", query.text, query.answer or "", {}, 0, query.turns, tools=query.tools)


def generate_answer(
    query: Query, loaded: LoadedModel, template: Template, max_new_tokens: int, **drawing: Any
) -> Generated:
    """Return the model's answer: greedy, or as `drawing` (`seed` and `each` of `generate`) says."""
    prompt, special = template.render_prompt(query.turns, query.tools), template.add_special_tokens
    return generate(loaded, prompt, add_special_tokens=special, max_new_tokens=max_new_tokens, **drawing)


def selected_text(info: QueryInfo) -> str:
    """Return the answer with spaces in the place of the characters that are not asked about."""
    spans = [(info.tokens[i].start, info.tokens[i].end) for i in info.selection]
    return "".join(c if any(a <= at < b for a, b in spans) else " " for at, c in enumerate(info.answer))


def stack_rows(queries: Sequence[EncodedQuery]) -> np.ndarray:
    """Return the RapidGrads of the queries, float32 [queries, K]."""
    return torch.cat([query.rapidgrads.rows for query in queries]).cpu().numpy()


def selected_batch(encoding: Encoding, selection: Sequence[int], device: torch.device) -> Batch:
    """Return a batch of one text whose loss is the mean over the selected tokens of its response."""
    weights = np.zeros(len(encoding.input_ids), np.float32)
    weights[np.flatnonzero(encoding.response_mask)[list(selection)]] = 1 / len(selection)
    return Batch.of([encoding.input_ids], [weights], device)
