"""The parts that all adapters of a DiT share: one conditioning for all blocks, one sum or matrix for q, k and v."""

import copy
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from onelora_diffusion.adapters.contract import BESIDE_LINEAR, IN_PLACE
from onelora_diffusion.injection.attention import SHARED_SUMS, fuse_in_place
from onelora_diffusion.injection.class_tables import TableSeat
from onelora_diffusion.injection.dit_parts import (
    attentions_of,
    embeddings_of,
    is_dit,
    paths_in_blocks,
    replace_embeddings,
)
from onelora_diffusion.injection.layers import class_table_paths, equal_copies, is_made_here, is_packed
from onelora_diffusion.injection.seat import Seat

logger = logging.getLogger(__name__)


class SharedConditioning(nn.Module):
    """The timestep and class embedding c(t, y) of all blocks, computed once per forward.

    It replaces the equal copies in all blocks, under their names. `compute_once` passes the result to the blocks
    instead of the timestep, so that it is an ordinary input of a checkpointed block.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.time_proj = base.time_proj
        self.timestep_embedder = base.timestep_embedder
        self.class_embedder = base.class_embedder

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
    conditioning = embeddings_of(transformer)[0]
    inputs["timestep"] = conditioning(inputs["timestep"], inputs["class_labels"], inputs["hidden_states"].dtype)
    return (), inputs


def name_repeated_blocks(transformer: nn.Module) -> None:
    """Set the list of blocks for diffusers' `compile_repeated_blocks`, which its DiT lacks."""
    transformer._repeated_blocks = sorted({type(block).__name__ for block in transformer.transformer_blocks})


class DiTConditioning:
    """One timestep and class embedding for all blocks of a DiT, and the seat of class tables.

    If the copies in the blocks differ, as in a randomly initialised DiT, or are quantised, every block keeps its own.

    The class embedders drop no labels: each block's would drop others. The training step drops a sample's label for
    all blocks instead.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.stock = embeddings_of(transformer)
        self.stock_dropout = self.stock[0].class_embedder.dropout_prob
        self.hook = None  # that of `compute_once`, if the blocks share an embedding

    def install(self) -> "DiTConditioning":
        name_repeated_blocks(self.transformer)
        self._drop_labels(0.0)
        first, last = self.stock[0], self.stock[-1]
        if equal_copies(self.stock):
            if not any(parameter.is_meta for parameter in last.parameters()):
                del self.stock[1:]  # offloaded copies take no memory
            shared = SharedConditioning(first).train(first.training)
            replace_embeddings(self.transformer, [shared] * len(self.transformer.transformer_blocks))
            self.hook = self.transformer.register_forward_pre_hook(compute_once, with_kwargs=True)
        elif not next(first.parameters()).is_meta:
            logger.warning(
                "The %d blocks of this DiT hold different timestep and class embeddings, as a random one does and no "
                "converted checkpoint, or packed ones: each keeps its own, and none is shared.",
                len(self.stock),
            )
        self.table_seat = TableSeat(self.transformer, class_table_paths(self.transformer))
        return self

    def restore(self) -> None:
        """Give every block its own embedding again, equal to its original one."""
        self.table_seat.leave()
        self._drop_labels(self.stock_dropout)
        if self.hook is None:
            return
        self.hook.remove()
        first, *others = self.stock
        # An embedding that was quantised or offloaded since cannot be copied, so the blocks go on sharing it.
        stays = is_packed(first) or any(hasattr(part, "_hf_hook") for part in first.modules())
        missing = len(self.transformer.transformer_blocks) - len(self.stock)
        others += [first if stays else copy.deepcopy(first) for _ in range(missing)]
        replace_embeddings(self.transformer, [first, *others])

    def _drop_labels(self, probability: float) -> None:
        for embedding in self.stock:
            embedding.class_embedder.dropout_prob = probability


class DiTParts:
    """The parts of a DiT that all its adapters share; other models have none."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.conditioning = DiTConditioning(model).install() if is_dit(model) else None
        self._stock_processors: dict[str, object] = {}

    def attentions(self) -> dict[str, nn.Module]:
        return {} if self.conditioning is None else attentions_of(self.model)

    def places(self, path: str) -> list[str]:
        """All paths in the model of the layer at this path."""
        is_shared = self.conditioning is not None and self.conditioning.hook is not None
        return paths_in_blocks(self.model, path) if is_shared else [path]

    def fuse(self) -> None:
        """Compute q, k and v by one matrix product."""
        for attn in self.attentions().values():
            fuse_in_place(attn)

    def share_sums(self) -> None:
        """Compute one feature sum for q, k and v."""
        for path, attn in self.attentions().items():
            if path not in self._stock_processors:
                self._stock_processors[path] = attn.processor
                attn.set_processor(SHARED_SUMS)

    def stop_sharing_sums(self) -> None:
        while self._stock_processors:
            path, processor = self._stock_processors.popitem()
            self.model.get_submodule(path).set_processor(processor)

    def check_together(self, seats: Mapping[tuple[str, str], Seat], names: Iterable[str]) -> None:
        """Compute q, k and v by one product or three, as these adapters need; ValueError if they need both."""
        for path, attn in self.attentions().items():
            own = {name for name in names if name in seats.get((IN_PLACE, f"{path}.to_q"), ())}
            fused = {name for name in names if name in seats.get((BESIDE_LINEAR, f"{path}.to_qkv"), ())}
            if own and fused:
                raise ValueError(
                    f"'{own.pop()}' trains q, k and v, which '{fused.pop()}' adapts as one: they cannot serve together"
                )
            if hasattr(attn, "to_qkv"):  # to_qkv computes with the base's q, k and v, also if these are replaced
                attn.fused_projections = not own

    def restore(self) -> None:
        """Put back everything that was replaced."""
        if self.conditioning is not None:
            self.conditioning.restore()
        for attn in self.attentions().values():
            if "to_qkv" in attn._modules and is_made_here(attn.to_qkv):  # q, k and v are views of its weight
                del attn.to_qkv
                attn.fused_projections = False
