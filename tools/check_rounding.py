"""What the last bits of an image depend on: its place in a batch, the batch's other images, its size, the threads.

    python tools/check_rounding.py

Each network of generation runs on one batch of `IMAGES_AT_ONCE` images, twice as many with guidance, as
`generate_images` runs it; then on the same images in reverse order, beside others, in a batch of another size, and on
other numbers of threads. The table counts the numbers of the output that are not equal to the bit.
"""

from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel

from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import IMAGES_AT_ONCE

BATCH = list(range(IMAGES_AT_ONCE))


def main() -> None:
    miniature = load_base()
    torch.manual_seed(0)
    block = DiTTransformer2DModel(num_layers=1).eval()  # diffusers' defaults: the width of DiT-XL/2
    vae = AutoencoderKL(
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    networks = {
        "miniature": (predict, miniature.transformer),
        "its VAE": (decode, miniature.vae),
        "DiT-XL/2 block": (predict, block),
        "wider VAE": (decode, vae),
    }
    rows = {}
    for name, (run, network) in networks.items():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            autocast = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext()
            with torch.no_grad(), autocast:
                rows[f"{name}, {short}"] = counts(run, network)
    columns = ["place", "others", f"batch {IMAGES_AT_ONCE // 2}", "2 thr.", "3 thr.", "of"]
    print(format_table(f"numbers that change, in a batch of {IMAGES_AT_ONCE} on one thread", columns, rows))


def counts(run, network) -> list[str]:
    torch.set_num_threads(1)
    expected = run(network, BATCH)
    half = run(network, BATCH[: len(BATCH) // 2])
    found = {
        "place": run(network, BATCH[::-1]).flip(0) != expected,
        "others": run(network, [0, *range(100, 99 + len(BATCH))])[0] != expected[0],
        "size": half != expected[: len(half)],
    }
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found[threads] = run(network, BATCH) != expected
    return [f"{int(differs.sum()):,}" for differs in found.values()] + [f"{expected.numel():,}"]


def noise(indices: list[int], size: int) -> torch.Tensor:
    return torch.stack([torch.randn(4, size, size, generator=torch.Generator().manual_seed(i)) for i in indices])


def predict(transformer, indices: list[int]) -> torch.Tensor:
    """Both halves of a guided step, side by side: (batch, 2 · channels, ...)."""
    latents = noise(indices, transformer.config.sample_size)
    labels = torch.tensor(indices) % 5
    output = transformer(
        torch.cat([latents, latents]),
        timestep=torch.full((2 * len(latents),), 37),
        class_labels=torch.cat([labels, torch.full_like(labels, transformer.config.num_embeds_ada_norm)]),
    )
    return torch.cat(output.sample.float().chunk(2), dim=1)


def decode(vae, indices: list[int]) -> torch.Tensor:
    return vae.decode(noise(indices, 8)).sample.float()


if __name__ == "__main__":
    main()
