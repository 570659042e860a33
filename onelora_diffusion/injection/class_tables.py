"""The seat of class tables: tables of new classes replace the base's class table."""

import itertools

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, serving_table
from onelora_diffusion.adapters.weights import weight_at
from onelora_diffusion.injection.linear import why_not_writable
from onelora_diffusion.injection.route import Route
from onelora_diffusion.injection.seat import Seat


class TableSeat(Seat):
    """The named class tables of a model's adapters, the child `onelora` of the base's table.

    The active table is used, or inside a route each sample's own. Labels past the classes of a table, the
    base's too, select its null row. If a module around the table drops labels by itself, as Meta's `LabelEmbedder`
    does, its `num_classes`, which is its null label, is set to that of the active table.

    Its base table is at `paths` of the model: one path, or those of the copies in all blocks of a DiT.
    """

    def __init__(self, model: nn.Module, paths: list[str]):
        bases = list(dict.fromkeys(model.get_submodule(path) for path in paths))
        super().__init__(bases[0], paths)
        owners = dict.fromkeys(model.get_submodule(path.rpartition(".")[0]) for path in paths)
        self.counts = {owner: owner.num_classes for owner in owners if hasattr(owner, "num_classes")}
        self.bases, self.num_rows = bases, bases[0].num_embeddings
        self.open_route: _TableRoute | None = None
        self.originals: list[nn.Parameter] | None = None
        self.labels: torch.Tensor | None = None
        for base in bases:
            base.onelora = self
        self._before = [base.register_forward_pre_hook(begin_lookup, with_kwargs=True) for base in bases]
        self.hook()

    def begin(self, labels: torch.Tensor) -> torch.Tensor:
        """Map labels (batch,) to labels for which the base's table has a row."""
        self.labels = labels
        return labels.clamp(max=self.bases[0].num_embeddings - 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Replace the base's rows (batch, width) of the labels given to `begin` by those of the active tables."""
        labels, self.labels = self.labels, None
        if self._is_replica:
            self._list_adapters()
        if self.open_route is not None:
            return self.open_route(labels, rows).to(rows.dtype)
        if self._alone is None or self.originals is not None:  # the base's table is active, or contains merged rows
            return rows
        table = self._alone().to(labels.device)
        return nn.functional.embedding(labels.clamp(max=len(table) - 1), table).to(rows.dtype)

    def active_table(self) -> torch.Tensor | None:
        """The active adapter's table (num_classes + 1, width), or None if the base's is used."""
        return None if self._alone is None else self._alone.weight

    def hook(self) -> None:
        self._hooks = self._hooks or [base.register_forward_hook(end_lookup) for base in self.bases]

    def leave(self) -> None:
        self.unhook()
        for base, before in zip(self.bases, self._before, strict=True):
            before.remove()
            del base.onelora
        for owner, num_classes in self.counts.items():
            owner.num_classes = num_classes

    def _recount(self) -> None:
        """Set the null label of modules that drop labels past the classes of all active tables."""
        if self.open_route is None:
            num_rows = self.num_rows if self._alone is None else len(self._alone.weight)
        else:
            num_rows = max([self.num_rows, *map(len, self.open_route.tables)])
        for owner, num_classes in self.counts.items():
            owner.num_classes = num_classes + num_rows - self.num_rows

    @property
    def is_empty(self) -> bool:
        return False  # the seat stays: labels past the base's classes select its null row

    def activate(self, weights: dict[str, float]) -> None:
        name = serving_table(self, weights)
        super().activate({} if name is None else {name: 1})
        self._recount()

    def why_not_mergeable(self, users: dict[tuple, list[str]]) -> str | None:
        return why_not_writable(self.bases[0]) if self.active else None

    def merge(self, check: bool) -> None:
        """Write the active table into the base's, with its null row in all rows past its classes."""
        if not self.active:
            return
        self.originals = [base.weight for base in self.bases]
        table = self.active_table().detach()
        table = torch.cat([table, table[-1:].expand(max(0, self.num_rows - len(table)), -1)])
        merged = nn.Parameter(table.to(self.originals[0].dtype), requires_grad=False)
        for base in self.bases:
            base.weight, base.num_embeddings = merged, len(table)

    def unmerge(self) -> None:
        if self.originals is None:
            return
        for base, original in zip(self.bases, self.originals, strict=True):
            base.weight, base.num_embeddings = original, self.num_rows
        self.originals = None

    def route(self, route: Route | None) -> None:
        self.open_route = None if route is None else _TableRoute(self, route)
        self._recount()

    def _apply(self, fn, recurse=True):
        for original in self.originals or ():  # they are not registered in the model while replaced
            original.data = fn(original.data)
        return super()._apply(fn, recurse)


def begin_lookup(table: nn.Embedding, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the base's class table."""
    return (table.onelora.begin(args[0] if args else kwargs["input"]),), {}


def end_lookup(table: nn.Embedding, args: tuple, rows: torch.Tensor) -> torch.Tensor:
    """Forward hook of the base's class table."""
    return table.onelora(rows)


class _TableRoute:
    """Looks up each label of a batch in the class table of its sample's adapter."""

    def __init__(self, tables: nn.ModuleDict, route: Route):
        self.route = route
        names = [
            serving_table(tables, {name: weight_at(weight, CLASS_TABLE) for name, weight in mixture.items()})
            for mixture in route.mixtures.values()
        ]
        used = [name for name in dict.fromkeys(names) if name is not None]
        self.tables = [tables[name].weight for name in used]
        starts = itertools.accumulate(map(len, self.tables), initial=0)
        firsts = dict(zip(used, starts, strict=False))  # the last sum is the length of all
        self.firsts = [firsts.get(name, 0) for name in names]
        self.nulls = [-1 if name is None else len(tables[name].weight) - 1 for name in names]
        self.kept = torch.cat([table.detach() for table in self.tables]) if self.tables else None

    def __call__(self, labels: torch.Tensor, base_rows: torch.Tensor) -> torch.Tensor:
        """The rows (batch, width) of labels (batch,), given their rows in the base's table."""
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
