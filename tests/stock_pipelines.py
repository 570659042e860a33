"""Small random pipelines of diffusers of families that have no file of their own here."""

import torch
from text_pipelines import TOKENS, make_clip, make_gemma, make_t5, make_tokenizer, make_vae

from onelora_diffusion.denoisers import denoisers_in

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LAYERS = {"intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


def make_chat_tokenizer(length: int = 512):
    tokenizer = make_tokenizer(length)
    tokenizer.chat_template = CHAT
    return tokenizer


def make_umt5(width: int):
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**TOKENS, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()


def make_qwen3(width: int, **changes):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TOKENS, hidden_size=width, head_dim=4, **LAYERS | changes)).eval()


def make_qwen_vl(width: int):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **TOKENS,
            "hidden_size": width,
            **LAYERS,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_qwen3_vl(width: int):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config={**TOKENS, "hidden_size": width, "head_dim": 8, **LAYERS, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0],
        },
    )
    return Qwen3VLModel(config).eval()


def make_glm(width: int):
    from transformers import GlmConfig, GlmModel

    return GlmModel(GlmConfig(**TOKENS, hidden_size=width, head_dim=4, **LAYERS)).eval()


def make_llama(width: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TOKENS, hidden_size=width, **LAYERS)).eval()


def make_qwen_vae(kind: str = "AutoencoderKLQwenImage"):
    import diffusers

    return getattr(diffusers, kind)(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 0.8, 1.1],
        **({"scale_factor_spatial": 2, "scale_factor_temporal": 4} if kind == "AutoencoderKLWan" else {}),
    ).eval()


def make_flux2_vae():
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def scheduler(**changes):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
AXES = {"axes_dims_rope": (4, 4, 8)}


def make_qwen_image():
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    return QwenImagePipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=make_qwen_vae(),
        text_encoder=make_qwen_vl(16),
        tokenizer=make_tokenizer(512),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, **HEADS, **AXES
        ),
    )


def make_z_image():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    return ZImagePipeline(
        scheduler=scheduler(),
        vae=make_vae(4),
        text_encoder=make_qwen3(8),
        tokenizer=make_chat_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 4, 8],
            axes_lens=[1024, 128, 128],
        ),
    )


def make_lumina2():
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    return Lumina2Pipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=make_vae(4, levels=4),
        text_encoder=make_gemma(8),
        tokenizer=make_tokenizer(256),
        transformer=Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(300, 128, 128),
            cap_feat_dim=8,
        ),
    )


def make_aura_flow():
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    return AuraFlowPipeline(
        tokenizer=make_tokenizer(256),
        text_encoder=make_umt5(16),
        vae=make_vae(4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            num_mmdit_layers=2,
            num_single_dit_layers=1,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=4096,
            **HEADS,
        ),
        scheduler=scheduler(),
    )


def make_cogview4():
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    return CogView4Pipeline(
        tokenizer=make_tokenizer(1024),
        text_encoder=make_glm(8),
        vae=make_vae(4),
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=8,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=16,
            rope_axes_dim=(64, 64),
            **HEADS,
        ),
        scheduler=scheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def make_chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    return ChromaPipeline(
        scheduler=scheduler(),
        vae=make_vae(1),
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(64),
        transformer=ChromaTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=8,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **HEADS,
            **AXES,
        ),
    )


def make_flux2_klein():
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    return Flux2KleinPipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=make_flux2_vae(),
        text_encoder=make_qwen3(4, num_hidden_layers=28),
        tokenizer=make_chat_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=12,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
            **HEADS,
        ),
    )


def make_wan_transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=128,
        **HEADS,
    )


def make_wan22():
    return make_wan(transformer_2=make_wan_transformer(), boundary_ratio=0.5)


def make_wan(**second):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=make_tokenizer(512),
        text_encoder=make_umt5(8),
        vae=make_qwen_vae("AutoencoderKLWan"),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=make_wan_transformer(),
        **second,
    )


def make_ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    flags = (True, False)
    return LTXPipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=flags,
            decoder_spatio_temporal_scaling=flags,
            decoder_inject_noise=(False,) * 3,
            downsample_type=("conv",) * 2,
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            patch_size=1,
        ).eval(),
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(128),
        transformer=LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=8, **HEADS
        ),
    )


def make_hidream():
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    pipeline = HiDreamImagePipeline(
        scheduler=scheduler(),
        vae=make_vae(4),
        text_encoder=make_clip(projection=4, length=128),
        tokenizer=make_tokenizer(128),
        text_encoder_2=make_clip(projection=4, length=128),
        tokenizer_2=make_tokenizer(128),
        text_encoder_3=make_t5(8),
        tokenizer_3=make_tokenizer(128),
        text_encoder_4=make_llama(8),
        tokenizer_4=make_tokenizer(128),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[8, 8],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            llama_layers=[0, 1],
            **HEADS,
        ),
    )
    pipeline.default_sample_size = 48  # latents of the one size that it draws, 128 by itself
    return pipeline


def make_krea2():
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    return Krea2Pipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=make_qwen_vae(),
        text_encoder=make_qwen3_vl(8),
        tokenizer=make_tokenizer(512),
        text_encoder_select_layers=(1, 2),
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=8,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            **HEADS,
            **AXES,
        ),
    )


def make_ovis():
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    return OvisImagePipeline(
        scheduler=scheduler(use_dynamic_shifting=True),
        vae=make_vae(1),
        text_encoder=make_qwen3(8).model,
        tokenizer=make_chat_tokenizer(),
        transformer=OvisImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=8, **HEADS, **AXES
        ),
    )


def make_ernie_image():
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    return ErnieImagePipeline(
        scheduler=scheduler(),
        vae=make_flux2_vae(),
        text_encoder=make_qwen3(8).model,
        tokenizer=make_tokenizer(512),
        transformer=ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=8,
            rope_axes_dim=(4, 4, 8),
        ),
    )


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_sd15():
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        unet=UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=4, **UNET),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    return StableDiffusionXLPipeline(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_clip(projection=4),
        tokenizer_2=make_tokenizer(24),
        unet=UNet2DConditionModel(
            sample_size=8,
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=28,
            **UNET,
        ),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **BETAS),
        force_zeros_for_empty_prompt=True,
    )


STOCK = {
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "qwen_image": make_qwen_image,
    "z_image": make_z_image,
    "lumina2": make_lumina2,
    "aura_flow": make_aura_flow,
    "cogview4": make_cogview4,
    "chroma": make_chroma,
    "flux2_klein": make_flux2_klein,
    "wan": make_wan,
    "wan22": make_wan22,
    "wan_ti2v": lambda: make_wan(expand_timesteps=True),
    "ltx": make_ltx,
    "hidream": make_hidream,
    "krea2": make_krea2,
    "ovis": make_ovis,
    "ernie_image": make_ernie_image,
}


def make_stock(name: str, seed: int = 0):
    torch.manual_seed(seed)
    pipeline = STOCK[name]()
    for denoiser in denoisers_in(pipeline).values():
        for parameter in denoiser.eval().parameters():
            if not parameter.any():  # as gates and outputs are made, through which nothing would be seen
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
