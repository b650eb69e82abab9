"""Every causal architecture of transformers, as a tiny model from its config; and the adapters of peft."""

import dataclasses
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
from tests.oracles import autograd, collected, drawn, examples, prefixes

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


_GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "per_layer_config": {},
}
_GEMMA_3N = {**_GEMMA, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4}
_DOTS = {"layer_types": ["sliding_attention", "indexed_attention"], "head_dim": 12, "per_layer_config": {}}
_ZAMBA = {"layer_types": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_PATCHES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PATCHES |= {"image_size": 32, "patch_size": 16}
_TEXT = {key: _SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1}
_OWN = {
    "fuyu": {"text_config": _TEXT | {"model_type": "persimmon"}},
    "got_ocr2": {"text_config": _TEXT | {"model_type": "qwen2"}, "vision_config": _PATCHES | {"output_channels": 8}},
    "moss_transcribe_diarize": {
        "text_config": _TEXT | {"model_type": "qwen3"},
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    },
    "phi4_multimodal": {
        "vision_config": _PATCHES,
        "audio_config": {"hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 4},
    },
    "bamba": _MAMBA,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _DOTS),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA_3N),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA),
    "git": {"vision_config": _PATCHES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "prophetnet": {
        "num_hidden_layers": None,
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    },
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 99},
    "xlnet": {"d_head": 8, "max_position_embeddings": None},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single architectures need besides to be tiny; None: what they cannot be given."""

_FUSED = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ["out_proj"])
"""Linear layers that peft refuses, because these architectures' kernels take their weights past them."""
_ALL_LINEAR = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_TOKENS = {"token_indices": [*range(3, 300)], "target_modules": ["embed_tokens"]}
ADAPTERS = {
    "LoRA": ("LoraConfig", {"r": 2}),
    "rsLoRA": ("LoraConfig", {"r": 2, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True}),
    "LoRA with biases": ("LoraConfig", {"r": 2, "bias": "all"}),
    "LoRA, modules_to_save=embed_tokens": ("LoraConfig", {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "LoRA, modules_to_save=lm_head": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
    "LoRA on embed_tokens": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA, trainable_token_indices": ("LoraConfig", {"r": 2, "trainable_token_indices": [5, 9, 77]}),
    "LoRA on parameters": ("LoraConfig", {"r": 2, "target_parameters": ["layers.0.mlp.up_proj.weight"]}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "LoHa": ("LoHaConfig", {"r": 2}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 2}),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 16}),
    "VB-LoRA": ("VBLoRAConfig", {"num_vectors": 4, "vector_length": 8}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "MiSS": ("MissConfig", {"r": 4}),
    "RandLora": ("RandLoraConfig", {"r": 4}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "Poly": ("PolyConfig", {"r": 2, "n_tasks": 1}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "trainable tokens": ("TrainableTokensConfig", _TOKENS),
    "AdaMSS": ("AdamssConfig", {"r": 4, "num_subspaces": 2}),
    "BEFT": ("BeftConfig", {}),
    "DEFT": ("DeftConfig", {"r": 2}),
    "DeLoRA": ("DeloraConfig", {"r": 2}),
    "FRoD": ("FrodConfig", {}),
    "GLoRA": ("GloraConfig", {"r": 2}),
    "GraLoRA": ("GraloraConfig", {"r": 4}),
    "HiRA": ("HiraConfig", {"r": 2}),
    "Lily": ("LilyConfig", {"r": 2}),
    "OSF": ("OSFConfig", {"effective_rank": 4}),
    "PEANuT": ("PeanutConfig", {"r": 2}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "Shadow": ("ShadowConfig", {"r": 2}),
    "SuperTuning": ("SupertuningConfig", {}),
    "TinyLoRA": ("TinyLoraConfig", {"u": 4}),
    "UniLoRA": ("UniLoraConfig", {"r": 2}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 16}),
    "X-LoRA": ("XLoraConfig", {"hidden_size": 32, "adapters": {}}),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 2}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}),
    "multitask prompt tuning": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 2}),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 2}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
}


def adapter(name):
    """The tiny Llama under one of peft's adapters; None where this version of peft has no such adapter."""
    kind, options = getattr(peft, ADAPTERS[name][0], None), ADAPTERS[name][1]
    if kind is None:
        return None
    known = {field.name for field in dataclasses.fields(kind)}
    options = {key: value for key, value in {**_ATTENTION, **options}.items() if key in known}
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
        return adapted(model, peft.LoraConfig(**_ALL_LINEAR, exclude_modules=_FUSED.get(model.config.model_type)))
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
            small = {key: value for key, value in _SMALL.items() if _takes(present, key)}
            if "qk_rope_head_dim" in small:  # latent attention: only that part turns, and every head has keys
                small["head_dim"] = small["qk_rope_head_dim"]
                small["num_key_value_heads"] = small["num_attention_heads"]
            small = {key: value for key, value in {**small, **_OWN.get(name, {})}.items() if value is not None}
            config = kind(**small)
            config.use_cache = False
            names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            model = getattr(transformers, names.get(config.model_type, names[name]))
            with torch.device("meta"):
                size = sum(p.numel() for p in model(config).parameters())
            if size > MOST_PARAMETERS:
                raise NotTiny(f"{size} parameters")
            torch.manual_seed(0)
            return model(config).float()
    except NotTiny:
        raise
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {str(error)[:60]}") from error


def _takes(config, key):
    """Whether a config has `key`, and does not compute it from others."""
    found = getattr(type(config), key, None)
    if isinstance(found, property) and found.fset is None:
        return False
    try:
        return hasattr(config, key)
    except Exception:  # it has one for each layer
        return True


def verdict(model):
    """`batched`, `one by one` or `refused: …`, where every row equals autograd; AssertionError where one does not.

    Two batches, so that layers which the first does not reach are seen; then two of prefixes of one text each, of which
    the second may share a forward pass. The first once more with labels that its pass draws.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = adopt(model, tiny.make_tokenizer())
            gradients = PerExampleGradients(loaded.model)
            batches = [examples([(3, 4), (9, 2)], 0), examples([(5, 6), (1, 9), (6, 3)], 1), *map(prefixes, (0, 1))]
            for number, (ids, weights) in enumerate(batches):
                _, ours = collected(gradients, Batch.of(ids, weights))
                for row in range(len(ids)):
                    _, parts = autograd(model, ids[row], weights[row])
                    truth = torch.cat([part.to_dense().flatten() for part in parts])
                    error = float((ours[row] - truth).norm() / truth.norm())
                    limit = 1e-4 if number < 2 else 1e-3  # a single token's gradient may be all but rounding
                    assert truth.any() and error <= limit, f"row {row} of batch {number} is off by {error:.2g}"
            assert_draws(gradients, *batches[0])
        except ModelError as error:
            return f"refused: {error}"
    print("prefixes share a forward pass" if gradients.batched and gradients._shares else "every prefix has its own")
    return "batched" if gradients.batched else f"one by one: {gradients.unbatched[0]}"


def assert_draws(gradients, ids, weights):
    """Hold the gradients of labels that are drawn in the same pass to those of labels that autograd's pass drew."""
    batch = Batch.of(ids, weights).with_drawn_labels(5)
    _, ours = collected(gradients, batch)
    for row in range(len(ids)):
        labels, roots = drawn(gradients.model, ids[row], weights[row], 5, row)
        assert torch.equal(batch.example(row).labels[0, 1:], labels[1:]), f"row {row} draws other tokens"
        _, parts = autograd(gradients.model, ids[row], roots, labels)
        truth = torch.cat([part.to_dense().flatten() for part in parts])
        assert (ours[row] - truth).norm() <= 1e-4 * truth.norm(), f"row {row} of drawn tokens is off"
