"""A question as the model reads it, and its RapidGrad."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rapidindex.data.templates import Encoding
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.rapidgrad import RapidGrads
from rapidindex.results import QueryInfo


@dataclass(frozen=True)
class EncodedQuery:
    """A query as the model reads it."""

    asked: QueryInfo
    encoding: Encoding
    rapidgrads: RapidGrads
    """Of the loss of the selected tokens: one row."""


def rows_of(posed: Sequence[EncodedQuery]) -> np.ndarray:
    """The RapidGrads of several queries: float32 [queries, K]."""
    return torch.cat([query.rapidgrads.rows for query in posed]).cpu().numpy()


def as_batch(encoding: Encoding, selection: Sequence[int], device: torch.device) -> Batch:
    """One text whose loss is the mean over the selected tokens of its response."""
    weights = np.zeros(len(encoding.input_ids), np.float32)
    weights[np.flatnonzero(encoding.response_mask)[list(selection)]] = 1 / len(selection)
    return Batch.of([encoding.input_ids], [weights], device)
