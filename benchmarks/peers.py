"""The methods that are measured side by side, all on the same layers of the same base model."""

import copy
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.injection.conditioning import DiTConditioning
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.injection.verbs import inject_adapter


def make_base(width: int, heads: int, layers: int, sample_size: int = 32, seed: int = 0) -> DiTTransformer2DModel:
    """A random frozen DiT with patches of 2, whose blocks hold equal embeddings, as in every converted checkpoint.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """
    if width % heads:
        raise ValueError(f"--width {width} is not a multiple of {heads} heads")
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=sample_size,
    )
    embeddings = [block.norm1.emb for block in model.transformer_blocks]
    for embedding in embeddings[1:]:
        embedding.load_state_dict(embeddings[0].state_dict())
    return model.requires_grad_(False)


def twin(base: nn.Module) -> nn.Module:
    """A copy with modules of its own around the same weights: many peers fit into the memory of one."""
    weights = [*base.parameters(), *base.buffers()]
    memo = {id(w): nn.Parameter(w.data, requires_grad=False) if isinstance(w, nn.Parameter) else w for w in weights}
    return copy.deepcopy(base, memo)


# ---------------------------------------------------------------------------------------------------
# The peers. Each takes a model that it may change, whose weights it may not.


class Listing1(nn.Module):
    """1LoRA as the paper's listing 1 writes it: a module around the linear layer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.b = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device))

    def forward(self, x):
        return self.linear(x) + self.b * x.sum(-1, keepdim=True)


def _ours(**settings) -> Callable[[nn.Module], nn.Module]:
    return lambda model: inject_adapter(model, AdapterConfig(**settings))


def _listing1(model):
    for path in target_layers(model, None):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Listing1(model.get_submodule(path)))
    return model


def _peft(kind: str, r: int = 1, **settings) -> Callable[[nn.Module], nn.Module]:
    def build(model):
        import peft

        from onelora_diffusion.peft import OneLoraConfig

        configs = {"miss": peft.MissConfig, "lora": peft.LoraConfig, "vera": peft.VeraConfig, "1lora": OneLoraConfig}
        targets = list(target_layers(model, None))
        # unwrapped again: only the layers are measured, not the wrapper's own forward
        return peft.get_peft_model(model, configs[kind](r=r, target_modules=targets, **settings)).get_base_model()

    return build


def _biases(model):
    for path in target_layers(model, None):
        model.get_submodule(path).bias = nn.Parameter(model.get_submodule(path).bias.clone())
    return model


def _full(model):
    model = copy.deepcopy(model)  # it trains the weights that the others share
    return model.requires_grad_(True)


OURS = {
    "1LoRA": _ours(),
    "1LoRA, fused qkv": _ours(fuse_qkv=True),
    "BitFit": _ours(method="bitfit"),
    **{
        f"1LoRA, {compression} r={rank}": _ours(compression=compression, rank=rank)
        for compression in ("outputs", "singular")
        for rank in (1, 4)
    },
}
# PEFT's MiSS at r=1 sums all input features into one shard, mini_r=1 is its default and goes unused: it is 1LoRA.
RIVALS = {
    "biases unfrozen": _biases,
    "listing 1": _listing1,
    "PEFT MiSS r=1": _peft("miss"),
    "PEFT OneLoraConfig": _peft("1lora"),  # 1LoRA, as programs that speak PEFT have it
    "PEFT LoRA r=1": _peft("lora", lora_alpha=1),
    "PEFT LoRA r=4": _peft("lora", r=4, lora_alpha=4),
    "PEFT DoRA r=1": _peft("lora", lora_alpha=1, use_dora=True),
    "PEFT VeRA r=1": _peft("vera"),
    "full": _full,
}
PEERS = OURS | RIVALS


def make_peer(name: str, base: nn.Module, shared_conditioning: bool, scale: float = 1e-3, seed: int = 0) -> nn.Module:
    """The base with a peer on it, in train mode, its trained values moved off their start.

    Args:
        name: a key of `PEERS`; ours share the base's conditioning by themselves.
        base: stays as it is.
        shared_conditioning: give a rival what ours has too, a conditioning that is computed once.
        scale: standard deviation of the noise on trained values, so that no term is zero.

    Returns:
        A model whose parameters that require gradients are the peer's, in fp32.
    """
    torch.manual_seed(seed)
    model = twin(base)
    if shared_conditioning and name in RIVALS:
        DiTConditioning(model).install()
    model = PEERS[name](model).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.float() + scale * torch.randn_like(parameter, dtype=torch.float32)
    return model
