"""What every seat of adapters in a model has in common."""

from torch import nn

from onelora_diffusion.adapters.contract import Adapter
from onelora_diffusion.injection.route import Route


class Seat(nn.ModuleDict):
    """The named adapters of one place in a model, where it is a child of what they serve.

    Attributes:
        has_new_bias: a layer that has none of its own was given one by `fold`.
    """

    has_new_bias = False
    _is_replica = False  # torch sets it on the copy that DataParallel makes for a device, where children are others
    __setattr__ = object.__setattr__  # adapters are its only children, and may be called as its attributes are

    def add(self, name: str, adapter: Adapter) -> None:
        self._modules[name] = adapter

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
