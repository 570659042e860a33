"""Use different adapters for the samples of one batch, by one gather of stacked vectors in each layer."""

import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, get_args

from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.injection.book import AdapterBook, adapters_of
from onelora_diffusion.injection.route import Route

logger = logging.getLogger(__name__)

Entry = str | Mapping[str, Weight] | None
# Classifier-free guidance, or guidance from the base without a condition towards the adapters.
Guidance = Literal["cfg", "domain"]
GUIDANCES = get_args(Guidance)


@contextlib.contextmanager
def route_adapters(model: nn.Module, adapter_names: Sequence[Entry]):
    """Context manager in which sample i of a batch is computed with `adapter_names[i]`, all in one forward.

        y_i = γ_i ⊙ (W0 x_i + bias + β_i + b_i · Σ x_i)

    The feature sum is the same for all adapters, so that a sample's adapter is a row gathered from a stack of
    vectors. The stacks are built once, on entry; if adapters train, they are built in each forward. If the batch is a
    multiple of the given samples, these repeat: guidance doubles [A, B] to [A, B, A, B].

    A sample's label is looked up in the class table of its own adapter, or in the base's if the adapter has none. The
    adapters that `set_adapters` activated are not used inside, and are active again afterwards. With gradient
    checkpointing the backward pass must run inside, too. Calls of the model in other threads wait for the end of the
    context.

    Args:
        model: a model with adapters; the first dimension of its first tensor argument is that of the samples.
        adapter_names: for each sample a name, None for the base alone, or the weights of a sum of adapters, such as
            `{"food": 0.5, "birds": 0.5}`.

    Raises:
        ValueError: a name is unknown, adapters are merged, or an adapter trains norms or the whole base, whose tensors
            all samples share. In a forward: the batch is no multiple of the samples.
    """
    book = adapters_of(model)
    with book.lock:
        if isinstance(adapter_names, str) or len(adapter_names) == 0:
            raise ValueError(f"give a list with an adapter name or None for each sample, not {adapter_names!r}")
        book.require_unmerged("samples are routed")
        with book.routed(Route([_mixture(book, entry) for entry in adapter_names])):
            yield model


def reroute_adapters(model: nn.Module, adapter_names: Sequence[Entry]) -> None:
    """Assign other adapters to samples inside `route_adapters`, for another batch; arguments and errors are the same.

    It costs less than a new context, since only adapters that the last batch did not have are read.
    """
    book = adapters_of(model)
    book.reroute([_mixture(book, entry) for entry in adapter_names])


def route_beside_base(model: nn.Module, batch_size: int, adapter_names: Sequence[Entry] | None = None):
    """Context manager in which the first half of a batch of 2·batch_size uses adapters and the second the base alone.

    This computes domain guidance (Zhong et al., ICLR 2025) in one pass, without a second model,

        ε = ε_base(x, t, ∅) + w · (ε_ft(x, t, y) − ε_base(x, t, ∅)).

    `adapter_names` are those of the first half; None takes the active adapters with their weights.
    """
    entries = [adapters_of(model).serving] * batch_size if adapter_names is None else list(adapter_names)
    return route_adapters(model, entries + [None] * batch_size)


def trained_guidance(model: nn.Module, adapter_name: str) -> float | None:
    """The strength of the guidance that was trained into an adapter, as its file says; None if there is none."""
    return adapters_of(model).origins.get(adapter_name, {}).get("training", {}).get("trained_guidance")


def is_trained_with_guidance(model: nn.Module, adapter_names: Collection[str]) -> bool:
    """Whether guidance was trained into all adapters of a sample; not into those of the base alone."""
    return bool(adapter_names) and all(trained_guidance(model, name) is not None for name in adapter_names)


def warn_of_trained_guidance(model: nn.Module, adapter_names: Iterable[str], guidance_scale: float) -> None:
    """Log, once, that guidance is put on top of guidance that was trained into adapters of these names."""
    for name in adapter_names:
        if guidance_scale > 1 and (trained := trained_guidance(model, name)) is not None:
            _warn_once(
                f"guidance {guidance_scale:g} is put on top of guidance {trained} that was trained into adapter "
                f"'{name}': 1 draws with that alone, in half the time"
            )


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _mixture(book: AdapterBook, entry: Entry) -> dict[str, Weight]:
    weights = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else dict(entry)
    return {book.check_present(name): book.check_weight(weight, name) for name, weight in weights.items()}
