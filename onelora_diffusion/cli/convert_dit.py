"""Convert a checkpoint of Meta's DiT to a diffusers folder, and back.

    onelora convert-dit DiT-XL-2-256x256.pt dit-xl-2-256 --vae stabilityai/sd-vae-ft-mse
    onelora convert-dit 0050000.pt dit --exact            # one that their train.py wrote: its moving average
    onelora convert-dit dit-xl-2-256 dit-xl-2-256.pt      # a folder goes back to a file

The weights are the same, bit for bit, in both directions. The models are not quite: diffusers' DiT has 1e-5 where
Meta's code has 1e-6 in the norm before each MLP, and its 128 timestep frequencies are 10000^(-i/127), not
10000^(-i/128). Folders on the hub are converted like this, and adapters and samplers take them as they are. `--exact`
writes 1e-6 into the folder; the frequencies stand in diffusers' code, so that the caller sets them after loading:

    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0

SiT's checkpoints have the same names and shapes, and are other models: they predict a velocity, at times from 0
(noise) to 1 (image). They are refused where they can be told: by the settings in the file, by its name, or by an
output without variance, as SiT's train.py makes it. A copy of the released SiT-XL/2 under another name cannot be told.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from onelora_diffusion.command_line import one_line_errors, quieten, typed_as
from onelora_diffusion.files import check_writable, written_beside

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: S, B, L and XL
# Meta's name of a layer -> diffusers'.
LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK_LAYERS = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
QKV_LAYER, QKV = ".attn.qkv.", ("attn1.to_q", "attn1.to_k", "attn1.to_v")
EMBEDDING_LAYERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
TABLE = "y_embedder.embedding_table.weight"


@dataclass
class Settings:
    """Convert Meta's file to a diffusers folder, or a folder to such a file."""

    source: tyro.conf.Positional[Path]
    """A `.pt` or `.pth` file of Meta's DiT, or a diffusers folder: a pipeline's or a transformer's."""
    output: tyro.conf.Positional[Path]
    """The folder, or the file."""
    vae: str | None = None
    """Hub id or folder of the VAE: the output is a whole pipeline then. Default: its transformer alone."""
    heads: int | None = None
    """Attention heads, where the width is not that of DiT-S, B, L or XL: the file does not say."""
    exact: bool = False
    """Write Meta's epsilon into the folder; see above for the frequencies."""


def names_of(depth: int) -> dict[str, list[str]]:
    """Meta's name of a tensor -> diffusers': one, three for q, k and v, or that of a copy in every block."""
    layers = {metas: [ours] for metas, ours in LAYERS.items()}
    blocks = [f"transformer_blocks.{index}" for index in range(depth)]
    for index, block in enumerate(blocks):
        layers |= {f"blocks.{index}.{metas}": [f"{block}.{ours}"] for metas, ours in BLOCK_LAYERS.items()}
        layers[f"blocks.{index}.attn.qkv"] = [f"{block}.{name}" for name in QKV]
    layers |= {metas: [f"{block}.norm1.emb.{ours}" for block in blocks] for metas, ours in EMBEDDING_LAYERS.items()}
    names = {
        f"{metas}.{part}": [f"{name}.{part}" for name in ours]
        for metas, ours in layers.items()
        for part in ("weight", "bias")
    }
    return names | {TABLE: [f"{block}.norm1.emb.class_embedder.embedding_table.weight" for block in blocks]}


def to_diffusers(meta: dict[str, Tensor], heads: int | None = None, exact: bool = False) -> DiTTransformer2DModel:
    """Meta's state dict -> diffusers' model in float32; ValueError for no DiT's, or an unknown number of heads."""
    depth = len({name.split(".")[1] for name in meta if name.startswith("blocks.")})
    names = names_of(depth)
    if different := sorted(set(meta) ^ {"pos_embed", *names}):
        raise ValueError(
            f"{different[0]} is {'not there' if different[0] in names else 'none of its'}: no DiT of Meta's"
        )
    width, channels, patch, _ = meta["x_embedder.proj.weight"].shape
    if (heads := heads or HEADS.get(width)) is None:
        raise ValueError(f"how many heads a width of {width} has is not in the file: give --heads")
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(meta["final_layer.linear.weight"]) // patch**2,
        num_layers=depth,
        sample_size=math.isqrt(meta["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(meta[TABLE]) - 1,
        norm_eps=1e-6 if exact else 1e-5,
    )
    weights = {}
    for metas, ours in names.items():
        parts = meta[metas].chunk(3) if QKV_LAYER in metas else [meta[metas]] * len(ours)
        weights |= dict(zip(ours, parts, strict=True))
    model.load_state_dict(weights)
    return model.eval()


def to_meta(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """diffusers' model -> the state dict of Meta's; ValueError if its blocks have different embeddings."""
    weights, meta = model.state_dict(), {"pos_embed": model.pos_embed.pos_embed}
    for metas, ours in names_of(len(model.transformer_blocks)).items():
        parts = [weights[name] for name in ours]
        if QKV_LAYER not in metas and (other := [n for n in ours if not torch.equal(weights[n], parts[0])]):
            raise ValueError(f"{other[0]} is not that of block 0, and Meta's model has one for all blocks")
        meta[metas] = torch.cat(parts) if QKV_LAYER in metas else parts[0]
    return {name: tensor.detach().clone() for name, tensor in meta.items()}


def read_meta(file: Path) -> dict[str, Tensor]:
    """The weights in a file of Meta's, of which train.py's holds several: those of the moving average.

    Nothing but tensors and train.py's own settings is unpickled. ValueError if it is no such file, or one of SiT's.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the zip reader and the unpickler raise
        raise ValueError(f"{file}: is no file of weights alone ({str(error).splitlines()[0][:200]})") from error
    contents = contents if isinstance(contents, dict) else {}
    weights = contents.get("ema", contents)
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    if sign := sign_of_sit(file, str(getattr(contents.get("args"), "model", "")), weights):
        raise ValueError(
            f"{file} is a SiT ({sign}), which has DiT's layers, predicts a velocity, and would draw noise as a DiT: "
            "load it by SiT's own code and adapt that (docs/research_models.md)"
        )
    return weights


def sign_of_sit(file: Path, model: str, weights: dict[str, Tensor]) -> str | None:
    """What tells that weights of DiT's names are a SiT's; None if nothing does."""
    if model.startswith("SiT"):
        return f"its settings say {model}"
    if file.name.startswith("SiT"):
        return "by its name"
    output, embedder = weights.get("final_layer.linear.weight"), weights.get("x_embedder.proj.weight")
    if output is None or embedder is None or embedder.ndim != 4:
        return None
    _, channels, patch, _ = embedder.shape
    return "it predicts no variance" if len(output) == channels * patch**2 else None


@one_line_errors("convert_dit.py")
def main(settings: Settings) -> None:
    is_folder = settings.source.is_dir()
    check_writable(settings.output if is_folder else settings.output / "transformer" / "config.json")
    if is_folder:
        folder = settings.source / "transformer" if (settings.source / "transformer").is_dir() else settings.source
        meta = to_meta(DiTTransformer2DModel.from_pretrained(folder))
        with written_beside(settings.output) as part:
            torch.save(meta, part)
    else:
        transformer = to_diffusers(read_meta(settings.source), settings.heads, settings.exact)
        if settings.vae is None:
            transformer.save_pretrained(settings.output / "transformer")
        else:
            vae = AutoencoderKL.from_pretrained(settings.vae)
            scheduler = DDIMScheduler(clip_sample=False)  # 1000 steps from 0.0001 to 0.02, as their diffusion
            DiTPipeline(transformer, vae, scheduler).save_pretrained(settings.output)
    print(settings.output)


def run(arguments: list[str]) -> None:
    quieten()
    main(tyro.cli(Settings, args=arguments, description=__doc__, prog=typed_as("convert_dit.py")))


if __name__ == "__main__":
    run(sys.argv[1:])
