"""Distil the ranking of an index of gradients into an encoder, after Influcoder (arXiv 2606.13668).

Nothing is computed with the language model: the targets are inner products of stored rows. By default a head learns
them in seconds; the paper trains the encoder itself, which takes longer and ranks less well (docs/influcoder.md). The
folder of the encoder:

rapidindex-encoder.json   the settings; written again as the very last file, with the figures, when it is finished
gradients/                the recipe and the second moment of the index, for true gradients of what the encoder finds
head.safetensors          the head, if one was fitted
checkpoints/              the trainer's own, until then: an interrupted training goes on from the last one
README.md                 the card
*                         the model, as sentence-transformers saves it
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from rapidindex.config import DistillConfig, EncoderConfig, fingerprint
from rapidindex.data.templates import Encoding
from rapidindex.encoder.embed import PREFIX, RECORD, Encoder, copy_recipe
from rapidindex.encoder.head import Head, fit
from rapidindex.encoder.parts import Agreement, Part, Text, agreement, bm25_scores, read_parts
from rapidindex.errors import UsageError
from rapidindex.model.files import CHECKPOINTS
from rapidindex.model.loading import quiet_libraries
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
    """Per anchor, on the part that chooses, of the head or the epoch that was chosen."""
    seconds: float
    """Time of this call."""
    epoch_spearman: list[float] = field(default_factory=list)
    """Of a training, per anchor on the part that chooses, after each epoch."""
    resumed_at: int | None = None
    """Of a training, the step after which it went on."""
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
    `output` was made with other settings, and ModelError or ResourceError for an encoder that cannot be loaded or
    trained.
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
        _check_disk(output, loaded, options)
        copy_recipe(store, output / GRADIENTS)
        found = _learn(loaded, parts, options, output, progress)
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
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return summary


def _learn(
    encoder: Encoder, parts: dict[str, Part], options: DistillConfig, output: Path, progress: Progress
) -> dict[str, Any]:
    """Give the encoder its head, or train it, and measure it on the held-out part beside the untrained one and BM25."""
    held_out = parts["held out"]
    encoder.head, encoder.trained = None, options.method == "train"
    texts = {id(text): text for part in parts.values() for text in (*part.anchors, *part.pool)}
    read = dict(zip(texts, _encodings(encoder, list(texts.values())), strict=True))
    figures = {
        "untrained": agreement(_scores(encoder, held_out), held_out),
        "bm25": agreement(bm25_scores(held_out), held_out),
    }
    if encoder.trained:
        from rapidindex.encoder.training import train

        with quiet_libraries():
            learnt = train(encoder, parts, options, output, progress)
        encoder.model.prompts = {"query": PREFIX, "document": ""}
    else:
        head, spearman = choose_head(
            parts, lambda texts: encoder.features([read[id(text)] for text in texts], progress).cpu()
        )
        encoder.head, learnt = head.to(encoder.device), {"chosen_spearman": spearman}
    figures = {"distilled": agreement(_scores(encoder, held_out), held_out), **figures}
    by_name = {name: _of(figures, name) for name in ("per_anchor", "aggregated")}
    cut = sum(encoding.truncated for encoding in read.values())
    return {"truncated": cut, **by_name, **learnt}


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
    anchors = encoder.embed(_encodings(encoder, part.anchors, anchor=True))
    return anchors @ encoder.embed(_encodings(encoder, part.pool)).T


def _encodings(encoder: Encoder, texts: Sequence[Text], *, anchor: bool = False) -> list[Encoding]:
    return [encoder.encode_text(text.prompt, text.response, anchor=anchor) for text in texts]


def _of(figures: dict[str, Agreement], field: str) -> dict[str, float]:
    return {name: getattr(found, field) for name, found in figures.items()}


def _check_disk(output: Path, encoder: Encoder, options: DistillConfig) -> None:
    """Raise ResourceError unless the model and its head fit into `output`, or two checkpoints with Adam's moments."""
    size = sum(value.numel() * value.element_size() for value in encoder.model.parameters())
    check_room(output, (7 if options.method == "train" else 2) * size, "Distilling")


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

{_how(summary, options)}

| part | anchors | pool |
|---|---|---|
{parts}

Seed {options.seed}; Spearman's correlation on the part that chose among heads or epochs: {summary.chosen_spearman:.3f}.

Spearman's correlation with the ranking by gradients, on held-out anchors and a held-out pool:

| ranking | per anchor | aggregated |
|---|---|---|
{rows}
"""


def _how(summary: DistillSummary, options: DistillConfig) -> str:
    if options.method == "head":
        return f"""The model is that of {summary.encoder}, unchanged. `head.safetensors` turns its embeddings of a
prompt and of a response into one; `rapidindex build --encoder` applies both, sentence-transformers the model alone."""
    return f"""A question (its prompt and answer) comes after the prefix "{PREFIX}"; a training example has none.

Loss: {options.alpha} (1 - Pearson) + {1 - options.alpha:g} KL at {options.temperature}; blocks of
{options.block_anchors} anchors and {options.block_candidates} candidates, {options.hard:.0%} of them hard; AdamW
{options.learning_rate:g}; epoch {summary.epoch_spearman.index(summary.chosen_spearman) + 1} of {options.epochs}."""
