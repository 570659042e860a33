"""A cache of encoded prompts on disk: each caption and the empty one are encoded once (`data.row_cache`).

Images with equal captions share a row. The text encoders can be freed once the cache is built.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from onelora_diffusion.data.row_cache import RowCache, build_rows, config_of, split, weights_digest
from onelora_diffusion.families.family import Condition, Edit, Sized, emptied, padded

SHARD_SIZE = 64  # prompts: a few megabytes each
# Entries of a saved tokenizer that do not matter: its origin, and the padding and truncation of its last call.
NOT_OF_A_TOKENIZER = {"name_or_path", "is_local", "local_files_only", "transformers_version", "padding", "truncation"}


class PromptCache(RowCache):
    """The encoded captions, or edits, read on demand from the files of a complete cache."""

    def __init__(self, folder: Path, captions: Sequence[Condition]):
        prompts = distinct(captions)
        super().__init__(folder, shards_of(prompts))
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        self.row_of_caption = torch.tensor([row_of[caption] for caption in captions])
        self.row_of_empty = torch.tensor([row_of[emptied(caption) or ""] for caption in captions])

    def embeddings(self, captions: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """The tensors `(batch, ...)` by name of captions, given by index; those of the empty one if dropped."""
        numbers = torch.where(dropped, self.row_of_empty[captions], self.row_of_caption[captions])
        rows = [self.row(row) for row in numbers.tolist()]
        return {name: padded([row[name][None] for row in rows]) for name in rows[0]}


@dataclass
class ConditionRows:
    """The counterpart in memory for conditions that are cheap to encode, such as classes."""

    rows: dict[str, Tensor]  # tensors of all conditions by name; row 0 is the empty condition

    def embeddings(self, numbers: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        index = torch.where(dropped, 0, numbers + 1)
        return {name: rows[index] for name, rows in self.rows.items()}


def build_prompt_cache(
    parent: Path,
    captions: Sequence[Condition],
    encode: Callable[[list[Condition]], dict[str, Tensor]],
    encoders: dict,
    kind: str,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    batch_size: int = 8,
    is_stopped: Callable[[], object] = lambda: False,
    report: Callable[[str], None] = print,
) -> Path:
    """Encode the prompts that the cache lacks, and return its folder in `parent` (see `build_rows`).

    Args:
        encode: a function from prompts to tensors `(prompts, ...)` by name, which are padded by zeros to one shape.
        encoders: the result of `identity_of` for the text encoders and tokenizers, and what else encodes.
        kind: a text that says what `encode` does, such as the family's name and number of tokens. It is part of the
            cache's key.
    """
    prompts = distinct(captions)
    inputs = {
        "prompts": len(prompts),
        "texts": hashlib.sha256(json.dumps(prompts, default=as_json).encode()).hexdigest(),
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
    """The configurations and hashes of models and tokenizers of transformers by name, as JSON; None is left out."""
    return {
        name: {"weights": weights_digest(part), "config": config_of(part)}
        if isinstance(part, nn.Module)
        else {"tokenizer": tokenizer_digest(part)}
        for name, part in parts.items()
        if part is not None
    }


def tokenizer_digest(tokenizer) -> str:
    """sha256 of a tokenizer's files, without its origin and the options of its last call."""
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


def distinct(captions: Sequence[Condition]) -> list[Condition]:
    """The distinct captions; the first are the empty ones, which replace dropped captions."""
    return list(dict.fromkeys([*(emptied(caption) or "" for caption in captions), *captions])) or [""]


def as_json(condition: Edit | Sized) -> list:
    """What tells conditions apart: the prompt, what is in an edit's references, the size and the number of frames."""
    size = [*condition.side, *([condition.frames] if condition.frames > 1 else [])]
    if isinstance(condition, Sized):
        return [condition.prompt, size]
    return [condition.prompt, [reference.digest for reference in condition.references], size]


def shards_of(prompts: list) -> list[np.ndarray]:
    return split(np.arange(len(prompts)), SHARD_SIZE)
