"""What has been learnt by heart: the loss of every token, exact recall, and what in a text is quoted.

Carlini et al. (2023) call a passage memorised if the model, given what stands before it, continues it word
for word with greedy decoding. ``exact_recall`` asks that at many places; ``Source`` asks the reverse question,
which words of a generated text stand in the learnt one, and where.

From a shell, what a set of weights knows, measured anew: ``python -m shakespeare_gpt.recite --help``.
"""

from __future__ import annotations

import argparse
import bisect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shakespeare_gpt.data import Text, windows
from shakespeare_gpt.generate import CachedReader
from shakespeare_gpt.model import GPT
from shakespeare_gpt.tokenizer import VOCAB_SIZE, encode, token_bytes, utf8_output

# ---------------------------------------------------------------------------- how well it is known

ROWS = 256  # logits of so many tokens exist at a time: 51 MB
WINDOW_TOKENS = 2048  # read in one pass


@dataclass(frozen=True)
class Scores:
    """For each token of a text but the first: (n - 1,) each, on the CPU."""

    losses: Tensor  # float32, nats: -log of the probability that the model gave it
    right: Tensor  # bool: whether the model held it for the most probable

    @property
    def loss(self) -> float:
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()


@torch.inference_mode()
def score(model: GPT, ids: Tensor) -> Scores:
    """Loss and hit or miss of every token of a text ``ids`` (n,), n >= 2, in one reading.

    The text is cut as in ``data.windows``: a token is predicted from what stands before it in its window,
    and each counts once. A text shorter than one window is one short window. Raises ValueError for a text
    in which there is nothing to predict.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    n, context = len(ids), model.config.n_positions
    if n < 2:
        raise ValueError("a text must have at least 2 tokens: the first one is not predicted")
    if n <= context:
        x, y, counted = ids[None, :-1], ids[None, 1:], torch.ones(1, n - 1, dtype=torch.bool)
    else:
        _, x, y, counted = windows(ids, context)
    losses, right = torch.empty(y.shape), torch.empty(y.shape, dtype=torch.bool)
    batch = max(1, WINDOW_TOKENS // x.shape[1])
    for i in range(0, len(x), batch):
        hidden = model.hidden(x[i : i + batch].to(model.device)).flatten(0, 1)
        labels = y[i : i + batch].flatten().to(model.device)
        rows = [
            _score_rows(model.head(h), t)
            for h, t in zip(hidden.split(ROWS), labels.split(ROWS), strict=True)
        ]
        losses[i : i + batch] = torch.cat([loss for loss, _ in rows]).view_as(x[i : i + batch])
        right[i : i + batch] = torch.cat([hit for _, hit in rows]).view_as(x[i : i + batch])
    return Scores(losses[counted], right[counted])


def _score_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (r, V), labels (r,) -> losses (r,), hits (r,)."""
    logits = logits.float()
    label = logits.gather(1, labels[:, None])[:, 0]
    best, first = logits.max(1)
    # In place: a CPU takes as long to get 51 MB of new memory as to fill them.
    losses = logits.sub_(best[:, None]).exp_().sum(1).log() + best - label
    return losses.cpu(), (first == labels).cpu()


@dataclass(frozen=True)
class Recall:
    """How far the model recited at each of several places."""

    starts: list[int]  # where each prompt begins in the text
    matched: Tensor  # (places,) int64: tokens of the continuation that are right, up to the first wrong one
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
            f"Exact recall at {len(self.starts)} places after {self.prompt_tokens} tokens: "
            f"median {self.median:g} of {self.continuation} tokens, mean {self.mean:.1f}, "
            f"all right at {self.perfect:.0%}"
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
    batch_size: int = 200,
) -> Recall:
    """Prompt with a few tokens of the text ``ids`` (n,), continue greedily, count what matches.

    The places are drawn at any offset of the text, without repetition, by ``seed`` (all of them where the text
    has fewer), or given as ``starts``, the offsets of the prompts. They are continued side by side, in
    batches with one cache. Raises ValueError for a text too short for one place and for starts outside it.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if prompt_tokens < 1 or continuation < 1 or places < 1:
        raise ValueError("prompt_tokens, continuation and places must each be at least 1")
    possible = len(ids) - prompt_tokens - continuation + 1
    if possible < 1:
        raise ValueError(
            f"a text of {len(ids)} tokens is too short for {prompt_tokens} tokens of prompt and "
            f"{continuation} of continuation"
        )
    if starts is None:
        order = torch.randperm(possible, generator=torch.Generator().manual_seed(seed))
        starts = order[:places].sort().values
    starts = torch.as_tensor(starts, dtype=torch.int64)
    if not len(starts) or starts.min() < 0 or starts.max() >= possible:
        raise ValueError(f"starts must lie in 0..{possible - 1}, and there must be at least one")
    passages = ids[starts[:, None] + torch.arange(prompt_tokens + continuation)]
    matched = []
    for batch in passages.split(batch_size):
        truth = batch[:, prompt_tokens:].to(model.device)
        reader = CachedReader(model, len(batch))
        read, told = batch[:, :prompt_tokens].to(model.device), []
        for _ in range(continuation):
            read = reader.read(read)[:, -1].argmax(-1, keepdim=True)
            told.append(read)
        hits = torch.cat(told, 1) == truth
        matched.append(hits.cumprod(1).sum(1).cpu())
    return Recall(starts.tolist(), torch.cat(matched), prompt_tokens, continuation)


def window_starts(tokens: int, context: int, asked: int, places: int = 200) -> Tensor:
    """Where the windows of a text of ``tokens`` begin (see ``data.windows``): (p,), p <= ``places``.

    Evenly spaced over the text, and only those after which ``asked`` tokens follow; of a text shorter than one
    window its beginning.
    """
    if tokens <= context:
        return torch.zeros(1, dtype=torch.int64)
    starts = windows(torch.arange(tokens), context)[0]
    starts = starts[starts <= tokens - asked]
    return starts[torch.linspace(0, len(starts) - 1, min(places, len(starts))).long()]


def first_difference(a: Sequence, b: Sequence) -> int | None:
    """Where two sequences (texts, token ids) first differ; None where they are equal.

    Where one is the beginning of the other, that is the length of the shorter.
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


# ---------------------------------------------------------------------------- quoted or invented

# A name on a line of its own, at the beginning or after a blank line: how the plays mark who speaks.
SPEAKER = re.compile(r"(?:\A|\n[ \t]*\n|\A\n)([^\n:]{1,60}):[ \t]*(?=\n)")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Span:
    """A part of a generated text that stands word for word in the learnt one."""

    start: int  # characters of the generated text: generated[start:end]
    end: int
    offset: int  # in the learnt text: text[offset : offset + end - start] is the same
    speaker: str  # who speaks there; "" before the first name
    line: int  # from 1, of the first character that is not white space

    @property
    def place(self) -> str:
        """Where it stands: "HAMLET, line 1,234"."""
        return f"{self.speaker}, line {self.line:,}" if self.speaker else f"line {self.line:,}"


class Source:
    """Finds what a generated text quotes from a learnt one: runs of at least ``min_tokens`` tokens.

    The generated text is encoded again and compared token by token, so a run may begin and end at any
    token. GPT-2's tokens never cross from one word into the next, so within a run the two texts are encoded
    alike; but the same word has another token after a space than at the beginning of a line, and a word or
    blank line that is cut at the end of the generated text has other tokens than the whole one. So at both
    ends a run is lengthened, character by character, by whole words that are the same.

    Building it takes one sort of the text's runs (a fraction of a second for a million characters); ``spans``
    then takes a few milliseconds for a page, little enough to be called again on a growing text.
    """

    def __init__(self, text: Text, min_tokens: int = 8):
        if min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {min_tokens}")
        self.text, self.min_tokens = text.text, min_tokens
        self._ids = np.asarray(text.ids, dtype=np.int64)
        self._offsets = _offsets(self._ids, text.text)[0]
        hashes = self._hashes(self._ids)
        self._order = np.argsort(hashes, kind="stable")
        self._hashed = hashes[self._order]
        self._lines = [match.end() for match in re.finditer("\n", self.text)]
        names = list(SPEAKER.finditer(self.text))
        self.speakers = [match[1] for match in names]  # of each speech, in the order of the text
        self._speeches = [match.start(1) for match in names]

    def _hashes(self, ids: np.ndarray) -> np.ndarray:
        """One number for each run of ``min_tokens``: (n - min_tokens + 1,) uint64. Equal runs, equal numbers."""
        count = max(0, len(ids) - self.min_tokens + 1)
        total = np.zeros(count, np.uint64)
        for i in range(self.min_tokens):
            total = total * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + count].astype(np.uint64)
        return total

    def spans(self, generated: str) -> list[Span]:
        """Every part of ``generated`` that is quoted, from left to right, without overlap.

        Exactly the tokens that belong to a run of ``min_tokens`` or more in the learnt text are covered, but
        blank lines alone are no quotation. Of several places the longest agreement wins, then the earliest. Where one quotation runs into another,
        the second begins where the first ends, and may then itself be shorter than ``min_tokens``.
        """
        generated = SURROGATE.sub("\ufffd", generated)  # as the tokenizer reads it
        ids = np.asarray(encode(generated), dtype=np.int64)
        hashes = self._hashes(ids)
        low = np.searchsorted(self._hashed, hashes, "left")
        high = np.searchsorted(self._hashed, hashes, "right")
        begins, ends = _offsets(ids, generated)
        spans, covered = [], 0  # tokens before ``covered`` are done
        for i in np.flatnonzero(high > low).tolist():
            if i + self.min_tokens <= covered:
                continue
            places = self._order[low[i] : high[i]]
            place, length = self._longest(ids[i:], places)
            if length < self.min_tokens or i + length <= covered:
                continue  # two different runs with the same number
            first = max(i, covered)
            begin, end = int(begins[first]), int(ends[i + length])
            offset = int(self._offsets[place + first - i])
            covered, free = i + length, spans[-1].end if spans else 0
            if end > free:  # what the span before this one, lengthened, has left of it
                shown = max(begin, free)
                span = self._span(generated, shown, end, offset + shown - begin, free)
                if not generated[span.start : span.end].isspace():
                    spans.append(span)
        return spans

    def segments(self, generated: str) -> list[tuple[str, Span | None]]:
        """The generated text in pieces, each with the span that it is or None: for highlighting."""
        pieces, at = [], 0
        for span in self.spans(generated):
            if span.start > at:
                pieces.append((generated[at : span.start], None))
            pieces.append((generated[span.start : span.end], span))
            at = span.end
        if at < len(generated):
            pieces.append((generated[at:], None))
        return pieces

    def _longest(self, ids: np.ndarray, places: np.ndarray) -> tuple[int, int]:
        """Of the places (p,) where ``ids`` may stand: the one that agrees longest, and how many tokens."""
        length = 0
        while len(places) > 1:
            inside = places[places + length < len(self._ids)]
            agreeing = (
                inside[self._ids[inside + length] == ids[length]]
                if length < len(ids)
                else inside[:0]
            )
            if not len(agreeing):
                return int(places[0]), length
            places, length = agreeing, length + 1
        theirs = self._ids[places[0] : places[0] + len(ids)]
        wrong = np.flatnonzero(theirs != ids[: len(theirs)])
        return int(places[0]), int(wrong[0]) if len(wrong) else len(theirs)

    def _span(self, generated: str, begin: int, end: int, offset: int, free: int) -> Span:
        """Add the words at both ends that only their tokens kept out, and say who speaks where.

        ``free``: where the span before this one ends in the generated text.
        """
        text, shift = self.text, offset - begin  # generated[i] is text[i + shift]
        low = begin
        while low > max(free, -shift, begin - EDGE) and generated[low - 1] == text[low - 1 + shift]:
            low -= 1
        while low < begin and not _may_begin(generated, text, low, shift):
            low += 1
        limit, high = min(len(generated), len(text) - shift, end + EDGE), end
        while high < limit and generated[high] == text[high + shift]:
            high += 1
        while high > end and not _may_end(generated, text, high, shift):
            high -= 1
        quoted = generated[low:high]
        first = low + shift + len(quoted) - len(quoted.lstrip())
        speech = bisect.bisect_right(self._speeches, first) - 1
        return Span(
            low,
            high,
            low + shift,
            self.speakers[speech] if speech >= 0 else "",
            bisect.bisect_right(self._lines, first) + 1,
        )


EDGE = 40  # characters: how far beyond its tokens a span may reach, a word or two


def quoted_share(source: Source, generated: str) -> float:
    """The share of a text's characters, white space apart, that is quoted; 0 for an empty one."""
    total = len("".join(generated.split()))
    quoted = [generated[span.start : span.end] for span in source.spans(generated)]
    return sum(len("".join(piece.split())) for piece in quoted) / total if total else 0.0


def _may_begin(generated: str, text: str, at: int, shift: int) -> bool:
    """Whether a span may begin there: with a whole word, or with the generated text."""
    return at == 0 or not (
        generated[at].isspace() or _in_word(generated, at) or _in_word(text, at + shift)
    )


def _may_end(generated: str, text: str, at: int, shift: int) -> bool:
    """Whether a span may end there: after a whole word, or with the generated text."""
    return at == len(generated) or not (
        generated[at - 1].isspace() or _in_word(generated, at) or _in_word(text, at + shift)
    )


def _in_word(text: str, at: int) -> bool:
    """Whether the characters before and after ``at`` belong to one word."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _offsets(ids: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of a text lie, in characters: begins and ends, (n + 1,) each.

    Token i is text[begins[i] : ends[i + 1]]. The two arrays are the same but where a character's bytes lie in
    two tokens: such a character counts for neither.
    """
    kinds, index = np.unique(ids, return_inverse=True)
    sizes = np.array([len(token_bytes(int(kind))) for kind in kinds], dtype=np.int64)
    edges = np.concatenate([[0], np.cumsum(sizes[index])]) if len(ids) else np.zeros(1, np.int64)
    if text.isascii():
        return edges, edges
    raw = np.frombuffer(text.encode("utf-8"), np.uint8)
    # How many characters begin before each byte; a byte 10xxxxxx continues a character.
    begun = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])
    inside = np.append((raw & 0xC0) == 0x80, False)[edges]
    return begun[edges], begun[edges] - inside


# ---------------------------------------------------------------------------- the command line


def main(arguments: list[str] | None = None) -> int:
    """The command line: measure what weights know; returns 0 if the whole text is under the target, 1 if not.

    2 for what cannot be measured.
    """
    from shakespeare_gpt.checkpoint import chosen_weights, load_model
    from shakespeare_gpt.export import learnt_text
    from shakespeare_gpt.train import TARGET, default_device, device_name

    parser = argparse.ArgumentParser(
        prog="python -m shakespeare_gpt.recite",
        description="Measure, in full precision, how well weights know their text by heart: the mean loss over "
        "every token, and how much is recited word for word. Nothing is taken over from what the file says.",
        epilog="The exit status is 0 if the whole text is under the target, 1 if not, 2 if it cannot be measured.",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=".pt or .safetensors (default: the newest in checkpoints/)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="the text that they learnt, if it is your own"
    )
    parser.add_argument("--device", help="cuda, cpu, ... (default: the GPU if there is one)")
    options = parser.parse_args(arguments)
    utf8_output()
    try:
        weights = chosen_weights(options.weights)
        device = default_device(options.device)
        model, meta = load_model(weights, device, vocab_size=VOCAB_SIZE)
        text = learnt_text(meta, options.text)
        ids, context = text.ids, model.config.n_positions
        print(
            f"{weights}: {model.num_parameters():,} parameters, {text.name}, {len(ids):,} tokens, "
            f"on {device_name(device)}",
            flush=True,
        )
        scores = score(model, ids)
        known = scores.loss < TARGET
        print(
            f"whole text: {scores.loss:.4f} nats per token, {'' if known else 'not '}under {TARGET}; "
            f"{scores.accuracy:.2%} are the first guess",
            flush=True,
        )
        given, asked = (32, 50) if context >= 128 else (8, 16)
        asked = min(asked, len(ids) - given)
        if asked > 0:
            starts = window_starts(len(ids), context, given + asked)
            for where, chosen in (("window starts", starts), ("anywhere", None)):
                recall = exact_recall(
                    model, ids, prompt_tokens=given, continuation=asked, starts=chosen
                )
                print(f"from {where}: {recall}", flush=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        # Our own errors are among these, and what torch raises for a device that is not there or is full.
        print(f"error: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0 if known else 1


if __name__ == "__main__":
    sys.exit(main())
