"""Sampling: a prompt in, a stream of tokens or of text out."""

import codecs
import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shakespeare_gpt import UsageError
from shakespeare_gpt.model import GPT, KVCache
from shakespeare_gpt.speed.ngram_draft import DraftLength, NgramDraft
from shakespeare_gpt.tokenizer import END_OF_TEXT, encode, token_bytes

NEWLINE = 198  # the token "\n", which stands in for an empty prompt
GREEDY_BELOW = 1e-8  # at a lower temperature the best token has all the probability in fp32


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise UsageError, in one line, for sampling parameters out of range."""
    if not 0.0 <= temperature < float("inf"):  # also refuses NaN
        raise UsageError(f"temperature must be 0 or more, not {temperature}")
    if not 0 <= top_k < float("inf") or top_k != int(top_k):
        raise UsageError(f"top_k must be a whole number, 0 (off) or more, not {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise UsageError(f"top_p must be above 0 and at most 1, not {top_p}")


def next_token_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) -> probabilities (..., V) in fp32.

    ``temperature`` divides the logits (0: greedy). Then ``top_k`` keeps the k best tokens (0: all). Of
    those, ``top_p`` keeps the fewest best whose probabilities sum to at least p (Holtzman et al., 2020).
    Raises ValueError for parameters out of range and for logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.float()
    best, token = _best(logits)
    if temperature < GREEDY_BELOW:
        return torch.zeros_like(logits).scatter_(-1, token, 1.0)
    logits = (logits - best) / temperature  # at most 0, so that the softmax cannot overflow
    V = logits.shape[-1]
    if 0 < top_k < V:
        kept, index = logits.topk(int(top_k))  # sorted, best first
        kept = kept.softmax(-1)
    else:
        probs = logits.softmax(-1)
        if top_p == 1.0:
            return probs
        # Sorting 50,257 numbers costs more than a whole layer, and the first 1,024 are nearly always enough.
        kept, index = probs.topk(min(1024, V))
        if (kept.sum(-1) < top_p).any():
            kept, index = probs.sort(-1, descending=True)
    if top_p < 1.0:
        # A token stays if those before it do not yet reach p, so the first always stays.
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, index, kept)


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (..., V) -> the largest and its token, both (..., 1)."""
    best, token = logits.max(-1, keepdim=True)  # NaN where any logit is
    if not torch.isfinite(best).all():
        raise ValueError("the model's logits are not finite: its weights are damaged or diverged")
    return best, token


def draw(probs: Tensor, u: float) -> int:
    """The token of probs (V,) at ``u``, uniform in [0, 1), by inverse transform sampling."""
    probs = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    sums = probs.cumsum(-1, dtype=torch.float64)
    token = int(torch.searchsorted(sums, u * sums[-1:], right=True))
    return token if token < len(sums) else int(probs.nonzero()[-1])  # u * sum may round up to sum


def window_start(length: int, window: int) -> int:
    """The first of ``length`` tokens that stands in a sliding window of ``window``; 0 while all fit.

    A full window moves on by half: its last ``window // 2`` tokens are read again, from position 0.
    """
    if length <= window:
        return 0
    step = window - window // 2
    return -(-(length - window) // step) * step  # rounded up


class CachedReader:
    """Reads B texts of equal length, a few tokens at a time, with a key-value cache and a sliding window.

    The logits equal, up to rounding, the model's own on ``ids[window_start(len(ids), window):]``.
    ``length`` counts the tokens read.
    """

    def __init__(self, model: GPT, batch_size: int = 1):
        self.model, self.length, self._start = model, 0, 0
        n = model.config.sampling_window
        weight = model.wpe.weight  # has the dtype of the activations, even where matrices are packed
        self._cache = KVCache(model.config, batch_size, n, device=weight.device, dtype=weight.dtype)
        # The tokens in the cache, to read them again when the window moves
        self._tokens = torch.zeros(batch_size, n, dtype=torch.int64, device=weight.device)

    def room(self, more: int) -> int:
        """After ``more`` further tokens: how many still fit before the window has to move."""
        n, total = self.model.config.sampling_window, self.length + more
        return n - (total - window_start(total, n))

    def read(self, ids: Tensor, wanted: int = 1) -> Tensor:
        """ids (B, T), the next tokens -> the logits (B, wanted, V) after the last ``wanted`` of them.

        These must lie in one window (see ``room``).
        """
        total, filled = self.length + ids.shape[1], self._cache.length
        start = window_start(total, self.model.config.sampling_window)
        if start > self._start:
            ids = torch.cat([self._tokens[:, :filled], ids], 1)[:, start - self._start :]
            self._cache.length = filled = 0
        self._tokens[:, filled : filled + ids.shape[1]] = ids
        hidden = self.model.hidden(ids, self._cache)
        self.length, self._start = total, start
        return self.model.head(hidden[:, -wanted:])

    def undo(self, tokens: int) -> None:
        """Forget the last ``tokens`` of those read last."""
        self._cache.length -= tokens
        self.length -= tokens


@dataclass
class GenerationStats:
    """What a generation cost, updated as it runs. Passed to several generations, it adds them up."""

    tokens: int = 0  # generated
    passes: int = 0  # through the model
    proposed: int = 0  # tokens in drafts
    accepted: int = 0  # of those, what the model agreed with
    seconds: float = 0.0  # without the caller's time between the tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    draft: NgramDraft | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time. Closing the iterator stops the computation.

    The same ``seed`` gives the same tokens; None picks one at random. A ``draft`` only makes it faster:
    one pass of the model checks many guessed tokens (see ``speed/ngram_draft.py``). Raises ValueError at
    once for arguments out of range, and while it runs for logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if seed is not None and (not 0 <= seed < 2**63 or seed != int(seed)):
        raise UsageError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed}")
    last = model.config.vocab_size - 1
    prompt = [int(token) for token in prompt_ids] or [min(NEWLINE, last)]
    if not 0 <= min(prompt) <= max(prompt) <= last:
        raise ValueError(f"the prompt's token ids must lie in 0..{last}")
    random = torch.Generator()  # on the CPU for every device: the same seed, the same numbers
    random.seed() if seed is None else random.manual_seed(int(seed))
    sampling, stats = (temperature, top_k, top_p), stats or GenerationStats()
    return _generate(model, prompt, max_new_tokens, sampling, random, draft, stats)


@torch.inference_mode()
def _generate(model, prompt, max_new_tokens, sampling, random, draft, stats) -> Iterator[int]:
    began = time.perf_counter()
    reader, draft_length = CachedReader(model), DraftLength()
    context, end = list(prompt), len(prompt) + max_new_tokens
    while len(context) < end:
        unread, proposal = context[reader.length :], []
        if draft is not None:
            most = min(end - len(context) - 1, reader.room(len(unread)))
            proposal = draft.propose(context, min(draft_length.next(), most))
        ids = torch.tensor([unread + proposal], device=model.device)
        logits = reader.read(ids, wanted=len(proposal) + 1)[0]
        tokens = _choose(logits, proposal, sampling, random)
        accepted = len(tokens) - 1  # the last token is the model's own
        reader.undo(len(proposal) - accepted)
        draft_length.update(len(proposal), accepted)
        stats.seconds += time.perf_counter() - began
        stats.passes += 1
        stats.proposed += len(proposal)
        stats.accepted += accepted
        context += tokens
        for token in tokens:
            stats.tokens += 1
            yield token
        began = time.perf_counter()


def _choose(logits: Tensor, proposal: list[int], sampling, random: torch.Generator) -> list[int]:
    """Logits (len(proposal) + 1, V) -> the model's tokens, up to the first that differs from the proposal."""
    greedy = sampling[0] < GREEDY_BELOW
    best = _best(logits)[1].flatten().tolist() if greedy else []  # of all rows at once
    tokens = []
    for i, guess in enumerate([*proposal, None]):
        if greedy:
            tokens.append(best[i])
        else:
            u = torch.rand((), generator=random, dtype=torch.float64).item()
            tokens.append(draw(next_token_probs(logits[i], *sampling), u))
        if tokens[-1] != guess:
            break
    return tokens


def stream_text(model: GPT, prompt: str, **options) -> Iterator[str]:
    """Continue a text, in pieces of whole characters; the ``options`` are those of ``generate``."""
    return _stream(generate(model, encode(prompt), **options))


def _stream(tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half a character waits for the rest
    with contextlib.closing(tokens):  # closing this iterator stops the model too
        for token in itertools.takewhile(lambda token: token != END_OF_TEXT, tokens):
            if piece := decoder.decode(token_bytes(token)):
                yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
