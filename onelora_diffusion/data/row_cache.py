"""Rows of tensors on disk, encoded once and mapped to memory: an image's latents, a prompt's embeddings.

    latents/food101-2f6e1c0a9b34/
        inputs.json                    the inputs, whose hash is in the folder's name
        shard-00000.safetensors        tensors of some rows by name, with their sha256 in the header
        shard-00001.safetensors        ...

A shard is written under a temporary name, flushed and renamed, so an interrupted build can be continued. If an input
changes, the cache is another folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion.families.family import padded
from onelora_diffusion.files import digest, write_bytes


class EncodingError(ValueError):
    """What a row is made of cannot be encoded, or not to finite numbers; the message names it."""


class RowCache(Dataset):
    """The rows of a complete cache, read on demand from its files; `shards` are the row numbers in each."""

    def __init__(self, folder: Path, shards: list[np.ndarray]):
        self.shards = [load_file(shard_path(folder, number)) for number in range(len(shards))]
        self.rows = np.concatenate(shards)  # row numbers in the order of the files
        self.shard_of, self.place_of = np.empty_like(self.rows), np.empty_like(self.rows)
        self.shard_of[self.rows] = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
        self.place_of[self.rows] = np.concatenate([np.arange(len(shard)) for shard in shards])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> dict[str, Tensor]:
        place = self.place_of[number]
        return {name: tensor[place] for name, tensor in self.shards[self.shard_of[number]].items()}


def build_rows(
    parent: Path,
    name: str,
    inputs: dict,
    shards: list[np.ndarray],
    encode: Callable[[list[np.ndarray]], Iterator[dict[str, Tensor]]],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int = 32,
    unit: str = "row",
    is_outdated: Callable[[Path, np.ndarray], bool] = lambda path, rows: False,
    is_stopped: Callable[[], object] = lambda: False,
    report: Callable[[str], None] = print,
) -> Path:
    """Encode the rows that the cache lacks, and return its folder in `parent`.

    The shards are dealt out to the processes by their numbers. The cache is complete once all processes have returned,
    unless `is_stopped` has ended one of them early. A damaged shard is reported and encoded again. EncodingError if a
    row is not finite; OSError, which names the shard, if the disk is full: earlier shards are complete.

    Args:
        inputs: all inputs on which the rows depend, as JSON.
        shards: the row numbers in each file; the tensors of these rows are padded by zeros to one shape.
        encode: a function from batches of row numbers to the tensors of each batch, `(rows, ...)` by name.
        is_outdated: a function that tells whether a complete file must be encoded again; it reports the reason.
    """
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = parent / f"{name.replace(':', '-').replace('/', '-')}-{key[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0:
        write_bytes(folder / "inputs.json", json.dumps(inputs, indent=2).encode())

    missing = []
    for number in range(process_index, len(shards), num_processes):
        path = shard_path(folder, number)
        if path.exists() and not is_whole(path):
            report(f"{path} is damaged: its {unit}s are encoded again")
            path.unlink()
        if not path.exists() or is_outdated(path, shards[number]):
            missing.append(number)

    encoded = encode([batch for number in missing for batch in split(shards[number], batch_size)])
    total = sum(len(shards[number]) for number in missing)
    with tqdm(total=total, desc="encode", unit=unit, disable=process_index > 0 or not total) as progress:
        for number in missing:
            parts = []
            for batch in split(shards[number], batch_size):
                if is_stopped():
                    return folder
                parts.append({name: tensor.cpu() for name, tensor in next(encoded).items()})
                _check_finite(parts[-1], batch, unit)
                progress.update(len(batch))
            tensors = {name: padded([part[name] for part in parts]).contiguous() for name in parts[0]}
            write_bytes(shard_path(folder, number), save(tensors, metadata={"sha256": digest(tensors)}))
    return folder


def _check_finite(tensors: dict[str, Tensor], rows: np.ndarray, unit: str) -> None:
    for name, tensor in tensors.items():
        wrong = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
        if wrong.any():
            is_full = tensor.dtype == torch.float32
            remedy = "check the weights that encode it, and what it is" if is_full else "encode in float32"
            row = rows[int(wrong.nonzero()[0])]
            raise EncodingError(f"{name} of {unit} {row} is not finite in {tensor.dtype}: {remedy}")


def split(rows: Sequence, size: int) -> list:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def is_whole(path: Path) -> bool:
    """Whether a shard is complete and undamaged."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("sha256")
        return digest(load_file(path)) == written
    except (SafetensorError, OSError):
        return False


def weights_digest(model: nn.Module) -> str:
    """sha256 of the digests of a model's tensors, computed in parallel, since text encoders have gigabytes."""
    with ThreadPoolExecutor() as threads:  # sha256 releases Python's global lock
        parts = threads.map(lambda item: digest(dict([item])), sorted(model.state_dict().items()))
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def weights_sample(models: Iterable[nn.Module]) -> str:
    """sha256 of the first and last values of each tensor, without those that are packed: other weights show there."""
    parts: dict[str, Tensor] = {}
    for number, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            if type(tensor) is Tensor:
                values = tensor.flatten()
                parts[f"{number}.{name}"] = torch.cat([values[:16], values[-16:]])
    return digest(parts)


def config_of(model: nn.Module) -> dict:
    """The configuration of a model of diffusers or transformers, as JSON."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    return json.loads(
        json.dumps({name: value for name, value in config.items() if not name.startswith("_")}, default=str)
    )
