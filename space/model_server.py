"""The model behind the page: the text that it learnt, and the one thread in which it computes."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shakespeare_gpt.data import TINY_SHAKESPEARE_SHA256, Text, TextError, load_text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.publish.quotations import QuotationIndex
from shakespeare_gpt.runs.weights import load_model
from shakespeare_gpt.sample import GenerationStats, generate, stream_text
from shakespeare_gpt.speed.ngram_draft import NgramDraft
from shakespeare_gpt.speed.sampling_weights import for_sampling
from shakespeare_gpt.tokenizer import VOCAB_SIZE, decode, token_bytes

MAX_PROMPT = 2_000  # characters; the model sees only its last few hundred tokens anyway
MAX_LENGTH, MAX_RECITATION = 400, 200  # tokens
MAX_TEMPERATURE, MAX_TOP_K = 1.5, 200  # a higher temperature draws from all of GPT-2's vocabulary
PROMPT_TOKENS = 32  # tokens of the text that the model reads before it recites
UPDATE_SECONDS = 0.05  # between two updates of a growing text

# By the text's SHA-256, since many files are called input.txt: its title, and what it is.
INPUT_SHA256 = "0eacf58f0f9b1673cb26382a718ac11d928bbe810d4528e899bd7f80a1f17aa6"
TITLES = {
    INPUT_SHA256: ("The Warden of Skerrow", "a play in Shakespeare's manner"),
    TINY_SHAKESPEARE_SHA256: ("Tiny Shakespeare", "a million characters of his plays"),
}


@dataclass
class Answer:
    """A prompt and its continuation, as far as it has come."""

    prompt: str
    seed: int
    text: str = ""
    stats: GenerationStats = field(default_factory=GenerationStats)
    done: bool = False

    def add(self, piece: str) -> None:
        self.text += piece


@dataclass
class Recitation:
    """What follows a line in the text, and what the model recites, as far as it has come."""

    line: int  # from 1
    prompt: str
    original: list[int]  # token ids
    mid_line: bool  # whether the prompt begins inside a line
    recited: list[int] = field(default_factory=list)  # token ids
    stats: GenerationStats = field(default_factory=GenerationStats)
    done: bool = False

    def add(self, token: int) -> None:
        self.recited.append(token)

    @property
    def first_difference(self) -> int | None:
        """The index of the first token that differs, None as long as all agree."""
        pairs = enumerate(zip(self.original, self.recited, strict=False))
        return next((i for i, (theirs, ours) in pairs if theirs != ours), None)

    @property
    def matching(self) -> int:
        """How many tokens agree before the first difference."""
        return len(self.recited) if self.first_difference is None else self.first_difference


class ModelServer:
    """A model, the text that it learnt, and the one thread in which it computes.

    Each request has its own cache and random numbers. One thread computes all their tokens, with all cores:
    requests take turns, token by token, and never compete for the cores.
    """

    def __init__(self, model: GPT, weights: str, text: Text, meta: dict[str, Any]):
        self.model, self.weights = model, weights  # ``weights``: a sentence on their format
        self.text, self.meta = text, meta
        self.quotations, self.draft = QuotationIndex(text), NgramDraft(text.ids)
        self.lines = text.text.split("\n")
        # In bytes: where each token starts, where each line ends
        self._token_starts = np.cumsum([0, *(len(token_bytes(i)) for i in text.ids.tolist())])
        self._line_ends = np.cumsum([len(line.encode("utf-8")) + 1 for line in self.lines]) - 1
        self._thread = ThreadPoolExecutor(1, "model", torch.set_num_threads, (cpu_cores(),))

    @classmethod
    def load(cls, folder: Path) -> ModelServer:
        """Read model.safetensors and text.txt. Raises CheckpointError and TextError."""
        model, meta = load_model(folder / "model.safetensors", vocab_size=VOCAB_SIZE)
        text = load_text(folder / "text.txt", context=1)
        if meta.get("text_sha256") not in (None, text.sha256):
            raise TextError("text.txt is not the text that these weights learnt: stage the Space again.")
        server = cls(*for_sampling(model), text, meta)
        list(server.compute(generate(model, [], max_new_tokens=2)))  # the first call sets things up
        return server

    @property
    def title(self) -> str:
        known = TITLES.get(self.text.sha256)
        return known[0] if known else str(self.meta.get("text_name", "its text"))

    def speeches(self) -> list[tuple[str, int, str]]:
        """(speaker, line number, the line): the first line of each speech; in prose, every line."""
        found = self.quotations.speeches
        if len(found) < 2:
            found = [("", n, line.strip()) for n, line in enumerate(self.lines, 1) if line.strip()]
        last = len(self.lines) - 3  # something must be left to recite
        return [speech for speech in found if speech[1] < last] or found[:1]

    def compute(self, iterator: Iterator) -> Iterator:
        """The items of ``iterator``, each computed in the model's thread when it is asked for."""
        end = object()
        try:
            while (item := self._thread.submit(next, iterator, end).result()) is not end:
                yield item
        finally:  # Gradio closes this in its event loop, which must not wait for the model
            self._thread.submit(iterator.close)

    def _grow(self, growing: Answer | Recitation, items: Iterator) -> Iterator:
        """Yield ``growing`` with its first item, then at most every UPDATE_SECONDS, and when it is done."""
        updated = -math.inf
        with contextlib.closing(self.compute(items)) as items:
            for item in items:
                growing.add(item)
                if time.monotonic() - updated >= UPDATE_SECONDS:
                    yield growing
                    updated = time.monotonic()
        growing.done = True
        yield growing

    def answer(self, prompt, length, temperature, top_k, top_p, seed) -> Iterator[Answer]:
        """Continue a prompt: yields the same Answer as it grows. Closing this iterator stops the model.

        Every input is checked and clamped here, whoever sent it. Raises ValueError, with a line to show.
        """
        given = seed is not None and str(seed).strip()
        seed = check_seed(seed) if given else random.SystemRandom().randrange(2**31)
        answer = Answer(check_prompt(prompt), seed)
        options = {
            "max_new_tokens": int(clamp(length, 1, MAX_LENGTH, 160)),
            "temperature": clamp(temperature, 0.0, MAX_TEMPERATURE, 0.8),
            "top_k": int(clamp(top_k, 0, MAX_TOP_K, 0)),
            "top_p": clamp(top_p, 0.01, 1.0, 1.0),
        }
        resources = {"seed": seed, "draft": self.draft, "stats": answer.stats}
        yield from self._grow(answer, stream_text(self.model, answer.prompt, **options, **resources))

    def recite(self, line, tokens) -> Iterator[Recitation]:
        """Let the model read a line and what stands before it, then continue with temperature 0.

        Lines count from 1. Yields the same Recitation as it grows. Closing this iterator stops the model.
        """
        line = int(clamp(line, 1, len(self.lines), 1))
        tokens = int(clamp(tokens, 1, MAX_RECITATION, 80))
        ids = self.text.ids.tolist()
        # The first token at or after the end of the line. At least one token is left to recite.
        end = int(np.searchsorted(self._token_starts, self._line_ends[line - 1]))
        end = min(max(end, 1), len(ids) - 1)
        start = max(0, end - min(PROMPT_TOKENS, self.model.config.n_positions // 2))
        prompt = decode(ids[start:end]).lstrip("\ufffd")  # half a character
        mid_line = start > 0 and not decode(ids[start - 1 : start]).endswith("\n")
        recitation = Recitation(line, prompt, ids[end : end + tokens], mid_line)
        options = {"max_new_tokens": len(recitation.original), "temperature": 0.0}
        resources = {"draft": self.draft, "stats": recitation.stats}
        yield from self._grow(recitation, generate(self.model, ids[start:end], **options, **resources))


def cpu_cores() -> int:
    """The CPU cores that this process may use: inside a container, often fewer than the machine has."""
    given = os.environ.get("CPU_CORES", "")  # set by Hugging Face
    if given.isdecimal() and int(given):
        return int(given)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count or 1


def clamp(value: Any, low: float, high: float, default: float) -> float:
    """The number nearest to ``value`` between ``low`` and ``high``; ``default`` for what is not a number."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return default if math.isnan(value) else min(max(value, low), high)


def check_prompt(prompt: Any) -> str:
    """The prompt as text that a page can show. Raises ValueError, with a line to show."""
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise ValueError("The prompt must be text.")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"This prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT:,}.")
    prompt = re.sub("[\ud800-\udfff]", "\ufffd", prompt)  # half a character, which no page can show
    return prompt.replace("\r\n", "\n").replace("\0", "\ufffd")


def check_seed(seed: Any) -> int:
    """A seed from 0 to 2^63 - 1. Raises ValueError, with a line to show."""
    digits = str(seed).strip().removesuffix(".0")  # a client may send 7 as 7.0
    if not re.fullmatch("[0-9]{1,19}", digits) or int(digits) >= 2**63:
        raise ValueError("The seed must be a whole number, 0 or more, or empty for a new one.")
    return int(digits)
