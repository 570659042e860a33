"""Small random text-to-image pipelines of diffusers, one of each family, with encoders and tokenizers made here."""

import torch
from denoisers import flux, pixart, sana, sd3

BEGIN, END, PAD = "<begin>", "<end>", "<pad>"


def make_tokenizer(length: int):
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
    )


TOKENS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_clip(projection: int | None = None, length: int = 24):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **TOKENS,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=length,
        projection_dim=projection or 8,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def make_t5(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**TOKENS, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()


def make_gemma(width: int):
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        **TOKENS,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return Gemma2Model(config).eval()


def make_vae(latent_channels: int, shift_factor: float | None = 0.1, levels: int = 2):
    """Half as many latents a side as pixels; a half of that with every further level."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        norm_num_groups=4,
        latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=0.5,
        shift_factor=shift_factor,
        sample_size=16,
    ).eval()


def make_dc_vae():
    from diffusers import AutoencoderDC

    blocks = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()


def make_flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(1),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_t5(8),
        tokenizer_2=make_tokenizer(24),
        transformer=flux()[0],
    )


def make_sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=sd3()[0],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(4),
        text_encoder=make_clip(projection=4),
        tokenizer=make_tokenizer(24),
        text_encoder_2=make_clip(projection=4),
        tokenizer_2=make_tokenizer(24),
        text_encoder_3=make_t5(16),
        tokenizer_3=make_tokenizer(24),
    )


def make_pixart():
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    return PixArtSigmaPipeline(
        tokenizer=make_tokenizer(24),
        text_encoder=make_t5(16),
        vae=make_vae(4, shift_factor=None),
        transformer=pixart()[0],
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def make_sana():
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    return SanaPipeline(
        tokenizer=make_tokenizer(24),
        text_encoder=make_gemma(8),
        vae=make_dc_vae(),
        transformer=sana()[0],
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


MAKERS = {"pixart": make_pixart, "sd3": make_sd3, "flux": make_flux, "sana": make_sana}
RESOLUTION = {"pixart": 16, "sd3": 16, "flux": 16, "sana": 32}  # SANA's pipeline takes multiples of 32


def make_pipeline(name: str, seed: int = 0):
    torch.manual_seed(seed)
    pipeline = MAKERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
