"""A linear layer or 1 x 1 convolution of the base: its shape, and whether it computes with its weight as it stands."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from onelora_diffusion.files import first_line

LINEAR_FORWARD = nn.Linear.forward
OWN_FORWARDS = (LINEAR_FORWARD, nn.Conv2d.forward)
TF32_ROUNDING = 1e-3  # largest relative error of a product whose fp32 factors are rounded to ten bits


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of 1 x 1, which is a linear layer of each position's channels."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == module.dilation == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, or the channels of a convolution of 1 x 1."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


@torch.no_grad()
def why_not_its_product(layer: nn.Module) -> str | None:
    """Why a layer does not compute W x + bias with its `weight` and `bias` read as floats, or None if it does.

    PyTorch's own layers do. Any other, such as one with quantised codes and a scale, is tried on one input.
    """
    weight, kind = layer.weight, type(layer).__name__
    # Hooks of diffusers and accelerate wrap `forward`, and do not change its outputs.
    hooked = not {"_diffusers_hook", "_hf_hook"}.isdisjoint(layer.__dict__)
    forward = type(layer).forward.__get__(layer) if hooked else layer.forward
    if getattr(forward, "__func__", None) in OWN_FORWARDS:
        return None
    dtype = weight.dtype if layer.bias is None else layer.bias.dtype
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, dtype if dtype.itemsize > 1 else torch.float32)
    bias = None if layer.bias is None else layer.bias.float()
    try:
        with torch.autocast(weight.device.type, enabled=False):
            expected, own = nn.functional.linear(x.float(), weight.float(), bias), forward(x)
            error, size = (own.float() - expected).norm(), expected.norm()
    except Exception as error:  # foreign code may raise anything
        return f"does not compute on one input, which would show what its weight is ({kind}: {first_line(error)})"
    tolerance = max(TF32_ROUNDING, torch.finfo(own.dtype).eps)
    return None if error <= tolerance * size else f"does not compute with its weight alone ({kind}'s own forward)"


def offload_group(layer: nn.Module):
    """The hook by which diffusers' group offload moves a layer, or None."""
    registry = layer.__dict__.get("_diffusers_hook")
    return getattr(registry and registry.get_hook("group_offloading"), "group", None)


def offload_hook(module: nn.Module):
    """accelerate's hook that loads a module's offloaded weights for each call, or None; it may be among others."""
    hooks = [module.__dict__.get("_hf_hook")]
    while hooks:
        hook = hooks.pop()
        if getattr(hook, "offload", False):
            return hook
        hooks += getattr(hook, "hooks", ())
    return None


@contextlib.contextmanager
def weights_present(module: nn.Module) -> Iterator[None]:
    """Context manager that loads the weights of submodules that accelerate has offloaded."""
    offloaded = [(part, hook) for part in module.modules() if (hook := offload_hook(part)) is not None]
    with contextlib.ExitStack() as after:
        for part, hook in offloaded:
            hook.pre_forward(part)
            after.callback(hook.post_forward, part, None)
        yield
