"""An index of several checkpoints, against indexes of each alone and sums that are written out."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from rapidindex import Index, QueryOptions, build
from rapidindex.caching.checkpoints import build_checkpoints, name_checkpoints
from rapidindex.config import GradientConfig, ModelConfig, SketchConfig, TokenConfig
from rapidindex.errors import ConfigMismatch, DamagedIndex, NotAnIndex, StoreError, UsageError
from rapidindex.model.schedule import weights_of
from rapidindex.results import Result
from rapidindex.store import Store, checkpoints_at, indexes_at, write_json
from rapidindex.views import wording
from tests import tiny
from tests.cli.conftest import rapidindex, typed  # noqa: F401
from tests.oracles import ANSWER, PROMPT, request

RECIPE = GradientConfig("unit", "none")
RECORD = {
    "settings": {"learning_rate": 1e-3, "warmup_ratio": 0.25, "template": "alpaca", "max_length": 512, "loss": "all"},
    "summary": {"steps": 8, "early_step": 2},
}
"""Learning rates after 0, 1, 2 … steps: 0, .5, 1 times the peak, then half a cosine to 0 after 8."""


def save_adapter(base, folder, seed):
    model = tiny.make_model("llama")
    model.name_or_path = model.config._name_or_path = str(base)
    tiny.with_lora(model, seed=seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(llama_folders, tmp_path_factory):
    """A finished adapter and its early one, with the record of `finetune`; read only."""
    base, adapter = llama_folders
    finished = shutil.copytree(adapter, tmp_path_factory.mktemp("trained") / "tuned")
    (finished / "rapidindex-finetune.json").write_text(json.dumps(RECORD))
    return finished, save_adapter(base, finished / "early", 5)


def configs(llama_folders, adapters):
    return [ModelConfig(str(llama_folders[0]), str(adapter)) for adapter in adapters]


@pytest.fixture(scope="module")
def index(data, llama_folders, adapters, tmp_path_factory):
    path = tmp_path_factory.mktemp("several") / "index"
    levels = {"levels": ("sentence", "token"), "token": TokenConfig(512, "content,1")}
    asked = request(data, path, llama_folders, gradient=RECIPE, sketch=SketchConfig(K=1024), **levels)
    summaries = build_checkpoints(asked, configs(llama_folders, adapters))
    assert {name: one.examples for name, one in summaries.items()} == {"tuned": 10, "early": 10}
    return path


def by_id(result):
    return {(match.id, match.position): match for match in result.matches}


ASKED = {"answer": ANSWER, "token": "Japan", "k": 10, "all": True}


def test_each_checkpoint_answers_as_an_index_of_its_own(index, data, llama_folders, adapters, tmp_path):
    alone = request(data, tmp_path / "alone", (llama_folders[0], adapters[1]), gradient=RECIPE)
    build(alone)
    expected = Index.open(tmp_path / "alone").query(PROMPT, **ASKED)
    found = Index.open(index).query(PROMPT, **ASKED, checkpoint="early")
    assert found.checkpoint == "early" and found.agreements == [] and found.index.adapter == str(adapters[1])
    assert [match.id for match in found.matches] == [match.id for match in expected.matches]
    for one, other in zip(found.matches, expected.matches, strict=True):
        assert one.score == other.score and one.token_scores == pytest.approx(other.token_scores, rel=1e-5)


def test_the_first_answers_and_the_others_are_compared_with_it(index):
    several = Index.open(index)
    result = several.query(PROMPT, **ASKED | {"k": 2})
    assert (result.checkpoint, len(result.matches), len(several)) == ("tuned", 2, 10)
    (agreement,) = result.agreements
    early = several.query(PROMPT, **ASKED, checkpoint="early", heatmaps=False)
    assert agreement.checkpoint == "early" and agreement.ids == [match.id for match in early.matches]
    assert agreement.common == 10  # of ten examples
    assert wording.checkpoints(result) == "All checkpoints have the same best 10."
    assert Result.from_json(result.to_json()) == result
    some = Result.from_json(result.to_json().replace('"common": 10', '"common": 3'))
    assert "early shares 3 of its best 10 with tuned" in wording.checkpoints(some)


@pytest.mark.parametrize(("level", "opponents"), [("sentence", False), ("token", True)])
def test_the_sum_is_the_weighed_sum_over_all_rows(index, level, opponents):
    several, options = Index.open(index), {"level": level, "opponents": opponents, "k": 200, "rescore": False}
    weights = several.several.weights
    parts = {name: by_id(several.query(PROMPT, **ASKED | options, checkpoint=name)) for name in several.names}
    result = several.query(PROMPT, **ASKED | options, checkpoint="sum", answer_scores=True)
    assert result.checkpoint == "sum" and len(result.matches) == len(parts["tuned"])
    scores = [match.score for match in result.matches]
    assert scores == sorted(scores, reverse=not opponents)
    for key, match in by_id(result).items():
        for field in ("score", "exact_score", "token_scores"):
            expected = sum(weights[name] * np.array(getattr(parts[name][key], field)) for name in parts)
            assert np.allclose(getattr(match, field), expected, rtol=1e-4, atol=1e-6)
        assert np.mean([match.answer_scores[at] for at in result.query.selection]) == pytest.approx(
            match.exact_score, rel=1e-3, abs=1e-5
        )
    assert result.summary.n == len(scores) and result.summary.max == pytest.approx(max(scores))
    rescored = several.query(PROMPT, **ASKED | options | {"k": 3, "rescore": True}, checkpoint="sum")
    assert rescored.rescoring.candidates == min(12, len(scores))


def test_the_sum_takes_the_row_that_holds_the_word_too(index):
    several, added = Index.open(index), 0
    (asked,) = several.encode([{"prompt": PROMPT, "answer": "the sky is nice", "token": "sky"}])
    for opponents in (False, True):
        options = {"opponents": opponents, "checkpoint": "sum"}
        every = several.query(asked, **options, k=10, heatmaps=False).matches
        found = several.query(asked, **options, k=4, rescore=4)
        (held,) = [match for match in found.matches if match.response.startswith("sky")]
        assert held.score == pytest.approx(next(one.score for one in every if one.id == held.id), rel=1e-5)
        assert found.rescoring.for_words == (held.id not in {one.id for one in every[:4]})
        added += found.rescoring.for_words
    assert added >= 1


def test_each_checkpoint_is_searched_on_the_cluster_that_is_given(index):
    several = Index.open(index)
    several.ray = "a-cluster:6379"
    assert several.ray == several.checkpoint("tuned").ray == several.checkpoint("early").ray == "a-cluster:6379"


def test_words_of_a_match_push_the_answer_as_at_the_checkpoint_that_was_asked(index):
    several, asked = Index.open(index), {"prompt": PROMPT, "answer": ANSWER, "token": "Japan"}
    pushed, weights = {}, several.several.weights
    for name in several.names:
        (encoded,) = several.encode([asked], QueryOptions(checkpoint=name))
        match = several.query(encoded, k=1, checkpoint="sum").matches[0]
        own = several.checkpoint(name).encode([asked])[0]
        pushed[name] = several.influence_of([0, 1], match, encoded, level="sentence")
        assert pushed[name] == several.checkpoint(name).influence_of([0, 1], match, own, level="sentence")
    (encoded,) = several.encode([asked], QueryOptions(checkpoint="sum"))
    weighed = sum(weights[name] * np.array(pushed[name]) for name in weights)
    summed = several.sum.influence_of([0, 1], match, encoded, level="sentence")
    assert pushed["tuned"] != pushed["early"] and summed == pytest.approx(weighed, rel=1e-5)
    shares = sum(match.token_scores[at] for at in (0, 1))
    assert np.mean([summed[at] for at in encoded.info.selection]) == pytest.approx(shares, rel=1e-3, abs=1e-6)


def test_the_best_is_where_the_matches_stand_out_most(index):
    several, chosen = Index.open(index), QueryOptions(k=10, heatmaps=False)
    asked = [{"prompt": f"Tell me about {word}", "answer": f"{word} is very nice"} for word in tiny.WORDS[:4]]
    results = several.query(asked, options=chosen, checkpoint="best")
    for question, result in zip(asked, results, strict=True):
        distances = {}
        for name in several.names:
            one = several.query(question, options=chosen, checkpoint=name)
            distances[name] = np.mean([abs(one.summary.distance(match.score)) for match in one.matches])
        assert result.checkpoint == max(distances, key=distances.get)


def test_weights_are_the_learning_rates_of_the_steps_since_the_checkpoint_before(adapters, index, tmp_path):
    rates = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6))]  # before each of 8 steps
    early = sum(rates[:2]) / sum(rates)
    expected = {"tuned": 1 - early, "early": early}
    assert Index.open(index).info()["weights"] == pytest.approx(expected) and Index.open(index).info()["weighted"]
    folders = []
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": one, "learning_rate": 1e-4} for one in range(1, step + 1)] + [{"step": step, "train_loss": 1}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
        folders.append(str(folder))
    assert weights_of(folders) == ([0.5, 0.5], True)  # TracIn's: a constant rate, equal distances
    assert weights_of([folders[0], folders[0]]) == ([0.5, 0.5], False)
    assert weights_of([folders[0], str(tmp_path)]) == ([0.5, 0.5], False)


def test_what_cannot_be_several_is_refused_before_it_is_computed(data, llama_folders, adapters, tmp_path, tiny_folders):
    base, path = llama_folders[0], tmp_path / "index"
    asked = request(data, path, llama_folders, gradient=RECIPE)

    def refused(*folders, kind=UsageError, **changes):
        with pytest.raises(kind) as caught:
            build_checkpoints(asked, [ModelConfig(str(base), str(one)) for one in folders], **changes)
        return str(caught.value)

    twin = shutil.copytree(adapters[0], tmp_path / "twin")
    assert "are the same checkpoint" in refused(adapters[0], twin)
    assert "differ in base_model" in refused(adapters[0], tiny_folders["gpt2"][1])
    other = shutil.copytree(adapters[1], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    assert "and" in refused(adapters[0], other) and "on another" in refused(adapters[0], other)
    assert not path.exists()
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    assert "holds other files" in refused(*adapters, kind=StoreError)
    build(request(data, tmp_path / "one", llama_folders, gradient=RECIPE))
    asked = request(data, tmp_path / "one", llama_folders, gradient=RECIPE)
    assert "index of one checkpoint" in refused(*adapters, kind=StoreError)
    with pytest.raises(UsageError, match="holds one checkpoint"):
        Index.open(tmp_path / "one").query(PROMPT, answer=ANSWER, checkpoint="early")


def test_the_same_call_goes_on_and_another_list_is_refused(index, data, llama_folders, adapters, tmp_path):
    path = shutil.copytree(index, tmp_path / "index")
    levels = {"levels": ("sentence", "token"), "token": TokenConfig(512, "content,1")}
    asked = request(data, path, llama_folders, gradient=RECIPE, sketch=SketchConfig(K=1024), **levels)
    shutil.rmtree(path / "early")
    several = Index.open(path)
    assert several.query(PROMPT, **ASKED, checkpoint="tuned").matches
    with pytest.raises(StoreError, match="is gone.*--checkpoint: tuned"):
        several.query(PROMPT, **ASKED)
    with pytest.raises(UsageError, match="Choose one of: tuned, early, sum, best"):
        several.query(PROMPT, **ASKED, checkpoint="late")
    again = build_checkpoints(asked, configs(llama_folders, adapters))
    assert (again["tuned"].computed, again["early"].computed) == (0, 10)
    third = save_adapter(llama_folders[0], tmp_path / "third", 7)
    with pytest.raises(ConfigMismatch, match="early is not given"):
        build_checkpoints(asked, configs(llama_folders, (adapters[0], third)))
    more = build_checkpoints(asked, configs(llama_folders, (*adapters, third)))
    assert more["third"].computed == 10 and not Index.open(path).info()["weighted"]
    anew = build_checkpoints(asked, configs(llama_folders, adapters), overwrite=True)
    assert anew["tuned"].computed == 10


def test_an_index_of_another_training_among_them_is_noticed(index, data, tiny_folders, tmp_path):
    path = shutil.copytree(index, tmp_path / "index")
    shutil.rmtree(path / "early")
    build(request(data, path / "early", tiny_folders["gpt2"], gradient=RECIPE))
    with pytest.raises(ConfigMismatch, match="is not of the same training"):
        Index.open(path).query(PROMPT, **ASKED)
    (path / "checkpoints.json").write_text((path / "checkpoints.json").read_text().replace("early", "earl"))
    with pytest.raises(DamagedIndex, match="was changed"):
        Index.open(path)
    with pytest.raises(NotAnIndex, match="indexes of several checkpoints"):
        Store.open(path)


def test_examples_that_one_checkpoint_lacks_are_not_in_the_sum(index, tmp_path):
    from rapidindex import remove

    path = shutil.copytree(index, tmp_path / "index")
    gone = Index.open(path).query(PROMPT, **ASKED).matches[0].id
    remove(path / "early", ids=[gone])
    found = Index.open(path).query(PROMPT, **ASKED, checkpoint="sum", heatmaps=False)
    assert len(found.matches) == 9 and gone not in [match.id for match in found.matches]


def test_names_are_those_of_the_folders():
    def names(*places):
        return list(name_checkpoints([ModelConfig("m", place) for place in places]))

    assert names("/a/run", "/a/run/early") == ["run", "early"]
    assert names("/a/checkpoint-1", "/b/checkpoint-1") == ["a-checkpoint-1", "b-checkpoint-1"]
    assert names("/a/sum", "/a/b") == ["a-sum", "a-b"]
    assert names("/a/x", "/a/x") == ["a-x-1", "a-x-2"]


def test_the_command_line_builds_asks_adds_removes_and_checks_them_all(
    typed,  # noqa: F811
    data,
    llama_folders,
    adapters,
    tmp_path,
):
    path, more, base = tmp_path / "index", tmp_path / "more.jsonl", llama_folders[0]
    lines = data.read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:8]))
    more.write_text("\n".join(lines[8:]))
    made = ("build", tmp_path / "a.jsonl", "-m", base, "-a", adapters[0], "-a", adapters[1], "-o", path)
    assert typed(*made, "-m", base)[0] == 2
    assert json.loads(typed(*made, "--dry-run", "--json")[1]).keys() == {"tuned", "early"} and not path.exists()
    code, out, said = typed(*made, "-K", 1024, "--second-moment", "none", "--json")
    assert code == 0, said
    assert {name: one["examples"] for name, one in json.loads(out).items()} == {"tuned": 8, "early": 8}
    asked = ("query", path, PROMPT, "--answer", ANSWER, "-k", 2)
    code, out, said = typed(*asked)
    assert code == 0 and "All checkpoints have the same best 8." in said
    code, out, said = typed(*asked, "--checkpoint", "sum", "--html", tmp_path / "sum.html")
    assert code == 0 and "Checkpoint: sum." in said and (tmp_path / "sum.html").exists()
    assert json.loads(typed(*asked, "--checkpoint", "best", "--json")[1])["checkpoint"] in ("tuned", "early")
    code, out, _ = typed("add", path, more, "-q")
    assert code == 0 and len(indexes_at(path)) == 2
    assert out.count("next:") == 1 and f'next: rapidindex query {path} "PROMPT" --token WORD' in out
    assert all(len(Store.open(one).rows("sentence")) == 10 for one in indexes_at(path))
    assert typed("add", path, more, "-a", adapters[0])[0] == 2
    assert typed("remove", path, "--where", "number=3", "-q")[0] == 0
    assert all(len(Store.open(one).removed) == 1 for one in indexes_at(path))
    assert typed("index", path, "--factory", "Flat", "-q")[0] == 0
    info = " ".join(typed("info", path)[1].split())
    assert "by learning rates" in info and info.count("complete") == 2
    assert json.loads(typed("info", path, "--json")[1])["checkpoints"]["early"]["examples"] == 9
    assert typed("check", path)[0] == 0
    (path / "early" / "sentence" / "shard-00000.h5").unlink()
    code, out, _ = typed("check", path)
    assert code == 1 and "early/sentence" in out
    shutil.rmtree(path / "early")
    code, _, said = typed(*asked)
    assert code == 1 and "early is gone" in said
    assert checkpoints_at(path).weighted


def test_a_checkpoint_that_is_a_link_is_refused_and_what_it_leads_to_stays(index, tmp_path, typed):  # noqa: F811
    victim, path = shutil.copytree(index / "early", tmp_path / "victim"), shutil.copytree(index, tmp_path / "index")
    shard = victim / "sentence" / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    before = sorted(victim.rglob("*"))
    shutil.rmtree(path / "early")
    (path / "early").symlink_to(victim)
    for command in (("check", path, "--repair"), ("remove", path, "--where", "number=3"), ("query", path, PROMPT)):
        code, _, said = typed(*command)
        assert code == 1 and "early is a link" in said, said
    with pytest.raises(StoreError, match="is a link"):
        checkpoints_at(path)
    assert sorted(victim.rglob("*")) == before


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([], "checkpoints"),
        ([("../early", 1.0)], "name"),
        ([("tuned", 1.0), ("tuned", 1.0)], "a name twice"),
        ([("tuned", -1.0), ("early", 1.0)], "weight"),
    ],
)
def test_a_list_of_checkpoints_that_no_build_writes_is_written_anew_by_the_build(
    index, tmp_path, data, llama_folders, adapters, entries, fault
):
    path = shutil.copytree(index, tmp_path / "index")
    listed = [{"name": name, "weight": weight} for name, weight in entries]
    write_json(path / "checkpoints.json", {"checkpoints": listed, "weighted": True})
    with pytest.raises(DamagedIndex, match=fault) as caught:
        Index.open(path)
    assert "rapidindex build" in caught.value.hint
    asked = request(data, path, llama_folders, gradient=RECIPE, sketch=SketchConfig(K=1024))
    done = build_checkpoints(asked, configs(llama_folders, adapters))
    assert [one.computed for one in done.values()] == [0, 0]
    assert checkpoints_at(path) == replace(checkpoints_at(index), path=path)
