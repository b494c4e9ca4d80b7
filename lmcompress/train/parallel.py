"""One training over several processes: parameters sharded by FSDP2, each step's examples shared out.

Without `torchrun` (`launch`) all of this does nothing. Checkpoints hold whole tensors.
"""

import atexit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lmcompress.errors import BadSetting
from lmcompress.models.families import block_lists


def world() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is; 0 writes the files."""
    return dist.get_rank() if world() > 1 else 0


def shard(model: nn.Module) -> None:
    """Spread every parameter over the processes, a block at a time, in place."""
    if world() == 1 or isinstance(next(model.parameters()), DTensor):
        return
    from torch.distributed.fsdp import fully_shard

    for _, blocks in block_lists(model):
        for block in blocks:
            fully_shard(block)
    fully_shard(model)
    # Each process would train its own copy of a parameter that stayed whole.
    if whole := [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise BadSetting(f"{len(whole)} parameters were not sharded ({whole[0]}…); train in one process.")


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard; every process has to ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the full `tensor` in the dtype, on the device and in the shards of `parameter`."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gathered(value: object) -> list:
    """Return `value` of every process, in order of rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> whole parameter, on the CPU."""
    return {name: whole(p.detach()).cpu() for name, p in model.named_parameters()}


def start() -> torch.device:
    """Join the processes that `torchrun` started, if it did; return the device this one is to use."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return device
