"""A model's own answer is read as it was given: the same tokens in the same context, under any template."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rapidindex import BuildRequest, Index, build
from rapidindex.config import EncodingConfig, SketchConfig
from rapidindex.data.templates import continuation
from rapidindex.model.model import adopt, generate
from tests import tiny

QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""An answer is rendered after an empty thought, and generated without one."""
R1 = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""The prompt begins a thought, which is dropped from what was said."""
TEMPLATES = {"alpaca": None, "plain": None, "Q: {prompt}\nA:": None, "qwen3": QWEN3, "r1": R1}


def metaspace(*, unigram: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece's: words begin with `▁`, one is put first and is not shown again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters = sorted(set("".join(tiny.SENTENCES)) | set("\n:<|>_/?"))
    sizes = {"vocab_size": tiny.VOCABULARY, "special_tokens": ["<unk>", "</s>", "<s>"], "initial_alphabet": letters}
    tokenizer.train_from_iterator(tiny.SENTENCES, trainers.BpeTrainer(**sizes, show_progress=False))
    if unigram:
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        tokenizer.model = models.Unigram([(token, -0.01 * id) for id, token in enumerate(vocabulary)], unk_id=0)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def appending(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer with these special tokens about each text."""
    names = [name for name in single.split() if name != "$A"]
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer


TOKENIZERS = {
    "bytes": tiny.make_tokenizer,
    "bytes, bos": lambda: tiny.make_tokenizer(bos=True),
    "bytes, eos": lambda: appending(tiny.make_tokenizer(), "$A <|eos|>"),
    "metaspace": metaspace,
    "metaspace, bos": lambda: appending(metaspace(), "<s> $A"),
    "metaspace, bos and eos": lambda: appending(metaspace(), "<s> $A </s>"),
    "unigram": lambda: metaspace(unigram=True),
}


def greedy(model, ids: list[int], ends: set[int], steps: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens after `ids`, one by one and without a cache, and their log-probabilities."""
    said, scores = [], []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + said])).logits[0, -1].log_softmax(-1)
        best = int(logits.argmax())
        if best in ends:
            break
        said.append(best)
        scores.append(float(logits[best]))
    return said, scores


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_loss_of_an_own_answer_is_that_of_giving_it(tmp_path, template, kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = TEMPLATES[template]
    encoding = EncodingConfig("chat" if TEMPLATES[template] else template)
    model = tiny.make_model("llama", seed=3)
    given = {"model": model, "tokenizer": tokenizer}
    rows = [{"prompt": "What is the capital of Japan?", "response": "Tokyo"}]
    build(BuildRequest(rows, tmp_path / "index", **given, encoding=encoding, sketch=SketchConfig(K=1024)))
    index = Index.open(tmp_path / "index", **given)
    asked = index.encode(["What is the capital of India?"])[0]
    ids, mask = torch.from_numpy(asked.encoding.input_ids).long(), asked.encoding.response_mask
    first = int(mask.argmax())
    assert mask[first:].all() and tokenizer.eos_token_id not in ids[first:].tolist()
    text = index.template.render_prompt((("user", "What is the capital of India?"),))
    prompt = tokenizer(text, add_special_tokens=index.template.add_special_tokens)["input_ids"]
    prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id and "eos" in kind else prompt
    assert ids[:first].tolist() == prompt
    said, scores = greedy(model, prompt, {tokenizer.eos_token_id}, 64)
    assert ids[first:].tolist() == said
    logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[first:])
    assert loss.item() == pytest.approx(-sum(scores) / len(scores), rel=1e-4)
    assert [token.text for token in asked.info.tokens] and len(asked.info.tokens) == len(said)
    assert asked.info.answer == index.answer("What is the capital of India?")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_of_a_continuation_are_where_they_stand_in_its_text(kind):
    tokenizer = TOKENIZERS[kind]()
    prompt, answer = "The capital\n", " of India is New Delhi."
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    assert both[: len(ids)] == ids
    text, tokens = continuation(tokenizer, ids, both[len(ids) :])
    assert text == answer and "".join(token.text for token in tokens) == answer
    assert all(text[token.start : token.end] == token.text for token in tokens)


def test_each_part_of_a_character_stands_for_the_whole_of_it():
    tokenizer = tiny.make_tokenizer()
    ids = tokenizer("a日\x00é", add_special_tokens=False)["input_ids"]
    text, tokens = continuation(tokenizer, tokenizer("x")["input_ids"], [*ids, 0])
    assert text == "a日\x00é"
    assert [(token.text, token.start, token.end) for token in tokens] == [
        ("a", 0, 1),
        *[("日", 1, 2)] * 3,
        ("\x00", 2, 3),
        *[("é", 3, 4)] * 2,
        ("<|eos|>", 4, 4),
    ]


def test_a_model_answers_behind_its_prompt_and_not_behind_the_end_of_a_text():
    model, plain = tiny.make_model("llama"), tiny.make_tokenizer()
    ending = appending(tiny.make_tokenizer(), "$A <|eos|>")
    assert generate(adopt(model, ending), "Paris") == generate(adopt(model, plain), "Paris")


def test_only_the_end_tokens_of_a_generation_config_count(tokenizer):
    loaded = adopt(tiny.make_model("llama"), tokenizer)
    before = generate(loaded, "Paris", max_new_tokens=8)
    odd = {"suppress_tokens": before.ids, "penalty_alpha": 0.6, "top_k": 4, "bad_words_ids": [before.ids[:1]]}
    loaded.model.generation_config.update(**odd, forced_eos_token_id=0, max_length=3)
    configured = loaded.model.generation_config
    assert generate(loaded, "Paris", max_new_tokens=8) == before
    assert loaded.model.generation_config is configured and configured.penalty_alpha == 0.6
