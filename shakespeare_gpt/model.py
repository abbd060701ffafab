"""GPT-2, the decoder-only transformer of Radford et al. (2019), small enough to read in one sitting.

It is OpenAI's model to the letter: LayerNorm before each sub-layer, learned positions, the tanh form of
GELU, biases everywhere, and one matrix that serves both as the token embedding and as the output layer.
Parameter names are OpenAI's (``wte``, ``wpe``, ``h.0.attn.c_attn``, ..., ``ln_f``). The linear layers hold
their weights as ``nn.Linear`` does, (out, in); OpenAI's files hold the transpose.

Shapes: B sequences, T tokens, C channels (``n_embd``), nh heads of hs = C / nh channels, V words.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shakespeare_gpt.speed.fused_loss import linear_cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT-2; the defaults are GPT-2 small with a context of 256 tokens."""

    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_positions: int = 256  # context; OpenAI trained with 1,024
    window: int = 0  # tokens in its short training windows, and in view when it samples; 0: n_positions
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12

    def __post_init__(self):
        if min(self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head) < 1:
            raise ValueError(f"every size of a GPT must be at least 1: {self}")
        if not 0 <= self.window <= self.n_positions:
            raise ValueError(f"window ({self.window}) must be from 0 to n_positions ({self.n_positions})")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")

    @property
    def sampling_window(self) -> int:
        """How many tokens sampling looks back at: as many as most windows of the training held."""
        return self.window or self.n_positions


class KVCache:
    """The keys and values of the tokens already read, so that each new token costs one position.

    Two buffers of fixed size, (n_layer, B, nh, positions, hs); ``length`` says how much is filled, and a
    smaller one forgets the last tokens. ``positions`` is the whole context unless fewer will do.
    """

    def __init__(self, config: GPTConfig, batch_size: int = 1, positions: int | None = None, **options):
        """``options`` are those of ``torch.zeros``: device and dtype."""
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, positions or config.n_positions, hs)
        self.keys, self.values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        self.length = 0


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before, never what follows."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor, int] | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). ``past``: this layer's key and value buffers and how full they are."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        mask = None
        if past is not None:
            keys, values, length = past
            keys[:, :, length : length + T] = k
            values[:, :, length : length + T] = v
            k, v = keys[:, :, : length + T], values[:, :, : length + T]
            if T > 1 and length > 0:
                # Row i is the token at position length + i: it sees everything up to itself.
                mask = torch.ones(T, length + T, dtype=torch.bool, device=x.device).tril(length)
        # softmax(q k^T / sqrt(hs)) v, with the upper triangle masked out
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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
    """GPT-2: token ids in, a score for each possible next token out."""

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
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.n_positions}")
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

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T) the mean cross-entropy in nats instead.

        It equals ``F.cross_entropy`` of the logits, but holds few of them at a time: ``speed.fused_loss``.
        """
        x = self.hidden(ids, cache)
        if targets is None:
            return self.head(x)
        return linear_cross_entropy(x, self.wte.weight, targets)
