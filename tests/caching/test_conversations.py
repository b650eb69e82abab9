"""Conversations from a file to an index and a query: which turns are in the loss, and rows that a template refuses."""

import json

import numpy as np
import pytest
import torch

from rapidindex.caching.build import build
from rapidindex.caching.update import add
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, GradientConfig, ModelConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.data.templates import Template
from rapidindex.errors import ConfigMismatch, ModelError, UsageError
from rapidindex.gradients.sketch import Sketch
from rapidindex.model.finetune import finetune
from rapidindex.model.model import load
from rapidindex.model.training import _encode
from rapidindex.query.index import Index
from rapidindex.store import Store
from tests import tiny
from tests.oracles import all_rows, autograd

SUSHI = [("user", "What is sushi?"), ("assistant", "A dish from Japan."), ("user", "Thanks."), ("assistant", "Bye.")]
SHORT = [("user", "What is tea?"), ("assistant", "A drink.")]
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHAT_TEMPLATE
CLOCK = "Today is {{ strftime_now('%Y-%m-%d') }}.\n" + tiny.CHAT_TEMPLATE


def row(turns, **columns):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **columns}


ROWS = [row(SUSHI), row(SHORT), row([("user", "Rice?"), ("assistant", "Grain.")])]


@pytest.fixture
def folders(llama_folders):
    return llama_folders


def asked(rows, output, folders, **encoding):
    model = ModelConfig(*map(str, folders), device="cpu")
    gradient = GradientConfig(second_moment="none")
    encoding = EncodingConfig(**{"template": "chat", **encoding})
    return BuildRequest(rows, str(output), model, encoding, gradient, SketchConfig(K=1024))


def with_template(folders, folder, template):
    """The tiny Llama and its adapter, with another chat template."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    model = load(ModelConfig(str(folders[0]))).model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, folders[1]


def as_built_before(path):
    """Take out of the manifest what older versions did not write."""
    with Store.open(path).lock() as store:
        config = json.loads(json.dumps(store.config))
        del config["encoding"]["loss"], config["encoding"]["date"]
        store.update_config(config)


def test_the_row_of_a_conversation_is_the_gradient_of_all_assistant_turns_and_of_the_last_if_asked(tmp_path, folders):
    for loss in ("all", "last"):
        request = asked(ROWS, tmp_path / loss, folders, loss=loss)
        build(request)
        loaded = load(request.model)
        example = read_examples(ROWS, loss=loss).examples[0]
        tokenizer = loaded.tokenizer
        text = tokenizer.apply_chat_template(row(SUSHI)["messages"], tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        answers = ["A dish from Japan.<|eos|>", "Bye.<|eos|>"][-2 if loss == "all" else -1 :]
        spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in answers]
        weights = np.array([any(a <= at[0] < b for a, b in spans) for at in encoded["offset_mapping"]], np.float32)
        gradients = autograd(loaded.model, np.array(encoded["input_ids"]), weights / weights.sum())[1]
        flat = torch.cat([part.flatten() for part in gradients])
        truth = Sketch(len(flat), request.sketch).compress((flat / flat.norm()).float()[None])[0].numpy()
        stored = all_rows(tmp_path / loss)[example.id]
        assert np.abs(stored - truth).max() <= (1 / 254 + 1e-3) * np.abs(truth).max()


def test_a_heat_map_spans_all_turns_and_its_shares_average_to_the_influence(tmp_path, folders):
    build(asked(ROWS, tmp_path / "index", folders))
    result = Index.open(tmp_path / "index").query("What is sushi?", answer="A dish from Japan.", k=3, all=True)
    match = next(match for match in result.matches if "dish" in match.response)
    assert match.response == "A dish from Japan.\n\nBye."
    assert match.prompt == "user: What is sushi?\nassistant: …\nuser: Thanks."
    assert all(
        token.text == match.response[token.start : token.end] for token in match.tokens if token.end > token.start
    )
    assert len(match.token_scores) == len(match.tokens) and [t.text for t in match.tokens].count("<|eos|>") == 2
    assert match.exact_score == pytest.approx(np.mean(match.token_scores), rel=1e-4)


def test_finetune_trains_on_the_tokens_that_build_takes(tmp_path, folders):
    loaded = load(ModelConfig(str(folders[0])))
    tokenizer, limits = loaded.tokenizer, loaded.limits
    for loss in ("all", "last"):
        dataset, template = read_examples(ROWS, loss=loss), Template("chat", tokenizer, 512)
        trained, refused = _encode(dataset, template, limits)
        assert refused == []
        for example, features in zip(dataset.examples, trained, strict=True):
            encoding = template.encode(example)
            assert features["input_ids"].tolist() == encoding.input_ids.tolist()
            assert (features["labels"] != -100).tolist() == encoding.response_mask.tolist()


def test_finetune_refuses_data_that_was_read_with_another_loss(tmp_path, folders):
    with pytest.raises(UsageError, match="loss of all assistant turns, and --loss is last"):
        finetune(
            read_examples(ROWS), EncodingConfig(loss="last"), ModelConfig(str(folders[0])), FinetuneConfig(), tmp_path
        )


def test_an_index_of_an_earlier_version_goes_on_with_the_last_turn(tmp_path, folders):
    new, old = tmp_path / "new", tmp_path / "old"
    build(asked(ROWS, new, folders, loss="last"))
    build(asked(ROWS[1:], old, folders, loss="last"))
    as_built_before(old)
    assert add(old, ROWS).computed == 1
    one, other = all_rows(new), all_rows(old)
    assert one.keys() == other.keys() and all(np.allclose(one[id], other[id], atol=1e-3) for id in one)
    index = Index.open(old)
    assert index.recipe.encoding.loss == "last"
    assert {match.response for match in index.query("Hi", answer="Bye.").matches} == {"Bye.", "A drink.", "Grain."}


def test_the_same_command_goes_on_where_the_loss_makes_no_difference_and_is_refused_where_it_does(tmp_path, folders):
    build(asked(ROWS[1:], tmp_path / "short", folders, loss="last"))
    as_built_before(tmp_path / "short")
    assert build(asked(ROWS[1:], tmp_path / "short", folders)).computed == 0
    for there, wanted in (("last", "all"), ("all", "last")):
        build(asked(ROWS, tmp_path / there, folders, loss=there))
        with pytest.raises(ConfigMismatch, match=f"encoding.loss: '{there}' there, '{wanted}' asked for"):
            build(asked(ROWS, tmp_path / there, folders, loss=wanted))


def test_rows_that_the_chat_template_refuses_are_listed_and_end_neither_build_nor_finetune(tmp_path, folders):
    base, adapter = with_template(folders, tmp_path / "base", STRICT)
    rows = [*ROWS, row([("system", "Be brief."), *SHORT]), row([("system", "Alone."), ("assistant", "Yes.")])]
    summary = build(asked(rows, tmp_path / "index", (base, adapter)))
    assert (summary.examples, summary.skipped) == (3, 2)
    listed = Store.open(tmp_path / "index").skipped
    assert [entry["line"] for entry in listed] == [4, 5]
    assert all("refuses a conversation" in entry["reason"] and "no system turn" in entry["reason"] for entry in listed)
    quick = FinetuneConfig(epochs=1, batch_size=4, checkpoint_seconds=0)
    encoding, model = EncodingConfig("chat"), ModelConfig(str(base), device="cpu")
    trained = finetune(read_examples(rows), encoding, model, quick, tmp_path / "adapter")
    assert (trained.examples, trained.skipped) == (3, 0)
    assert trained.refused == listed
    with pytest.raises(ModelError, match="no system turn"):
        build(asked(rows[3:], tmp_path / "none", (base, adapter)))


def test_nothing_joins_examples_that_would_become_other_tokens_now(tmp_path, folders):
    clocked, path = with_template(folders, tmp_path / "base", CLOCK), tmp_path / "index"
    build(asked(ROWS[:2], path, clocked, date="2024-05-19"))
    store = Store.open(path)
    store.update_config({"encoding": {**store.config["encoding"], "date": "2024-05-20"}})  # another text
    with pytest.raises(ConfigMismatch, match="becomes other tokens now"):
        add(path, ROWS)
    with pytest.raises(ConfigMismatch, match="becomes other tokens now"):
        build(asked(ROWS[:2], path, clocked))
    store.refresh()
    assert len(store.rows("sentence")) == 2 and not store.config.get("added")


def test_the_day_of_a_build_is_kept_for_resume_add_and_query(tmp_path, folders):
    clocked = with_template(folders, tmp_path / "base", CLOCK)
    path = tmp_path / "index"
    build(asked(ROWS[:2], path, clocked, date="2024-05-19"))
    assert Store.open(path).config["encoding"]["date"] == "2024-05-19"
    assert build(asked(ROWS[:2], path, clocked)).computed == 0
    assert add(path, ROWS).computed == 1
    assert Store.open(path).config["encoding"]["date"] == "2024-05-19"
    whole = tmp_path / "whole"
    build(asked(ROWS, whole, clocked, date="2024-05-19"))
    one, other = all_rows(path), all_rows(whole)
    assert one.keys() == other.keys() and all(np.allclose(one[id], other[id], atol=1e-3) for id in one)
    index = Index.open(path)
    assert index.template.render_prompt([("user", "Hi")]).startswith("Today is 2024-05-19.")
    as_built_before(path)
    created = Store.open(path).manifest["created"][:10]
    assert Index.open(path).template.date == created
    build(asked(ROWS, tmp_path / "no-clock", folders, date="2024-05-19"))
    assert Store.open(tmp_path / "no-clock").config["encoding"]["date"] is None
