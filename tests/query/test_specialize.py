"""An index specialized for a task: its rows, scores and heat-maps against a dense R and numpy's eigenvectors."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex import Index, QueryOptions, add, check, remove
from rapidindex.caching.build import build
from rapidindex.config import BuildConfig, GradientConfig, SketchConfig, SpecializeOptions, TokenConfig
from rapidindex.errors import ConfigMismatch, DamagedIndex, DataError, ResourceError, StoreError, UsageError
from rapidindex.gradients import curvature
from rapidindex.query import specialize as module
from rapidindex.query.encode import stack_rows
from rapidindex.query.specialize import specialize
from rapidindex.store import Store
from tests import oracles
from tests.oracles import ANSWER, PROMPT, all_rows, request

QUERIES = [
    {"prompt": f"Tell me about {word}", "answer": f"{word} is from {place}"}
    for word, place in zip("tea rice fish sun sky".split(), "Japan India Peru Spain Cuba".split(), strict=True)
]
K = 64
RECIPES = oracles.RECIPES | {"kfac": GradientConfig("unit", "kfac", moment_examples=8)}


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "queries.jsonl"
    file.write_text("\n".join(map(json.dumps, QUERIES)))
    return file


@pytest.fixture(scope="module")
def index_of(data, tmp_path_factory, llama_folders):
    """Builds the index of a projection and a recipe, once."""
    made = {}

    def make(projection="two-sided", recipe="plain TracIn", **changes):
        key = projection, recipe, *changes
        if key not in made:
            made[key] = tmp_path_factory.mktemp("index") / "index"
            sketch = SketchConfig(K=K, projection=projection)
            build(request(data, made[key], llama_folders, gradient=RECIPES[recipe], sketch=sketch, **changes))
        return made[key]

    return make


@pytest.fixture
def index(index_of):
    return index_of()


def dense_root(rows, task, weight, damping, block):
    """R^-1/2 as one K × K matrix of float64, block by block along its diagonal."""
    R = weight * task.T @ task / len(task) + (1 - weight) * rows.T @ rows / len(rows)
    root = np.zeros_like(R)
    for first in range(0, len(R), block):
        here = slice(first, first + block)
        values, vectors = np.linalg.eigh(R[here, here])
        values = np.maximum(values, 0) + damping * values.mean()
        root[here, here] = vectors @ np.diag(values**-0.5) @ vectors.T
    return root


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact_and_task(path):
    """The stored rows in their order, and the rows of the task's queries, float64."""
    opened = Index.open(path)
    rows = opened.rows_of("sentence")
    return rows.take(np.arange(len(rows))).astype(float), stack_rows(opened.encode(QUERIES)).astype(float)


@pytest.mark.parametrize("projection", ["two-sided", "rapidgrad"])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "the default"])
def test_rows_and_scores_are_those_of_a_dense_root(index_of, queries, tmp_path, projection, recipe):
    source, target = index_of(projection, recipe), tmp_path / "index"
    options = SpecializeOptions(weight=0.3, damping=0.1, block=16)
    summary = specialize(source, queries, target, options)
    assert (summary.block, summary.weight, summary.rows, summary.queries) == (16, 0.3, 10, 5)
    rows, task = exact_and_task(source)
    root = dense_root(rows, task, 0.3, 0.1, 16)
    expected = unit(rows @ root)
    specialized = curvature.Curvature.of(Store.open(target).roots())(torch.from_numpy(rows).float())[0].numpy()
    assert np.allclose(specialized, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    opened = Index.open(target)
    stored = opened.rows_of("sentence").take(np.arange(10))
    assert np.allclose(stored, expected, rtol=0, atol=1 / 200 * np.abs(expected).max())  # int8
    (asked,) = stack_rows(Index.open(source).encode([{"prompt": PROMPT, "answer": ANSWER}])).astype(float) @ root
    result = opened.query(PROMPT, answer=ANSWER, k=10)
    scores = dict(zip(opened.rows_of("sentence").ids, stored @ asked / np.linalg.norm(asked), strict=True))
    assert [match.id for match in result.matches] == sorted(scores, key=scores.get, reverse=True)
    for match in result.matches:
        assert match.score == pytest.approx(scores[match.id], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("projection", ["two-sided", "rapidgrad"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_influences_of_a_matchs_words_average_to_its_own(index_of, queries, tmp_path, projection, recipe):
    specialize(index_of(projection, recipe), queries, tmp_path / "index", SpecializeOptions(weight=0.5))
    index = Index.open(tmp_path / "index")
    (encoded,) = index.encode([{"prompt": PROMPT, "answer": ANSWER, "token": "Japan"}])
    (match,) = index.query([encoded], k=1, answer_scores=True, all=True)[0].matches
    each = np.array([index.influence_of([at], match, encoded, level="sentence") for at in range(len(match.tokens))])
    assert np.allclose(each.mean(0), match.answer_scores, atol=0.02 * np.abs(match.answer_scores).max())


@pytest.mark.parametrize("projection", ["two-sided", "rapidgrad"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_shares_average_to_the_score_whatever_the_recipe(index_of, queries, tmp_path, projection, recipe):
    target = tmp_path / "index"
    specialize(index_of(projection, recipe), queries, target, SpecializeOptions(weight=0.5))
    result = Index.open(target).query(PROMPT, answer=ANSWER, token="Japan", k=10, rescore=True, answer_scores=True)
    assert result.index.specialized
    spread = max(abs(match.score) for match in result.matches)
    for match in result.matches:
        assert match.exact_score == pytest.approx(match.score, abs=0.03 * spread)  # int8, twice
        assert match.exact_score == pytest.approx(np.mean(match.token_scores), abs=1e-6 * spread)
        assert np.mean([match.answer_scores[at] for at in result.query.selection]) != 0
    strongest = [max(match.token_scores) for match in result.matches]
    assert strongest == sorted(strongest, reverse=True)


def test_a_row_of_the_whole_answer_has_answer_scores_that_average_to_its_influence(index, queries, tmp_path):
    specialize(index, queries, tmp_path / "index")
    result = Index.open(tmp_path / "index").query(PROMPT, answer=ANSWER, k=3, answer_scores=True, all=True)
    for match in result.matches:
        assert np.mean(match.answer_scores) == pytest.approx(match.exact_score, rel=1e-2, abs=1e-4)


def test_the_weight_is_where_the_spectra_cross(index, queries, tmp_path):
    summary = specialize(index, queries, tmp_path / "index", SpecializeOptions(component=7, block=16))
    rows, task = exact_and_task(index)
    spectra = []
    for own in (rows, task):
        R = own.T @ own / len(own)
        blocks = [R[first : first + 16, first : first + 16] for first in range(0, K, 16)]
        spectra.append(np.sort(np.concatenate([np.linalg.eigvalsh(one) for one in blocks]))[::-1])
    train, of_task = spectra[0][6], spectra[1][6]
    assert summary.weight == pytest.approx(train / (of_task + train), rel=1e-4)
    assert summary.weight * of_task == pytest.approx((1 - summary.weight) * train, rel=1e-4)
    assert summary.component == 7 and Index.open(tmp_path / "index").info()["config"]["task"]["component"] == 7
    with pytest.raises(UsageError, match="share 20 components"):
        specialize(index, queries, tmp_path / "other", SpecializeOptions(component=21, block=16))


@pytest.mark.parametrize("recipe", ["plain TracIn", "kfac"])
def test_what_is_added_is_multiplied_by_the_same_root_and_what_is_removed_is_gone(
    data, llama_folders, queries, tmp_path, recipe
):
    lines = data.read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:6]))
    source, target = tmp_path / "source", tmp_path / "index"
    asked = {"gradient": RECIPES[recipe], "sketch": SketchConfig(K=K, projection="two-sided")}
    build(request(tmp_path / "a.jsonl", source, llama_folders, **asked))
    specialize(source, queries, target)
    assert add(target, str(data), work=BuildConfig(batch_tokens=64, workers=2)).computed == 4
    add(source, str(data))
    whole = all_rows(source)
    root = curvature.Curvature.of(Store.open(target).roots())
    for id, row in all_rows(target).items():
        expected = root(torch.from_numpy(whole[id])[None])[0][0].numpy()
        assert np.allclose(row, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    assert len(Index.open(target)) == 10 and check(target) == []
    gone = Index.open(target).query(PROMPT, answer=ANSWER, k=1).matches[0].id
    remove(target, ids=[gone])
    assert gone not in [match.id for match in Index.open(target).query(PROMPT, answer=ANSWER, k=10).matches]
    with pytest.raises(ConfigMismatch, match="is no build"):
        build(request(data, target, llama_folders, **asked))


def test_removed_examples_of_the_source_are_left_out(index, queries, tmp_path):
    source = shutil.copytree(index, tmp_path / "source")
    gone = next(iter(all_rows(source)))
    remove(source, ids=[gone])
    assert specialize(source, queries, tmp_path / "index").examples == 9
    assert gone not in all_rows(tmp_path / "index")


def interrupted(stage, at):
    def progress(name, done, total, note=""):
        if name == stage and done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("stage", "at"), [("gradients of questions", 2), ("spectra", 1), ("roots", 2), ("rows", 6)])
def test_the_same_call_goes_on_after_an_interrupt(index, queries, tmp_path, monkeypatch, stage, at):
    monkeypatch.setattr(module, "_PORTION_BYTES", 3 * K)  # three rows a shard
    specialize(index, queries, tmp_path / "whole")
    target = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        specialize(index, queries, target, progress=interrupted(stage, at))
    if stage == "rows":
        monkeypatch.setattr(module, "encode_file", None)  # the model is not needed any more
        assert len(Store.open(target).rows("sentence")) == 6
        assert "6 of 10" in check(target)[0].what
    summary = specialize(index, queries, target)
    assert not summary.already_there and check(target) == []
    for id, row in all_rows(tmp_path / "whole").items():
        assert np.array_equal(row, all_rows(target)[id])
    assert specialize(index, queries, target).already_there


def test_another_task_option_or_source_is_refused_by_name(index, queries, tmp_path):
    source, target = shutil.copytree(index, tmp_path / "source"), tmp_path / "index"
    specialize(source, queries, target)
    with pytest.raises(ConfigMismatch, match="task.damping: 1.0 there, 2.0 asked for"):
        specialize(source, queries, target, SpecializeOptions(damping=2.0))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(QUERIES[0]))
    with pytest.raises(ConfigMismatch, match="task.queries.fingerprint"):
        specialize(source, other, target, SpecializeOptions())
    remove(source, ids=[next(iter(all_rows(source)))])
    with pytest.raises(ConfigMismatch, match="is not what it was"):
        specialize(source, queries, target)
    assert specialize(source, queries, target, overwrite=True).examples == 9


def test_what_cannot_be_specialized_is_refused_in_a_sentence(index, queries, tmp_path, monkeypatch):
    target = tmp_path / "index"
    specialize(index, queries, target)
    with pytest.raises(UsageError, match="is specialized already"):
        specialize(target, queries, tmp_path / "more")
    with pytest.raises(UsageError, match="is the index itself"):
        specialize(index, queries, index)
    copy = shutil.copytree(index, tmp_path / "copy")
    with pytest.raises(ConfigMismatch, match="is another index"):
        specialize(index, queries, copy)
    with pytest.raises(StoreError, match="is no index"):
        specialize(index, queries, queries.parent)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(QUERIES[0]) + '\n{"prompt": "Tell me", "answer": "tea", "token": "Zanzibar"}')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: .*Zanzibar"):
        specialize(index, bad, tmp_path / "new")
    bad.write_text('{"prompt"')
    with pytest.raises(DataError, match="line 1: not JSON"):
        specialize(index, bad, tmp_path / "new")
    embedded = Index.open(index)
    embedded.recipe = replace(embedded.recipe, encoder=embedded.recipe.model)
    with pytest.raises(UsageError, match="index of embeddings"):
        module._refuse(embedded, "sentence", tmp_path / "new")
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0}))
    with pytest.raises(ResourceError, match="GiB of memory"):
        specialize(index, queries, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_lost_or_damaged_roots_are_noticed_and_made_again(index, queries, tmp_path):
    target = tmp_path / "index"
    specialize(index, queries, target)
    before, file = all_rows(target), target / "second_moment.h5"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert [problem.where for problem in check(target)] == ["second_moment.h5"]
    assert check(target, repair=True)
    with pytest.raises(StoreError, match="is missing"):
        Index.open(target).query(PROMPT, answer=ANSWER)
    with pytest.raises(StoreError, match="is missing"):
        add(target, [{"prompt": "a", "response": "b"}])
    specialize(index, queries, target)
    assert check(target) == [] and all(np.array_equal(row, before[id]) for id, row in all_rows(target).items())
    opened = Store.open(target)
    opened.manifest["levels"]["sentence"]["K"] = 32
    with pytest.raises(DamagedIndex, match="do not fit the rows"):
        opened.roots()


def test_token_rows_have_a_curvature_of_their_own(index_of, queries, tmp_path):
    source = index_of("rapidgrad", levels=("sentence", "token"), token=TokenConfig(K=32))
    target = tmp_path / "index"
    summary = specialize(source, queries, target, SpecializeOptions(level="token", block=16))
    assert summary.K == 32 and summary.rows > summary.examples == 10
    result = Index.open(target).query(PROMPT, answer=ANSWER, token="Japan", k=5, all=True)
    assert result.level == "token"
    spread = max(abs(match.score) for match in result.matches)
    assert all(match.exact_score == pytest.approx(match.score, abs=0.05 * spread) for match in result.matches)
    assert Index.open(target).query(PROMPT, answer=ANSWER, options=QueryOptions(k=2, exact=True)).matches


def test_blocks_are_as_large_as_rows_allow():
    assert curvature.block_of(65_536, 16, 4096) == 4096
    assert curvature.block_of(65_536, 1, 4096) == 4096
    assert curvature.block_of(4096, 8, 4096) == 512
    assert curvature.block_of(4096, 8, 64) == 64
