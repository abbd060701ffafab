"""One training step as a CUDA graph.

A step of 8 x 256 tokens is some two thousand small kernels, and a GPU finishes each before Python has
launched the next. Replaying a recording launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def capture(gradients: Callable[[Tensor], Tensor], shape: tuple[int, int], device) -> Callable:
    """Record ``gradients``, a function of token ids (B, T + 1), and return a function that replays it.

    The gradients stay in the memory that the recording wrote to.
    """
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    with torch.cuda.device(device):  # streams and graphs belong to the current GPU
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the libraries set themselves up in the first rounds
            for _ in range(2):
                gradients(tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = gradients(tokens)

    def replay(new: Tensor) -> Tensor:
        tokens.copy_(new)
        with torch.cuda.device(device):
            graph.replay()
        return loss

    return replay
