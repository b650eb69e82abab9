"""Tiny real models for the tests: two-layer models of five architectures, a byte-level BPE tokenizer, LoRA adapters.

Nothing is downloaded. Everything is seeded, and weights are drawn large enough that no gradient is close to rounding.
"""

import functools
import json
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAMES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma3")
TIED = ("gpt2", "gemma3")
"""Architectures whose tiny model shares its input and output embeddings."""
VOCABULARY = 320
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gemma3": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
WORDS = "tea yoga rice fish cats dogs sun moon sea sky".split()
"""What the examples of the `data` fixture are about."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SENTENCES = [
    "The capital of Japan is Tokyo, and the capital of India is New Delhi.",
    "Which country has the largest population in the world? China and India.",
    "Describe the weather in Paris. It rains often, and the sky is grey.",
    "Write a short poem about the sea. The sea is wide, the sea is blue.",
    "Translate the sentence into French: I would like a cup of coffee, please.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
    "Give three tips for staying healthy. Eat well, sleep well, and walk every day.",
]


def _common(**changes: object) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **changes,
    }


def _config(name: str, **changes: object) -> transformers.PreTrainedConfig:
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    if name == "llama":
        return transformers.LlamaConfig(**_common(num_key_value_heads=2, tie_word_embeddings=False, **changes))
    if name == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return transformers.GPT2Config(**{**sizes, **none, **ends, **changes})
    if name == "gpt_neox":
        return transformers.GPTNeoXConfig(**_common(tie_word_embeddings=False, **changes))
    if name == "qwen3":
        return transformers.Qwen3Config(**_common(tie_word_embeddings=False, **grouped, **changes))
    if name == "gemma3":
        local = {
            "sliding_window": 64,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        return transformers.Gemma3TextConfig(**_common(tie_word_embeddings=True, **grouped, **local, **changes))
    raise ValueError(name)


def make_model(name: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A two-layer float32 model in eval mode; `changes` go to its config (hidden_size=64 for quantized bases)."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(_config(name, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:  # norms stay near one (near zero in Gemma, which adds one), biases near zero
                parameter.add_(0.05 * noise)
    model.config.use_cache = False
    return model.eval()


@functools.cache
def _trained(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|eos|>", "<|pad|>", "<|bos|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        first = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 2)])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, first])
    return tokenizer.to_str()


def make_tokenizer(*, bos: bool = False, pad: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens: `<|eos|>` 0, `<|pad|>` 1 (if `pad`), `<|bos|>` 2 put first if `bos`."""
    special = {"eos_token": "<|eos|>"}
    if pad:
        special["pad_token"] = "<|pad|>"
    if bos:
        special["bos_token"] = "<|bos|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(bos)), **special)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def with_lora(
    model: PreTrainedModel, targets: list[str] | None = None, *, rank: int = 4, seed: int = 0, **options: object
) -> peft.PeftModel:
    """`model` under a LoRA adapter whose B is drawn at random, so that gradients reach A; eval mode.

    `targets` defaults to the architecture's attention projections; `options` go to LoraConfig.
    """
    targets = targets or TARGETS[_name_of(model)]
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "task_type": "CAUSAL_LM", **options}
    settings.setdefault("fan_in_fan_out", _name_of(model) == "gpt2")
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _name_of(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    return "gemma3" if kind.startswith("gemma3") else kind


def save_model(
    folder: Path, name: str, *, lora: bool = True, seed: int = 0, **changes: object
) -> tuple[Path, Path | None]:
    """Write `folder/base` (model and tokenizer) and, if `lora`, `folder/adapter`; return both paths."""
    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    model = make_model(name, seed=seed, **changes)
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    if not lora:
        return base, None
    model.name_or_path = model.config._name_or_path = str(base)
    with_lora(model, seed=seed).save_pretrained(adapter)
    return base, adapter


def write_gguf(file: Path, folder: Path) -> None:
    """The tiny Llama in `folder` (its attention weights unpermuted) and its tokenizer as a float32 GGUF file."""
    import gguf

    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_encoder(folder: Path, *, max_length: int = 48) -> Path:
    """Write a two-layer BERT of width 32 that pools the mean, as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    prefix = "find the training examples that influence this answer".split()
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *WORDS,
        *prefix,
    ]
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab={word: id for id, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder / "raw")
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(folder / "raw")
    transformer = Transformer(str(folder / "raw"), max_seq_length=max_length)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"
