"""FSDP2 of the frozen base alone: each process holds a share of it; trained tensors are whole on all of them.

So optimiser, moving averages, checkpoints and adapter files are those of a single process, and the only gradients
to exchange are those of the vectors, in one message.
"""

import warnings

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from onelora_diffusion.families import Family


def shard_base(transformer: nn.Module, family: Family, trained: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Share out a transformer's frozen weights over all processes, in place: a unit a block, one for the rest.

    What is computed for all blocks together is a unit of its own, gathered once a step.
    """
    from torch.distributed.fsdp import fully_shard

    # A block hands the conditioning through its own copy as it is; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    ignored = set(trained.values())
    for module in transformer.modules():  # nobody reads the base's tensors where trained ones are in their place
        if hasattr(module, "onelora_swap"):
            ignored.update(module.parameters(recurse=False))
    for shared in family.shared_by_blocks(transformer):
        fully_shard(shared, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    for block in family.blocks_of(transformer):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    return fully_shard(transformer, mesh=mesh, ignored_params=ignored)


def average_gradients(trained: dict[str, Tensor]) -> None:
    """The mean of the gradients over all processes, by one message."""
    gradients = [tensor.grad for tensor in trained.values()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
