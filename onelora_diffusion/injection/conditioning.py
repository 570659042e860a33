"""Compute the timestep and class embedding once for all blocks of a DiT."""

import copy
import logging

import torch
from torch import nn

from onelora_diffusion.injection.class_tables import TableSeat
from onelora_diffusion.injection.layers import class_table_paths, equal_copies, is_packed

logger = logging.getLogger(__name__)


class LabelsAsGiven(nn.Module):
    """A DiT's class embedder that, unlike diffusers' `LabelEmbedding`, never drops labels by itself.

    A DiT has a copy in every block, each of which would drop other labels. The training step drops a sample's label
    for all blocks instead.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.embedding_table = base.embedding_table

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """The embeddings (batch, width) of labels (batch,), in the base's dtype."""
        return self.embedding_table(labels)


class SharedConditioning(nn.Module):
    """The timestep and class embedding c(t, y) of all blocks, computed once per forward.

    It replaces the equal copies in all blocks, under their names. `compute_once` passes the result to the blocks
    instead of the timestep, so that it is an ordinary input of a checkpointed block.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.time_proj = base.time_proj
        self.timestep_embedder = base.timestep_embedder
        self.class_embedder = LabelsAsGiven(base.class_embedder)

    def forward(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, hidden_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The embedding (batch, width) of timesteps and labels (batch,); an embedding is returned unchanged."""
        if timestep.ndim == 2:
            return timestep
        frequencies = self.time_proj(timestep).to(hidden_dtype)
        return self.timestep_embedder(frequencies) + self.class_embedder(class_labels)


def compute_once(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a DiT with shared conditioning: the timestep argument becomes c(t, y)."""
    names = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict")
    inputs = dict(zip(names[: len(args)], args, strict=True)) | kwargs  # torch 2.7 cannot compile strict=False
    conditioning = transformer.transformer_blocks[0].norm1.emb
    inputs["timestep"] = conditioning(inputs["timestep"], inputs["class_labels"], inputs["hidden_states"].dtype)
    return (), inputs


def name_repeated_blocks(transformer: nn.Module) -> None:
    """Set the list of blocks for diffusers' `compile_repeated_blocks`, which its DiT lacks."""
    transformer._repeated_blocks = sorted({type(block).__name__ for block in transformer.transformer_blocks})


class DiTConditioning:
    """Shared conditioning of a DiT, with the seat of its adapters' class tables.

    If the copies in the blocks differ, as in a randomly initialised DiT, or are quantised, every block keeps its own
    timestep embedder and base table. The adapters' class tables are shared in any case.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.norms = [block.norm1 for block in transformer.transformer_blocks]
        self.stock: list[nn.Module] = []
        self.hook = None
        self.table_seat: TableSeat

    def other_places(self, path: str) -> list[str]:
        """The paths in the other blocks of the shared layer that has this path in the first block."""
        first = "transformer_blocks.0.norm1.emb."
        if not self.is_shared or not path.startswith(first):
            return []
        return [first.replace("0", str(index)) + path.removeprefix(first) for index in range(1, len(self.norms))]

    def install(self) -> "DiTConditioning":
        """Replace the blocks' embeddings in the model."""
        name_repeated_blocks(self.transformer)
        self.stock = [norm.emb for norm in self.norms]
        if equal_copies(self.stock):
            if not any(parameter.is_meta for parameter in self.stock[-1].parameters()):
                del self.stock[1:]  # offloaded copies take no memory
            shared = SharedConditioning(self.stock[0]).train(self.stock[0].training)
            for norm in self.norms:
                norm.emb = shared
            self.hook = self.transformer.register_forward_pre_hook(compute_once, with_kwargs=True)
        else:
            if not next(self.stock[0].parameters()).is_meta:
                logger.warning(
                    "The %d blocks of this DiT hold different timestep and class embeddings, as a random one does and "
                    "no converted checkpoint, or packed ones: each keeps its own, and none is shared.",
                    len(self.stock),
                )
            self.stock_class_embedders = [emb.class_embedder for emb in self.stock]
            for emb in self.stock:
                emb.class_embedder = LabelsAsGiven(emb.class_embedder).train(emb.training)
        self.table_seat = TableSeat(self.transformer, class_table_paths(self.transformer))
        return self

    def restore(self) -> None:
        """Give every block its own embedding again, equal to its original one."""
        self.table_seat.leave()
        if self.is_shared:
            # An embedding that was quantised or offloaded since cannot be copied, so the blocks go on sharing it.
            stays = is_packed(self.stock[0]) or any(hasattr(part, "_hf_hook") for part in self.stock[0].modules())
            another = (lambda stock: stock) if stays else copy.deepcopy
            others = self.stock[1:] or [another(self.stock[0]) for _ in self.norms[1:]]
            own = [self.stock[0], *others]
            self.hook.remove()
            for norm, embedding in zip(self.norms, own, strict=True):
                norm.emb = embedding
        else:
            for emb, class_embedder in zip(self.stock, self.stock_class_embedders, strict=True):
                emb.class_embedder = class_embedder

    @property
    def is_shared(self) -> bool:
        return self.hook is not None
