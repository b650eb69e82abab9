"""Loading and generation, on tiny real models of five architectures."""

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rapidindex.config import ModelConfig
from rapidindex.errors import ModelError, ResourceError, UsageError
from rapidindex.model.files import ModelFiles, model_fingerprint
from rapidindex.model.model import generate, load, resolve_device
from tests import tiny

IDS = torch.tensor([[5, 40, 41, 42, 43, 44, 45, 46], [7, 99, 98, 97, 96, 95, 94, 93]])


def cpu(model: Path, adapter: Path | None = None, **options: object) -> ModelConfig:
    return ModelConfig(str(model), str(adapter) if adapter else None, device="cpu", **options)


def gradients(loaded, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    loss = loaded.model(input_ids=ids, labels=ids).loss
    names, values = zip(*loaded.trainable.items(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_parameter_of_a_whole_model_is_trainable_and_tied_ones_stand_once(tiny_folders, name):
    loaded = load(cpu(tiny_folders[name][0]))
    made = tiny.make_model(name)
    assert list(loaded.trainable) == [key for key, _ in made.named_parameters()]
    for key, value in made.named_parameters():
        assert torch.equal(loaded.trainable[key], value)
    output, words = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert (output is words) == (name in tiny.TIED)
    assert not loaded.model.training and loaded.model.config.use_cache is False
    assert all(torch.isfinite(value).all() and value.any() for value in gradients(loaded).values())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_only_the_adapter_is_trainable_and_its_weights_are_the_saved_ones(tiny_folders, name):
    base, adapter = tiny_folders[name]
    loaded = load(cpu(base, adapter))
    made = tiny.with_lora(tiny.make_model(name))
    expected = {key: value for key, value in made.named_parameters() if value.requires_grad}
    assert list(loaded.trainable) == list(expected)
    assert all(torch.equal(loaded.trainable[key], value) for key, value in expected.items())
    assert torch.equal(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits)
    assert all(value.any() for value in gradients(loaded).values())


def test_modules_to_save_are_trainable_too(tmp_path, llama_folders):
    made = tiny.with_lora(tiny.make_model("llama"), ["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(2)
    made.save_pretrained(tmp_path / "adapter")
    loaded = load(cpu(llama_folders[0], tmp_path / "adapter"))
    assert sum("lora_" in key for key in loaded.trainable) == 4
    heads = [value for key, value in loaded.trainable.items() if "modules_to_save" in key]
    assert len(heads) == 1 and torch.equal(heads[0], made.get_output_embeddings().weight)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantized_base_gives_the_gradients_of_its_own_weights(wide_folders, quantize):
    import bitsandbytes

    loaded = load(cpu(*wide_folders, quantize=quantize))
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[quantize]
    oracle = load(cpu(*wide_folders))
    plain = dict(oracle.model.named_modules())
    quantized = {key: module for key, module in loaded.model.named_modules() if isinstance(module, kind)}
    assert len(quantized) == 14  # seven projections in each of two layers
    with torch.no_grad():
        for key, module in quantized.items():
            if quantize == "4bit":
                value = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            else:
                value = module.weight.data.float() * module.state.SCB[:, None] / 127
            plain[key].weight.copy_(value)
        loaded.model(input_ids=IDS)  # a pass without gradients must not cost the next one its gradients
    least = {"4bit": 0.99999, "8bit": 0.99}[quantize]  # 8-bit products round their inputs too
    expected = gradients(oracle)
    for key, value in gradients(loaded).items():
        assert torch.cosine_similarity(value.flatten(), expected[key].flatten(), dim=0) > least


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_computes_in_the_dtype_asked_for(llama_folders, dtype):
    loaded = load(cpu(llama_folders[0], dtype=dtype))
    assert {value.dtype for value in loaded.trainable.values()} == {getattr(torch, dtype)}


def test_attention_can_be_eager(llama_folders):
    assert load(cpu(llama_folders[0]), attn_implementation="eager").model.config._attn_implementation == "eager"


def test_a_gguf_model_is_an_ordinary_one(gguf_file, tmp_path):
    loaded = load(cpu(gguf_file))
    assert all(value.any() for value in gradients(loaded).values())
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(cpu(tmp_path / "saved"))
    assert torch.equal(again.model(input_ids=IDS).logits, loaded.model(input_ids=IDS).logits)
    assert again.fingerprints["tokenizer"] == loaded.fingerprints["tokenizer"]
    assert again.tokenizer.decode(again.tokenizer("The capital of Japan")["input_ids"]) == "The capital of Japan"


def test_a_gguf_model_takes_an_adapter_and_is_found_in_its_folder(gguf_file, tmp_path):
    loaded = load(cpu(gguf_file.parent))
    made = tiny.with_lora(loaded.model)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load(cpu(gguf_file, tmp_path / "adapter"))
    assert torch.equal(again.model(input_ids=IDS).logits, made(input_ids=IDS).logits)
    assert set(again.trainable) == {key for key, value in made.named_parameters() if value.requires_grad}


def test_a_gguf_model_can_be_quantized_under_an_adapter(gguf_file, tmp_path):
    made = tiny.with_lora(load(cpu(gguf_file)).model)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = load(cpu(gguf_file, tmp_path / "adapter", quantize="4bit"))
    assert loaded.model.base_model.model.is_loaded_in_4bit
    assert all(value.any() for value in gradients(loaded).values())


def test_a_prequantized_base_keeps_its_gradients_under_an_adapter(wide_folders, tmp_path):
    quantized = load(cpu(*wide_folders, quantize="4bit")).model.unload()
    quantized.save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    loaded = load(cpu(tmp_path / "base", wide_folders[1]))
    with torch.no_grad():
        loaded.model(input_ids=IDS)
    assert all(value.any() for value in gradients(loaded).values())
    with pytest.raises(ModelError, match="is quantized.*--adapter"):
        load(cpu(tmp_path / "base"))


def test_a_base_without_gguf_package_says_how_to_get_it(gguf_file, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    with pytest.raises(ModelError, match="pip install gguf"):
        load(cpu(gguf_file))


def test_quantizing_without_an_adapter_is_a_usage_error(llama_folders):
    with pytest.raises(UsageError, match="nothing is left to explain.*--adapter"):
        load(cpu(llama_folders[0], quantize="4bit"))


def test_a_device_that_is_not_there_is_a_resource_error(llama_folders):
    missing = f"cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}"
    with pytest.raises(ResourceError, match="CUDA devices"):
        load(ModelConfig(str(llama_folders[0]), device=missing))
    for name in ("gpu", "meta", "cpu:x"):
        with pytest.raises(UsageError, match="--device"):
            resolve_device(name)
    assert resolve_device("auto").type in ("cpu", "cuda")


def test_missing_or_unusable_models_say_what_was_looked_for(tmp_path, llama_folders):
    base, adapter = llama_folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    for path, message in [
        (tmp_path / "nowhere", "no model at"),
        ("./nowhere", "no model at"),
        ("nowhere.gguf", "no file nowhere.gguf"),
        (tmp_path / "empty", "holds no model weights"),
        (tmp_path / "notes.txt", "no GGUF file"),
        (adapter, f"holds an adapter.*-m {base} -a {adapter}"),
        (base.parent, f"-m {base}"),
        ("a name with spaces", "neither a folder here nor a hub name"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(cpu(path))


def test_a_hub_name_that_is_not_cached_says_so_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not .*in the Hugging Face cache.*HF_HUB_OFFLINE forbids.*-m FOLDER"):
        load(cpu("someone/some-model"))


def test_a_cached_hub_model_loads_without_a_network(tmp_path, monkeypatch, llama_folders):
    cache = tmp_path / "models--someone--some-model"
    copy(llama_folders[0], cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load(cpu("someone/some-model"))
    assert loaded.fingerprints == load(cpu(llama_folders[0])).fingerprints
    assert loaded.model.name_or_path == "someone/some-model"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_download_takes_one_format_of_the_weights_and_no_subfolder(tmp_path, monkeypatch, llama_folders, kind):
    repository, snapshot = copy(llama_folders[0], tmp_path / "repository"), tmp_path / "snapshot"
    copy(repository, repository / "onnx")
    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model.bin"}}')
    if kind == "bin":
        (repository / "model.safetensors").unlink()

    def download(name, **patterns):
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, **patterns):
            snapshot.mkdir(exist_ok=True)
            shutil.copyfile(repository / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = load(cpu("someone/some-model"))
    assert torch.equal(loaded.model(input_ids=IDS).logits, load(cpu(repository)).model(input_ids=IDS).logits)
    weights = [file.name for file in snapshot.iterdir() if file.suffix in (".safetensors", ".bin")]
    assert weights == ["model.safetensors" if kind == "safetensors" else "pytorch_model.bin"]


def test_damaged_weights_are_reported(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    whole = load_file(base / "model.safetensors")
    save_file(
        {key: value for key, value in whole.items() if "layers.1.mlp.up" not in key},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="no weights for 1 of its tensors, such as model.layers.1.mlp.up_proj.weight"):
        load(cpu(base))
    (base / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(cpu(base))
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load(cpu(base))


def test_a_model_that_is_no_language_model_is_refused(tmp_path, tokenizer):
    config = transformers.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal language models only"):
        load(cpu(tmp_path))


def test_missing_or_unusable_adapters_say_what_was_looked_for(tmp_path, llama_folders):
    base, adapter = llama_folders
    copy(adapter, tmp_path / "several" / "one")
    copy(adapter, tmp_path / "several" / "two")
    (tmp_path / "empty").mkdir()
    bare = copy(adapter, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    for path, message in [
        (tmp_path / "nowhere", "no adapter at"),
        (tmp_path / "empty", "no adapter_config.json"),
        (tmp_path / "several", "no adapter, but holds some: one, two.*--adapter .*two"),
        (base, "whole model, not an adapter"),
        (adapter / "adapter_config.json", "is a file"),
        (bare, "not saved completely"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(cpu(base, path))


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_folders, wide_folders):
    llama, adapter = tiny_folders["llama"]
    deeper, _ = tiny.save_model(tmp_path, "llama", lora=False, num_hidden_layers=3)
    shallow, _ = tiny.save_model(tmp_path / "shallow", "llama", lora=False, num_hidden_layers=1)
    for base, message in [
        (wide_folders[0], f"does not fit.*size mismatch.*names {llama} as its base"),
        (tiny_folders["gpt2"][0], "does not fit.*q_proj"),
        (deeper, "does not fit.*it lacks .*layers.2"),
        (shallow, "does not fit.*no place for .*layers.1"),
    ]:
        with pytest.raises(ModelError, match=message):
            load(cpu(base, adapter))


def test_prompt_tuning_is_refused(tmp_path, llama_folders):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(tiny.make_model("llama"), settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="virtual tokens"):
        load(cpu(llama_folders[0], tmp_path))


def test_a_base_without_tokenizer_takes_the_adapters_own(tmp_path, llama_folders, tokenizer):
    base = copy(llama_folders[0], tmp_path / "base")
    for file in base.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load(cpu(base, llama_folders[1]))
    adapter = copy(llama_folders[1], tmp_path / "adapter")
    tokenizer.save_pretrained(adapter)
    assert load(cpu(base, adapter)).fingerprints["tokenizer"] == load(cpu(*llama_folders)).fingerprints["tokenizer"]


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    base, _ = tiny.save_model(tmp_path, "llama", lora=False, vocab_size=300)
    with pytest.raises(ModelError, match="320 tokens, the model embeddings for 300"):
        load(cpu(base))


def test_a_pad_token_without_an_embedding_does_no_harm(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    added = tiny.make_tokenizer(pad=False)
    added.add_special_tokens({"pad_token": "[PAD]"})
    added.save_pretrained(base)
    answer = generate(load(cpu(base)), "The capital of Japan", max_new_tokens=6).text
    assert (
        len(added) == 321
        and answer == generate(load(cpu(llama_folders[0])), "The capital of Japan", max_new_tokens=6).text
    )


def test_fingerprints_are_of_content_not_of_place(tmp_path, llama_folders):
    loaded = load(cpu(*llama_folders))
    base, adapter = copy(llama_folders[0], tmp_path / "moved"), copy(llama_folders[1], tmp_path / "adapter-moved")
    edit_json(base / "config.json", transformers_version="5.99.0", use_cache=True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    edit_json(
        adapter / "adapter_config.json", base_model_name_or_path="x", target_modules=settings["target_modules"][::-1]
    )
    moved = load(cpu(base, adapter, dtype="bfloat16"))
    moved.tokenizer("padded", padding="max_length", max_length=8, truncation=True)
    assert moved.fingerprints == loaded.fingerprints
    assert all(len(value) == 16 for value in loaded.fingerprints.values())
    assert load(cpu(llama_folders[0])).fingerprints["adapter"] == ""


def test_fingerprints_change_with_the_content(tmp_path, llama_folders):
    before = load(cpu(*llama_folders)).fingerprints
    base, adapter = copy(llama_folders[0], tmp_path / "base"), copy(llama_folders[1], tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3, 3] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(base / "tokenizer_config.json", eos_token="<|pad|>")
    after = load(cpu(base, adapter)).fingerprints
    assert all(before[key] != after[key] for key in ("model", "adapter", "tokenizer"))
    edit_json(adapter / "adapter_config.json", lora_alpha=99)
    edit_json(base / "config.json", rms_norm_eps=1e-4)
    again = load(cpu(base, adapter)).fingerprints
    assert again["adapter"] != after["adapter"] and again["model"] != after["model"]


def test_the_fingerprint_of_a_large_file_reads_from_all_over_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    size = 40 * 2**20
    prints = set()
    for position in (None, 0, size // 3, size - 1):
        with file.open("wb") as stream:
            stream.truncate(size)
            if position is not None:
                stream.seek(position)
                stream.write(b"x")
        prints.add(model_fingerprint(ModelFiles(tmp_path, None)))
    assert len(prints) == 4


@pytest.mark.parametrize("name", tiny.NAMES)
def test_generation_is_greedy_and_leaves_the_model_as_it_was(tiny_folders, name):
    loaded = load(cpu(*tiny_folders[name]))
    loaded.model.train()
    loaded.model.generation_config.temperature = 0.1
    loaded.model.generation_config.repetition_penalty = 5.0
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    text = "The capital of Japan"
    answer = generate(loaded, text, max_new_tokens=6).text
    assert answer == generate(loaded, text, max_new_tokens=6).text
    assert loaded.model.training and loaded.model.config.use_cache is False and loaded.trainable
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    loaded.model.eval()
    ids = loaded.tokenizer(text)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 6 and loaded.tokenizer.eos_token_id not in ids[start:]:
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer == loaded.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generation_ends_at_the_end_token_and_does_not_show_it(llama_folders):
    loaded = load(cpu(llama_folders[0]))
    first = int(loaded.model(input_ids=torch.tensor([loaded.tokenizer("Paris")["input_ids"]])).logits[0, -1].argmax())
    loaded.model.generation_config.eos_token_id = [first]
    said = generate(loaded, "Paris", max_new_tokens=50)
    assert (said.text, said.ids) == ("", [])


def test_generation_needs_no_pad_token(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    tiny.make_tokenizer(pad=False).save_pretrained(base)
    edit_json(base / "config.json", pad_token_id=None)
    answer = generate(load(cpu(base)), "The capital of Japan", max_new_tokens=6).text
    assert answer == generate(load(cpu(llama_folders[0])), "The capital of Japan", max_new_tokens=6).text


def test_special_tokens_are_added_only_when_wanted(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    tiny.make_tokenizer(bos=True).save_pretrained(base)
    loaded = load(cpu(base))
    with_bos = generate(loaded, "Paris", max_new_tokens=8).text
    assert with_bos == generate(loaded, "<|bos|>Paris", add_special_tokens=False, max_new_tokens=8).text
    assert with_bos != generate(loaded, "Paris", add_special_tokens=False, max_new_tokens=8).text


def test_generation_keeps_within_the_context(tiny_folders):
    loaded = load(cpu(tiny_folders["gpt2"][0]))
    with pytest.raises(ModelError, match="the model has 256 positions"):
        generate(loaded, "a b c " * 200)
    with pytest.raises(UsageError, match="no tokens"):
        generate(loaded, "")
    with pytest.raises(ModelError, match="the model takes 256"):
        generate(load(cpu(tiny_folders["llama"][0])), "a b c " * 200)
    nearly = loaded.tokenizer.decode(loaded.tokenizer("a b c " * 200)["input_ids"][:250])
    tokens = loaded.tokenizer(nearly)["input_ids"]
    assert len(tokens) + len(generate(loaded, nearly, max_new_tokens=100).ids) <= 256


def test_loading_is_silent_and_restores_what_was_set(llama_folders, capfd):
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    loaded = load(cpu(*llama_folders))
    generate(loaded, "Paris", max_new_tokens=2)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert (log.is_progress_bar_enabled(), log.get_verbosity()) == (bars, level)
    assert logging.getLogger("peft").level == logging.NOTSET
