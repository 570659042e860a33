"""Prompts on disk: what text encoders make of every caption, and of the empty one, encoded once (`data.row_cache`).

A caption that several images have is one row. The text encoders can leave memory once the cache is built.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from onelora_diffusion.data.row_cache import RowCache, build_rows, config_of, split, weights_digest

SHARD_SIZE = 64  # prompts: a few megabytes each
# Of what a tokenizer is saved with: where it came from, and the padding and truncation of its last call.
NOT_OF_A_TOKENIZER = {"name_or_path", "is_local", "local_files_only", "transformers_version", "padding", "truncation"}


class PromptCache(RowCache):
    """What the text encoders made of captions, from the files of a whole cache, read as they are asked for."""

    def __init__(self, folder: Path, captions: Sequence[str]):
        prompts = distinct(captions)
        super().__init__(folder, shards_of(prompts))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        self.row_of_caption = torch.tensor([row_of[caption] for caption in captions])

    def embeddings(self, captions: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Tensors `(batch, ...)` by name, those of the empty caption where one is dropped.

        Args:
            captions: (batch,) int64, indices of captions.
            dropped: (batch,) bool.
        """
        rows = [self.row(row) for row in torch.where(dropped, 0, self.row_of_caption[captions]).tolist()]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class ConditionRows:
    """The same of conditions that are encoded at no cost, as a class is, in memory.

    Args:
        rows: tensors of all conditions by name, that of no condition first.
    """

    def __init__(self, rows: dict[str, Tensor]):
        self.rows = rows

    def embeddings(self, numbers: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        index = torch.where(dropped, 0, numbers + 1)
        return {name: rows[index] for name, rows in self.rows.items()}


def build_prompt_cache(
    parent: Path,
    captions: Sequence[str],
    encode: Callable[[list[str]], dict[str, Tensor]],
    encoders: dict,
    kind: str,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int = 8,
    is_stopped: Callable[[], object] = lambda: False,
    report: Callable[[str], None] = print,
) -> Path:
    """Encodes the prompts that are not there yet, and returns the cache's folder in `parent`: see `build_rows`.

    Args:
        encode: from prompts to tensors `(prompts, ...)` by name, of the same shapes for all.
        encoders: the text encoders and their tokenizers, as `identity_of` has them.
        kind: what `encode` does with them, in words, such as the family's name and its number of tokens: other words
            make another cache.
    """
    prompts = distinct(captions)
    inputs = {
        "prompts": len(prompts),
        "texts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "kind": kind,
        "encoders": encoders,
    }

    @torch.no_grad()
    def encoded(batches: list[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            yield encode([prompts[row] for row in batch])

    return build_rows(
        parent,
        "prompts",
        inputs,
        shards_of(prompts),
        encoded,
        process_index=process_index,
        num_processes=num_processes,
        batch_size=batch_size,
        unit="prompt",
        is_stopped=is_stopped,
        report=report,
    )


def identity_of(parts: dict[str, object]) -> dict:
    """What tells text encoders and tokenizers from others, as JSON by name: configurations and hashes.

    Args:
        parts: models and tokenizers of transformers; None for one that the pipeline goes without.
    """
    return {
        name: {"weights": weights_digest(part), "config": config_of(part)}
        if isinstance(part, nn.Module)
        else {"tokenizer": tokenizer_digest(part)}
        for name, part in parts.items()
        if part is not None
    }


def tokenizer_digest(tokenizer) -> str:
    """sha256 of a tokenizer's files, without where it was loaded from and how it was last called."""
    sha256 = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.name in ("tokenizer.json", "tokenizer_config.json"):
                saved = json.loads(content)
                saved = {key: value for key, value in saved.items() if key not in NOT_OF_A_TOKENIZER}
                content = json.dumps(saved, sort_keys=True).encode()
            sha256.update(f"{path.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    return sha256.hexdigest()


def distinct(captions: Sequence[str]) -> list[str]:
    """Each caption once; the empty one, which stands for those that are dropped, is the first."""
    return list(dict.fromkeys(["", *captions]))


def shards_of(prompts: list[str]) -> list[np.ndarray]:
    return split(np.arange(len(prompts)), SHARD_SIZE)
