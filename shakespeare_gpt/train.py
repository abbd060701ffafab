"""The training loop: windows of a text in, weights that know the text by heart out.

``train`` is a generator that yields a ``Step`` after every update, so that its caller can draw or print. It
touches no file, signal or setting of the process: see ``runs`` for what a long run needs around it. The run
ends when the mean loss over the *whole text* is under the target. One batch under it is luck.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.data import WindowOrder
from shakespeare_gpt.memorization import score
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.presets import TrainConfig
from shakespeare_gpt.speed.cuda_graph import CUDAGraphs
from shakespeare_gpt.speed.devices import autocast, best_precision, default_device
from shakespeare_gpt.speed.muon import make_optimizers
from shakespeare_gpt.speed.processes import averaged, gather, rank, world_size
from shakespeare_gpt.speed.shared_unseen import ReducedGPT


class TrainingError(ShakespeareGPTError):
    """The run cannot go on."""


class TargetNotReached(TrainingError):
    """``max_epochs`` did not suffice; the weights are as good as they became."""


@dataclass
class History:
    """The run so far, kept in the checkpoint."""

    losses: list[float] = field(default_factory=list)  # of each step's batch, before its update
    text: list[tuple[int, float]] = field(default_factory=list)  # (step, mean over the whole text)
    first_batch: int | None = None  # the first step whose batch was under the target
    tokens: int = 0
    seconds: float = 0.0  # training and evaluation, over all sessions of the run
    samples: list[tuple[int, str]] = field(default_factory=list)  # (step, text) that a caller adds


@dataclass
class TrainState:
    """All that a run carries from one step to the next: with it, resuming is exact."""

    model: GPT
    learner: GPT  # what the optimizers move: the model, or its ``ReducedGPT``
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    precision: str
    step: int = 0
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class Step:
    """What one update did. Losses are in nats per token."""

    step: int
    loss: float
    lr: float  # of Muon, or of AdamW where that is alone
    tokens_per_second: float  # over about the last ten steps
    seconds_left: float  # until the schedule's end, at the present speed
    progress: float  # from 0 to 1: the share of the schedule that is done
    text_loss: float | None  # the whole text's mean, at the steps where it was measured
    done: bool
    target: float
    history: History
    state: TrainState | None  # None for the last step of a run that had ended before

    @property
    def best(self) -> float:
        """The lowest batch loss so far."""
        return min(self.history.losses)


class Plan:
    """How a text is read: which windows make a batch, and how many steps there are."""

    def __init__(self, tokens: int, model: GPTConfig, config: TrainConfig):
        world = world_size()
        if config.batch_size % world:
            raise TrainingError(f"Choose a batch size that {world} processes share, not {config.batch_size}.")
        self.config, self.world = config, world
        self.length, self.short = model.n_positions, model.sampling_window
        kind = "sequential" if config.windows == "sequential" else "fixed"
        self.fixed = WindowOrder(tokens, self.length, kind, config.seed)
        self.moving = WindowOrder(tokens, self.short, "moving", config.seed)
        # A text of five windows cannot fill a batch of eight.
        self.batch_size = max(world, min(config.batch_size, len(self.fixed.starts)) // world * world)
        self.steps_per_epoch = len(self.fixed.starts) / self.batch_size
        self.steps = max(config.min_steps, math.ceil(config.epochs * self.steps_per_epoch))
        most = math.ceil(config.max_epochs * self.steps_per_epoch)
        self.max_steps = max(self.steps, 4 * config.min_steps, most)

    def batch(self, step: int) -> tuple[Tensor, int]:
        """The starts of the windows of a step (from 0), and their length in tokens."""
        number, turn = divmod(step, self.config.fixed_every)
        if self.config.windows != "moving":
            return self.fixed.batch(step, self.batch_size), self.length
        if turn == self.config.fixed_every - 1:
            return self.fixed.batch(number, self.batch_size), self.length
        size = self.batch_size * self.length // self.short  # about as many tokens
        # Moving batches are counted without the fixed ones between them.
        return self.moving.batch(step - number, size // self.world * self.world), self.short

    def evaluates_at(self, step: int, history: History) -> bool:
        """Whether to measure the whole text after a step: at the schedule's end, then once an epoch."""
        if self.config.stop_on == "batch":
            return history.first_batch is not None
        return step >= self.steps and (step - self.steps) % max(1, round(self.steps_per_epoch)) == 0


def train(
    model: GPT,
    ids: Tensor,
    config: TrainConfig,
    *,
    device: Any = None,
    state: TrainState | None = None,
    before_update: Callable[[TrainState], None] = lambda state: None,
) -> Iterator[Step]:
    """Train ``model`` on a text's ids (n,) until it knows them by heart; yield a Step after each update.

    ``state`` is that of an interrupted run of the same model: the numbers go on as if nothing had happened.
    ``before_update`` is called when a step's loss has shown that the present weights are good: the moment to
    save them. Raises TrainingError when the loss is no longer a number or explodes, and TargetNotReached when
    ``max_epochs`` did not suffice.
    """
    began = time.perf_counter()
    plan = Plan(len(ids), model.config, config)
    model = model.to(default_device(device))
    state = state or new_state(model, ids, config, config.precision)
    history, scaler, ids = state.history, state.scaler, ids.to(model.device)
    offsets = torch.arange(model.config.n_positions + 1, device=model.device)
    gradients = _gradients(state)
    seconds: deque[float] = deque(maxlen=10)  # of the last steps
    while True:
        if state.step >= plan.max_steps:
            raise TargetNotReached(
                f"The target was not reached in {state.step} steps (last batch {history.losses[-1]:.4f}): "
                "train longer (epochs, max_epochs), or lower the rates (muon_lr, adam_lr)."
            )
        # The batch: this process's share of windows of the text, (B, T + 1) tokens.
        starts, length = plan.batch(state.step)
        starts = starts[rank() :: world_size(), None].to(model.device)
        tokens = ids[(starts + offsets[: length + 1]) % len(ids)]

        # Loss and gradients; a gradient longer than grad_clip is shortened to it.
        loss = gradients(tokens)
        for optimizer in state.optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(state.learner.parameters(), config.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm)).tolist()
        loss = sum(gather(loss)) / world_size()
        _check(loss, norm, state)
        before_update(state)

        # The update. In fp16 a gradient may overflow. The scaler then skips the optimizer that owns it, but
        # clipping by an infinite norm has spoiled the gradients of the other too: all move, or none.
        scale = learning_rate(state.step, plan.steps, config)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            if math.isfinite(norm):
                scaler.step(optimizer)
        scaler.update()

        # The record, and the whole text's loss where it is due.
        state.step += 1
        history.losses.append(loss)
        history.tokens += tokens[:, 1:].numel() * world_size()
        if history.first_batch is None and loss < config.target:
            history.first_batch = state.step
        seconds.append(time.perf_counter() - began)
        text_loss = None
        if plan.evaluates_at(state.step, history):
            text_loss = _evaluate(state, ids, config.target)
            history.text.append((state.step, text_loss))
        done = text_loss is not None and (text_loss < config.target or config.stop_on == "batch")
        per_step = sum(seconds) / len(seconds)
        history.seconds += time.perf_counter() - began
        yield Step(
            step=state.step,
            loss=loss,
            lr=scale * (config.muon_lr if config.optimizer == "muon" else config.adam_lr),
            tokens_per_second=plan.batch_size * plan.length / per_step,
            seconds_left=0.0 if done else per_step * max(1, plan.steps - state.step),
            progress=1.0 if done else min(0.99, state.step / plan.steps),
            text_loss=text_loss,
            done=done,
            target=config.target,
            history=history,
            state=state,
        )
        if done:
            return
        began = time.perf_counter()


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The share of the peak rate at ``step`` (from 0): a linear rise, then a line down to ``final_lr``.

    After ``total`` steps it stays at ``final_lr``. Memorizing needs the decay: at a constant rate the loss of
    a batch stops falling where each step unlearns as much as it learns.
    """
    warmup = min(config.warmup_steps, total // 4)
    if step < warmup:
        return (step + 1) / warmup
    left = max(0.0, (total - step) / max(1, total - warmup))
    return config.final_lr + (1.0 - config.final_lr) * left


def _evaluate(state: TrainState, ids: Tensor, target: float) -> float:
    """The whole text's mean, in the precision of the training, and where that is close in fp32.

    bf16 moves the mean of a whole text by a thousandth of its value (124M), at a third of the time.
    """
    for precision in dict.fromkeys((state.precision, "fp32")):
        loss = gather(score(state.model, ids, precision=precision).loss)[0]  # one number for all
        if abs(loss / target - 1) > 0.02:
            break
    return loss


def new_state(model: GPT, ids: Tensor, config: TrainConfig, precision: str = "auto") -> TrainState:
    """The state before the first step. "auto" is what suits the device of ``model``."""
    precision = best_precision(model.device, precision)[0]
    scaler = torch.amp.GradScaler(model.device.type, enabled=precision == "fp16")
    some_unseen = len(ids.unique()) < model.config.vocab_size
    learner = ReducedGPT(model, ids) if config.share_unseen and some_unseen else model
    return TrainState(model, learner, make_optimizers(learner, config, precision), scaler, precision)


def _gradients(state: TrainState) -> Callable[[Tensor], Tensor]:
    """A function of tokens (B, T + 1): forward and backward, fills the gradients, returns the loss."""
    learner, device = state.learner, state.model.device
    forward = averaged(learner)

    def gradients(tokens: Tensor) -> Tensor:
        learner.zero_grad(set_to_none=True)
        with autocast(device, state.precision):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        state.scaler.scale(loss).backward()
        return loss.detach()

    if device.type == "cuda" and world_size() == 1:
        return CUDAGraphs(gradients, list(learner.parameters()))
    return gradients


def _check(loss: float, norm: float, state: TrainState) -> None:
    """Raise TrainingError where an update would ruin the weights, or has; fp16 may overflow now and then."""
    usable = state.scaler.get_scale() > 1e-4 if state.scaler.is_enabled() else math.isfinite(norm)
    if not (usable and math.isfinite(loss) and loss < 3 * math.log(state.model.config.vocab_size)):
        raise TrainingError(
            f"The loss exploded at step {state.step + 1} (loss {loss:.4g}, gradient norm {norm:.4g}): "
            "start over with lower rates (muon_lr, adam_lr)."
        )
