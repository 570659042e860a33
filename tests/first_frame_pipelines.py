"""Small random pipelines of diffusers that draw clips from their first frame."""

from functools import partial

import diffusers
from tiny_models import PIPELINES, SIZES, TOKENS, make_ltx_vae, make_tokenizer, make_wan, wan_transformer


def make_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)).eval()


def make_wan_i2v(image_dim: int | None = None, **changes):
    from transformers import CLIPImageProcessor

    sees = {"image_encoder": make_vision(), "image_processor": CLIPImageProcessor(size=8, crop_size=8)}
    more = {"image_dim": image_dim, "added_kv_proj_dim": 32} if image_dim else {}
    transformer = partial(wan_transformer, 4 if "expand_timesteps" in changes else 12, **more)
    own = sees if image_dim else {"image_encoder": None, "image_processor": None}
    own |= {"transformer_2": transformer()} if "boundary_ratio" in changes else {}
    return make_wan("WanImageToVideoPipeline", transformer, **own, **changes)


def make_ltx_i2v():
    return diffusers.LTXImageToVideoPipeline(**PIPELINES["ltx"]().components | {"vae": make_ltx_vae((True, True))})


def make_hunyuan_video15_i2v():
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    sizes = SIZES | {"hidden_size": 12, "num_hidden_layers": 1}
    parts = PIPELINES["hunyuan_video15"]().components
    parts["transformer"] = type(parts["transformer"]).from_config(parts["transformer"].config, target_size=64)
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 8, "width": 8}),
    )


def make_hunyuan_video_i2v(kind: str = "token_replace"):
    """Its text encoder sees the picture as well, through a template of about as many tokens as the real one has."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = make_tokenizer(512)
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<image>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    text = DEFAULT_PROMPT_TEMPLATE["template"].partition("<image>")[2].partition("<|eot_id|>")[0]
    tokenizer.add_tokens([text[start : start + 6] for start in range(0, len(text), 6)])
    config = LlavaConfig(
        text_config=TOKENS | SIZES | {"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": 3},
        vision_config=SIZES | {"model_type": "clip_vision_model", "image_size": 48, "patch_size": 2},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    parts = PIPELINES["hunyuan_video"]().components
    channels = {"in_channels": 9} if kind == "latent_concat" else {}
    own = {"guidance_embeds": kind == "token_replace", "image_condition_type": kind}
    parts["transformer"] = type(parts["transformer"]).from_config(parts["transformer"].config, **channels, **own)
    parts |= {"tokenizer": tokenizer, "text_encoder": LlavaForConditionalGeneration(config).eval()}
    return diffusers.HunyuanVideoImageToVideoPipeline(
        **parts, image_processor=CLIPImageProcessor(size=48, crop_size=48)
    )


FIRST_FRAMES = {
    "wan_i2v": partial(make_wan_i2v, 8),
    "wan22_i2v": partial(make_wan_i2v, boundary_ratio=0.5),
    "wan_ti2v_i2v": partial(make_wan_i2v, expand_timesteps=True),
    "ltx_i2v": make_ltx_i2v,
    "hunyuan_video_i2v": make_hunyuan_video_i2v,
    "hunyuan_video_i2v_concat": partial(make_hunyuan_video_i2v, "latent_concat"),
    "hunyuan_video15_i2v": make_hunyuan_video15_i2v,
}
PIPELINES.update(FIRST_FRAMES)
