"""Muon for all matrices of one shape at once.

torch's own Muon treats the matrices of GPT-2 one after the other and always in bf16, which is slow where
the processor only emulates it (a T4, a CPU without bf16 instructions). The update is the same: a test
compares the two. The method: https://kellerjordan.github.io/posts/muon/
"""

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """torch's Muon with batched products in a chosen precision, ``dtype``.

    A group of parameters may say that each is several matrices one above the other: ``parts``.
    """

    def __init__(self, params, *, dtype: torch.dtype = torch.bfloat16, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["dtype"] = dtype  # saved with the state: a resumed run rounds as before

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    stored = (p, p.grad, self.state[p]["momentum_buffer"])
                    for part in zip(*(t.chunk(group.get("parts", 1)) for t in stored), strict=True):
                        by_shape.setdefault(part[0].shape, []).append(part)
            for (rows, columns), matrices in by_shape.items():
                params, grads, buffers = map(list, zip(*matrices, strict=True))
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov's look ahead
                settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
                update = orthogonalize(torch.stack(update).to(group["dtype"]), *settings)
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-rate)


def orthogonalize(matrices: Tensor, coefficients, steps: int, eps: float) -> Tensor:
    """Bring all singular values of each matrix (n, rows, columns) near 1 by Newton-Schulz iterations.

    Each iteration multiplies X by a polynomial p(XX^T). For a long matrix it is cheaper to carry the small
    square XX^T along, which becomes p XX^T p, and to multiply X once by the product of all p. But the square
    squares the singular values too, and carrying it adds rounding: fp32 bears that for all iterations, bf16
    for three, after which the square is computed anew.
    """
    a, b, c = coefficients
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.flatten(1).norm(dim=1)[:, None, None].clamp(min=eps)
    carried = 3 if x.dtype == torch.bfloat16 else steps
    # The cost of n iterations, in products of squares: n times two long products and a square, or two long
    # products and 4 n - 3 squares.
    length = x.shape[2] / x.shape[1]
    while steps > 0:
        n = min(steps, carried)
        if 2 * length + 4 * n - 3 >= n * (2 * length + 1):
            n = 1
        gram, product = x @ x.mT, None
        for step in range(n):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            if n == 1:
                x = torch.baddbmm(x, p, x, beta=a)
                continue
            p.diagonal(dim1=1, dim2=2).add_(a)
            product = p if product is None else p @ product
            if step + 1 < n:
                gram = p @ gram @ p
        if product is not None:
            x = product @ x
        steps -= n
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def make_optimizers(model: nn.Module, config, precision: str) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for embeddings, gains and biases; or AdamW for all.

    ``config`` is a TrainConfig. No weight decay anywhere: there is nothing to generalize to.
    """
    matrices = [p for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if not (n.startswith("h.") and p.dim() == 2)]
    fused = model.device.type in ("cpu", "cuda")
    adam = {"lr": config.adam_lr, "betas": (0.9, config.beta2), "weight_decay": 0.0, "fused": fused}
    if config.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(matrices + rest, **adam)]
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Queries, keys and values are three matrices that GPT-2 stores as one.
        stored = [block.attn.c_attn.weight for block in model.h]
        groups = [{"params": stored, "parts": 3}, {"params": [p for p in matrices if p not in set(stored)]}]
        options = {"lr": config.muon_lr, "momentum": config.momentum, "weight_decay": 0.0}
        optimizers = [Muon(groups, dtype=dtype, **options), torch.optim.AdamW(rest, **adam)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    if hasattr(model, "write_back"):  # a ReducedGPT
        optimizers[-1].register_step_post_hook(lambda *_: model.write_back())
    return optimizers
