"""Train with several recipes, one after the other, and compare what each model knows at its end.

    python -m benchmarks.recipes gpt2 gpt2,seed=1 gpt2,batch_size=8,muon_lr=0.01 baseline
    python -m benchmarks.recipes gpt2,epochs=5 --to-the-end    # compare losses after as many tokens

A run is a preset and the settings that replace its own. Each becomes a row of a CSV file with the columns of
``logs/recipes.csv``; its log lies beside it. Ctrl-C, and the same command goes on from there. Whole text and
recall are measured in fp32, on the finished weights.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.data import Text
from shakespeare_gpt.memorization import exact_recall, score
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import TARGET, Preset, TrainConfig, get_preset
from shakespeare_gpt.runs.log import commit
from shakespeare_gpt.runs.run import run_to_end, start
from shakespeare_gpt.speed.devices import default_device, device_name, keep_freed_memory
from shakespeare_gpt.train import Step, TargetNotReached, TrainingError

RESULTS = ["run", "preset", "text", "whole_text"]
RESULTS += [f"{where}_{what}" for where in ("anywhere", "starts") for what in ("median", "mean", "perfect")]
RESULTS += ["steps", "tokens", "first_batch_step", "last_epoch_mean", "seconds"]
# "fixed_epochs" was a setting of earlier runs.
COLUMNS = [*RESULTS, *asdict(TrainConfig()), "fixed_epochs", "device", "versions", "commit", "note"]
SHOWN = ["run", "tokens", "whole_text", "anywhere_median", "anywhere_perfect", "starts_median", "seconds"]
SHOWN += ["note"]


def parse_run(run: str) -> tuple[Preset, TrainConfig]:
    """``PRESET,setting=value,...`` -> the preset and its settings. Raises ValueError."""
    name, *changes = run.split(",")
    preset = get_preset(name)
    given = dict(change.split("=", 1) for change in changes if "=" in change)
    known = asdict(preset.train)
    if len(given) < len(changes) or (given.keys() - known):
        raise ValueError(f"{run!r} is not PRESET,setting=value,...: the settings are {', '.join(known)}")
    kinds = {key: type(value) for key, value in asdict(TrainConfig()).items()}
    typed = {k: v == "True" if kinds[k] is bool else kinds[k](v) for k, v in given.items()}
    return preset, replace(preset.train, **typed)


def full_name(run: str, source: str | None, to_the_end: bool) -> str:
    """What a run is called in the table."""
    return run + f" on {source}" * bool(source) + " to the end" * to_the_end


def measure(run: str, source: str | None, folder: Path, to_the_end: bool = False) -> dict[str, Any]:
    """One run from random weights to its stop, and what the model knows then: a row of the table."""
    preset, config = parse_run(run)
    if to_the_end:
        config = replace(config, target=1e-9, stop_on="text", max_epochs=config.epochs, min_steps=1)
    device, text = default_device(), preset.load_text(source)
    model = GPT(preset.model, torch.Generator().manual_seed(config.seed))
    name = full_name(run, source, to_the_end)
    row = {"run": name, "preset": preset.name, "text": text.name, **asdict(config), "commit": commit()}
    row |= {"device": device_name(device)}
    row |= {"versions": f"Python {platform.python_version()}, torch {torch.__version__}"}
    checkpoint = folder / f"{re.sub('[^a-zA-Z0-9.=,-]', '_', name)}.pt"
    steps = start(preset, text, model, config=config, checkpoint=checkpoint, device=device)
    last = None

    def remember(step: Step) -> None:
        nonlocal last
        show_progress(step)
        last = step

    try:
        run_to_end(steps, remember)
    except TargetNotReached as error:  # the weights are there all the same
        row["note"] = "" if to_the_end else str(error)
    except TrainingError as error:
        return row | {"note": str(error)}
    if last is None:
        return row | {"note": f"{checkpoint} has ended before: delete it to run again"}
    say("    measuring the whole text and recall")
    row |= results(model.eval(), text, last)
    checkpoint.unlink()  # half a gigabyte; the log stays
    return row


def results(model: GPT, text: Text, last: Step) -> dict[str, Any]:
    """What the model knows at the end of a run, and what that took."""
    history, context = last.history, model.config.n_positions
    first = next((i + 1 for i, loss in enumerate(history.losses) if loss < TARGET), None)
    epoch = history.losses[-max(1, round(len(text.ids) / history.tokens * last.step)) :]
    row = {"steps": last.step, "tokens": history.tokens, "first_batch_step": first}
    row |= {"last_epoch_mean": sum(epoch) / len(epoch), "seconds": history.seconds}
    row["whole_text"] = score(model, text.ids).loss
    given, asked = (32, 50) if context >= 128 else (8, 16)
    at_starts = torch.arange(0, len(text.ids) - given - asked + 1, context)
    for where, starts in (("anywhere", None), ("starts", at_starts)):
        recall = exact_recall(model, text.ids, prompt_tokens=given, continuation=asked, starts=starts)
        row |= {f"{where}_{what}": getattr(recall, what) for what in ("median", "mean", "perfect")}
    return row


def rows_so_far(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a table written earlier."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the table ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def show_progress(step: Step, every: float = 10.0, shown: list[float] = [0.0]) -> None:  # noqa: B006
    """A line on the screen every ten seconds."""
    if step.done or time.monotonic() - shown[0] > every:
        say(f"    step {step.step} | loss {step.loss:.4f} | {step.progress:.0%} of the way")
        shown[0] = time.monotonic()


def say(line: str) -> None:
    """What goes on, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", default=["gpt2", "baseline"], help="PRESET,setting=value,...")
    parser.add_argument("--text", help="another text than the presets'")
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the target")
    parser.add_argument("--out", type=Path, default=Path("build/recipes"), help="folder of table and logs")
    parser.add_argument("--quick", action="store_true", help="a trial: smoke in place of each preset")
    args = parser.parse_args(argv)
    runs = [",".join(["smoke", *run.split(",")[1:]]) if args.quick else run for run in args.runs]
    try:
        for run in runs:
            parse_run(run)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    table = args.out / "recipes.csv"
    done = {row["run"]: row for row in rows_so_far(table)}
    say(f"{device_name(default_device())}, torch {torch.__version__}; the table is {table}")
    print(f"| {' | '.join(SHOWN)} |\n|{'---|' * len(SHOWN)}", flush=True)
    for i, run in enumerate(runs):
        name = full_name(run, args.text, args.to_the_end)
        say(f"run {i + 1} of {len(runs)}: {name}" + ", which the table holds already" * (name in done))
        try:
            row = done.get(name) or measure(run, args.text, args.out, args.to_the_end)
        except KeyboardInterrupt:
            say("Interrupted: the same command goes on from there.")
            return 130
        except (ShakespeareGPTError, torch.OutOfMemoryError) as error:  # the table goes on
            row = {"run": name, "note": str(error).splitlines()[0]}
        if name not in done:
            write_row(table, row)
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(key, "") for key in SHOWN)]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
