"""The sampler of the sampling notebook: settings, Generate, Stop, and a text that appears as it is written.

A kernel that is busy with a callback hears nothing else, so a callback that generated could not be stopped.
Here it only starts a thread. Some front ends (Colab) show what a kernel sends only while it answers them. So
while a text grows, a hidden ``Play`` in the browser sends a message ten times a second, and the answer
repeats everything that may have been missed.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import threading
import time
from html import escape

import ipywidgets as w

from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.publish.quotations import QuotationIndex, quoted_share
from shakespeare_gpt.publish.render import STYLE, quoted_html
from shakespeare_gpt.sample import GenerationStats, stream_text
from shakespeare_gpt.speed.ngram_draft import NgramDraft

EVERY = 0.1  # seconds between two updates of the page


class Sampler(w.VBox):
    """What ``sampler`` returns. ``settings`` holds the sampling parameters; other parts are attributes."""

    def __init__(self, model: GPT, text: Text, draft: NgramDraft | None = None):
        self._model, self._index = model, QuotationIndex(text)
        self._draft = draft or NgramDraft(text.ids)
        self._stop, self._thread = threading.Event(), None
        wide = {"layout": {"width": "98%"}, "style": {"description_width": "100px"}}
        first_line = text.text.split("\n", 1)[0] + "\n"
        self.prompt = w.Textarea(first_line, description="prompt", rows=3, **wide)
        self.settings = {
            "max_new_tokens": w.IntSlider(160, 10, 400, 10, description="tokens", **wide),
            "temperature": w.FloatSlider(0.8, min=0, max=2, step=0.05, description="temperature", **wide),
            "seed": w.BoundedIntText(0, 0, 2**31 - 1, description="seed", **wide),
            "top_k": w.IntSlider(0, 0, 200, description="top-k (0: off)", **wide),
            "top_p": w.FloatSlider(1.0, min=0.05, max=1, step=0.05, description="top-p", **wide),
        }
        self.new_seed = w.Checkbox(True, description="new seed each time", indent=False)
        self.use_draft = w.Checkbox(True, description="n-gram draft", indent=False)
        self.generate = w.Button(description="Generate", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.status, self.page = w.HTML("Ready."), w.HTML()
        self.pulse = w.Play(max=10**9, interval=100, layout={"display": "none"})
        self.generate.on_click(self._start)
        self.stop.on_click(lambda _: self._stop.set())
        self.pulse.observe(self._send_again, "value")
        sliders, switches = list(self.settings.values()), w.HBox([self.new_seed, self.use_draft])
        left = w.VBox(sliders[:3], layout={"width": "50%"})
        right = w.VBox([*sliders[3:], switches], layout={"width": "50%"})
        buttons = w.HBox([self.generate, self.stop, self.status, self.pulse])
        super().__init__([w.HTML(STYLE), self.prompt, w.HBox([left, right]), buttons, self.page])

    def __repr__(self) -> str:
        return "The sampler: open this notebook in Jupyter or Colab and run this cell to use it."

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the text is complete, at most so long; whether it is."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _start(self, _) -> None:
        """Stop the text in progress and start another in a thread, with the settings of this moment."""
        self._stop.set()
        if self.new_seed.value:
            self.settings["seed"].value = random.SystemRandom().randrange(2**31)
        options = {name: widget.value for name, widget in self.settings.items()}
        options["draft"] = self._draft if self.use_draft.value else None
        prompt = self.prompt.value.encode("utf-8", "replace").decode()  # a browser may send half a character
        previous, self._stop = self._thread, threading.Event()
        # In this click's context, so that the front end knows which cell the messages belong to.
        run = contextvars.copy_context().run
        arguments = (self._write, previous, self._stop, prompt, options)
        self._thread = threading.Thread(target=run, args=arguments, name="sampler", daemon=True)
        self._thread.start()
        self.pulse.playing = True

    def _write(self, previous, stop: threading.Event, prompt: str, options: dict) -> None:
        """Generate, once the thread before this one has ended: two texts never mix."""
        if previous is not None:
            previous.join()
        if stop.is_set():
            return
        self.stop.disabled, self.status.value, self.page.value = False, "Reading the prompt.", ""
        answer, stats, shown = "", GenerationStats(), 0.0
        try:
            with contextlib.closing(stream_text(self._model, prompt, stats=stats, **options)) as pieces:
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
            self.status.value = escape(f"Error: {line or type(error).__name__}")
        finally:
            self.stop.disabled = True

    def _show(self, prompt: str, answer: str, stats: GenerationStats, state: str) -> None:
        self.page.value = quoted_html(self._index, answer, prompt, done=state != "Writing")
        numbers = f"{stats.tokens} tokens &middot; {stats.tokens_per_second:.0f} tokens/s"
        numbers += f" &middot; {quoted_share(self._index, answer):.0%} quoted"
        if stats.proposed:
            numbers += f" &middot; {stats.acceptance_rate:.0%} of drafts accepted"
        self.status.value = f"{state}: {numbers}"

    def _send_again(self, _) -> None:
        """Answer the browser with everything that it may have missed, until the text is complete."""
        done = self.wait(0)
        for widget in (self.page, self.status, self.stop):
            widget.send_state()
        if done:
            self.pulse.playing = False


def sampler(model: GPT, text: Text, draft: NgramDraft | None = None) -> Sampler:
    """An interactive sampler: prompt, sampling parameters, Generate, Stop.

    What is quoted from ``text`` is highlighted, with its speaker and line below. The n-gram draft, by default
    of ``text``, makes generation faster and does not change its result.
    """
    return Sampler(model, text, draft)
