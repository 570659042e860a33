"""Combine adapters into their weighted sum, which is an adapter itself."""

from collections.abc import Sequence

import torch
from torch import nn

from onelora_diffusion.adapters.compressions import compression_of
from onelora_diffusion.adapters.weights import Weight, weight_at
from onelora_diffusion.config import PARTS, AdapterConfig
from onelora_diffusion.injection.attaching import attach_adapter, build_with_values, state_dict_of
from onelora_diffusion.injection.book import AdapterBook, adapters_of, check_name
from onelora_diffusion.injection.layers import target_layers


@torch.no_grad()
def combine_adapters(
    model: nn.Module, adapter_names: Sequence[str], weights: Sequence[Weight], adapter_name: str
) -> nn.Module:
    """Add the weighted sum of adapters as a new adapter of the same size, and make it the active one.

        b = Σₖ wₖ bₖ,  β = Σₖ wₖ βₖ,  γ = 1 + Σₖ wₖ (γₖ − 1)

    The compression is fixed, so the sum is exact: interpolation is [1 − t, t], negation [−1]. A single class table is
    taken as it is; several tables must have the same classes and are averaged, so their weights must sum to 1.

    Args:
        adapter_names: adapters of the vector methods.
        weights: one for each, as in `set_adapters`.
        adapter_name: a new name.

    Raises:
        ValueError: a name is unknown, or the sum is no adapter. The model is not changed then.
    """
    check_name(model, adapter_name)
    book = adapters_of(model)
    if not adapter_names:
        raise ValueError("no adapters are named: name those that are summed up")
    mixture = book.weighed(adapter_names, list(weights))
    tensors = {}
    for path in dict.fromkeys(path for name in mixture for path in book.adapters[name]):
        names = [name for name in mixture if path in book.adapters[name]]
        group = [(book.adapters[name][path], weight_at(mixture[name], path)) for name in names]
        total = type(group[0][0]).summed(group, names, path)
        tensors |= {f"{path}.{part}": tensor for part, tensor in total.items()}
    config = _config_of_sum(book.model, book, mixture)
    with_table = [name for name in mixture if book.configs[name].num_classes is not None]
    id2label = book.origins.get(with_table[-1], {}).get("id2label") if with_table else None
    source = f"the sum of {', '.join(mixture)}"  # of which every layer has each part that one of the adapters has
    adapter = build_with_values(book.model, config, tensors, source, is_whole=False)
    attach_adapter(book.model, config, adapter_name, adapter, is_to_train=False)
    book.origins[adapter_name] = {"id2label": id2label or {}, "base": None, "training": {}}
    return model


def _config_of_sum(model: nn.Module, book: AdapterBook, mixture: dict[str, Weight]) -> AdapterConfig:
    configs = [book.configs[name] for name in mixture]
    compressing = [c for c in configs if c.sum]
    if len({compression_of(c) for c in compressing}) > 1:
        raise ValueError(f"adapters {', '.join(mixture)} compress in different ways: their sum is no adapter")
    first = compressing[0] if compressing else AdapterConfig()
    paths = {
        path
        for name, c in zip(mixture, configs, strict=True)
        if c.sum or c.bias or c.scale
        for path in target_layers(model, c.targets, state_dict_of(book.adapters[name]))
    }
    tables = [c for c in configs if c.num_classes is not None]
    return AdapterConfig(
        **{part: any(getattr(c, part) for c in configs) for part in PARTS} | {"norms": False},
        targets=None if paths == set(target_layers(model, None)) else tuple(sorted(paths)),
        num_classes=tables[-1].num_classes if tables else None,
        class_table=tables[-1].class_table if tables else None,
        compression=first.compression,
        rank=first.rank,
        seed=first.seed,
    )
