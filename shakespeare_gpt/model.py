"""GPT-2, the decoder-only transformer of Radford et al. (2019), small enough to read in one sitting.

It is OpenAI's model to the letter: LayerNorm before each sub-layer, learned positions, the tanh form of
GELU, biases everywhere, and one matrix that serves both as the token embedding and as the output layer.
Parameter names are OpenAI's (``wte``, ``wpe``, ``h.0.attn.c_attn``, ..., ``ln_f``). The linear layers hold
their weights as ``nn.Linear`` does, (out, in); OpenAI's files hold the transpose.

Shapes: B sequences, T tokens, C channels (``n_embd``), nh heads of hs = C / nh channels, V words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT-2; the defaults are GPT-2 small with a context of 256 tokens."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_positions: int = 256  # context; OpenAI trained with 1,024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    def __post_init__(self):
        if min(self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head) < 1:
            raise ValueError(f"every size of a GPT must be at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}): "
                "each head gets an equal share of the channels"
            )


class KVCache:
    """The keys and values of the tokens already read, so that each new token costs one position.

    Two buffers of fixed size, (n_layer, B, nh, n_positions, hs); ``length`` says how much is filled.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int = 1, *, device="cpu", dtype=torch.float32
    ):
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.n_positions, hs)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens (a rejected draft, say)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of {self.length}")
        self.length = length

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before, never what follows."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(
            config.n_embd, 3 * config.n_embd
        )  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). ``past``: this layer's key and value buffers and how full they are."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        mask = None
        if past is not None:
            keys, values, length = past
            keys[:, :, length : length + T] = k
            values[:, :, length : length + T] = v
            k, v = keys[:, :, : length + T], values[:, :, : length + T]
            if T > 1 and length > 0:
                # Row i is the token at position length + i: it sees everything up to itself.
                mask = torch.ones(T, length + T, dtype=torch.bool, device=x.device).tril(length)
        # softmax(q k^T / sqrt(hs)) v, with the upper triangle masked out; as precise as the cache
        y = F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, attn_mask=mask, is_causal=mask is None and T > 1
        )
        return self.c_proj(y.to(x.dtype).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """The position-wise layer: four times as wide inside, with GELU between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention mixes between positions, the MLP works at each; both add to the stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token ids in, a score for each of the 50,257 possible next tokens out."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        """Random weights as large as GPT-2's, drawn from ``generator`` (a fixed seed 0 where there is none).

        The position table's are those of transformers (0.02); OpenAI's code had 0.01 there.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # so that torch's own initialisation draws no random numbers
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
            self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd)
        self.to_empty(device=torch.get_default_device())
        self._init_weights(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator) -> None:
        if self.wte.weight.is_meta:  # an empty shell that a checkpoint is about to fill
            return
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:  # a LayerNorm's gain
                p.fill_(1.0)
            else:
                # Each of the 2 n_layer sub-layers adds to the stream; scaling what they add by
                # 1/sqrt(2 n_layer) keeps the stream's size independent of the depth.
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                p.normal_(0.0, std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def num_parameters(self) -> int:
        """Every trainable number; the output layer is the token embedding and counts once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> the final normalised stream (B, T, C).

        With a cache the ids stand at the positions after those already in it, and are added to it.
        Raises ValueError where the context of ``n_positions`` tokens would be exceeded.
        """
        T = ids.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.n_positions:
            raise ValueError(
                f"{start + T} tokens do not fit into the context of {self.config.n_positions}"
            )
        x = self.wte(ids) + self.wpe.weight[start : start + T]
        for i, block in enumerate(self.h):
            past = None if cache is None else (cache.keys[i], cache.values[i], start)
            x = block(x, past)
        if cache is not None:
            cache.length = start + T
        return self.ln_f(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., V): how well each word's embedding agrees with the stream."""
        return F.linear(hidden, self.wte.weight)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T) the cross-entropy in nats instead.

        Targets of -100 do not count. ``reduction``: "mean" (a scalar) or "none" (B, T; no gradient).
        The loss never holds the logits of the whole batch: see ``LinearCrossEntropy``.
        """
        x = self.hidden(ids, cache)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x, self.wte.weight, targets, reduction)


# How many rows of logits exist at a time. Chosen by measurement: on a CPU few enough to take little memory,
# enough that adding up their shares of the weight's gradient costs little; on a GPU enough to fill the chip.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats of softmax(hidden weight^T) against targets, in little memory.

    hidden (..., C), weight (V, C), targets (...) with -100 for positions that do not count.
    Equal to ``F.cross_entropy(hidden @ weight.T, targets)``, gradients too. With ``reduction`` "none", the
    loss of each position (...), to look at: it has no gradient.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    device = hidden.device.type
    rows = CHUNK_ROWS.get(device, 1024)
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if reduction == "mean":
        return LinearCrossEntropy.apply(flat, weight, labels, rows, dtype)
    return _each_loss(flat.to(dtype), weight.to(dtype), labels, rows).view(targets.shape)


@torch.no_grad()
def _each_loss(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
    """hidden (N, C), weight (V, C), labels (N,) -> the losses (N,), fp32; 0 where the label is -100."""
    losses = []
    block = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for x, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = torch.mm(x, weight.T, out=block[: len(x)]).float()
        label = logits.gather(1, y.clamp(min=0)[:, None])
        best = logits.amax(1, keepdim=True)
        loss = logits.sub_(best).exp_().sum(1, keepdim=True).log() + best - label
        losses.append(loss[:, 0] * (y >= 0))
    return torch.cat(losses)


class LinearCrossEntropy(torch.autograd.Function):
    """The output layer and its loss as one step that works through a few rows at a time.

    A batch of 8 x 256 tokens has 2,048 x 50,257 logits: 412 MB in fp32, written and read several times
    over. But the gradient of the loss with respect to the logits is simply softmax - onehot, known as soon
    as the logits are, so each block of rows is turned into its share of both gradients at once and then
    forgotten. The two large products run in ``dtype``, all sums in fp32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype) -> Tensor:
        V, dtypes = weight.shape[0], (hidden.dtype, weight.dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        counted = (targets >= 0).float()[:, None]
        mean = 1.0 / counted.sum().clamp(min=1.0)
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
            for x, y, keep, grad in zip(
                *(part.split(rows) for part in (hidden, targets, counted, grad_hidden)), strict=True
            ):
                logits = torch.mm(x, matrix.T, out=block[: len(x)])
                if matrix.shape[0] > V:
                    logits[:, V:] = float("-inf")
                probs = torch.softmax(logits, 1, dtype=torch.float32, out=exact[: len(x)])
                label = y.clamp(min=0)[:, None]
                # A probability too small for fp32 must not make the loss infinite: 87 nats is enough.
                p = probs.gather(1, label).clamp(min=torch.finfo(torch.float32).tiny)
                total = total - (p.log() * keep).sum()
                if needs_grad:
                    # softmax - onehot; the mean's 1/n comes last, where fp16 cannot flush it to zero
                    probs.scatter_add_(1, label, torch.full_like(label, -1, dtype=probs.dtype))
                    if not in_place:
                        logits.copy_(probs)
                    torch.mm(logits, matrix, out=grad).mul_(keep)
                    x = x * keep.to(dtype)
                    if grad_weight is None:
                        grad_weight = (logits.T @ x).float()
                    elif in_place:
                        grad_weight.addmm_(logits.T, x)
                    else:
                        grad_weight += torch.mm(logits.T, x, out=share)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight[:V], mean)
            ctx.dtypes = dtypes
        return total * mean

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight, mean = ctx.saved_tensors
        scale = grad_output * mean
        to_hidden, to_weight = ctx.dtypes
        return (
            (grad_hidden.float() * scale).to(to_hidden),
            (grad_weight * scale).to(to_weight),
            None,
            None,
            None,
        )
