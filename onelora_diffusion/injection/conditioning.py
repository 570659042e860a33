"""One timestep and class embedding for all blocks of a DiT, and the class tables of its adapters."""

import copy
import itertools
import logging

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, serving_table
from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.adapters.weights import weight_at
from onelora_diffusion.injection.layers import equal_copies, is_packed
from onelora_diffusion.injection.route import Route

logger = logging.getLogger(__name__)


class AdaptedLabelEmbedding(nn.Module):
    """The base's class table and those of its adapters; any label past a table's classes is its null row.

    Unlike diffusers' `LabelEmbedding` it never drops labels by itself: a DiT has one copy in every block, and
    each would draw its own. The training step drops a sample's label once for all of them.
    """

    def __init__(self, base: nn.Module, tables: nn.ModuleDict):
        super().__init__()
        self.embedding_table = base.embedding_table
        self.onelora = tables
        self.active: str | None = None
        self.route = None

    def table(self) -> torch.Tensor:
        """(num_classes + 1, width) of the adapter that serves, or the base's."""
        return self.embedding_table.weight if self.active is None else self.onelora[self.active].weight

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(batch,) labels -> (batch, width), in the base's dtype."""
        dtype = self.embedding_table.weight.dtype
        if self.route is not None:
            return self.route(labels, self.base_rows(labels)).to(dtype)
        if self.active is None:
            return self.base_rows(labels)
        table = self.table()
        return nn.functional.embedding(labels.clamp(max=len(table) - 1), table.to(labels.device)).to(dtype)

    def base_rows(self, labels: torch.Tensor) -> torch.Tensor:
        # By way of the module, whose weight may be somewhere else until it is called (CPU offload).
        return self.embedding_table(labels.clamp(max=self.embedding_table.num_embeddings - 1))


class SharedConditioning(nn.Module):
    """The timestep and class embedding c(t, y) of all blocks, computed once per forward.

    Takes the place of the equal copies in every block under their own names. `compute_once` hands the result
    to the blocks in the place of the timestep, so that a checkpointed block is given it like any other input.
    """

    def __init__(self, base: nn.Module, class_embedder: AdaptedLabelEmbedding):
        super().__init__()
        self.time_proj = base.time_proj
        self.timestep_embedder = base.timestep_embedder
        self.class_embedder = class_embedder

    def forward(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, hidden_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(batch,) timesteps and (batch,) labels -> (batch, width); (batch, width) is returned as it is."""
        if timestep.ndim == 2:
            return timestep
        frequencies = self.time_proj(timestep).to(hidden_dtype)
        return self.timestep_embedder(frequencies) + self.class_embedder(class_labels)


def compute_once(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a DiT with shared conditioning: the timestep argument becomes c(t, y)."""
    names = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict")
    inputs = dict(zip(names, args, strict=False)) | kwargs
    conditioning = transformer.transformer_blocks[0].norm1.emb
    inputs["timestep"] = conditioning(inputs["timestep"], inputs["class_labels"], inputs["hidden_states"].dtype)
    return (), inputs


class DiTConditioning:
    """Shared conditioning of a DiT, and the seat of its adapters' class tables.

    Where the blocks' copies differ, as in a randomly initialised DiT, or are packed by a quantisation, every block
    keeps its own timestep embedder and base table; the adapters' tables are shared all the same.
    """

    def __init__(self, transformer: nn.Module):
        self.tables = nn.ModuleDict()
        self.transformer = transformer
        self.norms = [block.norm1 for block in transformer.transformer_blocks]
        self.stock: list[nn.Module] = []
        self.hook = None

    def install(self) -> "DiTConditioning":
        """Put it into the model."""
        self.stock = [norm.emb for norm in self.norms]
        if equal_copies(self.stock):
            del self.stock[1:]
            shared = SharedConditioning(self.stock[0], self._adapted(self.stock[0].class_embedder))
            shared.train(self.stock[0].training)
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
                emb.class_embedder = self._adapted(emb.class_embedder)
        return self

    def restore(self) -> None:
        """Give every block its own stock embedding again; the copies are equal to what they were."""
        if self.is_shared:
            # What a quantisation has packed since then cannot be copied: the blocks go on sharing it.
            another = (lambda stock: stock) if is_packed(self.stock[0]) else copy.deepcopy
            own = [self.stock[0], *(another(self.stock[0]) for _ in self.norms[1:])]
            self.hook.remove()
            for norm, embedding in zip(self.norms, own, strict=True):
                norm.emb = embedding
        else:
            for emb, class_embedder in zip(self.stock, self.stock_class_embedders, strict=True):
                emb.class_embedder = class_embedder

    @property
    def is_shared(self) -> bool:
        return self.hook is not None

    @property
    def base_table(self) -> nn.Embedding:
        """The first block's class table, whose null row new tables start from."""
        return self.norms[0].emb.class_embedder.embedding_table

    @property
    def embedders(self) -> list[AdaptedLabelEmbedding]:
        return [norm.emb.class_embedder for norm in (self.norms[:1] if self.is_shared else self.norms)]

    def active_table(self) -> torch.Tensor | None:
        """The table of the adapter that serves, or None while the base's does."""
        embedder = self.embedders[0]
        return None if embedder.active is None else embedder.table()

    # -----------------------------------------------------------------------------------------------
    # What every seat answers

    def add(self, name: str, adapter: Adapter) -> None:
        self.tables[name] = adapter

    def remove(self, name: str) -> None:
        del self.tables[name]

    def __len__(self) -> int:
        return 1  # the seat stays: the conditioning is shared whether an adapter has new classes or not

    def activate(self, weights: dict[str, float]) -> None:
        for embedder in self.embedders:
            embedder.active = serving_table(self.tables, weights)

    def why_not_foldable(self, users: dict[tuple, list[str]]) -> str | None:
        return None

    def fold(self, check: bool) -> None:
        """Nothing: a table of another size cannot take the base's place, and serves as it is."""

    def unfold(self) -> None:
        """Nothing, as in `fold`."""

    def route(self, route: Route | None) -> None:
        open_route = None if route is None else _TableRoute(self.tables, route)
        for embedder in self.embedders:
            embedder.route = open_route

    def _adapted(self, class_embedder: nn.Module) -> AdaptedLabelEmbedding:
        return AdaptedLabelEmbedding(class_embedder, self.tables).train(class_embedder.training)


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
        self.first = torch.tensor([firsts.get(name, 0) for name in names])
        self.null = torch.tensor([-1 if name is None else len(tables[name].weight) - 1 for name in names])
        self.kept = torch.cat([table.detach() for table in self.tables]) if self.tables else None

    def __call__(self, labels: torch.Tensor, base_rows: torch.Tensor) -> torch.Tensor:
        """(batch,) labels and their (batch, width) rows in the base's table -> (batch, width)."""
        if not self.tables:
            return base_rows
        if len(labels) != len(self.route.batch):
            raise ValueError(f"{len(labels)} labels for a batch of {len(self.route.batch)} samples")
        trains = torch.is_grad_enabled() and any(table.requires_grad for table in self.tables)
        table = (torch.cat(self.tables) if trains else self.kept).to(labels.device)
        index = self.route.index(labels.device)
        first, null = self.first.to(labels.device)[index], self.null.to(labels.device)[index]
        rows = nn.functional.embedding(first + torch.minimum(labels, null).clamp(min=0), table)
        return torch.where((null < 0).unsqueeze(-1), base_rows.to(rows.dtype), rows)


def _starts(tables: list[torch.Tensor]) -> list[int]:
    return list(itertools.accumulate((len(table) for table in tables), initial=0))[:-1]
