"""The denoiser of a pipeline of diffusers, its transformer or UNet, and the blocks of which that is built."""

from torch import nn

DENOISERS = ("transformer", "transformer_2", "unet")  # Wan 2.2 has two transformers, used one after the other


def denoiser_name(pipeline) -> str:
    """The component of a pipeline that denoises, and that adapters are in.

    Raises:
        ValueError: the pipeline has none.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipeline).__name__} has neither a transformer nor a unet")


def denoiser_of(pipeline) -> nn.Module:
    return getattr(pipeline, denoiser_name(pipeline))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model in the order of its `repeated_blocks`."""
    return [block for path in repeated_blocks(model) for block in model.get_submodule(path)]


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost lists of a model's blocks: of the classes that it names, or of one class each."""
    named = set(getattr(model, "_repeated_blocks", None) or ())
    lists = {path: module for path, module in model.named_modules() if path and isinstance(module, nn.ModuleList)}
    found = []
    for path, module in lists.items():
        classes = {type(entry).__name__ for entry in module}
        is_one = classes <= named if named else len(classes) == 1
        is_inner = any(path.startswith(f"{outer}.") for outer in (found if named else lists))
        if classes and is_one and not is_inner and any(isinstance(part, nn.Linear) for part in module.modules()):
            found.append(path)
    return tuple(found)
