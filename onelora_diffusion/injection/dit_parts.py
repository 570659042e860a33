"""What is special to diffusers' DiT: every block has its own copy of the timestep and class embedding."""

from collections.abc import Iterable

from torch import nn

FIRST = "transformer_blocks.0.norm1.emb."  # the embedding that all blocks share, if their copies are equal


def is_dit(model: nn.Module) -> bool:
    """Whether this is diffusers' DiT; diffusers is not imported."""
    return any(cls.__name__ == "DiTTransformer2DModel" for cls in type(model).__mro__)


def embeddings_of(dit: nn.Module) -> list[nn.Module]:
    return [block.norm1.emb for block in dit.transformer_blocks]


def replace_embeddings(dit: nn.Module, embeddings: Iterable[nn.Module]) -> None:
    for block, embedding in zip(dit.transformer_blocks, embeddings, strict=True):
        block.norm1.emb = embedding


def is_in_embedding(path: str) -> bool:
    """Whether the module at this path of a DiT is part of a timestep and class embedding."""
    return ".norm1.emb." in path


def paths_in_blocks(dit: nn.Module, path: str) -> list[str]:
    """The paths in all blocks of a module that has this path in the first block's embedding; else the path alone."""
    if not path.startswith(FIRST):
        return [path]
    return [FIRST.replace("0", str(index)) + path.removeprefix(FIRST) for index in range(len(dit.transformer_blocks))]


def attentions_of(dit: nn.Module) -> dict[str, nn.Module]:
    return {f"transformer_blocks.{index}.attn1": block.attn1 for index, block in enumerate(dit.transformer_blocks)}
