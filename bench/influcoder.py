"""How well does a distilled encoder rank examples as their gradients do, and what does it cost?

Takes an index of gradients. Encoders are distilled into WORK, one for each number of anchors and seed; what is there is
not made again. Every ranking is compared with that of the stored rows, on anchors and a pool that no encoder of that
seed was trained on; candidates are looked for among all rows, because that is how a first stage is used.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import parser, save, timed
from rapidindex.caching.batches import Item, as_batch
from rapidindex.config import DistillConfig, EncoderConfig
from rapidindex.data.examples import Example
from rapidindex.encoder.blocks import Part, Text, agreement, bm25_scores, read_parts, targets
from rapidindex.encoder.distill import distill
from rapidindex.encoder.embed import Encoder
from rapidindex.progress import Bars
from rapidindex.query.index import Index
from rapidindex.search.vector_index import fold
from rapidindex.store import Rows

FOLDS = (256, 1024, 4096)
CANDIDATES = (50, 200)
TIMED = 16
"""Examples whose gradients are computed to see how long one takes."""


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    index = Index.open(options.index, device="cpu")
    rows = index.rows_of("sentence")
    runs = [tuple(map(int, run.split(":"))) for run in options.runs.split(",")]
    figures: dict[str, Any] = {"examples": len(rows), "runs": [], "ranks": {}}
    for anchors, seed in runs:
        figures["runs"].append(_distilled(options, anchors, seed))
        save("influcoder", figures, options)
    for seed in sorted({seed for _, seed in runs}):
        figures["ranks"][seed] = _ranks(options, rows, seed)
        save("influcoder", figures, options)
    figures["candidates"] = [_recall(options, rows, anchors, seed) for anchors, seed in runs]
    figures["cost"] = _cost(options, index, rows)
    print(save("influcoder", figures, options))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    it = parser(__doc__)
    it.add_argument("--index", type=Path, required=True, help="an index of gradients")
    it.add_argument("--encoder", default=EncoderConfig.model, help="what is trained")
    it.add_argument("--runs", default="125:0,125:1,125:2,250:0,500:0", help="anchors:seed of each distillation")
    it.add_argument("--epochs", type=int, default=3)
    return it.parse_args(arguments)


def _config(options: argparse.Namespace, anchors: int, seed: int) -> DistillConfig:
    return DistillConfig(anchors=anchors, seed=seed, epochs=options.epochs)


def _folder(options: argparse.Namespace, anchors: int, seed: int) -> Path:
    return options.work / f"distilled-{anchors}-{seed}"


def _distilled(options: argparse.Namespace, anchors: int, seed: int) -> dict[str, Any]:
    config, encoder = _config(options, anchors, seed), EncoderConfig(options.encoder, "cpu")
    with Bars() as bars:
        summary = distill(options.index, _folder(options, anchors, seed), config, encoder=encoder, progress=bars)
    kept = replace(summary, output=_folder(options, anchors, seed).name, index="", encoder=Path(summary.encoder).name)
    return {"anchors": anchors, "seed": seed, **asdict(kept)}


def _ranks(options: argparse.Namespace, rows: Rows, seed: int) -> dict[str, Any]:
    """Compare rankings that need no distillation with the gradients', on the held-out part of a seed."""
    part = read_parts(rows, (), _config(options, 8, seed))["held out"]
    responses = Part(*[[replace(t, prompt="") for t in texts] for texts in (part.anchors, part.pool)], part.targets)
    found = {"BM25": bm25_scores(part), "BM25, responses": bm25_scores(responses)}
    found["length of the response"] = np.tile([len(text.response) for text in part.pool], (len(part.anchors), 1))
    found |= _text_scores(part)
    ours, theirs = (rows.take([text.number for text in texts]) for texts in (part.anchors, part.pool))
    found |= {f"RapidGrads, K = {K:,}": fold(ours, K) @ fold(theirs, K).T for K in FOLDS}
    sizes = {"anchors": len(part.anchors), "pool": len(part.pool)}
    return sizes | {name: asdict(agreement(np.asarray(scores), part)) for name, scores in found.items()}


def _text_scores(part: Part) -> dict[str, np.ndarray]:
    """TF-IDF, and static embeddings of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    anchors, pool = ([f"{text.prompt}\n{text.response}" for text in texts] for texts in (part.anchors, part.pool))
    tfidf = TfidfVectorizer(sublinear_tf=True).fit(pool)
    found = {"TF-IDF": (tfidf.transform(anchors) @ tfidf.transform(pool).T).toarray()}
    try:
        import wordllama

        model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
        found["wordllama"] = model.embed(anchors, norm=True) @ model.embed(pool, norm=True).T
    except (ImportError, OSError, ValueError) as error:
        print(f"wordllama is left out: {error}")
    return found


def _recall(options: argparse.Namespace, rows: Rows, anchors: int, seed: int) -> dict[str, Any]:
    """Return the share of the ten best of all rows, by full gradients, that are among an encoder's candidates."""
    held_out = read_parts(rows, (), _config(options, anchors, seed))["held out"].anchors
    everything = [_text(rows, row) for row in range(len(rows))]
    truth = np.nan_to_num(targets(rows, held_out, everything), nan=-np.inf)
    best = np.argsort(-truth, axis=1)[:, :10]
    found = {"anchors": anchors, "seed": seed, "rows": len(rows), "questions": len(held_out)}
    for name, place in (("untrained", options.encoder), ("distilled", str(_folder(options, anchors, seed)))):
        encoder = Encoder.load(EncoderConfig(place, "cpu"))
        asked = encoder.embed([encoder.encode_text(text.prompt, text.response, anchor=True) for text in held_out])
        scores = asked @ encoder.embed([encoder.encode_text(text.prompt, text.response) for text in everything]).T
        scores[np.isinf(truth)] = -np.inf
        ranks = np.argsort(np.argsort(-scores, axis=1), axis=1)
        inside = np.take_along_axis(ranks, best, 1)
        found[name] = {str(count): float((inside < count).mean()) for count in CANDIDATES}
    return found


def _text(rows: Rows, row: int) -> Text:
    example = Example.from_record(rows.record(int(rows.example[row])))
    return Text(example.prompt, example.response, row)


def _cost(options: argparse.Namespace, index: Index, rows: Rows) -> dict[str, Any]:
    """Time a few examples one after the other by both ways, in one run, and count the bytes of a row."""
    chosen = np.linspace(0, len(rows) - 1, TIMED).astype(int)
    examples = [Example.from_record(rows.record(int(rows.example[row]))) for row in chosen]
    encoder = Encoder.load(EncoderConfig(options.encoder, "cpu"))
    compressor = index.compressor_of("sentence")
    items = [Item(example, index.template.encode(example)) for example in examples]
    compressor(as_batch(items[:1], "cpu"))  # compares with autograd, once
    encoder.embed([encoder.encode(examples[0])])
    gradient = timed(lambda: [compressor(as_batch([item], "cpu")) for item in items])[0] / TIMED
    embedding = timed(lambda: [encoder.embed([encoder.encode(example)]) for example in examples])[0] / TIMED
    started = time.perf_counter()
    encoder.encode_text("What is yoga?", "It comes from India.", anchor=True)
    return {
        "examples": TIMED,
        "gradient_seconds": gradient,
        "embedding_seconds": embedding,
        "tokenize_seconds": time.perf_counter() - started,
        "gradient_bytes": rows.row_bytes,
        "embedding_bytes": encoder.width,
        "embedding_reads": encoder.max_length,
    }


if __name__ == "__main__":
    main()
