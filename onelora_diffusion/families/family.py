"""The interface of a family of diffusion transformers: from an image and its condition to a prediction, and back."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional

from onelora_diffusion.denoisers import denoiser_of
from onelora_diffusion.families.autoencoder import decode_latents, encode_moments


@dataclass(frozen=True)
class Edit:
    """A prompt for an edit of reference images.

    Attributes:
        references: each has a `digest` of its file, and `image()` returns its picture, a PIL image.
        side: (height, width) in pixels of the image to draw.
        frames: of the clip to draw, which begins with the reference image; 1: an image is drawn.
    """

    prompt: str
    references: tuple
    side: tuple[int, int]
    frames: int = 1


@dataclass(frozen=True)
class Sized:
    """A prompt for images of one size, for bases that encode prompt and size together.

    Attributes:
        prompt: None stands for no condition.
        side: (height, width) in pixels of the image to draw.
        frames: the number of frames of the clip to draw.
    """

    prompt: str | None
    side: tuple[int, int]
    frames: int = 1


Condition = int | str | Edit | Sized | None
"""The condition of an image: a class label, a prompt or an edit; None stands for no condition."""
Conditions = dict[str, Tensor | list]
"""Encoded conditions, which a denoiser gets in addition to noise and time: by name, a tensor with a row for each
image, or a list with an entry for each if their sizes differ."""


class Family:
    """Converts images and conditions to the inputs of a transformer, and its output to a prediction.

    Code outside this folder does not distinguish class labels from prompts, except where a user gives one.

    Attributes:
        name: the name in settings and errors.
        transformer_class: the name of the transformer's class in diffusers.
        pipeline_class: a pipeline class of diffusers, if `DiffusionPipeline` does not read everything in the folder.
        condition: `str` for prompts, `int` for class labels.
        targets: the linear layers that are adapted by default: those of the blocks, of the modulation that all blocks
            share, and of the output, like the paper's on a DiT. None: see `target_layers`.
        is_guided: whether guidance uses the empty condition.
        guides_itself: whether the transformer computes that, which then is trained as well; or another model does.
        takes_samplers: whether samplers of `onelora_diffusion.sampling` can replace the pipeline's own scheduler.
        images_at_once: default number of images in a batch of the networks.
        frame_rate: frames a second of clips; None: the pipeline does not say.
        merges_adapters: whether adapters are merged into the base's weights while images are drawn, which keeps a copy
            of those in memory.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_class: ClassVar[str] = "DiffusionPipeline"
    condition: ClassVar[type] = str
    targets: ClassVar[tuple[str, ...] | None]
    is_guided: ClassVar[bool] = True
    takes_samplers: ClassVar[bool] = False
    images_at_once: ClassVar[int] = 1
    merges_adapters: ClassVar[bool] = False
    frame_rate: float | None = None

    @property
    def guides_itself(self) -> bool:
        return self.is_guided

    def keep(self) -> None:
        """Write what took calls of the pipeline to find out, for the next start."""

    def shared_by_blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """Modules inside the blocks that are called outside of them, once for all blocks."""
        return []

    # -----------------------------------------------------------------------------------------------
    # Conditions

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        """Encode conditions for `predict`, one row each; None gives the empty condition, which guidance uses.

        Args:
            max_length: number of tokens of each prompt; None takes the pipeline's default.
        """
        raise NotImplementedError

    def on_device(self, conditions: Conditions, device: torch.device) -> Conditions:
        """Encoded conditions as `predict` takes them on a device; what a batch is arranged by stays on the host."""
        return send_to_device(conditions, device, non_blocking=True)

    def at_size(self, condition: Condition, size: int | tuple[int, int], frames: int = 1) -> Condition:
        """The condition of images of a size, or of clips: the same, unless prompts are encoded for a size."""
        return condition

    def check_conditions(self, pipeline, conditions: list[Condition]) -> None:
        """ValueError for a condition that the base with its active adapters cannot draw."""

    def of_base(self, pipeline, condition: int | str) -> int | str:
        """The condition that the base draws for comparison with an adapter: the same prompt, or a class of its own."""
        return condition

    def encoders(self, pipeline) -> dict[str, object]:
        """The models and tokenizers that only encode conditions, by name; None for one that the pipeline lacks."""
        return {name: part for name, part in pipeline.components.items() if encodes_prompts(name)}

    def conditioners(self, pipeline) -> dict[str, object]:
        """The models and tokenizers that take part in encoding conditions as well, by name, and are needed later."""
        return {}

    # -----------------------------------------------------------------------------------------------
    # Images

    def encode_images(self, vae: nn.Module, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images, normalised: (batch, 2, C, ...) in float32.

        Args:
            images: (batch, 3, height, width), or clips (batch, 3, frames, height, width); in [-1, 1], or uint8.
        """
        return encode_moments(vae, images)

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Normalised latents (batch, C, ...) -> images (batch, 3, height, width) in float32, around -1 to 1.

        Latents of clips (batch, C, f, h, w) become clips (batch, 3, frames, height, width).
        """
        return decode_latents(vae, latents)

    def latent_shape(self, pipeline, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """The shape (C, ...) of the latents of an image of height by width pixels, or of a clip of several frames."""
        scale = self.pixels_of_latent(pipeline)
        return denoiser_of(pipeline).config.in_channels, height // scale, width // scale

    def pixels_of_latent(self, pipeline) -> int:
        """Number of pixels per latent along one side."""
        return pipeline.vae_scale_factor

    def patch_size(self, transformer: nn.Module) -> int:
        """Number of latents per token along one side."""
        return transformer.config.patch_size

    def resolution(self, pipeline) -> int:
        """Side in pixels of the images that the pipeline draws by default."""
        return denoiser_of(pipeline).config.sample_size * self.pixels_of_latent(pipeline)

    def multiple(self, pipeline) -> int:
        """Number of pixels per token along one side; image sides must be multiples of it."""
        return self.pixels_of_latent(pipeline) * self.patch_size(denoiser_of(pipeline))

    def check_resolution(self, pipeline, *sides: int) -> None:
        """ValueError for images that the transformer does not support: of a height and a width, or of one side."""
        for side in sides:
            check_multiple(side, self.multiple(pipeline))

    def check_frames(self, frames: int) -> None:
        """ValueError for a number of frames of a clip that the pipeline does not draw."""
        if frames != 1:
            raise ValueError(f"{self.name} draws images, and no clips of {frames} frames: leave --frames out")

    def try_frames(self, frames: int) -> None:
        """ValueError for clips that the models do not take, which are called with small ones."""

    # -----------------------------------------------------------------------------------------------
    # Predictions

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """The prediction of the transformer for latents (batch, C, ...), with C channels, or 2C with a variance.

        Args:
            denoiser: the transformer, possibly wrapped for several processes.
            latents: normalised; of prompts they may be in any precision, since the transformer computes in that of
                the encoded ones.
            times: (batch,), the time of each image, as given by `model_timesteps` for the family's scheduler; on the
                CPU, so that what follows from them waits for no device.
            conditions: the result of `encode_conditions`, (batch, ...), as `on_device` moves it.
        """
        raise NotImplementedError

    def learned(self, latents: tuple[int, ...]) -> Tensor | None:
        """Of latents of a shape (C, f, h, w), the mask (1, 1, f, h, w) of those that are no part of what is given.

        None: all are learned.
        """
        return None

    def completed(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents (batch, C, ...) that were drawn, with those of their conditions that are given in their places."""
        return latents

    def timestep_range(self, scheduler) -> range:
        """The timesteps that the denoiser is trained on: all, or its share of them if there are two denoisers."""
        return range(scheduler.config.num_train_timesteps)

    def training_scheduler(self, pipeline):
        """The scheduler that says how images are noised in training, and what is predicted; see `training_losses`."""
        return pipeline.scheduler

    def sampling_scheduler(self, scheduler, num_inference_steps: int, num_tokens: int, frames: int = 1):
        """A new scheduler of the pipeline, with its timesteps set as the pipeline sets them for a number of tokens.

        Args:
            frames: the number of frames that the tokens of a clip are of, as its autoencoder has them.
        """
        scheduler.set_timesteps(num_inference_steps=num_inference_steps)
        return scheduler

    def guidance_scale(self, pipeline) -> float:
        """The pipeline's default strength of guidance."""
        return inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default


def sides_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of a size that is both or the side of a square."""
    return size if isinstance(size, tuple) else (size, size)


def check_multiple(resolution: int, multiple: int) -> None:
    """ValueError, which names the nearest ones, for a resolution that is no multiple."""
    if resolution < 1 or resolution % multiple:
        below = max(resolution, 0) // multiple * multiple
        near = " or ".join(str(each) for each in (below, below + multiple) if each)
        raise ValueError(
            f"a resolution of {resolution} is no multiple of {multiple}, which the model needs: give {near}"
        )


def joined(rows: Sequence[Conditions]) -> Conditions:
    """Join the conditions of single images to those of a batch."""
    return {
        name: [entry for row in rows for entry in row[name]]
        if isinstance(first, list)
        else padded([row[name] for row in rows])
        for name, first in rows[0].items()
    }


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows, (rows, ...) each, which are padded by zeros to the largest size of each dimension."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([functional.pad(part, _missing(part, shape)) for part in parts])


def _missing(part: Tensor, shape: Sequence[int]) -> list[int]:
    """What `functional.pad` is to add before and after each dimension, the last one first."""
    sizes = zip(reversed(shape), reversed(part.shape[1:]), strict=True)
    return [missing for most, size in sizes for missing in (0, most - size)]


def encodes_prompts(name: str) -> bool:
    """Whether a component of this name only encodes prompts."""
    return "text_encoder" in name or "tokenizer" in name or name in ("processor", "text_processor", "prompt_enhancer")


def emptied(condition: Condition) -> Condition:
    """The empty condition that guides from a condition: of the same size, and of an edit for the same references."""
    if isinstance(condition, Sized):
        return replace(condition, prompt=None)
    return replace(condition, prompt="") if isinstance(condition, Edit) else None


def longest(max_length: int | None) -> dict[str, int]:
    """The keyword argument of `encode_prompt` for a given number of tokens; {} for None."""
    return {} if max_length is None else {"max_sequence_length": max_length}
