"""The text: read or downloaded, turned into token ids, cut into windows, and the order of the windows.

``load_text`` knows three names, ``input`` (the play in this repository), ``input-page`` (its beginning, for
tests) and ``tinyshakespeare`` (downloaded once, checked, kept in a cache), and takes any path to a text file.
"""

import hashlib
import http.client
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.tokenizer import encode

OURS = ("input", "input-page", "tinyshakespeare")
PACKAGE = Path(__file__).resolve().parent
# In a clone input.txt and space/ lie beside the package, after an installation inside it.
SHIPPED = PACKAGE if (PACKAGE / "input.txt").is_file() else PACKAGE.parent
TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 20.0  # seconds without a byte before a download is given up


class TextError(ShakespeareGPTError, ValueError):
    """A text that cannot be used."""


@dataclass(frozen=True)
class Text:
    """A text and its token ids, (n,) int64 on the CPU."""

    name: str
    text: str
    ids: Tensor

    @property
    def sha256(self) -> str:
        """The fingerprint of the text, so that weights can say which text they learnt."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def load_text(source: str | os.PathLike = "input", *, context: int = 256) -> Text:
    """Read a text: one of ``OURS`` by its name, or the path of a UTF-8 file.

    Raises TextError for a file that is missing, empty, not UTF-8, or shorter than ``context`` + 1 tokens.
    """
    if source in OURS:
        path = tiny_shakespeare() if source == "tinyshakespeare" else SHIPPED / "input.txt"
    else:
        path = Path(source).expanduser()
    text = _read(path)
    if source == "input-page":
        text = "".join(text.splitlines(keepends=True)[:66])
    ids = encode(text)
    if len(ids) < context + 1:
        raise TextError(f"{path.name} has only {len(ids)} tokens, not {context + 1}: give a page or more.")
    return Text(source if source in OURS else path.stem, text, torch.tensor(ids, dtype=torch.int64))


def _read(path: Path) -> str:
    """A text file's content, with line ends as ``\\n`` and without a byte-order mark."""
    try:
        text = re.sub("\r+\n", "\n", path.read_bytes().decode("utf-8").lstrip("\ufeff"))
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}): name a text file that can.") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start}): save it again as UTF-8.") from None
    if not text.strip():
        raise TextError(f"{path} is empty: put the text to learn into it.")
    # The tokenizer's pattern fails at about a million, in the middle of tiktoken's Rust.
    if max(map(len, re.findall(r"\s+", text)), default=0) > 100_000:
        raise TextError(f"{path} holds more than 100,000 blanks in a row: remove them.")
    return text


def tiny_shakespeare() -> Path:
    """The path of Tiny Shakespeare: 1,115,394 characters from the plays, 338,025 tokens.

    It is downloaded once and stays in PyTorch's cache. Only the right SHA-256 is taken. Raises TextError.
    """
    path = Path(torch.hub.get_dir()) / "shakespeare_gpt" / "tinyshakespeare.txt"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == TINY_SHAKESPEARE_SHA256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            TINY_SHAKESPEARE_URL, str(path), hash_prefix=TINY_SHAKESPEARE_SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)).strip()
        raise TextError(
            f"Tiny Shakespeare could not be downloaded ({reason}); nothing was kept. Try again, save "
            f"{TINY_SHAKESPEARE_URL} byte for byte as {path} yourself, or set TORCH_HOME to another cache."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def windows(ids: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a text into windows of ``context`` tokens, each beside what follows each of its tokens.

    ids (n,) -> starts (w,), x (w, T), y (w, T), mask (w, T), where y is x moved on by one token. The
    windows stand side by side, so every token but the first is a target. Only the last window overlaps the
    one before it, to be as long as the others; ``mask`` is False where it repeats, so that a sum over
    ``mask`` meets each of the n - 1 targets exactly once. Raises TextError for a text shorter than one
    window.
    """
    n = len(ids)
    if n < context + 1:
        raise TextError(f"A text of {n} tokens has no window of {context} + 1.")
    starts = torch.arange(0, n - 1, context)
    fresh = starts[-1].item()  # where the last window would begin
    starts[-1] = n - 1 - context
    index = starts[:, None] + torch.arange(context)
    mask = torch.ones_like(index, dtype=torch.bool)
    mask[-1] = index[-1] >= fresh
    return starts, ids[index], ids[index + 1], mask


class WindowOrder:
    """Which windows of ``length`` tokens stand in which batch, as a function of its number alone.

    "fixed" windows are always the same, in a new order in each epoch; "sequential" ones are in the text's.
    "moving" ones stand elsewhere in each epoch: the text, read as a ring, is cut anywhere into stretches of
    eight windows, and each stretch is moved by a random part of a window. All is drawn from (seed, epoch),
    so that a resumed run reads what an uninterrupted one would.
    """

    STRETCH = 8

    def __init__(self, tokens: int, length: int, kind: str, seed: int):
        self.tokens, self.length, self.kind, self.seed = tokens, length, kind, seed
        ring = torch.arange(tokens // length) * length
        self.starts = ring if kind == "moving" else windows(torch.arange(tokens), length)[0]

    def epoch(self, number: int) -> Tensor:
        """The starts of all windows of an epoch, in their order; modulo the text's tokens."""
        if self.kind == "sequential":
            return self.starts
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        starts = self.starts[torch.randperm(len(self.starts), generator=generator)]
        if self.kind == "moving":
            cut = torch.randint(self.tokens, (1,), generator=generator)
            moved = torch.randint(self.length, (len(starts) // self.STRETCH + 1,), generator=generator)
            starts = starts + cut + moved[starts // self.length // self.STRETCH]
        return starts

    def batch(self, number: int, size: int) -> Tensor:
        """The starts of a batch's windows, (size,). A batch may begin in one epoch and end in the next."""
        n = len(self.starts)
        first, last = number * size // n, ((number + 1) * size - 1) // n
        order = torch.cat([self.epoch(epoch) for epoch in range(first, last + 1)])
        return order[number * size - first * n :][:size]
