"""Questions as anchors of a distillation, and files of questions: each costs one gradient by the language model."""

from pathlib import Path
from typing import Any

from rapidindex.config import DistillConfig, EncoderConfig, QueryOptions
from rapidindex.encoder.distill import DistillSummary
from rapidindex.encoder.distill import distill as distill_index
from rapidindex.encoder.parts import Text
from rapidindex.errors import DataError, QueryError, UsageError
from rapidindex.progress import Progress, silent
from rapidindex.query.encode import EncodedQuery
from rapidindex.query.index import Index
from rapidindex.query.questions import Query, read_queries


def distill(
    index: str | Path,
    output: str | Path,
    options: DistillConfig | None = None,
    encoder: str = EncoderConfig.model,
    queries: str | Path | None = None,
    *,
    model: Any = None,
    adapter: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> DistillSummary:
    """Distil the ranking of `index` into `encoder`: see `encoder.distill`.

    `queries` is a file of questions that are anchors too. Each is answered by the model where it has no answer, and
    costs a gradient. Raises as `encoder.distill` does, and DataError, naming the line, for a question that cannot be
    answered.
    """
    config = EncoderConfig(encoder, device)
    texts = []
    if queries is not None:
        opened = Index.open(index, model=model, adapter=adapter, device=device)
        asked = encode_file(opened, queries, read_queries(queries), progress)
        texts = [Text(one.info.prompt, one.info.answer, row=one.rapidgrads.rows[0].cpu().numpy()) for one in asked]
    return distill_index(
        index, output, options, encoder=config, questions=texts, overwrite=overwrite, progress=progress
    )


def encode_file(
    index: Index,
    file: str | Path,
    asked: dict[int, Query],
    progress: Progress,
    options: QueryOptions | None = None,
) -> list[EncodedQuery]:
    """Encode all queries of a file, by their lines. DataError, naming the line, for one that cannot be answered."""
    encoded: list[EncodedQuery] = []
    index.encode([], options)
    index.load(options or QueryOptions())  # a model that cannot be loaded is no fault of a line
    for number, (line, query) in enumerate(asked.items()):
        progress("gradients of questions", number, len(asked))
        try:
            encoded += index.encode([query], options)
        except (QueryError, UsageError) as error:
            raise DataError(f"{file}, line {line}: {error.message}", hint=error.hint) from error
    progress("gradients of questions", len(asked), len(asked))
    return encoded
