"""What is right is loaded, and what is wrong is said of the file that is wrong, with the next step."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from rapidindex import BuildRequest, Index, build
from rapidindex.config import SketchConfig
from rapidindex.errors import ModelError
from rapidindex.model.model import load
from tests import tiny
from tests.model.test_model import IDS, copy, cpu, edit_json


@pytest.mark.parametrize("stale", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_of_shards_that_are_gone_does_not_hide_the_weights(tmp_path, llama_folders, stale):
    base = copy(llama_folders[0], tmp_path / "base")
    (base / stale).write_text('{"weight_map": {"lm_head.weight": "gone-00001-of-00002"}}')
    assert load(cpu(base)).trainable


def test_a_shard_that_is_not_there_is_missed(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    tiny.make_model("llama").save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    assert load(cpu(base)).trainable
    sorted(base.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="lacks model-00002-of-.*safetensors"):
        load(cpu(base))


@pytest.mark.parametrize(
    "settings",
    [
        peft.VBLoRAConfig(target_modules=["q_proj"], r=2, vector_length=16, num_vectors=16),
        peft.UniLoraConfig(target_modules=["q_proj", "v_proj"], r=4),
        peft.TinyLoraConfig(target_modules=["q_proj", "v_proj"]),
    ],
    ids=lambda settings: settings.peft_type.value,
)
def test_a_parameter_that_all_layers_share_is_loaded_once(tmp_path, llama_folders, settings):
    torch.manual_seed(0)
    settings.task_type = "CAUSAL_LM"
    made = peft.get_peft_model(tiny.make_model("llama"), settings)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad and value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
    made.eval().save_pretrained(tmp_path)
    loaded = load(cpu(llama_folders[0], tmp_path))
    assert torch.equal(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", b"{", "adapter_config.json cannot be read as JSON"),
        ("adapter_config.json", b'{"peft_type": "NO_SUCH"}', "The adapter .*adapter cannot be loaded"),
        ("adapter_model.safetensors", b"\0" * 100, "The adapter .*adapter cannot be loaded"),
        ("adapter_model.safetensors", POINTER, "adapter_model.safetensors is a pointer of Git LFS.*git -C .* lfs pull"),
    ],
)
def test_a_damaged_adapter_is_not_blamed_on_its_base(tmp_path, llama_folders, file, content, message):
    adapter = copy(llama_folders[1], tmp_path / "adapter")
    (adapter / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        load(cpu(llama_folders[0], adapter))
    assert f"{llama_folders[0]} could not be loaded" not in str(raised.value)


def test_a_base_of_git_lfs_pointers_is_named(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    (base / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match="model.safetensors is a pointer of Git LFS.*git -C .* lfs pull"):
        load(cpu(base))


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"])
def test_half_a_tokenizer_in_an_adapters_folder_does_not_count(tmp_path, llama_folders, kept):
    base, adapter = llama_folders[0], copy(llama_folders[1], tmp_path / "adapter")
    tiny.make_tokenizer(bos=True).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "special_tokens_map.json").write_text('{"eos_token": "<|eos|>"}')
    shutil.copy(tmp_path / "other" / kept, adapter)
    assert load(cpu(base, adapter)).fingerprints["tokenizer"] == load(cpu(base)).fingerprints["tokenizer"]
    alone = copy(base, tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load(cpu(alone))


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn", "no_such"])
def test_attention_that_is_not_here_is_not_asked_for(tmp_path, llama_folders, name):
    for key in ("attn_implementation", "_attn_implementation"):
        base = copy(llama_folders[0], tmp_path / key)
        edit_json(base / "config.json", **{key: name})
        assert load(cpu(base)).model.config._attn_implementation == "sdpa"
    edit_json(base / "config.json", attn_implementation="eager", _attn_implementation="eager")
    assert load(cpu(base)).model.config._attn_implementation == "eager"


def test_a_model_with_an_encoder_is_named_as_such(tmp_path, tokenizer):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 320}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=320)
    for name, model in {"bart": bart, "t5": transformers.T5ForConditionalGeneration(t5)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"{name} is an encoder-decoder model.*causal language model"):
            load(cpu(tmp_path / name))


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}])
def test_an_adapter_on_a_resized_vocabulary_names_both_sizes_and_the_next_step(tmp_path, llama_folders, options):
    base = tiny.make_model("llama")
    base.name_or_path = str(llama_folders[0])
    base.resize_token_embeddings(328)
    made = tiny.with_lora(base, ["q_proj"], **options)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=not options)
    with pytest.raises(ModelError, match=r"adapter was trained over 328 tokens, and .*base has 320.*embeddings\(328\)"):
        load(cpu(llama_folders[0], tmp_path / "adapter"))
    base = tiny.make_model("llama")
    base.resize_token_embeddings(328)
    base.save_pretrained(tmp_path / "resized")
    tiny.make_tokenizer().save_pretrained(tmp_path / "resized")
    loaded = load(cpu(tmp_path / "resized", tmp_path / "adapter"))
    if options:
        assert torch.equal(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits)


def test_checkpoints_are_sorted_as_numbers(tmp_path, llama_folders):
    for number in (5, 1000, 20):
        copy(llama_folders[1], tmp_path / f"checkpoint-{number}")
    with pytest.raises(ModelError, match="some: checkpoint-5, checkpoint-20, checkpoint-1000.*checkpoint-1000"):
        load(cpu(llama_folders[0], tmp_path))
    models = Path(tmp_path / "models")
    for number in (5, 1000, 20):
        copy(llama_folders[0], models / f"checkpoint-{number}")
    with pytest.raises(ModelError, match="subfolders: -m .*checkpoint-1000"):
        load(cpu(models))


def test_an_index_knows_its_model_from_everywhere(tmp_path, llama_folders, data, monkeypatch):
    copy(llama_folders[0], tmp_path / "models" / "tiny")
    copy(llama_folders[1], tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    config = cpu(Path("models/tiny"), Path("adapter"))
    build(BuildRequest(str(data), "index", config, sketch=SketchConfig(K=1024), limit=2))
    monkeypatch.chdir("/")
    index = Index.open(tmp_path / "index", device="cpu")
    assert index.recipe.model.path == str(tmp_path / "models" / "tiny")
    assert index.query("What is tea?", answer="Nice.").matches
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(ModelError, match="There is no model at"):
        Index.open(tmp_path / "index", device="cpu").query("What is tea?", answer="Nice.")
