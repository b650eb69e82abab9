"""Distilling: the loss, resuming, the folder, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, DistillConfig, EncoderConfig, ModelConfig, SketchConfig
from rapidindex.encoder.blocks import read_parts
from rapidindex.encoder.distill import distill
from rapidindex.encoder.embed import PREFIX, Encoder, copy_recipe
from rapidindex.encoder.training import Measure, block_loss
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.store import Store, check
from tests.encoder.conftest import OPTIONS


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_pearson_and_kl_written_out(alpha):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(2, 8, 16))
    pearson = scipy.stats.pearsonr(scores.ravel(), targets.ravel()).statistic
    p, q = (scipy.special.softmax(x / 0.05, axis=1) for x in (targets, scores))
    expected = alpha * (1 - pearson) + (1 - alpha) * scipy.stats.entropy(p, q, axis=1).mean()
    loss = block_loss(torch.tensor(scores), torch.tensor(targets), DistillConfig(alpha=alpha))
    assert float(loss) == pytest.approx(expected)


def test_training_brings_the_encoder_nearer_to_the_gradients_ranking(distilled, gradient_index, plain_encoder):
    part = read_parts(Store.open(gradient_index).rows("sentence"), (), OPTIONS)["train"]
    before, after = (Encoder.load(EncoderConfig(str(path), "cpu")) for path in (plain_encoder, distilled.output))
    untrained, trained = (Measure(encoder, part)()["spearman"] for encoder in (before, after))
    assert trained > untrained + 0.1


def test_the_summary_counts_the_parts_and_names_the_best_epoch(distilled):
    assert distilled.anchors == {"train": 84, "choose": 12, "held out": 24} == distilled.pool
    assert len(distilled.epoch_spearman) == 4
    assert distilled.epoch_spearman[distilled.best_epoch - 1] == max(distilled.epoch_spearman)


def test_the_encoder_is_an_ordinary_folder_of_sentence_transformers(distilled):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(distilled.output, device="cpu")
    encoder = Encoder.load(EncoderConfig(distilled.output, "cpu"))
    ours = encoder.embed([encoder.encode_text("Say tea", "tea is nice", anchor=True)])[0]
    theirs = model.encode_query("Say tea tea is nice", normalize_embeddings=True)
    assert model.prompts["query"] == PREFIX and ours @ theirs == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(ours) == pytest.approx(1, abs=1e-5)


def test_the_card_says_where_the_encoder_comes_from(distilled, gradient_index):
    with open(f"{distilled.output}/README.md") as file:
        card = file.read()
    assert str(gradient_index) in card and Store.open(gradient_index).id in card
    assert f"| distilled | {distilled.per_anchor['distilled']:.3f} |" in card and "| bm25 |" in card


def test_an_interrupted_distillation_goes_on_to_the_same_encoder(distilled, gradient_index, plain_encoder, tmp_path):
    class Stopped(Exception):
        pass

    def stop(stage, done, total, note=""):
        if stage == "distil" and done == total - 2:
            raise Stopped

    config, output = EncoderConfig(str(plain_encoder), "cpu"), tmp_path / "encoder"
    with pytest.raises(Stopped):
        distill(gradient_index, output, OPTIONS, encoder=config, progress=stop)
    resumed = distill(gradient_index, output, OPTIONS, encoder=config)
    assert resumed.resumed_at == 33
    assert resumed.epoch_spearman == pytest.approx(distilled.epoch_spearman, abs=1e-4)
    assert not (output / "checkpoints").exists()
    again = distill(gradient_index, output, OPTIONS, encoder=config)
    assert again.already_there and replace(again, already_there=False) == resumed
    with pytest.raises(ConfigMismatch, match="epochs 4, now 5"):
        distill(gradient_index, output, replace(OPTIONS, epochs=5), encoder=config)


def test_where_a_text_is_too_long_the_response_is_kept(plain_encoder):
    encoder = Encoder.load(EncoderConfig(str(plain_encoder), "cpu"))
    assert encoder.max_length == 48
    short = encoder.encode_text("tea", "rice")
    assert not short.truncated and encoder.tokenizer.decode(short.input_ids) == "[CLS] tea rice [SEP]"
    cut = encoder.encode_text("tea " * 60, "rice " * 5)
    text = encoder.tokenizer.decode(cut.input_ids)
    assert cut.truncated and len(cut.input_ids) == 48 and text.count("rice") == 5 == cut.response_mask.sum()
    longer = encoder.encode_text("tea " * 60, "rice " * 60, anchor=True)
    assert len(longer.input_ids) == 48 and "tea" not in encoder.tokenizer.decode(longer.input_ids)


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
    with pytest.raises(UsageError, match="--alpha must lie between 0 and 1"):
        DistillConfig(alpha=2)


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
        DistillConfig(anchors=0, epochs=1),
        str(plain_encoder),
        tmp_path / "asked.jsonl",
        device="cpu",
    )
    assert found.questions == 14 == sum(found.anchors.values())
    shutil.rmtree(tmp_path / "encoder")
