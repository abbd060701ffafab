"""Quoted or invented, as a page and as a picture, and the sampler inside a notebook.

A kernel that runs a callback hears nothing else, so a callback that generated could not be stopped. Here it
only starts a thread, and that writes. Some front ends (Colab) show what a kernel sends only while it answers
them; so while a text grows, a hidden ``Play`` in the browser asks for it ten times a second.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import random
import re
import textwrap
import threading
import time

import ipywidgets as w
import matplotlib.pyplot as plt

from shakespeare_gpt.data import Text
from shakespeare_gpt.generate import Draft, GenerationStats, stream_text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.recite import Source, quoted_share

MARK = "background:#f6e6b8;color:#2b2521;border-bottom:2px solid #c79a33;border-radius:2px"
PAGE = "padding:6px 8px;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6;font-family:Georgia,serif;font-size:15px"
EVERY = 0.1  # seconds between two looks at a growing text


def quoted_html(source: Source, generated: str, prompt: str = "") -> str:
    """A prompt and its continuation, escaped, what is quoted highlighted and numbered, its places below."""
    body, notes = [f'<span style="opacity:.6">{html.escape(prompt)}</span>'], []
    for piece, span in source.segments(generated):
        shown = html.escape(piece)
        if span is not None:
            where = html.escape(span.place)
            notes.append(f"<b>{len(notes) + 1}</b>&nbsp;{where}")
            words = piece.strip()  # the number belongs to the last word, not to the next line
            before, after = piece.split(words, 1) if words else (piece, "")
            mark = f'<mark style="{MARK}" title="{where}">{html.escape(words)}</mark>'
            shown = f'{before}{mark}<sup style="line-height:0">{len(notes)}</sup>{after}'
        body.append(shown)
    return (
        f'<div style="{PAGE}">{"".join(body)}</div><div style="line-height:1.5;font-size:12px;'
        f'opacity:.8;padding:0 8px">{" &emsp; ".join(notes)}</div>'
    )


def quoted_figure(source: Source, generated: str, width: int = 62) -> plt.Figure:
    """The same as a picture: lines over ``width`` characters wrapped, quotations coloured, places beside."""
    tints = ("#cfe0f1", "#fbdfc4", "#cfe9d8", "#f2d0d0", "#e0d8ef")
    rows, at = [], 0  # (where the row begins in the text, its characters)
    for line in generated.split("\n"):
        for part in textwrap.wrap(line, width, drop_whitespace=False, tabsize=1) or [""]:
            rows.append((at, part))
            at += len(part)
        at += 1
    fig = plt.figure(figsize=(8, 0.19 * (len(rows) + 1)))
    fig.set_layout_engine("none")  # the style's own would warn of a figure without a grid
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, 101), ylim=(len(rows), -1))
    ax.axis("off")
    # 102 columns in 8 inches. On the baseline: words centred by their own height would dance.
    font = {"family": "monospace", "fontsize": 9, "va": "baseline"}
    for row, (_, part) in enumerate(rows):
        for word in re.finditer(
            r"\S+", part
        ):  # one by one: hinted letters would drift off their columns
            ax.text(word.start(), row + 0.25, word[0], parse_math=False, color="#222222", **font)
    free = 0  # the first row whose margin is empty
    for i, span in enumerate(source.spans(generated)):
        cut = [(max(span.start - a, 0), min(span.end - a, len(part))) for a, part in rows]
        inside = [row for row, (a, b) in enumerate(cut) if a < b and rows[row][1][a:b].strip()]
        for row in inside:
            ax.barh(row, cut[row][1] - cut[row][0], 0.94, cut[row][0], color=tints[i % len(tints)])
        free = max(free, inside[0])
        box = {"facecolor": tints[i % len(tints)], "linewidth": 0, "pad": 1.5}
        ax.text(width + 3, free + 0.25, textwrap.shorten(span.place, 34), bbox=box, **font)
        free += 1
    return fig


class Sampler(w.VBox):
    """The sampler of notebook 04; see ``sampler``. Its parts are attributes: ``prompt``, ``generate``, ..."""

    def __init__(self, model: GPT, text: Text, draft: Draft | None = None):
        self._model, self._source = model, Source(text)
        self._draft = draft or Draft(text.ids)
        self._stop, self._thread = threading.Event(), None
        wide = {"layout": {"width": "98%"}, "style": {"description_width": "100px"}}
        opening = text.text.split("\n", 1)[0] + "\n"
        self.prompt = w.Textarea(opening, description="prompt", rows=3, **wide)
        self.length = w.IntSlider(160, 10, 400, 10, description="tokens", **wide)
        self.temperature = w.FloatSlider(
            value=0.8, min=0, max=2, step=0.05, description="temperature", **wide
        )
        self.top_k = w.IntSlider(0, 0, 200, description="top-k (0: off)", **wide)
        self.top_p = w.FloatSlider(
            value=1.0, min=0.05, max=1, step=0.05, description="top-p", **wide
        )
        self.seed = w.BoundedIntText(0, 0, 2**31 - 1, description="seed", **wide)
        self.fresh = w.Checkbox(True, description="new seed each time", indent=False)
        self.guess = w.Checkbox(True, description="guess from the text", indent=False)
        self.generate = w.Button(description="Generate", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.status, self.page = w.HTML("Ready."), w.HTML()
        self._pulse = w.Play(max=10**9, interval=100, layout={"display": "none"})
        self.generate.on_click(self._start)
        self.stop.on_click(lambda _: self._stop.set())
        self._pulse.observe(self._show_again, "value")
        left = w.VBox([self.length, self.temperature, self.seed], layout={"width": "50%"})
        right = w.VBox([self.top_k, self.top_p, w.HBox([self.fresh, self.guess])])
        right.layout.width = "50%"
        buttons = w.HBox([self.generate, self.stop, self.status, self._pulse])
        super().__init__([self.prompt, w.HBox([left, right]), buttons, self.page])

    def __repr__(self) -> str:
        return "The sampler: open this notebook in Jupyter or Colab and run this cell to use it."

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the text to be complete; whether it is."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _start(self, _) -> None:
        """Stop what is being written, and write anew in a thread with the settings of this moment."""
        self._stop.set()
        if self.fresh.value:
            self.seed.value = random.SystemRandom().randrange(2**31)
        settings = {
            "max_new_tokens": self.length.value,
            "temperature": self.temperature.value,
            "top_k": self.top_k.value,
            "top_p": self.top_p.value,
            "seed": self.seed.value,
            "draft": self._draft if self.guess.value else None,
        }
        prompt = self.prompt.value.encode("utf-8", "replace").decode()  # no half surrogate pairs
        before, self._stop = self._thread, threading.Event()
        # In this click's context, so that the kernel knows whose messages these are.
        work = contextvars.copy_context().run
        arguments = (self._write, before, self._stop, prompt, settings)
        self._thread = threading.Thread(target=work, args=arguments, name="sampler", daemon=True)
        self._thread.start()
        self._pulse.playing = True

    def _write(self, before, stop: threading.Event, prompt: str, settings: dict) -> None:
        """In a thread of its own, after the one before has ended: two texts never mix."""
        if before is not None:
            before.join()
        if stop.is_set():
            return
        self.stop.disabled, self.status.value, self.page.value = False, "Reading the prompt.", ""
        answer, stats, shown = "", GenerationStats(), 0.0
        try:
            pieces = stream_text(self._model, prompt, stats=stats, **settings)
            with contextlib.closing(pieces):
                for piece in pieces:
                    if stop.is_set():
                        break
                    answer += piece
                    if time.monotonic() - shown > EVERY:
                        self._show(prompt, answer, stats, "Writing")
                        shown = time.monotonic()
            self._show(prompt, answer, stats, "Stopped" if stop.is_set() else "Done")
        except Exception as error:  # in a thread nobody else would see it
            line = (str(error).splitlines() or [""])[0]
            self.status.value = html.escape(f"Error: {line or type(error).__name__}")
        finally:
            self.stop.disabled = True

    def _show(self, prompt: str, answer: str, stats: GenerationStats, state: str) -> None:
        parts = [f"{state}: {stats.tokens} tokens", f"{stats.tokens_per_second:.0f} tokens/s"]
        parts.append(f"{quoted_share(self._source, answer):.0%} quoted")
        if stats.proposed:
            parts.append(f"{stats.acceptance_rate:.0%} of guesses accepted")
        self.page.value = quoted_html(self._source, answer, prompt)
        self.status.value = " &middot; ".join(parts)

    def _show_again(self, _) -> None:
        """The browser asks: answer with all that it may have missed, until there is nothing more to come."""
        done = self.wait(0)
        for widget in (self.page, self.status, self.stop):
            widget.send_state()
        if done:
            self._pulse.playing = False


def sampler(model: GPT, text: Text, draft: Draft | None = None) -> Sampler:
    """A sampler to play with: prompt, settings, Generate, Stop; the text appears as it is written.

    What stands word for word in ``text`` is highlighted, with who says it and on which line. "Guess from the
    text" lets ``draft``, by default made of ``text``, propose what follows: the same text, sooner.
    """
    return Sampler(model, text, draft)
