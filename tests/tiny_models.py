"""Small random models and pipelines, of the classes that are used in earnest."""

import functools
import inspect

import diffusers
import torch

from benchmarks.tiny_dit import make_dit, make_dit_pipeline, make_vae, randomize, vae_blocks
from onelora_diffusion.denoisers import denoisers_in, guides_in

__all__ = ["make_dit", "make_dit_pipeline", "randomize"]

BEGIN, END, PAD = "<begin>", "<end>", "<pad>"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def dit_inputs(batch: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "class_labels": torch.arange(batch) % 3,
    }


# Text encoders and tokenizers.


def make_tokenizer(length: int, chat_template: str | None = None):
    """A token for each byte, between a beginning and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([PAD, BEGIN, END, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{BEGIN} $A {END}", special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])]
    )
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def make_encoder(kind: str, **config):
    """A text encoder of transformers, by the name of its class."""
    import transformers

    model = getattr(transformers, kind)
    return model(model.config_class(**config)).eval()


SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def make_clip(projection: int | None = None, length: int = 24):
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return make_encoder(kind, **TOKENS, **SIZES, max_position_embeddings=length, projection_dim=projection or 8)


def make_t5(width: int, kind: str = "T5EncoderModel"):
    return make_encoder(kind, **TOKENS, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)


LAYERS = {"intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}


def make_gemma():
    return make_encoder("Gemma2Model", **TOKENS, hidden_size=8, **LAYERS | {"num_hidden_layers": 1}, head_dim=4)


def make_qwen3(width: int = 8, **changes):
    return make_encoder("Qwen3ForCausalLM", **TOKENS, hidden_size=width, head_dim=4, **LAYERS | changes)


def make_qwen_vl(kind: str, width: int, text: dict, vision: dict, **ids):
    text = {**TOKENS, "hidden_size": width, **LAYERS, **text}
    sizes = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return make_encoder(kind, text_config=text, vision_config=sizes | vision, **ids)


def make_qwen2_5_vl(width: int, ids=(), **changes):
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    return make_qwen_vl("Qwen2_5_VLForConditionalGeneration", width, rope | changes, {}, **dict(ids))


def make_qwen3_vl(width: int, kind: str = "Qwen3VLModel", vision=(), ids=(), **changes):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = {"head_dim": 8, "rope_parameters": rope} | changes
    return make_qwen_vl(kind, width, text, {"deepstack_visual_indexes": [0]} | dict(vision), **dict(ids))


# Autoencoders: half as many latents a side as pixels; a half of that with every further level.


def make_flux2_vae():
    vae = diffusers.AutoencoderKLFlux2(latent_channels=4, **vae_blocks(2)).eval()
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def make_qwen_vae(kind: str = "AutoencoderKLQwenImage", **changes):
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    latents = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 0.8, 1.1]}
    return getattr(diffusers, kind)(**sizes | latents | changes).eval()


def make_wan_vae():
    sizes = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    return make_qwen_vae("AutoencoderKLWan", scale_factor_spatial=4, scale_factor_temporal=4, **sizes)


def make_dc_vae():
    blocks = ("ResBlock", "EfficientViTBlock")
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": blocks,
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    sampling = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    functions = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, **sides, **sampling, **functions, scaling_factor=0.4
    ).eval()


def make_ltx_vae(scaling=(True, False)):
    sides = {"block_out_channels": (8, 8), "layers_per_block": (1, 1, 1), "spatio_temporal_scaling": scaling}
    decoder = {f"decoder_{name}": value for name, value in sides.items()}
    upsampling = {"decoder_inject_noise": (False,) * 3, "upsample_residual": (False,) * 2, "upsample_factor": (1,) * 2}
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        **sides,
        **decoder,
        **upsampling,
        downsample_type=("conv",) * 2,
        patch_size=1,
        timestep_conditioning=True,  # as since LTX 0.9.1: its decoder is told a time
    ).eval()


# Denoisers; the first ones each with a batch of its inputs.

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AXES = {"axes_dims_rope": (4, 4, 8)}
FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8, **HEADS, **AXES}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def flux():
    model = diffusers.FluxTransformer2DModel(patch_size=1, pooled_projection_dim=8, **FLUX)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(5, 3),
    }
    return model, inputs


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([10, 700]),
    }
    return model, inputs


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([10, 700]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }
    return model, inputs


def sana():
    model = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.tensor([10.0, 700.0]),
    }
    return model, inputs


def make_unet(**changes):
    return diffusers.UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=4, **UNET | changes)


def unet():
    model = make_unet()
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }
    return model, inputs


def wan_transformer(in_channels: int = 4, **changes):
    sizes = {"text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 128}
    return diffusers.WanTransformer3DModel(in_channels=in_channels, out_channels=4, **sizes, **HEADS, **changes)


def flux2_transformer(**changes):
    layers = {"num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)}
    sizes = {"in_channels": 16, "joint_attention_dim": 12, "timestep_guidance_channels": 8}
    return diffusers.Flux2Transformer2DModel(**layers, **sizes, **HEADS, **changes)


def cosmos_transformer(**changes):
    channels, layers = {"in_channels": 4, "out_channels": 4}, {"num_layers": 2, "mlp_ratio": 2.0}
    sizes = {"text_embed_dim": 8, "adaln_lora_dim": 4, "patch_size": (1, 2, 2)}
    return diffusers.CosmosTransformer3DModel(**channels, **layers, **sizes, **HEADS, **changes)


# Text-to-image pipelines.


def flow_matching(**changes):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


def flow_prediction(kind: str):
    return getattr(diffusers, kind)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def make_hunyuan_video15():
    from transformers import ByT5Tokenizer

    rope = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=make_encoder("Qwen2_5_VLTextModel", **TOKENS, hidden_size=16, **LAYERS, **rope),
        tokenizer=make_tokenizer(512, CHAT),
        text_encoder_2=make_encoder(
            "T5EncoderModel", vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        ),
        tokenizer_2=ByT5Tokenizer(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ).eval(),
        scheduler=flow_matching(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            **HEADS,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=12,
            rope_axes_dim=(4, 6, 6),
            target_size=16,
            task_type="t2v",
        ).eval(),
    )


def make_wan(kind: str = "WanPipeline", make_transformer=wan_transformer, **changes):
    """A pipeline of Wan's components; the transformer is made last."""
    return getattr(diffusers, kind)(
        tokenizer=make_tokenizer(512),
        text_encoder=make_t5(8, "UMT5EncoderModel"),
        vae=make_wan_vae(),
        scheduler=flow_prediction("UniPCMultistepScheduler"),
        transformer=make_transformer(),
        **changes,
    )


def make_flux(kind, make_transformer):
    """A pipeline of FLUX.1's components and of its class `kind`; the transformer is made last."""
    return kind(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_vae(1),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_t5(8),
        tokenizer_2=make_tokenizer(24),
        transformer=make_transformer(),
    )


def make_stable_diffusion(kind, make_unet, scheduler):
    """A pipeline of Stable Diffusion's components and of its class `kind`; the UNet is made last."""
    return kind(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        unet=make_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_hunyuan_video():
    return diffusers.HunyuanVideoPipeline(
        text_encoder=make_encoder("LlamaModel", **TOKENS, hidden_size=8, **LAYERS),
        tokenizer=make_tokenizer(512),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=True,
            **HEADS,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ).eval(),
        scheduler=flow_matching(shift=7.0),
        text_encoder_2=make_clip(length=128),
        tokenizer_2=make_tokenizer(128),
    )


def make_hidream():
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=flow_matching(),
        vae=make_vae(4),
        text_encoder=make_clip(projection=4, length=128),
        tokenizer=make_tokenizer(128),
        text_encoder_2=make_clip(projection=4, length=128),
        tokenizer_2=make_tokenizer(128),
        text_encoder_3=make_t5(8),
        tokenizer_3=make_tokenizer(128),
        text_encoder_4=make_encoder("LlamaForCausalLM", **TOKENS, hidden_size=8, **LAYERS),
        tokenizer_4=make_tokenizer(128),
        transformer=diffusers.HiDreamImageTransformer2DModel(
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


def make_deepfloyd():
    """A pipeline of pixels, whose UNet has blocks of another kind than it names, and learns the variance."""
    unet = make_unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
    )
    return diffusers.IFPipeline(
        tokenizer=make_tokenizer(77),
        text_encoder=make_t5(8),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def make_kandinsky3():
    """A pipeline whose autoencoder has another name, and whose denoiser averages over prompts as they are padded."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.Kandinsky3Pipeline(
        tokenizer=make_tokenizer(128),
        text_encoder=make_t5(8),
        unet=diffusers.Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 16),
            cross_attention_dim=4,
            encoder_hid_dim=8,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        movq=diffusers.VQModel(**blocks, block_out_channels=(4,) * 4, latent_channels=4, norm_num_groups=4).eval(),
    )


def make_ideogram4():
    """A pipeline that encodes prompt and size together, and is guided by a transformer of its own.

    It pads prompts to 128 tokens, and not to 2,048.
    """
    call = inspect.unwrap(diffusers.Ideogram4Pipeline.__call__)
    defaults = {name: each.default for name, each in inspect.signature(call).parameters.items() if name != "self"}
    call.__defaults__ = tuple((defaults | {"max_sequence_length": 128}).values())
    sizes = {"attention_head_dim": 12, "num_attention_heads": 2, "intermediate_size": 16, "adaln_dim": 8}
    make = functools.partial(
        diffusers.Ideogram4Transformer2DModel,
        in_channels=16,
        num_layers=2,
        llm_features_dim=13 * 8,  # of the layers of its text encoder that it reads
        mrope_section=(2, 2, 2),
        **sizes,
    )
    return diffusers.Ideogram4Pipeline(
        scheduler=flow_matching(shift=1.0),
        vae=make_flux2_vae(),
        text_encoder=make_qwen3_vl(8, num_hidden_layers=36),
        tokenizer=make_tokenizer(512, CHAT),
        transformer=make(),
        unconditional_transformer=make(),
    )


def make_ldm():
    """A pipeline without a method that encodes prompts, whose autoencoder and text encoder have other names."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    sizes = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 4, "d_model": 8}
    return diffusers.LDMTextToImagePipeline(
        vqvae=make_vae(4, shift_factor=None, levels=4),
        bert=LDMBertModel(LDMBertConfig(vocab_size=259, max_position_embeddings=77, pad_token_id=0, **sizes)).eval(),
        tokenizer=make_tokenizer(77),
        unet=unet()[0],
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **BETAS),
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIPELINES = {
    "pixart": lambda: diffusers.PixArtSigmaPipeline(
        tokenizer=make_tokenizer(24),
        text_encoder=make_t5(16),
        vae=make_vae(4, shift_factor=None),
        transformer=pixart()[0],
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    ),
    "sd3": lambda: diffusers.StableDiffusion3Pipeline(
        transformer=sd3()[0],
        scheduler=flow_matching(),
        vae=make_vae(4),
        text_encoder=make_clip(projection=4),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_clip(projection=4),
        tokenizer_2=make_tokenizer(24),
        text_encoder_3=make_t5(16),
        tokenizer_3=make_tokenizer(24),
    ),
    "flux": lambda: make_flux(diffusers.FluxPipeline, lambda: flux()[0]),
    "sana": lambda: diffusers.SanaPipeline(
        tokenizer=make_tokenizer(24),
        text_encoder=make_gemma(),
        vae=make_dc_vae(),
        transformer=sana()[0],
        scheduler=flow_prediction("DPMSolverMultistepScheduler"),
    ),
    "sd15": lambda: make_stable_diffusion(
        diffusers.StableDiffusionPipeline,
        lambda: unet()[0],
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS),
    ),
    "sdxl": lambda: diffusers.StableDiffusionXLPipeline(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_clip(projection=4),
        tokenizer_2=make_tokenizer(24),
        unet=diffusers.UNet2DConditionModel(
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=28,
            **UNET,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **BETAS),
        force_zeros_for_empty_prompt=True,
    ),
    "animatediff": lambda: diffusers.AnimateDiffPipeline(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        unet=diffusers.UNetMotionModel(
            cross_attention_dim=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=32,
            **UNET
            | {name: tuple(kind.replace("2D", "Motion") for kind in UNET[name]) for name in UNET if "types" in name},
        ),
        motion_adapter=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **BETAS),
    ),
    "lcm": lambda: make_stable_diffusion(
        diffusers.LatentConsistencyModelPipeline,
        lambda: make_unet(time_cond_proj_dim=8),
        diffusers.LCMScheduler(clip_sample=False, set_alpha_to_one=False, **BETAS),
    ),
    "deepfloyd": make_deepfloyd,
    "kandinsky3": make_kandinsky3,
    "prx_pixel": lambda: diffusers.PRXPixelPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            patch_size=4,
            in_channels=3,
            context_in_dim=8,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            axes_dim=[4, 4],
            bottleneck_size=8,
            resolution_embeds=True,
        ),
        scheduler=flow_matching(),
        text_encoder=make_qwen3().model,
        tokenizer=make_tokenizer(64),
        prompt_max_tokens=64,
    ),
    "qwen_image": lambda: diffusers.QwenImagePipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_qwen_vae(),
        text_encoder=make_qwen2_5_vl(16),
        tokenizer=make_tokenizer(512),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, **HEADS, **AXES
        ),
    ),
    "z_image": lambda: diffusers.ZImagePipeline(
        scheduler=flow_matching(),
        vae=make_vae(4),
        text_encoder=make_qwen3(),
        tokenizer=make_tokenizer(512, CHAT),
        transformer=diffusers.ZImageTransformer2DModel(
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
    ),
    "lumina2": lambda: diffusers.Lumina2Pipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_vae(4, levels=4),
        text_encoder=make_gemma(),
        tokenizer=make_tokenizer(256),
        transformer=diffusers.Lumina2Transformer2DModel(
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
    ),
    "aura_flow": lambda: diffusers.AuraFlowPipeline(
        tokenizer=make_tokenizer(256),
        text_encoder=make_t5(16, "UMT5EncoderModel"),
        vae=make_vae(4),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            num_mmdit_layers=2,
            num_single_dit_layers=1,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=4096,
            **HEADS,
        ),
        scheduler=flow_matching(),
    ),
    "cogview4": lambda: diffusers.CogView4Pipeline(
        tokenizer=make_tokenizer(1024),
        text_encoder=make_encoder("GlmModel", **TOKENS, hidden_size=8, head_dim=4, **LAYERS),
        vae=make_vae(4),
        transformer=diffusers.CogView4Transformer2DModel(
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
        scheduler=flow_matching(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    ),
    "chroma": lambda: diffusers.ChromaPipeline(
        scheduler=flow_matching(),
        vae=make_vae(1),
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(64),
        transformer=diffusers.ChromaTransformer2DModel(
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **FLUX
        ),
    ),
    "flux2_klein": lambda: diffusers.Flux2KleinPipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_flux2_vae(),
        text_encoder=make_qwen3(4, num_hidden_layers=28),
        tokenizer=make_tokenizer(512, CHAT),
        transformer=flux2_transformer(guidance_embeds=False),
    ),
    "wan": make_wan,
    "wan22": lambda: make_wan(transformer_2=wan_transformer(), boundary_ratio=0.5),
    "wan_ti2v": lambda: make_wan(expand_timesteps=True),
    "hunyuan_video15": make_hunyuan_video15,
    "ltx": lambda: diffusers.LTXPipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_ltx_vae(),
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(128),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=8, **HEADS
        ),
    ),
    "hunyuan_video": make_hunyuan_video,
    "hidream": make_hidream,
    "krea2": lambda: diffusers.Krea2Pipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_qwen_vae(),
        text_encoder=make_qwen3_vl(8),
        tokenizer=make_tokenizer(512),
        text_encoder_select_layers=(1, 2),
        transformer=diffusers.Krea2Transformer2DModel(
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
    ),
    "ovis": lambda: diffusers.OvisImagePipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_vae(1),
        text_encoder=make_qwen3().model,
        tokenizer=make_tokenizer(512, CHAT),
        transformer=diffusers.OvisImageTransformer2DModel(out_channels=4, **FLUX),
    ),
    "ideogram4": make_ideogram4,
    "ldm": make_ldm,
    "ernie_image": lambda: diffusers.ErnieImagePipeline(
        scheduler=flow_matching(),
        vae=make_flux2_vae(),
        text_encoder=make_qwen3().model,
        tokenizer=make_tokenizer(512),
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=8,
            rope_axes_dim=(4, 4, 8),
        ),
    ),
}
NAMED = ("pixart", "sd3", "flux", "sana")  # whose families have files of their own; the others are recorded
RESOLUTION = dict.fromkeys(PIPELINES, 16) | {"sana": 32}  # SANA's pipeline takes multiples of 32


def make_pipeline(name: str, seed: int = 0):
    torch.manual_seed(seed)
    try:
        pipeline = PIPELINES[name]()
    except AttributeError as error:  # the oldest diffusers that is promised does not have all of them
        if not str(error).startswith("module diffusers has no attribute"):
            raise
        import pytest

        pytest.skip(str(error))
    for denoiser in (denoisers_in(pipeline) | guides_in(pipeline)).values():
        for parameter in denoiser.eval().parameters():
            if not parameter.any():  # as gates and outputs are made, through which nothing would be seen
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
