"""Convert trained values, their averages and the optimiser's state to one flat dictionary of tensors, and back."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from onelora_diffusion.training.ema import ExponentialMovingAverage, copy_values


def training_tensors(
    trained: dict[str, Tensor],
    emas: list[ExponentialMovingAverage],
    optimizer: Optimizer,
    best: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`trained.<name>`, `ema.<name>` (`ema2.` of the second average), `best.<name>`, and `exp_avg.<name>` and the
    like, whatever the optimiser keeps."""
    tensors = {f"trained.{name}": tensor for name, tensor in trained.items()}
    for key, ema in _keyed(emas).items():
        tensors |= {f"{key}.{name}": tensor for name, tensor in ema.values.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best or {}).items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
    return tensors


def check_same_adapter(tensors: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """ValueError if the result of `training_tensors` is of an adapter with other names or shapes than `trained`."""
    stored = {name.removeprefix("trained."): t for name, t in tensors.items() if name.startswith("trained.")}
    _check_same_shapes("it is of another adapter: trained", stored, trained)


def restore_training_tensors(
    tensors: dict[str, Tensor],
    trained: dict[str, Tensor],
    emas: list[ExponentialMovingAverage],
    optimizer: Optimizer,
) -> dict[str, Tensor]:
    """The inverse of `training_tensors`; returns the best values, if there are any.

    An average that the tensors do not contain starts from the trained values. ValueError if the optimiser's state has
    other names or shapes: its kernels would read outside such tensors.
    """
    parts: dict[str, dict[str, Tensor]] = {}  # "trained", "ema", "exp_avg", ... -> name -> tensor
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    stored, best = parts.pop("trained"), parts.pop("best", {})
    averages = {key: parts.pop(key, stored) for key in _keyed(emas)}
    # Averages that the settings no longer ask for are left out.
    parts = {key: values for key, values in parts.items() if not key.startswith("ema")}

    for key, values in (averages | ({"best": best} if best else {})).items():
        _check_same_shapes(key, values, trained)
    if parts:  # there is no optimiser state before the first step
        expected = _after_a_step(trained, optimizer)
        for part in expected.keys() | parts.keys():
            _check_same_shapes(part, parts.get(part, {}), expected.get(part, {}))
            parts[part] = {name: value.to(expected[part][name].dtype) for name, value in parts[part].items()}

    names = {parameter: name for name, parameter in trained.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {part: _value(values[name]) for part, values in parts.items() if name in values}
        for index, name in enumerate(order)
    }
    copy_values(trained, stored)
    for key, ema in _keyed(emas).items():
        copy_values(ema.values, averages[key])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return best


def _after_a_step(trained: dict[str, Tensor], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Make a step, so that the optimiser creates its state, and return the state of each tensor, to be overwritten."""
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    parts: dict[str, dict[str, Tensor]] = {}
    for name, parameter in trained.items():
        for part, value in optimizer.state[parameter].items():
            parts.setdefault(part, {})[name] = value if isinstance(value, Tensor) else torch.tensor(value)
    return parts


def _check_same_shapes(part: str, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """ValueError unless both hold tensors of the same names and shapes."""
    for name in [*expected, *stored]:
        shapes = [tuple(values[name].shape) if name in values else "missing" for values in (stored, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{part}.{name} is {shapes[0]} there and {shapes[1]} here")


def _keyed(emas: list[ExponentialMovingAverage]) -> dict[str, ExponentialMovingAverage]:
    return {f"ema{number if number > 1 else ''}": ema for number, ema in enumerate(emas, 1)}


def _value(tensor: Tensor) -> Tensor | int:
    # Optimisers count steps in Python integers or in float tensors.
    return int(tensor) if tensor.ndim == 0 and tensor.dtype == torch.int64 else tensor
