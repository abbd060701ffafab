"""Weights in files: read from checkpoints and safetensors, written as safetensors in OpenAI's layout.

A ``.pt`` file is a pickle, which whoever opens it has to trust. A safetensors file holds numbers and a header
and nothing that could run, so that is what is handed on.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.runs.checkpoint import CheckpointError, load_checkpoint, named, replacing

# The transformers library and OpenAI keep these four matrices as (in, out): the transpose of nn.Linear's.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PREFIX = "transformer."  # what transformers puts before each of OpenAI's names


def to_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names and in OpenAI's (in, out) layout."""
    return {
        PREFIX + name: (w.T if name.endswith(TRANSPOSED) else w).contiguous() for name, w in state.items()
    }


def from_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``to_openai``."""
    return {
        name.removeprefix(PREFIX): (w.T if name.endswith(TRANSPOSED) else w).contiguous()
        for name, w in state.items()
    }


def save_safetensors(
    model: GPT, path: str | os.PathLike, meta: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write a model's weights and what is known about them to ``path``, atomically.

    In fp32 ``load_model`` reads back exactly what was written; in bf16 the file is half as large and each
    number is rounded to 8 bits of mantissa. Raises CheckpointError, also for a name that does not end in
    .safetensors.
    """
    path = named(path, ".safetensors")
    weights = {name: w.detach().cpu().to(dtype) for name, w in model.state_dict().items()}
    # safetensors' metadata holds strings only, so each value is JSON.
    header = {"format": "pt", "config": json.dumps(asdict(model.config)), "meta": json.dumps(meta)}
    with replacing(path) as part:
        save_file(to_openai(weights), part, metadata=header)
        part.chmod(0o644)  # readable for whoever serves it
    return path


def load_model(
    path: str | os.PathLike, device: Any = "cpu", *, vocab_size: int | None = None
) -> tuple[GPT, dict[str, Any]]:
    """Read a model in fp32, and what is known about it, from ``.pt`` or ``.safetensors``.

    Raises CheckpointError if the file is missing, damaged, or not a model of this project (with
    ``vocab_size``: with so many tokens): there are no random weights to fall back on.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        weights, config, meta = _read_safetensors(path)
    else:
        state = load_checkpoint(path)
        weights, config, meta = (state.get(key) for key in ("model", "config", "meta"))
    try:
        if not isinstance(meta, dict):
            raise TypeError("its metadata is no table")
        if vocab_size not in (None, config["vocab_size"]):
            raise ValueError(f"its vocabulary has {config['vocab_size']} tokens, not {vocab_size}")
        config = GPTConfig(**config)
        # Before anything is built: a header may claim thousands of layers that the file does not hold.
        if len(weights) != 4 + 12 * config.n_layer:
            raise ValueError(f"{len(weights)} tensors do not make {config.n_layer} layers")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no GPT of this project ({str(error).splitlines()[0]}): train or export again."
        ) from None
    return model.to(device), meta


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}: export them first (notebook 6).")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: Windows replaces no file that is still mapped.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        config, meta = json.loads(header["config"]), json.loads(header["meta"])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}): export it again.") from None
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} lacks this project's metadata: export it again.") from None
    return from_openai(weights), config, meta
