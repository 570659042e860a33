"""What each operator of an adapter adds to a linear layer on this machine, beside the other ways to write it.

    python -m tools.time_operators            # two threads; --threads 1 for one

The layers have the shapes of DiT-XL/2's: 1152 features in attention, 4608 inside the MLP, for four samples of 256
tokens. Every operator runs right after a product, since how fast it is depends on what the product has left in the
caches. The first row is the product alone, in milliseconds; the others are what they add to it, the median over the
rounds. In the rows of the backward pass, the product stands for ∂x = ∂out W0, its input for ∂out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch.nn.functional import linear

from benchmarks.measure import interleave
from onelora_diffusion.adapters.functional import add_outer_, add_vector_, feature_sum
from onelora_diffusion.evaluation.report import format_table

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152))


@dataclass
class Settings:
    """Time the operators of an adapter, each after the product of its layer."""

    tokens: int = 1024
    """Rows of the matrices."""
    rounds: int = 60
    """How often each is timed."""
    threads: int = 2
    """Threads of PyTorch."""


@torch.no_grad()
def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        rows = {}
        for shape in SHAPES:
            seconds = interleave(steps(*shape, settings.tokens, dtype), settings.rounds, label=f"{name}, {shape}")
            alone = seconds["the product"]
            for step, own in seconds.items():
                added = own if own is alone else own - alone
                rows.setdefault(step, []).append(f"{1e3 * np.median(added):.2f}")
        title = f"milliseconds in {name}, {settings.tokens} tokens, {settings.threads} thread(s)"
        print(format_table(title, [f"{k} -> {n}" for k, n in SHAPES], rows), end="\n\n")


def steps(in_features: int, out_features: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> the product, followed by an operator."""
    torch.manual_seed(0)
    x = torch.randn(tokens, in_features).to(dtype)
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    s = torch.randn(tokens).to(dtype)
    b, b_in = torch.randn(out_features), torch.randn(in_features).to(dtype)
    b_cast = b.to(dtype)
    operators = {
        "the product": lambda out: out,
        "s = Σx: feature_sum": lambda out: feature_sum(x),
        "  sum(-1, dtype=float32)": lambda out: x.sum(-1, dtype=torch.float32),
        "out += s bᵀ: add_outer_": lambda out: add_outer_(out, s, b),
        "  addcmul_": lambda out: out.addcmul_(s.unsqueeze(-1), b_cast),
        "  addr_": lambda out: out.addr_(s, b_cast),
        "  add_ of the product": lambda out: out.add_(s.unsqueeze(-1) * b_cast),
        "out += β: add_vector_": lambda out: add_vector_(out, b),
        "  add_ of an fp32 β": lambda out: out.add_(b),
        "∂s = ∂out b": lambda out: x @ b_in,
        "∂b = sᵀ ∂out": lambda out: s @ x,
        "∂x += ∂s 1ᵀ, out of place": lambda out: out + s.unsqueeze(-1),
        "  in place": lambda out: out.add_(s.unsqueeze(-1)),
    }
    return {name: lambda operator=operator: operator(linear(x, weight)) for name, operator in operators.items()}


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
