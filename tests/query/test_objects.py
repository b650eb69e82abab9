"""Models and data as objects: the rows are those of the same files, and either opens the other's index."""

import json

import numpy as np
import pytest

from rapidindex import BuildRequest, Index, ModelConfig, add, build
from rapidindex.config import BuildConfig, SketchConfig
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.model.model import load
from tests import tiny
from tests.oracles import ANSWER, PROMPT, all_rows, request


@pytest.fixture(scope="module")
def loaded(llama_folders):
    return load(ModelConfig(*map(str, llama_folders)))


@pytest.fixture(scope="module")
def index(loaded, data, tmp_path_factory):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path_factory.mktemp("objects") / "index"
    build(BuildRequest(rows, path, loaded.model, sketch=SketchConfig(K=1024), tokenizer=loaded.tokenizer))
    return path


def test_rows_built_from_objects_are_those_built_from_files(index, data, tmp_path, llama_folders):
    build(request(data, tmp_path / "files", llama_folders))
    ours, theirs = all_rows(index), all_rows(tmp_path / "files")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[id], theirs[id]) for id in ours)


def test_an_index_built_from_objects_opens_from_folders_and_is_added_to(index, loaded, llama_folders):
    base, adapter = map(str, llama_folders)
    answers = [
        Index.open(index, model=loaded.model, tokenizer=loaded.tokenizer).query(PROMPT, answer=ANSWER, k=3),
        Index.open(index, model=base, adapter=adapter).query(PROMPT, answer=ANSWER, k=3),
    ]
    assert [m.id for m in answers[0].matches] == [m.id for m in answers[1].matches]
    more = [{"prompt": "What is snow?", "response": "Snow is frozen water."}]
    assert add(index, more, model=loaded.model, tokenizer=loaded.tokenizer).computed == 1
    assert len(Index.open(index)) == 11


def test_a_changed_model_and_a_missing_tokenizer_are_refused(index, loaded, data, tmp_path):
    other = load(ModelConfig(*map(str, tiny.save_model(tmp_path, "llama", seed=5)))).model
    with pytest.raises((ConfigMismatch, ModelError)):
        Index.open(index, model=other, tokenizer=loaded.tokenizer)
    with pytest.raises(UsageError, match="tokenizer"):
        build(BuildRequest(str(data), tmp_path / "index", loaded.model))
    with pytest.raises(UsageError, match="--workers"):
        BuildRequest(str(data), tmp_path / "index", loaded.model, work=BuildConfig(workers=2))
