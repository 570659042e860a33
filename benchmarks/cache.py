"""What the latent cache saves: images per second with it and without, at the real sizes of SD's VAE and DiT-XL/2."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.measure import interleave, synchronize
from benchmarks.peers import make_base
from onelora_diffusion import AdapterConfig, inject_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages, sample_moments
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.evaluation.report import format_bytes, format_table
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.training.randomness import StepKeyedBatches, draw_step


@dataclass
class CacheSettings:
    """Images per second from JPEG files to gradients, with the latents cached and encoded at every step."""

    images: int = 16
    """Random photographs to write and cache."""
    batch_size: int = 4
    """Images in a step."""
    rounds: int = 3
    """How often each step is timed."""
    resolution: int = 256
    """Of the images after the crop."""
    photograph: tuple[int, int] = (512, 384)
    """Width and height of the files; Food-101's longest side is 512."""
    layers: int = 28
    """Blocks of the transformer; DiT-XL/2 has 28."""
    width: int = 1152
    """Its width."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the VAE's levels; these are stabilityai/sd-vae-ft-ema's."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the transformer; the VAE stays in float32, as in training."""
    num_workers: int = 0
    """Processes that load images."""
    seed: int = 0
    """Of weights, photographs and noise."""


def measure_cache(settings: CacheSettings) -> dict:
    """Prints a table and returns its numbers; weights and photographs are random, which costs the same.

    `input` is what a step waits for before the transformer: files, crop and VAE, or rows of the cache. The cache
    holds both flips.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    vae = make_vae(settings.vae_channels, settings.seed).to(device)
    size = settings.resolution // 2 ** (len(settings.vae_channels) - 1)
    transformer = make_base(settings.width, max(1, settings.width // 72), settings.layers, size, settings.seed)
    inject_adapter(transformer.to(dtype), AdapterConfig(num_classes=2)).to(device).train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    scheduler = DDIMScheduler(clip_sample=False)

    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), settings)
        dataset = load_dataset("imagefolder", Path(folder) / "photographs", resolution=settings.resolution)
        start = time.perf_counter()
        cache_folder = build_cache(
            Path(folder),
            dataset,
            vae,
            flip=True,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
        )
        build_seconds = time.perf_counter() - start
        cache = LatentCache(cache_folder, len(dataset))
        batches = {
            "cached": endless(cache, 0, settings),
            "encoded": endless(FlippableImages(dataset), settings.num_workers, settings),
        }

        def latents_of(name: str) -> torch.Tensor:
            inputs = next(batches[name])[0].to(device)
            moments = inputs if name == "cached" else encode_moments(vae, inputs)
            return sample_moments(moments, drawn.posterior_noise)

        def step(name: str) -> None:
            x_start = latents_of(name)
            noisy = scheduler.add_noise(x_start, drawn.noise, drawn.timesteps)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = transformer(noisy, timestep=drawn.timesteps, class_labels=labels).sample
            loss = training_losses(output, x_start, drawn.noise, drawn.timesteps, scheduler)["loss"].mean()
            torch.autograd.grad(loss, trained)
            synchronize()

        drawn = send_to_device(draw_step(settings.seed, 0, settings.batch_size, (4, size, size), 1000, 0.0), device)
        labels = torch.zeros(settings.batch_size, dtype=torch.int64, device=device)
        jobs = {}
        for name in batches:
            jobs[f"input, {name}"] = lambda name=name: latents_of(name)
            jobs[f"step, {name}"] = lambda name=name: step(name)
        seconds = {name: float(np.median(s)) for name, s in interleave(jobs, settings.rounds, warmup=1).items()}

    speed = {name: settings.batch_size / each for name, each in seconds.items()}
    result = {
        "images_per_second": speed,
        "ratio_of_steps": speed["step, cached"] / speed["step, encoded"],
        "ratio_of_input": speed["input, cached"] / speed["input, encoded"],
        "build_images_per_second": len(dataset) / build_seconds,
        "bytes_per_image": cache_size(1, True, (4, size, size)),
    }
    rows = {part: [f"{speed[f'{part}, {name}']:.3g}" for name in ("encoded", "cached")] for part in ("input", "step")}
    rows["input"].append(f"{result['ratio_of_input']:.3g}")
    rows["step"].append(f"{result['ratio_of_steps']:.3g}")
    title = (
        f"images per second at {settings.resolution} pixels, batch {settings.batch_size}, on {device.type} with "
        f"{torch.get_num_threads()} threads: VAE {settings.vae_channels}, DiT of {settings.layers} blocks of "
        f"{settings.width}, {settings.mixed_precision} mixed precision"
    )
    print(format_table(title, ["encoded each step", "cached", "ratio"], rows))
    print(
        f"Building the cache, both flips: {result['build_images_per_second']:.3g} images per second, "
        f"{format_bytes(result['bytes_per_image'])} each."
    )
    return result


def make_vae(channels: tuple[int, ...], seed: int) -> AutoencoderKL:
    """A random autoencoder, of Stable Diffusion's shape with its own channels (128, 256, 512, 512)."""
    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    groups = {"norm_num_groups": min(32, *channels)}
    vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4, **blocks, **groups)
    return vae.requires_grad_(False).eval()


def write_photographs(folder: Path, settings: CacheSettings) -> None:
    """JPEG files of smooth noise, of the size of photographs."""
    (folder / "photographs" / "class").mkdir(parents=True)
    generator = np.random.default_rng(settings.seed)
    for number in range(settings.images):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        photograph = small.resize(settings.photograph, Image.Resampling.BICUBIC)
        photograph.save(folder / "photographs" / "class" / f"{number}.jpg", quality=90)


def endless(examples, num_workers: int, settings: CacheSettings):
    rows = [slice(0, settings.batch_size)]
    sampler = StepKeyedBatches(settings.seed, 0, settings.batch_size, len(examples), flip=True, rows=rows)
    return iter(DataLoader(examples, batch_sampler=sampler, num_workers=num_workers))
