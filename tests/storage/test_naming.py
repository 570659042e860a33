"""Exports for kohya's scripts and ComfyUI: which layers each takes, by value.

What the programs take is written here from their own code: ComfyUI (comfy/lora.py and its models), kohya's sd-scripts
(networks/lora.py, lora_flux.py, lora_sd3.py, lora_lumina.py). What a native name means is asked of diffusers'
converters of checkpoints.
"""

import copy
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from rounding import assert_rounded
from safetensors.torch import load_file
from tiny_models import flux, pixart, sana, unet
from torch import nn

from onelora_diffusion import AdapterConfig, OneLoRALoaderMixin, export_lora, inject_adapter, load_adapter
from onelora_diffusion.storage.naming import BY_DIFFUSERS_NAMES as READ_BY_DIFFUSERS_NAMES
from onelora_diffusion.storage.naming import TAKEN, LoraLayer, by_diffusers_paths, named_for, native_layers

# One block of each kind at the published widths, without weights: converters know these widths by heart.
PUBLISHED = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "SD3Transformer2DModel": {"num_layers": 2, "dual_attention_layers": (0,), "caption_projection_dim": 1152},
    "WanTransformer3DModel": {"num_layers": 1, "added_kv_proj_dim": 5120, "image_dim": 1280},
    "HunyuanVideoTransformer3DModel": {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    "LTXVideoTransformer3DModel": {"num_layers": 1},
    "Lumina2Transformer2DModel": {"num_layers": 1, "num_refiner_layers": 2},
    "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1},
}
FAMILIES = [name for name in PUBLISHED if hasattr(diffusers, name)]


def published(name):
    with torch.device("meta"):
        return getattr(diffusers, name)(**PUBLISHED[name])


def linears(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def changes(model, with_bias=False):
    """1LoRA with other numbers at each layer."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path, layer in linears(model).items():
        b = torch.randn(layer.out_features, 1, generator=generator)
        beta = torch.randn(layer.out_features, generator=generator) if with_bias else None
        found[path] = LoraLayer(torch.ones(1, layer.in_features), b, beta)
    return found


class Checkpoint(dict):
    """A checkpoint of these matrices, with a bias that is their first column, and anything else that is asked for."""

    def __init__(self, matrices):
        super().__init__({f"{name}.weight": matrix for name, matrix in matrices.items()})
        self.whole = dict(self)

    def pop(self, key, *default):
        if key in self:
            return super().pop(key)
        weight = self.whole.get(key.removesuffix("bias") + "weight")
        return torch.zeros(2, 1) if weight is None else weight[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_native_names_and_rows_are_what_diffusers_converters_read(name):
    model = published(name)
    layers = changes(model)
    native = {name: layer.joined(layers) for name, layer in native_layers(model).items()}
    assert all((layer.a == 1).all() and len(layer.a) == 1 for layer in native.values())  # fused at rank 1
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(name, {}).get("checkpoint_mapping_fn")
    if convert is None:
        pytest.skip(f"diffusers {diffusers.__version__} converts no {name}")
    converted = convert(Checkpoint({native: layer.b for native, layer in native.items()}), config=dict(model.config))
    for path, layer in layers.items():
        assert torch.equal(converted[f"{path}.weight"], layer.b), path


# ---------------------------------------------------------------------------------------------------
# The layers that ComfyUI's models have, `*` being a number; it takes `diffusion_model.` + name for each.

FLUX_OF_COMFYUI = r"""
img_in txt_in (time_in|guidance_in|vector_in)\.(in|out)_layer final_layer\.(linear|adaLN_modulation\.1)
double_blocks\.*\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02]|mod\.lin) single_blocks\.*\.(linear[12]|modulation\.lin)
distilled_guidance_layer\.((in|out)_proj|layers\.*\.(in|out)_layer)
(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin
"""
LUMINA_OF_COMFYUI = r"""
x_embedder cap_embedder\.1 t_embedder\.mlp\.[02] final_layer\.(linear|adaLN_modulation\.1)
(layers|noise_refiner|context_refiner)\.*\.(attention\.(qkv|out)|feed_forward\.w[123]|adaLN_modulation\.[01])
"""
COMFYUI = {
    "FluxTransformer2DModel": FLUX_OF_COMFYUI,
    "ChromaTransformer2DModel": FLUX_OF_COMFYUI,
    "Flux2Transformer2DModel": FLUX_OF_COMFYUI,
    "SD3Transformer2DModel": r"""
        context_embedder [ty]_embedder\.mlp\.[02] final_layer\.(linear|adaLN_modulation\.1)
        joint_blocks\.*\.(x|context)_block\.(attn2?\.(qkv|proj)|adaLN_modulation\.1|mlp\.fc[12])
    """,
    "WanTransformer3DModel": r"""
        (time|text)_embedding\.[02] time_projection\.1 img_emb\.proj\.[13] head\.head
        blocks\.*\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])
    """,
    # Of its blocks also img_attn.qkv, img_mlp.0, img_mod.lin, but of its embedders these names alone.
    "HunyuanVideoTransformer3DModel": r"""
        (time_in|guidance_in|vector_in|txt_in\.[tc]_embedder)\.(in|out)_layer txt_in\.input_embedder
        txt_in\.individual_token_refiner\.blocks\.*\.(self_attn_(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)
        double_blocks\.*\.(img|txt)_(attn_(qkv|proj)|mlp\.fc[12]|mod\.linear)
        single_blocks\.*\.(linear[12]|modulation\.linear) final_layer\.(linear|adaLN_modulation\.1)
    """,
    "LTXVideoTransformer3DModel": r"""
        patchify_proj proj_out adaln_single\.(linear|emb\.timestep_embedder\.linear_[12])
        caption_projection\.linear_[12]
        transformer_blocks\.*\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))
    """,
    "Lumina2Transformer2DModel": LUMINA_OF_COMFYUI,
    "ZImageTransformer2DModel": LUMINA_OF_COMFYUI,
}
BY_DIFFUSERS_NAMES = ("FluxTransformer2DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel")  # without β


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_comfyui_takes_every_layer(name, with_bias):
    model = published(name)
    layers = changes(model, with_bias)
    if with_bias:
        layers = {path: layer for path, layer in layers.items() if model.get_submodule(path).bias is not None}
        if not layers:
            pytest.skip(f"no layer of {name} has a bias")
    tensors, left_out = named_for("comfyui", model, layers)
    assert left_out == ()
    if name in BY_DIFFUSERS_NAMES and not with_bias:
        assert {key.split(".lora_")[0] for key in tensors} == {f"transformer.{path}" for path in layers}
        return
    known = re.compile("|".join(pattern.replace(r"\.*", r"\.\d+") for pattern in COMFYUI[name].split()))
    for key, tensor in tensors.items():
        layer, part = re.fullmatch(r"diffusion_model\.(.+)\.(lora_A\.weight|lora_B\.weight|diff_b)", key).groups()
        assert known.fullmatch(layer), layer
        assert part != "lora_A.weight" or len(tensor) == 1 and (tensor == 1).all()
    assert sum(len(t) for key, t in tensors.items() if "lora_B" in key) == sum(len(of.b) for of in layers.values())
    assert any(key.endswith("diff_b") for key in tensors) == with_bias
    if not with_bias:
        back = by_diffusers_paths(model, tensors)
        assert all(torch.equal(back[f"{path}.lora_B.weight"], layer.b) for path, layer in layers.items())


KOHYA = {
    "FluxTransformer2DModel": (
        r"((double|single)_blocks_\d+_.+|(img|txt)_in|(time|vector|guidance)_in_(in|out)_layer)",
        ("norm_out.linear", "proj_out"),
    ),
    "SD3Transformer2DModel": (
        r"(joint_blocks_\d+_(x|context)_block|context_embedder|[ty]_embedder|final_layer)\w*",
        (),
    ),
    "Lumina2Transformer2DModel": (
        r"(layers|noise_refiner|context_refiner|final_layer|x_embedder|t_embedder|cap_embedder)\w*",
        (),
    ),
}


@pytest.mark.parametrize("name", KOHYA)
def test_kohyas_scripts_take_every_layer_but_those_that_are_named(name):
    model = published(name)
    layers = changes(model)
    tensors, left_out = named_for("kohya", model, layers)
    taken, expected = KOHYA[name]
    assert set(left_out) == set(expected)
    for key, tensor in tensors.items():
        layer, part = re.fullmatch(r"lora_unet_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)", key).groups()
        assert re.fullmatch(taken, layer), layer
        assert part == "lora_up.weight" or (tensor == 1).all()  # A, and alpha = rank = 1
    back = by_diffusers_paths(model, tensors)
    assert {path for path in layers if f"{path}.lora_up.weight" in back} == layers.keys() - set(left_out)


# ---------------------------------------------------------------------------------------------------
# Files


def adapted(make, **settings):
    torch.manual_seed(0)
    stock, inputs = make()
    model = inject_adapter(copy.deepcopy(stock).eval(), AdapterConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return stock.eval(), model, inputs


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 2}, {"compression": "outputs"}, {"compression": "singular"}], ids=str
)
@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
@pytest.mark.parametrize("make", [flux, unet])
def test_what_was_exported_computes_the_same_when_it_is_read_again(make, naming, settings, tmp_path, caplog):
    targets = ("attn*.to_?", "attn*.to_out.0", "ff.net.*") + (("norm.linear", "proj_mlp") if make is flux else ())
    stock, model, inputs = adapted(make, targets=targets, **settings)
    path = export_lora(model, tmp_path / "file.safetensors", naming=naming)
    assert path == tmp_path / "file.safetensors" and path.left_out == () and not caplog.records
    expected = run(model, inputs)
    assert_rounded(run(load_adapter(copy.deepcopy(stock), path), inputs), expected, stock)
    if make is flux:
        pipe = OneLoRALoaderMixin.from_pipe(
            diffusers.FluxPipeline(None, None, None, None, None, None, transformer=copy.deepcopy(stock))
        )
        pipe.load_lora_weights(path)
        assert_rounded(run(pipe.transformer, inputs), expected, stock)


def test_what_a_program_leaves_out_is_said(tmp_path, caplog):
    _, model, _ = adapted(unet, targets=("*",))
    path = export_lora(model, tmp_path / "it", naming="kohya")
    assert path.left_out == ("time_embedding.linear_1", "time_embedding.linear_2")
    assert "kohya does not take 2 of" in caplog.text and "time_embedding.linear_1" in caplog.text
    tensors = load_file(path / "kohya_lora.safetensors")
    layers = {key.split(".")[0] for key in tensors}
    assert len(layers) + 2 == sum(isinstance(layer, nn.Linear) for layer in model.modules())
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert export_lora(model, tmp_path / "it", naming="comfyui").left_out == ()  # it takes the embeddings too


def test_a_layer_that_is_fused_there_is_filled_up_with_zeros():
    model, _ = flux()
    path = "transformer_blocks.0.attn.to_k"
    tensors, _ = named_for("kohya", model, {path: LoraLayer(torch.ones(1, 32), torch.ones(32, 1))})
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert torch.equal(up[:, 0], torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(32)]))


def test_bitfit_goes_to_comfyui_as_changes_of_biases(tmp_path):
    _, model, _ = adapted(flux, method="bitfit", targets=("to_q", "to_k", "to_v"))
    tensors = load_file(export_lora(model, tmp_path / "x.safetensors", naming="comfyui"))
    attn = model.transformer_blocks[0].attn
    expected = torch.cat([getattr(attn, name).onelora["default"].beta for name in ("to_q", "to_k", "to_v")])
    assert torch.equal(tensors["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"], expected)
    assert all(key.endswith(".diff_b") for key in tensors)


@pytest.mark.parametrize("settings", [{"method": "bitfit"}, {"bias": True}], ids=str)
def test_changes_of_biases_are_read_again(settings, tmp_path):
    stock, model, inputs = adapted(flux, targets=("to_q", "to_k", "to_v", "ff.net.2"), **settings)
    path = export_lora(model, tmp_path / "x.safetensors", naming="comfyui")
    assert_rounded(run(load_adapter(copy.deepcopy(stock), path), inputs), run(model, inputs), stock)
    tensors = load_file(path)
    with pytest.raises(ValueError, match=r"to_q.diff_b with shape \(8,\) changes a bias that .* has not"):
        load_adapter(unet()[0], {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.diff_b": torch.ones(8)})
    shifted = {key: t + 1 if key.endswith("diff_b") else t for key, t in tensors.items()}
    assert not torch.allclose(run(load_adapter(copy.deepcopy(stock), shifted), inputs), run(model, inputs), atol=1e-3)


@pytest.mark.parametrize(
    "make, settings, naming, reason",
    [
        (sana, {}, "comfyui", "comfyui's names of the layers of a SanaTransformer2DModel are not known"),
        (pixart, {}, "kohya", "kohya's names of the layers of a PixArtTransformer2DModel are not known"),
        (flux, {}, "a1111", "unknown naming 'a1111': choose one of diffusers, kohya, comfyui"),
        (flux, {"bias": True}, "kohya", "adapter 'default' cannot be a LoRA: .*trains biases"),
        (pixart, {"bias": True}, "comfyui", "ComfyUI does not read changes of a bias .* leave β out"),
        (unet, {"bias": True}, "comfyui", "to_q has no bias that β could change there"),
        (flux, {"targets": ("norm_out.linear",)}, "kohya", "kohya takes none of the layers of this adapter"),
        (flux, {"scale": True}, "comfyui", "cannot be a LoRA: .*trains scales"),
    ],
)
def test_what_cannot_be_written_is_refused(make, settings, naming, reason, tmp_path):
    _, model, _ = adapted(make, **settings)
    with pytest.raises(ValueError, match=reason):
        export_lora(model, tmp_path / "out", naming=naming)
    assert not (tmp_path / "out").exists()


def test_the_guides_table_says_what_is_taken():
    page = (Path(__file__).parents[2] / "docs/other_programs.md").read_text()
    rows = re.findall(r"^\| .+? \| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert {kind for kind, *_ in rows} == {*TAKEN["kohya"], *TAKEN["comfyui"], *READ_BY_DIFFUSERS_NAMES}
    for kind, kohya, comfyui, beta in rows:
        assert (kohya == "refused") == (kind not in TAKEN["kohya"]), kind
        assert (comfyui == "diffusers' names") == (kind in READ_BY_DIFFUSERS_NAMES), kind
        assert (beta == "refused") == (kind not in TAKEN["comfyui"]), kind
