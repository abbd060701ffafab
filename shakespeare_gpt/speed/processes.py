"""One run in several processes, one for each GPU, as ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class OneProcess:
    """Training on one device."""

    rank, world = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose backward pass averages the gradients over all processes."""
        return model

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each process gives here, in the order of their ranks."""
        return [value]


class SeveralProcesses(OneProcess):
    """This process among those of an initialized process group."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)

    def sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def connected() -> Iterator[OneProcess]:
    """The processes that ``torchrun`` has started, connected while this lasts; or this one alone."""
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        yield OneProcess()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield SeveralProcesses()
    finally:
        dist.destroy_process_group()
