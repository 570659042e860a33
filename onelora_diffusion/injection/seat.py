"""What every seat of adapters in a model has in common."""

from torch import nn

from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.injection.route import Route

# What wraps a module puts itself into its path: torch.compile, FSDP, checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Seat(nn.ModuleDict):
    """The named adapters of one place in a model, where it is a child of what they serve.

    Attributes:
        layer: the module of the base that is served; the adapters train or evaluate as it does when they are added.
        other_places: paths at which the model has the same layer again.
        has_new_bias: a layer that has none of its own was given one by `fold`.
    """

    layer: nn.Module
    other_places: list[str] = []
    has_new_bias = False
    _is_replica = False  # torch sets it on the copy that DataParallel makes for a device, where children are others
    __setattr__ = object.__setattr__  # adapters are its only children, and may be called as its attributes are

    def __init__(self):
        super().__init__()
        self.left_out: str | None = None
        self.register_load_state_dict_post_hook(forget_missing)

    @property
    def places(self) -> list[str]:
        """The paths in the model of what it serves."""
        return [self.path, *self.other_places]

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """Its adapters' tensors belong to the model as a whole; the state of a part of the model has none of them.

        Such as a layer's, which diffusers copies into a ControlNet.
        """
        if destination is not None and self._is_in_part(prefix):
            return destination
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.left_out = prefix if self._is_in_part(prefix) else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_in_part(self, prefix: str) -> bool:
        """Whether the seat's names in a state dict, which begin so, are counted from below the model."""
        found = [name for name in prefix.split(".")[:-2] if name not in WRAPPERS]
        own = [[name for name in path.split(".") if name and name not in WRAPPERS] for path in self.places]
        return not any(found[max(0, len(found) - len(names)) :] == names for names in own)

    def add(self, name: str, adapter: Adapter) -> None:
        self._modules[name] = adapter
        self.training = self.layer.training
        adapter.train(self.training)

    def remove(self, name: str) -> None:
        del self._modules[name]
        if self.is_empty:
            self.leave()

    @property
    def is_empty(self) -> bool:
        """Whether it has left the model with the last adapter."""
        return not len(self)

    def leave(self) -> None:
        """Take nothing but the base's own back into the model."""
        raise NotImplementedError

    def activate(self, weights: dict[str, float]) -> None:
        """Let these adapters serve, of those that are here, and no others."""
        raise NotImplementedError

    def why_not_foldable(self, users: dict[tuple, list[str]]) -> str | None:
        """Why the base cannot take the active adapters in, or None if it can.

        Args:
            users: `memory_of` each of the base's parameters -> paths of the modules that have it. A fused q, k and v
                is none of the base's.
        """
        return None

    def fold(self, check: bool) -> None:
        """Put the active adapters into the base's own tensors.

        Raises:
            ValueError: with `check`, they would become NaN or infinite.
        """
        raise NotImplementedError

    def unfold(self) -> None:
        """Put back what `fold` replaced, bit for bit."""

    def route(self, route: Route | None) -> None:
        """Let the route say which adapters serve which sample; None ends it."""
        raise NotImplementedError


def forget_missing(seat: Seat, keys) -> None:
    """Hook after loading: the state of a part of the model has no adapters."""
    if seat.left_out is not None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(seat.left_out)]
