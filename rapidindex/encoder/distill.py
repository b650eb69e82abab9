"""Distil the ranking of an index of gradients into an encoder, after Influcoder (arXiv 2606.13668).

Nothing is computed with the language model: the targets are inner products of stored rows. The paper trains the
encoder's model; here a head learns in seconds, and ranks better (docs/influcoder.md). The folder of the encoder:

rapidindex-encoder.json   the settings; written again as the very last file, with the figures, when it is finished
gradients/                the recipe and the second moment of the index, for true gradients of what the encoder finds
head.safetensors          the head
README.md                 the card
*                         the model, as sentence-transformers saves it
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from rapidindex.config import DistillConfig, EncoderConfig, fingerprint
from rapidindex.data.templates import Encoding
from rapidindex.encoder.embed import RECORD, Encoder, copy_recipe
from rapidindex.encoder.head import Head, fit
from rapidindex.encoder.parts import Agreement, Part, Text, agreement, bm25_scores, read_parts
from rapidindex.errors import UsageError
from rapidindex.model.outputs import Output, check_room
from rapidindex.progress import Progress, silent
from rapidindex.store import GRADIENTS, Store

_OUTPUT = Output("distill", RECORD, "an encoder distilled")


@dataclass(frozen=True)
class DistillSummary:
    """The outcome of a distillation."""

    output: str
    index: str
    index_id: str
    encoder: str
    """The model that texts are read by."""
    width: int
    examples: int
    """Examples in the index."""
    anchors: dict[str, int]
    """Anchors of each part: those learnt from, those that choose the head, and those that are held out."""
    pool: dict[str, int]
    """Texts that are compared with them."""
    questions: int
    """Questions of a file among the anchors."""
    truncated: int
    """Texts whose prompt or response is longer than the encoder reads, and was cut."""
    per_anchor: dict[str, float]
    """Mean Spearman over the held-out anchors with the gradients' ranking of the held-out pool: `distilled`,
    `untrained` and `bm25`."""
    aggregated: dict[str, float]
    """Spearman over all of their pairs together."""
    chosen_spearman: float
    """Per anchor, on the part that chooses, of the head that was chosen."""
    seconds: float
    """Time of this call."""
    already_there: bool = False


def distill(
    index: str | Path,
    output: str | Path,
    options: DistillConfig | None = None,
    *,
    encoder: EncoderConfig | None = None,
    questions: Sequence[Text] = (),
    overwrite: bool = False,
    progress: Progress = silent,
) -> DistillSummary:
    """Teach `encoder` to rank the examples of `index` as their gradients do, and write it to the folder `output`.

    `questions` are anchors beside the examples, each with its RapidGrad. Raises UsageError for an index that holds too
    few examples or whose rows are embeddings, StoreError for one without rows of whole examples, ConfigMismatch where
    `output` was made with other settings, and ModelError for an encoder that cannot be loaded.
    """
    started = time.perf_counter()
    options, config, output = options or DistillConfig(), encoder or EncoderConfig(), Path(output).absolute()
    store = Store.open(index)
    if store.config.get("encoder"):
        raise UsageError(f"The rows of {index} are embeddings, not gradients.", hint="Give the index of gradients.")
    rows = store.rows("sentence")
    store.refuse_lost_moment()
    loaded = Encoder.load(config)
    settings = {
        "index": store.id,
        "rows": fingerprint(sorted(rows.ids[number] for number in rows.live_examples)),
        "encoder": loaded.fingerprint,
        "questions": [fingerprint([text.prompt, text.response]) for text in questions],
        **asdict(options),
    }
    progress("compare the rows", 0, 1)
    parts = read_parts(rows, questions, options)
    progress("compare the rows", 1, 1)
    with _OUTPUT.locked(output):
        record = _OUTPUT.open(output, settings, overwrite)
        if record and record.get("summary"):
            return replace(DistillSummary(**record["summary"]), output=str(output), already_there=True)
        _check_disk(output, loaded)
        copy_recipe(store, output / GRADIENTS)
        found = _learn(loaded, parts, progress)
        loaded.save(output)
        summary = DistillSummary(
            output=str(output),
            index=str(store.path.absolute()),
            index_id=store.id,
            encoder=config.model,
            width=loaded.width,
            examples=len(rows.live_examples),
            anchors={name: len(part.anchors) for name, part in parts.items()},
            pool={name: len(part.pool) for name, part in parts.items()},
            questions=len(questions),
            seconds=time.perf_counter() - started,
            **found,
        )
        (output / "README.md").write_text(_card(summary, store, options), encoding="utf-8")
        _OUTPUT.write(output, {"settings": settings, "summary": asdict(summary)})
    return summary


def _learn(encoder: Encoder, parts: dict[str, Part], progress: Progress) -> dict[str, Any]:
    """Give the encoder its head, and measure it on the held-out part beside the untrained encoder and BM25."""
    held_out = parts["held out"]
    encoder.head = None
    figures = {
        "untrained": agreement(_scores(encoder, held_out), held_out),
        "bm25": agreement(bm25_scores(held_out), held_out),
    }
    head, spearman = choose_head(parts, lambda texts: encoder.features(_encodings(encoder, texts), progress).cpu())
    encoder.head = head.to(encoder.device)
    figures = {"distilled": agreement(_scores(encoder, held_out), held_out), **figures}
    by_name = {field: _of(figures, field) for field in ("per_anchor", "aggregated")}
    texts = {id(text): text for part in parts.values() for text in part.pool}
    cut = sum(encoding.truncated for encoding in _encodings(encoder, list(texts.values())))
    return {"truncated": cut, **by_name, "chosen_spearman": spearman}


def choose_head(
    parts: dict[str, Part], features: Callable[[Sequence[Text]], Float32[Tensor, "texts features"]]
) -> tuple[Head, float]:
    """Fit heads to the part that is learnt from; return the best on the part that chooses, and its Spearman there."""
    train, choose = parts["train"], parts["choose"]
    anchors, pool = features(choose.anchors), features(choose.pool)

    def quality(head: Head) -> float:
        return agreement((head(anchors) @ head(pool).T).numpy(), choose).per_anchor

    place = {id(text): number for number, text in enumerate(train.pool)}
    return fit(train.targets, features(train.pool), [place[id(text)] for text in train.anchors], quality)


def _scores(encoder: Encoder, part: Part) -> np.ndarray:
    """Return the inner products of the embeddings of anchors and pool, float32 [anchors, pool]."""
    anchors, pool = (encoder.embed(_encodings(encoder, texts)) for texts in (part.anchors, part.pool))
    return anchors @ pool.T


def _encodings(encoder: Encoder, texts: Sequence[Text]) -> list[Encoding]:
    return [encoder.encode_text(text.prompt, text.response) for text in texts]


def _of(figures: dict[str, Agreement], field: str) -> dict[str, float]:
    return {name: getattr(found, field) for name, found in figures.items()}


def _check_disk(output: Path, encoder: Encoder) -> None:
    """Raise ResourceError unless the model and its head fit into `output`."""
    size = sum(value.numel() * value.element_size() for value in encoder.model.parameters())
    check_room(output, 2 * size, "Distilling")


def _card(summary: DistillSummary, store: Store, options: DistillConfig) -> str:
    gradient = store.config["gradient"]
    rows = "\n".join(
        f"| {name} | {summary.per_anchor[name]:.3f} | {summary.aggregated[name]:.3f} |" for name in summary.per_anchor
    )
    parts = "\n".join(f"| {name} | {summary.anchors[name]:,} | {summary.pool[name]:,} |" for name in summary.anchors)
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [influence, data-attribution, rapidindex]
---

# An encoder that ranks training examples by their influence

Distilled from {summary.encoder} by `rapidindex distill`, from the index {summary.index} (id {summary.index_id}).
Two texts' embeddings have a large inner product where the gradients of a language model on them have one: that of
{store.config["model"]["path"]} with the adapter {store.config["adapter"]["path"]}, second moment
{gradient["second_moment"]}, normalize {gradient["normalize"]}.

The model is that of {summary.encoder}, unchanged. `head.safetensors` turns its embeddings of a prompt and of a response
into one; `rapidindex build --encoder` applies both, sentence-transformers the model alone.

| part | anchors | pool |
|---|---|---|
{parts}

Seed {options.seed}; Spearman's correlation of the head on the part that chose it: {summary.chosen_spearman:.3f}.

Spearman's correlation with the ranking by gradients, on held-out anchors and a held-out pool:

| ranking | per anchor | aggregated |
|---|---|---|
{rows}
"""
