"""The search for the recipe: many short runs of the same model on the same text, one table.

    python -m benchmarks.recipes --workers 3

Each entry of a JSON file, by default those of the runs in ``logs/recipes``, names a run and the settings in
which it differs from ``BEGAN``, those with which the search of ``gpt2``'s began. A run always goes to the end
of its schedule, so that all runs of one length saw the same number of tokens; the table says what the whole
text's mean was there. Runs share the device, so their seconds are no benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import get_preset
from shakespeare_gpt.recite import exact_recall, window_starts
from shakespeare_gpt.train import TARGET, TrainingError, commit, device_name, evaluate, train

BEGAN = {"batch_size": 8, "passes": 8, "muon_lr": 0.02, "adam_lr": 2e-3}


def run(
    name: str, expected: str, changes: dict, preset_name: str, text_source: str | None, folder: Path
) -> dict:
    """One run; its log goes to ``folder``, its row is returned."""
    preset = get_preset(preset_name)
    text = preset.load_text(text_source)
    never = {"target": 1e-9, "stop_on": "text"}  # no early stop: to the end of the schedule
    config = dataclasses.replace(preset.train, **{**BEGAN, **never, **changes})
    config = dataclasses.replace(config, max_passes=config.passes, min_steps=1)
    model = GPT(preset.model, torch.Generator().manual_seed(config.seed))
    row = {"run": name, "expected": expected, "changes": changes}
    head = {"run": name, "config": dataclasses.asdict(config)}
    head |= {
        "device": f"{device_name(model.device)}, torch {torch.__version__}",
        "commit": commit(),
    }
    lines = [json.dumps(head)]
    step, note = None, ""
    try:
        for step in train(model, text.ids, config):
            if step.step % 10 == 0:
                lines.append(
                    f"{step.step} | {step.loss:.4f} | {step.best:.4f} | {step.lr:.2e} | {step.tokens_per_second:.0f}"
                )
    except TrainingError as error:
        if "exploded" in str(error):
            note = "exploded"
    model.eval()
    precision = "bf16" if model.device.type == "cuda" else "fp32"
    row["whole_text"] = evaluate(model, text.ids, precision=precision)
    if step is not None:
        losses = step.history.losses
        batch = config.batch_size * preset.model.n_positions
        first = next((i + 1 for i, loss in enumerate(losses) if loss < TARGET), None)
        tail = max(1, len(losses) // max(1, round(config.passes)))
        row |= {
            "steps": len(losses),
            "tokens": step.history.tokens,
            "first_batch_tokens": first and first * batch,
            "last_pass_mean": sum(losses[-tail:]) / tail,
            "seconds": step.history.seconds,
        }
    for key, starts in (
        ("recall_any", None),
        ("recall_window", window_starts(len(text.ids), preset.model.n_positions, asked=82)),
    ):
        matched = exact_recall(model, text.ids, starts=starts).matched
        row[key] = [matched.float().median().item(), (matched >= 50).float().mean().item()]
    row["note"] = note
    lines.append(json.dumps(row))
    (folder / f"{name}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return row


def _worker(jobs, results, options):
    while (job := jobs.get()) is not None:
        if time.time() > options["deadline"]:
            continue
        try:
            results.put(run(*job, options["preset"], options["text"], options["folder"]))
        except Exception as error:  # one bad entry must not end the table
            results.put({"run": job[0], "note": f"{type(error).__name__}: {error}"})
    results.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="gpt2", help="whose model and text (default: gpt2)")
    parser.add_argument("--text", help="another text")
    parser.add_argument("--runs", type=Path, default=Path("logs/recipes/rows.json"))
    parser.add_argument("--out", type=Path, default=Path("build/recipes"))
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at the same time on the device"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="start no further run after this time"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    entries = json.loads(args.runs.read_text(encoding="utf-8"))
    context = mp.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    for entry in entries:
        jobs.put((entry["run"], entry.get("expected", ""), entry["changes"]))
    options = {
        "deadline": time.time() + 60 * args.minutes,
        "preset": args.preset,
        "text": args.text,
        "folder": args.out,
    }
    workers = []
    for _ in range(args.workers):
        jobs.put(None)
        workers.append(context.Process(target=_worker, args=(jobs, results, options)))
        workers[-1].start()
    print(
        f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, torch {torch.__version__}"
    )
    print(
        "| run | tokens | whole text | last pass | first batch (tokens) | recall any | recall window | seconds | note |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    rows, ended = [], 0
    while ended < args.workers:
        # Asked before: the last row of one that ends may come meanwhile.
        alive = any(worker.is_alive() for worker in workers)
        try:
            row = results.get(timeout=10)
        except queue.Empty:
            if alive:
                continue
            break  # killed, without a last word
        if row is None:
            ended += 1
            continue
        rows.append(row)
        keys = (
            "tokens",
            "whole_text",
            "last_pass_mean",
            "first_batch_tokens",
            "recall_any",
            "recall_window",
            "seconds",
            "note",
        )
        print(
            "| " + " | ".join([row["run"], *(_cell(row.get(k)) for k in keys)]) + " |", flush=True
        )
        (args.out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return " / ".join(_cell(v) for v in value)
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
