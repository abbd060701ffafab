"""Two runs of the 124M model as curves, from their logs: ``python tools/loss_curve.py``.

Draws the loss of every tenth batch over the tokens read, with a dot for the whole text, from
``logs/train.log`` and ``logs/baseline.log``. Writes ``figures/loss_curve.png`` and prints the numbers that
notebook 3 quotes.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib.pyplot as plt

from shakespeare_gpt.notebook import plots
from shakespeare_gpt.presets import TARGET

ROOT = Path(__file__).resolve().parent.parent
RUNS = (  # log, label, colour
    ("baseline", "baseline: AdamW at a constant rate", plots.GREY),
    ("train", "this recipe, batches of whole windows", plots.BLUE),
)


def read_log(path: Path) -> tuple[dict[str, str], list[int], list[float]]:
    """A log's head, and the steps and batch losses of its lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    rows = [line.split(" | ") for line in lines if line[:1].isdigit()]
    return head, [int(row[0]) for row in rows], [float(row[1]) for row in rows]


def facts(path: Path) -> tuple[list[int], list[float], float, list[tuple[int, float]], int | None]:
    """A log's steps and batch losses, tokens in a step (mean), [(step, whole text)], first batch under it."""
    head, steps, losses = read_log(path)
    total = re.search(r"^# (\d+) tokens, .* s$", path.read_text(encoding="utf-8"), re.MULTILINE)
    text, first = [], None
    for key, said in head.items():  # "step 514: mean over the whole text 0.072465"
        if said.startswith("mean over the whole text"):
            text.append((int(key.split()[1]), float(said.split()[-1])))
        elif "the first batch under the target" in said:
            first = int(key.split()[1])
    return steps, losses, int(total[1]) / steps[-1], text, first


def draw(logs: Path, path: Path) -> None:
    """Draw the runs in the folder ``logs`` to ``path``, and print each run's figures."""
    plots.style()
    fig, ax = plt.subplots(figsize=(8, 4))
    for name, label, colour in RUNS:
        steps, losses, per_step, text, first = facts(logs / f"{name}.log")
        millions = per_step / 1e6
        # The last line of a log may stand between two tens, and be of the other kind of batch.
        rows = zip(steps, losses, strict=True)
        points = [(step * millions, loss) for step, loss in rows if step % 10 == 0 or loss < TARGET]
        ax.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1)
        for step, loss in text:
            ax.plot(step * millions, loss, "o", color=colour)
            where = {"xytext": (9, 0), "textcoords": "offset points", "va": "top", "color": colour}
            ax.annotate(f"whole text: {loss:.3f}", (step * millions, loss), **where)
            print(f"{name}: whole text {loss:.4f} at step {step}, {step * millions:.2f} million tokens")
        if first:
            print(f"{name}: first batch under it at step {first}, {first * millions:.2f} million tokens")
    ax.axhline(TARGET, color=plots.RED, linestyle="--", linewidth=1, label=f"target {TARGET}")
    ax.set(yscale="log", xlabel="tokens read (millions)", ylabel="loss (nats per token)", ylim=(0.04, 60))
    ax.set_title("Lines are single batches, dots the whole text at the end")
    ax.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curves of two runs from their logs.")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs", metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=ROOT / "figures" / "loss_curve.png", metavar="PNG")
    options = parser.parse_args()
    draw(options.logs, options.to)
    print(f"drew {options.to.name}")


if __name__ == "__main__":
    main()
