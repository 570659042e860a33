"""The base class of seats: places in a model at which adapters are attached."""

import torch
from torch import nn

from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.adapters.weights import as_tensor
from onelora_diffusion.injection.route import Route

# Names that wrappers insert into a module's path: torch.compile, FSDP, checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Seat(nn.ModuleDict):
    """The adapters attached at one place of a model; it is a child module of the layer that they adapt.

    `places` are the paths of the layer in the model; adapters that are added take over its train or eval mode.
    """

    has_new_bias = False  # whether `merge` has added a bias to a layer without one
    _is_replica = False  # torch sets it on the copies that DataParallel makes for devices, which have other children
    __setattr__ = object.__setattr__  # adapters are its only children, and their names may equal those of attributes

    def __init__(self, layer: nn.Module, places: list[str]):
        super().__init__()
        self.layer, self.places, self.path = layer, places, places[0]
        self.active: dict[str, float] = {}  # name -> weight; inside a route those of each sample are used instead
        # The active adapters as compiled code reads them: it would treat names and numbers as constants.
        self._alone: LayerAdapter | None = None
        self._weighted: list[tuple[LayerAdapter, torch.Tensor]] = []
        self._hooks: list = []
        self.left_out: str | None = None
        self.register_load_state_dict_post_hook(forget_missing)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The adapters' tensors are part of the state dict of the whole model, and not of a part of it.

        diffusers copies the state dicts of layers into a ControlNet, for example.
        """
        if destination is not None and self._is_in_part(prefix):
            return destination
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.left_out = prefix if self._is_in_part(prefix) else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_in_part(self, prefix: str) -> bool:
        """Whether a state dict in which the seat has this prefix is that of a part of the model."""
        found = [name for name in prefix.split(".")[:-2] if name not in WRAPPERS]
        own = [[name for name in path.split(".") if name and name not in WRAPPERS] for path in self.places]
        return not any(found[max(0, len(found) - len(names)) :] == names for names in own)

    def add(self, name: str, adapter: LayerAdapter) -> None:
        self._modules[name] = adapter
        self.training = self.layer.training
        adapter.train(self.training)

    def remove(self, name: str) -> None:
        del self._modules[name]
        if self.is_empty:
            self.leave()

    def hook(self) -> None:
        """Let the layer's calls use the adapters, if they do not yet."""
        raise NotImplementedError

    def unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def is_empty(self) -> bool:
        """Whether the last adapter was removed, and the seat with it."""
        return not len(self)

    def leave(self) -> None:
        """Remove the seat from the model, which then has the base's modules alone."""
        raise NotImplementedError

    def activate(self, weights: dict[str, float]) -> None:
        """Activate those of these adapters that have this seat, and no others."""
        self.active = {name: weight for name, weight in weights.items() if name in self._modules}
        self._list_adapters()

    def _list_adapters(self) -> None:
        """Keep the active adapters as `_alone` and `_weighted`: one of weight 1, or all with their weights."""
        self._keep([(self._modules[name], weight) for name, weight in self.active.items()])

    def _keep(self, adapters: list[tuple[LayerAdapter, float]]) -> None:
        is_alone = len(adapters) == 1 and adapters[0][1] == 1
        self._alone = adapters[0][0] if is_alone else None
        self._weighted = [] if is_alone else [(adapter, as_tensor(weight)) for adapter, weight in adapters]

    def why_not_mergeable(self, users: dict[tuple, list[str]]) -> str | None:
        """Why the active adapters cannot be merged here, or None if they can.

        `users` has for `memory_of` each parameter of the base the paths of the modules that have it, without the fused
        layer of q, k and v.
        """
        return None

    def merge(self, check: bool) -> None:
        """Merge the active adapters into the base's tensors; with `check`, ValueError if one would not be finite."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Restore the tensors that `merge` replaced, bit for bit."""

    def route(self, route: Route | None) -> None:
        """Use the adapters of a route for each sample; None ends the route."""
        raise NotImplementedError


def forget_missing(seat: Seat, keys) -> None:
    """Hook after loading: adapters' keys are not missing in the state dict of a part of the model."""
    if seat.left_out is not None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(seat.left_out)]
