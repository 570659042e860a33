"""Small random pipelines of diffusers that edit reference images, and small references for them."""

from functools import partial

import diffusers
import torch
from tiny_models import (
    AXES,
    BETAS,
    CHAT,
    HEADS,
    PIPELINES,
    TOKENS,
    flow_matching,
    flux2_transformer,
    make_encoder,
    make_flux,
    make_flux2_vae,
    make_pipeline,
    make_qwen2_5_vl,
    make_qwen3_vl,
    make_qwen_vae,
    make_stable_diffusion,
    make_tokenizer,
    make_unet,
    make_vae,
    make_wan_vae,
)

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_flux_transformer(**settings):
    layers = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return diffusers.FluxTransformer2DModel(**layers, **settings, **HEADS, **AXES)


def make_kontext():
    from diffusers.pipelines.flux import pipeline_flux_kontext

    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64), (96, 64)]  # megapixels otherwise
    return make_flux(
        diffusers.FluxKontextPipeline, partial(make_flux_transformer, in_channels=4, guidance_embeds=True)
    )


def make_flux_control():
    return make_flux(diffusers.FluxControlPipeline, partial(make_flux_transformer, in_channels=8, out_channels=4))


def make_qwen_processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = make_tokenizer(4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)})
    tokenizer.chat_template = CHAT
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)


def ids_of(tokenizer) -> dict[str, int]:
    """What configurations of Qwen's encoders say of a tokenizer."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(list(VISION)), strict=True))


def make_qwen_encoder(tokenizer):
    return make_qwen2_5_vl(16, ids_of(tokenizer), vocab_size=len(tokenizer), num_hidden_layers=2)


def make_qwen_edit(kind: str = "QwenImageEditPipeline"):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    own = pipeline_qwenimage_edit_plus.calculate_dimensions
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (*own(64 * 64, ratio), None)  # a megapixel else
    pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = 64 * 64
    processor = make_qwen_processor()
    return getattr(diffusers, kind)(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_qwen_vae(),
        text_encoder=make_qwen_encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, **HEADS, **AXES
        ),
    )


def make_joy_image():
    """It decodes its reference's latents as well, and draws of the last ones."""
    kind = diffusers.JoyImageEditPipeline  # which the oldest diffusers does not have
    from diffusers.pipelines.joyimage import image_processor
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    image_processor.find_best_bucket = lambda *sides, **sizes: (64, 64)  # a megapixel otherwise
    tokenizer = make_qwen_processor().tokenizer
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return kind(
        scheduler=flow_matching(),
        vae=make_wan_vae(),
        text_encoder=make_qwen3_vl(
            16, "Qwen3VLForConditionalGeneration", {"patch_size": 16}, ids_of(tokenizer), vocab_size=len(tokenizer)
        ),
        tokenizer=tokenizer,
        processor=Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT),
        transformer=diffusers.JoyImageEditTransformer3DModel(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            num_layers=2,
            rope_dim_list=[4, 6, 6],
            theta=256,
        ),
    )


def make_longcat():
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit

    pipeline_longcat_image_edit.calculate_dimensions = lambda area, ratio: (  # of a megapixel otherwise
        round(64 * max(ratio, 1)),
        round(64 * max(1 / ratio, 1)),
    )
    processor = make_qwen_processor()
    return diffusers.LongCatImageEditPipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_vae(16),
        text_encoder=make_qwen_encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        text_processor=processor,
        transformer=diffusers.LongCatImageTransformer2DModel(
            num_layers=1, num_single_layers=2, joint_attention_dim=16, pooled_projection_dim=16, **HEADS, **AXES
        ),
    )


def make_flux2():
    sizes = {"hidden_size": 4, "intermediate_size": 16, "num_attention_heads": 2}
    text = TOKENS | sizes | {"num_hidden_layers": 31, "num_key_value_heads": 1, "head_dim": 2}
    vision = sizes | {"num_hidden_layers": 1, "image_size": 30, "patch_size": 6}
    return diffusers.Flux2Pipeline(
        scheduler=flow_matching(use_dynamic_shifting=True),
        vae=make_flux2_vae(),
        text_encoder=make_encoder(
            "Mistral3ForConditionalGeneration",
            text_config=text | {"model_type": "mistral"},
            vision_config=vision | {"model_type": "pixtral"},
        ),
        tokenizer=make_tokenizer(512, CHAT),
        transformer=flux2_transformer(),
    )


def make_pix2pix():
    return make_stable_diffusion(
        diffusers.StableDiffusionInstructPix2PixPipeline,
        partial(make_unet, in_channels=8, out_channels=4),
        diffusers.DDIMScheduler(steps_offset=1, **BETAS),
    )


def make_pix2pix_xl():
    sdxl = PIPELINES["sdxl"]()
    unet = diffusers.UNet2DConditionModel.from_config(sdxl.unet.config, in_channels=8, out_channels=4)
    parts = sdxl.components | {"unet": unet}
    for name in ("image_encoder", "feature_extractor"):
        del parts[name]
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(**parts)


EDITS = {
    "kontext": make_kontext,
    "flux_control": make_flux_control,
    "qwen_edit": make_qwen_edit,
    "qwen_edit_plus": partial(make_qwen_edit, "QwenImageEditPlusPipeline"),
    "longcat": make_longcat,
    "joy_image": make_joy_image,
    "flux2": make_flux2,
    "pix2pix": make_pix2pix,
    "pix2pix_xl": make_pix2pix_xl,
}
EDITS_TOO = ("flux2_klein",)  # which draws without a reference as well
PIPELINES.update(EDITS)


def make_edit(name: str, seed: int = 0):
    """A pipeline of `EDITS`, or `flux2_klein`, which edits as well."""
    pipeline = make_pipeline(name, seed)
    torch.manual_seed(seed)
    return pipeline
