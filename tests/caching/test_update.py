"""Adding data to an index, and taking examples out of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex.caching.build import build
from rapidindex.caching.update import add, remove
from rapidindex.config import BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.errors import ConfigMismatch, StoreError, UsageError
from rapidindex.gradients.losses import trainable
from rapidindex.model.model import load
from rapidindex.query.index import Index
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store, check
from tests.oracles import all_rows
from tests.tiny import WORDS

ROWS = [
    {
        "instruction": f"Tell me about {word}",
        "output": f"{word} is " + "very " * number + "nice",
        "even": number % 2 == 0,
    }
    for number, word in enumerate(WORDS)
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """All ten examples, the first six, and the last six."""
    parts = {"all": ROWS, "a": ROWS[:6], "b": ROWS[4:]}
    return {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()}


def request(data, output, folders, second_moment="none"):
    model = ModelConfig(*map(str, folders))
    gradient = GradientConfig(second_moment=second_moment, moment_examples=4)
    return BuildRequest(data, str(output), model, gradient=gradient, sketch=SketchConfig(K=1024))


def assert_same_rows(ours, theirs):
    ours, theirs = all_rows(ours), all_rows(theirs)
    assert ours.keys() == theirs.keys()
    assert all(np.linalg.norm(ours[id] - theirs[id]) <= 2e-3 * np.linalg.norm(theirs[id]) for id in theirs)


def found_by(path, k=20):
    """Lines of the examples that a search for everything finds."""
    rows = Store.open(path).rows("sentence")
    result = VectorIndex.open(rows).search(rows.take([0]), k)
    return {rows.record(rows.example_of(int(row)))["response"] for row in result.rows[0] if row >= 0}


def test_building_from_a_and_adding_b_is_building_from_both(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    build(request(files["a"], index, llama_folders))
    summary = add(index, files["b"])
    assert (summary.computed, summary.examples) == (4, 10)
    build(request(files["all"], tmp_path / "both", llama_folders))
    assert_same_rows(index, tmp_path / "both")
    assert check(index) == [] and Store.open(index).complete("sentence")
    assert len(found_by(index)) == 10


def test_the_second_moment_stays_that_of_the_first_data(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    build(request(files["a"], index, llama_folders, "estimate"))
    before, first = np.array(Store.open(index).second_moment()), all_rows(index)
    add(index, files["b"])
    assert np.array_equal(before, Store.open(index).second_moment())
    assert all(np.array_equal(all_rows(index)[id], row) for id, row in first.items())
    build(request(files["all"], tmp_path / "both", llama_folders, "estimate"))
    assert not np.allclose(before, Store.open(tmp_path / "both").second_moment())


@pytest.mark.parametrize("second_moment", ["estimate", "factored", "kronecker", "kfac"])
@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_second_moment_that_is_lost_is_made_again_from_the_data_of_the_build(
    files, tmp_path, llama_folders, second_moment, damage
):
    path, asked = tmp_path / "index", request(files["a"], tmp_path / "index", llama_folders, second_moment)
    build(asked)
    before, rows, file = Store.open(path).second_moment().copy(), all_rows(path), path / "second_moment.h5"
    question = {"answer": "tea is nice", "k": 3}
    scores = [match.score for match in Index.open(path).query("Tell me about tea", **question).matches]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.unlink() if damage == "lost" else file.write_bytes(content)
    check(path, repair=True)
    with pytest.raises(StoreError, match="second moment") as refused:
        add(path, files["b"])
    assert "build" in refused.value.hint and len(all_rows(path)) == 6
    assert build(asked).computed == 0
    assert np.allclose(Store.open(path).second_moment(), before, rtol=1e-5, atol=0)
    assert check(path) == []
    found = [match.score for match in Index.open(path).query("Tell me about tea", **question).matches]
    assert found == pytest.approx(scores, rel=1e-4)
    add(path, files["b"])
    assert rows.keys() < all_rows(path).keys()


def save_optimizer(folders, path, scale):
    """Save the state of an AdamW that has seen gradients of this size, as a training checkpoint has it."""
    loaded = load(ModelConfig(*map(str, folders)))
    optimizer = torch.optim.AdamW(trainable(loaded.model).values(), lr=0.0)
    for number, parameter in enumerate(trainable(loaded.model).values()):
        parameter.grad = torch.full_like(parameter, scale * (number + 1))
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")


@pytest.mark.parametrize("projection", ["rapidgrad", "two-sided"])
def test_a_training_checkpoint_that_has_changed_gives_no_other_second_moment(
    files, tmp_path, llama_folders, projection
):
    checkpoint, path = tmp_path / "checkpoint", tmp_path / "index"
    checkpoint.mkdir()
    save_optimizer(llama_folders, checkpoint, 0.1)
    asked = request(files["a"], path, llama_folders, str(checkpoint))
    asked = replace(asked, sketch=SketchConfig(K=1024, projection=projection))
    build(asked)
    (path / "second_moment.h5").unlink()
    check(path, repair=True)
    save_optimizer(llama_folders, checkpoint, 0.2)
    with pytest.raises(StoreError, match="not the one that the rows of"):
        build(asked)
    assert not (path / "second_moment.h5").exists() and "is missing" in check(path)[0].what
    save_optimizer(llama_folders, checkpoint, 0.1)
    assert build(asked).computed == 0 and check(path) == []
    assert Index.open(path).query("Tell me about tea", answer="tea is nice", k=3).matches


def test_adding_twice_adds_nothing_and_lists_each_source_once(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    build(request(files["a"], index, llama_folders))
    for expected in (4, 0, 0):
        assert add(index, files["b"]).computed == expected
    assert add(index, files["a"]).computed == 0
    config = Store.open(index).config
    assert [source["path"] for source in (config["data"], *config["added"])] == [files["a"], files["b"]]
    assert config["added"][0]["examples"] == 4
    assert build(request(files["a"], index, llama_folders)).computed == 0


def test_rows_that_cannot_be_used_are_told_apart_by_their_file(files, tmp_path, poisoned):
    index = tmp_path / "index"
    build(replace(request(files["a"], index, ("", "")), model=poisoned))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(map(json.dumps, ROWS[8:])) + "\n{broken")
    summary = add(index, str(broken))
    assert (summary.examples, summary.computed, summary.rejected) == (7, 2, 1)
    info = Index.open(index).info()
    assert [(row["source"], row["line"]) for row in info["rejected"]] == [(str(broken), 2)]
    assert [(row["source"], row["line"]) for row in info["skipped"]] == [(str(broken), 3)]
    assert info["complete"] and add(index, str(broken)).computed == 0


def test_an_index_that_is_not_finished_takes_no_other_data(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    asked = request(files["a"], index, llama_folders)

    def stop(stage, done, total):
        if stage == "cache":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(asked, progress=stop)
    with pytest.raises(StoreError, match="does not hold all of") as caught:
        add(index, files["b"])
    assert "rapidindex build" in caught.value.hint
    build(asked)
    with pytest.raises(KeyboardInterrupt):
        add(index, files["b"], progress=stop)
    assert not Store.open(index).complete("sentence")
    with pytest.raises(StoreError, match="does not hold all of"):
        add(index, write(tmp_path / "c.jsonl", [{"prompt": "x", "response": "y"}]))
    assert add(index, files["b"]).computed == 4
    assert Store.open(index).complete("sentence")


def test_another_model_cannot_add(files, tmp_path, llama_folders, tiny_folders):
    build(request(files["a"], tmp_path / "index", llama_folders))
    other = tiny_folders["qwen3"]
    with pytest.raises(ConfigMismatch, match=r"model\.fingerprint") as caught:
        add(tmp_path / "index", files["b"], model=str(other[0]), adapter=str(other[1]))
    assert "-m" in caught.value.hint
    assert len(all_rows(tmp_path / "index")) == 6


@pytest.mark.parametrize("factory", [None, "Flat"])
def test_removed_examples_are_not_found_until_they_are_added_again(files, tmp_path, llama_folders, factory):
    index = tmp_path / "index"
    build(request(files["all"], index, llama_folders))
    removal = remove(index, where=["even=true"])
    assert (removal.removed, removal.examples) == (5, 5)
    with Store.open(index).lock() as store:
        VectorIndex.build(store.rows("sentence"), factory=factory, dim=256)
    odd = {row["output"] for row in ROWS if not row["even"]}
    assert found_by(index) == odd
    assert Index.open(index).info()["removed"] == 5
    assert build(request(files["all"], index, llama_folders)).examples == 5
    summary = add(index, files["b"])
    assert (summary.computed, summary.restored, summary.examples) == (0, 3, 8)
    assert found_by(index) == odd | {row["output"] for row in ROWS[4:]}
    assert check(index) == []


def test_all_conditions_must_hold_those_on_one_column_too(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    build(request(files["all"], index, llama_folders))
    with pytest.raises(StoreError, match="even=true and even=false"):
        remove(index, where=["even=true", "even=false"])
    assert not Store.open(index).removed


def test_ids_are_given_as_they_are_or_in_files(files, tmp_path, llama_folders):
    index = tmp_path / "index"
    build(request(files["all"], index, llama_folders))
    ids = sorted(all_rows(index))
    (tmp_path / "ids.txt").write_text("\n".join(ids[:3]) + "\n")
    assert remove(index, ids=[str(tmp_path / "ids.txt"), ids[5]]).removed == 4
    assert Store.open(index).removed == {*ids[:3], ids[5]}
    assert remove(index, ids=[ids[0]]).removed == 0


@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ({"ids": ["0123"]}, StoreError, "0123"),
        ({"where": ["odd=true"]}, StoreError, "no column|has a column"),
        ({"where": ["even=7"]}, StoreError, "even=7"),
        ({"where": ["even"]}, UsageError, "even"),
        ({}, UsageError, "--ids or --where"),
    ],
)
def test_a_removal_that_means_nothing_removes_nothing(files, tmp_path, llama_folders, asked, error, named):
    build(request(files["a"], tmp_path / "index", llama_folders))
    with pytest.raises(error, match=named):
        remove(tmp_path / "index", **asked)
    assert not Store.open(tmp_path / "index").removed
