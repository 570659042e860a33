"""A cache of latents on disk: each image of a data set is encoded once by the VAE, with both flips (`data.row_cache`).

A shard has the tensors `moments`, `(images, flips, ...)`, `labels` and `broken`.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from onelora_diffusion.data.buckets import Buckets
from onelora_diffusion.data.decoding import UNREADABLE
from onelora_diffusion.data.identity import fingerprint
from onelora_diffusion.data.row_cache import RowCache, build_rows, config_of, split
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.files import digest

SHARD_SIZE = 1024  # images
BUCKET_SHARD_SIZE = 64  # images in buckets may be large, and a shard is assembled in memory
CLIP_SHARD_SIZE = 4
TRANSFORM = "ADM centre crop, [-1, 1]; mean and std of the scaled latents, float32; 1"


class LatentCache(RowCache):
    """`[index, flip] -> (moments, label)`, read on demand from the files of a complete cache."""

    def __init__(self, folder: Path, num_images: int, buckets: Buckets | None = None):
        super().__init__(folder, shards_of(num_images, buckets))

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = key
        row = self.row(index)
        return row["moments"][int(flip)], row["labels"]

    def broken(self) -> Tensor:
        """(images,) bool: True for images that could not be read when they were encoded."""
        found = torch.empty(len(self), dtype=torch.bool)
        found[torch.from_numpy(self.rows)] = torch.cat([shard["broken"] for shard in self.shards])
        return found


def shards_of(num_images: int, buckets: Buckets | None) -> list[np.ndarray]:
    """The indices of the images in each file; all images of a file have one shape."""
    if buckets is None:
        return split(np.arange(num_images), SHARD_SIZE)
    images = [np.flatnonzero(buckets.of_image == number) for number in range(len(buckets.sizes))]
    sizes = [CLIP_SHARD_SIZE if len(size) == 3 else BUCKET_SHARD_SIZE for size in buckets.sizes]
    return [part for each, size in zip(images, sizes, strict=True) for part in split(each, size)]


def cache_size(num_images: int, flip: bool, latent_shape: tuple[int, ...]) -> int:
    """The size of all moments in bytes."""
    return num_images * (1 + flip) * 2 * int(np.prod(latent_shape)) * 4


def build_cache(
    parent: Path,
    dataset: Dataset,
    vae,
    flip: bool,
    encode: Callable[..., Tensor] | None = None,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    is_stopped: Callable[[], object] = lambda: False,
    report: Callable[[str], None] = print,
) -> Path:
    """Encode the images that the cache lacks, and return its folder in `parent` (see `build_rows`).

    Args:
        dataset: `[index] -> (image, label)`; if it has `buckets`, all images of a bucket have one shape.
        vae: a VAE of diffusers.
        encode: `encode(vae, images)`, a family's `encode_images`; None takes `encode_moments`.
    """
    inputs = inputs_of(dataset, vae, flip)

    def is_outdated(path: Path, images: np.ndarray) -> bool:
        """Whether a skipped image can be read now, since a network disk works again or PIL supports its format."""
        with safe_open(path, framework="pt") as file:
            skipped = images[file.get_tensor("broken").numpy()]
        for image in skipped:
            with suppress(*UNREADABLE):
                dataset.decoded(image)
                report(f"image {image}, which was skipped, can be read now: {path} is encoded again")
                return True
        return False

    return build_rows(
        parent,
        inputs["dataset"],
        inputs,
        shards_of(len(dataset), getattr(dataset, "buckets", None)),
        lambda batches: _encoded(batches, dataset, vae, flip, encode or encode_moments, num_workers),
        process_index=process_index,
        num_processes=num_processes,
        batch_size=batch_size,
        unit="image",
        is_outdated=is_outdated,
        is_stopped=is_stopped,
        report=report,
    )


def _encoded(
    batches: list[np.ndarray], dataset: Dataset, vae, flip: bool, encode: Callable[..., Tensor], num_workers: int
) -> Iterator[dict[str, Tensor]]:
    broken = getattr(dataset, "broken", torch.zeros(len(dataset), dtype=torch.bool))
    loader = DataLoader(dataset, batch_sampler=[batch.tolist() for batch in batches], num_workers=num_workers)
    for batch, (images, labels) in zip(batches, loader, strict=True):
        images = images.to(vae.device)
        both = [images, images.flip(-1)] if flip else [images]
        moments = torch.stack([encode(vae, each).cpu() for each in both], dim=1)
        yield {"moments": moments, "labels": labels, "broken": broken[batch]}


def inputs_of(dataset: Dataset, vae, flip: bool) -> dict:
    """All inputs on which the moments depend, as JSON."""
    return {
        "dataset": getattr(dataset, "name", type(dataset).__name__),
        "images": len(dataset),
        "files": fingerprint(dataset),
        "transform": TRANSFORM,
        "flip": flip,
        "vae": digest(vae.state_dict()),
        "vae_config": config_of(vae),
    }
