"""What has been learnt by heart: the loss of every token, exact recall, and a report of both.

Carlini et al. (2023) call a passage memorized if the model, given what stands before it, continues it word
for word with greedy decoding. ``exact_recall`` asks that at many places of the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shakespeare_gpt.data import windows
from shakespeare_gpt.model import GPT
from shakespeare_gpt.sample import CachedReader
from shakespeare_gpt.speed.devices import autocast
from shakespeare_gpt.tokenizer import token_bytes

BATCH_TOKENS, CHUNK_ROWS = 4096, 1024  # tokens read in one pass; logits at a time, 206 MB in fp32


@dataclass(frozen=True)
class Scores:
    """For each token of a text but the first: (n - 1,) each, on the CPU."""

    losses: Tensor  # float32, nats: -log of the probability that the model gave it
    right: Tensor  # bool: whether the model held it for the most probable

    @property
    def loss(self) -> float:
        return self.losses.double().mean().item()

    def __str__(self) -> str:
        share = self.right.double().mean().item()
        return f"{self.loss:.6f} nats per token, {share:.2%} of the tokens are the first guess"


@torch.inference_mode()
def score(model: GPT, ids: Tensor, *, precision: str = "fp32") -> Scores:
    """Loss and hit or miss of every token of a text ids (n,); ValueError for n < 2.

    Each token is predicted once, from what stands before it in its window (see ``data.windows``); a short
    text is one short window.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64).cpu()
    if len(ids) < 2:
        raise ValueError("a text must have at least 2 tokens: the first is not predicted")
    _, x, y, mask = windows(ids, min(model.config.n_positions, len(ids) - 1))
    labels, size, end = y.flatten().to(model.device), max(1, BATCH_TOKENS // x.shape[1]), 0
    # Into memory taken beforehand: small results kept between large logits break up a CPU's memory.
    losses, right = torch.empty(y.shape), torch.empty(y.shape, dtype=torch.bool)
    with autocast(model.device, precision):
        for tokens in x.split(size):
            for hidden in model.hidden(tokens.to(model.device)).flatten(0, 1).split(CHUNK_ROWS):
                rows = slice(end, end + len(hidden))
                end = rows.stop
                logits = model.head(hidden).float()
                label = logits.gather(1, labels[rows, None])[:, 0]
                best, first = logits.max(1)
                right.view(-1)[rows] = first == labels[rows]
                # In place: a CPU takes as long to get 206 MB of new memory as to fill them.
                losses.view(-1)[rows] = logits.sub_(best[:, None]).exp_().sum(1).log() + best - label
    return Scores(losses[mask], right[mask])


@dataclass(frozen=True)
class Recall:
    """How far the model recited at each of several places."""

    starts: list[int]  # where each prompt begins in the text
    matched: Tensor  # (places,) int64: right tokens of the continuation, up to the first wrong one
    prompt_tokens: int
    continuation: int  # tokens that were asked for

    @property
    def median(self) -> float:
        return self.matched.double().quantile(0.5).item()

    @property
    def mean(self) -> float:
        return self.matched.double().mean().item()

    @property
    def perfect(self) -> float:
        """The share of the places where the whole continuation is right."""
        return (self.matched == self.continuation).double().mean().item()

    def __str__(self) -> str:
        return (
            f"after {self.prompt_tokens} tokens, at {len(self.starts)} places: median {self.median:g} of "
            f"{self.continuation} tokens, mean {self.mean:.1f}, all right at {self.perfect:.0%}"
        )


@torch.inference_mode()
def exact_recall(
    model: GPT,
    ids: Tensor,
    *,
    prompt_tokens: int = 32,
    continuation: int = 50,
    places: int = 200,
    starts: Sequence[int] | None = None,
    seed: int = 0,
) -> Recall:
    """Prompt with a few tokens of the text ``ids`` (n,), continue greedily, count what matches.

    The places are drawn by ``seed`` at any offset of the text, each once, or given as ``starts``, the offsets
    of the prompts. Raises ValueError for a text too short for one place and for starts outside it.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    possible = len(ids) - prompt_tokens - continuation + 1
    if possible < 1 or min(prompt_tokens, continuation, places) < 1:
        raise ValueError(f"prompt, continuation and places must be at least 1, and fit in {len(ids)} tokens")
    if starts is None:
        order = torch.randperm(possible, generator=torch.Generator().manual_seed(seed))
        starts = order[:places].sort().values
    starts = torch.as_tensor(starts, dtype=torch.int64)
    if not len(starts) or starts.min() < 0 or starts.max() >= possible:
        raise ValueError(f"starts must lie in 0..{possible - 1}, and there must be at least one")
    passages = ids[starts[:, None] + torch.arange(prompt_tokens + continuation)]
    matched = []
    for batch in passages.split(64):
        prompt, truth = batch.to(model.device).split([prompt_tokens, continuation], 1)
        reader, said = CachedReader(model, len(batch)), [prompt]
        for _ in range(continuation):
            said.append(reader.read(said[-1])[:, -1].argmax(-1, keepdim=True))
        hits = torch.cat(said[1:], 1) == truth
        matched.append(hits.cumprod(1).sum(1).cpu())
    return Recall(starts.tolist(), torch.cat(matched), prompt_tokens, continuation)


def line_starts(ids: Tensor) -> Tensor:
    """Where the lines of a text ids (n,) begin, as offsets of tokens: after a line end, and no line end."""
    kinds, index = torch.as_tensor(ids).unique(return_inverse=True)
    ends = torch.tensor([token_bytes(kind).endswith(b"\n") for kind in kinds.tolist()])[index]
    return (ends[:-1] & ~ends[1:]).nonzero()[:, 0] + 1


def report(model: GPT, ids: Tensor, places: int = 200) -> Iterator[tuple[str, Scores | Recall]]:
    """What a model knows of the text ids (n,), in full precision: what was measured, and the result.

    The loss of the whole text; recall from anywhere; from the starts of lines, as people type them, after
    8, 16 and 32 tokens; and how far it goes when it is asked for 200 tokens.
    """
    yield "whole text", score(model, ids)
    n = len(ids)
    given, asked = min(32, max(1, n // 4)), min(50, max(1, n // 4))
    yield "from anywhere", exact_recall(model, ids, prompt_tokens=given, continuation=asked, places=places)
    lines = line_starts(ids)
    for prompt in (8, 16, 32):
        starts = lines[lines <= n - prompt - asked]
        if len(starts):
            starts = starts[torch.linspace(0, len(starts) - 1, min(places, len(starts))).long()]
            _, kind, counts = ids.unfold(0, prompt, 1).unique(dim=0, return_inverse=True, return_counts=True)
            several = int((counts[kind[starts]] > 1).sum())
            recall = exact_recall(model, ids, prompt_tokens=prompt, continuation=asked, starts=starts)
            yield (f"from lines' starts ({several} of these prompts stand in the text several times)", recall)
    if n >= 1000:
        yield "a long passage", exact_recall(model, ids, continuation=200, places=places)
