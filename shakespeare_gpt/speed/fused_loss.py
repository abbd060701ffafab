"""The output layer and the cross-entropy as one step, in little memory.

A batch of 8 x 256 tokens has 2,048 x 50,257 logits: 412 MB in fp32, written and read several times over.
The gradient of the loss with respect to the logits is softmax - onehot. It is known as soon as the logits
are, so each block of rows becomes its share of both gradients at once and is then forgotten.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# How many rows of logits exist at a time, by measurement: few enough to save memory, enough to keep the
# device busy.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden weight^T + bias) against targets.

    hidden (..., C), weight (V, C), targets (...), bias (V,), which is not trained. Equal to
    ``F.cross_entropy(hidden @ weight.T + bias, targets)``, gradients too.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    return LinearCrossEntropy.apply(flat, weight, labels, bias, CHUNK_ROWS.get(device, 1024), dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The two large products run in ``dtype``, all sums in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: int, dtype):
        V, dtypes = weight.shape[0], (hidden.dtype, weight.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, hidden = weight.to(dtype), hidden.to(dtype)
            if dtype != torch.float32 and V % 64:
                # Tensor cores, and a CPU's bf16, want aligned rows: 50,257 is odd, 50,304 = 64 * 786 is not.
                matrix = F.pad(matrix, (0, 0, 0, -V % 64))
            # The same memory for every block: a CPU takes as long to get new memory as to fill it.
            block = hidden.new_empty(min(rows, len(hidden)), len(matrix))
            in_place = dtype == torch.float32 and hidden.device.type == "cpu"
            exact = block if in_place else torch.empty_like(block, dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden)
            share = torch.empty_like(matrix) if len(hidden) > rows and not in_place else None
            for x, y, grad in zip(
                *(part.split(rows) for part in (hidden, targets, grad_hidden)), strict=True
            ):
                logits = torch.mm(x, matrix.T, out=block[: len(x)])
                if bias is not None:
                    logits[:, :V] += bias
                if matrix.shape[0] > V:
                    logits[:, V:] = float("-inf")
                probs = torch.softmax(logits, 1, dtype=torch.float32, out=exact[: len(x)])
                label = y[:, None]
                # A probability too small for fp32 must not make the loss infinite: 87 nats is enough.
                p = probs.gather(1, label).clamp(min=torch.finfo(torch.float32).tiny)
                total = total - p.log().sum()
                if needs_grad:
                    # softmax - onehot; the mean's 1/n comes last, where fp16 cannot flush it to zero
                    probs.scatter_add_(1, label, torch.full_like(label, -1, dtype=probs.dtype))
                    if not in_place:
                        logits.copy_(probs)
                    torch.mm(logits, matrix, out=grad)
                    if grad_weight is None:
                        grad_weight = (logits.T @ x).float()
                    elif in_place:
                        grad_weight.addmm_(logits.T, x)
                    else:
                        grad_weight += torch.mm(logits.T, x, out=share)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight[:V])
            ctx.dtypes = dtypes
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output * (1.0 / len(grad_hidden))
        to_hidden, to_weight = ctx.dtypes
        grad_hidden = (grad_hidden.float() * scale).to(to_hidden)
        return grad_hidden, (grad_weight * scale).to(to_weight), None, None, None, None
