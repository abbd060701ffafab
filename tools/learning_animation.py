"""A run as an animation: ``python tools/learning_animation.py CHECKPOINT``.

Draws what a run of notebook 3 said on the way, from the samples in its checkpoint: one prompt, continued at
several moments. Writes ``figures/learning.gif``, a frame for each moment, and the last frame as ``.png``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont, get_font
from PIL import Image

from shakespeare_gpt.notebook.plots import GREEN, GREY, RED
from shakespeare_gpt.publish.export import learnt_text
from shakespeare_gpt.runs.weights import load_checkpoint, load_model
from shakespeare_gpt.sample import generate
from shakespeare_gpt.tokenizer import decode, encode

PROMPT, SAID = 12, 60  # tokens, as in notebook 3
WIDTH, LINE = 72, 0.3  # characters in a line of 8 inches; the height of a line, in inches


def moments(checkpoint: str | os.PathLike, text: str | None = None) -> tuple[list[tuple[int, str]], str, str]:
    """What a run said at several steps, [(step, continuation), ...], its prompt, and how the text goes on."""
    model, meta = load_model(checkpoint)
    play = learnt_text(meta, text).text
    speeches = play.split("\n\n")
    at = play.index(speeches[len(speeches) // 2])
    ids = encode(play[at : at + 1000])
    said = decode(generate(model, ids[:PROMPT], max_new_tokens=SAID, temperature=0))
    # A run is saved before its caller takes the last sample.
    earlier = [tuple(sample) for sample in load_checkpoint(checkpoint)["history"]["samples"]]
    samples = [sample for sample in earlier if sample[0] != meta["steps"]] + [(meta["steps"], said)]
    return samples, decode(ids[:PROMPT]), decode(ids[PROMPT : PROMPT + SAID])


def draw(samples: list[tuple[int, str]], prompt: str, truth: str, path: Path) -> None:
    """Write the animation to ``path`` and its last frame to the same name with ``.png``.

    What agrees with ``truth`` from the beginning on is green, the rest red. Long lines are wrapped. Two lines
    more than ``truth`` has are shown; of more only the number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(wrapped(prompt + truth)) + 2
    frames = [frame(step, said, prompt, truth, rows) for step, said in samples]
    first, *others = [image.quantize(64) for image in frames]
    times = [700] * len(others) + [3500]  # milliseconds
    first.save(path, save_all=True, append_images=others, duration=times, loop=0)
    frames[-1].save(path.with_suffix(".png"))


def frame(step: int, said: str, prompt: str, truth: str, rows: int) -> Image.Image:
    """One moment: the step, how much is right, and the text in ``rows`` rows."""
    right = len(os.path.commonprefix([said, truth]))
    # What the font lacks (an untrained model writes in every script) becomes a dot.
    known = get_font(findfont("monospace")).get_charmap()
    whole = "".join(c if c == "\n" or ord(c) in known else "·" for c in prompt + said)
    lines, height = wrapped(whole), 1.2 + LINE * rows  # inches
    fig = plt.figure(figsize=(8, height), dpi=100, layout="none")

    def write(x: float, inches: float, text: str, size: int = 12, color: str = GREY, **more):
        font = {"family": "monospace", "va": "top", "parse_math": False}
        fig.text(x, 1 - inches / height, text, fontsize=size, color=color, **font, **more)

    write(0.04, 0.3, f"step {step:,}", 15)
    write(0.96, 0.3, f"{right} of {len(truth)} characters right", ha="right")
    for i, (at, line) in enumerate(lines[:rows]):
        cuts = [0, *(min(max(0, e - at), len(line)) for e in (len(prompt), len(prompt) + right))]
        for a, b, color in zip(cuts, [*cuts[1:], None], ("#222222", GREEN, RED), strict=True):
            # 0.01254: a character's share of 8 inches at 12 points
            write(0.04 + 0.01254 * a, 0.8 + LINE * i, line[a:b], color=color)
    if lines[rows:]:
        write(0.04, 0.8 + LINE * rows, f"... and {len(whole) - lines[rows][0]:,} characters more")
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
    plt.close(fig)
    return image


def wrapped(text: str) -> list[tuple[int, str]]:
    """The lines of a text, long ones cut: (where the line begins in the text, the line)."""
    lines, at = [], 0
    for line in text.split("\n"):
        lines += [(at + i, line[i : i + WIDTH]) for i in range(0, max(1, len(line)), WIDTH)]
        at += len(line) + 1
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a run as an animation.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", help="the text that it learnt, if it is your own")
    parser.add_argument("--to", type=Path, default=Path("figures") / "learning.gif", metavar="GIF")
    options = parser.parse_args()
    draw(*moments(options.checkpoint, options.text), options.to)
    print(f"drew {options.to.as_posix()}")


if __name__ == "__main__":
    main()
