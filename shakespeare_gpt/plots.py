"""The pictures that the notebooks share: the live plot of a run, what was memorised, one look for all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from shakespeare_gpt.checkpoint import load_checkpoint, load_model
from shakespeare_gpt.data import Text
from shakespeare_gpt.export import learnt_text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import Preset, checkpoint_path, get_preset, start
from shakespeare_gpt.tokenizer import VOCAB_SIZE
from shakespeare_gpt.train import TARGET, Step, default_device, progress_line

BLUE, ORANGE, GREEN, RED, GREY = "#2b5c8a", "#d97b29", "#3c8d5a", "#b5383a", "#8a8a8a"
WEIGHTS_VARIABLE = "SHAKESPEARE_GPT_WEIGHTS"
FIGURES_VARIABLE = "SHAKESPEARE_GPT_FIGURES"


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


def save(fig, name: str) -> None:
    """Keep a figure as ``NAME.png`` in ``figures_folder``."""
    if folder := figures_folder():
        fig.savefig(folder / f"{name}.png", metadata={"Software": None})


def figures_folder() -> Path | None:
    """Where figures are kept: ``build/figures`` or the folder that SHAKESPEARE_GPT_FIGURES names.

    So a reader's run leaves the repository's own ``figures`` as they are. None with ``smoke``, for tests.
    """
    if get_preset().name == "smoke":
        return None
    folder = Path(os.environ.get(FIGURES_VARIABLE) or "build/figures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def watch(steps: Iterator[Step], every: float = 2.0) -> Step:
    """Run a training generator to its end with a live plot; returns the last step.

    In a notebook the picture and the line under it renew themselves every ``every`` seconds, less often
    where drawing would take more than a twentieth of the time; the last state stays in the saved file.
    Elsewhere only the line is printed.
    """
    display = _display()
    with closing(steps):
        due, step = 0.0, None
        for step in steps:
            began = time.monotonic()
            if step.done or began >= due:
                display(step)
                now = time.monotonic()
                due = now + max(every, 20 * (now - began))
    plt.close("all")
    return step


def _display():
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
        line = {"text/plain": progress_line(step) + (f"\n{step.message}" if step.message else "")}
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
    if len(x) > 3 * n:
        smooth = np.convolve(history.losses, np.ones(n) / n, "valid")
        ax.plot(
            x[n - 1 :],
            smooth,
            color=BLUE,
            linewidth=1.8,
            label=f"mean of {n} batches" if n > 1 else None,
        )
    if history.text:
        ax.plot(
            *zip(*history.text, strict=True), "o", color=ORANGE, markersize=6, label="whole text"
        )
    ax.axhline(TARGET, color=RED, linewidth=1.2, linestyle="--", label=f"target {TARGET}")
    ax.set(yscale="log", xlabel="step", ylabel="loss (nats per token)")
    ax.set_ylim(min(0.05, min(history.losses) * 0.8), 14)
    ax.set_title(
        f"step {step.step}   {history.tokens / 1e6:.2f} million tokens   {step.tokens_per_second:,.0f} tokens/s   "
        f"{history.seconds / 60:.1f} min, {step.seconds_left / 60:.1f} min left"
    )
    ax.legend(loc="upper right")
    return fig


def trained_model(preset: Preset | None = None, device=None) -> tuple[GPT, Text, dict]:
    """A model that knows its text: (model, text, what the weights say about themselves).

    The weights that SHAKESPEARE_GPT_WEIGHTS names, else the preset's checkpoint; where there is none, or
    only an interrupted one, the preset is trained on the spot, with the live plot.
    """
    preset = preset or get_preset()
    device = device or default_device()
    if given := os.environ.get(WEIGHTS_VARIABLE):
        model, meta = load_model(given, device, vocab_size=VOCAB_SIZE)
        return model, learnt_text(meta), meta
    text = preset.load_text()
    path = checkpoint_path(preset, text)
    if not path.exists() or not load_checkpoint(path)["finished"]:
        watch(start(preset, text, device=device))
    model, meta = load_model(path, device)
    return model, text, meta


def read_log(path: str | os.PathLike) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """A log's head, and the steps and batch losses of its lines."""
    head, rows = {}, []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and ": " in line:
            key, value = line[2:].split(": ", 1)
            head[key] = value
        elif line[:1].isdigit():
            rows.append(line.split(" | ")[:2])
    table = np.array(rows, dtype=float).reshape(-1, 2)
    return head, table[:, 0], table[:, 1]


def token_loss_figure(losses, context: int) -> plt.Figure:
    """The loss of every token of a text as one picture, one window to a column, read downwards."""
    losses = np.asarray(losses)
    columns = -(-len(losses) // context)
    grid = np.full(columns * context, np.nan)
    grid[: len(losses)] = losses
    fig, ax = plt.subplots(figsize=(8, 3.6))
    image = ax.imshow(
        np.minimum(grid, 5.0).reshape(columns, context).T,
        aspect="auto",
        interpolation="nearest" if columns < 400 else "antialiased",
        cmap="magma_r",
        vmin=0,
        vmax=5,
    )
    ax.grid(False)
    ax.set(xlabel="window, in the order of the text", ylabel="token in the window")
    fig.colorbar(image, label="loss (nats; 5 and more in black)", pad=0.01)
    return fig


def learning_gif(moments: list[tuple[int, str]], prompt: str, truth: str, name: str) -> None:
    """An animation of one prompt continued at several moments of a run, and its last frame as a still.

    ``moments``: (step, continuation). What agrees with ``truth`` from the beginning on is green. A frame has
    room for two lines more than ``truth``; what still does not fit is counted, not shown. Written to
    ``NAME.gif`` and ``.png`` in ``figures_folder``.
    """
    frames = []
    rows = (prompt + truth).count("\n") + 3
    height = 0.9 + 0.3 * rows  # inches
    for step, said in moments:
        right = len(os.path.commonprefix([said, truth]))
        fig = plt.figure(figsize=(8, height), dpi=100, layout="none")
        head = {"color": GREY, "va": "top"}
        top = 1 - 0.3 / height
        fig.text(0.04, top, f"step {step:,}", fontsize=15, family="monospace", **head)
        score = f"{right} of {len(truth)} characters right"
        fig.text(0.96, top, score, fontsize=11, ha="right", **head)
        lines = (prompt + said).split("\n")
        at = 0
        for i, line in enumerate(lines[:rows]):
            y, x = 1 - (0.8 + 0.3 * i) / height, 0.04
            for piece, colour in _coloured(line, at, len(prompt), len(prompt) + right):
                fig.text(x, y, piece, fontsize=12, color=colour, va="top", family="monospace")
                x += 0.0125 * len(piece)  # of a monospaced font, so that blanks count too
            at += len(line) + 1
        fig.canvas.draw()
        frames.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()))
        plt.close(fig)
    folder = figures_folder()
    if folder is None:
        return
    durations = [700] * (len(frames) - 1) + [3500]
    small = [frame.quantize(64) for frame in frames]
    small[0].save(
        folder / f"{name}.gif", save_all=True, append_images=small[1:], duration=durations, loop=0
    )
    frames[-1].save(folder / f"{name}.png")


def _coloured(line: str, at: int, given: int, right: int) -> list[tuple[str, str]]:
    """Cut a line that begins at character ``at`` into prompt, right and wrong, each with its colour."""
    cuts = [0, *(min(max(0, edge - at), len(line)) for edge in (given, right)), len(line)]
    pieces = zip(cuts, cuts[1:], ("#222222", GREEN, RED), strict=False)
    return [(line[a:b], colour) for a, b, colour in pieces if b > a]
