"""What a build is said to take, before it takes it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.crash import write_data
from rapidindex.caching import estimate as estimating
from rapidindex.caching.batches import as_batch
from rapidindex.caching.build import build
from rapidindex.caching.estimate import LiveTensorMeter, estimate, estimate_resources, measure_activations
from rapidindex.caching.job import prepare
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.errors import ResourceError
from rapidindex.gradients.rapidgrad import Compressor
from rapidindex.gradients.sketch import Sketch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", 60)


@pytest.fixture
def asked(data, tmp_path, llama_folders):
    model = ModelConfig(*map(str, llama_folders))
    return BuildRequest(str(data), str(tmp_path / "index"), model, sketch=SketchConfig(K=4096))


@pytest.mark.parametrize("second_moment", ["none", "estimate"])
def test_the_bytes_on_disk_are_predicted_within_two_per_cent(asked, second_moment):
    asked = replace(asked, gradient=GradientConfig(second_moment=second_moment))
    predicted = estimate(asked)
    assert not Path(asked.output).exists()
    build(asked)
    written = sum(file.stat().st_size for file in Path(asked.output).rglob("*") if file.is_file())
    assert predicted.total_disk == pytest.approx(written, rel=0.02)


def test_parts_add_up_and_an_index_that_is_there_needs_only_the_rest(asked):
    whole = estimate(asked)
    assert whole.examples == 60 and whole.total_seconds == pytest.approx(sum(whole.seconds.values()))
    parts = {"model", "map of slots", "correction", "activations", "logits", "per-example gradients", "rows buffer"}
    assert parts <= set(whole.memory)

    def stop(stage, done, total):
        if stage == "cache" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(asked, progress=stop)
    assert 0 < estimate(asked).examples < 60
    build(asked)
    with pytest.raises(ResourceError, match="nothing is left"):
        estimate(asked)
    assert estimate(asked, overwrite=True).examples == 60


@pytest.mark.parametrize("way", ["lora", "full"])
def test_the_memory_of_the_largest_batch_is_told_before_it_is_computed(asked, way):
    model = asked.model if way == "lora" else replace(asked.model, adapter=None)
    job = prepare(replace(asked, model=model, work=BuildConfig(batch_tokens=2048)))
    plan = job.plan("sentence", job.items)
    told = estimate_resources(job, plan, 1, measure_activations(job.gradients)).memory
    parts = ("activations", "logits", "per-example gradients", "RapidGrads of a batch")
    sketch = Sketch(job.size, job.request.sketch)
    sketch = Sketch(job.size, job.request.sketch, sketch.slots(0, job.size))
    compressor = Compressor(job.gradients, sketch, normalize="unit", correction=torch.ones(job.size))
    with LiveTensorMeter() as alive:
        for batch in plan.batches:
            compressor(as_batch(batch, "cpu"))
    assert sum(told[part] for part in parts) == pytest.approx(alive.peak, rel=0.15)


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers_before_anything_is_written(asked, monkeypatch):
    monkeypatch.setattr(estimating, "_left_in_container", lambda: 2**20)
    for attempt in (build, estimate):
        with pytest.raises(ResourceError, match=r"MiB of memory \(.*activations [0-9.]+.*\); 1.0 are free") as refusal:
            attempt(replace(asked, work=BuildConfig(batch_tokens=4096)))
        assert "--batch-tokens" in refusal.value.hint
    assert not Path(asked.output).exists()


def test_more_workers_than_memory_are_refused_with_the_numbers_before_anything_is_written(asked):
    greedy = replace(asked, work=BuildConfig(batch_tokens=16, workers=10_000), sketch=SketchConfig(K=2**24))
    for attempt in (build, estimate):
        with pytest.raises(ResourceError, match=r"MiB of (memory|disk space) \(.*[0-9]\); [0-9,]+ are free"):
            attempt(greedy)
    assert not Path(asked.output).exists()
