"""Models and adapters that would give wrong gradients, or run code of their own, are refused before anything else."""

import builtins
import json
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rapidindex import BuildRequest, Index, build
from rapidindex.caching.estimate import estimate
from rapidindex.config import EncodingConfig, FinetuneConfig, SketchConfig
from rapidindex.data.examples import read_examples
from rapidindex.errors import ModelError, ResourceError
from rapidindex.model.finetune import finetune
from rapidindex.model.loading import translate_errors
from rapidindex.model.model import adopt, generate, load
from tests import tiny
from tests.model.test_model import IDS, copy, cpu, edit_json

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
import transformers
class Config(transformers.LlamaConfig): model_type = "strange"
class Model(transformers.LlamaForCausalLM): config_class = Config
class Tokenizer(transformers.PreTrainedTokenizerFast): pass
"""
FILES = {"config": "config.json", "tokenizer": "tokenizer_config.json"}
STRANGE = {"config": {"model_type": "strange"}, "tokenizer": {"tokenizer_class": "Tokenizer"}}


def with_code(folder: Path, marker: Path) -> Path:
    """Let config and tokenizer of the model in `folder` name classes in a file there, which writes `marker`."""
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    edit_json(folder / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]})
    return folder


@pytest.fixture
def no_prompt(monkeypatch):
    """Whoever is asked says yes."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    yield
    assert not asked


@pytest.mark.usefixtures("no_prompt")
def test_code_in_a_models_folder_never_runs(tmp_path, llama_folders, capfd):
    marker = tmp_path / "marker"
    model = with_code(copy(llama_folders[0], tmp_path / "model"), marker)
    assert load(cpu(model)).trainable  # transformers has a Llama of its own
    for part, file in FILES.items():
        edit_json(model / file, **STRANGE[part])
    started = time.monotonic()
    for folder, adapter in ((model, None), (model, llama_folders[1])):
        with pytest.raises(ModelError, match="program code.*never runs"):
            load(cpu(folder, adapter))
    assert time.monotonic() - started < 5 and not marker.exists()
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("no_prompt")
@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_config_or_a_tokenizer_alone_never_runs(tmp_path, llama_folders, part):
    marker = tmp_path / "marker"
    model = with_code(copy(llama_folders[0], tmp_path / "model"), marker)
    shutil.copy(llama_folders[0] / FILES["tokenizer" if part == "config" else "config"], model)
    edit_json(model / FILES[part], **STRANGE[part])
    with pytest.raises(ModelError, match="program code.*never runs"):
        load(cpu(model))
    assert not marker.exists()


@pytest.mark.usefixtures("no_prompt")
def test_a_way_of_generating_that_a_folder_holds_never_runs(tmp_path, llama_folders):
    marker, model = tmp_path / "marker", copy(llama_folders[0], tmp_path / "model")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    assert generate(load(cpu(model)), "Paris", max_new_tokens=2) and not marker.exists()


def bert(folder: Path, **changes: object) -> Path:
    """Write a tiny BERT with its language model head, drawn as BERT is before training."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=tiny.VOCABULARY, **sizes, **changes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_reads_later_tokens_is_refused(tmp_path, llama_folders, tokenizer, dtype):
    llama = copy(llama_folders[0], tmp_path / "llama")
    edit_json(llama / "config.json", is_causal=False)
    folders = [llama, bert(tmp_path / "bert")] if dtype == "float32" else [llama]
    for folder in folders:
        with pytest.raises(ModelError, match=f"{folder} is no causal language model: a token changes"):
            load(cpu(folder, dtype=dtype))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        with pytest.raises(ModelError, match="no causal language model"):
            adopt(model.train(), tokenizer)


def test_a_bert_that_is_a_decoder_is_causal(tmp_path):
    assert load(cpu(bert(tmp_path, is_decoder=True))).trainable


def test_finetune_refuses_a_model_that_is_not_causal_before_it_trains(tmp_path, data):
    options = FinetuneConfig(target_modules="query")
    with pytest.raises(ModelError, match="no causal language model"):
        finetune(read_examples(data), EncodingConfig(), cpu(bert(tmp_path / "bert")), options, tmp_path / "adapter")


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_rounding_does_not_pass_for_reading_later_tokens(wide_folders, quantize):
    for dtype in ("float32", "bfloat16"):
        assert load(cpu(*wide_folders, quantize=quantize, dtype=dtype)).trainable


def adapter(folder: Path, base: Path, **options: object) -> peft.PeftModel:
    """Write to `folder` a LoRA adapter over the tiny Llama in `base`, made with these options and trained a little."""
    model = tiny.make_model("llama")
    model.name_or_path = str(base)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn_like(value))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.mark.filterwarnings("ignore:.*eva")
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"])
def test_an_adapter_is_the_same_however_often_it_is_loaded(tmp_path, llama_folders, start):
    made = adapter(tmp_path / "adapter", llama_folders[0], init_lora_weights=start)
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = load(cpu(llama_folders[0], tmp_path / "adapter"))
        assert torch.equal(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits)


def test_an_adapter_that_changes_its_base_by_chance_is_refused_until_it_is_converted(tmp_path, llama_folders):
    base, start, saved = llama_folders[0], tmp_path / "start", tmp_path / "adapter"
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(tiny.make_model("llama"), peft.LoraConfig(init_lora_weights="pissa_niter_4", **settings))
    made.peft_config["default"].init_lora_weights = True  # what peft's own example does
    made.save_pretrained(start)
    made.peft_config["default"].init_lora_weights = "pissa_niter_4"
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.05 * torch.randn_like(value) * value.requires_grad)
    made.save_pretrained(saved)
    with pytest.raises(ModelError, match="changes the weights of its base.*path_initial_model_for_weight_conversion"):
        load(cpu(base, saved))
    made.eval().save_pretrained(saved, path_initial_model_for_weight_conversion=str(start))
    loaded = load(cpu(base, saved))
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, made(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_the_model_has_no_place_for_are_named(tmp_path, llama_folders):
    for key, extra in {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(32),
        "model.layers.2.mlp.up_proj.weight": torch.ones(64, 32),
    }.items():
        base = copy(llama_folders[0], tmp_path / key)
        weights = load_file(base / "model.safetensors") | {key: extra}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"has no place for 1 of the tensors.*{key}.*config.json"):
            load(cpu(base))
    torch.manual_seed(0)
    config = tiny.make_model("llama").config
    config.tie_word_embeddings = True  # so that nothing is missing
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny.make_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"no place for 1 of the tensors.*score\.weight"):
        load(cpu(tmp_path / "classifier"))


def test_weights_that_transformers_itself_leaves_out_do_no_harm(tmp_path, tiny_folders):
    base = copy(tiny_folders["gpt2"][0], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 256, 256)  # the causal mask, of older versions
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert load(cpu(base)).fingerprints


@pytest.mark.parametrize(("saved", "asked"), [("4bit", "8bit"), ("8bit", "4bit")])
def test_a_base_saved_in_other_bits_than_those_asked_for_is_refused(tmp_path, wide_folders, saved, asked):
    load(cpu(*wide_folders, quantize=saved)).model.unload().save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=f"was saved in {saved}.*Leave --quantize out"):
        load(cpu(tmp_path / "base", wide_folders[1], quantize=asked))
    assert load(cpu(tmp_path / "base", wide_folders[1], quantize=saved)).trainable


@pytest.fixture
def added(tmp_path, llama_folders) -> Path:
    """The tiny Llama with a token in its tokenizer that its embeddings have no row for."""
    base = copy(llama_folders[0], tmp_path / "added")
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(base)
    return base


def use(stage: str, base: Path, rows: list[dict], folder: Path, prompt: str) -> None:
    """Give rows, or a prompt, to the model by one of the ways in."""
    encoding, sketch = EncodingConfig("plain", 512), SketchConfig(K=1024)
    if stage == "finetune":
        finetune(read_examples(rows), encoding, cpu(base), FinetuneConfig(), folder / "adapter")
    elif stage in ("query", "own answer"):
        harmless = [{"prompt": "What is tea?", "response": "A drink."}]
        build(BuildRequest(harmless, folder / "index", cpu(base), encoding, sketch=sketch))
        answer = {"answer": "It is nice."} if stage == "query" else {}
        Index.open(folder / "index", device="cpu").query(prompt, **answer)
    else:
        run = {"build": build, "dry run": estimate}[stage]
        run(BuildRequest(rows, folder / "index", cpu(base), encoding, sketch=sketch))


STAGES = ["build", "dry run", "finetune", "query", "own answer"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_token_without_an_embedding_is_named(tmp_path, added, stage):
    rows = [{"prompt": "What is tea?", "response": "A drink."}, {"prompt": "Use <|tool|> now", "response": "Yes."}]
    where = "line 2" if stage in ("build", "dry run", "finetune") else "the prompt|prompt and answer"
    with pytest.raises(ModelError, match=f"'<|tool|>' in ({where}).* 321th, .* for 320.*resize_token_embeddings"):
        use(stage, added, rows, tmp_path, "Use <|tool|> now")


@pytest.mark.parametrize("stage", STAGES)
def test_more_tokens_than_a_model_has_positions_are_refused(tmp_path, tiny_folders, stage):
    long = "a b c d " * 60
    rows = [{"prompt": "What is tea?", "response": "A drink."}, {"prompt": "Go on.", "response": long}]
    with pytest.raises(ModelError, match=r"tokens in (line 2|the prompt|prompt and answer).* 256 positions.*--max-len"):
        use(stage, tiny_folders["gpt2"][0], rows, tmp_path, long)


def test_a_model_that_computes_its_positions_has_no_limit(tiny_folders):
    assert [name for name in tiny.NAMES if load(cpu(tiny_folders[name][0])).limits.positions] == ["gpt2"]
    opt = transformers.OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    loaded = adopt(transformers.AutoModelForCausalLM.from_config(opt), tiny.make_tokenizer())
    assert loaded.limits.positions == 64 and loaded.model(input_ids=torch.full((1, 64), 5)).logits.shape == (1, 64, 320)
    with pytest.raises(IndexError):
        loaded.model(input_ids=torch.full((1, 65), 5))


def test_too_little_memory_of_the_computer_is_a_resource_error():
    with pytest.raises(ResourceError, match="does not fit into the memory of cpu.*--dtype bfloat16"):
        with translate_errors(cpu(Path("large"))):
            torch.empty(2**60)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga"])
def test_an_adapter_whose_base_cannot_be_made_again_is_refused(tmp_path, llama_folders, start):
    folder = tmp_path / "adapter"
    made = adapter(folder, llama_folders[0])
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"init_lora_weights": start, "loftq_config": {"loftq_bits": 4}}
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"{start}.*path_initial_model_for_weight_conversion"):
        load(cpu(llama_folders[0], folder))
    file.write_text(json.dumps(settings | {"init_lora_weights": True, "loftq_config": {}}))
    assert torch.equal(load(cpu(llama_folders[0], folder)).model(input_ids=IDS).logits, made(input_ids=IDS).logits)


def test_a_tensor_of_another_shape_than_the_configs_is_named(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    weights = load_file(base / "model.safetensors") | {"model.norm.weight": torch.ones(16)}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight as \[16\], and its config\.json makes it \[32\]"):
        load(cpu(base))


def test_weights_that_are_not_numbers_are_named(tmp_path, llama_folders):
    base = copy(llama_folders[0], tmp_path / "base")
    adapter = copy(llama_folders[1], tmp_path / "adapter")
    for file, given in (
        (adapter / "adapter_model.safetensors", (llama_folders[0], adapter)),
        (base / "model.safetensors", (base, llama_folders[1])),
    ):
        weights = load_file(file)
        spoilt = next(name for name in weights if "layers.1" in name and "q_proj" in name)
        weights[spoilt][0, 0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj.* that are not finite numbers"):
            load(cpu(*given))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj.* that are not finite numbers"):
        finetune(
            read_examples([{"prompt": "a", "response": "b"}]),
            EncodingConfig(),
            cpu(base),
            FinetuneConfig(),
            tmp_path / "out",
        )
