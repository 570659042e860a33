"""Which adapters serve which sample of a batch: one forward, one gather of stacked vectors in each layer."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn

from onelora_diffusion.adapters.weights import Weight
from onelora_diffusion.injection.book import AdapterBook, adapters_of
from onelora_diffusion.injection.route import Route

Entry = str | Mapping[str, Weight] | None
Guidance = Literal["cfg", "domain"]  # classifier-free, of one model; or from the base without class to the adapters
GUIDANCES = get_args(Guidance)


@contextlib.contextmanager
def route_adapters(model: nn.Module, adapter_names: Sequence[Entry]):
    """Context manager: inside, sample i of a batch is served by `adapter_names[i]`, all in one forward.

        y_i = γ_i ⊙ (W0 x_i + bias + β_i + b_i · Σ x_i)

    The feature sum is the same for all adapters, so that a sample's adapter is a row gathered from a stack of
    vectors. The stacks are made once, here; only where adapters train are they taken anew in each forward. A
    batch of a multiple of the given samples is served in turns: guidance doubles [A, B] to [A, B, A, B].

    A sample's label is looked up in the class table of its own adapter, or in the base's if that brought none.
    What `set_adapters` set has no say inside, and serves again afterwards. Under gradient checkpointing the
    backward pass belongs inside as well. Calls of the model in other threads wait for the end of the context.

    Args:
        model: a model with adapters; the first tensor it is called with has the samples as its first dimension.
        adapter_names: for each sample a name, None for the bare base, or the weights of a sum of adapters,
            such as `{"food": 0.5, "birds": 0.5}`.

    Raises:
        ValueError: an unknown name, merged adapters, or an adapter of trained norms or full fine-tuning, whose
            tensors the whole batch shares. In a forward: the batch is no multiple of the samples.
    """
    book = adapters_of(model)
    with book.turn:
        if isinstance(adapter_names, str) or len(adapter_names) == 0:
            raise ValueError(f"give a list with an adapter name or None for each sample, not {adapter_names!r}")
        book.require_unmerged("samples are routed")
        with book.routed(Route([_mixture(book, entry) for entry in adapter_names])):
            yield model


def route_beside_base(model: nn.Module, batch_size: int, adapter_names: Sequence[Entry] | None = None):
    """Context manager: of a batch of 2·batch_size, adapters serve the first half and the bare base the second.

    What domain guidance (Zhong et al., ICLR 2025) needs in one pass, and without a second model,

        ε = ε_base(x, t, ∅) + w · (ε_ft(x, t, y) − ε_base(x, t, ∅)).

    Args:
        adapter_names: as in `route_adapters`, for each sample of the first half; None: the adapters that serve
            now, with their weights.
    """
    entries = [adapters_of(model).serving] * batch_size if adapter_names is None else list(adapter_names)
    return route_adapters(model, entries + [None] * batch_size)


def _mixture(book: AdapterBook, entry: Entry) -> dict[str, Weight]:
    weights = {} if entry is None else {entry: 1.0} if isinstance(entry, str) else dict(entry)
    return {book.check_present(name): book.check_weight(weight, name) for name, weight in weights.items()}
