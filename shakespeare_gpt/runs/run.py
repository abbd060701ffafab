"""A run that outlives interruptions: saved by the clock and at its end, and resumed exactly."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import Preset, TrainConfig
from shakespeare_gpt.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from shakespeare_gpt.runs.log import log_head, logged
from shakespeare_gpt.speed.devices import best_precision, default_device, device_name
from shakespeare_gpt.train import (
    History,
    OneProcess,
    Plan,
    Step,
    TargetNotReached,
    TrainingError,
    TrainState,
    learning_rate,
    new_state,
    train,
)


def start(
    preset: Preset,
    text: Text,
    model: GPT | None = None,
    *,
    config: TrainConfig | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    device: Any = None,
    processes: OneProcess | None = None,
    restart: bool = False,
) -> Iterator[Step]:
    """A preset's run on a text, as a generator of its steps: saved in the usual place, the log beside it.

    Goes on from the run's checkpoint where there is one, unless ``restart``. ``model``, random weights
    otherwise, is trained in place; ``config``, ``checkpoint`` and ``log`` replace the preset's.
    """
    config = config or preset.train
    device = torch.device(device) if device is not None else default_device()
    model = model or GPT(preset.model, torch.Generator().manual_seed(config.seed))
    meta = {"preset": preset.name, "text_name": text.name, "text_sha256": text.sha256}
    path = Path(checkpoint or preset.checkpoint_path(text, config.seed))
    processes = processes or OneProcess()
    steps = resumable(
        model,
        text.ids,
        config,
        path,
        meta=meta,
        device=device,
        processes=processes,
        restart=restart,
    )
    if processes.rank != 0:
        return steps
    head = log_head(preset.name, text, config, device)
    return logged(steps, Path(log or path.with_suffix(".log")), head, path)


def resumable(
    model: GPT,
    ids: Tensor,
    config: TrainConfig,
    checkpoint: str | os.PathLike,
    *,
    meta: dict[str, Any] | None = None,
    device: Any = None,
    processes: OneProcess | None = None,
    save_every: float = 300.0,
    restart: bool = False,
) -> Iterator[Step]:
    """``train`` on a text's ids (n,), its whole state saved in ``checkpoint``.

    It is saved every ``save_every`` seconds, when the generator is closed, and at the end. A run that finds
    its own file goes on from it: the numbers are those of a run never interrupted. With ``restart`` it starts
    over; the old file stays until the first save. ``meta`` is stored beside the weights.

    Raises what ``train`` raises, and CheckpointError for a checkpoint of another run.
    """
    path, processes = Path(checkpoint), processes or OneProcess()
    device = torch.device(device) if device is not None else default_device()
    print_of_run = fingerprint(model, ids, config)
    precision = config.precision
    if precision == "auto":
        precision = best_precision(device)[0]
    precision = processes.agree(print_of_run, precision)
    saved = None
    if path.exists() and not restart:
        saved = _load_run(path, print_of_run)
        precision = saved["precision"]
        if saved["finished"]:
            model.load_state_dict(saved["model"])
            yield _last_step(saved, Plan(len(ids), model.config.n_positions, config), config)
            return
    state = new_state(model.to(device), config, precision)
    if saved is not None:
        restore(state, saved)
    last_save, saved_step = time.monotonic(), state.step

    def save(finished: bool = False) -> None:
        nonlocal last_save, saved_step
        last_save = time.monotonic()
        if processes.rank == 0 and (finished or state.step > saved_step):
            about = {**(meta or {}), **_about(state, ids, config, finished)}
            save_checkpoint(path, _run_dict(state, print_of_run, about, finished))
        saved_step = state.step

    def save_if_due(_: TrainState) -> None:
        if time.monotonic() - last_save > save_every:
            save()

    options = {"device": device, "processes": processes, "before_update": save_if_due}
    try:
        for step in train(model, ids, config, state=state, **options):
            if step.done:
                save(finished=True)
            try:
                yield step
            except GeneratorExit:  # between two steps, so the state is whole
                if not step.done:
                    save()
                raise
    except TargetNotReached:
        save()
        raise
    except TrainingError as error:
        where = f" {path} holds the weights of step {saved_step}." if saved_step else ""
        raise TrainingError(f"{error}{where}") from None


def fingerprint(model: GPT, ids: Tensor, config: TrainConfig) -> dict[str, Any]:
    """What must agree for one run to go on where another stopped."""
    settings = asdict(config)
    del settings["max_epochs"]  # a run that gave up may be given more
    ids = ids.cpu()
    checksum = int((ids * (torch.arange(len(ids)) % 9973 + 1)).sum())
    return {**asdict(model.config), **settings, "tokens": len(ids), "checksum": checksum}


def restore(state: TrainState, saved: dict[str, Any]) -> None:
    """Set a new state to what a checkpoint holds."""
    state.model.load_state_dict(saved["model"])
    for optimizer, theirs in zip(state.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(theirs)
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.history = saved["step"], History(**saved["history"])
    state.last_evaluation = tuple(saved["last_evaluation"])


def _run_dict(state: TrainState, print_of_run: dict, about: dict, finished: bool) -> dict[str, Any]:
    saved = {
        "model": state.model.state_dict(),
        "config": asdict(state.model.config),
        "meta": about,
        "fingerprint": print_of_run,
        "finished": finished,
        "precision": state.precision,
        "step": state.step,
        "history": asdict(state.history),
        "last_evaluation": list(state.last_evaluation),
    }
    if not finished:  # a finished run needs its optimizers no more; they are most of the file
        saved["optimizers"] = [optimizer.state_dict() for optimizer in state.optimizers]
        saved["scaler"] = state.scaler.state_dict()
    return saved


def _about(state: TrainState, ids: Tensor, config: TrainConfig, finished: bool) -> dict[str, Any]:
    """What weights say about themselves."""
    history = state.history
    measured, loss = history.text[-1] if history.text else (None, None)
    return {
        "steps": state.step,
        "tokens": history.tokens,
        "epochs": round(history.tokens / len(ids), 3),
        "loss": loss if measured == state.step else None,  # never that of earlier weights
        "target": config.target,
        "first_batch_step": history.first_batch,
        "parameters": state.model.num_parameters(),
        "seed": config.seed,
        "windows": config.windows,
        "precision": state.precision,
        "device": device_name(state.model.device),
        "seconds": round(history.seconds, 1),
        "finished": finished,
    }


def _load_run(path: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run with this fingerprint. Raises CheckpointError for any other."""
    saved = load_checkpoint(path)
    remedy = "restart, or save elsewhere."
    if "fingerprint" not in saved:
        raise CheckpointError(f"{path} holds no run to go on with: {remedy}")
    theirs = saved["fingerprint"]
    if theirs != ours:
        differs = [f"{k} {v}, not {ours.get(k)}" for k, v in theirs.items() if ours.get(k) != v]
        text = [line for line in differs if line.startswith(("tokens", "checksum"))]
        other = [line for line in differs if line not in text] + ["another text"] * bool(text)
        raise CheckpointError(
            f"{path} belongs to a run with {'; '.join(other) or 'fewer settings'}: {remedy}"
        )
    return saved


def _last_step(saved: dict[str, Any], plan: Plan, config: TrainConfig) -> Step:
    """The last step of a run that had ended before."""
    history = History(**saved["history"])
    rate = config.muon_lr if config.optimizer == "muon" else config.adam_lr
    return Step(
        step=saved["step"],
        loss=history.losses[-1],
        lr=rate * learning_rate(saved["step"] - 1, plan.steps, config),
        tokens_per_second=history.tokens / history.seconds,
        seconds_left=0.0,
        progress=1.0,
        text_loss=history.text[-1][1] if history.text else None,
        done=True,
        target=config.target,
        history=history,
        state=None,
    )
