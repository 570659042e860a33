"""Pipelines of FLUX.1, SD3.5 and SDXL at their full width, with random weights, and few layers in each model."""

import torch

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.pipelines.base import miniature_text_path

TEXT_LAYERS = 2  # of each text encoder
FLOW = {"shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(length: int):
    """The miniature's, which spells words; the encoders here know its tokens."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(miniature_text_path() / "tokenizer")
    found.model_max_length = length
    return found


def clip(width: int, heads: int, projection: int | None = None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens = tokenizer(77)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        bos_token_id=tokens.eos_token_id,
        eos_token_id=tokens.eos_token_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=TEXT_LAYERS,
        projection_dim=projection or width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(width: int = 4096):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_ff": width * 5 // 2, "d_kv": 64, "num_heads": width // 64}
    config = T5Config(vocab_size=len(tokenizer(77)), num_layers=TEXT_LAYERS, feed_forward_proj="gated-gelu", **sizes)
    return T5EncoderModel(config)


def vae(channels: int, widths: tuple[int, ...], **scale):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=channels,
        layers_per_block=2,
        norm_num_groups=widths[0] // 4,
        **scale,
    )


VAE_WIDTHS = (128, 256, 512, 512)


def flux(size: float):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
        vae=vae(16, scaled(VAE_WIDTHS, size), scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(*scaled((768, 12), size)),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(*scaled((4096,), size)),
        tokenizer_2=tokenizer(512),
        transformer=FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            guidance_embeds=True,
            num_attention_heads=int(24 * size),
            joint_attention_dim=int(4096 * size),
            pooled_projection_dim=int(768 * size),
        ),
    )


def sd3(size: float):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vae(16, scaled(VAE_WIDTHS, size), scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(*scaled((768, 12, 768), size)),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(*scaled((1280, 20, 1280), size)),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(*scaled((4096,), size)),
        tokenizer_3=tokenizer(256),
        transformer=SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=int(32 * size) + 6 * (size == 1),
            caption_projection_dim=64 * (int(32 * size) + 6 * (size == 1)),
            joint_attention_dim=int(4096 * size),
            pooled_projection_dim=int(2048 * size),
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    )


def sdxl(size: float):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **BETAS),
        vae=vae(4, scaled(VAE_WIDTHS, size), scaling_factor=0.13025),
        text_encoder=clip(*scaled((768, 12), size)),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(*scaled((1280, 20, 1280), size)),
        tokenizer_2=tokenizer(77),
        unet=UNet2DConditionModel(
            block_out_channels=scaled((320, 640, 1280), size),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=32 if size == 1 else 8,
            transformer_layers_per_block=1,
            attention_head_dim=scaled((5, 10, 20), size),
            cross_attention_dim=int(2048 * size),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=int(1280 * size) + 6 * 256,
        ),
    )


def scaled(numbers: tuple[int, ...], size: float) -> tuple[int, ...]:
    return tuple(max(1, int(number * size)) for number in numbers)


BASES = {"flux": ("FLUX.1-dev", flux), "sd3": ("SD3.5", sd3), "sdxl": ("SDXL", sdxl)}


def make_base(name: str, dtype: torch.dtype, size: float = 1):
    """A pipeline in a precision, its models frozen; `size` 1 is the full width."""
    torch.manual_seed(0)
    pipeline = BASES[name][1](size)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part.eval().requires_grad_(False), dtype)  # without diffusers' warning of none kept
    with torch.no_grad():
        for parameter in denoiser_of(pipeline).parameters():
            if not parameter.any():  # as outputs and gates are made, which in a trained base are not
                parameter.normal_(std=0.02)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
