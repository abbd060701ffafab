"""What a model knows of its text: the measurements at the end of a run, and of ``recite``."""

from collections.abc import Iterator

import torch
from torch import Tensor

from shakespeare_gpt.memorization import Recall, Scores, exact_recall, score
from shakespeare_gpt.model import GPT
from shakespeare_gpt.tokenizer import token_bytes


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
    yield ("from anywhere", exact_recall(model, ids, prompt_tokens=given, continuation=asked, places=places))
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
