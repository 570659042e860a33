"""The paper's numbers of trained weights, exactly: on DiT-XL/2 with 101 classes, LLaMA-2 and ViT-L."""

import functools
from copy import deepcopy

import pytest
import torch
from torch import nn

from onelora_diffusion import AdapterConfig, count_trainable, inject_adapter, trainable_parts

# Table S8 counts one linear layer for q, k and v; diffusers' DiT has three.
DIT_XL_2 = {
    "1lora": (603_680, 603_680),
    "bitfit": (603_680, 603_680),
    "difffit": (1_089_856, 1_089_856),
    "lora": (864_032, 928_544),
    "dora": (1_350_208, 1_414_720),
    "vera": (603_822, 603_878),  # b and, of rank 1, one number a layer: 603,680 + 142 (or 198) linear layers
    "mora1": (604_412, 604_048),
    "mora6": (596_516, 599_428),
}


@functools.cache
def dit_xl_2():
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        return DiTTransformer2DModel(out_channels=8)


@pytest.mark.parametrize("method", DIT_XL_2)
@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_dit_xl_2_with_101_classes(method, fuse_qkv):
    model = inject_adapter(deepcopy(dit_xl_2()), AdapterConfig(method, num_classes=101, fuse_qkv=fuse_qkv))
    assert count_trainable(model) == DIT_XL_2[method][0 if fuse_qkv else 1]
    if method == "dora":  # whose magnitudes are norms of weights, which are not there
        assert all(parameter.is_meta for parameter in model.parameters() if parameter.requires_grad)


def test_the_parts_of_dit_xl_2_and_their_shares():
    model = deepcopy(dit_xl_2())
    parts = trainable_parts(inject_adapter(model, AdapterConfig(num_classes=101)))
    width, blocks = 1152, 28
    of_blocks = {
        "norm1.linear": 6 * width,
        "attn1.to_q": width,
        "attn1.to_k": width,
        "attn1.to_v": width,
        "attn1.to_out.*": width,
        "ff.net.*.proj": 4 * width,
        "ff.net.*": width,
    }
    expected = {f"transformer_blocks.*.{layer}": blocks * size for layer, size in of_blocks.items()}
    expected |= {"proj_out_1": 2 * width, "proj_out_2": 2 * 2 * 8, "class_embedding": 102 * width}
    assert {part: found.count for part, found in parts.items()} == expected
    assert parts["class_embedding"].share == 102 * width / 603_680
    assert sum(found.count for found in parts.values()) == count_trainable(model)


def test_parts_of_full_fine_tuning_and_of_what_no_adapter_trains():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), "head": nn.Linear(2, 1)})
    assert {name: part.count for name, part in trainable_parts(model).items()} == {"blocks.*": 16, "head": 3}
    inject_adapter(model, AdapterConfig("full", targets=("blocks.0",)))
    model["head"].requires_grad_(True)
    assert trainable_parts(model) == {"blocks.*": (8, 8 / 11), "head": (3, 3 / 11)}


@functools.cache
def llama2(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    config = LlamaConfig(**dict(zip(names, shape, strict=True)), num_attention_heads=shape[2])
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "size, config, trainable",
    [
        ("7b", AdapterConfig(), 1_359_872),  # Table S6: 1.36M
        ("7b", AdapterConfig("bitfit"), 1_359_872),  # 1.36M
        ("7b", AdapterConfig("lora"), 2_498_560),  # 2.50M
        ("7b", AdapterConfig("mora1"), 1_360_960),  # 1.36M
        ("7b", AdapterConfig("mora6"), 1_347_584),  # 1.35M
        ("7b", AdapterConfig("lora", targets=("q_proj", "k_proj", "v_proj")), 786_432),  # LoRA (QKV): 786.43K
        ("7b", AdapterConfig("vera"), 1_359_872 + 224),  # 1.36M, and one number for each of 7 · 32 layers
        ("13b", AdapterConfig(), 2_129_920),  # Table S7: 2.13M
        ("13b", AdapterConfig("lora", targets=("q_proj", "k_proj", "v_proj")), 1_228_800),  # 1.23M
    ],
)
def test_llama_2(size, config, trainable):
    assert count_trainable(inject_adapter(deepcopy(llama2(size)), config)) == trainable


def test_vit_l():
    """Tables S2 to S5: 221.18K."""
    from transformers import ViTConfig, ViTModel

    shape = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        model = ViTModel(shape, add_pooling_layer=False)
    assert count_trainable(inject_adapter(model, AdapterConfig())) == 221_184


@pytest.mark.parametrize(
    "method, trainable",
    [
        ("1lora", 221_184),  # 221.18K
        ("mora1", 220_056),  # 220.06K
        ("mora6", 217_440),  # 217.44K
        ("lora", 393_216),  # 393.22K
        ("dora", 614_400),  # 614.40K
        ("vera", 221_280),  # 221.28K
    ],
)
def test_vit_l_with_one_linear_layer_for_q_k_and_v(method, trainable):
    """Tables S2 to S5, whose ViT-L is DINOv2's."""
    shapes = {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)}
    with torch.device("meta"):
        blocks = [nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}) for _ in range(24)]
    assert count_trainable(inject_adapter(nn.ModuleList(blocks), AdapterConfig(method))) == trainable


# ---------------------------------------------------------------------------------------------------
# What else the tables count


def vit_b():
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        return ViTModel(ViTConfig(), add_pooling_layer=False)


@pytest.mark.parametrize(
    "config, table",
    [
        (AdapterConfig("mora1"), 333_360),  # 333.36K
        (AdapterConfig("mora6"), 328_128),  # 328.13K
        (AdapterConfig("bitfit"), 331_776),  # 331.78K
        (AdapterConfig("difffit"), 817_152),  # 817.15K
        (AdapterConfig("lora"), 663_552),  # 663.55K
        (AdapterConfig("vera"), 332_064),  # 332.06K
        (AdapterConfig("dora"), 995_328),  # 995.33K
        (AdapterConfig("1lora"), 331_776),  # 331.78K
        (AdapterConfig("1lora", norms=True), 485_376),  # 485.38K
        (AdapterConfig("1lora", sum=False, norms=True), 153_600),  # S12's norms: 153.60K
        (AdapterConfig("1lora", bias=True, scale=True), 995_328),  # S12: 995.33K
        (AdapterConfig("1lora", bias=True, scale=True, norms=True), 1_148_928),  # S12: 1.15M
    ],
)
def test_tables_s9_s10_and_s12_are_four_times_vit_base(config, table):
    """With separate q, k and v; `All` of S9 and S10, 343.19M, is four times the whole model too."""
    model = vit_b()
    assert round(4 * sum(parameter.numel() for parameter in model.parameters()) / 1e4) == 34_319
    assert 4 * count_trainable(inject_adapter(model, config)) == table


class Block(nn.Module):
    """What counts of a block of Depth Anything's ViT-L: four linear layers and two norms."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(1024), nn.LayerNorm(1024)
        self.qkv, self.proj = nn.Linear(1024, 3072), nn.Linear(1024, 1024)
        self.fc1, self.fc2 = nn.Linear(1024, 4096), nn.Linear(4096, 1024)


def test_difffit_has_no_scales_in_tables_s2_to_s7_and_s11():
    with torch.device("meta"):
        vit_l = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(24)), "norm": nn.LayerNorm(1024)})
    counts = {}
    for scale in (False, True):
        model = deepcopy(vit_l)
        counts[scale] = count_trainable(inject_adapter(model, AdapterConfig("difffit", scale=scale)))
    assert counts == {False: 321_536, True: 542_720}  # S2 to S5 and S11: 321.54K

    # S6 and S7 (1.66M, 2.58M) count one number more for each of the 32,000 outputs of the head.
    for size, table in (("7b", 1_658_112), ("13b", 2_576_640)):
        model = inject_adapter(deepcopy(llama2(size)), AdapterConfig("difffit", scale=False))
        assert count_trainable(model) + 32_000 == table
