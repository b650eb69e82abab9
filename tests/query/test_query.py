import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex import Index
from rapidindex.caching.build import build
from rapidindex.config import GradientConfig, ModelConfig, QueryOptions
from rapidindex.errors import ConfigMismatch, DataError, ModelError, NotAnIndex, QueryError, TokenNotFound
from rapidindex.gradients.second_moment import correction
from rapidindex.model.model import load
from rapidindex.query.questions import Query
from rapidindex.results import Result
from tests import tiny
from tests.oracles import ANSWER, PROMPT, RECIPES, all_rows, autograd, request


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES.keys())
def index(request_of, request):
    return request_of(request.param)


@pytest.fixture(scope="module")
def request_of(data, tmp_path_factory, llama_folders):
    def make(recipe):
        path = tmp_path_factory.mktemp("index") / "index"
        build(request(data, path, llama_folders, gradient=recipe))
        return Index.open(path)

    return make


def brute_force(index, positions):
    """Eq. 5 (all positions) or Eq. 7 (some), from an autograd gradient and the stored RapidGrads."""
    store, loaded, template = index.store, index.loaded, index.template
    text = template.render_prompt((("user", PROMPT),)) + ANSWER
    encoded = loaded.tokenizer(text, return_offsets_mapping=True)
    first = len(text) - len(ANSWER)
    response = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > first]
    weights = np.zeros(len(encoded["input_ids"]), np.float32)
    chosen = response if positions is None else [response[p] for p in positions]
    weights[chosen] = 1 / len(chosen)
    parts = [p.flatten() for p in autograd(loaded.model, np.array(encoded["input_ids"]), weights)[1]]
    options = store.config["gradient"]
    if options["normalize"] == "layer":
        parts = [p / p.norm() for p in parts]
    flat = torch.cat(parts)
    if options["second_moment"] != "none":
        flat = flat * correction(torch.tensor(np.array(store.second_moment())))
    if options["normalize"] == "unit":
        flat = flat / flat.norm()
    vector = index.compressor_of("sentence").sketch.compress(flat[None])[0].numpy()
    return {id: float(row @ vector) for id, row in all_rows(store.path).items()}


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("token", [None, "Japan", "Japan#2"])
def test_the_order_is_that_of_a_brute_force_computation(index, token, opponents):
    result = index.query(PROMPT, answer=ANSWER, token=token, k=10, opponents=opponents, rescore=False)
    truth = brute_force(index, result.query.selection if token else None)
    expected = sorted(truth, key=truth.get, reverse=not opponents)
    assert [match.id for match in result.matches] == expected
    scale = max(map(abs, truth.values()))
    for match in result.matches:
        assert match.score == pytest.approx(truth[match.id], abs=1e-4 * scale)


def test_shares_average_to_an_influence_near_the_compressed_one(index):
    result = index.query(PROMPT, answer=ANSWER, token="Japan", k=10, all=True)
    spread = max(abs(match.exact_score) for match in result.matches)
    for match in result.matches:
        assert len(match.token_scores) == len(match.tokens)
        assert match.exact_score == pytest.approx(np.mean(match.token_scores), abs=1e-6 * spread)
        assert match.score == pytest.approx(match.exact_score, abs=0.35 * spread)  # K is 1,024 here
    assert index.query(PROMPT, answer=ANSWER, k=3, heatmaps=False).matches[0].token_scores == []


def test_the_influences_of_a_matchs_words_on_the_answer_are_parts_of_its_own(index):
    (encoded,) = index.encode([Query(PROMPT, ANSWER, "Japan")])
    (result,) = index.query([encoded], k=3, all=True, answer_scores=True)
    for match in result.matches:
        each = np.array([index.influence_of([at], match, encoded, level="sentence") for at in range(len(match.tokens))])
        spread = np.abs(each).max()
        assert np.allclose(each.mean(0), match.answer_scores, atol=1e-3 * spread)
        assert np.allclose(each[:, result.query.selection].mean(1), match.token_scores, atol=1e-3 * spread)
        assert np.allclose(index.influence_of([0, 1], match, encoded, level="sentence"), each[:2].sum(0), rtol=1e-4)


def test_the_influence_of_a_word_on_a_word_is_the_product_of_their_gradients(index):
    (encoded,) = index.encode([Query(PROMPT, ANSWER, "Japan")])
    match, rows = index.query([encoded], k=1)[0].matches[0], index.rows_of("sentence")
    encoding = index.template.encode_stored(rows.record(rows.ids.index(match.id)))[1]
    moment = index.store.config["gradient"]["second_moment"] != "none"
    factor = correction(torch.tensor(np.array(index.store.second_moment()))) if moment else 1.0

    def corrected(text, positions):
        weights = np.zeros(len(text.input_ids), np.float32)
        weights[np.flatnonzero(text.response_mask)[positions]] = 1 / len(positions)
        return factor * torch.cat([part.flatten() for part in autograd(index.loaded.model, text.input_ids, weights)[1]])

    def lengths(gradient):
        sizes = [layer["size"] for layer in index.store.layers]
        kinds = {"none": lambda: 1.0, "unit": gradient.norm}
        kinds["layer"] = lambda: torch.cat([part.norm().expand(len(part)) for part in gradient.split(sizes)])
        return kinds[index.store.config["gradient"]["normalize"]]()

    whole, asked = (
        corrected(encoding, list(range(len(match.tokens)))),
        corrected(encoded.encoding, encoded.info.selection),
    )
    word = corrected(encoding, [1]) / lengths(whole)
    truth = [
        float(word @ (corrected(encoded.encoding, [at]) / lengths(asked))) for at in range(len(encoded.info.tokens))
    ]
    assert index.influence_of([1], match, encoded, level="sentence") == pytest.approx(truth, rel=1e-2, abs=1e-3)


def test_a_word_that_a_match_does_not_have_is_refused(index):
    (encoded,) = index.encode([Query(PROMPT, ANSWER, "Japan")])
    (match,) = index.query([encoded], k=1)[0].matches
    for tokens, one in [([], match), ([-1], match), ([10_000], match), ([0], replace(match, id="0" * 16))]:
        with pytest.raises(QueryError, match="no tokens"):
            index.influence_of(tokens, one, encoded, level="sentence")


def test_rescoring_orders_by_the_uncompressed_influence(index):
    plain = index.query(PROMPT, answer=ANSWER, k=10, all=True)
    result = index.query(PROMPT, answer=ANSWER, k=3, rescore=True)
    truth = sorted(plain.matches, key=lambda match: match.exact_score, reverse=True)
    assert [match.id for match in result.matches] == [match.id for match in truth[:3]]
    assert [match.rank for match in result.matches] == [1, 2, 3]
    assert result.rescoring.candidates == 10 and result.rescoring.rank_correlation > 0.5


@pytest.mark.parametrize("opponents", [False, True])
def test_rescoring_for_a_word_orders_by_the_strongest_token(index, opponents):
    options = {"answer": ANSWER, "token": "Japan", "opponents": opponents}
    strongest = min if opponents else max
    plain = index.query(PROMPT, **options, k=10, all=True, rescore=False)
    result = index.query(PROMPT, **options, k=4)
    truth = sorted(plain.matches, key=lambda match: strongest(match.token_scores), reverse=not opponents)
    assert [match.id for match in result.matches] == [match.id for match in truth[:4]]
    assert result.rescoring.by_token and result.rescoring.candidates == 10
    assert not any(result.stands_out(match) is False for match in result.matches)  # no view folds them
    assert any(plain.stands_out(match) is False for match in plain.matches)
    by_mean = sorted(plain.matches, key=lambda match: match.exact_score, reverse=not opponents)
    assert [match.id for match in truth] != [match.id for match in by_mean]
    assert not index.query(PROMPT, answer=ANSWER, k=4, rescore=True).rescoring.by_token
    assert index.query(PROMPT, **options, k=4, heatmaps=False).rescoring is None
    assert index.query(PROMPT, answer=ANSWER, k=4).rescoring is None


def test_the_steps_of_an_answer_add_up_to_its_result(index):
    options = QueryOptions(k=4, answer_scores=True, all=True, rescore=False)
    asked = [Query(PROMPT, ANSWER, "Japan"), Query("Tell me about cats", "cats purr")]
    events = list(index.ask(asked, options))
    order = [(type(event).__name__, event.number) for event in events]
    each = [["Ranked", *["Scored"] * 8, "Answered"]] * 2
    assert order == [("Posed", 0), ("Posed", 1), *((name, n) for n, names in enumerate(each) for name in names)]
    for number, result in enumerate(index.query(asked, options=options)):
        mine = [event for event in events if event.number == number]
        ranked, done = mine[1].result, mine[-1].result
        assert [m.id for m in ranked.matches] == [m.id for m in done.matches] == [m.id for m in result.matches]
        assert not any(match.token_scores for match in ranked.matches)
        assert done.matches == result.matches == [event.match for event in mine[-5:-1]]
        assert [event.match.exact_score for event in mine[2:6]] == [m.exact_score for m in result.matches]
        assert [(event.done, event.total) for event in mine[2:-1]] == [(i, 8) for i in range(1, 9)]


def test_matches_within_chance_have_no_heat_map_unless_all_are_asked_for(index):
    asked = {"answer": ANSWER, "token": "Japan", "k": 10, "answer_scores": True, "rescore": False}
    result, whole = (index.query(PROMPT, **asked, all=every) for every in (False, True))
    within = [match for match in result.matches if result.stands_out(match) is False]
    assert len(within) > 5 and all(match.token_scores and match.answer_scores for match in whole.matches)
    for one, other in zip(result.matches, whole.matches, strict=True):
        bare = replace(other, exact_score=None, token_scores=[], answer_scores=[])
        assert one == (bare if one in within else other)


def test_the_same_question_takes_no_heat_map_twice(index, monkeypatch):
    encoded = index.encode([Query(PROMPT, ANSWER, "Japan")])
    options = QueryOptions(k=4, answer_scores=True, all=True)
    first = index.query(encoded, options=options)
    monkeypatch.setattr("rapidindex.query.influence.shares", None)
    assert index.query(encoded, options=options)[0].matches == first[0].matches
    with pytest.raises(TypeError):
        index.query(encoded, options=options, opponents=True)


def test_a_question_that_nobody_reads_on_leaves_the_model_to_others(index):
    events = index.ask([Query(PROMPT, ANSWER, "Japan")], QueryOptions(k=4, all=True))
    assert [type(next(events)).__name__ for _ in range(3)] == ["Posed", "Ranked", "Scored"]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(index.query, PROMPT, answer=ANSWER, k=2).result(timeout=60).matches
    events.close()


def test_a_match_carries_what_the_data_said(index):
    match = index.query(PROMPT, answer=ANSWER, k=1).matches[0]
    assert match.prompt.startswith("Tell me about ")
    assert match.meta.keys() == {"number"}
    assert all(match.response[t.start : t.end] == t.text for t in match.tokens[:-1])
    assert match.rank == 1 and match.percentile == pytest.approx(90)


def test_more_matches_than_examples_are_all_examples(index):
    for k in (50, 2**32, 10**30):
        assert len(index.query(PROMPT, answer=ANSWER, k=k, heatmaps=False).matches) == 10


def test_many_queries_are_answered_as_one_by_one(index):
    queries = [Query(PROMPT, ANSWER, "Japan"), Query("Tell me about cats", "cats purr")]
    together = index.query(queries, k=5)
    for query, result in zip(queries, together, strict=True):
        alone = index.query(query.prompt, answer=query.answer, token=query.token, k=5)
        assert [m.id for m in alone.matches] == [m.id for m in result.matches]


def test_one_encoding_serves_both_directions(index):
    encoded = index.encode([{"prompt": PROMPT, "answer": ANSWER, "token": "Japan"}])
    for opponents in (False, True):
        alone = index.query(PROMPT, answer=ANSWER, token="Japan", k=3, opponents=opponents)
        assert [m.id for m in index.query(encoded[0], k=3, opponents=opponents).matches] == [
            m.id for m in alone.matches
        ]
    assert index.query([], k=3) == []


def test_several_threads_get_the_answers_of_one(index):
    asked = [(token, opponents) for token in (None, "Japan", "Japan#2", "rice") for opponents in (False, True)] * 3
    shared = [index, Index(index.store, index._model, index.loaded)]  # two indexes may share a model

    def matches(of, token, opponents):
        found = of.query(
            PROMPT, answer=ANSWER, token=token, opponents=opponents, k=4, answer_scores=True, all=True
        ).matches
        numbers = [(m.score, m.exact_score, *m.token_scores, *m.answer_scores) for m in found]
        return [m.id for m in found], np.concatenate(numbers)

    alone = [matches(index, *one) for one in asked]
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(matches, shared[i % 2], *one) for i, one in enumerate(asked)]
    for (ids, numbers), future in zip(alone, futures, strict=True):
        assert future.result()[0] == ids
        # at another address torch's products may end in other bits; another query's numbers would be far off
        np.testing.assert_allclose(future.result()[1], numbers, rtol=1e-5, atol=1e-6)


def test_an_index_has_a_length_and_a_short_repr(index):
    assert len(index) == 10 and len(repr(index)) < 400 and "10 examples" in repr(index)
    with pytest.raises(TypeError):
        index.query(PROMPT, answer=ANSWER, opponent=True)


def test_a_conversation_is_asked_about_like_its_text_where_the_template_is_plain_text(index):
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    alone = index.query(PROMPT, answer=ANSWER, k=3)
    assert [m.score for m in index.query(turns, k=3).matches] == [m.score for m in alone.matches]


def test_the_model_answers_where_no_answer_is_given(index):
    result = index.query(PROMPT, k=1, max_new_tokens=8)
    assert result.query.answer == index.answer(PROMPT, max_new_tokens=8)
    assert {i for t in result.query.tokens for i in range(t.start, t.end)} == set(range(len(result.query.answer)))


def test_a_result_survives_json(index):
    result = index.query(PROMPT, answer=ANSWER, token="Japan", k=3)
    assert Result.from_json(result.to_json()) == result
    value = json.loads(result.to_json())
    assert value["schema"] == "rapidindex.result/1"
    assert value["summary"]["n"] == 10 and sum(value["summary"]["histogram"]) == 10


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/9"}'])
def test_what_is_no_result_is_refused(text):
    with pytest.raises(DataError):
        Result.from_json(text)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"prompt": " "}, QueryError),
        ({"prompt": PROMPT, "answer": ""}, QueryError),
        ({"prompt": PROMPT, "answer": ANSWER, "token": "India"}, TokenNotFound),
        ({"prompt": "word " * 600, "answer": ANSWER}, QueryError),
    ],
)
def test_what_cannot_be_answered_says_so(index, asked, error):
    with pytest.raises(error) as caught:
        index.query(**asked)
    assert caught.value.hint


def test_another_model_is_refused_with_the_way_to_the_right_one(data, tmp_path, llama_folders):
    build(request(data, tmp_path / "index", llama_folders, gradient=GradientConfig(second_moment="none")))
    other, _ = tiny.save_model(tmp_path / "other", "llama", lora=False, seed=5)
    with pytest.raises(ConfigMismatch, match="is not the one") as caught:
        Index.open(tmp_path / "index", model=str(other)).query(PROMPT, answer=ANSWER)
    assert str(llama_folders[0]) in caught.value.hint and "-m" in caught.value.hint


def test_a_full_parameter_model_is_queried_without_an_adapter(data, tmp_path, llama_folders):
    asked = request(data, tmp_path / "index", (llama_folders[0], ""))
    build(type(asked)(asked.data, asked.output, ModelConfig(str(llama_folders[0])), sketch=asked.sketch))
    result = Index.open(tmp_path / "index").query(PROMPT, answer=ANSWER, k=2)
    assert result.index.adapter is None and len(result.matches) == 2


def test_a_folder_that_is_no_index_is_refused(tmp_path):
    with pytest.raises(NotAnIndex):
        Index.open(tmp_path)


def test_a_row_whose_example_becomes_other_tokens_now_is_not_shown(data, tmp_path, llama_folders):
    build(request(data, tmp_path / "index", llama_folders))
    index, encoded = Index.open(tmp_path / "index"), []
    encode = index.template.encode
    index.template.encode = lambda example, **options: encoded.append(example.id) or encode(example, **options)
    found = index.query([{"prompt": PROMPT, "answer": ANSWER}] * 3, k=3)
    ids = {match.id for match in found[0].matches}
    assert [encoded.count(id) for id in ids] == [1, 1, 1]  # once for the three queries
    question = index.encode([{"prompt": PROMPT, "answer": ANSWER}])
    index.template.tokenizer.add_special_tokens({"additional_special_tokens": ["is", "the", "a"]})
    with pytest.raises(ConfigMismatch, match="becomes other tokens now"):
        index.query(question, k=10)


def test_the_place_that_an_index_records_is_not_asked_of_the_hub(data, tmp_path, llama_folders, monkeypatch):
    build(request(data, tmp_path / "index", llama_folders))
    index = Index.open(tmp_path / "index")
    recorded = replace(index.recipe, model=replace(index.recipe.model, path="models/tiny")).model_config()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"no folder here.*-m FOLDER"):
        load(replace(recorded, adapter=None))
    assert not index.recipe.model_config(model="models/tiny").recorded
