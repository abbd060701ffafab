"""How fast a training step of GPT-2 is: against transformers, and against the device's own matrix rate.

    python -m benchmarks.train_step

All rows train the same 124M architecture on the same batches, in turn: three rounds, the median, each
measurement in a process of its own, so that none inherits another's memory. ``transformers`` gets the same
precision, fused AdamW and its fastest attention. On a CPU our loop also keeps memory between steps and takes
attention apart (see ``keep_memory`` and ``autocast``), which anybody could do: a row shows ``transformers``
with the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from shakespeare_gpt.checkpoint import to_openai
from shakespeare_gpt.data import windows
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import get_preset
from shakespeare_gpt.train import (
    autocast,
    best_precision,
    default_device,
    device_name,
    keep_memory,
    train,
)

THEIRS, BOTH = "transformers, AdamW", "transformers, AdamW, with our memory and attention"
OURS, PLAIN = "ours, AdamW", "ours, AdamW, no CUDA graph"
RECIPE = "ours, Muon and AdamW (the recipe)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument(
        "--steps", type=int, help="steps in a round (default: 20 on a GPU, 3 on a CPU)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", default="input")
    args = parser.parse_args()
    device = default_device()
    on_gpu = device.type == "cuda"
    steps = args.steps or (20 if on_gpu else 3)
    precision, reason = best_precision(device)
    preset = get_preset("gpt2")
    most = len(windows(preset.load_text(args.text).ids, preset.model.n_positions)[0])
    if max(args.batch_size) > most:  # our loop would take no more windows in a step than there are
        parser.error(f"the text has {most} windows: take no larger batch, or a longer --text")
    import transformers

    print(
        f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    rate = matrix_rate(device, precision)
    print(f"{precision} ({reason}); a large matrix product runs at {rate / 1e12:.3g} TFLOP/s\n")
    print("| step | batch | tokens/s | against transformers | share of the matrix rate |")
    print("|---|--:|--:|--:|--:|", flush=True)
    flops = flops_per_token(get_preset("gpt2").model)
    rows = (THEIRS, OURS, PLAIN, RECIPE) if on_gpu else (THEIRS, BOTH, OURS, RECIPE)
    spawn = multiprocessing.get_context("spawn")
    for batch_size in args.batch_size:
        speeds: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(args.rounds):
            for row in rows:
                with ProcessPoolExecutor(1, mp_context=spawn) as fresh:  # a process for each
                    job = fresh.submit(measure, row, precision, batch_size, steps, args.text)
                    speeds[row].append(job.result())
        base = statistics.median(speeds[THEIRS])
        for row, values in speeds.items():
            speed = statistics.median(values)
            print(
                f"| {row} | {batch_size} | {speed:,.0f} | {speed / base:.2f} | "
                f"{speed * flops / rate:.0%} |",
                flush=True,
            )


def measure(row: str, precision: str, batch_size: int, steps: int, text: str) -> float:
    """Tokens a second of one kind of step, after two that set everything up."""
    device, preset = default_device(), get_preset("gpt2")
    ids = preset.load_text(text).ids
    config = dataclasses.replace(
        preset.train, batch_size=batch_size, target=1e-9, stop_on="batch", precision=precision
    )
    if row != RECIPE:
        config = dataclasses.replace(config, optimizer="adamw", adam_lr=1e-4)
    if row in (THEIRS, BOTH):
        run = transformers_steps(preset.model, ids, config, device, tuned=row == BOTH)
    else:
        config = dataclasses.replace(config, graph=row != PLAIN)
        run = train(GPT(preset.model), ids, config, device=device)
    for _ in range(2):
        next(run)
    return timed(run, steps, batch_size * preset.model.n_positions, device)


def flops_per_token(config) -> float:
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


def timed(run, steps: int, tokens: int, device: torch.device) -> float:
    """Tokens a second over a few steps."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        next(run)
    synchronize(device)
    return steps * tokens / (time.perf_counter() - began)


def transformers_steps(model_config, ids, config, device, tuned: bool):
    """The same training with transformers' model: a generator with one update in each turn."""
    from transformers import GPT2Config, GPT2LMHeadModel

    their = GPT2Config(
        vocab_size=model_config.vocab_size,
        n_positions=model_config.n_positions,
        n_embd=model_config.n_embd,
        n_layer=model_config.n_layer,
        n_head=model_config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    if tuned:
        keep_memory()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    plain = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    model = GPT2LMHeadModel(their).to(device).train()
    model.load_state_dict(to_openai(GPT(model_config).state_dict()), strict=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, config.beta2), fused=True
    )
    T = model_config.n_positions
    starts = torch.randperm(len(ids) - T, generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    for step in range(len(starts)):
        chosen = starts[
            torch.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(starts)
        ]
        x = ids[chosen.to(device)[:, None] + torch.arange(T, device=device)]
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, config.precision) if tuned else plain:
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        yield loss.item()


if __name__ == "__main__":
    main()
