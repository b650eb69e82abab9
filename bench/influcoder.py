"""How well does a distilled encoder rank examples as their gradients do, and what does it cost?

Takes an index of gradients. Every ranking is compared with that of the stored rows, on anchors and a pool that nothing
of that seed has learnt from; candidates are looked for there and among all rows, of which heads know the most. What a
text is read as (embeddings, hidden states) is computed once and kept in WORK. `--carry-over` takes indexes of other
texts, made with the same model, adapter and second moment.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import parser, results_folder, save, timed
from rapidindex.caching.batches import Item, as_batch, plan_batches
from rapidindex.config import DistillConfig, EncoderConfig
from rapidindex.data.examples import Example
from rapidindex.encoder.distill import choose_head, distill
from rapidindex.encoder.embed import Encoder
from rapidindex.encoder.head import coordinates
from rapidindex.encoder.parts import Part, Text, agreement, bm25_scores, read_parts, targets
from rapidindex.progress import Bars
from rapidindex.query.index import Index
from rapidindex.search.vector_index import fold
from rapidindex.store import Rows

FOLDS = (256, 1024, 4096)
CANDIDATES = (50, 200)
"""Of all rows, most of which heads have learnt from."""
HELD_OUT = (10, 40)
"""Of the held-out pool: of 480 of 2,400 rows, the same shares."""
BEST = 10
TIMED = 16
"""Examples whose gradients are computed to see how long one takes."""
CARRIED = 100
"""Anchors of an index that nothing was learnt from."""
DEPTHS = {"quarter": 0.25, "half": 0.5, "three quarters": 0.75, "last": 1.0}
HALVES = ("whole", "response")
Scores = dict[str, np.ndarray]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    index = Index.open(options.index, device="cpu")
    rows = index.rows_of("sentence")
    before = json.loads((results_folder(options) / "influcoder.json").read_text())["figures"] if options.add else {}
    figures: dict[str, Any] = {"examples": len(rows), "ranks": {}, "carry_over": {}, **before}
    if "distilled" not in figures:
        figures["distilled"] = _distilled(options, *options.runs[0])
    read: Read | None = None
    missing = sorted({seed for _, seed in options.runs} - {int(seed) for seed in figures["ranks"]})
    for seed in missing:
        read = read or Read(options, index, rows, options.beside)
        figures["seconds"] = read.seconds
        figures["ranks"][str(seed)] = _ranks(read, seed, [count for count, other in options.runs if other == seed])
        save("influcoder", figures, options)
    for path in options.carry_over:
        figures["carry_over"][path.name] = _carried(options, path, _folder(options, *options.runs[0]))
        save("influcoder", figures, options)
    if "cost" not in figures:
        figures["cost"] = _cost(options, index, rows)
    print(save("influcoder", figures, options))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    it = parser(__doc__)
    it.add_argument("--index", type=Path, required=True, help="an index of gradients")
    it.add_argument("--encoder", default=EncoderConfig.model, help="what reads texts")
    runs = "2000:0,1000:0,500:0,125:0,2000:1,1000:1,2000:2,1000:2"
    it.add_argument("--runs", type=_runs, default=_runs(runs), help="anchors:seed of each head; the first is distilled")
    it.add_argument("--add", action="store_true", help="keep the earlier results, and measure what they lack")
    it.add_argument("--beside", type=Path, nargs="*", default=[], help="other encoders that heads are given")
    it.add_argument("--carry-over", type=Path, nargs="*", default=[], help="indexes of other texts")
    return it.parse_args(arguments)


def _runs(text: str) -> list[tuple[int, int]]:
    return [(int(anchors), int(seed)) for anchors, seed in (run.split(":") for run in text.split(","))]


def _folder(options: argparse.Namespace, anchors: int, seed: int) -> Path:
    return options.work / f"distilled-{anchors}-{seed}"


def _distilled(options: argparse.Namespace, anchors: int, seed: int) -> dict[str, Any]:
    """Distil once as a user does, for the time that it takes."""
    config, encoder = DistillConfig(anchors=anchors, seed=seed), EncoderConfig(options.encoder, "cpu")
    with Bars() as bars:
        summary = distill(options.index, _folder(options, anchors, seed), config, encoder=encoder, progress=bars)
    kept = replace(summary, output=_folder(options, anchors, seed).name, index="", encoder=Path(summary.encoder).name)
    return {"seed": seed, **asdict(kept)}


class Read:
    """The texts of an index, and what each is read as, in the order of the rows."""

    def __init__(self, options: argparse.Namespace, index: Index, rows: Rows, beside: Sequence[Path] = ()) -> None:
        self.index, self.rows = index, rows
        self.texts = [_text(rows, row) for row in range(len(rows))]
        self.encoder = Encoder.load(EncoderConfig(options.encoder, "cpu"))
        self.seconds: dict[str, float] = {}
        self.work: Path = options.work
        self.features = self._features("features", self.encoder)
        others = ((path.name, Encoder.load(EncoderConfig(str(path), "cpu"))) for path in beside)
        self.others = {name: self._features(name, encoder) for name, encoder in others}
        self.stored = rows.take(range(len(rows)))

    def _features(self, name: str, encoder: Encoder) -> torch.Tensor:
        encodings = [encoder.encode_text(text.prompt, text.response) for text in self.texts]
        return torch.from_numpy(self.kept(name, lambda: {"rows": encoder.features(encodings).numpy()})["rows"])

    @cached_property
    def states(self) -> Scores:
        """The language model's mean hidden states, by depth and part of the text."""
        return self.kept("states", self._states)

    def kept(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """Return what lies in WORK by this name, with the seconds that it took; compute it where it is missing."""
        file = self.work / f"{name}.npz"
        if not file.exists():
            seconds, found = timed(compute)
            np.savez(self.work / f"{name}.part.npz", seconds=np.array(seconds), **found)
            (self.work / f"{name}.part.npz").rename(file)
        with np.load(file) as kept:
            self.seconds[name] = float(kept["seconds"])
            return {key: kept[key] for key in kept.files if key != "seconds"}

    def _states(self) -> Scores:
        """Return the language model's mean hidden states over each whole text and over its response, by depth."""
        model = self.index.loaded.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(base, base.base_model_prefix)
        examples = [self.index.template.encode(example_of(self.rows, row)) for row in range(len(self.rows))]
        items = [Item(Example("", "", "", {}, row, ()), encoding) for row, encoding in enumerate(examples)]
        found: Scores = {}
        for batch in plan_batches(items, 2048):
            padded, numbers = as_batch(batch, "cpu"), [item.example.line for item in batch]
            with torch.inference_mode():
                states = decoder(
                    input_ids=padded.input_ids, attention_mask=padded.attention, output_hidden_states=True
                ).hidden_states
            for depth, share in DEPTHS.items():
                state = states[round(share * (len(states) - 1))]
                for part, mask in zip(HALVES, (padded.attention, padded.weights != 0), strict=True):
                    mean = (state * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
                    kept = found.setdefault(f"{depth} {part}", np.zeros((len(items), mean.shape[1]), np.float32))
                    kept[numbers] = mean.numpy()
        return found


def _ranks(read: Read, seed: int, anchors: Sequence[int]) -> dict[str, Any]:
    """Compare rankings with the gradients' on the held-out part of a seed, and as first stages for its anchors."""
    parts = read_parts(read.rows, (), DistillConfig(anchors=max(anchors), seed=seed))
    part = parts["held out"]
    ours, pool = ([text.number for text in texts] for texts in (part.anchors, part.pool))
    truth = read.stored[ours] @ read.stored.T
    rankings = {name: found[ours] @ found.T for name, found in _learnt(read, parts, anchors).items()}
    rankings |= {name: found[ours] @ found.T for name, found in _unlearnt(read).items()}
    rankings |= _by_words(part.anchors, read.texts)
    rankings["length of the response"] = np.tile([float(len(text.response)) for text in read.texts], (len(ours), 1))
    for scores in (truth, *rankings.values()):
        scores[np.arange(len(ours)), ours] = -np.inf
    sizes = {"anchors": len(part.anchors), "pool": len(part.pool), "rows": len(read.texts)}
    return sizes | {
        name: {
            **asdict(agreement(scores[:, pool], part)),
            "candidates": recall(scores, truth, CANDIDATES),
            "held_out": recall(scores[:, pool], truth[:, pool], HELD_OUT),
        }
        for name, scores in rankings.items()
    }


def _learnt(read: Read, parts: dict[str, Part], anchors: Sequence[int]) -> Scores:
    """Return what heads make of the rows' features, and where the gradients themselves lie in few directions."""
    width = (read.features.shape[1] - 2) // 2
    first, second, lengths = read.features.split([width, width, 2], dim=1)
    found = {f"distilled, {count:,} anchors": _head(parts, read.features, count) for count in anchors}
    most = max(anchors)
    found |= {f"a head on {name}": _head(parts, features, most) for name, features in read.others.items()}
    found["a head on lengths alone"] = _head(parts, lengths, most)
    whole, response = (torch.from_numpy(read.states[f"half {part}"]) for part in HALVES)
    found["a head on hidden states, half"] = _head(parts, torch.cat([whole, response, lengths], 1), most)
    both = torch.cat([first, whole, second, response, lengths], 1)
    found["a head on embeddings and hidden states, half"] = _head(parts, both, most)
    landmarks = [text.number for text in parts["train"].anchors]
    exact = coordinates(read.stored[landmarks] @ read.stored.T, landmarks).astype(np.float32)
    return found | {f"gradients along {width} directions": exact[:, :width] for width in (32, 128)}


def _head(parts: dict[str, Part], features: torch.Tensor, anchors: int) -> np.ndarray:
    """Return the rows that the head of so many anchors makes of features [rows, features]."""
    train = parts["train"]
    fewer = Part(train.anchors[:anchors], train.pool, train.targets[:anchors])
    head, _ = choose_head(
        {**parts, "train": fewer}, lambda texts: features[torch.tensor([text.number for text in texts])]
    )
    return head(features).numpy()


def _unlearnt(read: Read) -> Scores:
    """Return vectors that learn nothing: untrained embeddings, hidden states (RepSim), RapidGrads of fewer bytes."""
    found = {"untrained embeddings of prompt and response": read.features[:, :-2].numpy()}
    for depth in DEPTHS:
        state = read.states[f"{depth} whole"]
        found[f"RepSim, {depth}"] = state / np.linalg.norm(state, axis=1, keepdims=True)
    return found | {f"RapidGrads, K = {K:,}": fold(read.stored, K) for K in FOLDS}


def _by_words(anchors: Sequence[Text], texts: Sequence[Text]) -> Scores:
    """Return the scores of BM25 and TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    part = Part(list(anchors), list(texts), np.empty((0, 0), np.float32))
    responses = Part(*[[replace(t, prompt="") for t in some] for some in (anchors, texts)], part.targets)
    written = [[f"{text.prompt}\n{text.response}" for text in some] for some in (anchors, texts)]
    tfidf = TfidfVectorizer(sublinear_tf=True).fit(written[1])
    asked, pool = map(tfidf.transform, written)
    found = {"BM25": bm25_scores(part), "BM25, responses": bm25_scores(responses), "TF-IDF": (asked @ pool.T).toarray()}
    return {name: np.asarray(scores, np.float32) for name, scores in found.items()}


def recall(scores: np.ndarray, truth: np.ndarray, counts: Sequence[int]) -> dict[str, float]:
    """Return the share of the ten best by full gradients that are among so many candidates."""
    best = np.argsort(-truth, axis=1)[:, :BEST]
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    inside = np.take_along_axis(ranks, best, 1)
    return {str(count): float((inside < count).mean()) for count in counts}


def _carried(options: argparse.Namespace, path: Path, folder: Path) -> dict[str, Any]:
    """Compare rankings with the gradients' on an index of other texts."""
    rows = Index.open(path, device="cpu").rows_of("sentence")
    texts = [_text(rows, row) for row in range(len(rows))]
    anchors = sorted(texts, key=lambda text: text.share(0))[:CARRIED]
    part = Part(anchors, texts, targets(rows, anchors, texts))
    found = {"BM25": bm25_scores(part)}
    for name, place in (("untrained encoder", options.encoder), ("distilled", str(folder))):
        encoder = Encoder.load(EncoderConfig(place, "cpu"))
        vectors = encoder.embed([encoder.encode_text(text.prompt, text.response) for text in texts])
        found[name] = vectors[[text.number for text in anchors]] @ vectors.T
    ours = rows.take([text.number for text in anchors])
    found |= {f"RapidGrads, K = {K:,}": fold(ours, K) @ fold(rows.take(range(len(rows))), K).T for K in FOLDS}
    sizes = {"anchors": len(anchors), "pool": len(texts)}
    return sizes | {name: asdict(agreement(np.asarray(scores), part)) for name, scores in found.items()}


def _text(rows: Rows, row: int) -> Text:
    example = example_of(rows, row)
    return Text(example.prompt, example.response, row)


def example_of(rows: Rows, row: int) -> Example:
    return Example.from_record(rows.record(int(rows.example[row])))


def _cost(options: argparse.Namespace, index: Index, rows: Rows) -> dict[str, Any]:
    """Time a few examples one after the other by both ways, in one run, and count the bytes of a row."""
    chosen = np.linspace(0, len(rows) - 1, TIMED).astype(int)
    examples = [example_of(rows, row) for row in chosen]
    anchors, seed = options.runs[0]
    encoder = Encoder.load(EncoderConfig(str(_folder(options, anchors, seed)), "cpu"))
    compressor = index.compressor_of("sentence")
    items = [Item(example, index.template.encode(example)) for example in examples]
    compressor(as_batch(items[:1], "cpu"))  # compares with autograd, once
    encoder.embed([encoder.encode(examples[0])])
    gradient = timed(lambda: [compressor(as_batch([item], "cpu")) for item in items])[0] / TIMED
    embedding = timed(lambda: [encoder.embed([encoder.encode(example)]) for example in examples])[0] / TIMED
    return {
        "examples": TIMED,
        "gradient_seconds": gradient,
        "embedding_seconds": embedding,
        "gradient_bytes": rows.row_bytes,
        "embedding_bytes": encoder.width,
        "embedding_reads": encoder.max_length,
    }


if __name__ == "__main__":
    main()
