"""One embedding for all the tokens that a text lacks, while the text is learnt.

Of GPT-2's 50,257 tokens a short play uses some 2,400. All that training does to the others is to make them
unlikely. So they share one row of the embedding, which counts in the softmax as often as there are tokens
that share it. The loss is the same as with all rows written out, and the output layer far smaller.
"""

import math

import torch
from torch import Tensor, nn

from shakespeare_gpt.model import GPT
from shakespeare_gpt.speed.fused_loss import linear_cross_entropy


class ReducedGPT(GPT):
    """``model`` with an embedding for each kind of token in ``ids`` and one for all others, to be trained.

    All else is the model's own. ``write_back`` brings the model's embedding up to date.
    """

    def __init__(self, model: GPT, ids: Tensor):
        nn.Module.__init__(self)  # GPT's own would draw new weights
        self.config, self.full = model.config, [model]  # in a list, so that it is no part of this one
        self.wpe, self.h, self.ln_f = model.wpe, model.h, model.ln_f
        kinds = ids.unique().to(model.device)
        self.index = torch.full((self.config.vocab_size,), len(kinds), device=model.device)
        self.index[kinds] = torch.arange(len(kinds), device=model.device)
        self.rows = torch.cat([kinds, (self.index == len(kinds)).nonzero()[0]])
        self.wte = nn.Embedding(len(self.rows), self.config.n_embd, device=model.device)
        self.bias = torch.zeros(len(self.rows), device=model.device)
        self.bias[-1] = math.log(self.config.vocab_size - len(kinds))
        self.read()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids and targets (B, T) -> the mean cross-entropy in nats over the whole vocabulary."""
        hidden = self.hidden(self.index[ids])
        return linear_cross_entropy(hidden, self.wte.weight, self.index[targets], self.bias)

    @torch.no_grad()
    def read(self) -> None:
        """Take the embedding from the full model."""
        self.wte.weight.copy_(self.full[0].wte.weight[self.rows])

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the embedding to the full model: the tokens that the text lacks all get the last row."""
        torch.index_select(self.wte.weight, 0, self.index, out=self.full[0].wte.weight)
