"""The pictures that the notebooks share: one look for all, and the live plot of a run."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from shakespeare_gpt.publish.quotations import QuotationIndex, quoted_share
from shakespeare_gpt.runs.interrupt import run_to_end
from shakespeare_gpt.runs.log import end_line, progress_line
from shakespeare_gpt.train import Step

TINTS = ("#cfe0f1", "#fbdfc4", "#cfe9d8", "#f2d0d0", "#e0d8ef")
BLUE, ORANGE, GREEN, RED, GREY = "#2b5c8a", "#d97b29", "#3c8d5a", "#b5383a", "#8a8a8a"
FIGURES = Path("build") / "figures"  # so a reader's run leaves the repository's own figures as they are


def style() -> None:
    """One look for every figure: legible at the width of a page, no clutter."""
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4),
            "figure.dpi": 100,
            "savefig.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
            "legend.frameon": False,
        }
    )


def save(fig: plt.Figure, name: str) -> None:
    """Keep a figure as ``build/figures/NAME.png``."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURES / f"{name}.png", metadata={"Software": None})


def watch(steps: Iterator[Step], every: float = 2.0) -> Step:
    """Run a training generator to its end with a live plot; returns the last step.

    In a notebook the picture and the line under it are drawn anew every ``every`` seconds, less often where
    drawing would take more than a twentieth of the time; the last state stays in the saved file. Elsewhere
    only the line is printed. The notebook's stop button waits for the step in hand.
    """
    display, due = _display(), 0.0

    def show(step: Step) -> None:
        nonlocal due
        began = time.monotonic()
        if step.done or began >= due:
            display(step)
            now = time.monotonic()
            due = now + max(every, 20 * (now - began))

    step = run_to_end(steps, show)
    plt.close("all")
    return step


def _display() -> Callable[[Step], None]:
    """A function that shows a step in place of the one before it."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is None or get_ipython() is None:
        return lambda step: print(progress_line(step), flush=True)
    handles = []

    def show(step: Step) -> None:
        fig = loss_figure(step)
        line = {"text/plain": progress_line(step) + (f"\n{end_line(step)}" if step.done else "")}
        if handles:
            handles[0].update(fig)
            handles[1].update(line, raw=True)
        else:
            handles.append(display(fig, display_id=True))
            handles.append(display(line, raw=True, display_id=True))
        plt.close(fig)

    return show


def loss_figure(step: Step) -> plt.Figure:
    """The run so far: each batch's loss, the whole text's, the target; loss in nats, log scale."""
    history = step.history
    fig, ax = plt.subplots()
    x = np.arange(1, len(history.losses) + 1)
    ax.plot(x, history.losses, color=BLUE, linewidth=0.7, alpha=0.45, label="one batch")
    n = max(1, len(x) // 60)
    if n > 1:
        smooth = np.convolve(history.losses, np.ones(n) / n, "valid")
        ax.plot(x[n - 1 :], smooth, color=BLUE, linewidth=1.8, label=f"mean of {n} batches")
    if history.text:
        dots = zip(*history.text, strict=True)
        ax.plot(*dots, "o", color=ORANGE, markersize=6, label="whole text")
    ax.axhline(step.target, color=RED, linewidth=1.2, linestyle="--", label=f"target {step.target}")
    ax.set(yscale="log", xlabel="step", ylabel="loss (nats per token)")
    ax.set_ylim(min(0.05, step.best * 0.8), 14)
    minutes = f"{history.seconds / 60:.1f} min, {step.seconds_left / 60:.1f} min left"
    speed = f"{history.tokens / 1e6:.2f} million tokens   {step.tokens_per_second:,.0f} tokens/s"
    ax.set_title(f"step {step.step}   {speed}   {minutes}")
    ax.legend(loc="upper right")
    return fig


def quotation_figure(index: QuotationIndex, generated: str, width: int = 62) -> plt.Figure:
    """A generated text as a picture: each quotation in a colour of its own, its place in the margin.

    Lines longer than ``width`` characters are wrapped.
    """
    rows, at = [], 0  # (where a row starts in the text, its characters)
    for line in generated.split("\n"):
        for part in textwrap.wrap(line, width, drop_whitespace=False, tabsize=1) or [""]:
            rows.append((at, part))
            at += len(part)
        at += 1
    fig = plt.figure(figsize=(8, 0.19 * (len(rows) + 3)), layout="none")
    # 106.3 characters of 9-point DejaVu Sans Mono fill 8 inches.
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, 105.3), ylim=(len(rows), -3))
    ax.axis("off")
    font = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "baseline", "parse_math": False}
    for row, (_, part) in enumerate(rows):
        ax.text(0, row + 0.25, part, color="#222222", **font)
    quotations, free = index.find(generated), 0  # free: the first row whose margin is empty
    for i, quotation in enumerate(quotations):
        tint, first = TINTS[i % len(TINTS)], None
        for row, (start, part) in enumerate(rows):
            a, b = max(quotation.start - start, 0), min(quotation.end - start, len(part))
            if a < b and part[a:b].strip():
                ax.barh(row, b - a, 0.94, a, color=tint)
                first = row if first is None else first
        free = max(free, first)
        place = textwrap.shorten(quotation.place, 104 - width - 4, placeholder="…")
        ax.text(width + 3, free + 0.25, place, bbox={"fc": tint, "lw": 0, "pad": 1.5}, **font)
        free += 1
    pieces = f"{len(quotations)} piece{'s' * (len(quotations) != 1)}"
    ax.text(0, -1.7, f"{quoted_share(index, generated):.0%} of this text is quoted, in {pieces}", fontsize=12)
    return fig
