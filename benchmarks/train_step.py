"""How fast a training step is, against transformers and against the device's matrix rate.

    python -m benchmarks.train_step            # many minutes on a CPU; --quick: less than two

All rows train the same architecture on the same batches. They take turns: three rounds, the median, each
measurement in a new process, so that none inherits another's memory. ``transformers`` gets the same
precision, fused AdamW and its fastest attention. On a CPU our loop also keeps freed memory and takes
attention apart (see ``speed/devices.py``), which anybody could do: a row shows ``transformers`` with the two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from shakespeare_gpt.data import windows
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.presets import TrainConfig, get_preset
from shakespeare_gpt.runs.weights import to_openai
from shakespeare_gpt.speed.devices import (
    autocast,
    best_precision,
    default_device,
    device_name,
    keep_freed_memory,
)
from shakespeare_gpt.train import train

THEIRS, BOTH = "transformers, AdamW", "transformers, AdamW, with our memory and attention"
OURS, RECIPE = "ours, AdamW", "ours, Muon and AdamW (the recipe)"


@dataclass(frozen=True)
class Job:
    """What is measured in one process."""

    row: str
    preset: str
    text: str
    precision: str
    batch_size: int
    steps: int
    warmup: int  # steps before the clock starts


def measure(job: Job) -> float:
    """Tokens a second of one kind of step."""
    device, preset = default_device(), get_preset(job.preset)
    ids = preset.load_text(job.text).ids
    changes = {"batch_size": job.batch_size, "precision": job.precision}
    config = replace(preset.train, target=1e-9, stop_on="batch", **changes)
    if job.row != RECIPE:
        config = replace(config, optimizer="adamw", adam_lr=1e-4, share_unseen=False)
    if job.row != THEIRS and device.type == "cpu":
        keep_freed_memory()
    if job.row in (THEIRS, BOTH):
        run = transformers_steps(preset.model, ids, config, device, tuned=job.row == BOTH)
    else:
        run = train(GPT(preset.model), ids, config, device=device)
    for _ in range(job.warmup):
        next(run)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(job.steps):
        next(run)
    synchronize(device)
    return job.steps * job.batch_size * preset.model.n_positions / (time.perf_counter() - began)


def transformers_steps(
    model_config: GPTConfig, ids: torch.Tensor, config: TrainConfig, device: torch.device, tuned: bool
) -> Iterator[float]:
    """The same training with transformers' model: a generator with one update in each turn."""
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    transformers.logging.set_verbosity_error()
    their = GPT2Config(**asdict(model_config), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    plain = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    model = GPT2LMHeadModel(their).to(device).train()
    model.load_state_dict(to_openai(GPT(model_config).state_dict()), strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, config.beta2), fused=True)
    offsets = torch.arange(model_config.n_positions, device=device)
    starts = torch.randperm(len(ids) - len(offsets), generator=torch.Generator().manual_seed(0)).to(device)
    ids = ids.to(device)
    for step in range(len(starts)):
        batch = torch.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(starts)
        x = ids[starts[batch.to(device)][:, None] + offsets]
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, config.precision) if tuned else plain:
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        yield loss.item()


def flops_per_token(config: GPTConfig) -> float:
    """Operations of forward and backward for one token: 6 for each weight of a matrix, and attention.

    Positions and biases cost next to nothing; the embedding's matrix counts once, as the output layer.
    Attention multiplies queries with keys and weights with values: 12 T C per layer, halved by the mask.
    """
    matrices = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6 * matrices + 6 * config.n_layer * config.n_positions * config.n_embd


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large product of random matrices: the ceiling of this device."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_new_process(function: Callable, argument):
    """The result of ``function(argument)`` in a new process, which ends when this one is interrupted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, argument))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the measuring process ended without a result (out of memory?)") from None
    finally:
        process.terminate()
        process.join()


def _answer(sender, function: Callable, argument) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
    sender.send(function(argument))


def print_table(speeds: dict[tuple[str, int], list[float]], rate: float, flops: float) -> None:
    """What was measured so far."""
    if not speeds:
        return
    print("| step | batch | rounds | tokens/s | against transformers | share of the matrix rate |")
    print("|---|--:|--:|--:|--:|--:|")
    for (row, batch_size), values in speeds.items():
        speed, base = statistics.median(values), speeds.get((THEIRS, batch_size))
        against = f"{speed / statistics.median(base):.2f}" if base else ""
        cells = [row, batch_size, len(values), f"{speed:,.0f}", against, f"{speed * flops / rate:.0%}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, help="in a round (default: 20 on a GPU, 3 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="gpt2", help="whose model and recipe (default: gpt2)")
    parser.add_argument("--text", default="input")
    parser.add_argument("--quick", action="store_true", help="one step of 2 windows: less than two minutes")
    args = parser.parse_args(argv)
    device, preset = default_device(), get_preset(args.preset)
    on_gpu, warmup = device.type == "cuda", 2
    if args.quick:
        args.batch_size, args.steps, args.rounds, warmup = [2], 1, 1, 1
    steps = args.steps or (20 if on_gpu else 3)
    most = len(windows(preset.load_text(args.text).ids, preset.model.n_positions)[0])
    if max(args.batch_size) > most:  # our loop would take no more windows in a step than there are
        parser.error(f"the text has {most} windows: take no larger batch, or a longer --text")
    import transformers

    precision, reason = best_precision(device)
    rate, flops = matrix_rate(device, precision), flops_per_token(preset.model)
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{precision} ({reason}); a large matrix product runs at {rate / 1e12:.3g} TFLOP/s\n", flush=True)
    rows = (THEIRS, OURS, RECIPE) if on_gpu else (THEIRS, BOTH, OURS, RECIPE)
    speeds: dict[tuple[str, int], list[float]] = {}
    try:
        for batch_size in args.batch_size:
            for number in range(args.rounds):
                for row in rows:
                    job = Job(row, args.preset, args.text, precision, batch_size, steps, warmup)
                    line = f"round {number + 1} of {args.rounds}, batches of {batch_size}, {row}: "
                    print(line, end="", file=sys.stderr, flush=True)
                    speeds.setdefault((row, batch_size), []).append(in_new_process(measure, job))
                    print(f"{speeds[row, batch_size][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        print_table({key: values for key, values in speeds.items() if values}, rate, flops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
