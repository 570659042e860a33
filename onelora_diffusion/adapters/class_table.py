"""New classes: a table of trained rows in the place of the base's."""

import torch
from torch import nn

from onelora_diffusion.adapters.contract import AS_CLASS_TABLE, Adapter
from onelora_diffusion.config import AdapterConfig

CLASS_TABLE = "class_embedding"


class ClassTable(Adapter):
    """A trained class table: N + 1 rows, the null row last.

    New classes start as N(0, 0.02) (DiT's own initialisation), the null row as the base's null row, which
    classifier-free guidance already knows.

    Attributes:
        weight: (num_classes + 1, width), fp32.
    """

    seat = AS_CLASS_TABLE

    def __init__(self, base_table: nn.Embedding, config: AdapterConfig):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        rows = 0.02 * torch.randn(config.num_classes, base_table.embedding_dim, generator=generator)
        null_row = base_table.weight.detach()[-1:].float()
        self.weight = nn.Parameter(torch.cat([rows.to(null_row.device), null_row]))

    def forward(self) -> torch.Tensor:
        """(num_classes + 1, width); a call, since accelerate brings an offloaded table for it."""
        return self.weight

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    @classmethod
    def summed(cls, group, names, path):
        """A table is no offset to the base's: one is taken as it is, several of the same classes averaged."""
        tables, weights = [table.weight for table, _ in group], [weight for _, weight in group]
        if len(tables) == 1:
            return {"weight": tables[0].clone()}
        if len({table.shape for table in tables}) > 1 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"the class tables of {', '.join(names)} can only be averaged: give adapters of the same classes, and "
                f"weights that sum to 1, not {sum(weights):g}"
            )
        return {"weight": sum(weight * table for weight, table in zip(weights, tables, strict=True))}

    def lora(self, with_bias=False):
        raise ValueError("it trains a class table")


def serving_table(tables: nn.ModuleDict, active: dict[str, float]) -> str | None:
    """Tables are not summed: the last named of the active adapters that brought one and weigh other than 0 serves."""
    names = [name for name, weight in active.items() if name in tables and weight != 0]
    return names[-1] if names else None
