"""Which adapters serve which sample of a batch: one forward, one gather of stacked vectors in each layer."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE, serving_table
from onelora_diffusion.adapters.swap import SwapAdapter
from onelora_diffusion.adapters.vector import VectorAdapter, compress, weighted_sum
from onelora_diffusion.adapters.weights import Weight, weight_at
from onelora_diffusion.injection.book import AdapterBook, adapters_of
from onelora_diffusion.injection.linear import LayerAdapters

Entry = str | Mapping[str, Weight] | None
Guidance = Literal["cfg", "domain"]  # classifier-free, of one model; or from the base without class to the adapters
GUIDANCES = get_args(Guidance)


@contextlib.contextmanager
def route_adapters(model: nn.Module, adapter_names: Sequence[Entry]):
    """Context manager: inside, sample i of a batch is served by `adapter_names[i]`, all in one forward.

        y_i = γ_i ⊙ (W0 x_i + bias + β_i + b_i · Σ x_i)

    The feature sum is the same for all adapters, so that a sample's adapter is a row gathered from a stack of
    vectors. The stacks are made once, here; only where adapters train are they taken anew in each forward. A
    batch of a multiple of the given samples is served in turns: guidance doubles [A, B] to [A, B, A, B].

    A sample's label is looked up in the class table of its own adapter, or in the base's if that brought none.
    What `set_adapters` set has no say inside, and serves again afterwards. Under gradient checkpointing the
    backward pass belongs inside as well.

    Args:
        model: a model with adapters; the first tensor it is called with has the samples as its first dimension.
        adapter_names: for each sample a name, None for the bare base, or the weights of a sum of adapters,
            such as `{"food": 0.5, "birds": 0.5}`.

    Raises:
        ValueError: an unknown name, merged adapters, or an adapter of trained norms or full fine-tuning, whose
            tensors the whole batch shares. In a forward: the batch is no multiple of the samples.
    """
    book = adapters_of(model)
    route, active = Route(book, adapter_names), book.weights
    routed = {layer.onelora: _LayerRoute(layer.onelora, path, route) for path, layer in book.served_layers().items()}
    if book.conditioning is not None:
        embedders = [norm.emb.class_embedder for norm in book.conditioning.norms]
        routed |= dict.fromkeys(embedders, _TableRoute(book.conditioning.tables, route))

    before = {module: module.route for module in routed}
    book.activate({})  # takes trained norms, which the batch would share, out of their places
    hook = model.register_forward_pre_hook(route.start, with_kwargs=True, prepend=True)
    for module, part in routed.items():
        module.route = part
    try:
        yield model
    finally:
        hook.remove()
        book.activate(active)
        for module, part in before.items():
            module.route = part


def route_beside_base(model: nn.Module, batch_size: int, adapter_names: Sequence[Entry] | None = None):
    """Context manager: of a batch of 2·batch_size, adapters serve the first half and the bare base the second.

    What domain guidance (Zhong et al., ICLR 2025) needs in one pass, and without a second model,

        ε = ε_base(x, t, ∅) + w · (ε_ft(x, t, y) − ε_base(x, t, ∅)).

    Args:
        adapter_names: as in `route_adapters`, for each sample of the first half; None: the adapters that serve
            now, with their weights.
    """
    entries = [adapters_of(model).weights] * batch_size if adapter_names is None else list(adapter_names)
    return route_adapters(model, entries + [None] * batch_size)


class Route:
    """The different sums of adapters that a batch asks for, and which of them each sample takes.

    Attributes:
        mixtures: (K) weights by adapter name; an empty one is the bare base.
        samples: for each given sample, the number of its mixture.
        batch: the same for every sample of the batch that is in the model now.
    """

    def __init__(self, book: AdapterBook, adapter_names: Sequence[Entry]):
        if isinstance(adapter_names, str) or len(adapter_names) == 0:
            raise ValueError(f"give a list with an adapter name or None for each sample, not {adapter_names!r}")
        if book.merged is not None:
            raise ValueError(f"adapters {', '.join(book.merged)} are merged: unmerge them before samples are routed")
        self.mixtures: list[dict[str, Weight]] = []
        self.samples: list[int] = []
        numbers: dict[str, int] = {}
        for entry in adapter_names:
            if (key := repr(entry)) not in numbers:
                numbers[key] = len(self.mixtures)
                self.mixtures.append(_mixture(book, entry))
            self.samples.append(numbers[key])
        self.batch = self.samples
        self._index: dict[tuple[int, torch.device], torch.Tensor] = {}

    def start(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: spread the samples over the batch that comes in."""
        size = next(len(x) for x in itertools.chain(args, kwargs.values()) if isinstance(x, torch.Tensor))
        if size % len(self.samples):
            raise ValueError(f"a batch of {size} is no multiple of the {len(self.samples)} samples that have a route")
        self.batch = self.samples * (size // len(self.samples))

    def index(self, device: torch.device) -> torch.Tensor:
        """(batch,) the mixture of every sample."""
        key = (len(self.batch), device)
        if key not in self._index:
            self._index[key] = torch.tensor(self.batch, device=device)
        return self._index[key]


def _mixture(book: AdapterBook, entry: Entry) -> dict[str, Weight]:
    weights = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else dict(entry)
    mixture = {book.known(name): book.checked(weight, name) for name, weight in weights.items()}
    for name in mixture:
        for path, module in book.adapters[name].items():
            if isinstance(module, SwapAdapter):
                raise ValueError(
                    f"adapter '{name}' trains {path} itself, which all samples share: it cannot serve single samples"
                )
    return mixture


class _LayerRoute:
    """Takes the place of `LayerAdapters.forward` while a route is open."""

    def __init__(self, adapters: LayerAdapters, path: str, route: Route):
        self.path, self.route = path, route
        mixtures = [
            [(adapters[name], weight_at(weight, path)) for name, weight in mixture.items() if name in adapters]
            for mixture in route.mixtures
        ]
        self.vectors = [[(a, weight) for a, weight in mix if isinstance(a, VectorAdapter)] for mix in mixtures]
        self.trains = any(p.requires_grad for mix in self.vectors for a, _ in mix for p in a.parameters())
        # Of every other method: its weight in each mixture.
        others = dict.fromkeys(a for mix in mixtures for a, _ in mix if not isinstance(a, VectorAdapter))
        self.others = {other: [dict(mix).get(other, 0.0) for mix in mixtures] for other in others}
        with torch.no_grad():
            self.kept = self.stacks()

    def __call__(self, x: torch.Tensor, out: torch.Tensor, sums: dict) -> torch.Tensor:
        if len(out) != len(self.route.batch):
            raise ValueError(
                f"{self.path} is given {len(out)} rows for a batch of {len(self.route.batch)} samples: its layer does "
                "not keep samples apart, and cannot be routed"
            )
        base = out
        for adapter, weights in self.others.items():
            out = self.add_other(adapter, weights, x, base, out)
        decompressions, beta, gamma = self.stacks() if self.trains and torch.is_grad_enabled() else self.kept
        for seed, stack in decompressions.items():
            if seed not in sums:
                sums[seed] = compress(x, seed)
            out = _add_product(out, sums[seed].unsqueeze(-1), self.rows(stack, out))
        if beta is not None:
            out = _add(out, self.rows(beta, out))
        if gamma is not None:
            out = self.rows(gamma, out).to(out.dtype) * out
        return out

    def stacks(self):
        """({compression seed: b}, β, γ) of all mixtures, each (K, out_features), or None where none has the part."""
        decompressions = {}
        for seed in dict.fromkeys(a.compression_seed for mix in self.vectors for a, _ in mix if a.b is not None):
            same_seed = [[(a, weight) for a, weight in mix if a.compression_seed == seed] for mix in self.vectors]
            decompressions[seed] = _stack([weighted_sum(mix, "b") for mix in same_seed], 0)
        beta = _stack([weighted_sum(mix, "beta") for mix in self.vectors], 0)
        gamma = _stack([weighted_sum(mix, "gamma") for mix in self.vectors], 1)
        return decompressions, beta, gamma

    def rows(self, stack: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(batch, 1, ..., out_features): each sample's own vector."""
        rows = stack[self.route.index(stack.device)].to(out.device)
        return rows.view(len(out), *[1] * (out.ndim - 2), out.shape[-1])

    def add_other(self, adapter: nn.Module, weights: list[float], x, base, out) -> torch.Tensor:
        """LoRA and the like, which are no vectors: their own forward for the samples that each of them serves."""
        samples = [sample for sample, mixture in enumerate(self.route.batch) if weights[mixture]]
        if not samples:
            return out
        index = torch.tensor(samples, device=out.device)
        scale = torch.tensor([weights[self.route.batch[sample]] for sample in samples], device=out.device)
        term = adapter(x[index], base[index]) - base[index]
        return out.index_add(0, index, (scale.view(-1, *[1] * (out.ndim - 1)) * term).to(out.dtype))


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


def _stack(vectors: list[torch.Tensor | None], neutral: float) -> torch.Tensor | None:
    present = [vector for vector in vectors if vector is not None]
    if not present:
        return None
    return torch.stack([torch.full_like(present[0], neutral) if v is None else v for v in vectors])


def _add(out: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    # Autograd forbids to change the q, k and v parts of one product in place.
    return (out + term).to(out.dtype) if torch.is_grad_enabled() else out.add_(term)


def _add_product(out: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if out.dtype == torch.float16:  # 65504 is soon reached by a sum of thousands of features
        return _add(out, s * rows)
    s, rows = s.to(out.dtype), rows.to(out.dtype)
    return torch.addcmul(out, s, rows) if torch.is_grad_enabled() else out.addcmul_(s, rows)
