"""Weights in files: our checkpoints, and safetensors in OpenAI's layout, which are handed on.

A checkpoint is a dict of tensors and plain values in a ``.pt`` file. That is a pickle, so it is read with
``weights_only=True``, which runs no code. A safetensors file holds numbers and a header and nothing that
could run: that is what is handed on. Both are written whole or not at all.
"""

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.model import GPT, GPTConfig

FORMAT = "shakespeare-gpt-3"
# The transformers library and OpenAI keep these four matrices as (in, out): the transpose of nn.Linear's.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PREFIX = "transformer."  # what transformers puts before each of OpenAI's names


class CheckpointError(ShakespeareGPTError):
    """A file of weights that cannot be read or written."""


def named(path: str | os.PathLike, suffix: str) -> Path:
    """The path, which must end in ``suffix``: a slip must not replace a text. Raises CheckpointError."""
    path = Path(path)
    if path.suffix != suffix:
        raise CheckpointError(f"{path} is no name for that file: let it end in {suffix}.")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file that takes its place once it is complete.

    A crash, a kill or a full disk leaves the old file as it was. Each writer has a name of its own, so that
    two at once never mix. What a kill left behind is removed when it is an hour old. Raises CheckpointError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink()
        yield part
        with open(part, "r+b") as file:  # Windows writes through only what is open for writing
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} could not be written ({reason}): free some disk space, or save elsewhere. "
            "An earlier file of that name is untouched."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> Path:
    """Write a dict of tensors and plain values to ``path``, atomically. Raises CheckpointError."""
    path = named(path, ".pt")
    with replacing(path) as part, open(part, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
    return path


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote, to the CPU. Raises CheckpointError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}: train first (notebook 3).")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what is not a checkpoint
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(
            f"{path} could not be read as a checkpoint ({reason}): try again. If that does not help, name "
            "another file, or restart the run that it belongs to."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of the project: train again.")
    return state


def newest_checkpoint() -> Path:
    """The newest checkpoint in ``checkpoints``. Raises CheckpointError where there is none."""
    found = [p for p in Path("checkpoints").glob("*.pt") if p.is_file()]  # a link may lead nowhere
    if not found:
        raise CheckpointError("There is no checkpoint in checkpoints/: train first, or name a file.")
    return max(found, key=lambda p: p.stat().st_mtime)


def to_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under transformers' names and in OpenAI's (in, out) layout."""
    return {PREFIX + name: _transposed(name, w) for name, w in state.items()}


def from_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_openai``."""
    return {name.removeprefix(PREFIX): _transposed(name, w) for name, w in state.items()}


def _transposed(name: str, weight: Tensor) -> Tensor:
    return (weight.T if name.endswith(TRANSPOSED) else weight).contiguous()


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
    try:
        if path.suffix == ".safetensors":
            weights, config, meta = _read_safetensors(path)
        else:
            state = load_checkpoint(path)
            weights, config, meta = (state.get(key) for key in ("model", "config", "meta"))
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
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is no readable GPT of this project ({reason}): train or export again."
        ) from None
    return model.to(device), meta


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}: export them first (notebook 6).")
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        # Copies: Windows replaces no file that is still mapped.
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if not header.keys() >= {"config", "meta"}:
        raise ValueError("it lacks this project's metadata")
    return from_openai(weights), json.loads(header["config"]), json.loads(header["meta"])
