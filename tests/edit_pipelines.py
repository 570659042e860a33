"""Small random pipelines of diffusers that edit reference images, and small references for them."""

from functools import partial

import torch
from tiny_models import (
    AXES,
    BETAS,
    CHAT,
    HEADS,
    LAYERS,
    PIPELINES,
    TOKENS,
    UNET,
    flow_matching,
    make_clip,
    make_encoder,
    make_flux,
    make_flux2_vae,
    make_pipeline,
    make_qwen_vae,
    make_tokenizer,
    make_vae,
    make_wan_vae,
)

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_flux_transformer(**settings):
    from diffusers import FluxTransformer2DModel

    layers = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return FluxTransformer2DModel(**layers, **settings, **HEADS, **AXES)


def make_kontext():
    from diffusers import FluxKontextPipeline
    from diffusers.pipelines.flux import pipeline_flux_kontext

    pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64), (96, 64)]  # megapixels otherwise
    return make_flux(FluxKontextPipeline, partial(make_flux_transformer, in_channels=4, guidance_embeds=True))


def make_flux_control():
    from diffusers import FluxControlPipeline

    return make_flux(FluxControlPipeline, partial(make_flux_transformer, in_channels=8, out_channels=4))


def make_qwen_processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = make_tokenizer(4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)})
    tokenizer.chat_template = CHAT
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)


def make_qwen_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    layers = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "pad_token_id": 0,
            "hidden_size": 16,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            **layers,
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_qwen_edit(kind: str = "QwenImageEditPipeline"):
    import diffusers
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
    import diffusers

    kind = diffusers.JoyImageEditPipeline  # which the oldest diffusers does not have
    from diffusers.pipelines.joyimage import image_processor
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    image_processor.find_best_bucket = lambda *sides, **sizes: (64, 64)  # a megapixel otherwise
    tokenizer = make_qwen_processor().tokenizer
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLConfig(
        text_config=TOKENS | LAYERS | text,
        vision_config=vision | {"patch_size": 16, "deepstack_visual_indexes": [0]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return kind(
        scheduler=flow_matching(),
        vae=make_wan_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(config).eval(),
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
    import diffusers
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
    import diffusers

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
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=12,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            **HEADS,
        ),
    )


def make_pix2pix():
    import diffusers

    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=make_vae(4, shift_factor=None),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(24),
        unet=diffusers.UNet2DConditionModel(
            in_channels=8, out_channels=4, cross_attention_dim=8, attention_head_dim=4, **UNET
        ),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_pix2pix_xl():
    import diffusers

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
