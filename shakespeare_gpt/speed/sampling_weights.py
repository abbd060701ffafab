"""Smaller weights for sampling. Each new token reads every weight once, so fewer bytes take less time."""

import copy

import torch
from torch import Tensor, nn

from shakespeare_gpt.model import GPT
from shakespeare_gpt.speed.devices import best_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fp16Linear(nn.Module):
    """A linear layer for a CPU: weight (out, in) kept in fp16, arithmetic in fp32 (FBGEMM's kernel)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def _cast(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy of the model in ``dtype``; weights that are in it already share their memory."""
    parameters = {id(p): nn.Parameter(p.detach().to(dtype)) for p in model.parameters()}
    return copy.deepcopy(model, parameters).eval()


def _packed(model: GPT) -> GPT:
    """A copy whose matrix products read fp16, for sampling on a CPU. It cannot be trained or saved."""
    packed = _cast(model, torch.float32)
    for part in [part for block in packed.h for part in (block.attn, block.mlp)]:
        for name, layer in list(part.named_children()):
            setattr(part, name, Fp16Linear(layer.weight, layer.bias))
    packed.__dict__["head"] = Fp16Linear(packed.wte.weight)  # in place of the method
    return packed


def _kind_for(device: torch.device) -> tuple[str, str]:
    """The kind of weights by rule, and the reason: nothing is timed, so a restart chooses alike."""
    if device.type != "cpu":
        return best_precision(device)
    try:  # not every PyTorch has the kernel, and not for every CPU
        Fp16Linear(torch.ones(8, 8))(torch.ones(1, 8))
    except (RuntimeError, AttributeError):
        return "fp32", "no smaller kind is known to be faster on this CPU"
    return "fp16", "half the bytes to read, and this CPU computes with them in fp32"


@torch.no_grad()
def for_sampling(model: GPT, kind: str | None = None) -> tuple[GPT, str]:
    """A copy of the model to sample from, and a sentence that says which weights it has and why.

    ``kind``: "fp32" (shares the model's weights), "bf16" or "fp16"; without it what suits the device. Raises
    RuntimeError or AttributeError where this PyTorch lacks the kernel for fp16.
    """
    kind, reason = (kind, "as asked") if kind else _kind_for(model.device)
    if kind == "fp16" and model.device.type == "cpu":
        return _packed(model), f"Weights in fp16: {reason}."
    return _cast(model, DTYPES[kind]), f"Weights in {kind}: {reason}."
