"""New classes: a trained class table that replaces the base's."""

import torch
from torch import nn

from onelora_diffusion.adapters.contract import AS_CLASS_TABLE, LayerAdapter
from onelora_diffusion.config import AdapterConfig

CLASS_TABLE = "class_embedding"


class ClassTable(LayerAdapter):
    """A trained class table, `weight`: (num_classes + 1, width) in fp32, the null row last.

    New rows start as N(0, 0.02), as DiT's did; the null row is the base's at first, with which guidance works already.
    """

    seat = AS_CLASS_TABLE

    def __init__(self, base_table: nn.Embedding, config: AdapterConfig):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        rows = 0.02 * torch.randn(config.num_classes, base_table.embedding_dim, generator=generator)
        null_row = base_table.weight.detach()[-1:].float()
        self.weight = nn.Parameter(torch.cat([rows.to(null_row.device), null_row]))

    def forward(self) -> torch.Tensor:
        """The table, (num_classes + 1, width); reading it is a call, for which accelerate loads an offloaded table."""
        return self.weight

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    @classmethod
    def summed(cls, group, names, path):
        """A single table is taken as it is; several tables of the same classes are averaged by their weights."""
        tables, weights = [table.weight for table, _ in group], [weight for _, weight in group]
        if len(tables) == 1:
            return {"weight": tables[0].clone()}
        if len({table.shape for table in tables}) > 1 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"the class tables of {', '.join(names)} can only be averaged: give adapters of the same classes, and "
                f"weights that sum to 1, not {sum(weights):g}"
            )
        return {"weight": sum(weight * table for weight, table in zip(weights, tables, strict=True))}

    no_lora = "it trains a class table"


def serving_table(tables: nn.ModuleDict, active: dict[str, float]) -> str | None:
    """The name of the adapter whose table serves: the last active one that has a table and a weight other than 0."""
    names = [name for name, weight in active.items() if name in tables and weight != 0]
    return names[-1] if names else None
