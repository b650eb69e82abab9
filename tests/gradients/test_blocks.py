import pytest

from rapidindex.gradients.blocks import blocks_of
from rapidindex.gradients.losses import layers_of
from tests import tiny
from tests.gradients import zoo
from tests.oracles import make

LLAMA = ["self_attn.q_proj.weight", "self_attn.o_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight"]


def llama(depth, parts=LLAMA):
    inner = [f"model.layers.{number}.{part}" for number in range(depth) for part in parts]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


def test_thirty_layers_make_the_papers_sixteen_blocks():
    names = llama(30)
    blocks = blocks_of(names)
    block = dict(zip(names, (blocks.names[number] for number in blocks.of), strict=True))
    assert len(blocks) == 16 and set(blocks.of) == set(range(16))
    assert block["model.layers.0.self_attn.q_proj.weight"] == "layers 0-3, attention"
    assert block["model.layers.29.self_attn.o_proj.bias"] == "layers 27-29, attention"
    assert block["model.layers.0.input_layernorm.weight"] == block["model.embed_tokens.weight"] == "layers 0-3, rest"
    assert block["lm_head.weight"] == block["model.norm.weight"] == "layers 27-29, rest"


@pytest.mark.parametrize(("depth", "groups"), [(1, 1), (2, 2), (3, 2), (6, 4), (7, 4), (8, 8), (12, 8), (80, 8)])
def test_the_number_of_blocks_is_a_power_of_two_and_none_is_empty(depth, groups):
    blocks = blocks_of(llama(depth))
    assert len(blocks) == 2 * groups and set(blocks.of) == set(range(2 * groups))


def test_attention_alone_has_a_block_for_each_eighth():
    names = [f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.default.weight" for n in range(30)]
    assert len(blocks_of(names)) == 8


def test_names_without_numbers_make_one_block():
    assert blocks_of(["embedding.weight", "head.bias"]).of == (0, 0)


def test_slices_share_a_row_equally():
    slices = blocks_of(llama(30)).slices(65_536)
    assert [part.stop - part.start for part in slices.values()] == [4096] * 16
    assert next(iter(slices.values())).start == 0 and [*slices.values()][-1].stop == 65_536


@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_layer_of_a_real_model_is_in_a_block(name, way):
    names = [layer.name for layer in layers_of(make(name, way))]
    blocks = blocks_of(names)
    assert len(blocks.of) == len(names) and set(blocks.of) == set(range(len(blocks)))
    assert len(blocks) == (4 if way == "full" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_fills_its_blocks(name):
    try:
        model = zoo.architecture(name, "full")
    except zoo.NotTiny as reason:
        pytest.skip(str(reason))
    blocks = blocks_of([layer.name for layer in layers_of(model)])
    assert len(blocks) in (1, 2, 4) and set(blocks.of) == set(range(len(blocks)))
