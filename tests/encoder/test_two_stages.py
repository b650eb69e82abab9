"""An index of embeddings: built, changed, asked, and its candidates ordered by true gradients."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from rapidindex import Index, add, remove
from rapidindex.caching.build import build
from rapidindex.caching.estimate import estimate
from rapidindex.config import BuildConfig, BuildRequest, EncoderConfig
from rapidindex.data.examples import read_examples
from rapidindex.encoder.embed import Encoder
from rapidindex.errors import ConfigMismatch, ModelError, QueryError, UsageError
from rapidindex.query import holders
from rapidindex.results import Result
from rapidindex.search.check import check
from rapidindex.serve.desk import Desk
from rapidindex.store import Store
from tests.cli.conftest import typed  # noqa: F401
from tests.oracles import all_rows

PROMPT, ANSWER = "Say tea yoga sun", "tea yoga sun is nice"


@pytest.fixture
def copy(embedded, tmp_path):
    return shutil.copytree(embedded, tmp_path / "copy")


@pytest.fixture(scope="module")
def encoder(distilled):
    return Encoder.load(EncoderConfig(distilled.output, "cpu"))


def test_rows_are_the_embeddings_of_the_examples(embedded, many, encoder):
    examples, stored = read_examples(many).examples, all_rows(embedded)
    rows = encoder.embed([encoder.encode(example) for example in examples])
    assert set(stored) == {example.id for example in examples}
    for example, row in zip(examples, rows, strict=True):
        np.testing.assert_allclose(stored[example.id], row, atol=0.005)
    level = Store.open(embedded).rows("sentence")
    assert level.K == encoder.width and level.row_bytes <= 1600


def test_two_workers_a_resumed_build_and_a_check(embedded, many, distilled, tmp_path):
    request = BuildRequest(
        str(many), tmp_path / "two", EncoderConfig(distilled.output, "cpu"), work=BuildConfig(256, 2)
    )
    assert estimate(request).examples == 120
    summary = build(request)
    assert (summary.computed, summary.layers, summary.truncated) == (120, 0, [])
    ours, theirs = all_rows(tmp_path / "two"), all_rows(embedded)
    assert all(np.allclose(ours[id], theirs[id], atol=0.005) for id in theirs)
    shard = next((tmp_path / "two" / "sentence").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert check(tmp_path / "two", repair=True)
    assert 0 < build(request).computed <= 120 and check(tmp_path / "two") == []


def test_examples_are_added_and_removed(copy, many, data):
    assert add(copy, str(data), device="cpu").examples == 130
    id = read_examples(many).examples[0].id
    assert remove(copy, ids=[id]).examples == 129
    assert id not in {match.id for match in Index.open(copy).query(PROMPT, answer=ANSWER, k=129).matches}


def test_the_first_stage_ranks_by_embeddings_and_loads_no_model(embedded, many, encoder, monkeypatch):
    monkeypatch.setattr("rapidindex.query.index.load", lambda config: pytest.fail("a model was loaded"))
    result = Index.open(embedded, device="cpu").query(PROMPT, answer=ANSWER, k=7)
    examples = read_examples(many).examples
    rows = encoder.embed([encoder.encode(example) for example in examples])
    asked = encoder.embed([encoder.encode_text(PROMPT, ANSWER)])[0]
    scores = {example.id: score for example, score in zip(examples, rows @ asked, strict=True)}
    assert [match.score for match in result.matches] == pytest.approx(sorted(scores.values())[:-8:-1], abs=0.01)
    assert all(match.exact_score is None for match in result.matches)
    assert result.index.encoder == encoder.path
    assert Result.from_json(result.to_json()) == result


def test_on_the_command_line_the_first_stage_lists_matches_once(embedded, typed):  # noqa: F811
    code, out, said = typed("query", embedded, PROMPT, "--answer", ANSWER, "-k", 1, "--all")
    assert code == 0 and "percentile" not in out and "influence" not in out, said
    assert out.count(Index.open(embedded, device="cpu").query(PROMPT, answer=ANSWER, k=1).matches[0].id) == 1


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("token", [None, "yoga"])
def test_with_all_examples_as_candidates_the_order_is_that_of_the_gradients(
    copy, gradient_index, token, opponents, monkeypatch
):
    monkeypatch.setattr(holders, "MOST_HOLDERS", 0)  # candidates for their words are not among the encoder's
    options = {"answer": ANSWER, "token": token, "k": 5, "opponents": opponents}
    ours = Index.open(copy, device="cpu").query(PROMPT, rescore=120, **options)
    theirs = Index.open(gradient_index, device="cpu").query(PROMPT, rescore=20, exact=True, **options)
    assert [match.id for match in ours.matches] == [match.id for match in theirs.matches]
    for mine, true in zip(ours.matches, theirs.matches, strict=True):
        assert mine.exact_score == pytest.approx(true.exact_score, rel=1e-3, abs=1e-5)
        assert mine.token_scores == pytest.approx(true.token_scores, rel=1e-3, abs=1e-4)
    assert ours.rescoring.candidates == 120 and ours.query == theirs.query


def test_gradients_of_candidates_are_computed_once(copy):
    index = Index.open(copy, device="cpu")
    heard = []
    index.progress = lambda stage, done, total, note="": heard.append(total)
    first = index.query(PROMPT, answer=ANSWER, rescore=20, k=3)
    computed = len(heard)
    again = Index.open(copy, device="cpu")
    again.progress = index.progress
    second = again.query(PROMPT, answer=ANSWER, rescore=20, k=3)
    assert computed and len(heard) == computed
    assert [match.exact_score for match in first.matches] == [match.exact_score for match in second.matches]
    assert len(Store.open(copy / "gradients").rows("sentence")) == 20
    assert check(copy) == []


def test_the_models_own_answer_is_embedded_where_none_is_given(copy):
    index = Index.open(copy, device="cpu")
    result = index.query(PROMPT, rescore=10, k=2, max_new_tokens=5)
    assert result.query.answer == index.gradients.answer(PROMPT, max_new_tokens=5)
    assert len(result.matches) == 2 and result.matches[0].token_scores


def test_what_the_first_stage_cannot_answer_is_refused(embedded):
    index = Index.open(embedded, device="cpu")
    with pytest.raises(QueryError, match="reads the answer, too"):
        index.query(PROMPT)
    with pytest.raises(QueryError, match="reads whole answers, not words"):
        index.query(PROMPT, answer=ANSWER, token="tea")
    with pytest.raises(QueryError, match="knows no tokens"):
        index.query(PROMPT, answer=ANSWER, answer_scores=True)
    with pytest.raises(QueryError, match="encoded without its gradient"):
        index.query(index.encode([{"prompt": PROMPT, "answer": ANSWER}])[0], rescore=True)


def test_an_encoder_or_a_model_that_does_not_match_is_refused(
    copy, many, distilled, plain_encoder, tiny_folders, tmp_path
):
    request = BuildRequest(str(many), copy, EncoderConfig(distilled.output, "cpu"))
    with pytest.raises(ModelError, match="was not distilled from an index"):
        build(replace(request, model=EncoderConfig(str(plain_encoder), "cpu")))
    with pytest.raises(UsageError, match="embeds whole examples"):
        replace(request, levels=("token",))
    other = shutil.copytree(distilled.output, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5}))
    with pytest.raises(ConfigMismatch, match="encoder.fingerprint"):
        build(replace(request, model=EncoderConfig(str(other), "cpu")))
    with pytest.raises(ConfigMismatch, match="encoder.fingerprint"):
        add(copy, str(many), encoder=str(other), device="cpu")
    with pytest.raises(ConfigMismatch, match="is not the one"):
        Index.open(copy, encoder=other, device="cpu").query(PROMPT, answer=ANSWER)
    gpt2 = str(tiny_folders["gpt2"][0])
    with pytest.raises(ConfigMismatch, match="The model at"):
        Index.open(copy, model=gpt2, adapter=str(tiny_folders["gpt2"][1])).query(PROMPT, answer=ANSWER, rescore=5)


def test_a_response_that_the_tokenizer_drops_is_listed(distilled, tmp_path):
    rows = '{"instruction": "tea", "output": "rice"}\n{"instruction": "sun", "output": "\\u200b"}\n'
    (tmp_path / "odd.jsonl").write_text(rows)
    summary = build(BuildRequest(str(tmp_path / "odd.jsonl"), tmp_path / "odd", EncoderConfig(distilled.output, "cpu")))
    assert (summary.examples, summary.skipped) == (1, 1)
    assert "leaves nothing of its response" in Store.open(tmp_path / "odd").skipped[0]["reason"]
    Store.destroy(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_the_page_refuses_an_index_of_embeddings_before_it_listens(embedded):
    with pytest.raises(UsageError, match="embeddings.*rapidindex query"):
        Desk(lambda: Index.open(embedded))
