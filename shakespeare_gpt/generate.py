"""From a prompt to a stream of tokens: sample, cache, speculate, and take only the bytes that are needed.

Three things that are often tangled are apart here:

* the sampler, ``next_token_probs`` and ``draw``: what the knobs do to one row of logits;
* the cached loop, ``generate``: token ids in, token ids out, one at a time, over a ``CachedReader``;
* the streaming loop, ``stream_text``: text in, text out, in whole characters, with stop strings.

**The sliding window.** A model of ``n_positions`` cannot see further back than that. When the window is full
it moves on by half: the last ``n_positions // 2`` tokens are read again, at positions 0, 1, 2, ..., in one
pass, and the text goes on from there. Where the window starts depends on nothing but how many tokens there
are (``window_start``), so a long prompt and a long generation behave alike, and what the cached loop computes
equals, at every token, the uncached model on ``ids[window_start(len(ids), n_positions):]``.

**Speculation.** Reading weights from memory is what a single token costs, so 30 tokens in one pass cost far
less than 30 passes. Whoever can guess what comes next may have a whole guess judged at once (Leviathan et
al., 2023; Chen et al., 2023). This model has learnt a text by heart, so the text itself is the guess:
``Draft`` looks up where the last tokens stand in it and proposes what follows there. The model still decides
every token: each is drawn from the model's own distribution with the same random number that it would get
without a draft, and the proposal only helps as far as it says the same. So neither the distribution nor,
up to the rounding below, the text of a given seed changes.

*Rounding.* A pass over 30 tokens adds its numbers in another order than 30 passes over one token, so logits
differ in their last digits (about 1e-5 in fp32). Where the two best tokens are closer together than that,
greedy output could differ between the two, as it could between two machines.

From a shell: ``python -m shakespeare_gpt.generate --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shakespeare_gpt.model import GPT, KVCache
from shakespeare_gpt.tokenizer import END_OF_TEXT, VOCAB_SIZE, StreamDecoder, encode, utf8_output

NEWLINE = (
    198  # the id of "\n": what stands before the first line of a text, for a prompt of nothing
)

COLDEST = 1e-8  # below it the best token has all the weight, as far as fp32 goes: temperature 0

# ---------------------------------------------------------------------------- the sampler


def check_knobs(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError, in one line, for a setting that means nothing."""
    if not 0.0 <= temperature < float("inf"):  # also refuses NaN
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 <= top_k < float("inf") or top_k != int(top_k):
        raise ValueError(f"top_k must be a whole number, 0 (off) or more, not {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Logits (..., V) -> probabilities (..., V), fp32: the one place where the knobs act.

    In the usual order: ``temperature`` divides the logits (0: all the weight on the best token), ``top_k``
    keeps the k best tokens (0: all), ``top_p`` keeps of those the fewest best whose probabilities sum to at
    least p (1: all; Holtzman et al., 2020). The best token always stays. Raises ValueError for settings out
    of range, and for logits that are NaN or infinite.
    """
    check_knobs(temperature, top_k, top_p)
    logits = logits.float()
    best = logits.amax(-1, keepdim=True)  # NaN where any logit is
    if not torch.isfinite(best).all():
        raise ValueError(
            "the model's logits are not finite numbers: the weights are damaged or diverged"
        )
    if temperature < COLDEST:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    V = logits.shape[-1]
    # The best logit becomes 0 before the division, so that the softmax cannot overflow.
    logits = (logits - best) / temperature
    if 0 < top_k < V:
        kept, index = logits.topk(int(top_k))  # sorted, best first
        kept = _nucleus(kept.softmax(-1), top_p)
        return torch.zeros_like(logits).scatter_(-1, index, kept)
    probs = logits.softmax(-1)
    if top_p == 1.0:
        return probs
    # Sorting 50,257 numbers costs more than a whole layer. The nucleus almost always lies within the first
    # thousand; only where it does not is everything sorted.
    few = min(1024, V)
    kept, index = probs.topk(few)
    if few < V and (kept.sum(-1) < top_p).any():
        kept, index = probs.sort(-1, descending=True)
    return torch.zeros_like(logits).scatter_(-1, index, _nucleus(kept, top_p))


def _nucleus(kept: Tensor, top_p: float) -> Tensor:
    """Probabilities in falling order -> those of the nucleus, summing to 1; the others 0."""
    if top_p < 1.0:
        # A token stays if those before it do not yet reach p; so the first always stays.
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw(probs: Tensor, u: float) -> int:
    """The token of probs (V,) at ``u``, a uniform random number in [0, 1): the inverse of the sum.

    One random number a token, whatever the size of the vocabulary. A token of probability 0 never comes.
    """
    if probs.device.type == "mps":  # has no float64
        probs = probs.cpu()
    sums = probs.cumsum(-1, dtype=torch.float64)
    token = int(torch.searchsorted(sums, u * sums[-1:], right=True))
    return (
        token if token < len(sums) else int(probs.nonzero()[-1])
    )  # u * sum may round up to the sum


# ---------------------------------------------------------------------------- the cached loop


def window_start(length: int, n_positions: int) -> int:
    """Where the window begins that a text of ``length`` tokens is read through.

    0 while the text fits; after that the window starts late enough to hold at most ``n_positions`` tokens,
    and moves in steps of half a window, so that it always holds more than ``n_positions // 2``.
    """
    if length <= n_positions:
        return 0
    step = n_positions - n_positions // 2
    return -(-(length - n_positions) // step) * step  # rounded up


class CachedReader:
    """Reads a text through a model, a few tokens at a time, with a cache and the sliding window.

    B texts of equal length at once; ``length`` is how many tokens of each have been read so far.
    """

    def __init__(self, model: GPT, batch_size: int = 1):
        self.model, self.length, self._start = model, 0, 0
        weight = model.wpe.weight  # in the dtype of the stream, also where other weights are packed
        dtype = model.cache_dtype if isinstance(model, FastGPT) else weight.dtype
        self._cache = KVCache(model.config, batch_size, device=weight.device, dtype=dtype)
        # The tokens in the cache, to read them again when the window moves: (B, n_positions)
        self._tokens = torch.zeros(
            batch_size, model.config.n_positions, dtype=torch.int64, device=weight.device
        )

    def room(self, more: int) -> int:
        """After ``more`` further tokens: how many then still fit before the window has to move."""
        n = self.model.config.n_positions
        total = self.length + more
        return n - (total - window_start(total, n))

    def read(self, ids: Tensor, wanted: int = 1) -> Tensor:
        """ids (B, T), the next tokens -> the logits (B, wanted, V) after the last ``wanted`` of them.

        The output layer, a third of the model, works for those positions only. ``wanted`` positions must
        lie in one window (see ``room``).
        """
        total, filled = self.length + ids.shape[1], self._cache.length
        start = window_start(total, self.model.config.n_positions)
        if start > self._start:
            ids = torch.cat([self._tokens[:, :filled], ids], 1)[:, start - self._start :]
            self._cache.reset()
            filled = 0
        self._tokens[:, filled : filled + ids.shape[1]] = ids
        hidden = self.model.hidden(ids, self._cache)
        self.length, self._start = total, start
        return self.model.head(hidden[:, -wanted:])

    def undo(self, tokens: int) -> None:
        """Forget the last ``tokens`` of those read last, as if they had never been read."""
        self._cache.truncate(self._cache.length - tokens)
        self.length -= tokens


@dataclass
class GenerationStats:
    """What a generation cost; filled in as it goes. Given to several, it adds them up."""

    tokens: int = 0  # given out
    passes: int = 0  # through the model
    proposed: int = 0  # tokens that the draft guessed
    accepted: int = 0  # of those, what the model agreed with
    seconds: float = 0.0  # spent here, without what the reader of the tokens does between them
    first_token_seconds: float | None = None  # of the latest generation

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Of the tokens that were proposed, the share that the model agreed with; 0 without a proposal."""
        return self.accepted / self.proposed if self.proposed else 0.0


class Draft:
    """Guesses how a text goes on from the places where its last tokens stand in a text that is known.

    ids: the known text (n,). Building the index is one sort (some 50 ms for 338,025 tokens); a guess looks at
    every place where the last two tokens stand and keeps those where the most tokens before agree too.
    """

    MIN_MATCH = 2  # tokens that must agree before a guess is made
    MAX_MATCH = 32  # agreement beyond this changes nothing

    def __init__(self, ids: Tensor | Sequence[int]):
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1:
            raise ValueError(
                f"a draft takes one row of token ids, not an array of shape {ids.shape}"
            )
        self._ids = ids
        pairs = (ids[:-1] << 32) | ids[1:] if len(ids) > 1 else np.empty(0, np.int64)
        self._order = np.argsort(pairs, kind="stable")
        self._pairs = pairs[self._order]

    def propose(self, context_ids: Sequence[int], length: int) -> list[int]:
        """What may follow ``context_ids``: at most ``length`` tokens, none where nothing is known.

        Of the places with the longest agreement the one whose next token is the most frequent there.
        """
        if length < 1 or len(context_ids) < self.MIN_MATCH:
            return []
        ids, recent = self._ids, context_ids[-self.MAX_MATCH :]
        pair = (recent[-2] << 32) | recent[-1]
        low, high = (
            np.searchsorted(self._pairs, pair, "left"),
            np.searchsorted(self._pairs, pair, "right"),
        )
        places = self._order[low:high] + 2  # where the guess would begin
        places = places[places < len(ids)]  # the text's end has no continuation
        if not len(places):
            return []
        for back in range(self.MIN_MATCH + 1, len(recent) + 1):
            # A place nearer to the start than ``back`` would wrap round to the end.
            further = places[(ids[places - back] == recent[-back]) & (places >= back)]
            if not len(further):
                break
            places = further
        place = places[0]
        if len(places) > 1:
            follows = ids[places]
            kinds, counts = np.unique(follows, return_counts=True)
            place = places[np.argmax(follows == kinds[counts.argmax()])]
        return ids[place : place + length].tolist()


# How many tokens are guessed at a time: twice as many after each guess that was right to the end, after
# any other as many as were right. The longest makes a pass of 64 tokens with the one that waits for its turn;
# beyond that nothing is gained. A wrong guess costs time, so after one of which nothing was right the next so
# many tokens are not guessed: 1, then 2, 4, ..., until something is right again.
FIRST_GUESS, SHORTEST_GUESS, LONGEST_GUESS, LONGEST_PAUSE = 32, 2, 63, 16


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    draft: Draft | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time.

    Greedy at ``temperature`` 0. The same ``seed`` gives the same tokens, with a draft and without (see the
    top of this file for the one exception); None draws one. An empty prompt starts from a line's start. To
    stop, close the iterator or leave the loop: nothing is computed after the token in hand, but for what
    one pass has already found. ``stats`` is filled in as the text grows.

    Raises ValueError at once for a setting out of range or a prompt that is not the model's, and while it
    runs for logits that are not finite.
    """
    check_knobs(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a number of 64 bits, not {seed}")
    prompt = [int(token) for token in prompt_ids] or [min(NEWLINE, model.config.vocab_size - 1)]
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(f"the prompt's token ids must lie in 0..{model.config.vocab_size - 1}")
    choose = functools.partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    random = torch.Generator()  # on the CPU for every device: the same seed, the same numbers
    random.seed() if seed is None else random.manual_seed(seed)
    return _generate(
        model, prompt, max_new_tokens, choose, random, draft, stats or GenerationStats()
    )


@torch.inference_mode()
def _generate(model, prompt, max_new_tokens, choose, random, draft, stats) -> Iterator[int]:
    began = time.perf_counter()
    reader = CachedReader(model)
    context, pending = list(prompt), list(prompt)
    guess, pause, resting = FIRST_GUESS, 1, 0
    left = max_new_tokens
    while left > 0:
        proposal = []
        if resting:
            resting -= 1
        elif draft is not None:
            length = min(guess, left - 1, reader.room(len(pending)))
            proposal = draft.propose(context, length)
        ids = torch.tensor([pending + proposal], device=model.device)
        logits = reader.read(ids, wanted=len(proposal) + 1)[0]
        tokens = choose(logits, proposal, random)
        right = len(tokens) - 1  # the last one is the model's own
        reader.undo(len(proposal) - right)
        if proposal and right == len(proposal):
            guess, pause = min(2 * guess, LONGEST_GUESS), 1
        elif proposal and right:
            guess, pause = max(right, SHORTEST_GUESS), 1
        elif proposal:
            guess, resting, pause = SHORTEST_GUESS, pause, min(2 * pause, LONGEST_PAUSE)
        stats.passes += 1
        stats.proposed += len(proposal)
        stats.accepted += right
        context += tokens
        pending = tokens[-1:]
        for token in tokens:
            elapsed = time.perf_counter() - began
            stats.seconds += elapsed
            stats.tokens += 1
            if left == max_new_tokens:
                stats.first_token_seconds = elapsed
            left -= 1
            yield token
            began = time.perf_counter()
    stats.seconds += time.perf_counter() - began


def _choose(logits, proposal, random, *, temperature, top_k, top_p) -> list[int]:
    """Logits (len(proposal) + 1, V) -> the tokens that the model says, as far as the proposal says the same.

    The first token that differs is the last: what was computed after it followed a wrong guess. Drawing from
    the model and comparing accepts a guess x with probability p(x) and otherwise draws from p without x,
    which is what speculative sampling does where the draft is certain of its guess.
    """
    if temperature < COLDEST:
        best, choices = logits.max(-1)
        if not torch.isfinite(best).all():
            raise ValueError(
                "the model's logits are not finite numbers: the weights are damaged or diverged"
            )
        choices = iter(choices.tolist())
    else:
        choices = (
            draw(
                next_token_probs(row, temperature, top_k, top_p),
                torch.rand((), generator=random, dtype=torch.float64).item(),
            )
            for row in logits
        )
    tokens = []
    for guess in [*proposal, None]:
        tokens.append(next(choices))
        if tokens[-1] != guess:
            break
    return tokens


# ---------------------------------------------------------------------------- the streaming loop


def stream_text(
    model: GPT,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    draft: Draft | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[str]:
    """Continue a text, in pieces of whole characters; the pieces together are the continuation.

    It ends after ``max_new_tokens``, at the end-of-text token, or before the ``stop`` string that is
    complete first, which is never part of a piece, not even its first letters: text that could still become
    one is held back. The rest is as in ``generate``.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(stops):
        raise ValueError("a stop string must have at least one character")
    tokens = generate(
        model,
        encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        draft=draft,
        stats=stats,
    )
    return _stream(tokens, stops)


def _stream(tokens: Iterator[int], stops: list[str]) -> Iterator[str]:
    decoder, held = StreamDecoder(), ""
    with contextlib.closing(tokens):  # who closes this iterator stops the model too
        for token in tokens:
            if token == END_OF_TEXT:
                break
            held += decoder.feed(token)
            ready, found = _until_stop(held, stops)
            if ready:
                yield ready
            if found:
                return
            held = held[len(ready) :]
    held, _ = _until_stop(held + decoder.flush(), stops, final=True)
    if held:
        yield held


def _until_stop(text: str, stops: list[str], final: bool = False) -> tuple[str, bool]:
    """What of a text may be shown, and whether a stop string has been found in it.

    Unless ``final``, an end that is the beginning of a stop string is kept for later.
    """
    found = [(place + len(s), place) for s in stops if (place := text.find(s)) >= 0]
    if found:
        return text[: min(found)[1]], True  # the first to be complete; of two, the longer
    if final:
        return text, False
    longest = max((len(s) for s in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return text[:-size], False
    return text, False


# ---------------------------------------------------------------------------- fewer bytes

# What "auto" chooses from. int8 is left out: it changes the model's answers (see ``Int8Linear``), so it is
# for whoever asks for it. The others keep them: benchmarks/sampling.py --quality measures how well.
AUTO_KINDS = ("fp32", "fp16", "bf16")
KINDS = (*AUTO_KINDS, "int8")
# What PyTorch raises for a kernel that this build or processor lacks.
NO_KERNEL = (RuntimeError, AttributeError, NotImplementedError)


class HalfLinear(nn.Module):
    """A linear layer that stores its weights in fp16 and computes in fp32, for a CPU.

    A processor without half-precision arithmetic still loads half-precision numbers, and reading them is what
    takes the time. PyTorch carries FBGEMM's kernel for just that.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight (out, in), bias (out,). Raises RuntimeError where this PyTorch has no such kernel."""
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """A linear layer in 8-bit integers, for a CPU: a quarter of the bytes, and coarser.

    Each output's weights share a scale, and so do the numbers of each token (its row of x), found anew
    at every call: y = (x / s) W^T s. Within a row everything is exact integer arithmetic, so a token's
    result does not depend on the tokens beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight (out, in), bias (out,). Raises RuntimeError where this PyTorch has no such kernel."""
        super().__init__()
        self.levels = _activation_levels()
        self.packed = _pack_int8(weight.float())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-20)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.levels, self.levels + 1, self.packed
        )
        return y * scale if self.bias is None else torch.addcmul(self.bias, y, scale)


def _pack_int8(weight: Tensor):
    scale = weight.abs().amax(1).clamp(min=1e-20).double() / 127
    zero = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch 2.13 warns that quantised tensors will go. Where they have gone, ``fast_copy`` says so.
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(weight, None)


@functools.cache
def _activation_levels() -> int:
    """Into how many steps a number and its negative are cut: 127, or 63 on processors before VNNI.

    The older ones add two products of bytes in 16 bits, which overflow if both are large. Tried out, as no
    flag says it.
    """
    ones = torch.ones(1, 64)
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        ones * 127, 1.0, 128, _pack_int8(ones.repeat(8, 1))
    )
    return 127 if torch.allclose(y, torch.full_like(y, 127.0 * 64), rtol=1e-3) else 63


class HalfEmbedding(nn.Module):
    """Rows of a table in fp16, given out in fp32. Only the rows asked for are read."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight.half())

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


class FastGPT(GPT):
    """A GPT whose matrices are packed for reading: for sampling only, it cannot be trained or saved."""

    def __init__(self, model: GPT, linear: type[HalfLinear | Int8Linear]):
        nn.Module.__init__(self)
        self.config = model.config
        self._parameters_before = model.num_parameters()
        slim = _with_parameters(model, torch.float32)
        self.h, self.ln_f, self.wpe = slim.h, slim.ln_f, slim.wpe
        for block in self.h:
            for part in (block.attn, block.mlp):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, linear(layer.weight.detach(), layer.bias.detach()))
        # The order of attention's sums depends on how many tokens are read at once. In fp32 that moves the
        # last digits, and one that lies on the edge between two of int8's few levels falls to the other side.
        self.cache_dtype = torch.float64 if linear is Int8Linear else torch.float32
        weight = model.wte.weight.detach()
        self.wte = HalfEmbedding(weight)
        self.output = linear(weight)
        self.eval()

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def forward(self, ids, targets=None, cache=None, reduction="mean") -> Tensor:
        """As GPT's, but the loss needs the memory of all logits."""
        logits = self.head(self.hidden(ids, cache))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view(targets.shape)

    def num_parameters(self) -> int:
        return self._parameters_before


@torch.no_grad()
def fast_copy(model: GPT, kind: str = "auto") -> tuple[GPT, str]:
    """A copy of the model to sample from, with weights in fewer bytes, and a sentence that says why so.

    ``kind``: "fp32" (shares its weights with the model), "bf16", "fp16", "int8", or "auto", which times a
    few steps of each of ``AUTO_KINDS`` here and now and takes the fastest. Raises ValueError for a kind
    that does not exist or that this machine lacks.
    """
    if kind != "auto":
        if kind not in KINDS:
            raise ValueError(
                f"no such kind of weights: {kind!r}; choose from auto, {', '.join(KINDS)}"
            )
        try:
            return _convert(model, kind), f"Weights in {kind}, as asked."
        except NO_KERNEL as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{kind} weights do not work on this machine: {reason}") from None
    if model.device.type == "cpu":
        kinds = AUTO_KINDS
    elif model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) >= (8, 0):
        kinds = ("fp32", "bf16")
    else:
        kinds = ("fp32", "fp16")
    # A quarter of the model tells which is fastest, and is converted in a quarter of the time.
    probe = _part(model)
    scale = model.num_parameters() / probe.num_parameters()
    probes = {}
    for name in kinds:
        with contextlib.suppress(*NO_KERNEL):
            probes[name] = _convert(probe, name)
            _step_seconds(probes[name])  # the first call sets up what later ones find ready
    # In turns, the best of each: other work on the machine then slows all of them or none.
    turns = [{name: _step_seconds(one) for name, one in probes.items()} for _ in range(3)]
    timings = {name: scale * min(turn[name] for turn in turns) for name in probes}
    kind = min(timings, key=timings.get)
    listed = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in timings.items())
    reason = f"Weights in {kind}, the fastest here: milliseconds a token, {listed}."
    return _convert(model, kind), reason


def _part(model: GPT) -> GPT:
    """A small model of the same shapes, of the first layers and a part of the vocabulary."""
    part = _with_parameters(model, model.wpe.weight.dtype)
    part.h = part.h[: max(1, len(part.h) // 4)]
    part.wte = nn.Embedding.from_pretrained(
        model.wte.weight[: max(1, model.config.vocab_size // 4)]
    )
    part.config = replace(model.config, n_layer=len(part.h), vocab_size=part.wte.num_embeddings)
    return part


def _with_parameters(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy of the structure whose parameters are in ``dtype``; those that were so already are shared."""
    return copy.deepcopy(
        model,
        {
            id(p): p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype))
            for p in model.parameters()
        },
    ).eval()


def _convert(model: GPT, kind: str) -> GPT:
    if kind == "fp32":
        return _with_parameters(model, torch.float32)
    if kind == "bf16":
        return _with_parameters(model, torch.bfloat16)
    if kind == "fp16" and model.device.type != "cpu":
        return _with_parameters(model, torch.float16)
    if model.device.type != "cpu":
        raise RuntimeError(f"{kind} kernels are for a CPU, the model is on {model.device.type}")
    return FastGPT(model, HalfLinear if kind == "fp16" else Int8Linear)


@torch.inference_mode()
def _step_seconds(model: GPT, steps: int = 3) -> float:
    """Seconds for a token: a plain step, plus one token's share of a pass over several at once.

    The second is small, unless a processor has no arithmetic for the format: then prompts and guesses take
    many times as long, and the format is no bargain even where its single steps are.
    """
    n = min(16, model.config.n_positions)
    ids = torch.arange(n, device=model.device)[None] % model.config.vocab_size
    reader = CachedReader(model)

    def timed(ids: Tensor) -> float:
        began = time.perf_counter()
        reader.read(ids, ids.shape[1]).argmax().item()  # .item() waits for a GPU
        return time.perf_counter() - began

    several = timed(ids) / n
    return several + min(timed(ids[:, :1]) for _ in range(steps))


# ---------------------------------------------------------------------------- the command line


def main(arguments: list[str] | None = None) -> int:
    """The command line: the prompt and what follows it, as it is written; returns the exit status."""
    from shakespeare_gpt.checkpoint import CheckpointError, chosen_weights, load_model

    parser = argparse.ArgumentParser(
        prog="python -m shakespeare_gpt.generate",
        description="Let a trained model continue a prompt. What the weights are goes to standard error.",
        epilog="Example: python -m shakespeare_gpt.generate 'JULIET:\\n' --temperature 0",
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        default="",
        help=r"\n in it is a line break; without one it begins a line",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=".pt or .safetensors (default: the newest in checkpoints/)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, help="(default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the best token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="keep the k best; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the best that reach p")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    knobs = {k: v for k, v in vars(options).items() if k not in ("prompt", "weights")}
    prompt = options.prompt.replace("\\n", "\n")
    utf8_output()
    try:
        weights = chosen_weights(options.weights)
        model, meta = load_model(weights, vocab_size=VOCAB_SIZE)
        known = {k: meta.get(k) for k in ("preset", "text_name", "steps", "loss")}
        about = {k: v for k, v in known.items() if v is not None} | knobs
        print("#", " ".join(f"{k}={v}" for k, v in about.items()), file=sys.stderr, flush=True)
        pieces = stream_text(
            model, prompt, **knobs
        )  # refuses impossible knobs before anything is printed
        print(prompt, end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except BrokenPipeError:  # `| head` has seen enough; Python's last flush must not complain
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
