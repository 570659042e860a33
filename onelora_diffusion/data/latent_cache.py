"""Latents on disk: the VAE's moments of every image of a data set, both flips, encoded once and mapped to memory.

    latents/food101-2f6e1c0a9b34/
        inputs.json                    what the name is a hash of: VAE, transform, files
        shard-00000.safetensors        moments and labels of 1024 images, their sha256 in the header
        shard-00001.safetensors        ...

A shard is written beside, flushed and renamed, so an interrupted build goes on where it was. Any change of the
VAE's weights, of the transform or of the images makes another folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from onelora_diffusion.data.latents import encode_moments
from onelora_diffusion.files import write_bytes

SHARD_SIZE = 1024  # images
TRANSFORM = "ADM centre crop, [-1, 1]; mean and std of the scaled latents, float32; 1"


class LatentCache(Dataset):
    """`[index, flip] -> (moments, label)` from the files of a whole cache, read as they are asked for."""

    def __init__(self, folder: Path, num_images: int):
        self.shards = [load_file(shard_path(folder, shard)) for shard in range(len(shards_of(num_images)))]

    def __len__(self) -> int:
        return sum(len(shard["labels"]) for shard in self.shards)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = key
        shard, row = self.shards[index // SHARD_SIZE], index % SHARD_SIZE
        return shard["moments"][row, int(flip)], shard["labels"][row]

    def broken(self) -> Tensor:
        """(images,) bool: which images could not be read when they were encoded."""
        return torch.cat([shard["broken"] for shard in self.shards])


def cache_size(num_images: int, flip: bool, latent_shape: tuple[int, ...]) -> int:
    """Bytes that the moments take."""
    return num_images * (1 + flip) * 2 * int(np.prod(latent_shape)) * 4


def build_cache(
    parent: Path,
    dataset: Dataset,
    vae,
    flip: bool,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    is_stopped: Callable[[], object] = lambda: False,
    report: Callable[[str], None] = print,
) -> Path:
    """Encodes what is not there yet, and returns the cache's folder in `parent`.

    Every process takes the shards whose number it is, modulo the number of processes; the cache is whole once all of
    them are back, unless `is_stopped` made one of them leave midway. A damaged shard is reported and encoded again.
    """
    inputs = inputs_of(dataset, vae, flip)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = parent / f"{inputs['dataset'].replace(':', '-').replace('/', '-')}-{key[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0:
        write_bytes(folder / "inputs.json", json.dumps(inputs, indent=2).encode())

    shards = shards_of(len(dataset))
    missing = []
    for number in range(process_index, len(shards), num_processes):
        path = shard_path(folder, number)
        if path.exists() and not is_whole(path):
            report(f"{path} is damaged: its images are encoded again")
            path.unlink()
        if not path.exists():
            missing.append(number)

    batches = [list(batch) for number in missing for batch in _split(shards[number], batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)
    loaded = iter(loader)
    total = sum(len(shards[number]) for number in missing)
    with tqdm(total=total, desc="encode", unit="image", disable=process_index > 0 or not total) as progress:
        for number in missing:
            encoded = []
            for _ in _split(shards[number], batch_size):
                if is_stopped():
                    return folder
                encoded.append(_encode(vae, *next(loaded), flip))
                progress.update(len(encoded[-1][0]))
            moments, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
            tensors = {"moments": moments, "labels": labels, "broken": _broken(dataset, shards[number])}
            write_bytes(shard_path(folder, number), save(tensors, metadata={"sha256": digest(tensors)}))
    return folder


def _encode(vae, images: Tensor, labels: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    images = images.to(vae.device)
    both = [images, images.flip(-1)] if flip else [images]
    return torch.stack([encode_moments(vae, each).cpu() for each in both], dim=1), labels


def _broken(dataset: Dataset, indices: range) -> Tensor:
    broken = getattr(dataset, "broken", None)
    return (
        torch.zeros(len(indices), dtype=torch.bool) if broken is None else broken[indices.start : indices.stop].clone()
    )


def _split(indices: range, size: int) -> Iterator[range]:
    return (indices[first : first + size] for first in range(0, len(indices), size))


def shards_of(num_images: int) -> list[range]:
    return list(_split(range(num_images), SHARD_SIZE))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def is_whole(path: Path) -> bool:
    """Whether a shard holds what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("sha256")
        return digest(load_file(path)) == written
    except (SafetensorError, OSError):
        return False


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of tensors' names, shapes and bytes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


# ---------------------------------------------------------------------------------------------------
# What a cache depends on


def inputs_of(dataset: Dataset, vae, flip: bool) -> dict:
    """Everything that the moments are a function of, as JSON."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    return {
        "dataset": getattr(dataset, "name", type(dataset).__name__),
        "images": len(dataset),
        "files": fingerprint(dataset),
        "transform": TRANSFORM,
        "flip": flip,
        "vae": digest(vae.state_dict()),
        "vae_config": json.loads(json.dumps(config, default=str)),
    }


def fingerprint(dataset: Dataset) -> str:
    """sha256 of all that a data set is made of: names, sizes and times of its files, arrays, labels, settings."""
    sha256 = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, str | os.PathLike):
            sha256.update(str(value).encode())
            try:
                status = os.stat(value)
                sha256.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            except (OSError, ValueError):  # a name, and no file
                pass
        elif isinstance(value, dict):
            add([part for pair in value.items() for part in pair])
        elif isinstance(value, list | tuple):
            sha256.update(f"{len(value)}".encode())
            for part in value:
                add(part)
        elif isinstance(value, set | frozenset):
            add(sorted(map(str, value)))
        elif isinstance(value, np.ndarray | Tensor):
            array = np.ascontiguousarray(value)
            sha256.update(f"{array.dtype} {array.shape}".encode())
            sha256.update(array.tobytes())
        elif value is None or isinstance(value, bool | int | float):
            sha256.update(repr(value).encode())
        elif hasattr(value, "_fingerprint"):  # of Hugging Face's library
            sha256.update(value._fingerprint.encode())
        else:
            sha256.update(type(value).__qualname__.encode())
            if isinstance(value, Dataset):
                add({name: part for name, part in sorted(vars(value).items()) if name not in ("broken", "root")})

    add(dataset)
    return sha256.hexdigest()
