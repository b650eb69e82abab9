"""A model and tokenizer taken from memory, against the same ones saved and loaded."""

import dataclasses

import peft
import pytest
import torch
import transformers

from rapidindex.config import ModelConfig
from rapidindex.errors import ModelError
from rapidindex.model import fingerprints
from rapidindex.model.fingerprints import weights_fingerprints
from rapidindex.model.model import adopt, load
from tests import tiny
from tests.model.test_model import cpu, gradients


def assert_same(adopted, loaded) -> None:
    expected = gradients(loaded)
    assert list(adopted.trainable) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in gradients(adopted).items())
    for part in ("model", "adapter", "tokenizer"):
        assert loaded.fingerprint_of(part, adopted.fingerprints[part]) == adopted.fingerprints[part]
    assert not adopted.model.training and adopted.model.config.use_cache is False
    assert adopted.fingerprints["model"].startswith("weights:") and len(adopted.fingerprints["model"]) == 24


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_whole_model_is_taken_as_it_would_be_loaded(tiny_folders, tokenizer, name):
    model = tiny.make_model(name).train().requires_grad_(False)
    model.config.use_cache = True
    adopted = adopt(model, tokenizer)
    assert adopted.model is model and adopted.fingerprints["adapter"] == ""
    assert_same(adopted, load(cpu(tiny_folders[name][0])))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_an_adapter_in_training_is_taken_as_it_would_be_loaded(tiny_folders, tokenizer, name):
    adopted = adopt(tiny.with_lora(tiny.make_model(name)).train(), tokenizer)
    assert_same(adopted, load(cpu(*tiny_folders[name])))


def test_an_adapter_loaded_for_inference_becomes_trainable(llama_folders):
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folders[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folders[0])
    model = peft.PeftModel.from_pretrained(base, llama_folders[1])
    assert not any(value.requires_grad for value in model.parameters())
    adopted = adopt(model, tokenizer, adapter=llama_folders[1])
    assert_same(adopted, load(cpu(*llama_folders)))
    assert adopted.config == ModelConfig(*map(str, llama_folders), device="cpu")


def test_modules_to_save_and_biases_belong_to_the_adapter(tmp_path, llama_folders, tokenizer):
    made = tiny.with_lora(tiny.make_model("llama"), ["q_proj"], modules_to_save=["lm_head"])
    made.save_pretrained(tmp_path / "adapter")
    made.requires_grad_(False)
    adopted = adopt(made, tokenizer)
    assert_same(adopted, load(cpu(llama_folders[0], tmp_path / "adapter")))
    assert adopted.fingerprints["model"] == adopt(tiny.make_model("llama"), tokenizer).fingerprints["model"]
    biased = tiny.with_lora(tiny.make_model("gpt2"), bias="lora_only").requires_grad_(False)
    assert sum(name.endswith("base_layer.bias") for name in adopt(biased, tokenizer).trainable) == 4


def test_only_the_active_adapter_counts(tokenizer):
    model = tiny.with_lora(tiny.make_model("llama"))
    alone = adopt(model, tokenizer)
    names, before = list(alone.trainable), alone.fingerprints
    model.add_adapter("other", model.peft_config["default"])
    both = adopt(model, tokenizer)
    assert list(both.trainable) == names and both.fingerprints == before


def test_a_quantized_base_is_taken_under_its_adapter(wide_folders):
    loaded = load(cpu(*wide_folders, quantize="4bit"))
    adopted = adopt(loaded.model, loaded.tokenizer, adapter=wide_folders[1])
    assert adopted.config == loaded.config
    assert adopted.fingerprint_of("model", loaded.fingerprints["model"]) == loaded.fingerprints["model"]
    assert all(value.any() for value in gradients(adopted).values())


def test_a_changed_weight_name_dtype_or_scale_changes_the_fingerprint():
    def prints(change=None, kind="llama", **options):
        model = tiny.with_lora(tiny.make_model(kind), **options)
        if change:
            with torch.no_grad():
                change(model)
        return weights_fingerprints(model)

    before = prints()
    base_changed = prints(lambda model: model.get_input_embeddings().weight[3, 3].add_(1e-3))
    assert base_changed["model"] != before["model"] and base_changed["adapter"] == before["adapter"]
    adapter = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    adapter_changed = prints(lambda model: model.get_parameter(adapter)[0, 0].add_(1e-3))
    assert adapter_changed["model"] == before["model"] and adapter_changed["adapter"] != before["adapter"]
    assert prints(lora_alpha=99)["adapter"] != before["adapter"]
    assert prints(lambda model: model.to(torch.bfloat16))["model"] != before["model"]
    assert prints() == before


def test_of_a_large_base_slices_from_all_over_each_tensor_are_read():
    def digest(position=None, limit=2**10):
        large = torch.zeros(100, 1000)
        if position is not None:
            large.view(-1)[position] = 1
        return fingerprints._digest([("large", large), ("small", torch.ones(3))], limit)

    assert len({digest(), *map(digest, (0, 99_999, (100_000 - 8) * 7 // 15))}) == 4
    assert digest(5_000) == digest() != digest(5_000, None)


def test_files_and_objects_are_compared_by_the_weights_in_the_files(tmp_path, llama_folders):
    loaded = load(cpu(*llama_folders))
    adopted = adopt(loaded.model, loaded.tokenizer, adapter=llama_folders[1])
    for part, value in loaded.fingerprints.items():
        assert adopted.fingerprint_of(part, value) == value
        assert adopted.fingerprint_of(part, adopted.fingerprints[part]) == adopted.fingerprints[part]
    for config in (dataclasses.replace(adopted.config, adapter=None), ModelConfig("")):
        unknown = dataclasses.replace(adopted, config=config)
        with pytest.raises(ModelError, match="adapter was given as an object.*no known folder.*Open .* with the paths"):
            unknown.fingerprint_of("adapter", loaded.fingerprints["adapter"])
    with torch.no_grad():
        next(iter(loaded.trainable.values())).add_(1)  # trained on since it was saved
    trained = adopt(loaded.model, loaded.tokenizer, adapter=llama_folders[1])
    assert trained.fingerprint_of("model", loaded.fingerprints["model"]) == loaded.fingerprints["model"]
    with pytest.raises(ModelError, match="holds other weights"):
        trained.fingerprint_of("adapter", loaded.fingerprints["adapter"])
    alone = adopt(tiny.make_model("llama"), loaded.tokenizer)
    assert alone.fingerprint_of("adapter", loaded.fingerprints["adapter"]) == ""


def test_unusable_objects_are_refused(tokenizer):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    classifier = transformers.LlamaForSequenceClassification(tiny.make_model("llama").config)
    merged = tiny.with_lora(tiny.make_model("llama"))
    merged.merge_adapter()
    for model, message in [
        (torch.nn.Linear(2, 2), "A Linear is no causal language model"),
        (classifier, "LlamaForSequenceClassification is no causal"),
        (peft.get_peft_model(tiny.make_model("llama"), prompt), "virtual tokens"),
        (merged, "merged into the base"),
        (tiny.make_model("llama", vocab_size=300), "320 tokens, the model embeddings for 300"),
        (tiny.make_model("llama").to("meta"), "lies on meta"),
        (tiny.make_model("llama").double(), "float64.*Convert"),
    ]:
        with pytest.raises(ModelError, match=message):
            adopt(model, tokenizer)
    with pytest.raises(ModelError, match="not a fast one"):
        adopt(tiny.make_model("llama"), transformers.ByT5Tokenizer())


@pytest.mark.parametrize("options", [{"trainable_token_indices": [5, 300]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_of_embeddings_leaves_the_fingerprint_of_its_base(tokenizer, options):
    adapted = tiny.with_lora(tiny.make_model("llama"), ["q_proj"], **options)
    assert adopt(adapted, tokenizer).fingerprints["model"] == weights_fingerprints(tiny.make_model("llama"))["model"]
    embeddings = tiny.with_lora(tiny.make_model("llama"), ["embed_tokens", "q_proj"])
    assert adopt(embeddings, tokenizer).fingerprints["model"] == adopt(adapted, tokenizer).fingerprints["model"]
