"""What large models take of memory, by the arithmetic with which `rapidindex build` refuses what does not fit.

    python -m bench.memory        about a minute on an idle machine; 4 GB of memory

The model is built from its public shape without weights, which gives parameters and layers. What its forward pass keeps
is counted on one and on two of its layers, at their full width, and goes on from there layer by
layer; SmolLM2's shape, small enough to be counted whole, shows how far that may be trusted. All else is `room.py`'s.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.common import save
from rapidindex.caching.batches import Item
from rapidindex.caching.estimate import Activations, estimate_resources, measure_activations, model_bytes
from rapidindex.caching.job import Job
from rapidindex.config import BuildConfig, BuildRequest, ModelConfig
from rapidindex.data.examples import Dataset, Example
from rapidindex.data.templates import Encoding
from rapidindex.gradients.per_example import PerExampleGradients
from rapidindex.model.model import LoadedModel

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "Llama-2-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
}
NF4 = 0.5 + 4 / 64
"""Bytes of a weight in NF4: four bits, and a float32 scale for each 64 weights."""
LENGTHS = (512, 256, 128, 64)
"""Tokens of the examples of which batches are made; half of each are the response."""
ROWS = 52_002
"""Those of Alpaca: as many as the paper caches."""


@dataclass(frozen=True)
class Case:
    """A model and how it is held."""

    shape: str
    trained: str
    """`all parameters`, `LoRA` or `QLoRA`: rank 16 on q, k, v and o."""
    dtype: str
    batch_tokens: int = 1024


CASES = (
    Case("SmolLM2-135M", "LoRA", "float32"),
    Case("SmolLM2-135M", "all parameters", "float32"),
    Case("Llama-2-7B", "LoRA", "bfloat16"),
    Case("Llama-2-7B", "QLoRA", "bfloat16"),
    Case("Llama-2-7B", "all parameters", "float32"),
    Case("Llama-2-7B", "all parameters", "bfloat16"),
    Case("Llama-2-7B", "all parameters", "bfloat16", batch_tokens=64),
    Case("Llama-2-70B", "QLoRA", "bfloat16"),
)


def main() -> None:
    """Write bench/results/memory.json, and print each case's parts."""
    found = [{**asdict(case), **parts_of(case)} for case in CASES]
    for case in found:
        print(case["shape"], case["trained"], case["dtype"], f"{sum(case['bytes'].values()) / 2**30:,.1f} GiB")
        for part, size in case["bytes"].items():
            print(f"    {part:24}{size / 2**30:10.2f} GiB")
    save("memory", {"cases": found, "counted": [layer_by_layer(dtype) for dtype in ("float32", "bfloat16")]})


def parts_of(case: Case) -> dict:
    """Bytes by part of a build on one device, and what its forward pass keeps of a token in a layer."""
    kept, one_layer = activations(case)
    model = build(case, SHAPES[case.shape], "meta")
    held = model_bytes(model)
    if case.trained == "QLoRA":
        weights = [module.weight for module in quantized(model)]
        held -= int(sum(weight.numel() * (weight.element_size() - NF4) for weight in weights))
        dequantized = max(weight.numel() * weight.element_size() for weight in weights)
        kept = replace(kept, constant=kept.constant + dequantized)
    job = job_of(case, model)
    room = estimate_resources(job, job.plan("sentence", job.items), 1, kept)
    return {
        "entries": job.size,
        "activation_bytes_a_token_and_layer": one_layer,
        "activations": asdict(kept),
        "largest_layer": max(layer.size for layer in job.layers),
        "bytes": {"model": held, **room.memory},
        "disk": room.disk,
    }


def activations(case: Case) -> tuple[Activations, float]:
    """Of all layers, from one layer and from two; and bytes of a token in one more layer."""
    config = SHAPES[case.shape]
    one, two = (asdict(counted(case, layers)) for layers in (1, 2))
    each = {name: two[name] - one[name] for name in one}
    all_layers = {name: one[name] + (config.num_hidden_layers - 1) * each[name] for name in one}
    return Activations(**all_layers), each["linear"]


def counted(case: Case, layers: int) -> Activations:
    """What so many layers of a model keep."""
    config = LlamaConfig(**{**SHAPES[case.shape].to_diff_dict(), "num_hidden_layers": layers})
    return measure_activations(PerExampleGradients(build(case, config, "cpu")))


def layer_by_layer(dtype: str) -> dict:
    """Activations of SmolLM2's shape told from one and two layers, and counted on all thirty."""
    case = Case("SmolLM2-135M", "LoRA", dtype)
    whole = counted(case, SHAPES[case.shape].num_hidden_layers)
    return {**asdict(case), "told": activations(case)[0].of(4, 256), "counted": whole.of(4, 256)}


def build(case: Case, config: LlamaConfig, device: str) -> torch.nn.Module:
    """The model, its weights whatever the memory holds: memory that is not written to is hardly taken."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).eval()
        if case.trained != "all parameters":
            options = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
            model = get_peft_model(model, options).eval()
    return model if device == "meta" else model.to_empty(device=device)


def quantized(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The linear layers that quantizing takes: those of the base but for its output layer."""
    head = model.get_output_embeddings()
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [module for name, module in found if module is not head and "lora_" not in name]


def job_of(case: Case, model: torch.nn.Module) -> Job:
    """A build of that model over examples of each length."""
    items = [item for length in LENGTHS for item in examples(length, ROWS // len(LENGTHS))]
    config = ModelConfig(case.shape, "adapter" if case.trained != "all parameters" else None, dtype=case.dtype)
    request = BuildRequest("data", "index", config, work=BuildConfig(batch_tokens=case.batch_tokens))
    loaded = LoadedModel(model, None, config, {}, torch.device("cpu"))
    gradients = PerExampleGradients(model)
    dataset = Dataset("data", [], [], "")
    return Job(request, dataset, loaded, gradients, gradients.layers, items, [], {}, loaded.device)


def examples(length: int, count: int) -> list[Item]:
    """So many examples of a length."""
    mask = np.arange(length) >= length // 2
    encoding = Encoding(np.zeros(length, np.int32), mask, [], False, length // 2)
    text = "x" * (2 * length)
    made = (Example(f"{length:08x}{number:08x}", text, text, {}, number, (("user", text),)) for number in range(count))
    return [Item(example, encoding) for example in made]


if __name__ == "__main__":
    main()
