"""The settings: how to train, and the named presets that say which model learns which text."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shakespeare_gpt import UsageError
from shakespeare_gpt.data import Text, load_text
from shakespeare_gpt.model import GPTConfig

TARGET = 0.099999  # nats per token, over the whole text
PRESET_VARIABLE = "SHAKESPEARE_GPT_PRESET"
TEXT_VARIABLE = "SHAKESPEARE_GPT_TEXT"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Notebook 3 builds the loop that reads these settings."""

    batch_size: int = 8  # windows in a step, over all GPUs; of short windows about as many tokens
    epochs: float = 9.0  # times through the text until the rates have come down
    fixed_every: int = 4  # with moving windows: one batch of so many is of fixed ones
    max_epochs: float = 40.0  # where to give up, if that is beyond the schedule and 4 min_steps
    min_steps: int = 120  # a short text needs more epochs: the schedule has at least so many steps
    optimizer: str = "muon"  # "muon": Muon for the layers' matrices, AdamW for the rest; or "adamw"
    muon_lr: float = 0.02
    momentum: float = 0.9  # Muon's: the share of the past in its mean of gradients
    adam_lr: float = 2e-3
    beta2: float = 0.99  # AdamW's, in its mean of squared gradients
    warmup_steps: int = 30
    final_lr: float = 0.05  # the share of the peak rate at the end of the schedule; 1.0: constant
    grad_clip: float = 1.0  # the largest norm of the gradient; 0: no clipping
    share_unseen: bool = False  # the tokens that the text lacks share one embedding: cheaper
    windows: str = "moving"  # "moving" in turn with "fixed" ones; "fixed" or "sequential" alone
    precision: str = "auto"  # "auto", "bf16", "fp16" or "fp32"
    stop_on: str = "text"  # "text": mean of the whole text under the target; "batch": any one batch
    target: float = TARGET
    seed: int = 0

    def __post_init__(self):
        choices = {
            "optimizer": ("muon", "adamw"),
            "windows": ("moving", "fixed", "sequential"),
            "precision": ("auto", "bf16", "fp16", "fp32"),
            "stop_on": ("text", "batch"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name in ("batch_size", "epochs", "fixed_every", "max_epochs", "muon_lr", "adam_lr", "target"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Preset:
    """A model, a text and a recipe under one name."""

    name: str
    about: str
    model: GPTConfig
    train: TrainConfig
    text: str = "input"

    def load_text(self, source: str | os.PathLike | None = None) -> Text:
        """The text that ``source`` or SHAKESPEARE_GPT_TEXT names, else the preset's. Raises TextError."""
        source = source or os.environ.get(TEXT_VARIABLE) or self.text
        return load_text(source, context=self.model.n_positions)

    def checkpoint_path(self, text: Text, seed: int = 0) -> Path:
        """Where the run on a text is saved: another text, an edited one or another seed has another file."""
        suffix = f"-seed{seed}" if seed else ""
        return Path("checkpoints") / f"{self.name}-{text.name}-{text.sha256[:8]}{suffix}.pt"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke",
            about="every part in seconds: for tests",
            model=GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32, window=16),
            train=TrainConfig(
                batch_size=4, epochs=40, min_steps=60, max_epochs=400, warmup_steps=5, adam_lr=1e-2
            ),
            text="input-page",
        ),
        Preset(
            name="mini",
            about="16M parameters learn input.txt in minutes on two CPU cores",
            model=GPTConfig(n_layer=4, n_head=4, n_embd=256, window=48),
            train=TrainConfig(batch_size=4, epochs=20, muon_lr=0.03, adam_lr=1.6e-2, share_unseen=True),
        ),
        Preset(
            name="gpt2",
            about="GPT-2 small, 124M parameters, learns Tiny Shakespeare",
            model=GPTConfig(window=48),
            train=TrainConfig(
                batch_size=16, epochs=9.45, fixed_every=5, muon_lr=0.024, adam_lr=3e-3, share_unseen=True
            ),
            text="tinyshakespeare",
        ),
        Preset(
            name="baseline",
            about="the same model, AdamW at a constant rate, until one batch is under the target",
            model=GPTConfig(),
            train=TrainConfig(
                optimizer="adamw",
                adam_lr=1e-4,
                beta2=0.999,
                warmup_steps=0,
                final_lr=1.0,
                grad_clip=0.0,
                windows="sequential",
                precision="fp32",
                stop_on="batch",
            ),
            text="tinyshakespeare",
        ),
    )
}


def get_preset(name: str | None = None) -> Preset:
    """A preset by name; without one SHAKESPEARE_GPT_PRESET, else ``gpt2`` on a GPU and ``mini`` on a CPU.

    Raises UsageError for a name that does not exist, and lists those that do.
    """
    name = name or os.environ.get(PRESET_VARIABLE) or ("gpt2" if torch.cuda.is_available() else "mini")
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
