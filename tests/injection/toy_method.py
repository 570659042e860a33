"""A method in one file: y = (1 + c) · (W0 x + bias), one trained number a layer."""

import torch
from torch import nn

from onelora_diffusion.adapters.contract import LayerAdapter


class Volume(LayerAdapter):
    def __init__(self, linear):
        super().__init__()
        self.c = nn.Parameter(torch.zeros((), dtype=torch.float32, device=linear.weight.device))

    def forward(self, x, out):
        return (1 + self.c).to(out.dtype) * out

    def merged(self, weight, bias):
        return (1 + self.c) * weight, (1 + self.c) * bias


def build(layers, config):
    return {path: Volume(linear) for path, linear in layers.items()}
