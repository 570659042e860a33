"""Trained values, their averages and the optimiser's moments, to and from one flat dictionary of tensors."""

from torch import Tensor
from torch.optim import Optimizer

from .ema import ExponentialMovingAverage, copy_values


def training_tensors(
    trained: dict[str, Tensor], ema: ExponentialMovingAverage, optimizer: Optimizer
) -> dict[str, Tensor]:
    """`trained.<name>`, `ema.<name>`, and `exp_avg.<name>` and the like, whatever the optimiser keeps."""
    tensors = {f"trained.{name}": tensor for name, tensor in trained.items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.values.items()}
    for name, parameter in trained.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def check_same_adapter(tensors: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """ValueError if what `training_tensors` gave is of an adapter with other names or shapes than `trained`."""
    stored = {name.removeprefix("trained."): t for name, t in tensors.items() if name.startswith("trained.")}
    for name in [*trained, *stored]:
        shapes = [tuple(values[name].shape) if name in values else "missing" for values in (stored, trained)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"it is of another adapter: {name} is {shapes[0]} there and {shapes[1]} here")


def restore_training_tensors(
    tensors: dict[str, Tensor], trained: dict[str, Tensor], ema: ExponentialMovingAverage, optimizer: Optimizer
) -> None:
    """The inverse of `training_tensors`."""
    parts: dict[str, dict[str, Tensor]] = {}  # "trained", "ema", "exp_avg", ... -> name -> tensor
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    copy_values(trained, parts.pop("trained"))
    copy_values(ema.values, parts.pop("ema"))

    names = {parameter: name for name, parameter in trained.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {part: values[name] for part, values in parts.items() if name in values}
        for index, name in enumerate(order)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
