"""Can the first stage be asked about a word of an answer? Encoders that know it beside one that does not, for words.

Takes an index of gradients. A question is a word of a row's response; the truth are the products of all rows with the
gradient of the word's tokens alone. Each costs a pass of the language model, and they are kept in WORK. The product's
first stage knows the text alone. Here a second regression learns, from the text and from what the encoder makes of the
word, where the word's gradient lies; the pool's embeddings are the product's. Questions and pool are a seed's held-out
part, and candidates are looked for among all rows, too, of which heads know the most.
"""

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import parser, save
from bench.influcoder import Read, Scores, example_of, recall
from rapidindex.config import DistillConfig, EncoderConfig
from rapidindex.data.bm25 import BM25
from rapidindex.data.tokens import select_tokens
from rapidindex.encoder.distill import choose_head
from rapidindex.encoder.head import coordinates
from rapidindex.encoder.parts import Part, agreement, read_parts
from rapidindex.errors import TokenNotFound
from rapidindex.gradients.losses import Batch
from rapidindex.progress import Bars, Progress
from rapidindex.query.encode import selected_batch
from rapidindex.query.index import Index

HELD_OUT = (10, 20, 40)
"""Candidates of the held-out pool."""
CANDIDATES = (40, 100, 200)
"""Candidates of all rows."""
BATCH = 8
"""Questions whose gradients are computed together."""
COMMON = 0.1
"""Share of the responses that a word stands in at most."""
GAMMAS = (0.15, 0.3, 0.6, 1.2)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the regression: the width of its Gaussian kernel, in which every kind of features counts alike, and its ridge."""
WAYS = {
    "its context": ("context",),
    "it alone": ("alone",),
    "it marked in the response": ("marked",),
    "its context and it alone": ("context", "alone"),
}
"""What the encoder makes of the word, beside the prompt, the response and their lengths."""


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    index = Index.open(options.index, device="cpu")
    read = Read(options, index, index.rows_of("sentence"))
    with Bars() as bars:
        asked = read.kept(f"words-{options.each}", lambda: word_products(read, options.each, bars))
    features = read.kept(f"words-{options.each}-features", lambda: word_features(read, asked))
    figures: dict[str, Any] = {"examples": len(read.texts), "questions": len(asked["row"]), "seeds": {}}
    figures["seconds"] = read.seconds
    for seed in range(options.seeds):
        figures["seeds"][str(seed)] = compare(read, asked, features, seed)
        print(save("words", figures, options))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    it = parser(__doc__)
    it.add_argument("--index", type=Path, required=True, help="an index of gradients")
    it.add_argument("--encoder", default=EncoderConfig.model, help="what reads texts")
    it.add_argument("--each", type=int, default=2, help="words of each response")
    it.add_argument("--seeds", type=int, default=2, help="splits")
    return it.parse_args(arguments)


def draw_words(responses: list[str], each: int) -> list[tuple[int, str]]:
    """Draw different words of each response, of four letters or more and not in many responses: (row, word)."""
    words = [sorted(set(re.findall(r"\b[A-Za-z]{4,}\b", response))) for response in responses]
    spread = Counter(word.lower() for some in words for word in {one.lower(): one for one in some})
    rng, drawn = np.random.default_rng(0), []
    for row, some in enumerate(words):
        rare = [word for word in some if spread[word.lower()] <= max(1, COMMON * len(responses))]
        drawn += [(row, rare[number]) for number in rng.permutation(len(rare))[:each]]
    return drawn


def word_products(read: Read, each: int, progress: Progress) -> Scores:
    """Return questions: their rows [questions], words, and products with all rows, float32 [questions, rows].

    A word's loss is what `--token` asks about, the mean over its tokens.
    """
    compressor, questions, products = read.index.compressor_of("sentence"), [], []
    for row, word in draw_words([text.response for text in read.texts], each):
        encoding = read.index.template.encode(example_of(read.rows, row), end=False)
        with contextlib.suppress(TokenNotFound):  # beyond --max-length
            chosen = select_tokens(encoding.tokens, encoding.response, token=word).positions
            weights = selected_batch(encoding, chosen, "cpu").weights[0].numpy()
            end = weights.nonzero()[0].max() + 1  # what comes after the word says nothing of it
            questions.append((row, word, encoding.input_ids[:end], weights[:end]))
    questions.sort(key=lambda question: len(question[2]))
    for first in range(0, len(questions), BATCH):
        progress("gradients of words", first, len(questions))
        _, _, ids, weights = zip(*questions[first : first + BATCH], strict=True)
        vectors = compressor(Batch.of(ids, weights, compressor.device)).rows.cpu().numpy()
        products.append(vectors @ read.stored.T)
    rows, words, _, _ = zip(*questions, strict=True)
    return {"row": np.array(rows), "word": np.array(words), "products": np.concatenate(products)}


def word_features(read: Read, asked: Scores) -> Scores:
    """Return what the encoder makes of the words, float32 [questions, width] each: see `WAYS`."""
    encoder, found = read.encoder, {"context": []}
    pairs = [(read.texts[row].response, str(word)) for row, word in zip(asked["row"], asked["word"], strict=True)]
    places = [re.search(rf"\b{re.escape(word)}\b", response).span() for response, word in pairs]  # type: ignore[union-attr]
    for (response, _), (first, end) in zip(pairs, places, strict=True):
        ids = encoder.tokenizer(response, return_offsets_mapping=True, truncation=True, return_tensors="pt")
        offsets = ids.pop("offset_mapping")[0]
        here = (offsets[:, 0] < end) & (offsets[:, 1] > first)
        with torch.inference_mode():
            states = encoder.model(dict(ids))["token_embeddings"][0].float()
        found["context"].append(states[here if here.any() else slice(None)].mean(0).numpy())
    marked = [f"{text[:a]}[ {text[a:b]} ]{text[b:]}" for (text, _), (a, b) in zip(pairs, places, strict=True)]
    alone = [encoder.encode_text(word, text) for (_, word), text in zip(pairs, marked, strict=True)]
    first, second, _ = _halves(encoder.features(alone))
    return {"context": np.array(found["context"]), "alone": first.numpy(), "marked": second.numpy()}


def _halves(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings of prompt and response in an encoder's features, and the lengths."""
    width = (features.shape[1] - 2) // 2
    return features.split([width, width, 2], dim=1)  # type: ignore[return-value]


def compare(read: Read, asked: Scores, features: Scores, seed: int) -> dict[str, Any]:
    """Compare rankings with the word gradients' for the questions of a seed's held-out anchors."""
    parts = read_parts(read.rows, (), DistillConfig(seed=seed))
    row, products = asked["row"], asked["products"]
    mine = {name: np.flatnonzero(np.isin(row, [a.number for a in part.anchors])) for name, part in parts.items()}
    pools = {name: [text.number for text in part.pool] for name, part in parts.items()}
    head, _ = choose_head(parts, lambda texts: read.features[[text.number for text in texts]])
    pool, landmarks = head(read.features).numpy(), [text.number for text in parts["train"].anchors]
    both = np.concatenate([read.stored[landmarks] @ read.stored.T, products[:, landmarks].T], 1)
    exact = coordinates(both, landmarks).astype(np.float32)
    exact, wanted = exact[: len(pool)], exact[len(pool) :]
    truth = products.copy()
    truth[np.arange(len(row)), row] = np.nan

    def quality(found: np.ndarray, name: str = "choose") -> float:
        questions, texts = mine[name], pools[name]
        part = Part([], [], truth[questions][:, texts])
        return agreement(found[questions] @ pool[texts].T, part).per_anchor

    held = mine["held out"]
    asks = {"ignores the word": pool[row[held]]}
    text = _halves(read.features[row])
    for name, kinds in {"ignores the word, learnt from words": (), **WAYS}.items():
        groups = [*text, *(torch.from_numpy(features[kind]) for kind in kinds)]
        asks[name] = regress(groups, wanted, mine["train"], quality)[held]
    rankings = {f"encoder, {name}": found @ pool.T for name, found in asks.items()}
    bm25 = BM25([f"{one.prompt}\n{one.response}" for one in read.texts])
    rankings["BM25 of the word"] = np.array([bm25.scores(str(word)) for word in asked["word"][held]])
    first = rankings["encoder, ignores the word"]
    rankings["encoder, ignores the word, and BM25 of the word"] = _standard(first) + _standard(
        rankings["BM25 of the word"]
    )
    rankings |= {
        "the sentence's own gradient": read.stored[row[held]] @ read.stored.T,
        "the sentence's own gradient, the pool by the encoder": exact[row[held]] @ pool.T,
        "the word's own gradient, the pool by the encoder": wanted[held] @ pool.T,
        "the word's own gradient along 128 directions": wanted[held] @ exact.T,
    }
    sizes = {"questions": len(held), "learnt_from": len(mine["train"]), "pool": len(pools["held out"])}
    return sizes | {name: _measured(found, truth[held], pools["held out"]) for name, found in rankings.items()}


def regress(groups: list[Tensor], wanted: np.ndarray, train: np.ndarray, quality: Callable[..., float]) -> np.ndarray:
    """Return what kernel ridge regressions on groups of features make of all questions, by the best `quality`."""
    features = torch.cat(
        [(one - one[train].mean(0)) / (one[train].std(0) * one.shape[1] ** 0.5 + 1e-6) for one in groups], 1
    )
    squared = torch.cdist(features, features[train]).double() ** 2 / len(groups)
    best: tuple[float, np.ndarray] | None = None
    for gamma in GAMMAS:
        kernel, target = torch.exp(-gamma * squared), torch.from_numpy(wanted[train]).double()
        for penalty in PENALTIES:
            solved = torch.linalg.solve(kernel[train] + penalty * torch.eye(len(train)), target)
            found = (kernel @ solved).float().numpy()
            if best is None or quality(found) > best[0]:
                best = quality(found), found
    assert best is not None
    return best[1]


def _standard(scores: np.ndarray) -> np.ndarray:
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


def _measured(scores: np.ndarray, truth: np.ndarray, pool: list[int]) -> dict[str, Any]:
    """Return how far scores [questions, rows] agree with the truth, in which a question's own row is NaN."""
    own = np.isnan(truth)
    scores, best = (np.where(own, -np.inf, one) for one in (scores, truth))
    return {
        **asdict(agreement(scores[:, pool], Part([], [], truth[:, pool]))),
        "held_out": recall(scores[:, pool], best[:, pool], HELD_OUT),
        "candidates": recall(scores, best, CANDIDATES),
    }


if __name__ == "__main__":
    main()
