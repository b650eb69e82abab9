"""The page's server over an index of two checkpoints: each is asked with its own model, or their sum is."""

import json
import shutil

import pytest

from rapidindex import Index, remove
from rapidindex.config import VerifyOptions
from rapidindex.evaluate.verify import verify
from rapidindex.views import trials
from tests.serve.conftest import Server

PROMPT, ANSWER = "Tell me about tea", "tea is from Japan"
QUESTION = {"prompt": PROMPT, "answer": ANSWER, "span": "0:1", "k": 4, "all": True}
ALONE = {name: QUESTION[name] for name in ("answer", "span", "k", "all")}


@pytest.fixture(scope="module")
def served(two_checkpoints):
    started = Server(two_checkpoints)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def several(two_checkpoints):
    return Index.open(two_checkpoints)


def state(served):
    return json.loads(served.ask("GET", "/api/state")[2])


def test_a_checkpoints_model_is_loaded_by_the_first_question_that_needs_it(two_checkpoints):
    server = Server(two_checkpoints)
    assert state(server)["checkpoints"] == ["tuned", "early"] and state(server)["loaded"]

    def loaded():
        return {name for name, index in server.desk.index.opened.items() if index.is_loaded}

    first = server.pieces("ask", QUESTION)
    assert first[0]["kind"] == "posed" and first[0]["checkpoint"] == "tuned" and loaded() == {"tuned"}
    waited, posed, *_ = server.pieces("ask", QUESTION | {"checkpoint": "early"})
    assert waited == {"kind": "loading", "checkpoints": ["early"]} and posed["checkpoint"] == "early"
    assert server.pieces("ask", QUESTION | {"checkpoint": "sum"})[0]["kind"] == "posed"
    assert loaded() == {"tuned", "early"}
    server.stop()


@pytest.mark.parametrize("name", ["tuned", "early", "sum", "best"])
def test_a_question_is_answered_at_its_checkpoint(served, several, name):
    truth = several.query(PROMPT, **ALONE, checkpoint=name, answer_scores=True)
    pieces = served.pieces("ask", QUESTION | {"checkpoint": name})
    first, ranked = (piece for piece in pieces if piece["kind"] == "ranked" and piece["direction"] == "proponents")
    assert first["checkpoint"] == ranked["checkpoint"] == truth.checkpoint
    assert not first["final"] and ranked["final"] and "the strongest word's" in ranked["standing"]
    again = [piece["id"] for piece in pieces[pieces.index(ranked) + 1 :] if piece["kind"] == "scored"]
    assert again == [match["id"] for match in ranked["matches"]]
    assert [match["id"] for match in ranked["matches"]] == [match.id for match in truth.matches]
    heats = {piece["id"]: piece["heat"] for piece in pieces if piece.get("heat")}
    moved = {piece["id"]: piece["answer"] for piece in pieces if piece.get("answer")}
    for match in truth.matches:
        for _, _, _, positions, share, _ in heats[match.id][:-1]:
            assert share == pytest.approx(sum(match.token_scores[at] for at in positions), rel=1e-2, abs=1e-4)
        assert moved[match.id] == pytest.approx(match.answer_scores, rel=1e-2, abs=1e-3)
    key = next(piece["key"] for piece in pieces if piece["kind"] == "posed")
    result = json.loads(served.ask("POST", "/api/json", {"key": key, "direction": "proponents"})[2])
    assert result["checkpoint"] == truth.checkpoint


def test_the_checkpoints_find_different_matches(several):
    found = {name: [m.id for m in several.query(PROMPT, **ALONE, checkpoint=name).matches] for name in several.names}
    assert found["tuned"] != found["early"]  # else no other test here tells one from the other


def test_a_training_word_acts_at_the_questions_checkpoint(served, several):
    pushed, weights = {}, several.several.weights
    for name in ("tuned", "early", "sum"):
        pieces = served.pieces("ask", QUESTION | {"k": 13, "checkpoint": name})
        key = next(piece["key"] for piece in pieces if piece["kind"] == "posed")
        match = sorted(one["name"] for piece in pieces if piece["kind"] == "ranked" for one in piece["matches"])[0]
        *_, last = served.pieces("word", {"key": key, "match": match, "tokens": [0, 1]})
        pushed[name] = last["answer"]
        if name != "sum":
            index = several.checkpoint(name)
            (encoded,) = index.encode([{"prompt": PROMPT, "answer": ANSWER, "span": "0:1"}])
            (one,) = (one for one in index.query(encoded, k=13).matches if one.id == match)
            truth = index.influence_of([0, 1], one, encoded, level="sentence")
            assert pushed[name] == pytest.approx(truth, rel=1e-3, abs=1e-6)
    weighed = [sum(weights[name] * pushed[name][at] for name in weights) for at in range(len(pushed["sum"]))]
    assert pushed["sum"] == pytest.approx(weighed, rel=1e-3, abs=1e-6) and pushed["tuned"] != pushed["early"]


def test_each_checkpoint_gives_its_own_answer(served, two_checkpoints):
    said = {}
    for name in ("tuned", "early"):
        pieces = served.pieces("answer", {"prompt": PROMPT, "checkpoint": name})
        (answered,) = (piece for piece in pieces if piece["kind"] == "answered")
        said[name] = answered["text"]
        assert answered["checkpoint"] == name
        assert said[name] == Index.open(two_checkpoints / name).answer(PROMPT, max_new_tokens=256)
    assert said["tuned"] != said["early"]
    (first,) = (p for p in served.pieces("answer", {"prompt": PROMPT, "checkpoint": "sum"}) if p["kind"] == "answered")
    assert (first["text"], first["checkpoint"]) == (said["tuned"], "tuned")


def test_verify_takes_its_steps_at_the_questions_checkpoint(served, several):
    (posed,) = (p for p in served.pieces("ask", QUESTION | {"checkpoint": "early"}) if p["kind"] == "posed")
    status, _, said = served.ask("POST", "/api/verify", {"key": posed["key"]})
    question = {"prompt": PROMPT, "answer": ANSWER, "span": "0:1"}
    verdicts = [
        trials.verdict(verify(several.checkpoint(name), question, VerifyOptions(top=5, draws=10)))
        for name in ("early", "tuned")
    ]
    assert status == 200 and json.loads(said)["verdict"] == f"At the checkpoint early: {verdicts[0]}"
    assert verdicts[0] != verdicts[1]
    alone = Index.open(several.several.path)  # the command line asks the first, and loads no other
    assert trials.verdict(verify(alone, question, VerifyOptions(top=5, draws=10))) == verdicts[1]
    assert "early" not in alone.opened
    (posed,) = (p for p in served.pieces("ask", QUESTION | {"checkpoint": "sum"}) if p["kind"] == "posed")
    status, _, said = served.ask("POST", "/api/verify", {"key": posed["key"]})
    assert status == 400 and "one checkpoint, not from their sum" in said


def test_a_change_of_one_checkpoint_is_noticed_and_reloaded_with_the_models_at_hand(two_checkpoints, tmp_path):
    path = shutil.copytree(two_checkpoints, tmp_path / "index")
    server = Server(path)
    asked = QUESTION | {"checkpoint": "early"}
    before, _ = (p for p in server.pieces("ask", asked) if p["kind"] == "ranked" and p["direction"] == "proponents")
    models = {name: index.loaded.model for name, index in server.desk.index.opened.items()}
    assert not state(server)["changed"]
    remove(path / "early", ids=[before["matches"][0]["id"]])
    assert state(server)["changed"]
    assert server.ask("POST", "/api/reload", {})[0] == 200 and not state(server)["changed"]
    assert {name: index.loaded.model for name, index in server.desk.index.opened.items()} == models
    pieces = server.pieces("ask", asked)
    after, _ = (p for p in pieces if p["kind"] == "ranked" and p["direction"] == "proponents")
    assert pieces[0]["kind"] == "posed"
    ids = [[match["id"] for match in one["matches"]] for one in (before, after)]
    assert ids[0][1:] == ids[1][:3] and ids[0][0] not in ids[1]
    (path / "checkpoints.json").unlink()
    assert state(server)["changed"]
    server.stop()


@pytest.mark.parametrize("name", ["late", 3, ["early"], ""])
def test_a_checkpoint_that_there_is_not_is_refused_in_words(served, server, name):
    for one, asked in ((served, name), (server, "early"), (server, name)):
        last = one.pieces("ask", QUESTION | {"checkpoint": asked})[-1]
        assert last["kind"] == "error" and "no such checkpoint" in last["message"]


def test_no_path_of_the_machine_is_in_an_answer(served, two_checkpoints, tmp_path):
    path = shutil.copytree(two_checkpoints, tmp_path / "index")
    server = Server(path)
    shutil.rmtree(path / "early")
    last = server.pieces("ask", QUESTION | {"checkpoint": "early"})[-1]
    assert last["kind"] == "error" and "early is gone" in last["message"] and str(tmp_path) not in json.dumps(last)
    assert server.pieces("ask", QUESTION)[-1]["kind"] == "done"  # at the first, which is there
    server.stop()
