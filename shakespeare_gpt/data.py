"""The text: read or downloaded, turned into token ids, and cut into windows.

``load_text`` knows two names, ``input`` (the play in this repository) and ``tinyshakespeare`` (downloaded
once, checked, kept in a cache), and takes any path to a text file of your own.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shakespeare_gpt.tokenizer import encode

REPOSITORY = Path(__file__).resolve().parent.parent
INPUT_TXT = REPOSITORY / "input.txt"
TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Another address, or a file that is already here, for machines that cannot reach the one above.
SOURCE_VARIABLE = "SHAKESPEARE_GPT_TINYSHAKESPEARE"
CACHE_VARIABLE = "SHAKESPEARE_GPT_CACHE"


class TextError(ValueError):
    """A text that cannot be used; the message is one line that says what to do."""


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


def load_text(
    source: str | os.PathLike = "input", *, context: int = 256, max_tokens: int | None = None
) -> Text:
    """Read a text: ``"input"``, ``"tinyshakespeare"`` or the path of a UTF-8 file.

    ``max_tokens`` keeps only the beginning. Raises TextError, with one line that says what to do, for a
    file that is missing, empty, not UTF-8, or shorter than one window of ``context`` + 1 tokens.
    """
    if source == "input":
        path, name = INPUT_TXT, "input"
    elif source == "tinyshakespeare":
        path, name = tiny_shakespeare(), "tinyshakespeare"
    else:
        path = Path(source).expanduser()
        name = path.stem
    text = _read(path)
    ids = torch.tensor(encode(text), dtype=torch.int64)
    if max_tokens is not None and len(ids) > max_tokens:
        # Cut at the end of a line, so that text and ids say the same.
        text = text[: text.find("\n", len(text) * max_tokens // len(ids)) + 1] or text
        ids = torch.tensor(encode(text), dtype=torch.int64)
    if len(ids) < context + 1:
        raise TextError(
            f"{path.name} has only {len(ids)} tokens: one window takes {context + 1}. "
            "Give a longer text (about a page)."
        )
    return Text(name, text, ids)


def _read(path: Path) -> str:
    """A text file's content, with line ends as ``\\n`` and without a byte-order mark."""
    if path.is_dir():
        raise TextError(f"{path} is a folder: name a text file.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path} does not exist: check the path of your text file.") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = re.sub("\r+\n", "\n", raw.decode("utf-8").lstrip("\ufeff"))
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 (byte {error.start}): save it again with the encoding UTF-8."
        ) from None
    if not text.strip():
        raise TextError(f"{path} is empty: put the text to learn into it.")
    # The tokenizer's pattern fails at about a million, in the middle of tiktoken's Rust.
    if max(map(len, re.findall(r"\s+", text)), default=0) > 100_000:
        raise TextError(f"{path} holds more than 100,000 blanks in a row: remove them.")
    return text


def tiny_shakespeare() -> Path:
    """The path of Tiny Shakespeare: 1,115,394 characters from the plays, 338,025 tokens.

    Looks, in this order, at the file in SHAKESPEARE_GPT_TINYSHAKESPEARE, the cache, and the address in that
    variable or else the public one. A download is written beside its place and moved there only when its SHA-256 is right, so a
    failed one leaves nothing behind. Raises TextError.
    """
    source = os.environ.get(SOURCE_VARIABLE, "")
    if source and "://" not in source:
        path = Path(source).expanduser()
        if not path.is_file():
            raise TextError(
                f"{SOURCE_VARIABLE} names {path}, which is no file: correct or unset it."
            )
        if _sha256(path, f"correct or unset {SOURCE_VARIABLE}") != TINY_SHAKESPEARE_SHA256:
            raise TextError(
                f"{SOURCE_VARIABLE} names {path}, which is not Tiny Shakespeare (its SHA-256 differs): "
                "to learn another text, use --text or SHAKESPEARE_GPT_TEXT."
            )
        return path
    folder = os.environ.get(CACHE_VARIABLE)
    cache = Path(folder).expanduser() if folder else Path.home() / ".cache" / "shakespeare_gpt"
    path = cache / "tinyshakespeare.txt"
    remedy = f"set {CACHE_VARIABLE} to a folder of your own"
    if path.is_file() and _sha256(path, remedy) == TINY_SHAKESPEARE_SHA256:
        return path
    _download(source or TINY_SHAKESPEARE_URL, path)
    return path


def _sha256(path: Path, remedy: str) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None


def _download(url: str, path: Path, timeout: float = 20.0) -> None:
    """Fetch ``url`` to ``path`` with a progress bar; TextError and no trace if it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".download-")
    except OSError as error:
        raise TextError(
            f"The cache {path.parent} cannot be written ({error.strerror}): "
            f"set {CACHE_VARIABLE} to a folder that can."
        ) from None
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=timeout) as reply:
            size, done = int(reply.headers.get("Content-Length") or 0), 0
            while block := reply.read(1 << 16):
                file.write(block)
                digest.update(block)
                done += len(block)
                _progress(done, size)
        if digest.hexdigest() != TINY_SHAKESPEARE_SHA256:
            raise TextError(
                f"What {url} sent is not Tiny Shakespeare (its SHA-256 differs); nothing was kept. "
                f"Set {SOURCE_VARIABLE} to another address or to a file."
            )
        os.chmod(name, 0o644)  # a cache may be shared
        os.replace(name, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        if isinstance(error, TextError):
            raise
        reason = str(getattr(error, "reason", error)).strip()
        raise TextError(
            f"Tiny Shakespeare could not be downloaded ({reason}); nothing was "
            f"kept. Try again, or set {SOURCE_VARIABLE} to another address or to a file."
        ) from None
    finally:
        Path(name).unlink(missing_ok=True)


def _progress(done: int, size: int) -> None:
    """One line that rewrites itself; only where somebody watches."""
    if sys.stderr.isatty():
        share = min(1.0, done / size) if size else 0.0
        bar = "#" * int(30 * share)
        end = "\n" if size and done >= size else ""
        sys.stderr.write(f"\rTiny Shakespeare [{bar:<30}] {done / 1e6:.1f} MB{end}")
        sys.stderr.flush()


def windows(ids: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a text into windows of ``context`` tokens, each beside what follows each of its tokens.

    ids (n,) -> starts (w,), x (w, T), y (w, T), counted (w, T), where y is x moved on by one token. The
    windows stand side by side, so every token but the first is a target. Only the last window overlaps the
    one before it, to be as long as the others; ``counted`` is False where it repeats, so that summing over
    ``counted`` meets each of the n - 1 targets exactly once. Raises TextError for a text shorter than one
    window.
    """
    n = len(ids)
    if n < context + 1:
        raise TextError(f"A text of {n} tokens has no window of {context} + 1.")
    starts = torch.arange(0, n - 1, context)
    fresh = starts[-1].item()  # where the last window would begin
    starts[-1] = n - 1 - context
    index = starts[:, None] + torch.arange(context)
    counted = torch.ones_like(index, dtype=torch.bool)
    counted[-1] = index[-1] >= fresh
    return starts, ids[index], ids[index + 1], counted
