"""The training loop: windows of a text in, weights that know the text by heart out.

``train`` is a generator that yields a ``Step`` after every update, so that a notebook can draw, a test can
count and the command line can print, and none of that stands in the loop. The run stops when the mean loss
over the *whole text* is under the target; one batch under it is luck, and is only noted.

From a shell: ``python -m shakespeare_gpt.train --help``. With several GPUs:
``torchrun --nproc-per-node 2 -m shakespeare_gpt.train``; the loop is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from shakespeare_gpt.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from shakespeare_gpt.data import windows
from shakespeare_gpt.model import GPT
from shakespeare_gpt.tokenizer import utf8_output

TARGET = 0.099999  # nats per token


@dataclass(frozen=True)
class TrainConfig:
    """How to train. What each model is trained with stands in ``presets``; notebook 03 explains why."""

    batch_size: int = 8  # windows in a step, over all GPUs together
    passes: float = 8.0  # times through the text until the rates have come down
    max_passes: float = 40.0  # where to give up
    min_steps: int = 150  # a short text needs more passes: the schedule has at least so many steps
    optimizer: str = "muon"  # "muon": Muon for the layers' matrices, AdamW for the rest; or "adamw"
    muon_lr: float = 0.02
    muon_steps: int = 5  # Newton-Schulz iterations
    adam_lr: float = 2e-3
    beta2: float = 0.95
    warmup_steps: int = 30
    final_lr: float = 0.05  # the share of the peak rate at the end of the schedule; 1.0: constant
    grad_clip: float = 1.0  # the largest norm of the gradient; 0: no clipping
    windows: str = "fixed"  # "fixed" in random order, "shifted" anew at each pass, "sequential"
    fixed_passes: float = 0.0  # with shifted windows: the last passes, over the fixed ones
    precision: str = "auto"  # "auto", "bf16", "fp16" or "fp32"
    compile: bool = False  # compile the block: pays in long runs only
    graph: bool = True  # on one GPU: replay the step as a CUDA graph
    stop_on: str = "text"  # "text": mean of the whole text under the target; "batch": any one batch
    target: float = TARGET
    seed: int = 0

    def __post_init__(self):
        choices = {
            "optimizer": ("muon", "adamw"),
            "windows": ("fixed", "shifted", "sequential"),
            "precision": ("auto", "bf16", "fp16", "fp32"),
            "stop_on": ("text", "batch"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name in ("batch_size", "passes", "max_passes", "muon_lr", "adam_lr", "target"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")
        if math.inf in (self.passes, self.max_passes):
            raise ValueError("passes and max_passes must be finite")
        if not 0 <= self.fixed_passes < self.passes:
            raise ValueError(
                f"fixed_passes must be 0 or more and less than passes, not {self.fixed_passes}"
            )
        if self.fixed_passes and self.windows != "shifted":
            raise ValueError(
                f"fixed_passes is for shifted windows: set it to 0 with {self.windows}"
            )


@dataclass
class History:
    """The run so far, kept in the checkpoint so that a resumed run draws the whole curve."""

    losses: list[float] = field(default_factory=list)  # of each step's batch, before its update
    text: list[tuple[int, float]] = field(default_factory=list)  # (step, mean over the whole text)
    first_batch: int | None = None  # the first step whose batch was under the target
    tokens: int = 0
    seconds: float = 0.0  # training, evaluation and compilation, over all sessions of the run
    samples: list[tuple[int, str]] = field(default_factory=list)  # (step, text) that a caller adds


@dataclass(frozen=True)
class Step:
    """What one update did. Losses are in nats per token."""

    step: int
    loss: float
    best: float  # the lowest batch loss so far
    lr: float  # of Muon, or of AdamW where that is alone
    tokens_per_second: float  # over about the last ten steps
    seconds_left: float  # until the schedule's end, by the present speed
    progress: float  # 0 at ln V, 1 at the target, on a logarithmic scale
    text_loss: float | None  # the whole text's mean, at the steps where it was measured
    done: bool
    history: History
    message: str = ""  # at the last step: what was reached
    checkpoint: str | None = None  # at the last step: where the weights are
    resumed: bool = False  # the last step of a run that had ended before


class TrainingError(RuntimeError):
    """The run cannot go on; the message is one line that says why and what to do."""


def train(
    model: GPT,
    ids: Tensor,
    config: TrainConfig,
    *,
    checkpoint: str | os.PathLike | None = None,
    meta: dict[str, Any] | None = None,
    device: Any = None,
    save_every: float = 300.0,
    restart: bool = False,
) -> Iterator[Step]:
    """Train ``model`` on a text's ids (n,) until it knows them by heart; yield a Step after each update.

    With ``checkpoint`` (a path) the run's whole state is saved there every ``save_every`` seconds, when it
    is interrupted and at its end, and a run that finds its own file goes on from it: the numbers are those
    of a run never interrupted. With ``restart`` it starts over; the old file stays until the first save.
    Ctrl-C, a notebook's stop button and SIGTERM wait for the step in hand and then raise KeyboardInterrupt.
    ``meta`` is stored beside the weights.

    Raises TrainingError when the loss is no longer a number or explodes, or when ``max_passes`` did not
    suffice; CheckpointError for a checkpoint of another run.
    """
    run = _Run(model, ids, config, checkpoint, meta or {}, device)
    finished = None if restart else run.resume()
    if finished is not None:
        yield finished
        return
    with _interruptible() as interrupted, run.ready():
        saved, clean = time.monotonic(), False
        try:
            while True:
                due = time.monotonic() - saved > save_every
                step = run.advance(save=due)
                if due:
                    saved = time.monotonic()
                clean = step.done
                if clean:
                    run.save(finished=True)
                yield step
                if step.done:
                    return
                if run.agreed(interrupted()):
                    raise KeyboardInterrupt("training was interrupted; run it again to go on")
        finally:
            if not clean and run.sound and run.step:
                run.save()


class _Run:
    """The state of one run, and the one step that moves it on."""

    def __init__(self, model, ids, config, checkpoint, meta, device):
        self.config, self.meta = config, meta
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if config.batch_size % self.world:
            raise TrainingError(
                f"A batch of {config.batch_size} cannot be shared by {self.world} processes: "
                "choose a multiple."
            )
        self.device = torch.device(device) if device is not None else default_device()
        self.model = model.to(self.device).train()
        self.ids = ids.to(self.device)
        self.context = model.config.n_positions
        self.order = WindowOrder(len(ids), self.context, config.windows, config.seed)
        # A text of five windows cannot fill a batch of eight.
        self.batch_size = max(
            self.world, min(config.batch_size, self.order.count) // self.world * self.world
        )
        self.steps_per_pass = self.order.count / self.batch_size
        self.schedule_steps = max(config.min_steps, math.ceil(config.passes * self.steps_per_pass))
        self.max_steps = max(
            self.schedule_steps,
            4 * config.min_steps,
            math.ceil(config.max_passes * self.steps_per_pass),
        )
        if config.windows == "shifted" and config.fixed_passes:
            # Counted from the schedule's end, since a short text makes more passes than was asked.
            shifted = self.schedule_steps * self.batch_size
            shifted -= config.fixed_passes * len(self.order.fixed)
            self.order.shifted_passes = max(0, round(shifted / len(self.order.ring)))
        self.history = History()
        self.step = self.saved = 0
        self.last_evaluation = (0, 1.25)  # (step, how far the batches' mean lies above the text's)
        self.speed: list[float] = []
        self.precision = self._agree()
        self.optimizers = make_optimizers(model, replace(config, precision=self.precision))
        self.sound = True  # False while an update is half done, and when the weights are no good

    def _agree(self) -> str:
        """The precision, in all processes the first one's; an error where they do not train the same.

        Each measures its CPU for itself, and each downloads the text for itself: what differs there would
        pull the weights apart, or leave one process waiting for the others for ever.
        """
        precision = self.config.precision
        if precision == "auto":
            precision = best_precision(self.device)[0]
        if self.world > 1:
            views: list[Any] = [None] * self.world
            dist.all_gather_object(views, (self.identity(), precision))
            if any(identity != views[0][0] for identity, _ in views):
                raise TrainingError(
                    "The processes do not train the same: give each the same settings and the same text."
                )
            precision = views[0][1]
        return precision

    # --- one step -----------------------------------------------------------------------------------

    def advance(self, save: bool = False) -> Step:
        """One update. With ``save`` the weights before it are saved first, once their loss has proved them good."""
        began = time.perf_counter()
        config, step = self.config, self.step
        lr = learning_rate(step, self.schedule_steps, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr
        share = self.batch_size // self.world
        starts = self.order.batch(step, self.batch_size)[
            self.rank * share : (self.rank + 1) * share
        ]
        index = (starts.to(self.device)[:, None] + self.offsets) % len(self.ids)
        loss = self.gradients(self.ids[index])
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or float("inf"))
        if self.world > 1:
            loss = loss / self.world
            dist.all_reduce(loss)
        loss_value, norm_value = torch.stack((loss, norm)).tolist()
        self._check(loss_value, norm_value)  # before the update, so that the weights stay good
        if save and self.step > self.saved:
            paused = time.perf_counter()
            self.save()
            began += time.perf_counter() - paused
        self.sound = False
        # In fp16 a gradient may overflow. The scaler would leave out only the optimiser that owns it, and the
        # other would take the gradients that clipping by a norm of NaN has spoiled: all move, or none.
        if math.isfinite(norm_value):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()

        history = self.history
        self.step = step + 1
        history.losses.append(loss_value)
        history.tokens += self.batch_size * self.context
        if history.first_batch is None and loss_value < config.target:
            history.first_batch = self.step
        self.speed = [*self.speed[-9:], time.perf_counter() - began]
        text_loss = self._evaluate_if_near()
        history.seconds += time.perf_counter() - began
        self.sound = True
        return self._report(loss_value, lr, text_loss)

    def _gradients(self, tokens: Tensor) -> Tensor:
        """Forward and backward on tokens (B, T + 1): fills the gradients, returns the loss."""
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        self.scaler.scale(loss).backward()
        return loss.detach()

    def agreed(self, stop: bool) -> bool:
        """Whether any process is to stop: Ctrl-C reaches each at another moment, and all must stop as one."""
        if self.world == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _report(self, loss: float, lr: float, text_loss: float | None) -> Step:
        config, history = self.config, self.history
        reached = text_loss is not None and text_loss < config.target
        if config.stop_on == "batch":
            reached = history.first_batch is not None
        message = ""
        if reached:
            message = f"Target loss {config.target:g} reached at step {self.step}"
        elif self.step >= self.max_steps:
            raise TrainingError(
                f"The target was not reached in {self.step} steps (last batch {loss:.4f}): "
                "train longer (--max-passes), or lower the rates (--muon-lr, --adam-lr)."
            )
        per_step = sum(self.speed) / max(1, len(self.speed))
        top, bottom = math.log(math.log(self.model.config.vocab_size)), math.log(config.target)
        recent = text_loss or self._recent()
        return Step(
            step=self.step,
            loss=loss,
            best=min(history.losses),
            lr=lr * (config.muon_lr if config.optimizer == "muon" else config.adam_lr),
            tokens_per_second=self.batch_size * self.context / per_step if per_step else 0.0,
            seconds_left=0.0 if reached else per_step * max(1, self.schedule_steps - self.step),
            progress=1.0
            if reached
            else min(0.999, max(0.0, (top - math.log(max(recent, 1e-9))) / (top - bottom))),
            text_loss=text_loss,
            done=reached,
            history=history,
            message=message,
            checkpoint=str(self.checkpoint) if reached and self.checkpoint else None,
        )

    def _recent(self) -> float:
        """The mean of the batches of the last quarter of a pass: what the text's mean will be about."""
        n = max(1, round(self.steps_per_pass / 4))
        tail = self.history.losses[-n:]
        return sum(tail) / len(tail)

    def _evaluate_if_near(self) -> float | None:
        """Measure the whole text where the batches say that it may be under the target.

        A measurement costs a third of a pass, so it waits until the batches' mean, corrected by how far it
        was off the last time, is under the target; and at the schedule's end it is made anyway. A run that
        stops on one batch is measured then.
        """
        config = self.config
        if config.stop_on == "batch" and self.history.first_batch is None:
            return None
        last, ratio = self.last_evaluation
        since = self.step - last
        near = self._recent() < config.target * ratio and since >= max(1, self.steps_per_pass / 8)
        late = config.stop_on == "batch" or (
            self.step >= self.schedule_steps
            and (self.step - self.schedule_steps) % max(1, round(self.steps_per_pass)) == 0
        )
        if not near and not late:
            return None
        # The precision of the training moves the mean of a whole text by a thousandth of its value (124M,
        # bf16), at a third of the time and less: where more than that is at stake, fp32 decides.
        for precision in dict.fromkeys((self.precision, "fp32")):
            value = evaluate(
                self.model, self.ids, precision=precision, share=(self.rank, self.world)
            )
            if abs(value / config.target - 1) > 0.02:
                break
        self.last_evaluation = (self.step, min(1.25, max(0.8, self._recent() / value)))
        self.history.text.append((self.step, value))
        return value

    def _check(self, loss: float, norm: float) -> None:
        limit = 3 * math.log(self.model.config.vocab_size)
        healthy = math.isfinite(loss) and loss < limit
        if (
            self.scaler.is_enabled()
        ):  # fp16 steps that overflow are skipped by the scaler, up to a point
            healthy = healthy and self.scaler.get_scale() > 1e-4
        else:
            healthy = healthy and math.isfinite(norm)
        if not healthy:
            # A loss like this is that of the present weights: the checkpoint keeps the earlier ones.
            self.sound = False
            where = (
                f"; {self.checkpoint} holds the weights of step {self.saved}" if self.saved else ""
            )
            raise TrainingError(
                f"The loss exploded at step {self.step + 1} (loss {loss:.4g}, gradient norm {norm:.4g})"
                f"{where}: start over (--restart) with lower rates (--muon-lr, --adam-lr)."
            )

    # --- before and after ---------------------------------------------------------------------------

    @contextmanager
    def ready(self):
        """Everything that a step needs: precision, scaler, compiled blocks, several processes."""
        config = self.config
        began = time.perf_counter()
        if self.device.type == "cpu":
            keep_memory()
        self.offsets = torch.arange(self.context + 1, device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if self._scaler_state:
            self.scaler.load_state_dict(self._scaler_state)
        self.forward = self.model
        if self.world > 1:
            local = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=local)
        self.gradients = self._gradients
        share = (self.batch_size // self.world, self.context + 1)
        if config.compile:
            outcome = compile_blocks(self.model, self._gradients, share)
            if outcome != "compiled":
                warnings.warn(f"The layers were {outcome}.", RuntimeWarning, stacklevel=2)
        if self.device.type == "cuda" and self.world == 1 and config.graph:
            self.gradients = capture(self._gradients, self.model, share)
        self.history.seconds += time.perf_counter() - began
        try:
            yield
        finally:
            for block in self.model.h:
                block._compiled_call_impl = (
                    None  # sampling feeds other shapes: back to the plain layers
                )
            self.model.eval()

    def autocast(self):
        return autocast(self.device, self.precision)

    _scaler_state: dict | None = None

    def identity(self) -> dict[str, Any]:
        """What must agree for one run to go on where another stopped."""
        fixed = {
            k: v
            for k, v in asdict(self.config).items()
            if k not in ("compile", "graph", "max_passes")
        }
        return {
            "train": fixed,
            "tokens": len(self.ids),
            "checksum": int(
                (self.ids * (torch.arange(len(self.ids), device=self.device) % 9973 + 1)).sum()
            ),
        }

    def save(self, finished: bool = False) -> None:
        if self.checkpoint is None or self.rank != 0:
            return
        history = self.history
        measured, text = history.text[-1] if history.text else (None, None)
        state = {
            "model": self.model.state_dict(),
            "config": asdict(self.model.config),
            "step": self.step,
            "history": asdict(history),
            "identity": self.identity(),
            "precision": self.precision,
            "finished": finished,
            "meta": {
                **self.meta,
                "steps": self.step,
                "tokens": history.tokens,
                "passes": round(history.tokens / len(self.ids), 3),
                "loss": text if measured == self.step else None,  # never that of earlier weights
                "target": self.config.target,
                "first_batch_step": history.first_batch,
                "parameters": self.model.num_parameters(),
                "seed": self.config.seed,
                "windows": self.config.windows,
                "precision": self.precision,
                "device": device_name(self.device),
                "seconds": round(history.seconds, 1),
                "finished": finished,
            },
        }
        if not finished:  # a finished run needs its optimisers no more; they are most of the file
            state["optimizers"] = [o.state_dict() for o in self.optimizers]
            state["scaler"] = self.scaler.state_dict()
            state["last_evaluation"] = list(self.last_evaluation)
        save_checkpoint(self.checkpoint, state)
        self.saved = self.step

    def resume(self) -> Step | None:
        """Take up the checkpoint, if there is one; the last Step of a run that is already finished."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        state = load_checkpoint(self.checkpoint)
        remedy = "start over (--restart), or save elsewhere (--checkpoint)."
        if "identity" not in state:
            raise CheckpointError(f"{self.checkpoint} holds no run to go on with: {remedy}")
        saved, own = state["identity"], self.identity()
        # A setting that is younger than the checkpoint had what is now its default.
        defaults = {k: v for k, v in asdict(TrainConfig()).items() if k in own["train"]}
        saved = {**saved, "train": {**defaults, **saved["train"]}}
        there = {**saved["train"], **state["config"]}
        here = {**own["train"], **asdict(self.model.config)}
        if saved != own or there != here:
            other = [f"{k} {v}, not {here.get(k)}" for k, v in there.items() if here.get(k) != v]
            raise CheckpointError(
                f"{self.checkpoint} belongs to a run with {'; '.join(other) or 'another text'}: {remedy}"
            )
        self.model.load_state_dict(state["model"])
        self.history = History(**state["history"])
        self.history.text = [tuple(t) for t in self.history.text]
        self.history.samples = [tuple(s) for s in self.history.samples]
        self.step = self.saved = state["step"]
        self.precision = state["precision"]
        if state["finished"]:
            self.model.eval()
            value = self.history.text[-1][1] if self.history.text else None
            lr = learning_rate(self.step - 1, self.schedule_steps, self.config)
            step = self._report(self.history.losses[-1], lr, value)
            return replace(step, resumed=True)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._scaler_state = state["scaler"]
        self.last_evaluation = tuple(state["last_evaluation"])
        return None


# --- the parts of the recipe ------------------------------------------------------------------------


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The share of the peak rate at ``step`` (from 0): a linear rise, then a line down to ``final_lr``.

    After ``total`` steps it stays at ``final_lr``. Memorising wants the decay: at a constant rate the loss
    of a batch plateaus where each step unlearns as much as it learns.
    """
    warmup = min(config.warmup_steps, total // 4)
    if step < warmup:
        return (step + 1) / warmup
    left = max(0.0, (total - step) / max(1, total - warmup))
    return config.final_lr + (1.0 - config.final_lr) * left


class WindowOrder:
    """Which windows stand in which batch, as a function of the step alone, so that resuming is exact.

    The windows of each pass come in an order of their own, drawn from (seed, pass). Passes follow each
    other without a gap: a batch may hold the end of one and the beginning of the next. Shifted windows read
    the text as a ring, cut at another place in each of the first ``shifted_passes``; after these come the
    fixed ones.
    """

    def __init__(self, tokens: int, context: int, kind: str, seed: int):
        self.tokens, self.kind, self.seed = tokens, kind, seed
        self.fixed = windows(torch.arange(tokens), context)[0]
        self.ring = torch.arange(tokens // context) * context
        self.shifted_passes = math.inf if kind == "shifted" else 0
        self.count = len(self.ring if kind == "shifted" else self.fixed)  # in the first pass
        self._passes: dict[int, Tensor] = {}

    def _pass(self, number: int) -> Tensor:
        if number not in self._passes:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            shifted = number < self.shifted_passes
            starts = self.ring if shifted else self.fixed
            if self.kind != "sequential":
                starts = starts[torch.randperm(len(starts), generator=generator)]
            if shifted:
                starts = starts + torch.randint(self.tokens, (1,), generator=generator)
            kept = {n: order for n, order in self._passes.items() if n == number - 1}
            self._passes = {**kept, number: starts}
        return self._passes[number]

    def batch(self, step: int, size: int) -> Tensor:
        """The starts of the windows of a step (from 0), (size,)."""
        return torch.stack([self._window(place) for place in range(step * size, (step + 1) * size)])

    def _window(self, place: int) -> Tensor:
        """The start of the window that is the ``place``-th of the whole run."""
        fixed = place - self.shifted_passes * len(self.ring)
        if fixed < 0:
            number, place = divmod(place, len(self.ring))
            return self._pass(number)[place]
        number, place = divmod(fixed, len(self.fixed))
        return self._pass(self.shifted_passes + number)[place]


class Muon(torch.optim.Muon):
    """torch's Muon, with all matrices of one shape orthogonalised together and in a chosen precision.

    torch's own treats the 48 matrices of GPT-2 one after the other and always in bf16, which is slow where
    the processor only emulates it (a T4, a CPU without bf16 instructions). The update is the same: a test
    compares the two. See https://kellerjordan.github.io/posts/muon/ for the method.
    """

    def __init__(self, params, *, dtype: torch.dtype = torch.bfloat16, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["dtype"] = dtype  # saved with the state: a resumed run rounds as before

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("this Muon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = buffers
                if group["nesterov"]:
                    update = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalize(
                    torch.stack(update).to(group["dtype"]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_add_(params, list(update.to(params[0].dtype).unbind()), alpha=-rate)


def orthogonalize(matrices: Tensor, coefficients, steps: int, eps: float) -> Tensor:
    """Bring all singular values of each matrix (n, rows, columns) near 1 by Newton-Schulz iterations.

    Each step multiplies X by a polynomial p(XX^T). For a long matrix it is cheaper to carry the small square
    XX^T along, which becomes p XX^T p, and to multiply X by the product of all p once, at the end. But the
    square squares the singular values too, and carrying it on adds rounding: fp32 bears that for all steps,
    bf16 for three, after which the square is made anew.
    """
    a, b, c = coefficients
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.flatten(1).norm(dim=1)[:, None, None].clamp(min=eps)
    carried = 3 if x.dtype == torch.bfloat16 else steps
    # In products of squares, n steps: two long ones and a square each, or two long ones and 4 n - 3 squares.
    length = x.shape[2] / x.shape[1]
    while steps > 0:
        n = min(steps, carried)
        if 2 * length + 4 * n - 3 >= n * (2 * length + 1):
            n = 1
        gram, product = x @ x.mT, None
        for step in range(n):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            if n == 1:
                x = torch.baddbmm(x, p, x, beta=a)
                continue
            p.diagonal(dim1=1, dim2=2).add_(a)
            product = p if product is None else p @ product
            if step + 1 < n:
                gram = p @ gram @ p
        if product is not None:
            x = product @ x
        steps -= n
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for embeddings, gains and biases; or AdamW for all.

    No weight decay anywhere: there is nothing to generalise to.
    """
    device = model.device.type
    matrices = [p for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if not (n.startswith("h.") and p.dim() == 2)]
    options = {
        "betas": (0.9, config.beta2),
        "weight_decay": 0.0,
        "fused": device in ("cpu", "cuda"),
    }
    if config.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(matrices + rest, lr=config.adam_lr, **options)]
    else:
        name = config.precision if config.precision != "auto" else best_precision(model.device)[0]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float32, "fp32": torch.float32}[name]
        optimizers = [
            Muon(
                matrices,
                lr=config.muon_lr,
                weight_decay=0.0,
                ns_steps=config.muon_steps,
                dtype=dtype,
            ),
            torch.optim.AdamW(rest, lr=config.adam_lr, **options),
        ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.inference_mode()
def evaluate(
    model: GPT,
    ids: Tensor,
    *,
    batch_size: int = 16,
    precision: str = "fp32",
    share: tuple[int, int] = (0, 1),
) -> float:
    """The mean loss in nats over every token of the text, ids (n,), in evaluation mode.

    Each token but the first is predicted once, in the fixed windows of ``data.windows``. ``share``: (rank,
    world) where several processes each take a part and then add up.
    """
    was_training = model.training
    model.eval()
    try:
        _, x, y, counted = windows(ids.cpu(), model.config.n_positions)
        rank, world = share
        total = torch.zeros((), dtype=torch.float64)
        with torch.compiler.set_stance("force_eager"), autocast(model.device, precision):
            for i in range(rank * batch_size, len(x), world * batch_size):
                block = slice(i, i + batch_size)
                losses = model(
                    x[block].to(model.device), y[block].to(model.device), reduction="none"
                ).cpu()
                total += losses[counted[block]].double().sum()
        if world > 1:
            total = total.to(model.device)
            dist.all_reduce(total)
        return total.item() / (len(ids) - 1)
    finally:
        model.train(was_training)


# --- devices ----------------------------------------------------------------------------------------


def default_device(name: str | None = None) -> torch.device:
    """The device called ``name``; without one a CUDA GPU where there is one, else the CPU.

    "cuda" is this process's own GPU under torchrun. Raises ValueError for a device that is not there.
    """
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"There is no device {name!r} here: leave --device out.") from None
    return device


def device_name(device: torch.device) -> str:
    """A name that a reader of a log understands: the GPU's, or the processor's and how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count != 1)}"


_measured: dict[str, tuple[str, str]] = {}


def best_precision(device: torch.device) -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason as a sentence) for the large matrix products on ``device``.

    GPUs go by compute capability, since ``is_bf16_supported`` says yes where bf16 is merely emulated. CPUs
    are measured: some have bf16 instructions, on the others bf16 is many times slower than fp32.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"compute capability {major}.{minor} computes bf16 natively"
        if major >= 7:
            return (
                "fp16",
                f"compute capability {major}.{minor} is below 8.0: fp16 with a gradient scaler",
            )
        return "fp32", f"compute capability {major}.{minor} has no tensor cores"
    if device.type != "cpu":
        return "fp32", f"nothing faster was tried on {device.type}"
    if "cpu" not in _measured:
        seconds = {}
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(512, 768, generator=generator).to(dtype)
            b = torch.randn(768, 768, generator=generator).to(dtype)
            times = []
            for _ in range(5):
                began = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - began)
            seconds[dtype] = min(times)
        ratio = seconds[torch.float32] / seconds[torch.bfloat16]
        # A clear margin: near a tie the exact one is the better choice.
        name = "bf16" if ratio > 1.5 else "fp32"
        reason = (
            "bf16 is much faster on this CPU" if name == "bf16" else "bf16 is no faster on this CPU"
        )
        _measured["cpu"] = name, reason
    return _measured["cpu"]


def keep_memory() -> None:
    """Have the C library (glibc) keep freed memory for the next step instead of giving it back.

    A step frees and takes anew gigabytes of activations, and the system hands out each page cleared: about
    a quarter of the step's time. See mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: it goes without
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_MMAP_MAX, 0)


@contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which matrix products run in ``precision``.

    A CPU's fused attention takes twice as long in bf16 as its three parts, two products and a softmax, so
    there the parts do it.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        yield
        return
    parts = device.type == "cpu" and precision == "bf16"
    # Despite its place this switch is obeyed on CPUs too: without it the parts run in fp32.
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # No cache of casted weights: each is used once a step, and a CUDA graph must not reuse old ones.
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        if not parts:
            yield
            return
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def compile_blocks(model: GPT, gradients, shape: tuple[int, int]) -> str:
    """Compile the transformer block once for all layers; returns a sentence that says what happened.

    The layers are alike, so one compilation serves all twelve. The module and its parameter names stay the
    plain ones. Where compiling fails (no compiler, an old GPU) the layers stay as they were.
    """
    for block in model.h:
        block.compile()
    try:
        gradients(torch.zeros(shape, dtype=torch.int64, device=model.device))
        return "compiled"
    except Exception as error:  # whatever the compiler raises, training must go on without it
        for block in model.h:
            block._compiled_call_impl = None
        return f"not compiled ({type(error).__name__}): running the plain layers"
    finally:
        model.zero_grad(set_to_none=True)


def capture(gradients, model: GPT, shape: tuple[int, int]):
    """Record forward and backward as one CUDA graph; returns a function like ``gradients``.

    A step of 8 x 256 tokens is some two thousand small kernels, and a GPU finishes each before Python has
    launched the next. Replaying a recording launches all of them at once. The gradients stay in the memory
    that the recording wrote to.
    """
    tokens = torch.zeros(shape, dtype=torch.int64, device=model.device)
    with torch.cuda.device(model.device):  # streams and graphs belong to the current GPU
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the libraries set themselves up in the first rounds
            for _ in range(2):
                gradients(tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = gradients(tokens)

    def replay(new: Tensor) -> Tensor:
        tokens.copy_(new)
        with torch.cuda.device(model.device):
            graph.replay()
        return loss

    return replay


@contextmanager
def _interruptible():
    """Within, Ctrl-C and SIGTERM set a flag that the loop reads between two steps.

    A step cut in half would leave half-updated weights. A second signal acts at once, except under
    torchrun, which passes on each Ctrl-C that the processes have already had. Signal handlers belong to the
    main thread; elsewhere the flag simply never rises.
    """
    flag = threading.Event()
    previous = {}

    def handler(number, frame):
        if flag.is_set() and not dist.is_initialized():
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    try:
        yield flag.is_set
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# --- the log and the command line -------------------------------------------------------------------


def logged(steps: Iterator[Step], path: str | os.PathLike, head: dict[str, Any]) -> Iterator[Step]:
    """Pass the steps on and write them to a log: a head that names the run, then every tenth step.

    A resumed run writes on where the log stopped; one that starts over keeps the earlier log as ``.old.log``
    (``.old2.log``, and so on).
    Each line: ``step | loss | best | lr | tokens/s``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(steps), open(path, "a", encoding="utf-8", buffering=1) as file, _reason(file):
        for step in steps:
            if head is not None and step.resumed and step.done and file.tell() > 0:
                yield step  # the run had ended before, and its log says so
                continue
            if head is not None:
                lines = [f"# {key}: {value}\n" for key, value in head.items()]
                if step.step <= 1 or file.tell() == 0:
                    # An earlier run's weights stay until this one's first save, so its log does too.
                    if file.tell():
                        numbers = itertools.chain([""], itertools.count(2))
                        names = (path.with_suffix(f".old{n}.log") for n in numbers)
                        shutil.copyfile(path, next(name for name in names if not name.exists()))
                    file.seek(0)
                    file.truncate()
                    file.writelines(lines)
                    file.write("step | loss | best | lr | tokens/s\n")
                elif not step.done:
                    # Only what has changed: the code, the machine; the settings, where a restart failed meanwhile.
                    latest = {}
                    for line in path.read_text(encoding="utf-8").splitlines():
                        latest[line.split(": ")[0]] = f"{line}\n"
                    file.writelines(
                        line for line in lines if latest.get(line.split(": ")[0]) != line
                    )
                    file.write(f"# resumed at step {step.step}\n")
                head = None
            if step.step % 10 == 0 or step.done:
                file.write(log_line(step) + "\n")
            if step.step == step.history.first_batch:
                file.write(
                    f"# step {step.step}: the first batch under the target ({step.loss:.6f})\n"
                )
            if step.text_loss is not None:
                file.write(f"# step {step.step}: mean over the whole text {step.text_loss:.6f}\n")
            if step.done:
                file.write(f"# {step.history.tokens} tokens, {step.history.seconds:.1f} s\n")
                file.write(step.message + "\n")
                if step.checkpoint is not None:
                    file.write(f"Saved checkpoint to {step.checkpoint}\n")
            yield step


@contextmanager
def _reason(file):
    """A run that gives up says why at the end of its log."""
    try:
        yield
    except TrainingError as error:
        file.write(f"# {error}\n")
        raise


def log_line(step: Step) -> str:
    """A step as one line of the log: losses in nats, the rate, tokens a second."""
    return f"{step.step} | {step.loss:.6f} | {step.best:.6f} | {step.lr:.3e} | {step.tokens_per_second:.0f}"


def progress_line(step: Step) -> str:
    """A step as one line for a person: how far, how fast, how long still."""
    minutes, seconds = divmod(round(step.seconds_left), 60)
    text = f" | text {step.history.text[-1][1]:.4f}" if step.history.text else ""
    return (
        f"step {step.step} | loss {step.loss:.4f} | best {step.best:.4f}{text} | "
        f"{step.tokens_per_second:,.0f} tokens/s | {100 * step.progress:.0f} % of the way | "
        f"about {minutes}:{seconds:02d} left"
    )


def log_head(
    preset: str, text: str, sha256: str, config: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """What a reader needs to trace a log: the code, the text, the settings, the machine."""
    precision = best_precision(device)[0] if config.precision == "auto" else config.precision
    return {
        "preset": preset,
        "text": f"{text}, SHA-256 {sha256}",
        "commit": commit(),
        "settings": " ".join(f"{k}={v}" for k, v in asdict(config).items()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "device": f"{device_name(device)}, {precision}",
    }


def commit() -> str:
    """The commit of the code that runs, with a + where files differ from it; "unknown" outside git."""
    if given := os.environ.get("SHAKESPEARE_GPT_COMMIT"):
        return given
    here = Path(__file__).resolve().parent
    try:
        options = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], **options
        ).stdout.strip()
        return name + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from shakespeare_gpt.presets import PRESETS, checkpoint_path, get_preset, start

    lines = "\n".join(f"  {p.name:<9} {p.about}" for p in PRESETS.values())
    parser = argparse.ArgumentParser(
        prog="python -m shakespeare_gpt.train",
        description="Train a GPT-2 on a text until it knows it by heart.",
        epilog=f"presets:\n{lines}\n\nInterrupt with Ctrl-C at any time: the same command goes on from there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", help="which settings (default: gpt2 with a GPU, mini without)")
    parser.add_argument(
        "--text", metavar="FILE", help="learn this text file instead of the preset's text"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="where to save (default: in checkpoints/)"
    )
    parser.add_argument("--log", metavar="FILE", help="the log (default: beside the checkpoint)")
    parser.add_argument(
        "--restart", action="store_true", help="start over, do not go on from the checkpoint"
    )
    parser.add_argument("--device", help="cuda, cpu, ... (default: the GPU if there is one)")
    settings = parser.add_argument_group("settings that replace the preset's")
    for name, kind, text in (
        ("batch_size", int, "windows in a step"),
        ("passes", float, "times through the text until the rates have come down"),
        ("max_passes", float, "where to give up"),
        ("muon_lr", float, "peak rate of Muon"),
        ("adam_lr", float, "peak rate of AdamW"),
        ("windows", str, "fixed, shifted or sequential"),
        ("fixed_passes", float, "with shifted windows: the last passes, over the fixed ones"),
        ("precision", str, "auto, bf16, fp16 or fp32"),
        ("target", float, "the mean loss in nats at which to stop"),
        ("seed", int, "of the weights and of the order of the windows"),
    ):
        settings.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    settings.add_argument(
        "--compile", action="store_true", default=None, help="torch.compile the layers"
    )
    options = parser.parse_args(arguments)

    utf8_output()
    # As torchrun sets them.
    distributed = os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
    if distributed:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    first = not distributed or dist.get_rank() == 0
    say = print if first else (lambda *a, **k: None)
    path = earlier = None
    try:
        preset = get_preset(options.preset)
        changes = {f: getattr(options, f, None) for f in TrainConfig.__dataclass_fields__}
        config = replace(preset.train, **{k: v for k, v in changes.items() if v is not None})
        preset = replace(preset, train=config)
        text = preset.load_text(options.text)
        path = Path(options.checkpoint) if options.checkpoint else checkpoint_path(preset, text)
        earlier = _written(path)
        device = default_device(options.device)
        model = GPT(preset.model, torch.Generator().manual_seed(config.seed))
        say(
            f"{preset.name}: {model.num_parameters():,} parameters learn {text.name}, {len(text.ids):,} tokens"
        )
        name, reason = best_precision(device)
        if config.precision != "auto":
            name, reason = config.precision, "it was asked for"
        if earlier is not None and not options.restart:
            say(f"device: {device_name(device)}; goes on from {path}, in its precision")
        else:
            say(f"device: {device_name(device)}; {name}, because {reason}")
        steps = start(
            preset,
            text,
            model,
            checkpoint=path,
            log=options.log,
            device=device,
            restart=options.restart,
        )
        with closing(steps):
            _watch(steps, say)
        if _written(path) != earlier:
            say(f"Saved checkpoint to {path}")
    except KeyboardInterrupt:
        if path is not None and _written(path) != earlier:
            without = " without --restart" if options.restart else ""
            say(
                f"Interrupted. Saved checkpoint to {path}; the same command{without} goes on from there."
            )
        else:
            kept = "" if earlier is None else f"; {path} is as it was"
            say(f"Interrupted: nothing new was saved{kept}.")
        return 130
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        # Our own errors are among these, and what torch raises for a device that is not there or is full.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        who = "" if first else f" in process {dist.get_rank()}"
        print(f"error{who}: {line}", file=sys.stderr)
        return 1
    finally:
        if distributed:
            dist.destroy_process_group()
    return 0


def _written(path: Path) -> int | None:
    """When a file was last written, or None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _watch(steps: Iterator[Step], say) -> None:
    """Print progress: one line that rewrites itself on a terminal, else a line every ten seconds."""
    live, printed, message = sys.stdout.isatty(), 0.0, ""
    try:
        for step in steps:
            if step.resumed:
                message = f"{step.message}, in a run that has ended before: --restart starts over"
                break
            if step.done or time.monotonic() - printed > (0.5 if live else 10.0):
                say(
                    f"\r{progress_line(step):<110}" if live else progress_line(step),
                    end="" if live else "\n",
                    flush=True,
                )
                printed = time.monotonic()
            message = step.message
    finally:
        if live and printed:
            say()  # what comes next, be it an error, begins on a line of its own
    say(message)


if __name__ == "__main__":
    # Not this copy, which is called __main__, but the module that the presets import.
    from shakespeare_gpt.train import main as run

    status = run()
    if "RANK" in os.environ:
        # gloo's threads outlive the process group, and one that frees a tensor while Python shuts down aborts
        # the process: all is saved, so leave at once (github.com/pytorch/pytorch/pull/179291).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
