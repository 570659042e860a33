"""From noise and class labels, or prompts, to images: one noise stream per image, guidance, samplers, decoding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm import tqdm

from onelora_diffusion.diffusion import prediction_of
from onelora_diffusion.families import Family, Prompts
from onelora_diffusion.injection.book import adapters_of
from onelora_diffusion.injection.merging import merged
from onelora_diffusion.injection.routing import GUIDANCES, Entry, Guidance, route_adapters, route_beside_base
from onelora_diffusion.pipelines.base import eval_mode

Sampler = Literal["ddim", "dpm-solver++", "ddpm", "euler", "heun"]
SAMPLERS = get_args(Sampler)
# Those that fit what a model predicts, the default first.
NOISE_SAMPLERS, FLOW_SAMPLERS = ("ddim", "dpm-solver++", "ddpm"), ("euler", "heun", "dpm-solver++")
# Images in one batch of the networks: enough to fill a GPU.
IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How noise becomes an image of a class.

    `ddim` is DDIM with eta 0 (Song et al. 2020), `dpm-solver++` the second-order multistep solver (Lu et al.
    2022), `ddpm` ancestral sampling with the learned variance (Nichol & Dhariwal 2021) on DiT's evenly
    respaced steps. A model of flow matching is sampled by `euler` (Esser et al. 2024), by `heun` of the second order,
    which runs it twice a step but for the last (Karras et al. 2022), or by `dpm-solver++`. Guidance is
    classifier-free (Ho & Salimans 2022) or leads from the base without class to the adapted model (Zhong et al., ICLR
    2025), in a batch of twice the images either way; it may be left to some of the timesteps (Kynkäänniemi et al.
    2024).
    """

    sampler: Sampler | None = None
    """ddpm is the ancestral sampler with the learned variance, ADM's and DiT's own (250 steps there). euler and heun
    are for flow matching. None: ddim, or euler for flow matching."""
    num_inference_steps: int = 50
    """Steps of the sampler."""
    guidance: Guidance = "cfg"
    """cfg: classifier-free guidance; domain: from the base without class to the adapter (Zhong et al., 2025)."""
    guidance_scale: float = 4.0
    """Strength of the guidance; 1 is none."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels (3 in DiT's own code). None: all."""
    guidance_interval: tuple[int, int] | None = None
    """Guide only between these two timesteps of training (0 is the image), the lower first. None: at all."""

    @property
    def is_beside_base(self) -> bool:
        """Whether the base takes part in every step, beside the adapters."""
        return self.guidance == "domain" and self.guidance_scale > 1

    def for_scheduler(self, scheduler_config: Mapping) -> "SamplerSettings":
        """The same, with the sampler of such models where none is chosen."""
        fitting = FLOW_SAMPLERS if prediction_of(scheduler_config) == "flow" else NOISE_SAMPLERS
        return self if self.sampler else replace(self, sampler=fitting[0])

    def check(self, transformer: nn.Module, scheduler_config: Mapping) -> None:
        """ValueError for an unknown sampler or guidance, one that does not fit the model, or for steps or channels
        that it does not have."""
        if self.guidance not in GUIDANCES:
            raise ValueError(f"unknown guidance {self.guidance!r}; choose from {', '.join(GUIDANCES)}")
        if self.guidance == "domain" and self.guidance_interval is not None:
            raise ValueError("domain guidance knows no guidance interval: the base takes part in every step")
        if self.guidance == "domain" and not hasattr(transformer, "_onelora"):
            raise ValueError("domain guidance leads from the base to an adapter: load one first")
        if self.sampler not in (None, *SAMPLERS):
            raise ValueError(f"unknown sampler {self.sampler!r}; choose from {', '.join(SAMPLERS)}")
        is_flow = prediction_of(scheduler_config) == "flow"
        fitting = FLOW_SAMPLERS if is_flow else NOISE_SAMPLERS
        if is_flow and scheduler_config.get("use_dynamic_shifting"):
            fitting = FLOW_SAMPLERS[:1]  # the others know no shift by the size of the image
        if self.sampler not in (None, *fitting):
            kind = f"flow matching{', shifted by the size of its images' * (fitting == ('euler',))}"
            raise ValueError(
                f"sampler {self.sampler!r} does not fit this model, which predicts {kind if is_flow else 'noise'}: "
                f"choose {' or '.join(fitting)}"
            )
        most, channels = scheduler_config["num_train_timesteps"], transformer.config.in_channels
        if not 1 <= self.num_inference_steps <= most:
            raise ValueError(f"{self.num_inference_steps} inference steps asked for; this model takes 1 to {most}")
        if self.guidance_channels is not None and not 1 <= self.guidance_channels <= channels:
            raise ValueError(f"guidance of {self.guidance_channels} channels asked for; the latents have {channels}")
        lowest, highest = self.guidance_interval or (0, most - 1)
        if not 0 <= lowest <= highest < most:
            raise ValueError(
                f"guidance interval {lowest} to {highest}: give two timesteps from 0 to {most - 1}, the lower first"
            )


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, a function of (seed, index) alone.

    PyTorch's CPU generator keeps only the low 32 bits of its seed, so hashing (seed, index) would soon give
    two images of a large set the same noise. Here the hash of `seed` is where the images start counting,
    and no two of them meet.
    """
    start = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    return [torch.Generator().manual_seed((start + int(index)) % 2**32) for index in indices]


@torch.no_grad()
def sample_latents(
    transformer: nn.Module,
    scheduler_config: Mapping,
    class_labels: Tensor,
    generators: list[torch.Generator],
    settings: SamplerSettings,
    *,
    null_label: int | None = None,
    on_step: Callable[[float], object] = lambda share: None,
) -> Tensor:
    """Sample latents of the given classes: (batch,) labels -> (batch, C, H, W) float32.

    The first noise and that of every step come from each image's own generator, so an image does not depend on the
    others of its batch; on their number only by rounding, which `generate_images` avoids.

    Args:
        transformer: a DiT; it runs in eval mode, under the caller's autocast, and gets its own mode back.
        scheduler_config: the `config` of the pipeline's scheduler.
        class_labels: (batch,) int64.
        generators: one per image, as `image_generators` gives them.
        null_label: the label of no class. None: the last row of the model's class tables.
        on_step: called with its share of the work after every step.

    Raises:
        ValueError: see `SamplerSettings.check`; or a label is none of the classes that serve.
    """
    settings.check(transformer, scheduler_config)
    if null_label is None:
        null_label, last_label = null_and_last_label(transformer)
    else:
        last_label = null_label
    for label in class_labels.tolist():
        if not 0 <= label <= last_label and label != null_label:
            raise ValueError(f"label {label} is none of the model's {last_label} classes: give 0 to {last_label - 1}")
    denoise = guided_denoiser(transformer, class_labels.to(transformer.device), settings, null_label)
    # The second half of a guided batch is the one without class: the adapters leave it to the base.
    route = route_beside_base(transformer, len(generators)) if settings.is_beside_base else nullcontext()
    with route, eval_mode(transformer):
        return denoised_latents(
            transformer, scheduler_config, generators, settings, denoise, transformer.device, on_step
        )


@torch.no_grad()
def denoised_latents(
    transformer: nn.Module,
    scheduler_config: Mapping,
    generators: list[torch.Generator],
    settings: SamplerSettings,
    denoise: Callable[[Tensor, float], Tensor],
    device: torch.device,
    on_step: Callable[[float], object] = lambda share: None,
) -> Tensor:
    """From the noise of each image's generator, by a sampler's steps, to latents (batch, C, H, W) in float32.

    Args:
        settings: its sampler and steps; guidance is left to `denoise`.
        denoise: `denoise(latents, timestep)` is what the transformer predicts, in eval mode, with its variance if it
            has one.
    """
    channels, size = transformer.config.in_channels, transformer.config.sample_size
    settings = settings.for_scheduler(scheduler_config)
    learned_variance = settings.sampler == "ddpm" and transformer.config.out_channels == 2 * channels
    if prediction_of(scheduler_config) == "flow":
        num_tokens = (size // transformer.config.patch_size) ** 2
        scheduler = _flow_scheduler(settings.sampler, scheduler_config, settings.num_inference_steps, num_tokens)
    else:
        scheduler = _scheduler(settings.sampler, scheduler_config, settings.num_inference_steps, learned_variance)

    shape = (len(generators), channels, size, size)
    latents = randn_tensor(shape, generators, device=device, dtype=torch.float32)
    for timestep in scheduler.timesteps:  # on the CPU, as the schedule is: no step waits for the device
        model_output = denoise(latents, timestep.item())
        if not learned_variance:
            model_output = model_output[:, :channels]
        latents = scheduler.step(model_output, timestep, latents, generator=generators).prev_sample
        on_step(1 / len(scheduler.timesteps))
    return latents


def adapters_folded_in(transformer: nn.Module, settings: SamplerSettings) -> AbstractContextManager:
    """Context manager around sampling: adapters cost nothing inside, unless the base takes part beside them."""
    return nullcontext() if settings.is_beside_base else merged(transformer)


def guided_denoiser(
    transformer: nn.Module, class_labels: Tensor, settings: SamplerSettings, null_label: int
) -> Callable[[Tensor, float], Tensor]:
    """Adapt a DiT to `denoise(latents, timestep) -> model_output`, with classifier-free guidance.

        ε(x, t) = ε(x, t, ∅) + w · (ε(x, t, y) - ε(x, t, ∅))

    (Ho & Salimans 2022). Both halves run as one batch, y first. The learned variance stays that of class y. Where
    w is 1 or less, and outside the guidance interval, the model runs on y alone.

    Args:
        class_labels: (batch,), y.
        null_label: ∅, the label of no class.
    """
    channels = settings.guidance_channels or transformer.config.in_channels
    lowest, highest = settings.guidance_interval or (-float("inf"), float("inf"))
    null_labels = torch.full_like(class_labels, null_label)

    def predict(latents: Tensor, timestep: float, labels: Tensor) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        output = transformer(latents.to(transformer.dtype), timestep=timesteps, class_labels=labels)
        return output.sample.float()

    def denoise(latents: Tensor, timestep: float) -> Tensor:
        if settings.guidance_scale <= 1 or not lowest <= timestep <= highest:
            return predict(latents, timestep, class_labels)
        labels = torch.cat([class_labels, null_labels])
        conditional, unconditional = predict(torch.cat([latents, latents]), timestep, labels).chunk(2)
        guided = unconditional + settings.guidance_scale * (conditional - unconditional)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    return denoise


def null_and_last_label(transformer: nn.Module) -> tuple[int, int]:
    """(the label that every class table takes for none, the last label of the table that serves)."""
    embedder = transformer.transformer_blocks[0].norm1.emb.class_embedder
    # The last row of the largest class table: an adapter takes it for null in its smaller tables too.
    null_label = max(len(table) for table in embedder.parameters()) - 1
    serving = transformer._onelora.class_tables.active_table() if hasattr(transformer, "_onelora") else None
    return null_label, len(embedder.embedding_table.weight if serving is None else serving) - 1


@torch.no_grad()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents (batch, C, H, W) to images (batch, 3, R, R) in uint8, rounded, not truncated."""
    return as_uint8(decoded_latents(vae, latents))


@torch.no_grad()
def decoded_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents (batch, C, H, W) to images (batch, 3, R, R) in float32, around -1 to 1."""
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    return vae.decode(latents.to(vae.dtype)).sample.float()


def as_uint8(images: Tensor) -> Tensor:
    """Images from -1 to 1 in uint8, rounded, not truncated."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generate_images(
    pipeline,
    class_labels: Sequence[int],
    seed: int,
    indices: Sequence[int],
    settings: SamplerSettings,
    *,
    images_at_once: int | None = IMAGES_AT_ONCE,
    batch_size: int = 32,
    progress: Callable[[float], object] = lambda images: None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generate image `indices[k]` of class `class_labels[k]` for every k, batch by batch.

    Image i is a function of (seed, i), its class and the sampler. It is so to the bit where the networks always run
    on the same number of images: a matrix product of another shape is summed in another order. Then neither
    `batch_size` nor the share of a process changes it. (On one kind of machine, with as many CPU threads: see
    docs/evaluation.md.)

    Args:
        pipeline: a `DiTPipeline`; its transformer, vae and scheduler config are used.
        images_at_once: how many images the networks always run on, the last ones padded. None: on as many as there
            are, up to `IMAGES_AT_ONCE`, so that few images cost what they cost.
        batch_size: how many images the iterator gives at a time.
        progress: called after every step with the images that it made, in parts of an image.

    Returns:
        An iterator of (indices, images), a batch each; images are (batch, 3, R, R), uint8, on the pipeline's
        device.

    Raises:
        ValueError: at once, not at the first image: see `SamplerSettings.check`; or labels and indices do not pair
            up. At the first image: see `sample_latents`.
    """
    config = pipeline.scheduler.config
    if len(class_labels) != len(indices):
        raise ValueError(f"{len(class_labels)} class labels for {len(indices)} images; one each is needed")
    settings.check(pipeline.transformer, config)

    def count(num_images: int, share: float) -> None:
        progress(num_images * share)

    def chunks():
        size = images_at_once or IMAGES_AT_ONCE
        for first in range(0, len(indices), size):
            chunk = list(range(first, min(first + size, len(indices))))
            padded = chunk if images_at_once is None else chunk + [chunk[-1]] * (size - len(chunk))
            latents = sample_latents(
                pipeline.transformer,
                config,
                torch.tensor([int(class_labels[k]) for k in padded]),
                image_generators(seed, [indices[k] for k in padded]),
                settings,
                on_step=partial(count, len(chunk)),
            )
            yield decode_latents(pipeline.vae, latents)[: len(chunk)]

    def batches():
        made, images = chunks(), []
        for first in range(0, len(indices), batch_size):
            batch = [int(index) for index in indices[first : first + batch_size]]
            while len(images) < len(batch):
                images = [*images, *next(made)]
            yield batch, torch.stack(images[: len(batch)])
            images = images[len(batch) :]

    return batches()


def draw_prompt(
    pipeline,
    family: Family,
    prompt: Prompts,
    empty: Prompts,
    generator: torch.Generator,
    size: int,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    guidance: Guidance = "cfg",
) -> Tensor:
    """A picture of a prompt, (3, size, size) in uint8, by the pipeline's own sampler, alone: a function of its noise.

    Args:
        prompt, empty: of `encode_prompts`, a row each: what is drawn, and what is guided from. On the device.
        guidance_scale: None: the pipeline's own.
        guidance: `domain` leads from the base without prompt to the adapters that serve (Zhong et al., ICLR 2025).

    Raises:
        ValueError: domain guidance of a family whose pictures are not guided from the empty prompt, or no adapter.
    """
    if guidance == "domain" and not family.is_guided:
        raise ValueError(f"domain guidance leads from the empty prompt, from which {family.name} is not guided")
    serving = [adapters_of(pipeline.transformer).serving] if guidance == "domain" else None
    (picture,) = draw_prompts(
        pipeline,
        family,
        prompt,
        empty,
        [generator],
        size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        adapter_names=serving,
        empty_names=serving and [None],
    )
    return (picture * 255).round().to(torch.uint8)


def draw_prompts(
    pipeline,
    family: Family,
    prompts: Prompts,
    empty: Prompts,
    generators: list[torch.Generator],
    size: int,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    adapter_names: Sequence[Entry] | None = None,
    empty_names: Sequence[Entry] | None = None,
) -> Tensor:
    """Pictures of prompts, (batch, 3, size, size) in float32 from 0 to 1, by the pipeline's own sampler, in one batch.

    Args:
        prompts, empty: of `encode_prompts`; what is drawn, a row each, and the one row that all are guided from.
        generators: one for each picture.
        guidance_scale: None: the pipeline's own.
        adapter_names: as in `route_adapters`, for each picture; None: the adapters that serve.
        empty_names: the same for the empty prompt that each is guided from; None: as `adapter_names`.
    """
    arguments = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if family.is_guided:
        arguments |= {
            f"negative_{name}": tensor.expand(len(generators), *tensor.shape[1:]) for name, tensor in empty.items()
        }
    entries = adapter_names and list(adapter_names)
    if entries and empty_names and family.is_guided and (guidance_scale is None or guidance_scale > 1):
        entries = [*empty_names, *entries]  # the pipelines put the empty prompts first
    route = route_adapters(pipeline.transformer, entries) if entries else nullcontext()
    with route, eval_mode(pipeline.transformer):
        pictures = pipeline(
            **prompts,
            **arguments,
            **family.call,
            negative_prompt=None,
            height=size,
            width=size,
            num_inference_steps=num_inference_steps,
            generator=list(generators),
            output_type="pt",
        ).images
    return pictures.float()


def progress_bar(num_images: int, description: str = "", **options) -> tqdm:
    """A bar for `generate_images(progress=bar.update)`: it counts images, and moves with every step of a sampler."""
    bar_format = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=num_images, desc=description, unit=" images", bar_format=bar_format, **options)


def _scheduler(sampler: str, config: Mapping, num_inference_steps: int, learned_variance: bool):
    """diffusers' scheduler for `sampler`, with its timesteps set."""
    # Where the config says nothing of clipping, diffusers would clip to [-1, 1]; latents have no such bounds.
    clip_sample = config.get("clip_sample", False)
    if sampler == "ddim":
        scheduler = DDIMScheduler.from_config(config, clip_sample=clip_sample)
        scheduler.set_timesteps(num_inference_steps)
    elif sampler == "dpm-solver++":
        # "leading", DDIM's default, would start below the noise level that the first latents have.
        spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "linspace"
        scheduler = DPMSolverMultistepScheduler.from_config(
            config,
            algorithm_type="dpmsolver++",
            timestep_spacing=spacing,
            final_sigmas_type="zero",
            variance_type=None,  # else it cuts the noise down to three channels
        )
        scheduler.set_timesteps(num_inference_steps)
    else:
        variance_type = "learned_range" if learned_variance else "fixed_large"
        scheduler = DDPMScheduler.from_config(config, variance_type=variance_type, clip_sample=clip_sample)
        # In float32, 1 - ᾱ keeps three digits at the last steps.
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
        # DiT's steps, from the first to the last of the schedule; `linspace` rounds some of them differently.
        stride = (config["num_train_timesteps"] - 1) / max(num_inference_steps - 1, 1)
        timesteps = accumulate([0.0] + [stride] * (num_inference_steps - 1))
        scheduler.set_timesteps(timesteps=[round(timestep) for timestep in timesteps][::-1])
    return scheduler


def _flow_scheduler(sampler: str, config: Mapping, num_inference_steps: int, num_tokens: int):
    """diffusers' scheduler of flow matching for `sampler`, with its timesteps set, for images of so many tokens."""
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if sampler == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler(config["num_train_timesteps"], shift)
    elif sampler == "dpm-solver++":
        scheduler = DPMSolverMultistepScheduler(
            config["num_train_timesteps"],
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            final_sigmas_type="zero",
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
        if scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_inference_steps, mu=dynamic_shift(scheduler.config, num_tokens))
            return scheduler
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def dynamic_shift(config: Mapping, num_tokens: int) -> float:
    """μ of a scheduler that shifts by the size of the image: on the line from `base_shift` to `max_shift`."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_tokens - config["base_image_seq_len"])
