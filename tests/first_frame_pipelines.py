"""Small random pipelines of diffusers that draw clips from their first frame."""

from functools import partial

import diffusers
from tiny_models import (
    HEADS,
    PIPELINES,
    flow_prediction,
    make_ltx_vae,
    make_t5,
    make_tokenizer,
    make_wan_vae,
)


def make_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).eval()


def make_wan_i2v(image_dim: int | None = None, **changes):
    from transformers import CLIPImageProcessor

    sees = {"image_encoder": make_vision(), "image_processor": CLIPImageProcessor(size=8, crop_size=8)}

    def transformer():
        more = {"image_dim": image_dim, "added_kv_proj_dim": 32} if image_dim else {}
        channels = 4 if "expand_timesteps" in changes else 12
        return diffusers.WanTransformer3DModel(
            in_channels=channels,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=128,
            **HEADS,
            **more,
        )

    own = {"transformer_2": transformer()} if "boundary_ratio" in changes else {}
    return diffusers.WanImageToVideoPipeline(
        tokenizer=make_tokenizer(512),
        text_encoder=make_t5(8, "UMT5EncoderModel"),
        vae=make_wan_vae(),
        scheduler=flow_prediction("UniPCMultistepScheduler"),
        transformer=transformer(),
        **(sees if image_dim else {"image_encoder": None, "image_processor": None}),
        **own,
        **changes,
    )


def make_ltx_i2v():
    return diffusers.LTXImageToVideoPipeline(**PIPELINES["ltx"]().components | {"vae": make_ltx_vae((True, True))})


FIRST_FRAMES = {
    "wan_i2v": partial(make_wan_i2v, 8),
    "wan22_i2v": partial(make_wan_i2v, boundary_ratio=0.5),
    "wan_ti2v_i2v": partial(make_wan_i2v, expand_timesteps=True),
    "ltx_i2v": make_ltx_i2v,
}
PIPELINES.update(FIRST_FRAMES)
