"""One run in several processes, one for each GPU, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shakespeare_gpt.train import OneProcess


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
