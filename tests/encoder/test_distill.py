"""Distilling: the embeddings, the folder, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, DistillConfig, EncoderConfig, ModelConfig, SketchConfig
from rapidindex.encoder.distill import distill
from rapidindex.encoder.embed import Encoder, copy_recipe
from rapidindex.encoder.parts import agreement, read_parts
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.store import Store, check
from tests.encoder.conftest import OPTIONS, interrupted


def test_the_encoder_ranks_what_it_has_learnt_nearer_to_the_gradients(distilled, gradient_index, plain_encoder):
    part = read_parts(Store.open(gradient_index).rows("sentence"), (), OPTIONS)["train"]
    np.fill_diagonal(part.targets, np.nan)
    found = []
    for path in (plain_encoder, distilled.output):
        encoder = Encoder.load(EncoderConfig(str(path), "cpu"))
        rows = encoder.embed([encoder.encode_text(text.prompt, text.response) for text in part.pool])
        found.append(agreement(rows @ rows.T, part).per_anchor)
    assert found[1] > found[0] + 0.1


def test_the_summary_counts_the_parts(distilled):
    assert distilled.anchors == {"train": 84, "choose": 12, "held out": 24} == distilled.pool
    assert distilled.truncated == 0 and set(distilled.per_anchor) == {"distilled", "untrained", "bm25"}


def test_an_embedding_is_the_head_of_the_models_embeddings_of_prompt_and_response(distilled):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(distilled.output, device="cpu")  # the folder is one of its own
    encoder = Encoder.load(EncoderConfig(distilled.output, "cpu"))
    texts = [("Say tea", "tea is nice"), ("Say", "yoga sun and rice is nice")]
    ours = encoder.embed([encoder.encode_text(*text) for text in texts])
    for row, text in zip(ours, texts, strict=True):
        lengths = np.log1p([len(model.tokenizer(half, add_special_tokens=False)["input_ids"]) for half in text])
        features = np.concatenate([*model.encode(list(text)), lengths]).astype(np.float32)
        np.testing.assert_allclose(row, encoder.head(torch.from_numpy(features)[None])[0], atol=1e-4)
    assert ours.shape == (2, encoder.width)


def test_a_static_encoder_is_the_head_of_the_means_of_its_tokens_vectors(gradient_index, plain_encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = Encoder.load(EncoderConfig(str(plain_encoder), "cpu")).tokenizer.backend_tokenizer
    tokenizer.enable_truncation(2)  # a limit in its file is not ours
    vectors = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 8), np.float32)
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)], device="cpu")
    static.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    config = EncoderConfig(str(tmp_path / "static"), "cpu")
    done = distill(gradient_index, tmp_path / "encoder", OPTIONS, encoder=config)
    assert done.per_anchor["distilled"] > done.per_anchor["untrained"] and done.truncated == 0
    encoder, texts = Encoder.load(EncoderConfig(done.output, "cpu")), [("Say tea yoga", "tea is nice"), ("", "yoga")]
    tokenizer.no_truncation()
    for row, text in zip(encoder.embed([encoder.encode_text(*text) for text in texts]), texts, strict=True):
        ids = [tokenizer.encode(half, add_special_tokens=False).ids for half in text]
        means = [vectors[half].mean(0) if half else np.zeros(8) for half in ids]
        features = np.concatenate([*means, np.log1p([len(half) for half in ids])]).astype(np.float32)
        np.testing.assert_allclose(row, encoder.head(torch.from_numpy(features)[None])[0], atol=1e-4)
    options = DistillConfig("train", epochs=1, learning_rate=3e-3)
    assert distill(gradient_index, tmp_path / "trained", options, encoder=config).width == 8


def test_without_a_head_an_embedding_is_that_of_the_whole_text(plain_encoder):
    from sentence_transformers import SentenceTransformer

    model, encoder = (
        SentenceTransformer(str(plain_encoder), device="cpu"),
        Encoder.load(EncoderConfig(str(plain_encoder), "cpu")),
    )
    ours = encoder.embed([encoder.encode_text("Say tea", "tea is nice")])[0]
    np.testing.assert_allclose(ours, model.encode("Say tea tea is nice", normalize_embeddings=True), atol=1e-5)


def test_the_card_says_where_the_encoder_comes_from(distilled, gradient_index):
    with open(f"{distilled.output}/README.md") as file:
        card = file.read()
    assert str(gradient_index) in card and Store.open(gradient_index).id in card
    assert f"| distilled | {distilled.per_anchor['distilled']:.3f} |" in card and "| bm25 |" in card


def test_a_distillation_that_was_stopped_begins_again_and_a_finished_one_is_kept(
    distilled, gradient_index, plain_encoder, tmp_path
):
    config, output = EncoderConfig(str(plain_encoder), "cpu"), tmp_path / "encoder"
    interrupted(
        gradient_index, output, OPTIONS, config, lambda stage, done, total: stage == "embed texts" and total > 60
    )
    whole = distill(gradient_index, output, OPTIONS, encoder=config)
    assert whole.per_anchor == pytest.approx(distilled.per_anchor, abs=1e-6)
    again = distill(gradient_index, output, OPTIONS, encoder=config)
    assert again.already_there and replace(again, already_there=False) == whole
    with pytest.raises(ConfigMismatch, match="seed 0, now 5"):
        distill(gradient_index, output, replace(OPTIONS, seed=5), encoder=config)


def test_a_prompt_and_a_response_are_cut_each_by_itself(plain_encoder):
    encoder = Encoder.load(EncoderConfig(str(plain_encoder), "cpu"))
    assert encoder.max_length == 48
    short = encoder.encode_text("tea", "rice")
    assert not short.truncated and encoder.tokenizer.decode(short.input_ids) == "[CLS] tea [SEP] [CLS] rice [SEP]"
    assert encoder.tokenizer.decode(short.input_ids[short.response_mask]) == "rice"
    cut = encoder.encode_text("tea " * 60, "rice " * 5)
    text = encoder.tokenizer.decode(cut.input_ids)
    assert cut.truncated and text.count("tea") == 46 and text.count("rice") == 5 == cut.response_mask.sum()
    assert encoder.encode_text("tea", "rice " * 60).truncated and not encoder.encode_text("tea", "").response_mask.any()


def test_what_cannot_be_distilled_is_refused(embedded, gradient_index, tmp_path, plain_encoder, llama_folders):
    config = EncoderConfig(str(plain_encoder), "cpu")
    with pytest.raises(UsageError, match="are embeddings, not gradients"):
        distill(embedded, tmp_path / "a", encoder=config)
    with pytest.raises(ModelError, match="could not be loaded"):
        distill(gradient_index, tmp_path / "b", encoder=EncoderConfig(str(tmp_path / "nowhere"), "cpu"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="distill did not write it"):
        distill(gradient_index, tmp_path / "c", encoder=config)
    for wrong, named in (({"held_out": 2}, "--held-out"), ({"alpha": 2}, "--alpha"), ({"method": "x"}, "--method")):
        with pytest.raises(UsageError, match=named):
            DistillConfig(**wrong)


def test_an_encoder_keeps_the_row_and_column_means_of_its_index(many, tmp_path, llama_folders):
    model, sketch = ModelConfig(*map(str, llama_folders), device="cpu"), SketchConfig(1024)
    build(BuildRequest(str(many), tmp_path / "index", model, recipe="trackstar", sketch=sketch, limit=8))
    source = Store.open(tmp_path / "index")
    for _ in range(2):
        copy = copy_recipe(source, tmp_path / "copy")
        assert np.array_equal(copy.second_moment(), source.second_moment()) and check(tmp_path / "copy") == []


def test_questions_of_a_file_are_anchors(gradient_index, plain_encoder, tmp_path):
    from rapidindex.query.anchors import distill as with_questions

    lines = [{"prompt": f"What is {n}?", "answer": f"tea number {n}"} for n in range(14)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = with_questions(
        gradient_index,
        tmp_path / "encoder",
        DistillConfig(anchors=0),
        str(plain_encoder),
        tmp_path / "asked.jsonl",
        device="cpu",
    )
    assert found.questions == 14 == sum(found.anchors.values())
    shutil.rmtree(tmp_path / "encoder")
