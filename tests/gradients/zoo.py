"""Every causal architecture of transformers, as a tiny model from its config; and the adapters of peft."""

import warnings

import peft
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rapidindex.errors import ModelError
from rapidindex.gradients.losses import Batch
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.model.model import adopt
from tests import tiny
from tests.oracles import autograd, collected, examples

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 6_000_000
_SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "moe_intermediate_size", "n_inner"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_nope_head_dim", "v_head_dim", "d_kv"), 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout"), 0.0),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    "vocab_size": tiny.VOCABULARY,
    "pad_token_id": 1,
    "encoder_attention_heads": 4,
    "is_decoder": True,
    "add_cross_attention": False,
    "use_cache": False,
}


_ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_TOKENS = {"token_indices": [*range(3, 300)], "target_modules": ["embed_tokens"]}
ADAPTERS = {
    "LoRA": (peft.LoraConfig, {"r": 2}),
    "rsLoRA": (peft.LoraConfig, {"r": 2, "use_rslora": True}),
    "DoRA": (peft.LoraConfig, {"r": 2, "use_dora": True}),
    "LoRA with biases": (peft.LoraConfig, {"r": 2, "bias": "all"}),
    "LoRA, modules_to_save=embed_tokens": (peft.LoraConfig, {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "LoRA, modules_to_save=lm_head": (peft.LoraConfig, {"r": 2, "modules_to_save": ["lm_head"]}),
    "LoRA on embed_tokens": (peft.LoraConfig, {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA, trainable_token_indices": (peft.LoraConfig, {"r": 2, "trainable_token_indices": [5, 9, 77]}),
    "LoRA on parameters": (peft.LoraConfig, {"r": 2, "target_parameters": ["layers.0.mlp.up_proj.weight"]}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10}),
    "LoHa": (peft.LoHaConfig, {"r": 2}),
    "LoKr": (peft.LoKrConfig, {"r": 2}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 4}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}),
    "HRA": (peft.HRAConfig, {"r": 2}),
    "VeRA": (peft.VeraConfig, {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 16}),
    "VB-LoRA": (peft.VBLoRAConfig, {"num_vectors": 4, "vector_length": 8}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "LN tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "Bone": (getattr(peft, "BoneConfig", None), {"r": 4}),
    "MiSS": (getattr(peft, "MissConfig", None), {"r": 4}),
    "RandLora": (getattr(peft, "RandLoraConfig", None), {"r": 4}),
    "SHiRA": (getattr(peft, "ShiraConfig", None), {"r": 2}),
    "Poly": (peft.PolyConfig, {"r": 2, "n_tasks": 1}),
    "C3A": (getattr(peft, "C3AConfig", None), {"block_size": 8}),
    "trainable tokens": (
        peft.TrainableTokensConfig,
        _TOKENS,
    ),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 2, "target_modules": None}),
}


def adapter(name):
    """The tiny Llama under one of peft's adapters; None where this version of peft has no such adapter."""
    kind, options = ADAPTERS[name]
    if kind is None:
        return None
    options = {key: value for key, value in {**_ATTENTION, **options}.items() if value is not None}
    return adapted(tiny.make_model("llama"), kind(**options))


class NotTiny(Exception):
    """A config that cannot be made tiny; says why."""


def architecture(name, way):
    """A tiny model of `name`, all of it trainable (`full`) or under LoRA on all linear layers (`lora`)."""
    model = _tiny(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.05 * noise)
    if way == "full":
        return model.eval()
    try:
        return adapted(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    except Exception as error:
        raise NotTiny(f"peft: {type(error).__name__}: {str(error)[:60]}") from error


def adapted(model, config):
    """`model` under an adapter, drawn at random so that a gradient reaches all of it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point() and not parameter.is_sparse:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def _tiny(name):
    kind = CONFIG_MAPPING[name]
    own = getattr(kind, "sub_configs", {}).get("text_config")
    kind = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedConfig) else kind
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            present = kind()
            small = {key: value for key, value in _SMALL.items() if hasattr(present, key)}
            if "qk_rope_head_dim" in small:  # latent attention: only that part turns, and every head has keys
                small["head_dim"] = small["qk_rope_head_dim"]
                small["num_key_value_heads"] = small["num_attention_heads"]
            config = kind(**small)
            config.use_cache = False
            with torch.device("meta"):
                size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise NotTiny(f"{size} parameters")
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except NotTiny:
        raise
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {str(error)[:60]}") from error


def verdict(model):
    """`batched`, `one by one` or `refused: …`, where every row equals autograd; AssertionError where one does not.

    Two batches, so that layers which the first does not reach are seen.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = adopt(model, tiny.make_tokenizer())
            gradients = PerExampleGradients(loaded.model)
            for seed, lengths in enumerate(([(3, 4), (9, 2)], [(5, 6), (1, 9), (6, 3)])):
                ids, weights = examples(lengths, seed)
                _, ours = collected(gradients, Batch.of(ids, weights))
                for row in range(len(ids)):
                    _, parts = autograd(model, ids[row], weights[row])
                    truth = torch.cat([part.to_dense().flatten() for part in parts])
                    error = float((ours[row] - truth).norm() / truth.norm())
                    assert truth.any() and error <= 1e-4, f"row {row} of batch {seed} is off by {error:.2g}"
        except ModelError as error:
            return f"refused: {error}"
    return "batched" if gradients.batched else f"one by one: {gradients.unbatched[0]}"
