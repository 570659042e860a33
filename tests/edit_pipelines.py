"""Small random pipelines of diffusers that edit reference images, and small references for them."""

from functools import partial

import torch
from tiny_models import (
    AXES,
    CHAT,
    HEADS,
    PIPELINES,
    flow_matching,
    make_flux,
    make_pipeline,
    make_qwen_vae,
    make_tokenizer,
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


EDITS = {
    "kontext": make_kontext,
    "flux_control": make_flux_control,
    "qwen_edit": make_qwen_edit,
    "qwen_edit_plus": partial(make_qwen_edit, "QwenImageEditPlusPipeline"),
}
PIPELINES.update(EDITS)


def make_edit(name: str, seed: int = 0):
    """A pipeline of `EDITS`, or `flux2_klein`, which edits as well."""
    pipeline = make_pipeline(name, seed)
    torch.manual_seed(seed)
    return pipeline
