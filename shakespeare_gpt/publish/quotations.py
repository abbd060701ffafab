"""Quoted or invented: which words of a generated text stand in the learnt text, and the same as HTML.

A quotation is a run of at least five words of speech that stands word for word in the learnt text. Speakers'
names, punctuation and line ends between those words must agree too, but do not count towards the five. By
chance, 0.14% of the second half of Tiny Shakespeare is "quoted" so from its first half, 1.2% with four.
"""

import re
from functools import lru_cache
from html import escape
from itertools import pairwise
from typing import NamedTuple

from shakespeare_gpt.data import Text

BLANK_LINE = r"\n[ \t]*\n"
# A name alone on a line that ends in a colon, after a blank line or at the start of a text.
NAME = r"[ \t]*(?P<name>[^\s:][^\n:]{0,59}:)[ \t]*(?=\n|\Z)"
LETTERS = r"[\w\u0300-\u036f]+"  # and digits, and the accents of letters that are written in two parts
WORD = rf"{LETTERS}(?:['’]{LETTERS})*"
LEARNT = re.compile(rf"(?:\A\s*|{BLANK_LINE}){NAME}|{WORD}")
GENERATED = re.compile(rf"{BLANK_LINE}{NAME}|{WORD}")  # it may start within a line
# For a notebook, which has no stylesheet of ours. Where styles are removed, as on GitHub, <mark> still shows.
STYLE = """<style>
.leaf { font: 15px/1.6 Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; padding: 6px 8px }
.leaf .given { opacity: .6 } .leaf .who { letter-spacing: .04em } .leaf sup { line-height: 0 }
.leaf mark { background: #f6e6b8; color: #2b2521; border-bottom: 2px solid #c79a33; border-radius: 2px }
.places, .places-head { font-size: 12px; line-height: 1.5; opacity: .8; margin: 4px 8px }
</style>"""


def speaker_names(text: str) -> list[tuple[int, int]]:
    """Where speakers' names stand in a text, colons included: [(start, end), ...] in characters."""
    return [match.span("name") for match in LEARNT.finditer(text) if match["name"]]


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

    ``speeches`` lists (speaker, line number from 1, first line) of each speech in order: none in prose.
    """

    def __init__(self, text: Text, min_words: int = 5):
        self.text, self.min_words, self.speeches = text.text, max(1, min_words), []
        self._words, self._places = [], []  # of each word of speech: (start, end), (speaker, line)
        lines, line, at, speaker, begins = self.text.split("\n"), 1, 0, "", False
        for match in LEARNT.finditer(self.text):
            line, at = line + self.text.count("\n", at, match.end()), match.end()
            if match["name"]:
                speaker, begins = match["name"][:-1].rstrip(), True
                continue
            if begins:
                self.speeches.append((speaker, line, lines[line - 1].strip()))
                begins = False
            self._words.append(match.span())
            self._places.append((speaker, line))
        # Each word together with all that stands between it and the word before, and an end.
        self._units = [self.text[a:b] for (_, a), (_, b) in pairwise([(0, 0), *self._words])] + [None]
        self._runs: dict[str, list[int]] = {}  # each run of words: where it begins in ``_words``
        for i, (first, last) in enumerate(zip(self._words, self._words[self.min_words - 1 :], strict=False)):
            self._runs.setdefault(self.text[first[0] : last[1]], []).append(i)
        self.find = lru_cache(4)(self.find)  # a page asks for the quotations, then for their share

    def find(self, generated: str) -> list[Quotation]:
        """Every quotation in ``generated``, from left to right, without overlap.

        A quotation begins and ends with a whole word of speech and goes as far as the texts agree. Of several
        places the longest agreement wins, then the earliest. If all that comes before the first quotation
        agrees too (a name, half a word), it belongs to it without being counted. The same holds for all that
        follows the last one.
        """
        words = [match.span() for match in GENERATED.finditer(generated) if not match["name"]]
        units = [generated[a:b] for (_, a), (_, b) in pairwise([(0, 0), *words])] + [""]
        found, i = [], 0
        while i + self.min_words <= len(words):
            start, length = words[i][0], self.min_words
            places = self._runs.get(generated[start : words[i + length - 1][1]])
            if not places:
                i += 1
                continue
            # Keep the places that agree in one word more, as long as there are any. No word equals an end.
            while longer := [place for place in places if self._units[place + length] == units[i + length]]:
                places, length = longer, length + 1
            end, i = words[i + length - 1][1], i + length
            shift = self._words[places[0]][0] - start  # generated[k] is text[k + shift]
            if not found and self.text[max(shift, 0) : start + shift] == generated[:start]:
                start = len(generated) - len(generated.lstrip())
            if self.text[end + shift : len(generated) + shift] == generated[end:]:
                end, i = len(generated.rstrip()), len(words)
            found.append(Quotation(start, end, start + shift, *self._places[places[0]], length))
        return found

    def segments(self, generated: str) -> list[tuple[str, Quotation | None]]:
        """``generated`` in pieces, each with its quotation or None."""
        pieces, at = [], 0
        for quotation in self.find(generated):
            pieces.append((generated[at : quotation.start], None))
            pieces.append((generated[quotation.start : quotation.end], quotation))
            at = quotation.end
        return [piece for piece in [*pieces, (generated[at:], None)] if piece[0]]


def quoted_share(index: QuotationIndex, generated: str) -> float:
    """The share of the characters of ``generated`` that lie in a quotation; 0 for an empty text.

    White space never counts. Names and punctuation count as quoted where they lie inside a quotation.
    """
    quoted = "".join(piece for piece, quotation in index.segments(generated) if quotation)
    return len("".join(quoted.split())) / max(1, len("".join(generated.split())))


def speech_html(text: str, start: int = 0, end: int | None = None) -> str:
    """``text[start:end]``, escaped, with speakers' names in ``<b class="who">``.

    What stands around it in ``text`` decides what is a name: one begins a text or follows a blank line.
    """
    end, body, at = len(text) if end is None else end, "", start
    for first, last in speaker_names(text):
        first, last = max(first, at), min(last, end)
        if first < last:
            body += f'{escape(text[at:first])}<b class="who">{escape(text[first:last])}</b>'
            at = last
    return body + escape(text[at:end])


def quoted_html(
    index: QuotationIndex, generated: str, prompt: str = "", *, title: str = "the text", done: bool = True
) -> str:
    """A prompt and its continuation, with what is quoted in ``<mark>``, numbered, and its places below.

    ``title`` names the learnt text. While a text grows (``done=False``) a caret follows it, and nothing is
    said yet about a lack of quotations. Everything is escaped. The classes are: ``leaf`` for the text, in it
    ``given`` (the prompt), ``who`` and ``caret``; below it ``places-head`` and ``places``.
    """
    whole, at, notes, title = prompt + generated, len(prompt), [], escape(title)
    body = f'<span class="given">{speech_html(whole, 0, at)}</span>'
    for piece, quotation in index.segments(generated):
        inner = speech_html(whole, at, at + len(piece))
        at += len(piece)
        if quotation:
            place = escape(quotation.place)
            notes.append(f"<li><b>{place}</b> <span>· {quotation.words} words</span></li>")
            inner = f'<mark title="{place}">{inner}</mark><sup>{len(notes)}</sup>'
        body += inner
    if notes:
        below = f'<p class="places-head">Word for word in {title}</p><ol class="places">{"".join(notes)}</ol>'
    else:
        none = f"Nothing here is quoted: no run of {index.min_words} words stands in {title}."
        below = f'<p class="places none">{none}</p>' if done else ""
    caret = "" if done else '<span class="caret"></span>'
    return f'<div class="leaf">{body}{caret}</div>{below}'
