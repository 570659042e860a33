"""The seat of class tables: new classes in the place of the base's, wherever a model keeps them."""

import itertools

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, serving_table
from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.adapters.weights import weight_at
from onelora_diffusion.injection.compiled import anything_is_compiled
from onelora_diffusion.injection.linear import why_not_writable
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class TableSeat(Seat):
    """The named class tables of a model's adapters, the child `onelora` of the base's table.

    The one called `active` serves; while a route is open, it decides sample by sample. Any label past a table's
    classes is its null row, the base's too. Where a module around the table drops labels by itself, as Meta's
    `LabelEmbedder` does, its `num_classes`, which stands for no class there, is that of the table that serves.

    Args:
        model: whose base table is at `paths`: one, or the copies in all blocks of a DiT.
    """

    def __init__(self, model: nn.Module, paths: list[str]):
        super().__init__()
        bases = list(dict.fromkeys(model.get_submodule(path) for path in paths))
        owners = dict.fromkeys(model.get_submodule(path.rpartition(".")[0]) for path in paths)
        counts = {owner: owner.num_classes for owner in owners if hasattr(owner, "num_classes")}
        self.paths, self.bases, self.counts = paths, bases, counts
        self.layer = bases[0]
        self.num_rows = bases[0].num_embeddings
        self.active: str | None = None
        self._table: Adapter | None = None  # the same without its name, which compiled code would take for unchanging
        self.open_route: _TableRoute | None = None
        self.originals: list[nn.Parameter] | None = None
        self.labels: torch.Tensor | None = None
        self._hooks: list = []
        for base in bases:
            base.onelora = self
        self._before = [base.register_forward_pre_hook(begin_lookup, with_kwargs=True) for base in bases]
        self.hook()

    # -----------------------------------------------------------------------------------------------
    # Serve

    @property
    def places(self) -> list[str]:
        return self.paths

    def begin(self, labels: torch.Tensor) -> torch.Tensor:
        """(batch,) labels -> those that the base's table has a row for."""
        self.labels = labels
        return labels.clamp(max=self.bases[0].num_embeddings - 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The base's (batch, width) rows of the labels that began -> those of the tables that serve."""
        labels, self.labels = self.labels, None
        if self._is_replica:
            self._look_up_table()
        if self.open_route is not None:
            return self.open_route(labels, rows).to(rows.dtype)
        if self._table is None or self.originals is not None:  # the rows are the base's, or merged ones
            return rows
        table = self._table().to(labels.device)
        return nn.functional.embedding(labels.clamp(max=len(table) - 1), table).to(rows.dtype)

    def active_table(self) -> torch.Tensor | None:
        """(num_classes + 1, width) of the adapter that serves, or None while the base's does."""
        return None if self.active is None else self[self.active].weight

    def hook(self) -> None:
        self._hooks = self._hooks or [base.register_forward_hook(end_lookup) for base in self.bases]

    def unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def leave(self) -> None:
        self.unhook()
        for base, before in zip(self.bases, self._before, strict=True):
            before.remove()
            del base.onelora
        for owner, num_classes in self.counts.items():
            owner.num_classes = num_classes

    def _recount(self) -> None:
        """Let the label of no class, for whoever drops labels, be past the classes of every table that serves."""
        if self.open_route is None:
            num_rows = self.num_rows if self.active is None else len(self[self.active].weight)
        else:
            num_rows = max([self.num_rows, *map(len, self.open_route.tables)])
        for owner, num_classes in self.counts.items():
            owner.num_classes = num_classes + num_rows - self.num_rows

    # -----------------------------------------------------------------------------------------------
    # What every seat answers

    @property
    def is_empty(self) -> bool:
        return False  # labels past the base's classes stay its null row

    def activate(self, weights: dict[str, float]) -> None:
        self.active = serving_table(self, weights)
        self._look_up_table()
        self._recount()

    def _look_up_table(self) -> None:
        self._table = None if self.active is None else self._modules[self.active]

    def why_not_foldable(self, users: dict[tuple, list[str]]) -> str | None:
        return None if self.active is None else why_not_writable(self.bases[0])

    def fold(self, check: bool) -> None:
        """Put the table that serves in the base's place, its null row in all rows past its classes."""
        if self.active is None:
            return
        self.originals = [base.weight for base in self.bases]
        table = self[self.active].weight.detach()
        table = torch.cat([table, table[-1:].expand(max(0, self.num_rows - len(table)), -1)])
        merged = nn.Parameter(table.to(self.originals[0].dtype), requires_grad=False)
        for base in self.bases:
            base.weight, base.num_embeddings = merged, len(table)
        if not anything_is_compiled():  # which would not see it come back
            self.unhook()

    def unfold(self) -> None:
        if self.originals is None:
            return
        for base, original in zip(self.bases, self.originals, strict=True):
            base.weight, base.num_embeddings = original, self.num_rows
        self.originals = None
        self.hook()

    def route(self, route: Route | None) -> None:
        self.open_route = None if route is None else _TableRoute(self, route)
        self._recount()

    def _apply(self, fn, recurse=True):
        for original in self.originals or ():  # no children of the model while another table is in their place
            original.data = fn(original.data)
        return super()._apply(fn, recurse)


def begin_lookup(table: nn.Embedding, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a base's class table."""
    labels = args[0] if args else kwargs["input"]
    return (table.onelora.begin(labels),), {}


def end_lookup(table: nn.Embedding, args: tuple, rows: torch.Tensor) -> torch.Tensor:
    """Forward hook of a base's class table."""
    return table.onelora(rows)


class _TableRoute:
    """The rows of a batch's labels, each from the class table of its sample's adapter."""

    def __init__(self, tables: nn.ModuleDict, route: Route):
        self.route = route
        names = [
            serving_table(tables, {name: weight_at(weight, CLASS_TABLE) for name, weight in mixture.items()})
            for mixture in route.mixtures
        ]
        self.tables = [tables[name].weight for name in dict.fromkeys(names) if name is not None]
        firsts = dict(zip((n for n in dict.fromkeys(names) if n is not None), _starts(self.tables), strict=True))
        self.firsts = [firsts.get(name, 0) for name in names]
        self.nulls = [-1 if name is None else len(tables[name].weight) - 1 for name in names]
        self.kept = torch.cat([table.detach() for table in self.tables]) if self.tables else None

    def __call__(self, labels: torch.Tensor, base_rows: torch.Tensor) -> torch.Tensor:
        """(batch,) labels and their (batch, width) rows in the base's table -> (batch, width)."""
        if not self.tables:
            return base_rows
        if len(labels) != len(self.route.batch):
            raise ValueError(f"{len(labels)} labels for a batch of {len(self.route.batch)} samples")
        trains = torch.is_grad_enabled() and any(table.requires_grad for table in self.tables)
        is_anew = not torch.compiler.is_compiling() or trains
        table = (torch.cat(self.tables) if is_anew else self.kept).to(labels.device)
        index = self.route.index(labels.device)
        first, null = (self.route.copied(of, torch.long, labels.device)[index] for of in (self.firsts, self.nulls))
        rows = nn.functional.embedding(first + torch.minimum(labels, null).clamp(min=0), table)
        return torch.where((null < 0).unsqueeze(-1), base_rows.to(rows.dtype), rows)


def _starts(tables: list[torch.Tensor]) -> list[int]:
    return list(itertools.accumulate((len(table) for table in tables), initial=0))[:-1]
