"""The best 1LoRA adapter of a model that was fine-tuned in full, in closed form."""

from dataclasses import dataclass

import torch
from torch import nn

from onelora_diffusion.adapters.class_table import CLASS_TABLE
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.book import check_name
from onelora_diffusion.injection.dit_parts import is_dit
from onelora_diffusion.injection.layers import class_table_paths
from onelora_diffusion.injection.verbs import adapter_state_dict, inject_adapter
from tools.analysis.updates import served_parameter, weight_updates


@dataclass(frozen=True)
class Extraction:
    """How much of an update an extracted adapter holds, as shares of squared norms between 0 and 1.

    Attributes:
        shares: path -> ‖b 1ᵀ‖² / ‖ΔW‖² of the layer; 1 where nothing was changed.
        share: the same of all layers together.
    """

    shares: dict[str, float]
    share: float


@torch.no_grad()
def extract_adapter(
    base: nn.Module,
    finetuned: nn.Module,
    adapter_name: str = "default",
    *,
    targets: tuple[str, ...] | None = None,
    bias: bool = False,
) -> Extraction:
    """Add to the base the 1LoRA adapter nearest to a full fine-tuning of it.

        b = argmin ‖ΔW − b 1ᵀ‖² = ΔW 1 / k,  which holds the share k ‖b‖² / ‖ΔW‖² of the update

    The class table is carried over where it differs. What else was changed (embeddings, norms, layers that are no
    targets) is not. The adapter serves as if injected, and is saved with `save_adapter`.

    Args:
        base, finetuned, targets: as in `weight_updates`; the base is changed as by `inject_adapter`.
        bias: also carry over the change of the biases, as β.

    Raises:
        ValueError: the name is in use or a layer differs in shape. The base is left as it was.
    """
    check_name(base, adapter_name)
    vectors, kept, total, shares = {}, 0.0, 0.0, {}
    for path, update in weight_updates(base, finetuned, targets):
        b = update.mean(dim=1)
        held, energy = float(update.shape[1] * b.square().sum()), float(update.square().sum())
        shares[path] = held / energy if energy else 1.0
        kept, total = kept + held, total + energy
        vectors[f"{path}.onelora_b"] = b
        layer, trained = base.get_submodule(path), finetuned.get_submodule(path)
        if bias and (new := served_parameter(trained, "bias")) is not None:
            start = 0 if layer.bias is None else layer.bias.float()
            vectors[f"{path}.onelora_beta"] = new.float() - start

    num_classes = None
    if is_dit(base) and not torch.equal(_class_table(base), _class_table(finetuned)):
        vectors[f"{CLASS_TABLE}.weight"] = _class_table(finetuned)
        num_classes = len(_class_table(finetuned)) - 1
    inject_adapter(base, AdapterConfig(targets=targets, bias=bias, num_classes=num_classes), adapter_name)
    own = adapter_state_dict(base, adapter_name)
    for name, vector in vectors.items():
        own[name].copy_(vector)
    return Extraction(shares=shares, share=kept / total if total else 1.0)


def _class_table(model: nn.Module) -> torch.Tensor:
    """(classes + 1, width) that serves now: an adapter's or the model's own."""
    table = model._onelora.class_tables.active_table() if hasattr(model, "_onelora") else None
    base = model.get_submodule(class_table_paths(model)[0])
    return (served_parameter(base, "weight") if table is None else table).detach()
