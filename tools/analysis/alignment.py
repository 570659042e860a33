"""How well fixed and learned compression vectors fit the principal components of a full update (Figure 9)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from onelora_diffusion.adapters.compressions import random_directions
from tools.analysis.updates import layer_kind, weight_updates


@dataclass(frozen=True)
class Alignment:
    """Of the layers of one kind.

    Attributes:
        kind: what the layers are in their blocks.
        in_features: k, the length of the compression vectors.
        energy: (layers, components), the share of ‖ΔW‖² in each principal component, in falling order.
        cosines: compression -> (layers, components), the absolute cosine of its vector to each of them.
    """

    kind: str
    in_features: int
    energy: torch.Tensor
    cosines: dict[str, torch.Tensor]

    @property
    def chance(self) -> float:
        """The mean absolute cosine of two random directions of k dimensions, √(2 / πk)."""
        return math.sqrt(2 / (math.pi * self.in_features))


def component_alignment(update: torch.Tensor, compression: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|cos(vᵢ, c)| of the principal components of an update ΔW = Σᵢ σᵢ uᵢ vᵢᵀ (1LoRA, section 5.2).

    Args:
        update: (out_features, in_features).
        compression: (compressions, in_features), vectors c other than 0.

    Returns:
        (components,) the singular values σᵢ in falling order, and (compressions, components) the cosines.
    """
    _, singular_values, components = torch.linalg.svd(update, full_matrices=False)
    directions = nn.functional.normalize(compression.to(update), dim=-1)
    return singular_values, (directions @ components.T).abs()


def alignment_by_kind(
    base: nn.Module,
    finetuned: nn.Module,
    learned: dict[str, torch.Tensor] | None = None,
    *,
    targets: tuple[str, ...] | None = None,
    num_components: int = 32,
    seed: int = 0,
) -> list[Alignment]:
    """Align the compressions `summation`, `random` and `learned` with a full update, by kind of layer.

    Args:
        base, finetuned, targets: as in `weight_updates`.
        learned: path -> (in_features,) vectors of `learned_compressions`; None: there are none to compare.
        num_components: how many of the largest components to keep.
        seed: of the random vectors, those of `compression="random"`.

    Raises:
        ValueError: the models differ in a layer, a layer has no learned vector, or nothing was changed.
    """
    energies: dict[str, list] = {}
    cosines: dict[str, list] = {}
    in_features: dict[str, int] = {}
    names = ["summation", "random"] + ["learned"] * (learned is not None)
    for path, update in weight_updates(base, finetuned, targets):
        if learned is not None and path not in learned:
            raise ValueError(f"the learned compressions have none for {path}")
        if not update.any():  # an untrained layer has no principal components
            continue
        features = update.shape[1]
        vectors = [torch.ones(features), random_directions(seed, 1, features, update.device)[0]]
        vectors += [learned[path].flatten()] if learned is not None else []
        vectors = torch.stack([vector.detach().to(update) for vector in vectors])
        singular_values, cosine = component_alignment(update, vectors)
        kind = layer_kind(path)
        in_features[kind] = features
        energies.setdefault(kind, []).append((singular_values.square() / update.square().sum())[:num_components])
        cosines.setdefault(kind, []).append(cosine[:, :num_components])
    if not energies:
        raise ValueError("the fine-tuned model's linear layers are the base's: there is no update to look at")
    return [
        Alignment(
            kind=kind,
            in_features=in_features[kind],
            energy=torch.stack(energies[kind]),
            cosines=dict(zip(names, torch.stack(cosines[kind], dim=1), strict=True)),
        )
        for kind in energies
    ]


def learned_compressions(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vectors A of a LoRA adapter of rank 1, by path of layer; a fused q, k, v gives its own to all three.

    Args:
        tensors: of `adapter_state_dict` or `read_adapter(path).tensors`.

    Raises:
        ValueError: this is no LoRA of rank 1.
    """
    ending = ".onelora_lora_A.weight"
    vectors = {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}
    if not vectors or any(len(tensor) != 1 for tensor in vectors.values()):
        raise ValueError("learned compressions are those of a LoRA adapter of rank 1, and this is none")
    learned = {}
    for path, tensor in vectors.items():
        parts = ("to_q", "to_k", "to_v") if path.endswith("to_qkv") else ("",)
        learned |= {path.removesuffix("to_qkv") + part: tensor.detach()[0] for part in parts}
    return learned


def plot_alignment(alignments: list[Alignment]):
    """One panel a kind of layer: mean absolute cosine over its layers against the component's rank.

    The band is one standard deviation over the layers; the dotted line is what a random direction reaches.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(alignments))
    rows = math.ceil(len(alignments) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    styles = {"summation": ("tab:red", "o"), "random": ("tab:gray", "x"), "learned": ("tab:blue", "s")}
    for panel, alignment in zip(panels, alignments, strict=False):
        for name, cosine in alignment.cosines.items():
            color, marker = styles[name]
            rank = range(1, cosine.shape[1] + 1)
            mean, spread = cosine.mean(0).cpu(), cosine.std(0, correction=0).cpu()
            panel.plot(rank, mean, color=color, marker=marker, markersize=3, linewidth=1, label=name)
            panel.fill_between(rank, (mean - spread).clamp(min=0), mean + spread, color=color, alpha=0.15, linewidth=0)
        panel.axhline(alignment.chance, color="black", linestyle=":", linewidth=1, label="by chance")
        panel.set_title(f"{alignment.kind} (× {len(alignment.energy)})", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
    for panel in panels[len(alignments) :]:
        panel.remove()
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("principal component of the full update, by singular value", fontsize=10)
    figure.supylabel("absolute cosine", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure
