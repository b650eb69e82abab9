"""The paper's way: the blocks, the loss, the trained encoder and its folder, and going on after an interrupt."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from rapidindex.config import DistillConfig, EncoderConfig
from rapidindex.encoder.distill import distill
from rapidindex.encoder.embed import PREFIX, Encoder
from rapidindex.encoder.parts import Part, Text, agreement, read_parts
from rapidindex.encoder.training import block_loss, draw_blocks
from rapidindex.errors import ConfigMismatch, ModelError
from rapidindex.store import Store
from tests.encoder.conftest import interrupted

OPTIONS = DistillConfig("train", epochs=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def trained(gradient_index, plain_encoder, tmp_path_factory):
    """The summary of a trained encoder."""
    output, config = tmp_path_factory.mktemp("trained") / "encoder", EncoderConfig(str(plain_encoder), "cpu")
    return distill(gradient_index, output, OPTIONS, encoder=config)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_pearson_and_kl_written_out(alpha):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(2, 8, 16))
    pearson = scipy.stats.pearsonr(scores.ravel(), targets.ravel()).statistic
    p, q = (scipy.special.softmax(x / 0.05, axis=1) for x in (targets, scores))
    expected = alpha * (1 - pearson) + (1 - alpha) * scipy.stats.entropy(p, q, axis=1).mean()
    loss = block_loss(torch.tensor(scores), torch.tensor(targets), replace(OPTIONS, alpha=alpha))
    assert float(loss) == pytest.approx(expected)


def test_each_epoch_has_every_anchor_and_no_block_has_an_anchor_as_candidate(gradient_index):
    options = replace(OPTIONS, epochs=3, hard=0.5)
    part = read_parts(Store.open(gradient_index).rows("sentence"), (), options)["train"]
    anchors, candidates = draw_blocks(part, options)
    assert anchors.shape == (33, 8) and candidates.shape == (33, 16)
    for epoch in np.split(anchors, 3):
        assert set(epoch.ravel()) == set(range(len(part.anchors)))
    assert not np.isnan(np.take_along_axis(part.targets[anchors[0]], candidates[:1].repeat(8, 0), 1)).any()
    for mine, others in zip(anchors, candidates, strict=True):
        assert len(set(others)) == 16
        assert not {part.anchors[a].number for a in mine} & {part.pool[c].number for c in others}


def test_hard_candidates_are_nearer_than_others():
    rng = np.random.default_rng(0)
    texts = [Text(str(n), "", n) for n in range(400)]
    part = Part([Text(f"a{n}", "", -2 - n) for n in range(8)], texts, rng.random((8, 400), np.float32))
    means = []
    for hard in (0.0, 1.0):
        anchors, candidates = draw_blocks(part, replace(OPTIONS, epochs=5, hard=hard))
        means.append(np.mean([part.targets[a][:, c].max(0).mean() for a, c in zip(anchors, candidates, strict=True)]))
    assert means[1] > means[0] + 0.05


def test_training_brings_the_encoder_nearer_to_the_gradients_ranking(trained, gradient_index, plain_encoder):
    part, found = read_parts(Store.open(gradient_index).rows("sentence"), (), OPTIONS)["train"], []
    for path in (plain_encoder, trained.output):
        encoder = Encoder.load(EncoderConfig(str(path), "cpu"))
        assert encoder.trained == (path == trained.output)
        anchors = encoder.embed([encoder.encode_text(one.prompt, one.response, anchor=True) for one in part.anchors])
        pool = encoder.embed([encoder.encode_text(one.prompt, one.response) for one in part.pool])
        found.append(agreement(anchors @ pool.T, part).per_anchor)
    assert found[1] > found[0] + 0.1
    assert len(trained.epoch_spearman) == 4 and trained.chosen_spearman == max(trained.epoch_spearman)


def test_the_encoder_is_an_ordinary_folder_of_sentence_transformers(trained):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(trained.output, device="cpu")
    encoder = Encoder.load(EncoderConfig(trained.output, "cpu"))
    ours = encoder.embed([encoder.encode_text("Say tea", "tea is nice", anchor=True)])[0]
    theirs = model.encode_query("Say tea tea is nice", normalize_embeddings=True)
    assert model.prompts["query"] == PREFIX and ours @ theirs == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(ours) == pytest.approx(1, abs=1e-5)


def test_an_interrupted_distillation_goes_on_to_the_same_encoder(trained, gradient_index, plain_encoder, tmp_path):
    config, output = EncoderConfig(str(plain_encoder), "cpu"), tmp_path / "encoder"
    interrupted(
        gradient_index, output, OPTIONS, config, lambda stage, done, total: stage == "distil" and done == total - 2
    )
    with pytest.raises(ModelError, match="was not distilled to the end"):
        shutil.copytree(trained.output, unfinished := tmp_path / "unfinished")
        shutil.copy(output / "rapidindex-encoder.json", unfinished)
        Encoder.load(EncoderConfig(str(unfinished), "cpu"))
    resumed = distill(gradient_index, output, OPTIONS, encoder=config)
    assert resumed.resumed_at == 33
    assert resumed.epoch_spearman == pytest.approx(trained.epoch_spearman, abs=1e-4)
    assert not (output / "checkpoints").exists()
    again = distill(gradient_index, output, OPTIONS, encoder=config)
    assert again.already_there and replace(again, already_there=False) == resumed
    with pytest.raises(ConfigMismatch, match="epochs 4, now 5"):
        distill(gradient_index, output, replace(OPTIONS, epochs=5), encoder=config)


def test_where_a_text_is_too_long_the_response_is_kept(plain_encoder):
    encoder = Encoder.load(EncoderConfig(str(plain_encoder), "cpu"))
    encoder.trained = True
    assert encoder.max_length == 48
    short = encoder.encode_text("tea", "rice")
    assert not short.truncated and encoder.tokenizer.decode(short.input_ids) == "[CLS] tea rice [SEP]"
    cut = encoder.encode_text("tea " * 60, "rice " * 5)
    text = encoder.tokenizer.decode(cut.input_ids)
    assert cut.truncated and len(cut.input_ids) == 48 and text.count("rice") == 5 == cut.response_mask.sum()
    longer = encoder.encode_text("tea " * 60, "rice " * 60, anchor=True)
    assert len(longer.input_ids) == 48 and "tea" not in encoder.tokenizer.decode(longer.input_ids)
