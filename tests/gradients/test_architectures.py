"""Every causal architecture that can be made tiny, and every adapter of peft, against autograd.

`pytest -m slow tests/gradients/test_architectures.py -rA` shows the table: batched, one by one, refused, or not tiny.
"""

import random

import pytest

from tests.gradients import zoo

DRAWN = random.Random(43).sample(zoo.ARCHITECTURES, 12)
WITHOUT_A_RULE = ("DoRA", "LoRA on embed_tokens", "LoRA, trainable_token_indices", "SHiRA", "trainable tokens")


def judge(name, way):
    try:
        found = zoo.verdict(zoo.architecture(name, way))
    except zoo.NotTiny as reason:
        pytest.skip(f"{name} is not made tiny: {reason}")
    print(f"{name}, {way}: {found}")
    return found


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", DRAWN)
def test_some_architectures_equal_autograd_or_are_refused(name, way):
    judge(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_equals_autograd_or_is_refused(name, way):
    judge(name, way)


@pytest.mark.parametrize("name", zoo.ADAPTERS)
def test_every_adapter_equals_autograd_or_is_refused(name):
    model = zoo.adapter(name)
    if model is None:
        pytest.skip("this peft has no such adapter")
    found = zoo.verdict(model)
    print(f"{name}: {found}")
    assert found.startswith("refused") == (name in ("Poly", "prompt tuning")), found
    assert not (name in WITHOUT_A_RULE and found == "batched")
    assert found == "batched" or not name.startswith(("LoRA, modules_to_save", "LN", "rsLoRA", "LoRA with"))


@pytest.mark.parametrize("name", ["opt", "qwen2_moe", "ctrl", "gpt_oss"])
def test_flattened_tokens_and_embeddings_scaled_in_place_are_batched_under_lora(name):
    assert judge(name, "lora") == "batched"


@pytest.mark.parametrize("name", ["opt", "bart", "blenderbot"])
def test_learned_positions_are_batched_whatever_they_are_looked_up_with(name):
    assert judge(name, "full") == "batched"


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "youtu"])
def test_latent_attention_is_batched(name):
    assert judge(name, "full") == judge(name, "lora") == "batched"
