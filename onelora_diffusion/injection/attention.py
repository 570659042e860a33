"""An attention processor that computes one feature sum for q, k and v, which have the same input."""

import torch
from torch import nn
from torch.nn import functional as F

from onelora_diffusion.adapters.functional import parts_of
from onelora_diffusion.injection.layers import copies_in_use, is_tuned
from onelora_diffusion.injection.linear import has_foreign_hooks, makes_new_memory


class OneLoRAAttnProcessor:
    """Self-attention of a DiT block whose q, k and v share one feature sum.

    It is no Module, since diffusers drops the keyword arguments of processors that are Modules and counts their
    weights among the base's; it reads the vectors from the linear layers. Results are the same with any other
    processor, since the hooks of the linear layers then add the same terms, with one sum for each layer.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, tokens, features) -> (batch, tokens, features)."""
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        sums = {}
        linears = (attn.to_q, attn.to_k, attn.to_v)
        if attn.fused_projections:
            product = attn.to_qkv(hidden_states)
            if not torch.compiler.is_compiling() and not makes_new_memory(attn.to_qkv):
                product = product.clone()
            parts = parts_of(product, 3)
            query, key, value = (
                _with_adapters(linear, hidden_states, part, sums) for linear, part in zip(linears, parts, strict=True)
            )
        else:
            query, key, value = (_projected(linear, hidden_states, sums) for linear in linears)

        query, key, value = (x.view(batch, tokens, attn.heads, -1).transpose(1, 2) for x in (query, key, value))
        hidden_states = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = hidden_states.transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[1](attn.to_out[0](hidden_states))


# All layers share one processor, which has no state: older releases of torch.compile make one graph per object.
SHARED_SUMS = OneLoRAAttnProcessor()


def _projected(linear, x, sums):
    """The layer's output with its adapters; its `forward` is called directly unless there are other hooks."""
    if not torch.compiler.is_compiling() and has_foreign_hooks(linear):
        return linear(x)
    return _with_adapters(linear, x, linear.forward(x), sums)


def _with_adapters(linear, x, out, sums):
    return linear.onelora(x, out, sums) if hasattr(linear, "onelora") else out


def fused_layers(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Replace q, k and v of each attention by one layer, `to_qkv`; ValueError if an attention has not all three."""
    fused = {}
    for path, linear in layers.items():
        parent, _, name = path.rpartition(".")
        if name not in ("to_q", "to_k", "to_v"):
            fused[path] = linear
        elif not all(f"{parent}.{name}" in layers for name in ("to_q", "to_k", "to_v")):
            raise ValueError(f"fuse_qkv makes one layer of q, k and v, but of {parent} the targets have not all three")
        elif f"{parent}.to_qkv" not in fused:
            attn = model.get_submodule(parent)
            if any(is_tuned(layer) for layer in (attn.to_q, attn.to_k, attn.to_v)):
                raise ValueError(f"fuse_qkv would pass over PEFT's adapter in {parent}: unload or merge it first")
            fused[f"{parent}.to_qkv"] = attn.to_qkv if hasattr(attn, "to_qkv") else _joined(attn)
    return fused


def _joined(attn: nn.Module) -> nn.Linear:
    linears = (attn.to_q, attn.to_k, attn.to_v)
    out_features = sum(linear.out_features for linear in linears)
    joined = nn.Linear(attn.to_q.in_features, out_features, bias=False, device="meta")
    joined.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    return joined


def fuse_in_place(attn: nn.Module) -> None:
    """Join q, k and v into one matrix; the three weights become views of it, so that no memory is used twice."""
    if not hasattr(attn, "to_qkv"):
        attn.fuse_projections()
        attn.to_qkv.is_made_for_adapters = True
        attn.to_qkv.requires_grad_(False)
    for name, joined in attn.to_qkv.named_parameters(recurse=False):
        for linear, part in zip((attn.to_q, attn.to_k, attn.to_v), joined.data.chunk(3), strict=True):
            linear.get_parameter(name).data = part


def is_fused_apart(model: nn.Module, path: str) -> bool:
    """Whether a layer is a fused copy, or its attention computes with a fused copy of its weight."""
    parent, _, name = path.rpartition(".")
    attn = model.get_submodule(parent)
    for copy, parts in copies_in_use(attn).items():
        part = parts[0] if name == copy else name
        if name in (copy, *parts):
            memories = {attn.get_submodule(each).weight.untyped_storage().data_ptr() for each in (copy, part)}
            return len(memories) > 1
    return False
