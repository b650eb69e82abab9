"""An index of 120 short examples, and a tiny encoder that was distilled from it."""

import json

import numpy as np
import pytest

from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, DistillConfig, EncoderConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.encoder.distill import distill
from rapidindex.model.loading import quiet_libraries
from tests import tiny

OPTIONS = DistillConfig()


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """120 examples of a few words."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("many") / "many.jsonl"
    words = [" ".join(rng.choice(tiny.WORDS, 3)) for _ in range(120)]
    rows = [{"instruction": f"Say {word} {n}", "output": f"{word} is nice", "n": n} for n, word in enumerate(words)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def gradient_index(many, tmp_path_factory, llama_folders):
    """The index of their gradients; read only."""
    path = tmp_path_factory.mktemp("gradients") / "index"
    model = ModelConfig(*map(str, llama_folders), device="cpu")
    build(BuildRequest(str(many), path, model, gradient=GradientConfig(moment_examples=8), sketch=SketchConfig(1024)))
    return path


@pytest.fixture(scope="session")
def plain_encoder(tmp_path_factory):
    """An encoder that has learnt nothing; read only."""
    with quiet_libraries():
        return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def distilled(gradient_index, plain_encoder, tmp_path_factory):
    """The summary of a distillation; its folder is read only."""
    output = tmp_path_factory.mktemp("distilled") / "encoder"
    return distill(gradient_index, output, OPTIONS, encoder=EncoderConfig(str(plain_encoder), "cpu"))


@pytest.fixture(scope="session")
def embedded(distilled, many, tmp_path_factory):
    """The index of the examples' embeddings."""
    path = tmp_path_factory.mktemp("embedded") / "index"
    build(BuildRequest(str(many), path, EncoderConfig(distilled.output, "cpu")))
    return path


def interrupted(index, output, options, encoder, at):
    """Distil, and stop at the first report of progress for which `at(stage, done, total)` is true."""

    class Stopped(Exception):
        pass

    def stop(stage, done, total, note=""):
        if at(stage, done, total):
            raise Stopped

    with pytest.raises(Stopped):
        distill(index, output, options, encoder=encoder, progress=stop)
