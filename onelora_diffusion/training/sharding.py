"""FSDP2 of the frozen base alone: each process holds a shard of the base and all trained tensors.

So the optimiser, moving averages, checkpoints and adapter files are as in a single process, and only the gradients of
the vectors are exchanged, in one message.
"""

import warnings

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from onelora_diffusion.denoisers import blocks_of
from onelora_diffusion.families import Family


def shard_base(transformer: nn.Module, family: Family, trained: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Shard a transformer's frozen weights over all processes, in place: each block is a unit, and the rest is one.

    The part that is computed once for all blocks is a unit of its own, which is gathered once per step.
    """
    from torch.distributed.fsdp import fully_shard

    # A block returns the conditioning unchanged from its own copy of the embedder, and nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    ignored = set(trained.values())
    for module in transformer.modules():  # base tensors that trained ones replace are never read
        if hasattr(module, "onelora_swap"):
            ignored.update(module.parameters(recurse=False))
    for shared in family.shared_by_blocks(transformer):
        fully_shard(shared, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    for block in blocks_of(transformer):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    return fully_shard(transformer, mesh=mesh, ignored_params=ignored)


def average_gradients(trained: dict[str, Tensor]) -> None:
    """Average the gradients over all processes in one message."""
    gradients = [tensor.grad for tensor in trained.values()]
    flat = parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    vector_to_parameters(flat / distributed.get_world_size(), gradients)
