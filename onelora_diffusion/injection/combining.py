"""Sums of adapters that are adapters themselves."""

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.adapters.vector import VectorAdapter, weighted_sum
from onelora_diffusion.adapters.weights import Weight, weight_at
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.attaching import AdapterFile, attach_adapter_file
from onelora_diffusion.injection.book import AdapterBook, adapters_of, check_name
from onelora_diffusion.injection.layers import target_layers


@torch.no_grad()
def combine_adapters(
    model: nn.Module, adapter_names: list[str], weights: list[Weight], adapter_name: str
) -> nn.Module:
    """Add the weighted sum of adapters as a new adapter of the same size, and make it the active one.

        b = Σₖ wₖ bₖ,  β = Σₖ wₖ βₖ,  γ = 1 + Σₖ wₖ (γₖ − 1)

    The compression is fixed, so the sum is exact: interpolation is [1 − t, t], negation [−1]. Class tables are
    no offsets to the base: one alone is taken as it is, and several of the same classes need weights that sum
    to 1.

    Args:
        adapter_names: adapters of the vector family.
        weights: one for each, as in `set_adapters`.
        adapter_name: a new name.

    Raises:
        ValueError: an unknown name, or adapters whose sum is no adapter. The model is left as it was.
    """
    check_name(model, adapter_name)
    book = adapters_of(model)
    if not adapter_names or len(adapter_names) != len(weights):
        raise ValueError(f"{len(adapter_names)} adapter names ({', '.join(adapter_names)}) but {len(weights)} weights")
    mixture = {
        book.known(name): book.checked(weight, name) for name, weight in zip(adapter_names, weights, strict=True)
    }
    config = _config_of_sum(model, book, mixture)

    tensors = {}
    for path in dict.fromkeys(path for name in mixture for path in book.adapters[name] if path != CLASS_TABLE):
        group = [(book.adapters[n][path], weight_at(w, path)) for n, w in mixture.items() if path in book.adapters[n]]
        neutral = torch.zeros(model.get_submodule(path).out_features)
        for part, is_trained in (("b", config.sum), ("beta", config.bias), ("gamma", config.scale)):
            vector = weighted_sum(group, part)
            if is_trained and vector is None:
                vector = neutral + 1 if part == "gamma" else neutral
            if vector is not None:
                tensors[f"{path}.onelora_{part}"] = vector.clone()
    tables = {name: book.adapters[name][CLASS_TABLE].weight for name in mixture if CLASS_TABLE in book.adapters[name]}
    if tables:
        tensors[f"{CLASS_TABLE}.weight"] = _table_of_sum(tables, mixture)
    origin = book.origins.get(list(tables)[-1], {}) if tables else {}
    file = AdapterFile(config, tensors, book.fingerprint, id2label=origin.get("id2label") or {})
    attach_adapter_file(model, file, adapter_name, source=f"the sum of {', '.join(mixture)}")
    return model


def _config_of_sum(model: nn.Module, book: AdapterBook, mixture: dict[str, Weight]) -> AdapterConfig:
    configs = [book.configs[name] for name in mixture]
    for name in mixture:
        for path, module in book.adapters[name].items():
            if path != CLASS_TABLE and not isinstance(module, VectorAdapter):
                raise ValueError(f"adapter '{name}' trains more than vectors at {path}: it cannot be summed up")
    compressions = {(c.compression, c.seed if c.compression == "random" else None) for c in configs if c.sum}
    if len(compressions) > 1:
        raise ValueError(f"adapters {', '.join(mixture)} compress in different ways: their sum is no adapter")
    compression, seed = compressions.pop() if compressions else ("sum", None)
    paths = {path for name in mixture for path in book.adapters[name]} - {CLASS_TABLE}
    tables = [c.num_classes for c in configs if c.num_classes is not None]
    return AdapterConfig(
        sum=any(c.sum for c in configs),
        bias=any(c.bias for c in configs),
        scale=any(c.scale for c in configs),
        norms=False,
        targets=None if paths == set(target_layers(model, None)) else tuple(sorted(paths)),
        num_classes=tables[-1] if tables else None,
        compression=compression,
        seed=0 if seed is None else seed,
    )


def _table_of_sum(tables: dict[str, torch.Tensor], mixture: dict[str, Weight]) -> torch.Tensor:
    weights = [weight_at(mixture[name], CLASS_TABLE) for name in tables]
    if len(tables) == 1:
        return next(iter(tables.values())).clone()
    if len({table.shape for table in tables.values()}) > 1 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"the class tables of {', '.join(tables)} can only be averaged: give adapters of the same classes, and "
            f"weights that sum to 1, not {sum(weights):g}"
        )
    return sum(weight * table for weight, table in zip(weights, tables.values(), strict=True))
