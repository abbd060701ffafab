"""One run in several processes, one for each GPU, as ``torchrun`` starts them. Without it there is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def averaged(model: nn.Module) -> nn.Module:
    """The module whose backward pass averages the gradients over all processes."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def gather(value: Any) -> list[Any]:
    """What each process gives here, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def connected() -> Iterator[None]:
    """Connect the processes that ``torchrun`` has started while this lasts."""
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
