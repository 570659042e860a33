"""What each operator of an adapter costs on this machine, beside the other ways to write it.

    python tools/time_operators.py            # two threads; --threads 1 for one

Tensors have the shapes of four samples of DiT-XL/2: 1024 tokens of 1152 features, or of 4608 inside the MLP. For
each place in the formula, all ways to compute it take turns, and the table gives the median time of each. The linear
layers themselves are in it too, to say how much of a layer the rest is.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch.nn.functional import linear

from onelora_diffusion.adapters.functional import add_outer_, add_vector_, feature_sum
from onelora_diffusion.benchmarking.measure import interleave
from onelora_diffusion.evaluation.report import format_table


@dataclass
class Settings:
    """Time the operators of an adapter."""

    tokens: int = 1024
    """Rows of the matrices."""
    features: tuple[int, ...] = (1152, 4608)
    """Columns, a table column each."""
    rounds: int = 200
    """How often each is timed."""
    threads: int = 2
    """Threads of PyTorch."""


@torch.no_grad()
def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        found = {}
        for features in settings.features:
            steps = operators(settings.tokens, features, dtype)
            for step, seconds in interleave(steps, settings.rounds, label=f"{name}, {features}").items():
                found.setdefault(step, []).append(f"{1e3 * np.median(seconds):.3f}")
        title = f"milliseconds in {name}, {settings.tokens} tokens, {settings.threads} thread(s)"
        print(format_table(title, [str(features) for features in settings.features], found), end="\n\n")


def operators(tokens: int, features: int, dtype: torch.dtype) -> dict:
    """Name -> a function of no arguments."""
    torch.manual_seed(0)
    x, out, grad = (torch.randn(tokens, features).to(dtype) for _ in range(3))
    weight = (torch.randn(features, features) / features).to(dtype)
    s, b, beta = torch.randn(tokens).to(dtype), 1e-6 * torch.randn(features), 1e-6 * torch.randn(features)
    b16 = b.to(dtype)
    zeros = torch.zeros(features)
    return {
        "the linear layer, square": lambda: linear(x, weight),
        "W + b 1ᵀ, to add nothing else": lambda: weight + b16.unsqueeze(1),
        "s = Σx: feature_sum": lambda: feature_sum(x),
        "  sum(-1, dtype=float32)": lambda: x.sum(-1, dtype=torch.float32),
        "  x @ 1": lambda: x @ torch.ones(features, dtype=dtype),
        "out += s bᵀ: add_outer_": lambda: add_outer_(out, s, b),
        "  addr_": lambda: out.addr_(s, b16),
        "  addcmul_": lambda: out.addcmul_(s.unsqueeze(-1), b16),
        "  add_ of the product": lambda: out.add_(s.unsqueeze(-1) * b16),
        "out += β: add_vector_": lambda: add_vector_(out, zeros),
        "  add_ of an fp32 β": lambda: out.add_(beta),
        "∂s = ∂out b": lambda: grad @ b16,
        "∂b = sᵀ ∂out": lambda: s @ grad,
        "∂x += ∂s 1ᵀ, out of place": lambda: x + s.unsqueeze(-1),
        "  in place": lambda: out.add_(s.unsqueeze(-1), alpha=1e-6),
    }


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
