"""Small random pipelines of clips, which import what the others do without, added to those of `tiny_models`."""

import diffusers
from tiny_models import LAYERS, PIPELINES, TOKENS, flow_matching, make_encoder, make_tokenizer

WIDTH = 8  # of the text encoder


def make_gemma3():
    text = {**TOKENS, "hidden_size": WIDTH, **LAYERS, "head_dim": 4}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return make_encoder("Gemma3ForConditionalGeneration", text_config=text, vision_config=vision)


def make_ltx2():
    """Its transformer denoises sound beside the clip; gates and times of prompts are those of LTX-2.3."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    tokenizer = make_tokenizer(64)
    tokenizer.padding_side = "left"
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "gated_attn": True}
    audio = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 4}
    audio |= {"cross_attention_dim": 8, "gated_attn": True, "cross_attn_mod": True}
    connectors = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    sides = {"block_out_channels": (8,), "spatio_temporal_scaling": (True,)}
    decoder = {f"decoder_{name}": value for name, value in sides.items()} | {"decoder_layers_per_block": (1, 1)}
    return diffusers.LTX2Pipeline(
        scheduler=flow_matching(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            **sides,
            **decoder,
            layers_per_block=(1,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=4,
        ).eval(),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ).eval(),
        text_encoder=make_gemma3(),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=LAYERS["num_hidden_layers"] + 1,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            **connectors,
        ).eval(),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **heads,
            **{f"audio_{name}": value for name, value in audio.items()},
            cross_attn_mod=True,
            num_layers=2,
            caption_channels=WIDTH,
            rope_double_precision=False,
        ),
        vocoder=LTX2Vocoder(
            in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2]
        ).eval(),
    )


PIPELINES["ltx2"] = make_ltx2
