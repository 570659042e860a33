"""Inception-v3 with random weights, for comparisons of tools and for tests, which need no download."""

import torch
from torch import nn

from onelora_diffusion.evaluation.features.inception import InceptionFeatures, InceptionNetwork


def inception_random(seed: int = 0, layer: str = "2048") -> InceptionFeatures:
    """FID's network with random weights, a function of `seed`.

    They are He-normal (He et al., ICCV 2015), so that the last layers' activations do not vanish.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = InceptionNetwork(layer)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return InceptionFeatures(network.state_dict(), f"random-{seed}", "inception-random", layer)
