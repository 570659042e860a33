"""A small random DiT and its pipeline, which tests and tools use."""

import diffusers
import torch


def make_dit(equal_copies: bool = True, num_classes: int = 10, seed: int = 0):
    """A DiT of two blocks, width 32, in eval mode; converted DiTs hold equal embeddings in every block."""
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=num_classes,
    ).eval()
    if equal_copies:
        first, second = model.transformer_blocks
        second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def make_dit_pipeline(transformer=None, levels: int = 2, id2label: dict[int, str] | None = None):
    """A `DiTPipeline` for images of 16 by 16 pixels, or of 8 by 8 with a VAE of one level."""
    transformer = make_dit() if transformer is None else transformer
    torch.manual_seed(0)
    vae = make_vae(4, None, levels)
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False), id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomize(model: torch.nn.Module, scale: float = 0.05, seed: int = 2) -> torch.nn.Module:
    """Give the trained tensors random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def vae_blocks(levels: int) -> dict:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return blocks | {"block_out_channels": (4,) * levels, "norm_num_groups": 4, "sample_size": 8 * levels}


def make_vae(latent_channels: int, shift_factor: float | None = 0.1, levels: int = 2):
    factors = {"scaling_factor": 0.5, "shift_factor": shift_factor}
    return diffusers.AutoencoderKL(latent_channels=latent_channels, **factors, **vae_blocks(levels)).eval()
