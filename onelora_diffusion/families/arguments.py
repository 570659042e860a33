"""Values that a pipeline gives its denoiser: tensors, numbers, None, and lists and dictionaries of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor

LARGE = 2**22  # values of an encoded prompt


@dataclass
class Arrangement:
    """How the arguments of a denoiser become values by name, with the images of a batch first in each, and back.

    Attributes:
        lists: names of the lists that have other entries than one for each image, such as one for each layer.
        dims: by name, the dimension of the images of a batch in tensors where that is not the first.
    """

    lists: set[str] = field(default_factory=set)
    dims: dict[str, int] = field(default_factory=dict)

    def named(self, arguments: dict, path: str = "") -> Iterator[tuple[str, object]]:
        """Arguments by name, the entries of dictionaries and `lists` as `dictionary.name` and `list.number`."""
        for name, value in arguments.items():
            name = f"{path}{name}"
            if name in self.lists:
                value = dict(enumerate(value))
            if isinstance(value, dict) and value:
                yield from self.named(value, f"{name}.")
            else:
                yield name, value.movedim(self.dims[name], 0) if name in self.dims else value

    def nested(self, named: dict) -> dict:
        """The arguments of which these are the `named`."""
        arguments: dict = {}
        for path, value in named.items():
            *parents, name = path.split(".")
            inner = arguments
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = value.movedim(0, self.dims[path]) if path in self.dims else value
        return arguments | {name: list(arguments[name].values()) for name in self.lists}


def copied(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(entry) for name, entry in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def same(first, second) -> bool:
    """Whether two values are equal, tensors on one device to the bit; no dictionary is as an empty one."""
    if all(value is None or isinstance(value, dict) and not value for value in (first, second)):
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if type(first) is not type(second):
        return False
    if hasattr(first, "shape"):
        return first.shape == second.shape and bool((first == second).all())
    return first is second or first == second


def near(first, second) -> bool:
    """Whether arguments for one image are the same to rounding, as those of a prompt are in another batch."""
    first, second = first[0], second[0]
    if first.shape != second.shape:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(second.abs().max()))


def is_meta(value) -> bool:
    return any(tensor.is_meta for tensor in tensors_in(value))


def thinned(value):
    """The same with their mean for each token of large tensors (..., tokens, features), of which LTX-2's is 385 MB."""
    return recursively_apply(_thinned, value)


def _thinned(tensor: Tensor) -> Tensor:
    is_large = tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > LARGE
    return tensor.mean(-2, keepdim=True).expand_as(tensor) if is_large else tensor


def tensors_in(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def batch_kind(one, two) -> str | None:
    """How an argument for one image becomes that for two: `rows`, `list` or `shared`; None: in another way."""
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim and one.ndim:
        if (len(one), len(two)) == (1, 2):
            return "rows"
        return "shared" if len(one) == len(two) or one.ndim > 1 else None
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and (len(one), len(two)) == (1, 2):
        return "list"
    return "shared" if same(one, two) else None


def scale_of(value, sample: Tensor) -> float | None:
    """The number s by which an argument for one image is s times the sample in another order.

    It is 1 for the sample beside other values. None: the argument is something else.
    """
    is_of_one = isinstance(value, list) or isinstance(value, Tensor) and value.ndim
    if not is_of_one or len(value) != 1 or not isinstance(value[0], Tensor):
        return None
    (entry,) = value
    if not entry.is_floating_point() or entry.numel() < sample.numel():
        return None
    if entry.numel() > sample.numel():
        return 1.0 if torch.isin(sample.to(entry), entry).all() else None
    found, own = (values.to(entry.dtype).flatten().sort().values for values in (entry, sample))
    if torch.equal(found, own):
        return 1.0
    found, own = found.float(), own.float()
    scale = float(found.norm() / own.norm())
    is_scaled = (found - scale * own).abs().max() <= 4 * torch.finfo(entry.dtype).eps * found.abs().max()
    return scale if is_scaled else None


def output_of(answer) -> Tensor | list:
    """The first of what a denoiser returns: a tensor with a row, or a list with an entry for each image."""
    output = answer[0]
    return list(output) if isinstance(output, tuple) else output


def on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device else value.to(device, non_blocking=True)


def described(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)[:40]
