"""How long each preset takes to know its text: steps, tokens, seconds, one batch and the whole text.

    python -m benchmarks.time_to_target --runs gpt2:0 gpt2:1 gpt2:2 seed:0

Each run starts from random weights, one after the other on the same device, and is logged in ``build/logs``. The
clock runs to the stop: recording the CUDA graph and the measurements of the whole text are included.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import get_preset
from shakespeare_gpt.recite import exact_recall, window_starts
from shakespeare_gpt.train import (
    TARGET,
    TrainingError,
    WindowOrder,
    autocast,
    default_device,
    device_name,
    evaluate,
    log_head,
    logged,
    train,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", default=["gpt2:0", "seed:0"], help="PRESET:SEED ...")
    parser.add_argument("--text", help="another text")
    parser.add_argument("--out", type=Path, default=Path("build/logs"))
    args = parser.parse_args()
    device = default_device()
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print(
        "| preset | seed | steps | tokens | passes | seconds | first batch under the target "
        "| last pass's mean | whole text | recall at window starts | recall anywhere |"
    )
    print("|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|", flush=True)
    for run in args.runs:
        name, seed = run.split(":")
        try:
            row = measure(name, int(seed), args.text, args.out, device)
        except TrainingError as error:  # the table goes on
            row = [name, seed, str(error)]
        print("| " + " | ".join(row) + " |", flush=True)


def measure(name: str, seed: int, source: str | None, out: Path, device: torch.device) -> list[str]:
    """One run from random weights to its stop, and what it knows then; the table's cells."""
    preset = get_preset(name)
    text = preset.load_text(source)
    config = dataclasses.replace(preset.train, seed=seed)
    model = GPT(preset.model, torch.Generator().manual_seed(seed))
    head = log_head(name, text.name, text.sha256, config, device)
    steps = train(model, text.ids, config, device=device)
    began = time.perf_counter()
    *_, step = logged(steps, out / f"{name}-{seed}.log", head)
    seconds = time.perf_counter() - began
    history = step.history
    batch = history.tokens // step.step  # a short text has fewer windows than config.batch_size
    if history.first_batch is not None:
        first = f"step {history.first_batch}, {history.first_batch * batch:,} tokens"
    elif config.windows == "shifted":
        first = "none"
    else:
        # The run stopped before: would the batch that comes next have been under the target?
        order = WindowOrder(len(text.ids), preset.model.n_positions, config.windows, seed)
        starts = order.batch(step.step, batch // preset.model.n_positions)
        index = (starts[:, None] + torch.arange(preset.model.n_positions + 1)) % len(text.ids)
        tokens = text.ids[index].to(device)
        with torch.no_grad(), autocast(device, "fp32"):
            loss = model(tokens[:, :-1], tokens[:, 1:]).item()
        first = (
            f"step {step.step + 1} ({loss:.4f})"
            if loss < TARGET
            else f"not at step {step.step + 1}"
        )
    per_pass = max(1, round((len(text.ids) - 1) / batch))
    tail = history.losses[-per_pass:]
    at_starts = window_starts(len(text.ids), preset.model.n_positions, asked=82, places=10**6)
    return [
        name,
        str(seed),
        f"{step.step:,}",
        f"{history.tokens:,}",
        f"{history.tokens / len(text.ids):.2f}",
        f"{seconds:.1f}",
        first,
        f"{sum(tail) / len(tail):.4f}",
        f"{evaluate(model, text.ids):.4f}",
        f"{exact_recall(model, text.ids, starts=at_starts).median:g} of 50",
        f"{exact_recall(model, text.ids).median:g} of 50",
    ]


if __name__ == "__main__":
    main()
