"""Several processes give the index that one gives."""

import os
from dataclasses import replace

import numpy as np
import torch

from rapidindex.caching.build import build
from rapidindex.caching.job import worker_devices
from rapidindex.caching.workers import Shared
from rapidindex.config import BuildConfig, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.store import Store, check
from tests.oracles import all_rows


def test_two_workers_give_the_rows_of_one_and_keep_out_what_is_not_finite(data, tmp_path, poisoned):
    one = BuildRequest(
        str(data),
        str(tmp_path / "one"),
        poisoned,
        gradient=GradientConfig(moment_examples=4, seed=1),
        sketch=SketchConfig(K=1024),
        work=BuildConfig(batch_tokens=300),
    )
    two = replace(one, output=str(tmp_path / "two"), work=replace(one.work, workers=2))
    alone, together = build(one), build(two)
    assert (together.examples, together.computed, together.rejected) == (9, 10, 1)
    assert together.batched and replace(together, index="", seconds=0) == replace(alone, index="", seconds=0)
    ours, theirs = all_rows(tmp_path / "two"), all_rows(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert all(np.linalg.norm(ours[id] - theirs[id]) <= 2e-3 * np.linalg.norm(theirs[id]) for id in theirs)
    rejected = [Store.open(tmp_path / name).rows("sentence").rejected for name in ("one", "two")]
    assert rejected[0] == rejected[1] and rejected[0][0]["line"] == 10
    assert check(tmp_path / "two") == []
    assert build(two).computed == 0


def test_shared_memory_holds_what_was_copied_and_is_one_memory():
    shared = Shared.copy(torch.arange(5, dtype=torch.int32))
    again = Shared(os.dup(shared._descriptor), 5, torch.int32)
    assert again.tensor.tolist() == [0, 1, 2, 3, 4]
    again.tensor[2] = 7
    assert shared.tensor.tolist() == [0, 1, 7, 3, 4]
    again.close()
    shared.close()


def test_a_gpu_that_was_asked_for_has_all_workers():
    assert worker_devices(torch.device("cpu"), ModelConfig("m"), 2) == ["cpu", "cpu"]
    assert worker_devices(torch.device("cuda:1"), ModelConfig("m", device="cuda:1"), 2) == ["cuda:1", "cuda:1"]
