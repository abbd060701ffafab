"""The page on which one talks to the model, and its API. Start it with: python app.py

Beside this file lie model.safetensors, text.txt and the package shakespeare_gpt; nothing is downloaded. All
that people type and all that the model writes is escaped before it becomes part of the page.
"""

from __future__ import annotations

import contextlib
import html
import math
import os
import random
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(p) for p in (HERE, HERE.parent) if (p / "shakespeare_gpt").is_dir()][:1]

try:  # on Hugging Face only; it must come before PyTorch, see `gpu` at the end
    import spaces
except ImportError:
    spaces = None
import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from shakespeare_gpt.checkpoint import CheckpointError, load_model  # noqa: E402
from shakespeare_gpt.data import TINY_SHAKESPEARE_SHA256, Text, TextError, load_text  # noqa: E402
from shakespeare_gpt.generate import (  # noqa: E402
    Draft,
    GenerationStats,
    fast_copy,
    generate,
    stream_text,
)
from shakespeare_gpt.recite import Source, first_difference, quoted_share  # noqa: E402
from shakespeare_gpt.tokenizer import VOCAB_SIZE, decode, token_bytes  # noqa: E402

MAX_PROMPT = 2_000  # characters; the model sees at most its context of them anyway
MAX_LENGTH = 400  # tokens in one answer
MAX_RECITAL = 200
HOTTEST = 1.5  # temperature: above it all of GPT-2's vocabulary comes up, and not only a play's
WIDEST = 200  # top-k
GIVEN = 32  # tokens of the text that it hears before it recites, as in recite.exact_recall
AT_ONCE = 2  # answers that are written at the same time, taking turns; one alone would leave gaps
WAITING = 16  # requests that may wait; whoever comes after them is told so
EVERY = 0.05  # seconds between two looks at a growing text

# By the text's SHA-256: many files are called input.txt. A title, and what that is.
TITLES = {
    "0eacf58f0f9b1673cb26382a718ac11d928bbe810d4528e899bd7f80a1f17aa6": (
        "The Warden of Skerrow",
        "a play in Shakespeare's manner",
    ),
    TINY_SHAKESPEARE_SHA256: ("Tiny Shakespeare", "a million letters of his plays"),
}
SPEECH = re.compile(r"(?:\A\s*|\n[ \t]*\n)([^\n:]{1,60}):[ \t]*\n([^\n]*\w[^\n]*)")


# ---------------------------------------------------------------------------- the model


def cores() -> int:
    """The processors that are really ours: a container often sees all of its host's."""
    given = os.environ.get("CPU_CORES", "")  # set by Hugging Face
    if given.isdecimal() and int(given):
        return int(given)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        count = min(count, max(1, int(quota) // int(period)))
    return count or 1


def one_thread() -> ThreadPoolExecutor:
    """A thread for the model, which takes all our cores for each product."""
    return ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(cores(),))


@dataclass
class Play:
    """A model, the text that it learnt, and the one thread in which it computes.

    Each request has its own cache and random numbers. Their tokens are computed one after the other in a
    single thread, which takes all cores for each: requests take turns token by token, in the order in which
    they ask, and never fight over the cores.
    """

    model: Any
    text: Text
    meta: dict[str, Any]
    reason: str  # why the weights are kept in the format they are in
    source: Source = field(init=False)
    draft: Draft = field(init=False)

    def __post_init__(self):
        self.source, self.draft = Source(self.text), Draft(self.text.ids)
        sizes = np.array([len(token_bytes(i)) for i in self.text.ids.tolist()], dtype=np.int64)
        self.edges = np.concatenate([[0], np.cumsum(sizes)])  # bytes before each token
        self.lines = self.text.text.split("\n")
        self.line_ends = np.cumsum([len(line.encode("utf-8")) + 1 for line in self.lines]) - 1
        self._worker = one_thread()

    @classmethod
    def load(cls, folder: Path) -> Play:
        """Read a staged folder. Raises CheckpointError and TextError: there are no random weights here."""
        model, meta = load_model(folder / "model.safetensors", vocab_size=VOCAB_SIZE)
        text = load_text(folder / "text.txt", context=1)
        if meta.get("text_sha256") not in (None, text.sha256):
            raise TextError(
                "text.txt is not the text that these weights learnt (its SHA-256 differs): stage the Space again."
            )
        with one_thread() as measuring:  # as the model will be run, on the cores that are ours
            model, reason = measuring.submit(fast_copy, model).result()
        play = cls(model, text, meta, reason)
        list(play.each(generate(model, [198], max_new_tokens=2)))  # the first call sets things up
        return play

    def each(self, iterator: Iterator) -> Iterator:
        """The items of ``iterator``, computed in the model's thread and only when they are asked for."""
        end = object()
        try:
            while (item := self._worker.submit(next, iterator, end).result()) is not end:
                yield item
        finally:  # the server's event loop may be what closes this: it must not wait for the model
            self._worker.submit(iterator.close)

    @property
    def title(self) -> str:
        known = TITLES.get(self.text.sha256)
        return known[0] if known else str(self.meta.get("text_name", "its text"))

    def speeches(self) -> list[tuple[str, int, str]]:
        """(speaker, line number, the line): the first line of each speech; in prose every line."""
        found, line, at = [], 1, 0
        for m in SPEECH.finditer(self.text.text):
            line, at = line + self.text.text.count("\n", at, m.start(2)), m.start(2)
            found.append((m[1], line, m[2].strip()))
        if len(found) < 2:
            found = [("", n, line.strip()) for n, line in enumerate(self.lines, 1) if line.strip()]
        last = len(self.lines) - 3  # something must be left to recite
        found = [speech for speech in found if speech[1] < last] or found[:1]
        if self.fixed:
            # Early in a window, so that a good part of it is left.
            n = self.model.config.n_positions
            early = [s for s in found if 8 <= self.after(s[1]) % n <= n - min(n // 2, 100)]
            found = early or found
        return found

    @property
    def fixed(self) -> bool:
        """Whether the text was always cut into the same windows: then it is known from their starts only."""
        return self.meta.get("windows") in ("fixed", "sequential")

    def after(self, line: int) -> int:
        """The first token boundary at or after the end of a line (from 1); one token is always left."""
        end = int(np.searchsorted(self.edges, self.line_ends[line - 1]))
        return min(max(end, 1), len(self.text.ids) - 1)


def spread(items: list, count: int) -> list:
    """At most ``count`` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


# ---------------------------------------------------------------------------- what comes in


def number(value: Any, low: float, high: float, default: float) -> float:
    """A number between ``low`` and ``high``, whatever was sent; ``default`` for what is none."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return default if math.isnan(value) else min(max(value, low), high)


def check_prompt(prompt: Any) -> str:
    """The prompt as text that can be shown. Raises ValueError with a line for the reader."""
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise ValueError("The prompt must be text.")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(
            f"This prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT:,}. "
            "The model sees only the last page of it: send that."
        )
    prompt = re.sub("[\ud800-\udfff]", "\ufffd", prompt)  # half a character, which no page can show
    return prompt.replace("\r\n", "\n").replace("\0", "\ufffd")


def check_seed(seed: Any) -> int:
    """A seed from 0 to 2^63 - 1. Raises ValueError with a line for the reader."""
    if isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    if (
        isinstance(seed, bool)
        or not re.fullmatch(r"\s*[0-9]{1,19}\s*", str(seed))
        or int(seed) >= 2**63
    ):
        raise ValueError("The seed must be a whole number from 0 on, or empty for a new one.")
    return int(seed)


# ---------------------------------------------------------------------------- what goes on


@dataclass
class Answer:
    """A continuation, as far as it has come."""

    prompt: str
    seed: int
    text: str = ""
    stats: GenerationStats = field(default_factory=GenerationStats)
    done: bool = False


def continue_prompt(
    play: Play, prompt, length, temperature, top_k, top_p, seed, stopped: Callable[[], bool] = bool
) -> Iterator[Answer]:
    """Write on from a prompt; yields the same growing Answer, at once at the first token, then by the clock.

    Every input is checked and clamped here, whoever sent it. ``stopped`` is asked after each piece. Raises
    ValueError with a line for the reader.
    """
    answer = Answer(check_prompt(prompt), seed=random.SystemRandom().randrange(2**31))
    if seed is not None and str(seed).strip():
        answer.seed = check_seed(seed)
    pieces = stream_text(
        play.model,
        answer.prompt,
        max_new_tokens=int(number(length, 1, MAX_LENGTH, 160)),
        temperature=number(temperature, 0.0, HOTTEST, 0.8),
        top_k=int(number(top_k, 0, WIDEST, 0)),
        top_p=number(top_p, 0.01, 1.0, 1.0),
        seed=answer.seed,
        draft=play.draft,
        stats=answer.stats,
    )
    shown = 0.0
    with contextlib.closing(play.each(pieces)) as pieces:
        for piece in pieces:
            answer.text += piece
            if stopped():
                break
            if time.monotonic() - shown >= EVERY:
                yield answer
                shown = time.monotonic()
    answer.done = True
    yield answer


@dataclass
class Recital:
    """What the text says after a line, and what the model says."""

    line: int
    given: str
    truth: list[int]  # token ids
    cut: bool = False  # whether ``given`` begins within a line
    told: list[int] = field(default_factory=list)
    stats: GenerationStats = field(default_factory=GenerationStats)
    done: bool = False

    @property
    def difference(self) -> int | None:
        """The index of the first token that differs, None as long as there is none."""
        return first_difference(self.truth[: len(self.told)], self.told)

    @property
    def matching(self) -> int:
        return len(self.told) if self.difference is None else self.difference


def recite_line(play: Play, line, tokens, stopped: Callable[[], bool] = bool) -> Iterator[Recital]:
    """Let the model hear a line of the text (numbers from 1) and what stands before it, and go on greedily."""
    line = int(number(line, 1, len(play.lines), 1))
    ids = play.text.ids.tolist()
    end, n = play.after(line), play.model.config.n_positions
    tokens = int(number(tokens, 1, MAX_RECITAL, 80))
    # What was always read from the same place is asked from there, else a few words must do.
    # (The last window was moved back to be whole, see data.windows.)
    start = min((end - 1) // n * n, len(ids) - 1 - n) if play.fixed else end - min(GIVEN, n // 2)
    start = max(0, start)
    given = ids[start:end]
    recital = Recital(line, decode(given).lstrip("\ufffd"), ids[end : end + tokens])
    recital.cut = start > 0 and not decode(ids[start - 1 : start]).endswith("\n")
    told = generate(
        play.model,
        given,
        max_new_tokens=len(recital.truth),
        temperature=0.0,
        draft=play.draft,
        stats=recital.stats,
    )
    shown = 0.0
    with contextlib.closing(play.each(told)) as told:
        for token in told:
            recital.told.append(token)
            if stopped():
                break
            if time.monotonic() - shown >= EVERY:
                yield recital
                shown = time.monotonic()
    recital.done = True
    yield recital


# ---------------------------------------------------------------------------- what is shown


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _lines(play: Play, text: str, before: str = "") -> str:
    """Escaped text in which the names of speakers are set apart. ``before``: what stands before it on the page.

    A name stands alone on a line with a colon. So may a line of verse: what follows another line must be the
    name of somebody who speaks in the text.
    """
    above, _, begun = before.rpartition("\n")
    above, parts = above.rpartition("\n")[2], []
    for line in text.split("\n"):
        name = not begun and re.fullmatch(r"[^\n:]{1,60}:", line)
        name = name and (not above.strip() or line[:-1] in play.source.speakers)
        parts.append(f'<b class="who">{esc(line)}</b>' if name else esc(line))
        above, begun = begun + line, ""
    return "\n".join(parts)


def leaf(play: Play, answer: Answer) -> str:
    """The page with the prompt and its continuation, quotations marked, and where they stand under it."""
    body, notes, before, quoted = [], [], answer.prompt, False
    for piece, span in play.source.segments(answer.text):
        inner = _lines(play, piece, before)
        before += piece
        if span is None:
            body.append(inner)
        else:
            where, words, number = esc(span.place), len(piece.split()), ""
            # What one quotation leaves of the next, a word or two, is marked and needs no note.
            if words > 2 or not quoted:
                notes.append(
                    f"<li><b>{where}</b> <span>{words} word{'s' * (words != 1)}</span></li>"
                )
                number = f"<sup>{len(notes)}</sup>"
            # The blanks around it are not underlined, and the number stays on its last line.
            head, tail = re.match(r"\s*", inner)[0], re.search(r"\s*\Z", inner)[0]
            core = inner[len(head) : len(inner) - len(tail)]
            body.append(f'{head}<mark title="{where}">{core}</mark>{number}{tail}')
        quoted = span is not None
    caret = "" if answer.done else '<span class="caret"></span>'
    prompt = _lines(play, answer.prompt)
    under = f'<ol class="places">{"".join(notes)}</ol>' if notes else ""
    if answer.done and not notes:
        under = (
            '<p class="places none">Nothing here is quoted: no run of eight tokens, about six words, stands in '
            "the text.</p>"
        )
    elif notes:
        under = f'<p class="places-head">Word for word in {esc(play.title)}</p>{under}'
    return (
        f'<div class="leaf"><span class="given">{prompt}</span>{"".join(body)}{caret}</div>{under}'
    )


def figures(*entries: tuple[str, ...]) -> str:
    """Some numbers in a row: each a value, what it is and, shown to who points at it, what that means."""
    return (
        '<div class="figures">'
        + "".join(
            f'<span title="{esc(" ".join(meaning))}"><b>{esc(value)}</b> {esc(what)}</span>'
            for value, what, *meaning in entries
        )
        + "</div>"
    )


def speeds(stats: GenerationStats) -> list[tuple[str, ...]]:
    entries: list[tuple[str, ...]] = [(f"{stats.tokens_per_second:.0f}", "tokens/s")]
    if stats.proposed:
        entries.append(
            (
                f"{stats.acceptance_rate:.0%}",
                "of guesses accepted",
                "What follows in the text is guessed, and the model judges many guesses in one pass",
            )
        )
    return entries


def answer_figures(play: Play, answer: Answer) -> str:
    count = answer.stats.tokens
    return figures(
        (f"{count}", f"token{'s' * (count != 1)}", "A token is about ¾ of a word"),
        *speeds(answer.stats),
        (f"{quoted_share(play.source, answer.text):.0%}", "quoted"),
        (f"{answer.seed}", "seed"),
    )


def versus(play: Play, recital: Recital) -> str:
    """The original and the recital side by side, the first difference marked in both."""
    n = recital.matching

    def side(ids: list[int], heading: str, kind: str) -> str:
        marked, rest = ids[n : n + 1], ids[n + 1 :]
        if recital.difference is None:
            marked, rest = [], ids[n:]
        # What it hears ends with a line; the blank before the next one is known too, and not shown.
        said = decode(ids[:n])
        text = said.lstrip("\n")
        text = _lines(play, text, recital.given + said[: len(said) - len(text)])
        if marked:
            word = decode(marked)
            # A blank of its own would be an invisible mark.
            shown = word if word.strip() else word.replace("\n", "\u21b5\n").replace(" ", "\u2423")
            text += f'<mark class="wrong">{esc(shown)}</mark>'
        text += f'<span class="after">{esc(decode(rest))}</span>'
        return f'<section class="{kind}"><h3>{heading}</h3><div class="leaf">{text}</div></section>'

    given = _lines(play, recital.given, "…" if recital.cut else "")
    given = f'<div class="leaf heard"><span class="given">{"… " * recital.cut}{given}</span></div>'
    return (
        f'<p class="places-head">It hears the text up to and including line {recital.line:,}</p>{given}'
        f'<div class="versus">{side(recital.truth, "The original", "original")}'
        f"{side(recital.told, 'The model, from memory', 'recital')}</div>"
    )


def recital_figures(recital: Recital) -> str:
    n = recital.matching
    entries = [(f"{n} of {len(recital.truth)}", "tokens word for word")]
    if recital.difference is not None:
        entries.append((f"token {n + 1}", "is the first that differs"))
    elif recital.done and n == len(recital.truth):
        entries.append(("No", "difference"))
    return figures(*entries, *speeds(recital.stats))


def notice(text: str, kind: str = "") -> str:
    return f'<p class="notice {kind}" role="status">{esc(text)}</p>' if text else ""


def about(play: Play) -> str:
    """What this model is, from the metadata of its weights and from what was measured at the start."""
    meta, config = play.meta, play.model.config

    def known(name: str, form: str, scale: float = 1) -> str | None:
        value = meta.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return form.format(value if scale == 1 else value * scale)

    parameters = known("parameters", "{:.1f} million", 1e-6) or "unknown"
    steps = [
        known("steps", "{:,} steps"),
        known("tokens", "{:,} tokens"),
        known("passes", "{:.1f} passes"),
    ]
    loss = known("loss", "{:.4f} nats per token, over the whole text")
    rows = [
        ("Text", f"{play.title}: {len(play.text.ids):,} tokens"),
        ("Parameters", parameters),
        (
            "Architecture",
            f"GPT-2, {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
            f"a context of {config.n_positions} tokens",
        ),
        ("Trained for", ", ".join(step for step in steps if step) or "unknown"),
        ("Loss", loss or "unknown"),
    ]
    if isinstance(meta.get("device"), str):
        rows.append(("Trained on", meta["device"]))
    if meta.get("finished") is False:
        rows.append(("Note", "The training was not finished when these weights were exported."))
    rows.append(("Here", f"{cores()} CPU core{'s' * (cores() != 1)}. {play.reason}"))
    items = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in rows)
    return f'<div class="about"><h2>What this model is</h2><dl>{items}</dl></div>'


# ---------------------------------------------------------------------------- the look


class Folio(gr.themes.Base):
    """Ink on paper by day, candlelight by night. Fonts of Gradio and of the reader: none is fetched."""

    def __init__(self):
        super().__init__(
            primary_hue=gr.themes.colors.red,
            neutral_hue=gr.themes.colors.stone,
            radius_size=gr.themes.sizes.radius_sm,
            font=(
                gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)),
                "ui-sans-serif",
                "system-ui",
                "sans-serif",
            ),
        )
        paper, sheet, ink, faded, rule, accent = (
            "#f6f1e6", "#fffdf8", "#2b2521", "#6d6156", "#e2d8c5", "#7d2e2b",
        )  # fmt: skip
        night, sheet_night, ink_night, faded_night, rule_night, accent_night = (
            "#171412", "#211d1a", "#ece3d5", "#ada08f", "#3b342d", "#9f443c",
        )  # fmt: skip
        super().set(
            body_background_fill=paper,
            body_background_fill_dark=night,
            body_text_color=ink,
            body_text_color_dark=ink_night,
            body_text_color_subdued=faded,
            body_text_color_subdued_dark=faded_night,
            background_fill_primary=sheet,
            background_fill_primary_dark=sheet_night,
            background_fill_secondary=paper,
            background_fill_secondary_dark=night,
            border_color_primary=rule,
            border_color_primary_dark=rule_night,
            border_color_accent=accent,
            border_color_accent_dark="#d98a7e",
            color_accent=accent,
            color_accent_soft="#f0dfd3",
            color_accent_soft_dark="#3a2723",
            block_background_fill=sheet,
            block_background_fill_dark=sheet_night,
            block_border_color=rule,
            block_border_color_dark=rule_night,
            block_border_width="1px",
            block_shadow="none",
            block_shadow_dark="none",
            block_label_background_fill="transparent",
            block_label_background_fill_dark="transparent",
            block_label_border_width="0px",
            block_label_text_color=faded,
            block_label_text_color_dark=faded_night,
            block_title_text_color=faded,
            block_title_text_color_dark=faded_night,
            block_title_text_weight="600",
            block_info_text_color=faded,
            block_info_text_color_dark=faded_night,
            input_background_fill="#fbf8f1",
            input_background_fill_dark="#1b1815",
            input_border_width="1px",
            input_border_color=rule,
            input_border_color_dark=rule_night,
            input_border_color_focus="#b58a7d",
            input_border_color_focus_dark="#8a5a50",
            input_placeholder_color=faded,
            input_placeholder_color_dark=faded_night,
            input_shadow="none",
            input_shadow_focus="none",
            input_shadow_dark="none",
            input_shadow_focus_dark="none",
            slider_color=accent,
            slider_color_dark="#c9665a",
            button_border_width="1px",
            button_primary_background_fill=accent,
            button_primary_background_fill_dark=accent_night,
            button_primary_background_fill_hover="#93403b",
            button_primary_background_fill_hover_dark="#b4534a",
            button_primary_text_color="#fff8ee",
            button_primary_text_color_dark="#fff8ee",
            button_primary_border_color=accent,
            button_primary_border_color_dark=accent_night,
            button_secondary_background_fill=sheet,
            button_secondary_background_fill_dark=sheet_night,
            button_secondary_background_fill_hover="#f0e8d8",
            button_secondary_background_fill_hover_dark="#2c2622",
            button_secondary_border_color=rule,
            button_secondary_border_color_dark=rule_night,
            button_secondary_text_color=ink,
            button_secondary_text_color_dark=ink_night,
            link_text_color=accent,
            link_text_color_dark="#e0a296",
        )


CSS = """
:root { --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "URW Palladio L", Georgia, serif;
  --ink: #2b2521; --faded: #6d6156; --rule: #e2d8c5; --sheet: #fffdf8; --accent: #7d2e2b;
  --gold: #f6e6b8; --gold-line: #c79a33; --wrong: #f3cfc6; --wrong-line: #a8332a; }
.dark { --ink: #ece3d5; --faded: #ada08f; --rule: #3b342d; --sheet: #211d1a; --accent: #e0a296;
  --gold: #4a3c1c; --gold-line: #c79a33; --wrong: #5a2b25; --wrong-line: #e58575;
  --color-accent: #e0a296 !important; }
.gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important; }
input:focus-visible, textarea:focus-visible { outline: 2px solid var(--accent) !important; outline-offset: 0; }
footer .divider { display: none; }
.masthead { text-align: center; padding: 18px 8px 6px; }
.masthead h1 { font-family: var(--serif); font-weight: 600; font-size: clamp(30px, 5vw, 44px);
  letter-spacing: .01em; margin: 0; color: var(--ink); line-height: 1.15; }
.masthead p { color: var(--faded); margin: 8px auto 0; max-width: 38em; font-size: 16px; line-height: 1.5; }
.masthead hr { width: 72px; border: 0; border-top: 2px solid var(--accent); margin: 14px auto 0; }
.masthead mark { color: var(--ink) !important; }
.masthead mark, .leaf mark { background: var(--gold); color: inherit; border-bottom: 2px solid var(--gold-line);
  padding: 1px 0; border-radius: 2px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.prompt-box textarea { font-family: var(--serif) !important; font-size: 17px !important;
  line-height: 1.6 !important; }
.leaf { font-family: var(--serif); font-size: 17px; line-height: 1.72; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--ink); background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 4px; padding: 22px 26px; min-height: 180px; }
.leaf .given { color: var(--faded); unicode-bidi: isolate; }
.leaf .who { font-weight: 600; letter-spacing: .05em; font-size: .92em; color: var(--accent); }
.leaf .given .who { opacity: .8; }
.leaf mark .who { color: inherit; }
.leaf sup { user-select: none; font-family: var(--font); font-size: 11px; font-weight: 600; color: var(--accent);
  padding: 0 2px; line-height: 0; }
.leaf mark.wrong { background: var(--wrong); border-bottom-color: var(--wrong-line); font-weight: 600; }
.leaf .after { color: var(--faded); }
/* A long passage shows its end, and scrolls. */
.leaf.heard { min-height: 0; max-height: 13em; overflow: auto; display: flex; flex-direction: column-reverse;
  padding: 14px 26px; font-size: 16px; }
.leaf.empty { color: var(--faded); font-style: italic; }
.caret { display: inline-block; width: 2px; height: 1.05em; vertical-align: -3px; background: var(--accent);
  margin-left: 2px; animation: caret 1s steps(2) infinite; }
@keyframes caret { 50% { opacity: 0; } }
.places-head { font-size: 13px; letter-spacing: .04em; color: var(--faded); margin: 14px 2px 4px; }
ol.places { list-style: none; counter-reset: place; display: flex; flex-wrap: wrap; gap: 4px 20px;
  margin: 0 2px; padding: 0; font-size: 14px; color: var(--faded); }
ol.places li { counter-increment: place; margin: 0; }
ol.places li::before { content: counter(place); color: var(--accent); font-weight: 600; font-size: 12px;
  margin-right: 5px; vertical-align: 2px; }
ol.places b { color: var(--ink); font-weight: 600; }
p.places.none { font-size: 14px; color: var(--faded); margin: 12px 2px 0; }
.figures { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; color: var(--faded); padding: 2px; }
.figures b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.notice { font-size: 15px; padding: 10px 14px; margin: 0; border-left: 3px solid var(--gold-line);
  background: var(--sheet); color: var(--ink); border-radius: 2px; }
.notice.bad { border-left-color: var(--wrong-line); }
#line input { padding-right: 28px !important; text-overflow: ellipsis; }
.versus { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 12px; }
.versus h3 { font-size: 13px; letter-spacing: .04em; font-weight: 600; color: var(--faded); margin: 0 2px 6px; }
.about h2 { font-family: var(--serif); font-size: 18px; font-weight: 600; margin: 4px 0 8px; color: var(--ink); }
.about dl { margin: 0; font-size: 14px; line-height: 1.45; }
.about dt { color: var(--faded); }
.about dd { margin: 0 0 8px; color: var(--ink); overflow-wrap: anywhere; }
.about { border: 1px solid var(--rule); border-radius: 4px; padding: 14px 18px; background: var(--sheet); }
.gradio-container .block:has(> .html-container), .gradio-container .html-container { padding: 0 !important; }
#note:not(:has(.notice)):not(:has(.progress-text)), #recital-note:not(:has(.notice)):not(:has(.progress-text)),
#figures:not(:has(.figures)), #recital-figures:not(:has(.figures)) { display: none; }
/* Whoever waits sees the place in the queue, in the corner of the page; who need not wait sees no flicker.
   (Gradio cuts selectors at every comma, so none stands within brackets.) */
#note:not(:has(.notice)):has(.progress-text), #recital-note:not(:has(.notice)):has(.progress-text)
{ height: 0; margin-bottom: calc(-1 * var(--layout-gap)); }
#note:has(.progress-text), #recital-note:has(.progress-text), #note > .wrap, #recital-note > .wrap
{ overflow: visible !important; z-index: 2; }
#note .progress-text, #recital-note .progress-text { position: absolute; top: -34px; right: 14px;
  font-family: var(--font); font-size: 13px; color: var(--faded); animation: arrive .1s .6s both; }
@keyframes arrive { from { visibility: hidden; } to { visibility: visible; } }
.dark input[type=range] { --neutral-200: #4a423a; }
@media (max-width: 640px) {
  .gradio-container button[role=tab] { font-size: 14px; padding: 0 9px; }
  .gradio-container { padding: 8px !important; }
  .leaf { padding: 16px 16px; font-size: 16px; }
  .leaf.heard { padding: 12px 16px; }
  #surprise, #recite, #stop-recital { padding-left: 4px; padding-right: 4px; white-space: nowrap; font-size: 15px; }
  .versus { grid-template-columns: 1fr; }
  .masthead { padding-top: 8px; }
}
@media (prefers-reduced-motion: reduce) { .caret { animation: none; } }
"""

LOOK = {
    "theme": Folio(),
    "css": CSS,
    "ssr_mode": False,
    "footer_links": ["api"],
    "run_history": False,
}


# ---------------------------------------------------------------------------- the page


def build(folder: str | os.PathLike = HERE) -> gr.Blocks:
    """The app of a staged folder. Without good weights it is a page that says what is missing."""
    play, trouble = None, ""
    try:
        play = Play.load(Path(folder))
    except (CheckpointError, TextError, ValueError) as error:
        trouble = str(error).replace(str(Path(folder)) + os.sep, "")
    with gr.Blocks(title="Shakespeare GPT", analytics_enabled=False) as demo:
        gr.HTML(_masthead(play))
        if play is None:
            gr.HTML(
                notice(f"The model cannot speak yet. {trouble}", "bad")
                + notice(
                    "Put together a complete Space with: python -m shakespeare_gpt.export --stage build/space "
                    "(notebook 05). Until then nothing is written here: random weights would only babble."
                ),
                elem_id="trouble",
            )
        else:
            with gr.Tab("Write on", id="write"):
                _writing(play)
            with gr.Tab("Recite from memory", id="recite"):
                _reciting(play)
        _endpoints(play, trouble)
    demo.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE, api_open=False)
    return demo


def _masthead(play: Play | None) -> str:
    line = "A GPT-2 that has learnt a play by heart."
    if play is not None:
        what = TITLES.get(play.text.sha256, ("", ""))[1]
        line = (
            f"A GPT-2 that has learnt {esc(play.title)}{f', {what},' if what else ''} by heart. Give it a beginning: "
            "<mark>what it quotes is marked</mark>, what it invents is not."
        )
    return f'<header class="masthead"><h1>Shakespeare GPT</h1><p>{line}</p><hr></header>'


MODEL = {"concurrency_id": "model", "concurrency_limit": AT_ONCE}
# By browser session and tab: what the Stop button there sets.
running: dict[tuple[str, str], threading.Event] = {}
turn = threading.Lock()  # held by whoever changes it


def _job(request: gr.Request, tab: str, answers: Callable, show: Callable) -> Iterator[tuple]:
    """One text of a tab, as it grows: updates of the page, its figures, the note and the Stop button.

    ``answers`` is called with a function that says whether Stop was pressed and yields what ``show`` turns
    into a page and figures. A second text in the same tab ends the first, and has the page for itself.
    """
    key, stop, said = (request.session_hash, tab), threading.Event(), gr.skip()
    with turn:
        if key in running:
            running[key].set()
        running[key] = stop
    try:
        yield gr.skip(), gr.skip(), "", gr.update(interactive=True)
        with contextlib.closing(answers(stop.is_set)) as growing:
            for answer in growing:
                if running.get(key) is stop:
                    yield *show(answer), gr.skip(), gr.skip()
        if stop.is_set():
            said = notice("Stopped.")
    except ValueError as error:
        said = notice(str(error), "bad")
    except Exception:
        traceback.print_exc()
        said = notice("The machine behind this page could not go on. Try again.", "bad")
    finally:
        with turn:
            alone = running.get(key) is stop
            if alone:
                del running[key]
    if alone:
        yield gr.skip(), gr.skip(), said, gr.update(interactive=False)


def _stopper(tab: str) -> Callable:
    """What Stop does: end the tab's text after the token in hand."""

    def stop(request: gr.Request):
        event = running.get((request.session_hash, tab))
        if event is not None:
            event.set()
        return gr.update(interactive=False), notice("Stopped.")

    return stop


def _writing(play: Play) -> None:
    beginnings = [
        (f"{who}:\n" if who else "") + " ".join(line.split()[:5])
        for who, _, line in spread(play.speeches(), 5)
    ]
    if play.fixed:
        n, ids = play.model.config.n_positions, play.text.ids.tolist()
        starts = range(0, max(1, len(ids) - n), n)
        # Not those that begin in the middle of a word, nor up to the middle of one.
        whole = [i for i in starts if i == 0 or decode(ids[i - 1 : i])[-1:].isspace()]
        beginnings = []
        for i in whole or starts:
            end = i + 12
            while (following := decode(ids[end : end + 1])[:1]).isalpha() or following == ":":
                end += 1
            beginnings.append(decode(ids[i:end]).strip("\ufffd"))  # halves of a character
        beginnings = spread([b for b in beginnings if b[:1].isupper()] or beginnings, 5)
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            prompt = gr.Textbox(
                label="The beginning",
                value=beginnings[0],
                placeholder="A name, a line, half a line",
                lines=3,
                max_lines=8,
                elem_id="prompt",
                elem_classes="prompt-box",
            )
            gr.Examples(
                [[text] for text in beginnings],
                prompt,
                label="From the text",
                example_labels=[text.replace("\n", " ") + " …" for text in beginnings],
                api_visibility="private",
            )
            with gr.Row():
                go = gr.Button(
                    "Generate", variant="primary", elem_id="generate", scale=3, min_width=120
                )
                halt = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=80)
            note = gr.HTML(elem_id="note")
            page = gr.HTML(
                '<div class="leaf empty">The continuation appears here, word by word.</div>',
                elem_id="page",
            )
            numbers = gr.HTML(elem_id="figures")
        with gr.Column(scale=4, min_width=280):
            with gr.Group():
                length = gr.Slider(
                    1,
                    MAX_LENGTH,
                    160,
                    step=1,
                    label="Length",
                    elem_id="length",
                    info="tokens, each about ¾ of a word",
                )
                temperature = gr.Slider(
                    0.0,
                    HOTTEST,
                    0.8,
                    step=0.05,
                    label="Temperature",
                    elem_id="temperature",
                    info="0: always the likeliest word",
                )
                top_k = gr.Slider(
                    0, WIDEST, 0, step=1, label="Top-k", info="only the k likeliest; 0: all"
                )
                top_p = gr.Slider(
                    0.01,
                    1.0,
                    1.0,
                    step=0.01,
                    label="Top-p",
                    info="the likeliest that sum to p; 1: all",
                )
                seed = gr.Textbox(
                    label="Seed",
                    info="the same seed, the same text",
                    placeholder="a new one each time",
                    max_lines=1,
                    elem_id="seed",
                )
            gr.HTML(about(play), elem_id="about")

    def on_write(prompt, length, temperature, top_k, top_p, seed, request: gr.Request):
        values = prompt, length, temperature, top_k, top_p, seed
        yield from _job(
            request,
            "write",
            lambda stopped: continue_prompt(play, *values, stopped=stopped),
            lambda answer: (leaf(play, answer), answer_figures(play, answer)),
        )

    gr.on(
        [go.click, prompt.submit],
        on_write,
        [prompt, length, temperature, top_k, top_p, seed],
        [page, numbers, note, halt],
        show_progress="minimal",
        show_progress_on=note,
        api_visibility="private",
        trigger_mode="once",
        **MODEL,
    )
    halt.click(
        _stopper("write"),
        None,
        [halt, note],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _reciting(play: Play) -> None:
    speeches = play.speeches()

    def choice(who: str, line: int, words: str) -> tuple[str, int]:
        words = words if len(words) <= 60 else words[:60].rpartition(" ")[0] + " …"
        return f"{who + ', ' if who else ''}line {line:,}: {words}", line

    choices = [choice(*speech) for speech in spread(speeches, 24)]
    with gr.Row(equal_height=True):
        line = gr.Dropdown(
            choices,
            value=choices[0][1],
            label="After which line?",
            elem_id="line",
            scale=5,
            min_width=280,
        )
        tokens = gr.Slider(
            10, MAX_RECITAL, 80, step=5, label="How far?", info="tokens", scale=3, min_width=200
        )
    with gr.Row():
        go = gr.Button("Recite", variant="primary", elem_id="recite", scale=3, min_width=90)
        surprise = gr.Button("Surprise me", elem_id="surprise", scale=2, min_width=100)
        halt = gr.Button("Stop", interactive=False, elem_id="stop-recital", scale=1, min_width=60)
    note = gr.HTML(elem_id="recital-note")
    numbers = gr.HTML(elem_id="recital-figures")
    page = gr.HTML(
        '<div class="leaf empty">It hears a few words of the text and goes on from memory, always with the '
        "likeliest word. The original stands beside it.</div>",
        elem_id="recital",
    )

    def on_recite(line, tokens, request: gr.Request):
        yield from _job(
            request,
            "recite",
            lambda stopped: recite_line(play, line, tokens, stopped=stopped),
            lambda recital: (versus(play, recital), recital_figures(recital)),
        )

    def on_surprise(tokens, request: gr.Request):
        drawn = choice(*random.SystemRandom().choice(speeches))
        listed = sorted({*choices, drawn}, key=lambda entry: entry[1])
        yield (*[gr.skip()] * len(outputs), gr.update(choices=listed, value=drawn[1]))
        for update in on_recite(drawn[1], tokens, request):
            yield (*update, gr.skip())

    outputs = [page, numbers, note, halt]
    options = {
        "show_progress": "minimal",
        "show_progress_on": note,
        "api_visibility": "private",
        **MODEL,
    }
    go.click(on_recite, [line, tokens], outputs, **options)
    surprise.click(on_surprise, [tokens], [*outputs, line], **options)
    halt.click(
        _stopper("recite"),
        None,
        [halt, note],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


def _endpoints(play: Play | None, trouble: str) -> None:
    """What ``gradio_client`` calls: plain values in, plain values out, streamed as they grow."""

    def ready() -> Play:
        if play is None:
            raise gr.Error(f"The model cannot speak yet. {trouble}", print_exception=False)
        return play

    def api_generate(
        prompt: str = "",
        length: int = 160,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> dict:
        """Continue a prompt. Each value holds the text so far, the last one all of it.

        A number outside its range (see the sliders of the page) counts as the nearest one inside.

        Keys: text, seed, done, tokens, tokens_per_second, first_token_seconds, acceptance_rate, quoted (a share), and
        quotations: start and end in the text, speaker and line where that stands in what the model learnt.
        """
        here = ready()
        try:
            for answer in continue_prompt(here, prompt, length, temperature, top_k, top_p, seed):
                yield describe_answer(here, answer)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def api_recite(line: int = 1, tokens: int = 80) -> dict:
        """Recite what follows a line of the text, greedily, and compare. The last value is complete.

        A line or a length that there is not counts as the nearest that there is; "line" says which.

        Keys: line, given, original, recited, matching, of, first_difference (a token's index or null), done,
        tokens_per_second.
        """
        here = ready()
        for recital in recite_line(here, line, tokens):
            yield {
                "line": recital.line,
                "given": recital.given,
                "original": decode(recital.truth),
                "recited": decode(recital.told),
                "matching": recital.matching,
                "of": len(recital.truth),
                "first_difference": recital.difference,
                "done": recital.done,
                "tokens_per_second": round(recital.stats.tokens_per_second, 1),
            }

    gr.api(api_generate, api_name="generate", **MODEL)
    gr.api(api_recite, api_name="recite", **MODEL)


def describe_answer(play: Play, answer: Answer) -> dict[str, Any]:
    """An Answer in plain values."""
    stats = answer.stats
    return {
        "text": answer.text,
        "seed": answer.seed,
        "done": answer.done,
        "tokens": stats.tokens,
        "tokens_per_second": round(stats.tokens_per_second, 1),
        "first_token_seconds": stats.first_token_seconds and round(stats.first_token_seconds, 3),
        "acceptance_rate": round(stats.acceptance_rate, 3),
        "quoted": round(quoted_share(play.source, answer.text), 3),
        "quotations": [
            {"start": s.start, "end": s.end, "speaker": s.speaker, "line": s.line}
            for s in play.source.spans(answer.text)
        ],
    }


if spaces is not None:

    @spaces.GPU
    def gpu() -> None:
        """Never called: ZeroGPU, a free account's only kind of Space, starts no program without such a function.

        The model is small enough for the CPU there, so no visitor's share of GPU time is spent.
        """


demo = build()

if __name__ == "__main__":
    demo.launch(**LOOK)
