"""What PEFT, diffusers, kohya's scripts and LyCORIS write: read to the same outputs, or refused by the name of it."""

import copy
import json

import pytest
import torch
from rounding import assert_rounded
from safetensors.torch import load_file, save_file
from tiny_models import dit_inputs, flux, make_dit, randomize, sd3, unet

from onelora_diffusion import (
    AdapterConfig,
    OneLoRALoaderMixin,
    adapter_state_dict,
    export_lora,
    inject_adapter,
    load_adapter,
    merge_adapter,
    route_adapters,
    save_adapter,
    unmerge_adapter,
)
from onelora_diffusion.storage.reading import read_dict

LAYERS = ["to_q", "to_k", "ff.net.2"]
PATH = "transformer_blocks.0.attn1.to_q"
PAIR = {f"{PATH}.lora_A.weight": torch.eye(2, 32), f"{PATH}.lora_B.weight": torch.full((32, 2), 0.1)}


def small_flux():
    torch.manual_seed(0)
    model, inputs = flux()
    return model.eval(), inputs


def trained(model, scale=0.2):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample


def by_each_verb(base, inputs, source):
    """What the base computes with the adapter that `load_adapter`, and a pipeline's verb, read."""
    from diffusers import FluxPipeline

    by_pipeline = copy.deepcopy(base)
    pipe = OneLoRALoaderMixin.from_pipe(FluxPipeline(None, None, None, None, None, None, transformer=by_pipeline))
    pipe.load_lora_weights(source)
    return run(load_adapter(copy.deepcopy(base), source), inputs), run(by_pipeline, inputs)


# ---------------------------------------------------------------------------------------------------
# What its settings say


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 8, "lora_alpha": 2},
        {"r": 4, "lora_alpha": 4, "use_rslora": True},
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 16}, "rank_pattern": {"to_k": 2}},
        {"r": 4, "lora_alpha": 8, "use_dora": True},
    ],
)
def test_what_a_model_of_diffusers_saves_has_the_scale_it_had_there(settings, tmp_path):
    """Its header names no component, as that of a pipeline's file does."""
    from peft import LoraConfig

    base, inputs = small_flux()
    model = copy.deepcopy(base)
    model.add_adapter(LoraConfig(target_modules=LAYERS, **settings), "it")
    expected = run(trained(model), inputs)
    model.save_lora_adapter(tmp_path, "it")
    assert (expected - run(base, inputs)).abs().max() > 0.05
    for found in by_each_verb(base, inputs, tmp_path):
        assert_rounded(found, expected, base)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_read(init, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, inputs = small_flux()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS, init_lora_weights=init)
    )
    expected = run(trained(model), inputs)
    model.save_pretrained(tmp_path)
    for found in by_each_verb(base, inputs, tmp_path):
        assert_rounded(found, expected, base)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(init, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, inputs = small_flux()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=init))
    trained(model).save_pretrained(tmp_path)
    before = run(base, inputs)
    with pytest.raises(ValueError, match=f"its init_lora_weights is '{init}', and it is not known here what"):
        load_adapter(base, tmp_path)
    assert torch.equal(run(base, inputs), before) and not hasattr(base, "_onelora")


REFUSED = [
    *({"init_lora_weights": name} for name in ("pissa_niter_4", "corda", "loftq", "lora_ga", "eva", "next_years")),
    {"bias": "lora_only"},
    {"modules_to_save": ["proj_out"]},
    {"layer_replication": [[0, 2]]},
    {"fan_in_fan_out": True},
    {"use_qalora": True},
    {"use_bdlora": {"nblocks": 2}},
    {"alora_invocation_tokens": [1, 2]},
    {"trainable_token_indices": [3]},
    {"target_parameters": ["weight"]},
    {"loftq_config": {"loftq_bits": 4}},
    {"a_setting_of_next_year": 0.5},
    {"another_of_next_year": ["a"]},
    {"peft_type": "LOHA"},
]


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: str(*setting.items()))
def test_a_setting_that_is_not_known_to_be_right_is_refused_by_name(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"it: its {name} is .*{str(value)[:5].strip('[{')}"):
        read_dict(make_dit(), PAIR, {"lora_alpha": 2, **setting}, "it", lambda tensors, source: tensors)


def test_settings_that_nobody_has_set_are_no_obstacle():
    """Those of today's PEFT, and whatever comes next at a value that says nothing."""
    from peft import LoraConfig

    settings = json.loads(json.dumps(LoraConfig(r=2, lora_alpha=4).to_dict(), default=list))
    settings |= {"next_year": None, "next_years_switch": False, "next_years_table": {}, "next_years_list": []}
    file = read_dict(make_dit(), PAIR, settings, "it", lambda tensors, source: tensors)
    (b,) = (tensor for name, tensor in file.tensors.items() if "lora_B" in name)
    assert torch.equal(b, 2 * PAIR[f"{PATH}.lora_B.weight"])


def test_a_dora_that_lost_its_magnitudes_is_refused():
    with pytest.raises(ValueError, match="its use_dora is true, and it has no lora_magnitude_vector"):
        read_dict(make_dit(), PAIR, {"use_dora": True}, "it", lambda tensors, source: tensors)


# ---------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"transformer.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: f"diffusion_model.{key}",
        lambda key: key.replace(".weight", ".mine.weight"),  # as PEFT's state dict has it, with the adapter's name
        lambda key: f"transformer.{key}".replace(".weight", ".default.weight"),
        lambda key: f"lora_unet_{PATH.replace('.', '_')}{key.removeprefix(PATH)}",
        lambda key: f"lycoris_{PATH.replace('.', '_')}{key.removeprefix(PATH)}".replace("lora_A", "lora_down").replace(
            "lora_B", "lora_up"
        ),
    ],
)
def test_every_spelling_of_a_layers_name_is_read(rename, tmp_path):
    save_file({rename(key): tensor for key, tensor in PAIR.items()}, tmp_path / "it.safetensors")
    own = adapter_state_dict(load_adapter(make_dit(), tmp_path / "it.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
        f"{PATH}.onelora_lora_A.weight": (2, 32),
        f"{PATH}.onelora_lora_B.weight": (32, 2),
    }
    assert torch.equal(own[f"{PATH}.onelora_lora_B.weight"], PAIR[f"{PATH}.lora_B.weight"])


def test_two_adapters_in_one_file_are_refused():
    twice = {key.replace(".weight", f".{name}.weight"): t for name in ("one", "two") for key, t in PAIR.items()}
    with pytest.raises(ValueError, match="which is there twice"):
        read_dict(make_dit(), twice, {}, "it", lambda tensors, source: tensors)


def test_load_adapter_reads_what_was_exported_and_leaves_text_encoders(tmp_path, caplog):
    model, inputs = make_dit(), dit_inputs()
    with torch.no_grad():
        for vector in adapter_state_dict(inject_adapter(model, AdapterConfig())).values():
            vector += 0.05 * torch.randn_like(vector)
        expected = model(**inputs).sample
        export_lora(model, tmp_path)
        for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
            assert torch.equal(load_adapter(make_dit(), source)(**inputs).sample, expected)
        tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
        tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(1, 4)
        save_file(tensors, tmp_path / "both.safetensors")
        for source in (tmp_path / "both.safetensors", tensors):
            assert torch.equal(load_adapter(make_dit(), source)(**inputs).sample, expected)
    assert "1 of 33 tensors are for text encoders" in caplog.text


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_dora_as_kohyas_scripts_and_lycoris_write_it_is_read(is_fused, tmp_path):
    """W = m ⊙ (W0 + α/r B A) / ‖W0 + α/r B A‖, a row each; q, k and v of one A where they are one layer there."""
    base, inputs = small_flux()
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    expected, generator = copy.deepcopy(base), torch.Generator().manual_seed(3)
    tensors, a = {}, torch.randn(2, 32, generator=generator)
    for path in paths:
        b, scale = torch.randn(32, 2, generator=generator), torch.rand(32, 1, generator=generator) + 0.5
        layer = expected.get_submodule(path)
        summed = layer.weight.detach() + 3 / 2 * b @ a
        layer.weight.data = scale * summed / summed.norm(dim=1, keepdim=True)
        parts = {"lora_down.weight": a, "lora_up.weight": b, "dora_scale": scale, "alpha": torch.tensor(3.0)}
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}
    if is_fused:
        fused = {"lora_down.weight": a, "alpha": torch.tensor(3.0)}
        for part in ("lora_up.weight", "dora_scale"):
            fused[part] = torch.cat([tensor for key, tensor in tensors.items() if key.endswith(part)])
        tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": tensor for part, tensor in fused.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "it.safetensors")
    for output in by_each_verb(base, inputs, tmp_path / "it.safetensors"):
        assert_rounded(output, run(expected, inputs), base)


FIRST = f"lora_unet_{PATH.replace('.', '_')}"
KINDS = [
    ({f"{FIRST}.lokr_t2": (2, 2, 3, 3)}, "a LoKr of convolutions"),
    ({f"{FIRST}.hada_w1_a": (32, 2), f"{FIRST}.hada_w1_b": (2, 32)}, "LoHa"),
    ({f"{FIRST}.dora_scale": (1, 32)}, "a DoRA whose scale is not one number for each output"),
    ({f"{FIRST}.diff": (32, 32)}, "changes of whole weights"),
    ({"lora_unet_norm.w_norm": (32,)}, "changes of whole weights"),
    ({f"{FIRST}.on_input": (32,)}, "IA3"),
    ({f"{FIRST}.oft_blocks": (4, 8, 8)}, "OFT"),
    ({f"{FIRST}.lora_mid.weight": (2, 2, 3, 3)}, "a LoRA of convolutions"),
    ({"lora_unet_conv_in.lora_down.weight": (2, 8, 3, 3)}, "a LoRA of convolutions"),
    ({f"base_model.model.{PATH}.vera_lambda_b": (32,)}, "another tuner"),
    ({"emb_params": (2, 8)}, "a textual inversion"),
]


@pytest.mark.parametrize("shapes, kind", KINDS, ids=[kind for _, kind in KINDS])
def test_a_file_of_another_kind_is_named(shapes, kind, tmp_path):
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    for own in ({}, PAIR):
        save_file(tensors | own, tmp_path / "it.safetensors")
        with pytest.raises(ValueError, match=f"^[^:]*it.safetensors: {next(iter(shapes))} .* is part of {kind}"):
            load_adapter(make_dit(), tmp_path / "it.safetensors")


def test_a_layer_of_another_kind_is_named(tmp_path):
    save_file(
        {"pos_embed.proj.lora_A.weight": torch.ones(1, 4), "pos_embed.proj.lora_B.weight": torch.ones(32, 1)},
        tmp_path / "it.safetensors",
    )
    with pytest.raises(
        ValueError,
        match="serves no linear layer, nor 1 x 1 convolution, of DiTTransformer2DModel, but pos_embed.proj, a Conv2d",
    ):
        load_adapter(make_dit(), tmp_path / "it.safetensors")


# ---------------------------------------------------------------------------------------------------
# Convolutions of 1 x 1, and Kronecker products

POINTWISE = (
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.attentions.0.proj_out",
    "up_blocks.0.resnets.0.conv_shortcut",
)
BESIDE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def small_unet():
    torch.manual_seed(0)
    model, inputs = unet()
    return model.eval(), inputs


def written_by_kohya(model, ones=False):
    """A LoRA of rank 3 and alpha 2 of three convolutions of 1 x 1 and a linear layer, by kohya's names."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for path in (*POINTWISE, BESIDE):
        outs, ins, *kernel = model.get_submodule(path).weight.shape
        name, rank = f"lora_unet_{path.replace('.', '_')}", 1 if ones else 3
        down = torch.ones(1, ins, *kernel) if ones else torch.randn(rank, ins, *kernel, generator=generator)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = torch.randn(outs, rank, *kernel, generator=generator) / 4
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("ones, method", [(False, "lora"), (True, "1lora")])
def test_kohyas_convolutions_of_1_by_1_are_read_as_diffusers_reads_them(ones, method, tmp_path):
    from diffusers import StableDiffusionPipeline

    base, inputs = small_unet()
    save_file(written_by_kohya(base, ones), tmp_path / "it.safetensors")
    stock, own = copy.deepcopy(base), copy.deepcopy(base)
    StableDiffusionPipeline.load_lora_into_unet(
        *StableDiffusionPipeline.lora_state_dict(tmp_path / "it.safetensors", unet_config=base.config), unet=stock
    )
    expected = run(stock, inputs)
    load_adapter(own, tmp_path / "it.safetensors")
    assert (expected - run(base, inputs)).abs().max() > 0.05
    assert_rounded(run(own, inputs), expected, base)
    assert own._onelora.configs["default"].method == method
    with route_adapters(own, ["default", None]):
        routed = run(own, inputs)
    assert_rounded(routed, torch.stack([expected[0], run(base, inputs)[1]]), base)
    assert_rounded(run(merge_adapter(own), inputs), expected, base)
    unmerge_adapter(own)
    if method == "1lora":
        for naming in ("diffusers", "kohya"):
            export_lora(own, tmp_path / "out.safetensors", naming=naming)
            again = copy.deepcopy(base)
            StableDiffusionPipeline.load_lora_into_unet(
                *StableDiffusionPipeline.lora_state_dict(tmp_path / "out.safetensors", unet_config=base.config),
                unet=again,
            )
            assert_rounded(run(again, inputs), expected, base)


LOKR = {
    "whole": {"lokr_w1": (4, 4), "lokr_w2": (8, 8)},
    "products": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    "one product": {"lokr_w1": (2, 2), "lokr_w2_a": (16, 4), "lokr_w2_b": (4, 16)},
}


@pytest.mark.parametrize("shapes", LOKR.values(), ids=LOKR)
def test_a_lokr_of_lycoris_adds_a_kronecker_product(shapes, tmp_path):
    generator = torch.Generator().manual_seed(1)
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w1, w2 = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    scale = 1 if set(shapes) == {"lokr_w1", "lokr_w2"} else 3 / shapes["lokr_w2_b"][0]
    base, inputs = small_flux()
    path = "transformer_blocks.0.attn.to_v"
    changed, own = copy.deepcopy(base), copy.deepcopy(base)
    changed.get_submodule(path).weight.data += scale * torch.kron(w1, w2)
    tensors = {f"lycoris_{path.replace('.', '_')}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors | {f"lycoris_{path.replace('.', '_')}.alpha": torch.tensor(3.0)}, tmp_path / "it.safetensors")
    load_adapter(own, tmp_path / "it.safetensors")
    expected = run(changed, inputs)
    assert (expected - run(base, inputs)).abs().max() > 0.01
    assert_rounded(run(own, inputs), expected, base)
    save_adapter(own, tmp_path / "native.safetensors")
    assert_rounded(run(load_adapter(copy.deepcopy(base), tmp_path / "native.safetensors"), inputs), expected, base)
    assert_rounded(run(merge_adapter(own), inputs), expected, base)


def test_a_lokr_of_peft_has_its_scales(tmp_path):
    from peft import LoKrConfig, get_peft_model

    base, inputs = small_flux()
    settings = LoKrConfig(
        r=2, alpha=6, target_modules=LAYERS, decompose_both=True, rank_pattern={"to_k": 4}, alpha_pattern={"to_q": 1}
    )
    model = get_peft_model(copy.deepcopy(base), settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    expected = run(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    assert (expected - run(base, inputs)).abs().max() > 0.01
    for found in by_each_verb(base, inputs, tmp_path):
        assert_rounded(found, expected, base)


def test_a_lokr_of_a_fused_layer_needs_the_base_fused(tmp_path):
    """diffusers fuses the base itself when it loads such a file."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    base = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(4, 4),
        "txt_ids": torch.zeros(3, 4),
    }
    name = "diffusion_model.double_blocks.0.img_attn"
    tensors = {f"{name}.qkv.lokr_w1": torch.randn(4, 4), f"{name}.qkv.lokr_w2": torch.randn(24, 8)}
    tensors |= {f"{name}.proj.lokr_w1": torch.randn(4, 4), f"{name}.proj.lokr_w2": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "it.safetensors")
    stock, own = (Flux2Pipeline(None, None, None, None, copy.deepcopy(base)) for _ in range(2))
    stock.load_lora_weights(tmp_path / "it.safetensors")
    pipe = OneLoRALoaderMixin.from_pipe(own)
    with pytest.raises(ValueError, match="attn.to_qkv.* call fuse_qkv_projections"):
        pipe.load_lora_weights(tmp_path / "it.safetensors")
    pipe.transformer.fuse_qkv_projections()
    pipe.load_lora_weights(tmp_path / "it.safetensors")
    expected = run(stock.transformer, inputs)
    assert (expected - run(base, inputs)).abs().max() > 0.01
    assert_rounded(run(pipe.transformer, inputs), expected, base)


WRONG_LOKR = [
    ({"lokr_w1": (4, 4)}, "has no lokr_w2"),
    ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (3, 8)}, "whose product it is"),
    ({"lokr_w1": (4, 4), "lokr_w2": (8,)}, "they must be matrices"),
    ({"lokr_w1": (3, 5), "lokr_w2": (8, 8)}, "no decompose_factor of PEFT"),
]


@pytest.mark.parametrize("shapes, reason", WRONG_LOKR, ids=[reason for _, reason in WRONG_LOKR])
def test_a_lokr_of_wrong_sizes_is_refused(shapes, reason, tmp_path):
    save_file({f"{PATH}.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "it.safetensors")
    model = make_dit()
    with pytest.raises(ValueError, match=reason):
        load_adapter(model, tmp_path / "it.safetensors")
    assert not hasattr(model, "_onelora")


# ---------------------------------------------------------------------------------------------------
# A base that has an IP-Adapter


def with_ip_adapter(model, kind):
    """The model with the modules that diffusers' `load_ip_adapter` puts into it."""
    from diffusers.models import attention_processor as processors
    from diffusers.models import embeddings

    if kind == "sd3":
        model.image_proj = embeddings.IPAdapterTimeImageProjection(
            embed_dim=8, output_dim=16, hidden_dim=8, depth=1, dim_head=4, heads=2, num_queries=2, timestep_in_dim=8
        )
    else:
        model.encoder_hid_proj = embeddings.MultiIPAdapterImageProjection([embeddings.ImageProjection(8, 8, 2)])
    plain = processors.AttnProcessor2_0()
    makers = {
        "sd3": lambda name: processors.SD3IPAdapterJointAttnProcessor2_0(32, 16, 8, timesteps_emb_dim=32),
        "flux": lambda name: processors.FluxIPAdapterJointAttnProcessor2_0(32, 8),
        "unet": lambda name: processors.IPAdapterAttnProcessor2_0(16, 8) if "attn2" in name else plain,
    }
    model.set_attn_processor({name: makers[kind](name) for name in model.attn_processors})
    return model


@pytest.mark.parametrize(
    "kind, make, config",
    [
        ("sd3", sd3, AdapterConfig(norms=True)),
        ("sd3", sd3, AdapterConfig("lora")),
        ("flux", flux, AdapterConfig()),
        ("unet", unet, AdapterConfig(norms=True)),
    ],
)
def test_an_adapter_fits_a_base_with_an_ip_adapter_and_one_without(kind, make, config, tmp_path):
    base = inject_adapter(make()[0], config)
    files = [save_adapter(base, tmp_path / "base")]
    adapted = with_ip_adapter(make()[0], kind)
    assert any("IPAdapter" in type(module).__name__ for module in adapted.modules())
    files.append(save_adapter(inject_adapter(adapted, config), tmp_path / "adapted"))
    names = set(adapter_state_dict(base))
    assert set(adapter_state_dict(adapted)) == names
    for file in files:
        for model in (make()[0], with_ip_adapter(make()[0], kind)):
            assert set(adapter_state_dict(load_adapter(model, file))) == names


def test_beside_an_ip_adapter_that_weighs_nothing_the_output_is_the_same(tmp_path):
    torch.manual_seed(0)
    model, inputs = unet()
    beside = with_ip_adapter(copy.deepcopy(model), "unet")
    beside.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for processor in beside.attn_processors.values():
        processor.scale = [0.0]
    file = save_adapter(randomize(inject_adapter(model, AdapterConfig())), tmp_path)
    load_adapter(beside, file)
    image = {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 8)]}}
    assert torch.equal(run(beside, inputs | image), run(model, inputs))
