"""List the adapters of a model as a table."""

from dataclasses import dataclass

from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.config import PARTS, AdapterConfig
from onelora_diffusion.injection.attaching import state_dict_of
from onelora_diffusion.injection.book import AdapterBook, unwrapped

COLUMNS = ("name", "method", "classes", "size", "weight")
MAX_WIDTH = 18  # longest name or method in the table, so that lines have at most 80 characters


@dataclass(frozen=True)
class AdapterRow:
    name: str
    method: str  # with the parts that its settings add or leave out: `1lora`, `1lora +bias`, `lora rank 4`
    num_classes: int | None  # of its class table, or None
    size: int  # the number of its trained weights
    weight: Weight | None  # if it is active
    is_merged: bool  # whether it is merged into the base's weights
    trains: bool

    def cells(self) -> tuple[str, ...]:
        weight = "-" if self.weight is None else "blocks" if isinstance(self.weight, dict) else f"{self.weight:.3g}"
        classes = "-" if self.num_classes is None else str(self.num_classes)
        weight += ", merged" if self.is_merged else ""
        return _shortened(self.name), _shortened(self.method), classes, f"{self.size:,}", weight


class AdapterTable(tuple[AdapterRow, ...]):
    """The adapters of a model, which print as a table with lines of at most 80 characters."""

    def __str__(self) -> str:
        if not self:
            return "no adapters"
        lines = [COLUMNS, *(row.cells() for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust]  # texts, then numbers
        rows = ([side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)] for line in lines)
        return "\n".join(map("  ".join, rows))


def list_adapters(model: nn.Module) -> AdapterTable:
    """List the adapters of a model in the order in which they were added."""
    book: AdapterBook | None = getattr(unwrapped(model), "_onelora", None)
    if book is None:
        return AdapterTable()
    weights = book.merged or book.serving
    return AdapterTable(
        AdapterRow(
            name=name,
            method=_described(book.configs[name]),
            num_classes=book.configs[name].num_classes,
            size=sum(tensor.numel() for tensor in state_dict_of(adapter).values()),
            weight=weights.get(name),
            is_merged=name in (book.merged or ()),
            trains=name in book.trained,
        )
        for name, adapter in book.adapters.items()
    )


def _described(config: AdapterConfig) -> str:
    """The method, with the settings that differ from its defaults."""
    own = AdapterConfig(config.method)
    changed = [part for part in PARTS if getattr(config, part) != getattr(own, part)]
    signs = [f"+{part}" if getattr(config, part) else f"-{part}" for part in changed]
    rank = [f"rank {config.rank}"] if config.rank != own.rank else []
    return " ".join([config.method, *rank, *signs])


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 1]}…"
