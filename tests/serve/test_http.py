"""The server without a browser: who gets in, what is refused, and that answers are those of the index."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest

from rapidindex import Index
from rapidindex.query.index import model_work
from rapidindex.serve.guard import LARGEST_BODY
from tests.serve.conftest import TOKEN, until

PROMPT, ANSWER = "Tell me about tea", "tea is from Japan"
QUESTION = {"prompt": PROMPT, "answer": ANSWER, "k": 4, "all": True}


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (200, {}),
        (401, {"x_rapidindex_token": None}),
        (401, {"x_rapidindex_token": TOKEN + "x"}),
        (401, {"x_rapidindex_token": None, "cookie": "rapidindex-1=" + TOKEN}),
        (421, {"host": "evil.example"}),
        (421, {"host": "evil.example:{port}"}),
        (421, {"host": "localhost"}),
        (421, {"host": "localhost:x"}),
        (403, {"origin": "http://evil.example"}),
        (403, {"origin": "null"}),
        (200, {"origin": "http://localhost:{port}"}),
    ],
)
def test_only_the_servers_own_page_with_its_token_gets_in(server, status, changes):
    changes = {name: value and value.format(port=server.port) for name, value in changes.items()}
    assert server.ask("GET", "/api/state", **changes)[0] == status
    assert server.ask("POST", "/api/words", QUESTION, **changes)[0] == status


def test_the_token_in_the_address_becomes_a_cookie_that_no_script_reads(server):
    status, headers, _ = server.ask("GET", f"/?token={TOKEN}", x_rapidindex_token=None)
    cookie = headers["set-cookie"]
    assert status == 200 and "HttpOnly" in cookie and "SameSite=strict" in cookie
    one = cookie.split(";")[0]
    assert server.ask("GET", "/static/page.js", x_rapidindex_token=None, cookie=one)[0] == 200
    assert server.ask("GET", f"/api/state?token={TOKEN}", x_rapidindex_token=None)[0] == 401
    assert server.ask("GET", "/static/%2e%2e%2fapp.py", cookie=one)[0] == 404


def test_every_response_is_under_a_strict_policy(server):
    for path in ("/?token=wrong", f"/?token={TOKEN}", "/static/page.css", "/api/state", "/nowhere"):
        headers = server.ask("GET", path)[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("status", "body", "changes"),
    [
        (413, b"x" * (LARGEST_BODY + 1), {}),
        (400, b"{}", {"content_length": "-1"}),
        (400, b"[1]", {}),
        (400, b"{", {}),
        (400, b"[" * 100_000, {}),
        (400, b"{}", {"content_type": "text/plain"}),
        (400, {"prompt": "x" * 30_000, "answer": "y"}, {}),
        (400, {"prompt": 3, "answer": "y"}, {}),
        (400, {"prompt": " ", "answer": "y"}, {}),
    ],
)
def test_what_is_no_question_is_refused_in_words(server, status, body, changes):
    assert server.ask("POST", "/api/words", body, **changes)[0] == status


@pytest.mark.parametrize(
    "changes", [{"k": 10**9}, {"k": True}, {"direction": "up"}, {"span": "7:900"}, {"level": "token"}, {"level": 3}]
)
def test_an_impossible_question_is_an_error_in_the_stream(server, changes):
    last = server.pieces("ask", QUESTION | changes)[-1]
    assert last["kind"] == "error" and "unexpected" not in last["message"], last


def test_the_answer_is_that_of_the_index_with_no_path_of_the_machine(server, served_index):
    status, _, text = server.ask("POST", "/api/ask", QUESTION | {"span": "0:1"})
    pieces = [json.loads(line) for line in text.splitlines()]
    truth = Index.open(served_index).query(PROMPT, answer=ANSWER, span="0:1", k=4, answer_scores=True, all=True)
    ranked = {piece["direction"]: piece for piece in pieces if piece["kind"] == "ranked"}
    assert [match["id"] for match in ranked["proponents"]["matches"]] == [match.id for match in truth.matches]
    assert ranked.keys() == {"proponents", "opponents"}
    heats = {piece["id"]: piece["heat"] for piece in pieces if piece.get("heat")}
    moved = {piece["id"]: piece["answer"] for piece in pieces if piece.get("answer")}
    for match in truth.matches:
        text = "".join("".join(one[:3]) if len(one) > 1 else one[0] for one in heats[match.id])
        assert text == match.response
        for _, _, _, positions, share, _ in heats[match.id][:-1]:
            assert share == pytest.approx(sum(match.token_scores[at] for at in positions), rel=1e-2, abs=1e-4)
        assert moved[match.id] == pytest.approx(match.answer_scores, rel=1e-2, abs=1e-3)
    everything = text + server.ask("GET", "/api/state")[2]
    key = pieces[0]["key"]
    for name in ("json", "report"):
        status, _, said = server.ask("POST", f"/api/{name}", {"key": key, "direction": "proponents"})
        assert status == 200
        everything += said
    assert str(served_index.parent) not in everything and "/base" not in everything


def test_matches_within_chance_get_heat_maps_when_they_are_asked_for(server):
    question = QUESTION | {"prompt": "Tell me about rice", "k": 6}
    folded, whole = (server.pieces("ask", question | {"all": every}) for every in (False, True))
    heats, every = ({p["id"]: p for p in pieces if p.get("heat")} for pieces in (folded, whole))
    (ranked,) = (p for p in folded if p["kind"] == "ranked" and p["direction"] == "proponents")
    assert set(heats) == {match["id"] for match in ranked["matches"] if match["beyond"]}
    assert set(every) == {match["id"] for match in ranked["matches"]} > set(heats)
    assert all(every[id]["heat"] == heats[id]["heat"] for id in heats)


def test_every_heat_map_says_which_of_how_many_it_is(server):
    scored = [piece for piece in server.pieces("ask", QUESTION) if piece["kind"] == "scored"]
    assert scored and [piece["done"] for piece in scored] == list(range(1, len(scored) + 1))
    assert {piece["total"] for piece in scored} == {len(scored)} and any("heat" in piece for piece in scored)


def test_a_word_of_a_match_has_its_own_effect_on_the_answer(server, served_index):
    posed, ranked = server.pieces("ask", QUESTION)[:2]
    name = ranked["matches"][0]["name"]
    *queued, last = server.pieces("word", {"key": posed["key"], "match": name, "tokens": [0, 1]})
    assert {piece["kind"] for piece in queued} == {"queued"}
    index = Index.open(served_index)
    (encoded,) = index.encode([{"prompt": PROMPT, "answer": ANSWER}])
    (result,) = index.query([encoded], k=1)
    truth = index.influence_of([0, 1], result.matches[0], encoded, level="sentence")
    assert last["kind"] == "pushed" and last["answer"] == pytest.approx(truth, rel=1e-3)
    for wrong in ({"key": "x"}, {"match": "x"}, {"tokens": [True]}, {"tokens": []}, {"tokens": [99]}, {"tokens": "0"}):
        refused = server.pieces("word", {"key": posed["key"], "match": name, "tokens": [0]} | wrong)[-1]
        assert refused["kind"] == "error" and "unexpected" not in refused["message"], wrong


def test_a_word_that_nobody_waits_for_leaves_the_queue(server):
    posed, ranked = server.pieces("ask", QUESTION | {"prompt": "Tell me about rivers"})[:2]
    body = json.dumps({"key": posed["key"], "match": ranked["matches"][0]["name"], "tokens": [0]})
    headers = {"x-rapidindex-token": TOKEN, "content-type": "application/json", "host": f"localhost:{server.port}"}
    computed = server.desk._posed[posed["key"]].encoded.known
    with model_work:  # as a heat-map holds it
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/api/word", body, headers)
        answer = connection.getresponse()
        assert [json.loads(answer.readline())["kind"] for _ in range(3)] == ["queued"] * 3
        connection.close()
        answer.close()
        until(lambda: server.guard.streams == 0)
    assert server.ask("POST", "/api/words", QUESTION)[0] == 200
    assert not any(what.startswith("tokens") for what, *_ in computed)


def test_the_models_answer_comes_token_by_token_and_by_seed(server):
    def said(**asked):
        pieces = server.pieces("answer", {"prompt": PROMPT} | asked)
        texts = [piece["text"] for piece in pieces if piece["kind"] == "text"]
        assert len(texts) > 1
        return next(piece["text"] for piece in pieces if piece["kind"] == "answered")

    assert said() == said() == server.desk.index.answer(PROMPT, max_new_tokens=256)
    assert said(seed=1) == said(seed=1) != said(seed=2)


def test_no_request_starts_a_thread(server):  # where memory is short, `Thread.start` may wait for ever
    before = set(threading.enumerate())
    key = server.pieces("ask", QUESTION)[0]["key"]
    assert server.pieces("answer", {"prompt": PROMPT})[-1]["kind"] == "words"
    for name in ("words", "json", "reload"):
        assert server.ask("POST", f"/api/{name}", QUESTION | {"key": key, "direction": "proponents"})[0] == 200
    assert set(threading.enumerate()) == before


def test_an_answer_that_nobody_reads_on_is_cancelled(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps(QUESTION | {"prompt": "Tell me about cats", "k": 13})
    headers = {"x-rapidindex-token": TOKEN, "content-type": "application/json", "host": f"localhost:{server.port}"}
    connection.request("POST", "/api/ask", body, headers)
    connection.getresponse().readline()
    connection.close()
    until(lambda: server.ask("POST", "/api/words", QUESTION)[0] == 200)
    assert not any("cats" in result.query.prompt for result in server.desk._results.values())


def test_ctrl_c_ends_it_within_two_seconds(served_index):
    command = [sys.executable, "-m", "rapidindex", "serve", str(served_index), "--port", "8971"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert "/?token=" in child.stderr.readline()
        time.sleep(1)
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
    assert time.monotonic() - started < 10  # 2 s on a machine of its own
    assert child.returncode == 130 and "Traceback" not in said


def test_another_host_needs_a_token(served_index):
    command = [sys.executable, "-m", "rapidindex", "serve", str(served_index), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--token" in done.stderr
