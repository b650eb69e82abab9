"""Every causal architecture that can be made tiny, and every adapter of peft: autograd, and docs/architectures.md.

`pytest -m slow tests/gradients/test_architectures.py -rA` shows what was seen: batched, one by one, refused and why.
"""

import random
import re
from pathlib import Path

import peft
import pytest
import transformers

from tests.gradients import zoo

ROOT = Path(__file__).parents[2]
DRAWN = random.Random(43).sample(zoo.ARCHITECTURES, 12)
TOLD = ["opt", "qwen2_moe", "ctrl", "gpt_oss", "bart", "blenderbot", "deepseek_v3", "minicpm3", "youtu"]
"""Flattened tokens, embeddings scaled in place, positions looked up otherwise, latent attention: each has a rule."""
CONSTRAINTS = (ROOT / "scripts/constraints.txt").read_text().splitlines()
AS_PINNED = {f"{kind.__name__}=={kind.__version__}" for kind in (transformers, peft)} <= set(CONSTRAINTS)


def listed(section):
    """The outcomes that the page gives each name in a section: of all parameters and of LoRA, or of the adapter."""
    text = (ROOT / "docs/architectures.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(name, outcomes) for *outcomes, names, _ in rows for name in re.findall(r"`([^`]+)`", names)]


ARCHITECTURES, ADAPTERS = dict(listed("Architectures")), dict(listed("Adapters"))


def judge(name, way):
    try:
        found = zoo.verdict(zoo.architecture(name, way))
    except zoo.NotTiny as reason:
        found = f"not tried: {reason}"
    print(f"{name}, {way}: {found}")
    if AS_PINNED:
        assert found.partition(":")[0] == ARCHITECTURES[name][["full", "lora"].index(way)], found


@pytest.mark.skipif(not AS_PINNED, reason="other versions of transformers or peft may know other names")
def test_the_page_lists_every_architecture_and_every_kind_of_adapter_once():
    assert sorted(name for name, _ in listed("Architectures")) == zoo.ARCHITECTURES
    assert sorted(name for name, _ in listed("Adapters")) == sorted(zoo.ADAPTERS)
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert {kinds[kind].__name__ for kind in peft.PeftType} == {kind for kind, _ in zoo.ADAPTERS.values()}


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", [*DRAWN, *(name for name in TOLD if name not in DRAWN)])
def test_some_architectures_equal_autograd_and_do_as_the_page_says(name, way):
    judge(name, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_equals_autograd_and_does_as_the_page_says(name, way):
    judge(name, way)


@pytest.mark.parametrize("name", zoo.ADAPTERS)
def test_every_adapter_equals_autograd_and_does_as_the_page_says(name):
    model = zoo.adapter(name)
    if model is None:
        pytest.skip("this peft has no such adapter")
    found = zoo.verdict(model)
    print(f"{name}: {found}")
    if AS_PINNED:
        assert [found.partition(":")[0]] == ADAPTERS[name], found
