"""LoRAs by the names of other programs; what diffusers itself makes of the same file is the answer."""

import copy
import json

import pytest
import torch
from rounding import assert_rounded
from safetensors.torch import save_file
from tiny_models import flux, make_dit, unet

from onelora_diffusion import OneLoRADiTPipeline, OneLoRALoaderMixin, adapter_state_dict
from onelora_diffusion.denoisers import denoiser_name
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.pipelines.foreign_names import denoiser_tensors
from onelora_diffusion.storage.lora import import_foreign

RANK, ALPHA = 2, 3.0


def sdxl_pipeline():
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
    ).eval()
    _, inputs = unet()
    return StableDiffusionXLPipeline(None, None, None, None, None, model, None), model, inputs


def flux_pipeline():
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    model, inputs = flux()
    return FluxPipeline(None, None, None, None, None, None, transformer=model.eval()), model, inputs


def kohya(shapes, down="lora_down", up="lora_up"):
    """name of a layer -> (out_features, in_features), as a LoRA of random values."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.{down}.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{name}.{up}.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


SDXL_KOHYA = {
    "lora_unet_input_blocks_4_1_proj_in": (16, 16),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (16, 8),
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0": (16, 16),
    "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_0_proj": (128, 16),
}
FLUX_KOHYA = {  # but linear1 of the single blocks: diffusers' converter, with which it is compared, has one width
    "lora_unet_double_blocks_0_img_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_txt_mlp_0": (128, 32),
    "lora_unet_single_blocks_0_linear2": (32, 160),
}


@pytest.mark.parametrize("make, shapes", [(sdxl_pipeline, SDXL_KOHYA), (flux_pipeline, FLUX_KOHYA)])
def test_kohyas_names_for_another_tree_are_converted_as_diffusers_does(make, shapes, tmp_path):
    save_file(kohya(shapes), tmp_path / "kohya.safetensors")
    stock, stock_model, inputs = make()
    pipe = OneLoRALoaderMixin.from_pipe(copy.copy(stock))
    model = copy.deepcopy(stock_model)
    pipe.register_modules(**{denoiser_name(pipe): model})
    with torch.no_grad():
        base = model(**inputs).sample
        stock.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
        pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
        expected = stock_model(**inputs).sample
        assert (expected - base).abs().max() > 0.01
        assert_rounded(model(**inputs).sample, expected, model)


def test_a_path_written_with_underscores():
    """kohya's scripts on a diffusers tree and OneTrainer; diffusers has no converter for DiT."""
    path = "transformer_blocks.0.attn1.to_q"
    outputs = []
    for name in (f"transformer.{path}", f"lora_transformer_{path}", f"lora_unet_{path}"):
        name = name.replace(".", "_") if name.startswith("lora_") else name
        pipe = OneLoRADiTPipeline.from_pipe(load_base())
        pipe.transformer = make_dit()
        pipe.load_lora_weights(kohya({name: (32, 32)}), adapter_name="it")
        outputs.append(adapter_state_dict(pipe.transformer, "it"))
    assert [set(output) for output in outputs] == [set(outputs[0])] * 3
    assert all(torch.equal(t, outputs[0][key]) for output in outputs for key, t in output.items())
    (up,) = (tensor for key, tensor in outputs[0].items() if key.endswith("lora_B.weight"))
    written = kohya({"it": (32, 32)})["it.lora_up.weight"]
    assert_rounded(up, ALPHA / RANK * written, terms=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(96, 1)}, "has no lora_magnitude_vector"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.diff": torch.ones(96, 32)}, "is part of changes of whole weights"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.ones(95)}, "is no part of a LoRA that"),
        (kohya({"lora_unet_double_blocks_0_nowhere": (8, 8)}), "cannot be converted for FluxPipeline: .*_0_nowhere"),
        (kohya({"lora_unet_single_blocks_0_linear1": (223, 32)}), "cannot be converted for FluxPipeline: Assert"),
    ],
)
def test_what_a_converter_would_drop_is_refused(change, message):
    stock, model, inputs = flux_pipeline()
    pipe = OneLoRALoaderMixin.from_pipe(stock)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(kohya(FLUX_KOHYA) | change)
    assert pipe.get_list_adapters() == {}


def test_native_names_that_are_partly_diffusers_own_are_converted():
    """Z-Image's differ in the attention's output alone; the prefix is ComfyUI's."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    sizes = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6]}
    model = ZImageTransformer2DModel(in_channels=4, n_layers=1, n_refiner_layers=1, axes_lens=[64, 16, 16], **sizes)
    own = {"layers.0.attention.to_q": (32, 32), "layers.0.attention.to_out.0": (32, 32)}
    native = {f"diffusion_model.{name}".replace("to_out.0", "out"): shape for name, shape in own.items()}
    found, expected = (
        import_foreign(model, denoiser_tensors(ZImagePipeline, model, kohya(shapes), "it"), {}, "it").tensors
        for shapes in (native, {f"diffusion_model.{name}": shape for name, shape in own.items()})
    )
    assert {key.split(".onelora_")[0] for key in found} == set(own) and found.keys() == expected.keys()
    for path in own:
        up, down = (f"{path}.onelora_lora_{part}.weight" for part in "BA")
        assert_rounded(found[up] @ found[down], expected[up] @ expected[down], terms=RANK)


def test_a_converter_that_drops_a_layer_is_noticed():
    class Pipeline:
        @classmethod
        def lora_state_dict(cls, tensors, **settings):
            return {key: tensor for key, tensor in tensors.items() if "middle" not in key}, None

    with pytest.raises(ValueError, match="it: not all of it can be converted for Pipeline"):
        denoiser_tensors(Pipeline, sdxl_pipeline()[1], kohya(SDXL_KOHYA), "it")


def test_a_fused_layer_is_parted_at_the_models_own_width():
    model = flux()[0]
    written = kohya({"lora_unet_single_blocks_0_linear1": (224, 32)})
    found = denoiser_tensors(type("Pipeline", (), {"lora_state_dict": None}), model, written, "it")
    up = written["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    expected = zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), up.split((32, 32, 32, 128)), strict=True)
    for name, rows in expected:
        assert torch.equal(found[f"single_transformer_blocks.0.{name}.lora_up.weight"], rows)
    assert len(found) == 12


def test_keys_of_text_encoders_are_left_with_a_warning(tmp_path, caplog):
    """Their settings, too: rank and alpha of the text encoder are not the transformer's."""
    pipe = OneLoRADiTPipeline.from_pipe(load_base())
    pipe.transformer = make_dit()
    own = {
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.full((1, 32), 2.0),
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.arange(32.0).unsqueeze(1),
    }
    others = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(1, 4),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(1, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 4),
    }
    settings = {"transformer.r": 1, "transformer.lora_alpha": 3, "text_encoder.r": 1, "text_encoder.lora_alpha": 7}
    save_file(own | others, tmp_path / "both.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    pipe.load_lora_weights(tmp_path, adapter_name="it")
    assert "both.safetensors: 3 of 5 tensors are for text encoders, and are left out" in caplog.text
    (vector,) = adapter_state_dict(pipe.transformer, "it").values()
    assert torch.equal(vector, 2 * 3 * torch.arange(32.0))
    with pytest.raises(ValueError, match="the state dict is for text encoders only .*fc1.lora_A.weight"):
        pipe.load_lora_weights(others)
    assert pipe.get_list_adapters() == {"transformer": ["it"]}
