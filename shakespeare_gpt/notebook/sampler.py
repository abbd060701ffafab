"""The sampler of the sampling notebook: settings, Generate, Stop, and a text that appears as it is written.

A kernel that is busy with a callback hears nothing else, so Generate only starts a thread. Some front ends
(Colab) show what a kernel sends only while it answers them. So a hidden ``Play`` in the browser asks ten
times a second how far the text has come, until it is complete.
"""

import random
from html import escape
from threading import Thread

import ipywidgets as w

from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.publish.quotations import STYLE, QuotationIndex, quoted_html, quoted_share
from shakespeare_gpt.sample import GenerationStats, stream_text
from shakespeare_gpt.speed.ngram_draft import NgramDraft


class Writer(Thread):
    """Writes one text, which can be read as it grows. Once ``stopped`` is set it ends within a token."""

    def __init__(self, model: GPT, prompt: str, **options):
        super().__init__(daemon=True)
        self.model, self.prompt, self.options, self.stats = model, prompt, options, GenerationStats()
        self.text, self.stopped, self.error = "", False, ""

    def run(self) -> None:
        try:
            for piece in stream_text(self.model, self.prompt, stats=self.stats, **self.options):
                if self.stopped:
                    break
                self.text += piece
        except Exception as error:  # in a thread nobody else would see it
            self.error = f"{type(error).__name__}: {error}"


class Sampler(w.VBox):
    """A prompt, sampling parameters (``settings``), Generate, Stop, and a text with its quotations marked.

    The n-gram draft makes generation faster and does not change its result.
    """

    def __init__(self, model: GPT, text: Text):
        self._model, self._index, self._draft = model, QuotationIndex(text), NgramDraft(text.ids)
        self._writer = Writer(model, "")  # not started, so there is nothing to stop
        wide = {"layout": {"width": "48%"}, "style": {"description_width": "100px"}}
        self.prompt = w.Textarea(text.text.partition("\n")[0] + "\n", description="prompt", rows=3, **wide)
        self.settings = {
            "max_new_tokens": w.IntSlider(160, 10, 400, 10, description="tokens", **wide),
            "temperature": w.FloatSlider(0.8, min=0, max=2, step=0.05, description="temperature", **wide),
            "top_k": w.IntSlider(0, 0, 200, description="top-k (0: off)", **wide),
            "top_p": w.FloatSlider(1.0, min=0.05, max=1, step=0.05, description="top-p", **wide),
            "seed": w.BoundedIntText(0, 0, 2**31 - 1, description="seed (0: new)", **wide),
        }
        self.use_draft = w.Checkbox(True, description="n-gram draft", indent=False)
        self.generate = w.Button(description="Generate", button_style="primary", icon="play")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.status, self.page = w.HTML("Ready."), w.HTML()
        self.pulse = w.Play(max=10**9, interval=100, layout={"display": "none"})
        self.generate.on_click(self._generate)
        self.stop.on_click(self._stop)
        self.pulse.observe(self._show, "value")
        settings = w.HBox([self.prompt, *self.settings.values()], layout={"flex_flow": "wrap"})
        buttons = w.HBox([self.generate, self.stop, self.use_draft, self.pulse])
        super().__init__([w.HTML(STYLE), settings, buttons, self.status, self.page])

    def __repr__(self) -> str:
        return "The sampler: open this notebook in Jupyter or Colab and run this cell to use it."

    def _generate(self, _) -> None:
        """Stop the text in progress and begin another, with the settings of this moment."""
        self._stop()
        options = {name: widget.value for name, widget in self.settings.items()}
        options["seed"] = options["seed"] or random.SystemRandom().randrange(1, 2**31)
        prompt = self.prompt.value.encode("utf-8", "replace").decode()  # a browser may send half a character
        draft = self._draft if self.use_draft.value else None
        self._writer = Writer(self._model, prompt, draft=draft, **options)
        self._writer.start()
        self.stop.disabled, self.pulse.playing = False, True

    def _stop(self, _=None) -> None:
        self._writer.stopped = True

    def _show(self, _) -> None:
        """Answer the browser with all that there is; it stops asking once the text is complete."""
        writer, stats = self._writer, self._writer.stats
        done = not writer.is_alive()  # asked before the text is read, which is complete then
        self.page.value = quoted_html(self._index, writer.text, writer.prompt, done=done)
        numbers = (
            f"{stats.tokens} tokens, {stats.accepted} of them drafted &middot; "
            f"{stats.tokens_per_second:.0f} tokens/s &middot; seed {writer.options['seed']} &middot; "
            f"{quoted_share(self._index, writer.text):.0%} quoted"
        )
        state = "Writing" if not done else "Stopped" if writer.stopped else "Done"
        self.status.value = escape(writer.error) or f"{state}: {numbers}"
        if done:
            self.stop.disabled, self.pulse.playing = True, False
