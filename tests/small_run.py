"""A very small run, of a second or two, that the tests of the loop and of what stands around it share."""

from contextlib import closing
from dataclasses import replace

import torch
import torch.distributed as dist

from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.presets import TrainConfig
from shakespeare_gpt.runs.run import resumable
from shakespeare_gpt.train import Step, train

CONFIG = GPTConfig(vocab_size=97, n_positions=16, window=8, n_embd=32, n_layer=2, n_head=2)
RECIPE = TrainConfig(
    batch_size=4,
    epochs=15,
    min_steps=60,
    max_epochs=100,
    warmup_steps=5,
    adam_lr=2e-2,
    precision="fp32",
    target=1.43,  # some epochs after the schedule of 72 steps
)
IDS = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(0))
EASY = torch.cat((torch.full((81,), 5), IDS[:160]))  # its first windows are learnt at once


def new_model(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    return GPT(config, torch.Generator().manual_seed(seed))


def changed(**settings) -> TrainConfig:
    return replace(RECIPE, **settings)


def run(config=RECIPE, ids=IDS, *, stop_after=None, model=None, checkpoint=None, **options):
    """Train to the end, or to a step at which the consumer goes away; (model, last step)."""
    model = model or new_model()
    if checkpoint is None:
        steps = train(model, ids, config, device="cpu", **options)
    else:
        steps = resumable(model, ids, config, checkpoint, device="cpu", **options)
    with closing(steps):
        for step in steps:
            if step.step == stop_after:
                break
    return model, step


def play_process(monkeypatch, rank: int, world: int, others=None) -> None:
    """This process becomes one of several.

    ``others`` turns what this one gives into what all of them give; without it the others give 0.
    """

    def gather(values, value):
        values[:] = others(value) if others else [value, *[0.0] * (world - 1)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    wrapped = "shakespeare_gpt.speed.processes.DistributedDataParallel"
    monkeypatch.setattr(wrapped, lambda model, device_ids: model)


def assert_same_run(first: tuple[GPT, Step], second: tuple[GPT, Step]) -> None:
    """Bit for bit: weights, losses, evaluations, the step at which it ended."""
    (model, step), (expected_model, expected) = first, second
    assert step.step == expected.step and step.done
    for name in ("losses", "text", "first_batch", "tokens"):
        assert getattr(step.history, name) == getattr(expected.history, name), name
    mine, theirs = model.state_dict(), expected_model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def one_line(error) -> str:
    """The message of an error for users: one line, whole sentences, no flag of the command line."""
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert " --" not in message, message
    return message
