"""Token-level rows, their search, and both directions of token-wise influence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rapidindex import Index
from rapidindex.caching.batches import padded_tokens, plan_units
from rapidindex.caching.build import build
from rapidindex.caching.estimate import estimate
from rapidindex.caching.job import prepare
from rapidindex.caching.update import add, remove
from rapidindex.config import (
    BuildConfig,
    BuildRequest,
    GradientConfig,
    ModelConfig,
    QueryOptions,
    SketchConfig,
    TokenConfig,
)
from rapidindex.errors import ConfigMismatch, StoreError, UsageError
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.model import load
from rapidindex.query.encode import stack_rows
from rapidindex.query.questions import Query
from rapidindex.results import Result
from rapidindex.search.vector_index import VectorIndex
from rapidindex.store import Store, check
from tests import tiny
from tests.oracles import ANSWER, PROMPT, autograd

PLAIN = GradientConfig(normalize="none", second_moment="none")


def asked(data, output, folders, **changes):
    options = {
        "gradient": PLAIN,
        "sketch": SketchConfig(K=4096),
        "token": TokenConfig(K=1024),
        "levels": ("sentence", "token"),
        "work": BuildConfig(batch_tokens=256),
    }
    model = ModelConfig(str(folders[0]), folders[1] and str(folders[1]))
    return BuildRequest(str(data), str(output), model, **{**options, **changes})


def token_rows(path):
    """{(example's id, position): row} of all live rows, and their token ids."""
    rows = Store.open(path).rows("token")
    keys = [(rows.ids[e], int(p)) for e, p in zip(rows.example, rows.position, strict=True)]
    taken = rows.take(np.arange(len(rows)))
    live = [number for number in range(len(rows)) if rows.live_mask[number]]
    assert len(set(keys)) == len(keys)
    return {keys[n]: taken[n] for n in live}, {keys[n]: int(rows.token[n]) for n in live}


def same(ours, theirs):
    """Whether two sets of rows agree to a step of their rounding."""
    step = max(float(np.abs(row).max()) for row in theirs.values()) / 127 * (1 + 1e-3)
    return ours.keys() == theirs.keys() and all(np.abs(ours[key] - theirs[key]).max() <= step for key in theirs)


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_token_rows_are_the_compressed_gradients_of_each_tokens_own_loss(data, tmp_path, tiny_folders, name, way):
    base, adapter = tiny_folders[name]
    wanted = asked(data, tmp_path / "index", (base, adapter if way == "lora" else None), levels=("token",), limit=4)
    assert build(wanted).examples == 4
    stored, ids = token_rows(tmp_path / "index")
    job = prepare(wanted)
    sketch = Sketch(job.size, SketchConfig(K=1024))
    for item in job.items:
        places = np.flatnonzero(item.encoding.response_mask)
        for position, place in enumerate(places):
            alone = np.zeros(len(item.encoding.input_ids), np.float32)
            alone[place] = 1.0
            parts = autograd(job.loaded.model, item.encoding.input_ids, alone)[1]
            truth = sketch.compress(torch.cat([part.flatten().float() for part in parts])[None])[0].numpy()
            key = item.example.id, position
            rounding = 1 / 254 + 1e-3  # rows are whole numbers up to 127
            assert np.abs(stored.pop(key) - truth).max() <= rounding * np.abs(truth).max()
            assert ids[key] == item.encoding.input_ids[place]
    assert not stored


def test_a_sentence_is_the_mean_of_its_tokens_on_either_side(data, tmp_path, llama_folders):
    """Eq. 5 = mean of Eq. 6 over training tokens = mean of Eq. 7 over the answer's = mean of Eq. 8 over both."""
    build(asked(data, tmp_path / "index", llama_folders, token=TokenConfig(K=4096)))
    index = Index.open(tmp_path / "index")
    how = {"answer": ANSWER, "k": 1000, "heatmaps": False, "exact": True}
    whole = index.query(PROMPT, **how)
    by_training_token = index.query(PROMPT, **how, level="token")
    n = len(whole.query.tokens)
    answer_tokens = [index.query(PROMPT, **how, span=str(j)) for j in range(n)]
    both = [index.query(PROMPT, **how, span=str(j), level="token") for j in range(n)]

    def means(*results):
        scores = {}
        for result in results:
            for match in result.matches:
                scores.setdefault(match.id, []).append(match.score)
        return {id: np.mean(values) for id, values in scores.items()}

    truth = means(whole)
    scale = max(map(abs, truth.values()))
    for told in (means(by_training_token), means(*answer_tokens), means(*both)):
        assert told == pytest.approx(truth, abs=1e-2 * scale)  # rows have 8 bits a number
    assert len(both[0].matches) == sum(len(match.tokens) for match in whole.matches)


@pytest.mark.parametrize("normalize", ["unit", "layer", "none"])
def test_what_a_match_did_to_each_word_of_the_answer_averages_to_its_influence(
    data, tmp_path, llama_folders, normalize
):
    recipe = GradientConfig(normalize=normalize, second_moment="estimate", moment_examples=4)
    build(asked(data, tmp_path / "index", llama_folders, gradient=recipe))
    index = Index.open(tmp_path / "index")
    for level in ("sentence", "token"):
        result = index.query(PROMPT, answer=ANSWER, token="Japan", k=3, answer_scores=True, level=level, all=True)
        for match in result.matches:
            assert len(match.answer_scores) == len(result.query.tokens)
            chosen_ones = [match.answer_scores[position] for position in result.query.selection]
            size = max(map(abs, match.answer_scores))
            assert np.mean(chosen_ones) == pytest.approx(match.exact_score, abs=1e-4 * size)
        assert Result.from_json(result.to_json()) == result


def test_a_search_of_tokens_finds_the_largest_products_and_says_which_tokens_they_are(data, tmp_path, llama_folders):
    build(asked(data, tmp_path / "index", llama_folders, gradient=GradientConfig(moment_examples=4)))
    index = Index.open(tmp_path / "index")
    result = index.query(PROMPT, answer=ANSWER, token="Japan", k=5, level="token", all=True)
    stored = token_rows(tmp_path / "index")[0]
    vector = stack_rows(index.encode([replace_query(result)], QueryOptions(level="token")))[0]
    truth = {key: float(row @ vector) for key, row in stored.items()}
    best = sorted(truth, key=truth.get, reverse=True)[:5]
    assert [(match.id, match.position) for match in result.matches] == best
    assert (result.level, result.index.K, result.index.n) == ("token", 1024, len(stored))
    for match in result.matches:
        assert match.exact_score == match.token_scores[match.position]
        assert match.score == pytest.approx(match.exact_score, abs=0.2)  # a cosine, estimated with K = 1,024
    against = index.query(PROMPT, answer=ANSWER, token="Japan", k=5, level="token", opponents=True)
    assert [(m.id, m.position) for m in against.matches] == sorted(truth, key=truth.get)[:5]


def replace_query(result):
    return Query(result.query.prompt, result.query.answer, token="Japan")


def test_an_interrupted_build_has_all_rows_of_an_example_or_none_and_goes_on(data, tmp_path, llama_folders):
    wanted = asked(data, tmp_path / "index", llama_folders, work=BuildConfig(batch_tokens=64))

    def stop(stage, done, total):
        if stage == "cache tokens" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(wanted, progress=stop)
    store = Store.open(wanted.output)
    assert store.complete("sentence") and not store.complete("token")
    kept = token_rows(wanted.output)[0]
    lengths = {item.example.id: len(item.encoding.tokens) for item in prepare(wanted).items}
    done = {id for id, _ in kept}
    assert 0 < len(done) < 10 and len(kept) == sum(lengths[id] for id in done)
    resumed = build(wanted)
    assert (resumed.computed, resumed.examples, resumed.tokens) == (10 - len(done), 10, sum(lengths.values()))
    build(replace(wanted, output=str(tmp_path / "whole")))
    assert same(token_rows(wanted.output)[0], token_rows(tmp_path / "whole")[0])
    assert check(wanted.output) == [] and build(wanted).computed == 0


def test_two_workers_give_the_token_rows_of_one_and_keep_out_what_is_not_finite(data, tmp_path, poisoned):
    one = asked(data, tmp_path / "one", (poisoned.model, poisoned.adapter), work=BuildConfig(batch_tokens=128))
    two = replace(one, output=str(tmp_path / "two"), work=replace(one.work, workers=2))
    alone, together = build(one), build(two)
    assert (together.examples, together.computed, together.rejected) == (9, 10, 1)
    assert replace(together, index="", seconds=0) == replace(alone, index="", seconds=0)
    assert same(token_rows(two.output)[0], token_rows(one.output)[0])
    assert "gradient of its token" in Store.open(two.output).rows("token").rejected[0]["reason"]


def test_building_from_a_and_adding_b_holds_the_tokens_of_both(data, tmp_path, llama_folders):
    lines = data.read_text().splitlines()
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(lines[:6]))
    second.write_text("\n".join(lines[4:]))
    build(asked(first, tmp_path / "grown", llama_folders))
    grown = add(tmp_path / "grown", str(second))
    whole = build(asked(data, tmp_path / "whole", llama_folders))
    assert (grown.computed, grown.examples, grown.tokens) == (4, 10, whole.tokens)
    assert same(token_rows(tmp_path / "grown")[0], token_rows(tmp_path / "whole")[0])
    assert add(tmp_path / "grown", str(second)).computed == 0
    remove(tmp_path / "grown", where=["number=3"])
    kept = token_rows(tmp_path / "grown")[0]
    assert len({id for id, _ in kept}) == 9
    found = Index.open(tmp_path / "grown").query(PROMPT, answer=ANSWER, k=1000, level="token", heatmaps=False)
    assert {(match.id, match.position) for match in found.matches} == kept.keys()
    assert check(tmp_path / "grown") == []
    assert add(tmp_path / "grown", str(data)).tokens == whole.tokens


def test_tokens_are_added_to_an_index_of_sentences_for_listed_examples_and_then_for_all(data, tmp_path, llama_folders):
    sentences = asked(data, tmp_path / "index", llama_folders, levels=("sentence",))
    build(sentences)
    with pytest.raises(StoreError, match="no token rows"):
        Index.open(tmp_path / "index").query(PROMPT, answer=ANSWER, level="token")
    ids = [item.example.id for item in prepare(sentences).items]
    some = replace(sentences, levels=("token",), token_examples=frozenset(ids[:2]))
    assert build(some).examples == 2
    assert {id for id, _ in token_rows(tmp_path / "index")[0]} == set(ids[:2])
    assert build(replace(some, token_examples=frozenset(ids[1:3]))).computed == 1
    assert Store.open(tmp_path / "index").config["tokens_of"] == "listed"
    with pytest.raises(ConfigMismatch, match="token.K: 1024 there, 512 asked for"):
        build(replace(some, token=TokenConfig(K=512)))
    assert build(replace(some, token_examples=None)).computed == 7
    assert Store.open(tmp_path / "index").complete("token")
    with pytest.raises(UsageError, match="1 ids that are not in"):
        build(replace(some, token_examples=frozenset(["0123"])))


def test_the_bytes_of_both_levels_are_predicted_within_two_per_cent(data, tmp_path, llama_folders):
    wanted = asked(data, tmp_path / "index", llama_folders, gradient=GradientConfig(moment_examples=4))
    predicted = estimate(wanted)
    done = build(wanted)
    written = sum(file.stat().st_size for file in (tmp_path / "index").rglob("*") if file.is_file())
    assert predicted.total_disk == pytest.approx(written, rel=0.02)
    assert predicted.rows == done.examples + done.tokens and predicted.examples == 10
    assert {"cache, sentence", "cache, token"} <= predicted.seconds.keys()


def test_sentences_come_first_however_the_index_was_begun(data, tmp_path, llama_folders):
    sentences = asked(data, tmp_path / "index", llama_folders, levels=("sentence",))
    ids = [item.example.id for item in prepare(sentences).items]
    build(replace(sentences, levels=("token",), token_examples=frozenset(ids[:2])))
    build(sentences)
    index = Index.open(tmp_path / "index")
    assert index.store.levels == ["sentence", "token"]
    assert index.query(PROMPT, answer=ANSWER, k=1, heatmaps=False).level == "sentence"
    assert remove(tmp_path / "index", where=["number=9"]).examples == 9
    assert remove(tmp_path / "index", where=["number=0"]).removed == 1
    assert {id for id, _ in token_rows(tmp_path / "index")[0]} == {ids[1]}
    with pytest.raises(UsageError, match="both"):
        index.query(PROMPT, answer=ANSWER, level="both")


def test_each_level_has_queries_of_its_own_length_however_long_the_others_are(data, tmp_path, llama_folders):
    scores = []
    for K in (4096, 131_072):  # what is longer than 65,536 has another padded length, and does not fold
        build(asked(data, tmp_path / f"index-{K}", llama_folders, sketch=SketchConfig(K=K), limit=3))
        found = Index.open(tmp_path / f"index-{K}").query(PROMPT, answer=ANSWER, k=1000, level="token", heatmaps=False)
        scores.append({(match.id, match.position): match.score for match in found.matches})
    assert scores[0] == pytest.approx(scores[1])


def test_tokens_of_removed_examples_are_not_computed_and_come_back_into_the_search_index(data, tmp_path, llama_folders):
    sentences = asked(data, tmp_path / "index", llama_folders, levels=("sentence",))
    build(sentences)
    ids = [item.example.id for item in prepare(sentences).items]
    remove(tmp_path / "index", ids=ids[:1])
    some = replace(sentences, levels=("token",), token_examples=frozenset(ids[:3]))
    assert build(some).computed == 2
    assert Store.open(tmp_path / "index").complete("token")
    remove(tmp_path / "index", ids=ids[1:2])
    store = Store.open(tmp_path / "index")
    with store.lock():
        VectorIndex.build(store.rows("token"), factory="Flat", dim=1024, target_recall=0.5)
    add(tmp_path / "index", str(data))
    rows = Store.open(tmp_path / "index").rows("token")
    found = VectorIndex.open(rows)
    assert set(found._ann.numbers()) == set(range(len(rows))) and rows.live_mask.all()
    assert build(some).computed == 1


def test_tokens_of_data_that_was_added_are_asked_for_by_name(data, tmp_path, llama_folders):
    lines = data.read_text().splitlines()
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(lines[:6]))
    second.write_text("\n".join(lines[6:]))
    sentences = asked(first, tmp_path / "index", llama_folders, levels=("sentence",))
    build(sentences)
    add(tmp_path / "index", str(second))
    tokens = build(replace(sentences, levels=("token",)))
    assert tokens.without_tokens == [str(second)]
    assert add(tmp_path / "index", str(second)).without_tokens == []
    assert len({id for id, _ in token_rows(tmp_path / "index")[0]}) == 10


def test_tokens_of_one_example_are_batched_together_and_single_ones_with_others(data, tmp_path, llama_folders):
    items = prepare(asked(data, tmp_path / "index", llama_folders)).items
    tokens = [replace(item, position=at) for item in items for at in range(len(item.encoding.tokens))]
    batches = [batch for unit in plan_units(tokens, 1024) for batch in unit]
    assert sorted((t.example.id, t.position) for batch in batches for t in batch) == sorted(
        (t.example.id, t.position) for t in tokens
    )
    assert all(padded_tokens(batch) <= 1024 for batch in batches) and len(batches) < len(tokens) / 3
    assert sum(len({token.example.id for token in batch}) > 1 for batch in batches) <= 2
    first = [token for token in tokens if token.position == 0]
    assert len(plan_units(first, 10_000)[0]) == 1


@pytest.mark.parametrize("how", ["", "0", "content,", "content,0", "words", "-3", "3,content"])
def test_any_other_choice_of_tokens_is_refused(how):
    with pytest.raises(UsageError, match="--tokens"):
        TokenConfig(tokens=how)


def test_only_the_chosen_tokens_have_rows(data, tmp_path, llama_folders):
    wanted = asked(data, tmp_path / "index", llama_folders, levels=("token",), token=TokenConfig(1024, "content,1"))
    build(wanted)
    stored, ids = token_rows(tmp_path / "index")
    tokenizer = load(wanted.model).tokenizer
    texts = {item.example.id: item.example.response for item in prepare(wanted).items}
    assert len(stored) == 10
    assert all(position == 0 and texts[id].startswith(tokenizer.decode([ids[id, position]])) for id, position in stored)
