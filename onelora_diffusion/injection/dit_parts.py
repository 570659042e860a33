"""The parts that all adapters of a DiT share: one conditioning for all blocks, one sum or matrix for q, k and v."""

from collections.abc import Iterable, Mapping

from torch import nn

from onelora_diffusion.adapters.contract import BESIDE_LINEAR, IN_PLACE
from onelora_diffusion.injection.attention import SHARED_SUMS, fuse_in_place
from onelora_diffusion.injection.conditioning import DiTConditioning
from onelora_diffusion.injection.layers import is_dit, is_made_here
from onelora_diffusion.injection.seat import Seat


class DiTParts:
    """The parts of a DiT that all its adapters share; other models have none.

    Attributes:
        conditioning: the shared timestep and class embedding; None on other models.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.conditioning = DiTConditioning(model).install() if is_dit(model) else None
        self._stock_processors: dict[str, object] = {}

    def attentions(self) -> dict[str, nn.Module]:
        """The self-attentions by path."""
        if self.conditioning is None:
            return {}
        blocks = enumerate(self.model.transformer_blocks)
        return {f"transformer_blocks.{index}.attn1": block.attn1 for index, block in blocks}

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
        for attn_path, attn in self.attentions().items():
            own = {name for name in names if name in seats.get((IN_PLACE, f"{attn_path}.to_q"), ())}
            fused = {name for name in names if name in seats.get((BESIDE_LINEAR, f"{attn_path}.to_qkv"), ())}
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
