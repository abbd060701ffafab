"""Draw the diagrams of the notebooks: ``python tools/diagrams.py``.

One unit of a drawing is an inch, so that boxes and fonts keep their proportion.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from shakespeare_gpt.notebook.plots import BLUE, GREEN, GREY, ORANGE, RED, style

FIGURES = Path(__file__).resolve().parent.parent / "figures"
CELL = 0.62  # the width of a token in the picture of the draft
LINE = ["If", "music", "be", "the", "food", "of", "love", ",", "play", "on", ";", "\\n"]


def canvas(height: float, title: str) -> Axes:
    """An empty page, 8 inches wide; the title takes the upper half inch."""
    fig = plt.figure(figsize=(8, height))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 8), ylim=(0, height))
    ax.axis("off")
    ax.text(0.2, height - 0.3, title, size=13, weight="bold", va="center")
    return ax


def label(ax: Axes, x: float, y: float, text: str, color: str = "black", **options) -> None:
    ax.text(x, y, text, **{"size": 11, "ha": "center", "va": "center", "color": color, **options})


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str, **options):
    """A tinted box whose lower left corner is (x, y); the ``options`` are those of its label."""
    tint, shape = 1 - 0.25 * (1 - np.array(to_rgb(color))), "round,pad=0,rounding_size=0.05"
    patch = FancyBboxPatch((x, y), width, height, shape, facecolor=tint, edgecolor=color, linewidth=1.2)
    label(ax, x + width / 2, y + height / 2 - 0.01, text, **options)
    return ax.add_patch(patch)


def arrow(ax: Axes, *points: tuple[float, float], color: str = "black", width: float = 1.4) -> None:
    """A line through the points, with its head at the last one."""
    ax.plot(*zip(*points[:-1], strict=True), color=color, linewidth=width, solid_joinstyle="round")
    look = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=look)


def residual_stream() -> None:
    ax = canvas(3.4, "A block reads from the residual stream and adds to it")
    arrow(ax, (0.2, 0.85), (7.8, 0.85), color=BLUE, width=5)
    branch(ax, 0.75, "ln_1", "attn", "Attention", "mixes between positions", ORANGE)
    branch(ax, 4.15, "ln_2", "mlp", "MLP", "works at each position alone", GREEN)
    label(ax, 0.2, 0.45, "x   (B, T, C)", BLUE, ha="left")
    save("residual_stream")


def branch(ax: Axes, x: float, norm: str, name: str, title: str, what: str, color: str) -> None:
    """Read from the stream at x, work, and add to the stream."""
    arrow(ax, (x, 0.85), (x, 2.05), (x + 0.25, 2.05))
    ax.plot(x, 0.85, "o", color="black", markersize=8, zorder=4)
    box(ax, x + 0.25, 1.7, 1.0, 0.7, f"LayerNorm\n{norm}", GREY)
    arrow(ax, (x + 1.25, 2.05), (x + 1.55, 2.05))
    box(ax, x + 1.55, 1.7, 1.05, 0.7, f"{title}\n{name}", color)
    label(ax, x + 1.42, 2.65, what, size=10.5)
    arrow(ax, (x + 2.6, 2.05), (x + 2.9, 2.05), (x + 2.9, 1.02))
    circle = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": BLUE, "linewidth": 2}
    label(ax, x + 2.9, 0.85, "+", BLUE, size=14, weight="bold", bbox=circle, zorder=5)
    label(ax, x + 2.9, 0.45, f"x = x + {name}({norm}(x))", BLUE)


def heads() -> None:
    ax = canvas(5.6, "Each head attends for itself, in its own slice of the channels")
    colors, width = [BLUE, ORANGE, GREEN], 1.93
    for i, color in enumerate(colors):
        x = 1.7 + i * width
        for y, name in [(4.2, "q"), (3.83, "k"), (3.46, "v")]:
            box(ax, x, y, width, 0.32, f"{name} of head {i}", color)
        arrow(ax, (x + width / 2, 3.44), (x + width / 2, 3.07))
        pattern(ax, x + 0.59, 2.3, seed=i, color=color)
        arrow(ax, (x + width / 2, 2.27), (x + width / 2, 1.86))
        box(ax, x, 1.5, width, 0.34, f"result {i}", color)
        arrow(ax, (x + width / 2, 1.48), (x + width / 2, 1.1))
    box(ax, 1.7, 0.66, 3 * width, 0.42, "c_proj mixes the slices", GREY)
    arrow(ax, (4.6, 0.66), (4.6, 0.25))
    label(ax, 4.75, 0.38, "12 channels, to be added to the stream", ha="left", size=10.5)
    ax.annotate("", (1.7, 4.68), (1.7 + 3 * width, 4.68), arrowprops={"arrowstyle": "<->", "shrinkA": 0})
    label(ax, 4.6, 4.86, "12 channels, cut into slices of 4, one for each of the 3 heads", size=10.5)
    label(ax, 0.2, 3.99, "from c_attn,\nin one product", ha="left", size=10)
    label(ax, 0.2, 2.68, "attention,\nonce for each head", ha="left", size=10)
    label(ax, 0.2, 1.67, "side by side", ha="left", size=10)
    save("heads")


def pattern(ax: Axes, x: float, y: float, seed: int, color: str, n: int = 5, size: float = 0.15) -> None:
    """A made-up attention matrix: the row is who looks, the column what it sees."""
    scores = np.random.default_rng(seed).normal(0, 1.5, (n, n))
    for i, j in np.ndindex(n, n):
        weight = np.exp(scores[i, j]) / np.exp(scores[i, : i + 1]).sum() if j <= i else 0
        corner = (x + j * size, y + (n - 1 - i) * size)
        fill = 1 - weight * (1 - np.array(to_rgb(color)))
        ax.add_patch(plt.Rectangle(corner, size, size, facecolor=fill, edgecolor="#cccccc", linewidth=0.6))


def windows() -> None:
    ax = canvas(4.85, "Fixed windows show a token at one position, moving windows at many")
    for i, token in enumerate(LINE):
        box(ax, 1.1 + 0.55 * i, 3.85, 0.52, 0.36, token, RED if token == "love" else GREY, size=10.5)
    label(ax, 0.2, 4.03, "tokens", ha="left", size=10.5)
    epochs(ax, 2.25, "Fixed", [0, 0, 0], BLUE)
    epochs(ax, 0.6, "Moving", [1, 3, 2], GREEN)
    label(ax, 1.1, 0.28, "Each number is a token's position in its window, here of 4 tokens.", ha="left")
    save("windows")


def epochs(ax: Axes, bottom: float, kind: str, shifts: list[int], color: str, window: int = 4) -> None:
    """Three epochs, one below the other: windows that begin at ``shift``, and the position of each token."""
    love, page = LINE.index("love"), plt.Rectangle((1.07, 0), 6.6, 5, transform=ax.transData)
    met = ", ".join(str((love - shift) % window) for shift in shifts)
    title = f"{kind} windows: in epochs 1, 2, 3, “love” stands at position {met}"
    label(ax, 1.1, bottom + 1.28, title, color, ha="left", weight="bold")
    for number, shift in enumerate(shifts):
        y = bottom + 0.76 - 0.38 * number
        label(ax, 0.2, y + 0.15, f"epoch {number + 1}", ha="left", size=10.5)
        for start in range(shift - window, len(LINE), window):
            patch = box(ax, 1.1 + 0.55 * start, y, 0.55 * window - 0.05, 0.3, "", color)
            patch.set_clip_path(page)  # a window at the edge goes on beyond the picture
        for i in range(len(LINE)):
            bold = {"weight": "bold", "color": RED, "size": 12} if i == love else {"size": 10.5}
            label(ax, 1.36 + 0.55 * i, y + 0.15, str((i - shift) % window), **bold)


def cache() -> None:
    ax = canvas(3.75, "With a key-value cache, a new token costs one position instead of all")
    for i in range(4):
        label(ax, 0.2, 2.52 - 0.42 * i, f"step {i + 1}", ha="left", size=10.5)
    panel(ax, 0.9, "Without a cache", [0, 0, 0, 0], "computed in this step", ORANGE)
    panel(ax, 4.4, "With a cache", [0, 2, 3, 4], "not computed: keys and values are kept", BLUE)
    save("cache")


def panel(ax: Axes, x: float, title: str, kept: list[int], meaning: str, color: str) -> None:
    """Four steps, of which each finds ``kept`` tokens in the cache; below, what ``color`` means."""
    label(ax, x, 3.0, title, ha="left", weight="bold")
    costs = [step(ax, x, 2.35 - 0.42 * i, 2 + i, kept[i]) for i in range(4)]
    label(ax, x, 0.77, f"{' + '.join(map(str, costs))} = {sum(costs)} positions computed", ha="left")
    box(ax, x, 0.2, 0.3, 0.26, "", color)
    label(ax, x + 0.4, 0.33, meaning, ha="left", size=10.5)


def step(ax: Axes, x: float, y: float, tokens: int, kept: int) -> int:
    """One step: it reads ``tokens``, of which ``kept`` lie in the cache. The positions that it computes."""
    for i, token in enumerate(LINE[:tokens]):
        box(ax, x + 0.55 * i, y, 0.52, 0.34, token, BLUE if i < kept else ORANGE, size=10.5)
    end = x + 0.55 * tokens
    arrow(ax, (end, y + 0.17), (end + 0.25, y + 0.17))
    label(ax, end + 0.3, y + 0.16, LINE[tokens], ha="left", size=10.5)
    return tokens - kept


def draft() -> None:
    ax = canvas(4.75, "One forward pass checks a whole draft of guessed tokens")
    x = [2 + CELL * i for i in range(10)]  # where the columns begin
    label(ax, (x[0] + x[3]) / 2, 4.05, "text so far", size=10.5)
    label(ax, (x[3] + x[9]) / 2, 4.05, "draft: six guessed tokens", size=10.5)
    row(ax, x[0], 3.5, [*LINE[:3], "the", "food", "of", "life", ",", "play"], [GREY] * 3 + [ORANGE] * 6)
    box(ax, x[0], 2.8, 9 * CELL - 0.05, 0.38, "one forward pass of the model", BLUE)
    for i, left in enumerate(x[:9]):
        arrow(ax, (left + CELL / 2, 3.48), (left + CELL / 2, 3.2))
        if i > 2:
            arrow(ax, (left + CELL / 2, 2.78), (left + CELL / 2, 2.43))
    row(ax, x[3], 2.05, [*LINE[3:7], "–", "–"], [GREEN] * 3 + [RED] + [GREY] * 2)
    label(ax, (x[3] + x[6]) / 2, 1.76, "equal to the draft:\naccepted", GREEN, size=10.5)
    label(ax, (x[6] + x[7]) / 2, 1.76, "differs:\nreplaced", RED, size=10.5)
    label(ax, (x[7] + x[9]) / 2, 1.76, "after “life”:\ndiscarded", size=10.5)
    row(ax, x[0], 0.8, LINE[:7], [GREY] * 3 + [GREEN] * 3 + [RED])
    label(ax, x[3], 0.48, "four new tokens, each the model's own choice", ha="left", size=10.5)
    label(ax, 0.2, 3.68, "input", ha="left", size=10.5)
    label(ax, 0.2, 2.23, "the model's choice\nafter the input\nto the left", ha="left", size=10.5)
    label(ax, 0.2, 0.98, "result", ha="left", size=10.5)
    save("draft")


def row(ax: Axes, x: float, y: float, tokens: list[str], colors: list[str]) -> None:
    for i, (token, color) in enumerate(zip(tokens, colors, strict=True)):
        box(ax, x + CELL * i, y, CELL - 0.05, 0.36, token, color)


def save(name: str) -> None:
    """Write the page as a small PNG of 128 colours."""
    fig = plt.gcf()
    fig.set_dpi(plt.rcParams["savefig.dpi"])
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(FIGURES / f"{name}.png", optimize=True)
    plt.close(fig)


if __name__ == "__main__":
    plt.switch_backend("agg")
    style()
    plt.rc("figure.constrained_layout", use=False)  # every place is given in inches
    for draw in (residual_stream, heads, windows, cache, draft):
        draw()
