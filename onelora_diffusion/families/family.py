"""What a family of diffusion transformers answers: the whole way from an image and its condition to a prediction."""

import inspect
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from onelora_diffusion.families.autoencoder import decode_latents, encode_moments

Condition = int | str | None
"""What an image is asked for by: a class label, or a prompt; None stands for no condition."""
Conditions = dict[str, Tensor | list]
"""What a denoiser is told of its images beside the noise and the time: by name a tensor with a row for each image, or
a list with an entry for each where they are of unequal size."""


class Family:
    """How images and conditions become what a transformer is called with, and what comes of its prediction.

    Nothing outside this folder asks whether conditions are class labels or prompts, except where somebody writes one
    down.

    Attributes:
        name: as it is named in settings and errors.
        transformer_class: of diffusers.
        pipeline_class: of diffusers, where `DiffusionPipeline` does not read all that is in the pipeline's folder.
        condition: `str` for prompts, `int` for class labels.
        targets: the linear layers that an adapter serves by default: those of the blocks, of the modulation that all
            blocks share, and of the output, as the paper has them on a DiT. None: see `target_layers`.
        blocks: the lists of the transformer's blocks.
        is_guided: whether images are guided from no condition, which then is trained as well.
        takes_samplers: whether samplers of `onelora_diffusion.sampling` stand in for the pipeline's own scheduler.
        images_at_once: how many images the networks run on at a time, if nothing else is asked for.
        merges_adapters: whether adapters are merged into the base's weights while images are drawn, which keeps a copy
            of those in memory.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_class: ClassVar[str] = "DiffusionPipeline"
    condition: ClassVar[type] = str
    targets: ClassVar[tuple[str, ...] | None]
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    is_guided: ClassVar[bool] = True
    takes_samplers: ClassVar[bool] = False
    images_at_once: ClassVar[int] = 1
    merges_adapters: ClassVar[bool] = False

    def check(self, pipeline) -> None:
        """ValueError for a pipeline of the family that is called in a way that is not known here."""

    def blocks_of(self, transformer: nn.Module) -> list[nn.Module]:
        return [block for name in self.blocks for block in getattr(transformer, name)]

    def shared_by_blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """Modules inside the blocks that are computed with outside of them, for all blocks together."""
        return []

    # -----------------------------------------------------------------------------------------------
    # Conditions

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        """What `predict` needs of these conditions, a row each; of None, that from which images are guided.

        Args:
            max_length: tokens of each prompt. None: as many as the pipeline draws with.
        """
        raise NotImplementedError

    def check_conditions(self, pipeline, conditions: list[Condition]) -> None:
        """ValueError for a condition that the base, with the adapters that serve, does not draw."""

    def of_base(self, pipeline, condition: int | str) -> int | str:
        """The condition that the base draws beside an adapter's: the same prompt, or a class of its own."""
        return condition

    def encoders(self, pipeline) -> dict[str, object]:
        """Models and tokenizers that conditions are encoded with and nothing else; None is one that is left out."""
        parts = ("text_encoder", "tokenizer")
        return {name: part for name, part in pipeline.components.items() if name.startswith(parts)}

    # -----------------------------------------------------------------------------------------------
    # Images

    def encode_images(self, vae: nn.Module, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images, normalised: (batch, 2, C, ...) in float32.

        Args:
            images: (batch, 3, height, width), in [-1, 1], or uint8.
        """
        return encode_moments(vae, images)

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Normalised latents (batch, C, ...) -> images (batch, 3, height, width) in float32, around -1 to 1."""
        return decode_latents(vae, latents)

    def latent_shape(self, pipeline, height: int, width: int) -> tuple[int, ...]:
        """(C, ...) of the latents of an image of so many pixels."""
        scale = self.pixels_of_latent(pipeline)
        return self.latent_channels(pipeline.transformer), height // scale, width // scale

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels

    def pixels_of_latent(self, pipeline) -> int:
        """Pixels a side that a latent stands for."""
        return pipeline.vae_scale_factor

    def patch_size(self, transformer: nn.Module) -> int:
        """Latents a side that make a token."""
        return transformer.config.patch_size

    def resolution(self, pipeline) -> int:
        """Pixels a side of the images that the pipeline draws by itself."""
        return pipeline.transformer.config.sample_size * self.pixels_of_latent(pipeline)

    def multiple(self, pipeline) -> int:
        """Pixels a side of a token, of which the sides of an image are multiples."""
        return self.pixels_of_latent(pipeline) * self.patch_size(pipeline.transformer)

    def check_resolution(self, pipeline, resolution: int) -> None:
        """ValueError for images of a size that the transformer does not take."""
        multiple = self.multiple(pipeline)
        if resolution < 1 or resolution % multiple:
            raise ValueError(f"a resolution of {resolution} is no multiple of {multiple}, which the model needs")

    # -----------------------------------------------------------------------------------------------
    # Predictions

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """What the transformer predicts of latents (batch, C, ...): as many channels, or twice with a variance.

        Args:
            denoiser: the transformer as it is, or wrapped for several processes.
            latents: normalised; of prompts they may be in any precision, since the transformer computes in that of
                the encoded ones.
            times: (batch,), each image's own, of the family's scheduler as `model_timesteps` gives them.
            conditions: of `encode_conditions`, (batch, ...).
        """
        raise NotImplementedError

    def timesteps(self, scheduler, num_inference_steps: int, num_tokens: int) -> dict:
        """Arguments of the scheduler's `set_timesteps`, as the pipeline's call gives them for so many tokens."""
        return {"num_inference_steps": num_inference_steps}

    def guidance_scale(self, pipeline) -> float:
        """The strength of guidance that the pipeline draws with by itself."""
        return inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default


def joined(rows: Sequence[Conditions]) -> Conditions:
    """Conditions of several images from those of each, in their order."""
    return {
        name: [entry for row in rows for entry in row[name]]
        if isinstance(first, list)
        else torch.cat([row[name] for row in rows])
        for name, first in rows[0].items()
    }


def as_prompts(conditions: list[Condition]) -> list[str]:
    """Prompts, with the empty one for None."""
    return ["" if condition is None else condition for condition in conditions]


def longest(max_length: int | None) -> dict[str, int]:
    """The keyword argument of `encode_prompt`, where it is given."""
    return {} if max_length is None else {"max_sequence_length": max_length}


def dynamic_shift(config: Mapping, num_tokens: int) -> float:
    """μ of a scheduler that shifts by the size of the image: on the line from `base_shift` to `max_shift`."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (num_tokens - config["base_image_seq_len"])
