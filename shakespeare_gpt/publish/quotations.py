"""Quoted or invented: which words of a generated text stand in the learnt text, where, and who says them.

A quotation is a run of at least five words of speech that stands word for word in the learnt text. Speakers'
names, punctuation and line ends between those words must agree too, but do not count towards the five.

Why five: by chance, 9.8 % of the second half of Tiny Shakespeare is "quoted" from its first half in runs of
three words, 1.2 % in runs of four, 0.14 % of five and 0.04 % of six.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise, takewhile
from operator import eq
from typing import NamedTuple

import regex  # tiktoken needs it too; ``re`` knows neither scripts nor combining marks

from shakespeare_gpt.data import Text

# A name alone on a line that ends in a colon, after a blank line or at the start of a text.
BLANK_LINE = r"\n[ \t]*\n"
NAME = r"[ \t]*(?P<name>[^\s:][^\n:]{0,59}:)[ \t]*(?=\n|\Z)"
SPEAKER = rf"(?:\A\s*|{BLANK_LINE}){NAME}"
# Letters and digits, with apostrophes between them. In a script without spaces each character is a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]++"
WORD = rf"{UNSPACED}\p{{M}}*+|{LETTERS}(?:['’]{LETTERS})*+"
LEARNT = regex.compile(rf"(?V1){SPEAKER}|{WORD}")
GENERATED = regex.compile(rf"(?V1){BLANK_LINE}{NAME}|{WORD}")  # it may start within a line


def speaker_names(text: str) -> list[tuple[int, int]]:
    """Where speakers' names stand in a text, colons included: [(start, end), ...] in characters."""
    return [match.span("name") for match in regex.finditer(SPEAKER, text)]


class Quotation(NamedTuple):
    """A part of a generated text, ``generated[start:end]``, that stands in the learnt text."""

    start: int
    end: int
    offset: int  # where it stands in the learnt text, in characters
    speaker: str  # of its first whole word of speech; "" where no name comes before
    line: int  # of the same word, from 1
    words: int  # whole words of speech

    @property
    def place(self) -> str:
        """Where it stands, for a reader: "HAMLET, line 1,234"."""
        return f"{self.speaker}, line {self.line:,}" if self.speaker else f"line {self.line:,}"


class QuotationIndex:
    """Finds what a generated text quotes from ``text``, by a table of every run of ``min_words`` words.

    ``speakers`` is the set of names. ``speeches`` lists (speaker, line number from 1, first line) of each
    speech in order: none in prose. Raises ValueError for ``min_words`` below 1.
    """

    def __init__(self, text: Text, min_words: int = 5):
        if min_words < 1:
            raise ValueError(f"min_words must be at least 1, not {min_words}")
        self.text, self.min_words = text.text, min_words
        self.speakers, self.speeches = set(), []
        self._words, self._places = [], []  # of each word of speech: (start, end), (speaker, line)
        lines, line, at, speaker, named = self.text.split("\n"), 1, 0, "", False
        for match in LEARNT.finditer(self.text):
            line, at = line + self.text.count("\n", at, match.end()), match.end()
            if match["name"]:
                speaker, named = match["name"][:-1].rstrip(), True
                self.speakers.add(speaker)
                continue
            if named:
                self.speeches.append((speaker, line, lines[line - 1].strip()))
            named = False
            self._words.append(match.span())
            self._places.append((speaker, line))
        self._units = _units(self.text, self._words)
        self._runs: dict[str, list[int]] = {}  # each run of words: where it begins in ``_words``
        for i, (start, _) in enumerate(self._words[: 1 - min_words or None]):
            run = self.text[start : self._words[i + min_words - 1][1]]
            self._runs.setdefault(run, []).append(i)
        self.find = lru_cache(4)(self.find)  # a page asks for the quotations, then for their share

    def find(self, generated: str) -> list[Quotation]:
        """Every quotation in ``generated``, from left to right, without overlap.

        A quotation begins and ends with a whole word of speech and goes as far as the texts agree. Of several
        places the longest agreement wins, then the earliest. If all that comes before the first quotation
        agrees too (a name, half a word), it belongs to it without being counted. The same holds for all that
        follows the last one.
        """
        words = [match.span() for match in GENERATED.finditer(generated) if not match["name"]]
        units, found, i = _units(generated, words), [], 0
        while i + self.min_words <= len(words):
            start, end = words[i][0], words[i + self.min_words - 1][1]
            length, place = 0, 0
            for candidate in self._runs.get(generated[start:end], ()):
                theirs = self._units[candidate + 1 : candidate + len(units) - i]
                agreeing = 1 + sum(takewhile(bool, map(eq, units[i + 1 :], theirs)))
                if agreeing > length:
                    length, place = agreeing, candidate
            if not length:
                i += 1
                continue
            end = words[i + length - 1][1]
            shift = self._words[place][0] - start  # generated[k] is text[k + shift]
            i += length
            if not found and self.text[max(shift, 0) : start + shift] == generated[:start]:
                start = len(generated) - len(generated.lstrip())
            if self.text[end + shift : len(generated) + shift] == generated[end:]:
                end, i = len(generated.rstrip()), len(words)
            found.append(Quotation(start, end, start + shift, *self._places[place], length))
        return found

    def segments(self, generated: str) -> list[tuple[str, Quotation | None]]:
        """``generated`` in pieces, each with its quotation or None."""
        pieces, at = [], 0
        for quotation in self.find(generated):
            start, end = quotation.start, quotation.end
            pieces += [(generated[at:start], None), (generated[start:end], quotation)]
            at = end
        return [piece for piece in [*pieces, (generated[at:], None)] if piece[0]]


def quoted_share(index: QuotationIndex, generated: str) -> float:
    """The share of the characters of ``generated`` that lie in a quotation; 0 for an empty text.

    White space never counts. Names and punctuation count as quoted where they lie inside a quotation.
    """
    total = len("".join(generated.split()))
    quoted = sum(len("".join(piece.split())) for piece, of in index.segments(generated) if of)
    return quoted / total if total else 0.0


def _units(text: str, words: list[tuple[int, int]]) -> list[str]:
    """Each word together with all that stands between it and the word before."""
    return [text[last[1] : word[1]] for last, word in pairwise([(0, 0), *words])]
