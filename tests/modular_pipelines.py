"""Small random pipelines of diffusers that are modular: their blocks are the only description of them."""

import diffusers
from tiny_models import (
    LAYERS,
    PIPELINES,
    TOKENS,
    cosmos_transformer,
    flow_matching,
    make_encoder,
    make_flux2_vae,
    make_qwen_vae,
    make_tokenizer,
)

from onelora_diffusion.families.modular import as_pipeline


def make_modular(blocks: str, components: dict):
    """A modular pipeline with those of these components that its blocks need."""
    pipeline = getattr(diffusers, blocks)().init_pipeline()
    pipeline.update_components(**{name: components[name] for name in pipeline.components if name in components})
    return as_pipeline(pipeline)


def make_anima():
    components = {
        "text_encoder": make_encoder("Qwen3Model", **TOKENS, hidden_size=8, head_dim=4, **LAYERS),
        "tokenizer": make_tokenizer(512),
        "t5_tokenizer": make_tokenizer(512),
        "text_conditioner": diffusers.AnimaTextConditioner(
            source_dim=8,
            target_dim=8,
            model_dim=8,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=259,
            min_sequence_length=64,
        ).eval(),
        "transformer": cosmos_transformer(extra_pos_embed_type=None),
        "vae": make_qwen_vae(),
        "scheduler": flow_matching(shift=3.0),
    }
    return make_modular("AnimaAutoBlocks", components)


def make_flux3():
    """A pipeline that lets a language model write prompts anew, which is left out, for one prompt at a time."""
    from edit_pipelines import make_joy_image

    edits = make_joy_image()
    edits.text_encoder.config.text_config.num_hidden_layers = 33  # of which it reads every fourth
    components = {
        "text_encoder": type(edits.text_encoder)(edits.text_encoder.config).eval(),
        "tokenizer": edits.processor,
        "transformer": diffusers.Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=128,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        "vae": make_flux2_vae(),
        "scheduler": flow_matching(shift=3.0),
    }
    return make_modular("Flux3AutoBlocks", components)


PIPELINES["anima"] = make_anima
if hasattr(diffusers, "Flux3AutoBlocks"):  # which older ones do not have
    PIPELINES["flux3_modular"] = make_flux3
PIPELINES["z_image_modular"] = lambda: make_modular("ZImageAutoBlocks", PIPELINES["z_image"]().components)
