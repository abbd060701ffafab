"""A run that outlives interruptions: it stops between two steps, is saved, and resumed exactly."""

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import Preset, TrainConfig
from shakespeare_gpt.runs.log import commit, logged
from shakespeare_gpt.runs.weights import CheckpointError, load_checkpoint, named, save_checkpoint
from shakespeare_gpt.speed.devices import best_precision, default_device, device_name
from shakespeare_gpt.speed.processes import gather, rank
from shakespeare_gpt.train import History, Step, TargetNotReached, TrainingError, TrainState, new_state, train


def start(
    preset: Preset,
    text: Text,
    model: GPT | None = None,
    *,
    config: TrainConfig | None = None,
    checkpoint: str | os.PathLike | None = None,
    device: Any = None,
    restart: bool = False,
) -> Iterator[Step]:
    """A preset's run on a text, as a generator of its steps: saved in the usual place, the log beside it.

    Goes on from the run's checkpoint where there is one, unless ``restart``. ``model``, random weights
    otherwise, is trained in place; ``config`` and ``checkpoint`` replace the preset's.
    """
    config, device = config or preset.train, default_device(device)
    model = model or GPT(preset.model, torch.Generator().manual_seed(config.seed))
    meta = {"preset": preset.name, "text_name": text.name, "text_sha256": text.sha256}
    path = named(checkpoint or preset.checkpoint_path(text, config.seed), ".pt")
    steps = resumable(model, text.ids, config, path, meta=meta, device=device, restart=restart)
    if rank() != 0:
        return steps
    head = {  # with this a reader can trace the log
        "preset": preset.name,
        "text": f"{text.name}, SHA-256 {text.sha256}",
        "commit": commit(),
        "settings": " ".join(f"{k}={v}" for k, v in asdict(config).items()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "device": device_name(device),
    }
    return logged(steps, path.with_suffix(".log"), head, path, text.ids)


def run_to_end(steps: Iterator[Step], show: Callable[[Step], None]) -> Step:
    """Run a training generator to its end and return the last step; ``show`` is called with each.

    Ctrl-C, a notebook's stop button or SIGTERM lets the step finish, then raises KeyboardInterrupt; closing
    ``steps`` saves. A second one raises at once. Under torchrun each Ctrl-C comes twice, so later ones are
    ignored, and all processes agree after each step whether to stop.
    """
    interrupted, previous = threading.Event(), {}

    def handler(number, frame):
        if interrupted.is_set() and not dist.is_initialized():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with closing(steps):
            for step in steps:
                show(step)
                if not step.done and any(gather(interrupted.is_set())):
                    raise KeyboardInterrupt("Interrupted. Run it again, without restart, to go on.")
        return step
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def resumable(
    model: GPT,
    ids: Tensor,
    config: TrainConfig,
    checkpoint: str | os.PathLike,
    *,
    meta: dict[str, Any] | None = None,
    device: Any = None,
    save_every: float = 300.0,
    restart: bool = False,
) -> Iterator[Step]:
    """``train`` on a text's ids (n,), its whole state saved in ``checkpoint``.

    It is saved every ``save_every`` seconds, at the end, and when the run gives up or is closed. A run that
    finds its own file goes on from it: the numbers are those of a run never interrupted. With ``restart`` it
    starts over; the old file stays until the first save. ``meta`` is stored beside the weights.

    Raises what ``train`` raises, and CheckpointError for a checkpoint of another run.
    """
    path, device, identity = Path(checkpoint), default_device(device), fingerprint(model, ids, config)
    precision = best_precision(device, config.precision)[0]
    # Each process measures its CPU and reads the text for itself: what differs would pull the weights apart.
    views = gather((identity, precision))
    if any(theirs != identity for theirs, _ in views):
        raise TrainingError("The processes do not train the same: give each the same settings and text.")
    saved = None if restart or not path.exists() else _load_run(path, identity)
    if saved is not None and saved["meta"]["finished"]:
        model.load_state_dict(saved["model"])
        yield Step(**saved["last"], history=History(**saved["history"]), state=None)
        return
    state = new_state(model.to(device), ids, config, saved["meta"]["precision"] if saved else views[0][1])
    if saved is not None:
        state.model.load_state_dict(saved["model"])
        if state.learner is not state.model:
            state.learner.read()
        for optimizer, theirs in zip(state.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(theirs)
        state.scaler.load_state_dict(saved["scaler"])
        state.step, state.history = saved["meta"]["steps"], History(**saved["history"])
    last_save, saved_step = time.monotonic(), state.step

    def save(last: Step | None = None) -> None:
        nonlocal last_save, saved_step
        if rank() == 0 and (last is not None or state.step > saved_step):
            save_checkpoint(path, _contents(state, ids, config, identity, meta or {}, last))
        last_save, saved_step = time.monotonic(), state.step

    def save_if_due(_: TrainState) -> None:
        if time.monotonic() - last_save > save_every:
            save()

    try:
        for step in train(model, ids, config, device=device, state=state, before_update=save_if_due):
            if step.done:
                save(step)
            yield step
    except (GeneratorExit, TargetNotReached):  # both come between two steps, so the state is whole
        save()
        raise
    except TrainingError as error:
        where = f" {path} holds the weights of step {saved_step}." if saved_step else ""
        raise TrainingError(f"{error}{where}") from None


def fingerprint(model: GPT, ids: Tensor, config: TrainConfig) -> dict[str, Any]:
    """What must agree for one run to go on where another stopped."""
    settings = asdict(config)
    del settings["max_epochs"]  # a run that gave up may be given more
    checksum = int((ids.cpu() * (torch.arange(len(ids)) % 9973 + 1)).sum())
    return {**asdict(model.config), **settings, "text": f"{len(ids)} tokens, checksum {checksum}"}


def _contents(state, ids, config, identity, meta, last: Step | None) -> dict[str, Any]:
    """What a checkpoint holds; with the ``last`` step of a finished run no optimizers, most of the file."""
    history, model = state.history, state.model
    measured, loss = history.text[-1] if history.text else (None, None)
    about = {
        "steps": state.step,
        "tokens": history.tokens,
        "epochs": round(history.tokens / len(ids), 3),
        "loss": loss if measured == state.step else None,  # never that of earlier weights
        "parameters": model.num_parameters(),
        "seed": config.seed,
        "windows": config.windows,
        "precision": state.precision,
        "device": device_name(model.device),
        "finished": last is not None,
    }
    contents = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "meta": {**meta, **about},
        "fingerprint": identity,
        "history": asdict(history),
    }
    if last is not None:
        return {**contents, "last": {k: v for k, v in vars(last).items() if k not in ("history", "state")}}
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    return {**contents, "optimizers": optimizers, "scaler": state.scaler.state_dict()}


def _load_run(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the run with this fingerprint. Raises CheckpointError for any other."""
    saved = load_checkpoint(path)
    theirs = saved.get("fingerprint", {})
    differs = [f"{k} {theirs.get(k)}, not {v}" for k, v in identity.items() if theirs.get(k) != v]
    if differs:
        raise CheckpointError(
            f"{path} is of a run with {'; '.join(differs[:4])}: restart, or save elsewhere."
        )
    return saved
