"""What a build is said to take, before it takes it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.crash import write_data
from rapidindex.caching.build import build
from rapidindex.caching.estimate import FreeResources, ResourceEstimate, check_resources, estimate
from rapidindex.caching.estimate import _PeakMemory as PeakMemory
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.errors import ResourceError


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
    parts = {"largest batch, model and libraries", "rows buffer"}
    assert set(whole.memory) == parts | {"sample of the second moment"}
    plain = replace(asked, gradient=GradientConfig(second_moment="estimate"))
    assert set(estimate(plain).memory) == parts

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
def test_the_memory_of_a_build_is_the_measured_peak_of_its_longest_batch(asked, way):
    model = asked.model if way == "lora" else replace(asked.model, adapter=None)
    asked = replace(asked, model=model, sketch=SketchConfig(K=2**20), work=BuildConfig(batch_tokens=4096))
    predicted = estimate(asked)
    assert sum(predicted.memory.values()) == predicted.total_memory
    with PeakMemory(torch.device("cpu")) as peak:
        build(asked)
    rows = predicted.memory["rows buffer"]
    assert peak.memory - rows == pytest.approx(predicted.memory["largest batch, model and libraries"], rel=0.2)


def test_what_is_more_than_what_is_free_is_refused_with_the_numbers():
    needed = ResourceEstimate({"rows": 3 * 2**20}, {"map of slots": 2**20, "correction": 2**21}, {"model": 2**30})
    enough = FreeResources(2**30, 2**30, 2**31)
    check_resources(needed, enough, "index")
    for name, sizes in (
        ("disk", r"3.0 MiB of disk space \(rows 3.0\); 1.0 are free"),
        ("memory", r"3.0 MiB of memory \(correction 2.0, map of slots 1.0\); 1.0 are free"),
        ("device", r"1,024 MiB of GPU memory \(model 1,024\); 1.0 are free"),
    ):
        with pytest.raises(ResourceError, match=sizes) as refusal:
            check_resources(needed, replace(enough, **{name: 2**20}), "index")
        assert "-K" in refusal.value.hint


def test_more_workers_than_memory_are_refused_with_the_numbers_before_anything_is_written(asked):
    greedy = replace(asked, work=BuildConfig(batch_tokens=16, workers=10_000), sketch=SketchConfig(K=2**24))
    for attempt in (build, estimate):
        with pytest.raises(ResourceError, match=r"MiB of (memory|disk space) \(.*[0-9]\); [0-9,]+ are free"):
            attempt(greedy)
    assert not Path(asked.output).exists()
