"""Distil the ranking of an index of gradients into an encoder (Influcoder, arXiv 2606.13668).

Nothing is computed with the language model: the targets are inner products of stored rows. The folder of the encoder:

rapidindex-encoder.json   the settings; written again as the very last file, with the figures, when it is finished
checkpoints/              the trainer's own, until then: an interrupted run goes on from the last one
gradients/                the recipe and the second moment of the index, for true gradients of what the encoder finds
README.md                 the card
*                         the model, as sentence-transformers saves it
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapidindex.config import DistillConfig, EncoderConfig, fingerprint
from rapidindex.encoder.blocks import Agreement, Part, Text, agreement, bm25_scores, read_parts
from rapidindex.encoder.embed import PREFIX, RECORD, Encoder, copy_recipe
from rapidindex.errors import UsageError
from rapidindex.model.files import CHECKPOINTS
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
    """The model that was trained."""
    width: int
    examples: int
    """Examples in the index."""
    anchors: dict[str, int]
    """Anchors of each part: those trained on, those that choose the epoch, and those that are held out."""
    pool: dict[str, int]
    """Examples that are ranked for them."""
    questions: int
    """Questions of a file among the anchors."""
    truncated: int
    """Texts that are longer than the encoder reads; their response was kept, and their prompt cut."""
    per_anchor: dict[str, float]
    """Mean Spearman over the held-out anchors with the gradients' ranking of the held-out pool: `distilled`,
    `untrained` and `bm25`."""
    aggregated: dict[str, float]
    """Spearman over all of their pairs together."""
    epoch_spearman: list[float]
    """Per anchor, on the part that chooses, after each epoch."""
    best_epoch: int
    seconds: float
    """Time of this call."""
    resumed_at: int | None = None
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
    """Train `encoder` to rank the examples of `index` as their gradients do, and write it to the folder `output`.

    `questions` are anchors beside the examples, each with its RapidGrad. Raises UsageError for an index that holds too
    few examples or whose rows are embeddings, StoreError for one without rows of whole examples, ConfigMismatch where
    `output` was made with other settings, and ModelError or ResourceError for an encoder that cannot be trained.
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
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
            return replace(DistillSummary(**record["summary"]), output=str(output), already_there=True)
        _check_disk(output, loaded)
        copy_recipe(store, output / GRADIENTS)
        found = _train(loaded, parts, options, output, progress)
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
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return summary


def _train(
    encoder: Encoder, parts: dict[str, Part], options: DistillConfig, output: Path, progress: Progress
) -> dict[str, Any]:
    """Train, save the model, and measure it on the held-out part beside the untrained one and BM25."""
    from rapidindex.model.loading import quiet_libraries

    with quiet_libraries():
        from rapidindex.encoder.training import Measure, train

        held_out = parts["held out"]
        measure = Measure(encoder, held_out)
        figures = {
            "untrained": agreement(measure.scores(), held_out),
            "bm25": agreement(bm25_scores(held_out), held_out),
        }
        trained = train(encoder, parts, options, output, progress)
        figures = {"distilled": agreement(measure.scores(), held_out), **figures}
        encoder.model.prompts = {"query": PREFIX, "document": ""}
        encoder.model.save_pretrained(str(output), create_model_card=False)
    texts = {text.number: text for part in parts.values() for text in part.pool}
    cut = sum(encoder.encode_text(text.prompt, text.response).truncated for text in texts.values())
    by_name = {field: _of(figures, field) for field in ("per_anchor", "aggregated")}
    return {"truncated": cut, **by_name, **trained}


def _of(figures: dict[str, Agreement], field: str) -> dict[str, float]:
    return {name: getattr(found, field) for name, found in figures.items()}


def _check_disk(output: Path, encoder: Encoder) -> None:
    """Raise ResourceError unless two checkpoints (weights and Adam's two moments) and the model fit into `output`."""
    size = sum(value.numel() * value.element_size() for value in encoder.model.parameters())
    check_room(output, 7 * size, "Distilling")


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

A question (its prompt and answer) comes after the prefix "{PREFIX}"; a training example has none.

| part | anchors | pool |
|---|---|---|
{parts}

Loss: {options.alpha} (1 - Pearson) + {1 - options.alpha:g} KL at {options.temperature}; blocks of
{options.block_anchors} anchors and {options.block_candidates} candidates, {options.hard:.0%} of them hard; AdamW
{options.learning_rate:g}; epoch {summary.best_epoch} of {options.epochs}; seed {options.seed}.

Spearman's correlation with the ranking by gradients, on held-out anchors and a held-out pool:

| ranking | per anchor | aggregated |
|---|---|---|
{rows}
"""
