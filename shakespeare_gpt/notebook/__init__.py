"""How a notebook begins: in the right folder, with its preset, its text and a model that knows it."""

import os
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt.data import PACKAGE, Text, TextError
from shakespeare_gpt.model import GPT
from shakespeare_gpt.notebook import plots
from shakespeare_gpt.presets import TEXT_VARIABLE, Preset, get_preset
from shakespeare_gpt.publish.export import learnt_text
from shakespeare_gpt.runs.run import start
from shakespeare_gpt.runs.weights import load_checkpoint, load_model
from shakespeare_gpt.speed.devices import best_precision, default_device, device_name, keep_freed_memory
from shakespeare_gpt.tokenizer import VOCAB_SIZE

WEIGHTS_VARIABLE = "SHAKESPEARE_GPT_WEIGHTS"


def setup() -> Preset:
    """Prepare the kernel for a notebook of this project, print what it runs on, and return the preset.

    A notebook in a clone works in the clone's own folder, so that it shares ``checkpoints`` with the command
    line. The kernel's process keeps freed memory from then on, which makes training on a CPU quicker.
    """
    if PACKAGE.parent in Path.cwd().parents:
        os.chdir(PACKAGE.parent)
    keep_freed_memory()
    plots.style()
    preset, device = get_preset(), default_device()
    precision, reason = best_precision(device)
    given = os.environ.get(TEXT_VARIABLE)
    print(f"torch {torch.__version__}, {device_name(device)}")
    print(f"precision {precision}, because {reason}")
    print(f"preset {preset.name}: {f'on {given}' if given else preset.about}")
    return preset


def load_text(preset: Preset) -> Text:
    """The preset's text; where Tiny Shakespeare cannot be downloaded, input.txt, and a line that says so."""
    try:
        return preset.load_text()
    except TextError as error:
        if preset.text != "tinyshakespeare" or os.environ.get(TEXT_VARIABLE):
            raise
        print(f"{error}\nUsing input.txt, the play in this repository, instead.")
        return preset.load_text("input")


def trained_model(preset: Preset | None = None, device: Any = None) -> tuple[GPT, Text, dict[str, Any]]:
    """A model that knows its text: (model, text, what the weights say about themselves).

    The weights that SHAKESPEARE_GPT_WEIGHTS names, else the preset's checkpoint. Where there is none, or only
    an interrupted one, the preset is trained on the spot, with the live plot.
    """
    preset, device = preset or get_preset(), device or default_device()
    if given := os.environ.get(WEIGHTS_VARIABLE):
        model, meta = load_model(given, device, vocab_size=VOCAB_SIZE)
        return model, learnt_text(meta), meta
    text = load_text(preset)
    path = preset.checkpoint_path(text, preset.train.seed)
    if not path.exists() or not load_checkpoint(path)["meta"]["finished"]:
        plots.watch(start(preset, text, device=device))
    model, meta = load_model(path, device)
    return model, text, meta
