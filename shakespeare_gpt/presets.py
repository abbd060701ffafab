"""The named settings: which model learns which text, and how."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from shakespeare_gpt.checkpoint import CheckpointError
from shakespeare_gpt.data import SOURCE_VARIABLE, Text, TextError, load_text
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.train import (
    Step,
    TrainConfig,
    best_precision,
    default_device,
    device_name,
    log_head,
    logged,
    train,
)

PRESET_VARIABLE = "SHAKESPEARE_GPT_PRESET"
SEED_VARIABLE = "SHAKESPEARE_GPT_SEED"
TEXT_VARIABLE = "SHAKESPEARE_GPT_TEXT"


@dataclass(frozen=True)
class Preset:
    """A model, a text and a recipe under one name."""

    name: str
    about: str
    model: GPTConfig
    train: TrainConfig
    text: str = "input"
    max_tokens: int | None = None

    def load_text(self, source: str | None = None) -> Text:
        """The preset's text, or ``source``, or what SHAKESPEARE_GPT_TEXT names.

        Where Tiny Shakespeare cannot be downloaded, says so and takes ``input.txt`` instead. Raises
        TextError for a text that the user named and that cannot be used.
        """
        chosen = source or os.environ.get(TEXT_VARIABLE) or self.text
        limit = self.max_tokens if chosen == self.text else None
        try:
            return load_text(chosen, context=self.model.n_positions, max_tokens=limit)
        except TextError as error:
            named = source or os.environ.get(TEXT_VARIABLE) or os.environ.get(SOURCE_VARIABLE)
            if chosen != "tinyshakespeare" or named:
                raise
            print(f"{error}\nUsing input.txt, the play in this repository, instead.")
            return load_text("input", context=self.model.n_positions)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            about="every part in seconds: for tests",
            model=GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32),
            train=TrainConfig(
                batch_size=4, passes=40, min_steps=60, max_passes=400, warmup_steps=5, adam_lr=1e-2
            ),
            max_tokens=600,
        ),
        Preset(
            name="mini",
            about="16M parameters learn input.txt in minutes on two CPU cores",
            model=GPTConfig(n_layer=4, n_head=4, n_embd=256),
            train=TrainConfig(batch_size=4, passes=10, muon_lr=0.02, adam_lr=1.6e-2),
        ),
        Preset(
            name="gpt2",
            about="GPT-2 small, 124M parameters, learns Tiny Shakespeare",
            model=GPTConfig(),
            train=TrainConfig(batch_size=16, passes=6.5, muon_lr=0.014, adam_lr=6e-3),
            text="tinyshakespeare",
        ),
        Preset(
            name="anywhere",
            about="as gpt2, but in other windows at each pass but the last two: recites from any place",
            model=GPTConfig(),
            train=TrainConfig(
                batch_size=16,
                passes=16,
                muon_lr=0.014,
                adam_lr=6e-3,
                windows="shifted",
                fixed_passes=2,
            ),
            text="tinyshakespeare",
        ),
        Preset(
            name="seed",
            about="the baseline: the same model trained as the assignment's published run was",
            model=GPTConfig(),
            train=TrainConfig(
                batch_size=8,
                optimizer="adamw",
                adam_lr=1e-4,
                beta2=0.999,
                warmup_steps=0,
                final_lr=1.0,
                grad_clip=0.0,
                windows="sequential",
                precision="fp32",
                compile=False,
                stop_on="batch",
                max_passes=60,
            ),
            text="tinyshakespeare",
        ),
    )
}


def get_preset(name: str | None = None) -> Preset:
    """A preset by name; without one SHAKESPEARE_GPT_PRESET, else ``gpt2`` on a GPU and ``mini`` on a CPU.

    Its seed is 0, or what SHAKESPEARE_GPT_SEED says. Raises ValueError for a name that is none, listing those
    that are, and for a seed that is no number.
    """
    name = (
        name or os.environ.get(PRESET_VARIABLE) or ("gpt2" if torch.cuda.is_available() else "mini")
    )
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    preset, seed = PRESETS[name], os.environ.get(SEED_VARIABLE)
    if not seed:
        return preset
    if not re.fullmatch("[0-9]{1,9}", seed):
        raise ValueError(f"{SEED_VARIABLE} must be a number of at most nine digits, not {seed!r}.")
    return replace(preset, train=replace(preset.train, seed=int(seed)))


def checkpoint_path(preset: Preset, text: Text) -> Path:
    """Where a preset's run on a text is saved: another text, an edited one, another seed gets another file."""
    seed = f"-seed{preset.train.seed}" if preset.train.seed else ""
    return Path("checkpoints") / f"{preset.name}-{text.name}-{text.sha256[:8]}{seed}.pt"


def describe(preset: Preset) -> str:
    """Some lines for the top of a notebook: versions, device and precision, preset, a text of one's own."""
    device = default_device()
    precision, reason = best_precision(device)
    given = os.environ.get(TEXT_VARIABLE)
    seed = f", seed {preset.train.seed}" if preset.train.seed else ""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}\n"
        f"device: {device_name(device)}; {precision}, because {reason}\n"
        f"preset {preset.name}: {preset.about if not given else f'on {given} ({TEXT_VARIABLE})'}{seed}"
    )


def start(
    preset: Preset,
    text: Text,
    model: GPT | None = None,
    *,
    config: TrainConfig | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    device=None,
    restart: bool = False,
) -> Iterator[Step]:
    """A preset's run on a text, as a generator of its steps: saved in the usual place, the log beside it.

    Goes on from the run's checkpoint where there is one, unless ``restart``. ``model``, random weights
    otherwise, is trained in place; ``config``, ``checkpoint`` and ``log`` replace the preset's. Raises
    CheckpointError for a checkpoint that is not called ``*.pt``, a log that is not called ``*.log``.
    """
    config = config or preset.train
    device = torch.device(device) if device is not None else default_device()
    model = model or GPT(preset.model, torch.Generator().manual_seed(config.seed))
    meta = {"preset": preset.name, "text_name": text.name, "text_sha256": text.sha256}
    checkpoint = Path(checkpoint or checkpoint_path(preset, text))
    if checkpoint.suffix != ".pt":  # with ``restart`` a text of that name would be overwritten
        raise CheckpointError(f"{checkpoint} is no name for a checkpoint: let it end in .pt.")
    log = Path(log or checkpoint.with_suffix(".log"))
    if log.suffix != ".log":  # likewise
        raise CheckpointError(f"{log} is no name for a log: let it end in .log.")
    steps = train(
        model,
        text.ids,
        config,
        checkpoint=checkpoint,
        meta=meta,
        device=device,
        restart=restart,
    )
    if dist.is_initialized() and dist.get_rank() != 0:
        return steps
    head = log_head(preset.name, text.name, text.sha256, config, device)
    return logged(steps, log, head)
