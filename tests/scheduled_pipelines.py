"""Small pipelines that compute between their scheduler and their denoiser; importing this adds them to `PIPELINES`."""

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from tiny_models import (
    PIPELINES,
    RESOLUTION,
    cosmos_transformer,
    make_dc_vae,
    make_gemma,
    make_t5,
    make_tokenizer,
    make_wan_vae,
    sana,
)


class Unchecked(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In the place of the model that checks prompts and pictures of Cosmos, which is large."""

    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.register_buffer("at", torch.zeros(()), persistent=False)

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def make_cosmos():
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(512),
        transformer=cosmos_transformer(max_size=(4, 32, 32)),
        vae=diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=2,
            patch_size=4,
            scaling_factor=1.0,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ).eval(),
        scheduler=diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min"),
        safety_checker=Unchecked(),
    )


def make_cosmos2():
    return diffusers.Cosmos2TextToImagePipeline(
        text_encoder=make_t5(8),
        tokenizer=make_tokenizer(512),
        transformer=cosmos_transformer(max_size=(4, 32, 32)),
        vae=make_wan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Unchecked(),
    )


def make_sana_sprint():
    config = {name: value for name, value in sana()[0].config.items() if not name.startswith("_")}
    return diffusers.SanaSprintPipeline(
        tokenizer=make_tokenizer(24),
        text_encoder=make_gemma(),
        vae=make_dc_vae(),
        transformer=diffusers.SanaTransformer2DModel(
            **config | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
        ),
        scheduler=diffusers.SCMScheduler(),
    )


SCHEDULED = {"cosmos": make_cosmos, "cosmos2": make_cosmos2, "sana_sprint": make_sana_sprint}
PIPELINES |= SCHEDULED
RESOLUTION |= {"sana_sprint": 32}
