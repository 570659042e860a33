"""1LoRA's training beside diffusers' own training example of the same base, each as it is by default."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.example_bases import BASES, TEXT_LAYERS, make_base
from benchmarks.measure import interleave, ratio, saved_bytes, storage_bytes, table
from benchmarks.peers import twin
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.verbs import inject_adapter

PROMPT = "a photo of sks dog"
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
JOINT = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
# The layers that each example adapts.
LAYERS = {
    "flux": [f"attn.{layer}" for layer in ATTENTION + JOINT]
    + [f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")],
    "sd3": [f"attn.{layer}" for layer in ATTENTION + JOINT],
    "sdxl": ATTENTION,
}


@dataclasses.dataclass
class ExamplesSettings:
    """Train 1LoRA beside the loops of diffusers' train_dreambooth_lora_{flux,sd3,sdxl}.py: few layers, full width."""

    bases: tuple[Literal["flux", "sd3", "sdxl"], ...] = ("flux", "sd3", "sdxl")
    """Which bases; their weights are random."""
    ranks: tuple[int, ...] = (4, 16)
    """Of the example's LoRA, which has 4 by default."""
    images: int = 8
    """Images in the training set."""
    resolution: int = 256
    """Pixels a side."""
    batch: int = 1
    """Images in a step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the base; trained values are fp32."""
    size: float = 1
    """Share of the full width."""
    rounds: int = 5
    """How often each step is timed, interleaved."""
    threads: int = 1
    """Threads of PyTorch on a CPU."""
    clock: Literal["wall", "cpu"] = "cpu"
    """cpu: processor time of this process."""
    output_dir: Path = Path("runs/examples")
    """Where examples.md and examples.json go."""


class Loop:
    """What one program does: `prepare`, then `train` for each step.

    Attributes:
        model: the denoiser with its adapter.
        held: tensors beside the model that stay in memory during training.
    """

    def __init__(self, name: str, pipeline, images: Tensor, settings: ExamplesSettings):
        self.name, self.pipeline, self.images, self.settings = name, pipeline, images, settings
        self.held: list[Tensor] = []
        self.number = 0

    def prepare(self) -> None:
        raise NotImplementedError

    def loss(self) -> Tensor:
        raise NotImplementedError

    def train(self) -> None:
        self.number += 1
        self.optimizer.zero_grad()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def optimize(self, model: nn.Module, **settings) -> None:
        self.model = model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, **settings)

    def rows(self) -> Tensor:
        """The numbers of the step's images."""
        first = self.number * self.settings.batch
        return torch.arange(first, first + self.settings.batch) % len(self.images)

    def in_precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16")

    def resident(self) -> int:
        """Bytes that training holds: the model, the optimizer's moments, and what is kept beside them."""
        moments = 2 * sum(parameter.numel() for parameter in self.trained) * 4
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *self.held]) + moments


class Ours(Loop):
    """Latents and prompts are encoded once, then the encoders are not needed."""

    def prepare(self) -> None:
        self.family = family_of(self.pipeline)
        prompts = [PROMPT, ""] if self.family.is_guided else [PROMPT]
        with torch.no_grad():
            self.moments = torch.cat([self.family.encode_images(self.pipeline.vae, i[None]) for i in self.images])
            self.prompts = self.family.encode_conditions(self.pipeline, prompts)
        self.held = [self.moments, *self.prompts.values()]
        config = AdapterConfig(method="1lora", targets=self.family.targets)
        self.optimize(inject_adapter(twin(denoiser_of(self.pipeline)), config), weight_decay=0, fused=True)

    def loss(self) -> Tensor:
        scheduler, batch = self.pipeline.scheduler, self.settings.batch
        moments = self.moments[self.rows()]
        noise, posterior = torch.randn(2, *moments[:, 0].shape)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        x_start = sample_moments(moments, posterior)
        prompts = {name: rows[:1].expand(batch, *rows.shape[1:]) for name, rows in self.prompts.items()}
        with self.in_precision():
            latents = add_noise(x_start, noise, timesteps, scheduler)
            output = self.family.predict(self.model, latents, model_timesteps(timesteps, scheduler), prompts)
        return training_losses(output, x_start, noise, timesteps, scheduler)["loss"].mean()


class Example(Loop):
    """An example's loop with one prompt: each step encodes its images, and FLUX.1's the prompt too.

    Args:
        rank: of the LoRA.
        caches: whether latents are encoded once, as by its flag --cache_latents.
    """

    def __init__(self, name: str, pipeline, images: Tensor, settings: ExamplesSettings, rank: int, caches: bool):
        super().__init__(name, pipeline, images, settings)
        self.rank, self.caches = rank, caches

    def prepare(self) -> None:
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        pipeline = self.pipeline
        self.encoded = self.encode()
        self.held = [tensor for tensor in self.encoded if tensor is not None]
        if self.name == "flux":  # whose encoders stay
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
                self.held += encoder.parameters()
        if self.caches:
            self.cache = [self.distribution(image[None]) for image in self.images]
            self.held += [distribution.parameters for distribution in self.cache]
        else:
            self.held += pipeline.vae.parameters()
        if self.name == "sdxl":
            self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        else:
            self.noise_scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        model = twin(denoiser_of(pipeline))
        model.add_adapter(
            LoraConfig(
                r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=LAYERS[self.name]
            )
        )
        self.optimize(model, weight_decay=1e-4)

    @torch.no_grad()
    def encode(self) -> tuple:
        """What the pipeline's `encode_prompt` returns."""
        given = {"prompt": PROMPT, "prompt_2": None, "device": "cpu"}
        if self.name == "sd3":
            given |= {"prompt_3": None, "do_classifier_free_guidance": False}
        if self.name == "sdxl":
            given |= {"do_classifier_free_guidance": False}
        return self.pipeline.encode_prompt(**given)

    def distribution(self, images: Tensor):
        vae = self.pipeline.vae
        with torch.no_grad():
            return vae.encode(images.to(vae.dtype)).latent_dist

    def latents(self) -> Tensor:
        rows, config = self.rows(), self.pipeline.vae.config
        if self.caches:
            latents = torch.cat([self.cache[row].sample() for row in rows])
        else:
            latents = self.distribution(self.images[rows]).sample()
        return (latents - (config.shift_factor or 0)) * config.scaling_factor

    def loss(self) -> Tensor:
        encoded = self.encode() if self.name == "flux" else self.encoded
        latents = self.latents()
        noise = torch.randn_like(latents)
        with self.in_precision():
            if self.name == "sdxl":
                timesteps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(latents),))
                noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
                prediction, target = self.predict(noisy, timesteps, encoded), noise
            else:
                indices = (torch.rand(len(latents)) * self.noise_scheduler.config.num_train_timesteps).long()
                sigmas = self.noise_scheduler.sigmas[indices].to(latents.dtype)[:, None, None, None]
                noisy, timesteps = (1 - sigmas) * latents + sigmas * noise, self.noise_scheduler.timesteps[indices]
                prediction, target = self.predict(noisy, timesteps, encoded), noise - latents
        return (prediction.float() - target.float()).square().mean()

    def predict(self, noisy: Tensor, timesteps: Tensor, encoded: tuple) -> Tensor:
        from diffusers import FluxPipeline

        batch, channels, height, width = noisy.shape
        prompt, pooled = encoded[0].expand(batch, -1, -1), encoded[1 if self.name == "flux" else 2].expand(batch, -1)
        if self.name == "sd3":
            return self.model(noisy, prompt, pooled, timesteps, return_dict=False)[0]
        if self.name == "sdxl":
            side = self.settings.resolution
            ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=noisy.dtype).expand(batch, -1)
            added = {"text_embeds": pooled, "time_ids": ids}
            return self.model(noisy, timesteps, prompt, added_cond_kwargs=added, return_dict=False)[0]
        output = self.model(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=timesteps / 1000,
            guidance=torch.full((batch,), 3.5),
            txt_ids=encoded[2],
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", noisy.dtype),
            return_dict=False,
        )[0]
        scale = self.pipeline.vae_scale_factor
        return FluxPipeline._unpack_latents(output, height * scale, width * scale, scale)


def loops_of(name: str, pipeline, settings: ExamplesSettings) -> dict[str, Loop]:
    torch.manual_seed(0)
    images = torch.rand(settings.images, 3, settings.resolution, settings.resolution) * 2 - 1
    loops: dict[str, Loop] = {"1LoRA": Ours(name, pipeline, images, settings)}
    caching = (False,) if name == "sdxl" else (False, True)  # SDXL's example has no such flag
    for caches, rank in itertools.product(caching, settings.ranks):
        title = f"example, LoRA r={rank}{', --cache_latents' if caches else ''}"
        loops[title] = Example(name, pipeline, images, settings, rank, caches)
    return loops


def measured(name: str, settings: ExamplesSettings) -> list[dict]:
    """A row for each loop on a base."""
    clock: Callable[[], float] = time.process_time if settings.clock == "cpu" else time.perf_counter
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    loops, first = loops_of(name, make_base(name, dtype, settings.size), settings), {}
    for title, loop in loops.items():
        start = clock()
        loop.prepare()
        loop.train()
        first[title] = clock() - start
    trains = {title: loop.train for title, loop in loops.items()}
    seconds = interleave(trains, settings.rounds, warmup=1, clock=clock, label=name)
    return [
        {"base": name, "loop": title, "seconds": float(np.median(seconds[title])), "first": first[title]}
        | {"ours_over_it": ratio(seconds["1LoRA"], seconds[title])}
        | {"saved_bytes": saved_bytes(loop.model, loop.loss), "resident_bytes": loop.resident()}
        | {"num_trainable_params": sum(parameter.numel() for parameter in loop.trained)}
        for title, loop in loops.items()
    ]


def examples(settings: ExamplesSettings) -> dict:
    """Measure, print the tables, and write `examples.md` and `examples.json`."""
    torch.set_num_threads(settings.threads)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [row for name in settings.bases for row in measured(name, settings)]
    results = {"settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)}, "rows": rows}
    report = markdown(results)
    print(report)
    (settings.output_dir / "examples.md").write_text(report)
    (settings.output_dir / "examples.json").write_text(json.dumps(results, indent=1))
    return results


def markdown(results: dict) -> str:
    settings = results["settings"]
    lines = [
        f"Batch {settings['batch']} of {settings['resolution']} pixels, {settings['images']} images, base in "
        f"{settings['precision']}, text encoders of {TEXT_LAYERS} layers; {settings['threads']} threads, "
        f"{settings['clock']} time, median over {settings['rounds']} rounds (± half the distance of the quartiles).",
    ]
    header = ["", "s a step", "1LoRA/it", "kept MB", "s until the first step", "resident MB", "trained"]
    for name in settings["bases"]:
        cells = []
        for row in (row for row in results["rows"] if row["base"] == name):
            middle, lower, upper = row["ours_over_it"]
            cells.append(
                [
                    row["loop"],
                    f"{row['seconds']:.2f}",
                    f"{middle:.2f} ±{(upper - lower) / 2:.2f}",
                    f"{row['saved_bytes'] / 1e6:.1f}",
                    f"{row['first']:.1f}",
                    f"{row['resident_bytes'] / 1e6:,.0f}",
                    f"{row['num_trainable_params']:,}",
                ]
            )
        lines += ["", f"### {BASES[name][0]}", "", *table(header, cells)]
    return "\n".join(lines) + "\n"
