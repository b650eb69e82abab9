import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex.caching.batches import plan_batches
from rapidindex.caching.build import build
from rapidindex.caching.job import plan_levels, prepare
from rapidindex.config import BuildConfig, BuildRequest, EncodingConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.templates import Template
from rapidindex.errors import ConfigMismatch, DataError, ModelError, ResourceError, StoreError, UsageError
from rapidindex.gradients.losses import trainable
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.model import load
from rapidindex.store import Store
from tests.oracles import RECIPES, all_rows, autograd, request


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_stored_rows_are_the_compressed_autograd_gradients(data, tmp_path, llama_folders, recipe):
    asked = request(data, tmp_path / "index", llama_folders, gradient=recipe)
    build(asked)
    store, loaded = Store.open(tmp_path / "index"), load(asked.model)
    template = Template("alpaca", loaded.tokenizer, 512)
    size = sum(p.numel() for p in trainable(loaded.model).values())
    sketch = Sketch(size, asked.sketch)
    v = store.second_moment()
    factor = 1.0 if v is None else 1 / np.sqrt(v + 1e-3 * v.mean())
    stored = all_rows(tmp_path / "index")
    for item in prepare(asked).items:
        encoding = template.encode(item.example)
        weights = encoding.response_mask / encoding.response_mask.sum()
        parts = [p.flatten() for p in autograd(loaded.model, encoding.input_ids, weights.astype(np.float32))[1]]
        if recipe.normalize == "layer":
            parts = [p / p.norm() for p in parts]
        flat = torch.cat(parts) * torch.as_tensor(factor)
        if recipe.normalize == "unit":
            flat = flat / flat.norm()
        truth = sketch.compress(flat.float()[None])[0].numpy()
        rounding = 1 / 254 + 1e-3  # rows are whole numbers up to 127
        assert np.abs(stored[item.example.id] - truth).max() <= rounding * np.abs(truth).max()


def test_the_estimate_is_taken_from_the_examples_that_the_seed_draws(data, tmp_path, llama_folders):
    moments = []
    for seed in (0, 0, 1):
        out = tmp_path / f"index-{len(moments)}"
        build(request(data, out, llama_folders, gradient=GradientConfig(moment_examples=3, seed=seed)))
        moments.append(np.array(Store.open(out).second_moment()))
    assert np.array_equal(moments[0], moments[1])
    assert not np.allclose(moments[0], moments[2])


def test_building_again_computes_nothing(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders)
    assert build(asked).computed == 10
    before = all_rows(tmp_path / "index")
    again = build(asked)
    assert (again.computed, again.examples) == (0, 10)
    assert all(np.array_equal(before[id], row) for id, row in all_rows(tmp_path / "index").items())


def test_an_interrupted_build_keeps_what_it_finished_and_goes_on(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders, work=BuildConfig(batch_tokens=128))

    def stop(stage, done, total):
        if stage == "cache" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(asked, progress=stop)
    kept = all_rows(tmp_path / "index")
    assert 0 < len(kept) < 10
    summary = build(asked)
    assert summary.computed == 10 - len(kept)
    build(request(data, tmp_path / "whole", llama_folders, work=BuildConfig(batch_tokens=128)))
    whole, resumed = all_rows(tmp_path / "whole"), all_rows(tmp_path / "index")
    assert whole.keys() == resumed.keys()
    assert all(np.allclose(whole[id], resumed[id], atol=2e-3 * np.abs(whole[id]).max()) for id in whole)


CANNOT_ALLOCATE = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"


def short_of_memory(folders, error, too_much):
    """The tiny Llama whose forward pass raises `error` where `too_much` holds of the token ids."""
    loaded = load(ModelConfig(*map(str, folders)))

    def refuse(module, inputs, options):
        if too_much(options["input_ids"]):
            raise error

    loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return {"model": loaded.model, "tokenizer": loaded.tokenizer}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError(CANNOT_ALLOCATE), MemoryError()])
def test_batches_that_do_not_fit_are_halved_and_the_rows_are_the_same(data, tmp_path, llama_folders, error):
    asked = request(data, tmp_path / "index", llama_folders)
    build(replace(asked, **short_of_memory(llama_folders, error, lambda ids: len(ids) > 2)))
    build(request(data, tmp_path / "whole", llama_folders))
    whole, halved = all_rows(tmp_path / "whole"), all_rows(tmp_path / "index")
    assert whole.keys() == halved.keys()
    assert all(np.allclose(whole[id], halved[id], atol=1e-2 * np.abs(whole[id]).max()) for id in whole)


def test_an_example_that_does_not_fit_is_named_and_what_was_finished_is_kept(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders, work=BuildConfig(batch_tokens=128))
    asked = replace(asked, gradient=GradientConfig(second_moment="none"))
    passes = []
    model = short_of_memory(
        llama_folders, RuntimeError(CANNOT_ALLOCATE), lambda ids: passes.append(ids) or len(passes) > 8
    )
    with pytest.raises(ResourceError, match=r"one example of \d+ tokens \(line \d+\)"):
        build(replace(asked, **model))
    assert 0 < len(all_rows(tmp_path / "index")) < 10
    with pytest.raises(ResourceError, match="one example"):
        always = short_of_memory(llama_folders, MemoryError(), lambda ids: ids.shape[1] > 16)
        build(replace(request(data, tmp_path / "other", llama_folders), **always))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sketch": SketchConfig(K=2048)}, "sketch.K: 1024 there, 2048 asked for"),
        ({"gradient": GradientConfig(normalize="layer")}, "gradient.normalize"),
        ({"encoding": EncodingConfig(template="plain")}, "encoding.template"),
        ({"limit": 5}, "the data file has changed"),
    ],
)
def test_other_options_against_an_index_are_refused_by_name(data, tmp_path, llama_folders, change, named):
    asked = request(data, tmp_path / "index", llama_folders)
    build(asked)
    with pytest.raises(ConfigMismatch, match=named) as caught:
        build(replace(asked, **change))
    assert "--overwrite" in caught.value.hint
    build(replace(asked, **change), overwrite=True)


def test_another_adapter_against_an_index_is_refused(data, tmp_path, llama_folders, tiny_folders):
    build(request(data, tmp_path / "index", llama_folders))
    with pytest.raises(ConfigMismatch, match=r"adapter\.fingerprint"):
        build(
            BuildRequest(
                str(data), str(tmp_path / "index"), ModelConfig(str(llama_folders[0])), sketch=SketchConfig(K=1024)
            )
        )


def test_overwrite_loses_nothing_when_the_new_build_cannot_begin(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders)
    build(asked)
    with pytest.raises((ModelError, DataError)):
        build(replace(asked, data=str(tmp_path / "nothing.jsonl")), overwrite=True)
    assert len(all_rows(tmp_path / "index")) == 10


def test_overwrite_never_deletes_a_folder_that_is_no_index(data, tmp_path, llama_folders):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError):
        build(request(data, tmp_path / "index", llama_folders), overwrite=True)
    assert (tmp_path / "index" / "thesis.txt").read_text() == "years of work"


def test_a_response_that_does_not_fit_is_listed_and_not_dropped_silently(data, tmp_path, llama_folders):
    long = tmp_path / "long.jsonl"
    row = {"instruction": "word " * 300, "output": "lost"}
    long.write_text(data.read_text() + "\n" + json.dumps(row) + "\n{broken\n")
    summary = build(request(long, tmp_path / "index", llama_folders, encoding=EncodingConfig(max_length=200)))
    assert (summary.examples, summary.skipped) == (10, 2)
    reasons = {row["line"]: row["reason"] for row in Store.open(tmp_path / "index").skipped}
    assert "--max-length" in reasons[11]
    assert "JSON" in reasons[12]


def test_examples_that_are_cut_are_told_by_their_lines(data, tmp_path, llama_folders):
    longest = max(prepare(request(data, tmp_path / "index", llama_folders)).items, key=lambda item: item.tokens)
    encoding = EncodingConfig(max_length=longest.tokens - 1)
    assert build(request(data, tmp_path / "index", llama_folders, encoding=encoding)).truncated == [
        longest.example.line
    ]


def test_an_example_whose_gradient_is_not_finite_is_named_and_kept_out(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", llama_folders, gradient=GradientConfig(second_moment="none"))
    job = prepare(asked)
    number = next(i for i, item in enumerate(job.items) if item.example.prompt.endswith("sky"))
    poison = set(job.items[number].encoding.input_ids) - set().union(
        *(item.encoding.input_ids for item in job.items[:number] + job.items[number + 1 :])
    )
    assert poison, "the example needs a token of its own"
    folder = tmp_path / "poisoned"
    model = load(ModelConfig(str(llama_folders[0]))).model
    with torch.no_grad():
        model.get_input_embeddings().weight[sorted(poison)] = float("nan")
    model.save_pretrained(folder)
    job.loaded.tokenizer.save_pretrained(folder)
    summary = build(replace(asked, model=ModelConfig(str(folder), str(llama_folders[1]))))
    assert (summary.examples, summary.rejected) == (9, 1)
    rows = Store.open(tmp_path / "index").rows("sentence")
    assert np.isfinite(rows.take(np.arange(len(rows)))).all()
    assert rows.rejected[0]["line"] == 10
    assert build(replace(asked, model=ModelConfig(str(folder), str(llama_folders[1])))).computed == 0


def test_a_build_that_cannot_be_stored_is_refused_before_the_work(data, tmp_path, llama_folders, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="are free"):
        build(request(data, tmp_path / "index", llama_folders))


def test_batches_hold_like_lengths_under_the_token_budget(data, tmp_path, llama_folders):
    items = prepare(request(data, tmp_path / "index", llama_folders)).items
    batches = plan_batches(items, 200)
    assert sorted(item.example.id for batch in batches for item in batch) == sorted(i.example.id for i in items)
    assert all(len(batch) == 1 or len(batch) * batch[0].tokens <= 200 for batch in batches)
    lengths = [item.tokens for batch in batches for item in batch]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("second_moment", ["estimate", "kfac"])
def test_a_batch_holds_no_more_examples_than_the_gradients_of_the_largest_layer_allow(
    data, tmp_path, llama_folders, monkeypatch, second_moment
):
    asked = request(data, tmp_path / "index", llama_folders, gradient=GradientConfig(second_moment=second_moment))
    build(asked)
    largest = max(layer.size for layer in prepare(asked).layers)
    monkeypatch.setattr("rapidindex.caching.batches._LAYER_BYTES", 3 * 4 * largest)
    both = replace(asked, output=str(tmp_path / "limited"), levels=("sentence", "token"))
    for plan in plan_levels(prepare(both), None):
        assert max(map(len, plan.batches)) == 3
    two_sided = replace(both, sketch=replace(both.sketch, projection="two-sided"))
    assert max(map(len, plan_levels(prepare(two_sided), None)[0].batches)) > 3
    build(replace(both, levels=("sentence",)))
    rows, limited = all_rows(tmp_path / "index"), all_rows(tmp_path / "limited")
    for id, row in rows.items():
        np.testing.assert_allclose(limited[id], row, atol=np.abs(row).max() / 100)


def test_a_quantized_base_builds_and_is_part_of_the_identity(data, tmp_path):
    from tests import tiny

    base, adapter = tiny.save_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    quantized = ModelConfig(str(base), str(adapter), quantize="4bit")
    asked = BuildRequest(str(data), str(tmp_path / "index"), quantized, sketch=SketchConfig(K=256))
    assert build(asked).examples == 10
    with pytest.raises(ConfigMismatch, match="quantize"):
        build(replace(asked, model=replace(quantized, quantize=None)))


@pytest.mark.parametrize("bad", [{"normalize": "some"}, {"moment_examples": 0}])
def test_options_without_a_meaning_name_their_flag(bad):
    with pytest.raises(UsageError, match="--"):
        GradientConfig(**bad)
