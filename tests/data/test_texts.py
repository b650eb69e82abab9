"""Texts without a prompt: passages, documents, code."""

from dataclasses import replace

import numpy as np
import pytest

from rapidindex.caching.build import build
from rapidindex.caching.update import remove
from rapidindex.config import EncodingConfig, FinetuneConfig, ModelConfig, UsageError
from rapidindex.data.examples import Example, read_examples
from rapidindex.data.templates import Template, encode_examples
from rapidindex.model.finetune import finetune
from rapidindex.model.model import load
from rapidindex.query.index import Index
from tests.oracles import request

TEXT = "Tea is from Japan.  Tea tells me about\nblue words, and 茶は日本から来た 🫖 " * 9


@pytest.fixture(scope="module")
def tokenizer(llama_folders):
    return load(ModelConfig(*map(str, llama_folders))).tokenizer


def text(content=TEXT, **meta):
    return read_examples([{"text": content, **meta}]).examples[0]


@pytest.mark.parametrize("template", ["raw", "alpaca", "plain"])
def test_every_token_that_can_be_predicted_is_in_the_loss_whatever_the_template(tokenizer, template):
    encoding = Template(template, tokenizer, 512).encode(text("Tea is from Japan."))
    alone = tokenizer("Tea is from Japan.")["input_ids"]
    assert encoding.input_ids.tolist() == alone  # no wrapper, and no end that the text has not
    assert encoding.response_mask.tolist() == [False] + [True] * (len(alone) - 1)
    assert len(encoding.tokens) == encoding.response_mask.sum()


def test_the_first_token_counts_where_the_tokenizer_puts_one_before_it(tokenizer):
    class WithStart:
        """The tokenizer, with a token at the start of every text, as Llama's."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *texts, add_special_tokens=True, **options):
            encoded = dict(tokenizer(*texts, add_special_tokens=False, **options))
            if add_special_tokens:
                encoded["input_ids"] = [tokenizer.eos_token_id, *encoded["input_ids"]]
                encoded["offset_mapping"] = [(0, 0), *encoded["offset_mapping"]]
            return encoded

        def num_special_tokens_to_add(self):
            return 1

    template = Template("raw", WithStart(), 16)
    encoding = template.encode(text("Tea is from"))
    assert encoding.response_mask.tolist() == [False] + [True] * (len(encoding.input_ids) - 1)
    assert encoding.tokens[0].start == 0
    assert all(not template.encode(passage).truncated for passage in template.passages(text()))


@pytest.mark.parametrize(("max_length", "overlap"), [(16, None), (16, 0), (17, 8), (40, 5), (8, 4)])
def test_passages_hold_every_character_and_lead_back_to_their_document(tokenizer, max_length, overlap):
    document = text(title="About tea")
    template = Template("raw", tokenizer, max_length, overlap=overlap)
    encoded, refused = encode_examples(template, [document])
    assert not refused and len(encoded) > 1
    covered = np.zeros(len(document.response), bool)
    for number, (passage, encoding) in enumerate(encoded, 1):
        start, stop = map(int, passage.meta["characters"].split("-"))
        assert passage.response == document.response[start:stop] and not encoding.truncated
        assert passage.meta["document"] == document.id and passage.meta["title"] == "About tea"
        assert passage.meta["passage"] == f"{number} of {len(encoded)}" and passage.line == document.line
        covered[start:stop] = True
        stored = Example.from_record(passage.to_record(1.0))
        assert (template.encode(stored).input_ids == encoding.input_ids).all()  # a query reads it as the build did
    assert covered.all() and len({passage.id for passage, _ in encoded}) == len(encoded)


def test_a_text_that_fits_stays_whole(tokenizer):
    document = text("Tea is from Japan.")
    assert Template("raw", tokenizer, 64).passages(document) == [document]


def test_a_text_is_another_example_than_an_answer_of_the_same_words():
    answer = read_examples([{"messages": [{"role": "assistant", "content": TEXT}]}]).examples[0]
    assert answer.id != text().id and text().is_text and not answer.is_text


def test_a_text_beside_a_prompt_is_a_column_like_others():
    rows = [{"instruction": "a", "output": "b", "text": "a b"}, {"prompt": "a", "text": "b"}]
    dataset = read_examples(rows)
    assert dataset.examples[0].meta == {"text": "a b"} and len(dataset.skipped) == 1 and not dataset.texts


def test_text_files_and_folders_of_them_are_read(tmp_path):
    (tmp_path / "within").mkdir()
    (tmp_path / "a.txt").write_text("Tea.", "utf-8")
    (tmp_path / "within" / "b.md").write_text("# Japan", "utf-8-sig")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.py").write_text("no text")
    dataset = read_examples(tmp_path)
    assert {e.meta["file"]: e.response for e in dataset.examples} == {"a.txt": "Tea.", "within/b.md": "# Japan"}
    assert [row.reason for row in dataset.skipped] == ["bad.txt: bad UTF-8 at byte 2", "an empty text has no gradient"]
    assert read_examples(tmp_path / "a.txt").examples[0].id == dataset.examples[0].id
    assert len(read_examples(str(tmp_path / "*.txt")).examples) == 1


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("Tea is from", "Japan", "Tea is from Japan"),
        ("Tea is from ", "Japan", "Tea is from Japan"),
        ("Tea is from", " Japan", "Tea is from Japan"),
        ("Tea (", "Japan", "Tea (Japan"),
        ("Tea", ".", "Tea."),
        ("茶は", "日本", "茶は日本"),
    ],
)
def test_a_continuation_follows_its_prompt_as_a_word_does(tokenizer, prompt, answer, joined):
    encoding = Template("raw", tokenizer, 64).encode(Example("", prompt, answer, {}, 0, (("user", prompt),)), end=False)
    assert tokenizer.decode(encoding.input_ids) == tokenizer.decode(tokenizer(joined)["input_ids"])


def test_an_overlap_of_more_than_half_is_refused():
    with pytest.raises(UsageError, match="--overlap 9 is more than half of --max-length 16"):
        EncodingConfig(max_length=16, overlap=9)


def test_a_build_of_texts_is_asked_with_a_prompt_and_its_continuation(tmp_path, llama_folders):
    rows = [{"text": TEXT}, {"text": "Blue words are from me."}, {"text": "Tea is from Japan."}]
    asked = request("unused", tmp_path / "index", llama_folders, encoding=EncodingConfig(max_length=32))
    summary = build(replace(asked, data=rows))
    assert summary.examples > 3 and not summary.truncated
    index = Index.open(tmp_path / "index")
    assert index.recipe.encoding.template == "raw"
    result = index.query("Tea is from", answer="Japan", token="Japan", k=summary.examples, all=True)
    assert [token.text.strip() for token in result.query.tokens]
    for match in result.matches:
        assert match.prompt == "" and len(match.token_scores) == len(match.tokens)
        assert match.exact_score == pytest.approx(match.score, abs=0.2)
    document = next(match.meta["document"] for match in result.matches if "document" in match.meta)
    assert remove(tmp_path / "index", where=[f"document={document}"]).examples == 2


def test_a_model_is_tuned_on_texts(tmp_path, llama_folders):
    dataset = read_examples([{"text": TEXT}, {"text": "Tea is from Japan."}])
    encoding, base = EncodingConfig(max_length=32), ModelConfig(str(llama_folders[0]))
    options = FinetuneConfig(rank=2, epochs=2, early=0)
    summary = finetune(dataset, encoding, base, options, tmp_path / "adapter")
    assert summary.examples > 2 and all(map(np.isfinite, summary.epoch_losses))
