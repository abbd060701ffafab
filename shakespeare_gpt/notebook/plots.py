"""The pictures that the notebooks share: one look for all, and the live plot of a run."""

import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import DisplayHandle

from shakespeare_gpt.runs.log import end_line
from shakespeare_gpt.runs.run import run_to_end
from shakespeare_gpt.train import Step

BLUE, ORANGE, GREEN, RED, GREY = "#2b5c8a", "#d97b29", "#3c8d5a", "#b5383a", "#8a8a8a"
FIGURES = Path("build") / "figures"  # so a reader's run leaves the repository's own figures as they are


def style() -> None:
    """One look for every figure: legible at the width of a page, no clutter."""
    plt.rc("figure", figsize=(8, 4), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("savefig", dpi=120)
    plt.rc("font", size=12)
    plt.rc("axes", grid=True, axisbelow=True, titlesize=13, titlelocation="left")
    plt.rc("axes", prop_cycle=plt.cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#dddddd", linewidth=0.6)
    plt.rc("legend", frameon=False)


def save(fig: plt.Figure, name: str) -> None:
    """Keep a figure as ``build/figures/NAME.png``."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    fig.savefig(FIGURES / f"{name}.png", metadata={"Software": None})


def watch(steps: Iterator[Step], every: float = 3.0) -> Step:
    """Run a training generator to its end with a live plot; returns the last step.

    The picture is drawn anew every ``every`` seconds; the last one stays in the saved notebook. The stop
    button waits for the step in hand.
    """
    due, picture = 0.0, DisplayHandle()

    def show(step: Step) -> None:
        nonlocal due
        if time.monotonic() < due and not step.done:
            return
        fig = loss_figure(step)
        (picture.update if due else picture.display)(fig)
        plt.close(fig)
        due = time.monotonic() + every

    step = run_to_end(steps, show)
    print(end_line(step))
    return step


def loss_figure(step: Step) -> plt.Figure:
    """The run so far: each batch's loss, the whole text's, the target; loss in nats, log scale."""
    history = step.history
    fig, ax = plt.subplots()
    x = range(1, len(history.losses) + 1)
    ax.plot(x, history.losses, color=BLUE, linewidth=0.8, alpha=0.6, label="one batch")
    ax.plot(*np.reshape(history.text, (-1, 2)).T, "o", color=GREEN, markersize=6, label="whole text")
    ax.axhline(step.target, color=RED, linewidth=1.2, linestyle="--", label=f"target {step.target}")
    low = min(0.05, 0.8 * step.best, *(0.7 * loss for _, loss in history.text))
    ax.set(yscale="log", xlabel="step", ylabel="loss (nats per token)", ylim=(low, 14))
    speed = f"{step.tokens_per_second:,.0f} tokens/s, {step.seconds_left / 60:.1f} min left"
    ax.set_title(f"step {step.step}   {history.tokens / 1e6:.2f} million tokens   {speed}")
    ax.legend(loc="upper right")
    return fig
