"""GPT-2's tokenizer: text to token ids and back, without any download.

The method is byte-pair encoding over UTF-8 bytes (Sennrich et al., 2016; Radford et al., 2019). A pattern
cuts the text into words. Within a word the two neighbours with the lowest rank in the vocabulary are merged,
again and again. Any text can be encoded, and decoding gives it back exactly.

``tiktoken.get_encoding("gpt2")`` downloads its vocabulary on first use. The same vocabulary lies beside this
file as ``gpt2.tiktoken`` (source and licence in ``gpt2.tiktoken.LICENSE``), and tiktoken's classes read it.
"""

import base64
import functools
from collections.abc import Iterable
from pathlib import Path

import tiktoken

VOCAB_FILE = Path(__file__).with_name("gpt2.tiktoken")
END_OF_TEXT = 50256  # the one token that no text is encoded to: the end of a document
VOCAB_SIZE = 50257

# Contractions; letters, digits and other characters, each with the one space before them; white space.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@functools.cache
def get_encoding() -> tiktoken.Encoding:
    """The ``gpt2`` encoding: 50,256 byte sequences by rank and ``<|endoftext|>``."""
    lines = VOCAB_FILE.read_bytes().splitlines()  # each line: the bytes in base64, a space, the rank
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode(text: str) -> list[int]:
    """The token ids of a text.

    ``<|endoftext|>`` inside a text is thirteen ordinary characters here, never the special token. Half of a
    surrogate pair, which UTF-8 cannot hold, becomes U+FFFD.
    """
    return get_encoding().encode_ordinary(text)


def decode(ids: Iterable[int]) -> str:
    """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
    return get_encoding().decode(list(ids), errors="replace")


def token_bytes(token: int) -> bytes:
    """The bytes of one token: often a word with its space, sometimes a part of one character."""
    return get_encoding().decode_single_token_bytes(token)
