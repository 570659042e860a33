"""Read a LoKr: ΔW = s · W₁ ⊗ W₂ (LyCORIS, arXiv 2309.14859), as files of LyCORIS, ai-toolkit and PEFT have it."""

import torch

from onelora_diffusion.storage.peft_settings import alpha_among, of_layer


def read_lokr(
    layers: dict[str, dict[str, torch.Tensor]], settings: dict, source: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """W₁ (with the scale multiplied into it) and W₂ of each layer, and PEFT's settings of a tuner that holds them.

    Without settings, s is alpha / rank where W₁ or W₂ is a product of two matrices, and 1 elsewhere, as in LyCORIS.

    `layers` has for each path `lokr_w1` or `lokr_w1_a` and `lokr_w1_b`, the same of `lokr_w2`, and perhaps `alpha`, in
    fp32; `settings` are PEFT's, by which s is alpha / r; empty if it came without any. ValueError if a matrix is
    missing or misshapen, or PEFT has no setting for these sizes of W₁ and W₂.
    """
    try:
        from peft.tuners.lokr.layer import factorization
    except ImportError as error:
        raise ValueError(f"{source}: a LoKr needs PEFT: pip install onelora-diffusion[peft]") from error
    values, sizes = {}, {}
    for path, parts in layers.items():
        w1, w2 = (_matrix(parts, name, f"{source}: {path}") for name in ("lokr_w1", "lokr_w2"))
        values[path] = {"lokr_w1": _scale(path, parts, settings, source) * w1, "lokr_w2": w2}
        sizes |= dict.fromkeys(zip(w1.shape, w2.shape, strict=True))  # of the layer's outputs, and of its inputs
    factors = [-1, *sorted({first for first, _ in sizes})]
    fitting = (f for f in factors if all(factorization(a * b, f) == (a, b) for a, b in sizes))
    if (factor := next(fitting, None)) is None:
        raise ValueError(f"{source}: no decompose_factor of PEFT gives the sizes {sorted(sizes)} of this LoKr")
    rank = max(max(size) for size in sizes)  # so high that PEFT holds W₁ and W₂ as whole matrices
    return values, {"r": rank, "alpha": rank, "decompose_factor": factor}


def _matrix(parts: dict[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    given = {key: tensor for key, tensor in parts.items() if key in (name, f"{name}_a", f"{name}_b")}
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in given.items()) or f"no {name}"
    if any(tensor.ndim != 2 or not tensor.numel() for tensor in given.values()):
        raise ValueError(f"{where} has {shapes}; they must be matrices")
    if given.keys() == {name}:
        return given[name]
    if given.keys() != {f"{name}_a", f"{name}_b"} or given[f"{name}_a"].shape[1] != len(given[f"{name}_b"]):
        raise ValueError(f"{where} has {shapes}; it needs {name} alone, or {name}_a and {name}_b, whose product it is")
    return given[f"{name}_a"] @ given[f"{name}_b"]


def _scale(path: str, parts: dict[str, torch.Tensor], settings: dict, source: str) -> float:
    if settings:
        rank = of_layer(path, settings, "r", "rank_pattern", 8, source)  # 8 is PEFT's default of both
        alpha = of_layer(path, settings, "alpha", "alpha_pattern", 8, source)
        if rank < 1:
            raise ValueError(f"{source}: its rank of {path} is {rank}; it must be at least 1")
        return alpha / rank
    ranks = [len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    alpha = alpha_among(parts, path, source) if ranks else None
    return 1.0 if alpha is None else alpha / ranks[0]
