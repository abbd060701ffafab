"""The tokenizer: the known numbers of tokens, and any text there and back."""

import random
import socket

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_gpt import sample
from shakespeare_gpt.tokenizer import (
    END_OF_TEXT,
    VOCAB_SIZE,
    WORD_PATTERN,
    decode,
    encode,
    get_encoding,
    token_bytes,
)

# Everything that UTF-8 can hold: all of Unicode but lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "\t \r\n",
    "don't we'll they've I'm you're he'd",
    "naïve café – “quotes” — ½",
    "🎭👩‍👩‍👧‍👦🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "\x00\x01\x1b[31m\x7f",
    "日本語 עברית العربية",
    "a" * 5000,
    " " * 5000,
    "12345678901234567890",
]


def test_tiny_shakespeare_has_the_known_counts(tiny_shakespeare_path):
    """A wrong merge order or word pattern gives other counts: nobody's results could be compared."""
    ids = encode(tiny_shakespeare_path.read_text(encoding="utf-8"))
    assert len(ids) == 338_025
    assert len(set(ids)) == 11_706


def test_known_ids():
    """Ranks shifted by one, or bytes in another order, would still round-trip: these ids are GPT-2's."""
    assert encode("Hello, world!") == [15496, 11, 995, 0]
    assert encode("First Citizen:\n") == [5962, 22307, 25, 198]
    assert encode("a\n\nb") == [64, 198, 198, 65]  # but 628 where nothing follows
    assert encode("  two") == [220, 734]


def test_size_and_special_token():
    """A vocabulary file with lines lost would leave ids without bytes."""
    encoding = get_encoding()
    assert encoding.n_vocab == VOCAB_SIZE == 50_257
    assert encoding.eot_token == END_OF_TEXT
    pieces = [token_bytes(i) for i in range(END_OF_TEXT)]
    assert len(set(pieces)) == 50_256 and all(pieces)
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    assert token_bytes(END_OF_TEXT) == b"<|endoftext|>"


@given(TEXTS)
def test_any_text_round_trips(text):
    """A cut in the word pattern (a class of characters that it misses) loses text silently."""
    ids = encode(text)
    assert decode(ids) == text
    assert b"".join(map(token_bytes, ids)) == text.encode("utf-8")


@pytest.mark.parametrize("text", AWKWARD, ids=lambda t: repr(t[:12]))
def test_awkward_texts_round_trip(text):
    """Emoji in many parts, control characters, scripts without spaces, very long runs."""
    assert decode(encode(text)) == text


@given(TEXTS, TEXTS)
def test_end_of_text_in_a_text_is_ordinary(before, after):
    """A visitor who types <|endoftext|> must not be able to forge the control token."""
    text = f"{before}<|endoftext|>{after}"
    ids = encode(text)
    assert END_OF_TEXT not in ids
    assert decode(ids) == text


def test_end_of_text_id_decodes():
    """The special id is in the vocabulary, so a model may emit it: decoding must not fail on it."""
    assert decode([END_OF_TEXT]) == "<|endoftext|>"


def test_lone_surrogate_becomes_a_replacement_character():
    """Half a surrogate pair, as a broken paste gives, must not raise in the middle of a notebook."""
    assert decode(encode("a\ud83ab")) == "a\ufffdb"


def streamed(ids) -> list[str]:
    """The pieces in which a model that says ``ids`` is shown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda *_, **__: (i for i in ids))
        return list(sample.stream_text(None, ""))


@given(TEXTS)
def test_a_stream_equals_decode(text):
    """Emitting bytes as they come shows half an emoji as replacement characters."""
    so_far = ""
    for piece in streamed(encode(text)):
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


@given(st.lists(st.integers(0, END_OF_TEXT - 1), max_size=30))
def test_a_stream_of_any_ids(ids):
    """A model at a high temperature emits any bytes: the stream must say what decode says."""
    assert "".join(streamed(ids)) == decode(ids)


def test_a_stream_waits_and_says_what_never_came():
    """A stream that ends inside a character must say so, not swallow it."""
    ids = encode("🎭")
    assert len(ids) > 1
    assert streamed(ids) == ["🎭"] and streamed(ids[:-1]) == ["\ufffd"]


def test_pattern_is_tiktokens():
    """A word pattern of our own making could agree on English and differ on everything else."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    assert public.r50k_pat_str == WORD_PATTERN


def test_agrees_with_tiktokens_own_gpt2():
    """The vocabulary file in the package could be another one than OpenAI's."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        theirs = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"tiktoken's own vocabulary cannot be had here ({type(error).__name__})")
    finally:
        socket.setdefaulttimeout(previous)
    ours = get_encoding()
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert ours._special_tokens == theirs._special_tokens
    letters = random.Random(0)
    for text in [*AWKWARD, *("".join(chr(letters.randrange(0x2FFF)) for _ in range(40)) for _ in range(200))]:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_works_without_a_network(monkeypatch):
    """tiktoken fetches its vocabulary at first use; ours must never open a socket."""

    def refuse(*args, **kwargs):
        raise AssertionError("the tokenizer opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    get_encoding.cache_clear()
    assert encode("Hello, world!") == [15496, 11, 995, 0]


def test_stream_and_decode_agree_on_broken_bytes():
    """Two ways of replacing broken bytes would make a stream show what the text does not hold."""
    ids = [get_encoding().encode_single_token(bytes([b])) for b in b"\xe2\x82A\xff\xf0\x9f"]
    assert "".join(streamed(ids)) == decode(ids)
    assert decode(ids) == "\ufffdA\ufffd\ufffd"
