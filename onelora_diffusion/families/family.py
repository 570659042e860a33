"""What a family of diffusion transformers answers."""

from typing import ClassVar

from torch import Tensor, nn

Prompts = dict[str, Tensor]
"""All that a transformer needs of prompts, a row each, by the names that its pipeline has for them in a call; of
classes, `class_labels`."""


class Family:
    """How a family's prompts are encoded, and how its transformer is called.

    Attributes:
        name: as it is named in settings and errors.
        transformer_class: of diffusers.
        targets: the linear layers that an adapter serves by default: those of the blocks, of the modulation that all
            blocks share, and of the output, as the paper has them on a DiT.
        blocks: the lists of the transformer's blocks.
        is_guided: whether pictures are guided from the empty prompt, which then is trained as well.
        call: further arguments of the pipeline's call, for pictures of just the size that is asked for.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    targets: ClassVar[tuple[str, ...] | None]
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    is_guided: ClassVar[bool] = True
    call: ClassVar[dict] = {}

    def check(self, pipeline) -> None:
        """ValueError for a pipeline of the family that is called in a way that is not known here."""

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int | None = None) -> Prompts:
        """Prompts by the pipeline's text encoders; the empty one is what pictures are guided from.

        Args:
            max_sequence_length: tokens of each. None: as many as the pipeline draws with.
        """
        raise NotImplementedError

    def predict(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        """What the transformer predicts of latents (batch, C, H, W): as many channels, or twice with a variance.

        Args:
            transformer: as it is, or wrapped for several processes.
            latents: in any precision; the transformer computes in that of the prompts, which are its own encoders'.
            timesteps: (batch,), the times of the family's scheduler, as `model_timesteps` gives them.
            prompts: of `encode_prompts`, (batch, ...).
        """
        raise NotImplementedError

    def blocks_of(self, transformer: nn.Module) -> list[nn.Module]:
        return [block for name in self.blocks for block in getattr(transformer, name)]

    def resolution(self, pipeline) -> int:
        """Pixels a side of the pictures that the pipeline draws by itself."""
        return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor

    def multiple(self, pipeline) -> int:
        """Of what the sides of an image are multiples: pixels of a token."""
        return pipeline.vae_scale_factor * self.patch_size(pipeline.transformer)

    def check_resolution(self, pipeline, resolution: int) -> None:
        """ValueError for pictures of a size that the transformer does not take."""
        multiple = self.multiple(pipeline)
        if resolution < 1 or resolution % multiple:
            raise ValueError(f"a resolution of {resolution} is no multiple of {multiple}, which the model needs")

    def patch_size(self, transformer: nn.Module) -> int:
        """Latents a side that make a token."""
        return transformer.config.patch_size

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels


def longest(max_sequence_length: int | None) -> dict[str, int]:
    """The keyword argument of `encode_prompt`, where it is given."""
    return {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
