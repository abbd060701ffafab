"""The command line: ``shakespeare-gpt train | generate | recite | export``.

Exit codes: 0 done, 1 not reached or refused, 2 wrong usage, 130 interrupted. This is the one place where an
error becomes a line; what is not expected keeps its traceback.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from shakespeare_gpt import ShakespeareGPTError, UsageError
from shakespeare_gpt.memorization import Scores, report
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import PRESETS, TARGET, TrainConfig, get_preset
from shakespeare_gpt.publish.export import export_transformers, learnt_text, listing, stage_space
from shakespeare_gpt.runs.log import end_line
from shakespeare_gpt.runs.run import run_to_end, start
from shakespeare_gpt.runs.weights import load_model, newest_checkpoint, save_safetensors
from shakespeare_gpt.sample import stream_text
from shakespeare_gpt.speed.devices import best_precision, default_device, device_name, keep_freed_memory
from shakespeare_gpt.speed.processes import connected, rank
from shakespeare_gpt.tokenizer import VOCAB_SIZE
from shakespeare_gpt.train import Step


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    status = run(arguments)
    if "RANK" in os.environ:
        # gloo's threads outlive the process group, and one that frees a tensor while Python shuts down aborts
        # the process: all is saved, so leave at once (github.com/pytorch/pytorch/pull/179291).
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code. Raises SystemExit for wrong usage."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # into a file or pipe Windows would write in its own code page
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        return options.command(options)
    except BrokenPipeError:  # `| head` has seen enough; Python's last flush must not complain
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except UsageError as error:
        options.parser.error(str(error))
    except (ShakespeareGPTError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # the first of several processes speaks for all
            print(str(error) or "interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shakespeare-gpt", description="A GPT-2 learns a text by heart.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for function, arguments in COMMANDS.items():
        about, _, more = function.__doc__.partition("\n")
        one = commands.add_parser(function.__name__, help=about, description=about, epilog=more)
        one.set_defaults(command=function, parser=one)
        for name, kind, default, what in arguments:
            if kind is bool:
                one.add_argument(name, action="store_true", help=what)
                continue
            what += f" (default: {default})" if default else ""
            optional = {} if name.startswith("-") else {"nargs": "?"}
            one.add_argument(name, type=kind, default=default, help=what, **optional)
    return parser


def train(options: argparse.Namespace) -> int:
    """Train a GPT-2 on a text until it knows it by heart.

    Ctrl-C at any time: the same command, without --restart, goes on from there.
    """
    preset, device = get_preset(options.preset), default_device(options.device)
    given = {f.name: getattr(options, f.name, None) for f in fields(TrainConfig)}
    config = replace(preset.train, **{k: v for k, v in given.items() if v is not None})
    keep_freed_memory()
    with connected():
        if rank() != 0:  # the first of several processes speaks for all
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        text = preset.load_text(options.text)
        path = Path(options.checkpoint or preset.checkpoint_path(text, config.seed))
        model = GPT(preset.model, torch.Generator().manual_seed(config.seed))
        sizes = f"{model.num_parameters():,} parameters learn {len(text.ids):,} tokens"
        print(f"{preset.name} on {text.name}: {sizes}")
        name, reason = best_precision(device, config.precision)
        print(f"device: {device_name(device)}; {name}, because {reason}")
        settings = {"config": config, "checkpoint": path, "device": device, "restart": options.restart}
        last = run_to_end(start(preset, text, model, **settings), _show_progress())
        print(end_line(last) + (", in a run that has ended before" if last.state is None else ""))
        print(f"Saved checkpoint to {path}" if last.state is not None else "--restart starts over")
    return 0


def _show_progress() -> Callable[[Step], None]:
    """A function that prints how far a run is, every ten seconds."""
    printed = 0.0

    def show(step: Step) -> None:
        nonlocal printed
        if step.done or time.monotonic() - printed > 10.0:
            text = f" | text {step.history.text[-1][1]:.4f}" if step.history.text else ""
            about = f"{step.progress:.0%} of the way, {step.seconds_left / 60:.1f} min left"
            print(f"step {step.step} | loss {step.loss:.4f}{text} | {about}", flush=True)
            printed = time.monotonic()

    return show


def generate(options: argparse.Namespace) -> int:
    """Let a trained model continue a prompt.

    Example: shakespeare-gpt generate "JULIET:\\n" --temperature 0
    """
    parameters = {n: getattr(options, n) for n in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    prompt = options.prompt.replace("\\n", "\n")
    model, meta = load_model(options.weights or newest_checkpoint(), vocab_size=VOCAB_SIZE)
    pieces = stream_text(model, prompt, **parameters)
    known = {k: meta.get(k) for k in ("preset", "text_name", "steps", "loss")} | parameters
    about = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in known.items() if v is not None}
    print("#", " ".join(f"{k}={v}" for k, v in about.items()), file=sys.stderr, flush=True)
    print(prompt, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def recite(options: argparse.Namespace) -> int:
    """Measure, in full precision, how well weights know their text by heart.

    The exit code is 0 if the whole text is under the target, else 1.
    """
    device, weights = default_device(options.device), options.weights or newest_checkpoint()
    model, meta = load_model(weights, device, vocab_size=VOCAB_SIZE)
    text = learnt_text(meta, options.text)
    sizes = f"{model.num_parameters():,} parameters, {text.name}, {len(text.ids):,} tokens"
    print(f"{weights}: {sizes}, on {device_name(device)}", flush=True)
    for what, result in report(model, text.ids):
        print(f"{what}: {result}", flush=True)
        if isinstance(result, Scores):
            known = result.loss < TARGET
            print(f"The whole text is {'' if known else 'not '}under {TARGET}.", flush=True)
    return 0 if known else 1


def export(options: argparse.Namespace) -> int:
    """Hand a trained model on: as safetensors, to transformers, as a Hugging Face Space.

    Example: shakespeare-gpt export --stage build/space
    """
    if not (options.safetensors or options.transformers or options.stage):
        raise UsageError("say what to make: --safetensors, --transformers or --stage")
    weights = Path(options.weights or newest_checkpoint())
    if options.safetensors or options.transformers:
        model, meta = load_model(weights, vocab_size=VOCAB_SIZE)
        if options.safetensors:
            path = save_safetensors(model, options.safetensors, meta)
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
        if options.transformers:
            print(listing(export_transformers(model, options.transformers, meta)))
        del model  # stage_space loads it again: not two at once
    if options.stage:
        files = stage_space(options.stage, weights, options.text)
        print(f"The Space in {options.stage}, from {weights}:\n{listing(files)}")
        print(f"Try it: python {(options.stage / 'app.py').as_posix()}")
    return 0


# For each command its arguments, as (name, type, default, help).
WEIGHTS = ("--weights", Path, None, "a .pt or .safetensors file; without it the newest in checkpoints/")
TEXT = ("--text", str, None, "the text that the weights learnt, if it is your own")
DEVICE = ("--device", str, None, "cuda, cpu, ...; without it the GPU if there is one")
COMMANDS = {
    train: (
        ("--preset", str, None, "; ".join(f"{p.name}: {p.about}" for p in PRESETS.values())),
        ("--text", str, None, "learn this text file, not the preset's text"),
        ("--checkpoint", Path, None, "where to save, the log beside it; without it in checkpoints/"),
        ("--restart", bool, None, "start over"),
        DEVICE,
        ("--batch-size", int, None, "windows in a step"),
        ("--epochs", float, None, "times through the text until the rates have come down"),
        ("--max-epochs", float, None, "where to give up"),
        ("--muon-lr", float, None, "peak rate of Muon"),
        ("--adam-lr", float, None, "peak rate of AdamW"),
        ("--precision", str, None, "auto, bf16, fp16 or fp32"),
        ("--target", float, None, "the mean loss in nats at which to stop"),
        ("--seed", int, None, "of the weights and of the order of the windows"),
    ),
    generate: (
        ("prompt", str, "", r"\n in it is a line break"),
        WEIGHTS,
        ("--max-new-tokens", int, 200, "how many tokens"),
        ("--temperature", float, 0.8, "0: always the best token"),
        ("--top-k", int, 0, "keep the k best; 0: all"),
        ("--top-p", float, 1.0, "keep the best that reach p"),
        ("--seed", int, 0, "the same seed, the same text"),
    ),
    recite: (WEIGHTS, TEXT, DEVICE),
    export: (
        WEIGHTS,
        TEXT,
        ("--safetensors", Path, None, "write the weights to this file"),
        ("--transformers", Path, None, "write a folder that transformers opens"),
        ("--stage", Path, None, "put the complete Space into this folder"),
    ),
}
