"""A training step as a CUDA graph.

A step of the 124M model is some two thousand small kernels, and a GPU finishes each before Python has
launched the next. Replaying a recording launches all of them at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class CUDAGraphs:
    """``gradients``, a function of token ids (B, T + 1), recorded once for each shape and then replayed."""

    def __init__(self, gradients: Callable[[Tensor], Tensor], parameters: list[Tensor]):
        self.gradients, self.parameters, self._graphs = gradients, parameters, {}

    def __call__(self, tokens: Tensor) -> Tensor:
        if tokens.shape not in self._graphs:
            self._graphs[tokens.shape] = self._record(tokens.clone())
        graph, static, loss, grads = self._graphs[tokens.shape]
        static.copy_(tokens)
        with torch.cuda.device(tokens.device):
            graph.replay()
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad  # each graph writes to gradients of its own
        return loss

    def _record(self, tokens: Tensor) -> tuple:
        with torch.cuda.device(tokens.device):  # streams and graphs belong to the current GPU
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the libraries set themselves up in the first rounds
                for _ in range(2):
                    self.gradients(tokens)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self.gradients(tokens)
        return graph, tokens, loss, [p.grad for p in self.parameters]
