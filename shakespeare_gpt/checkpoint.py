"""Weights and training state on disk: written whole or not at all, read without unpickling code.

A ``.pt`` checkpoint is a dict of tensors and plain values, read with ``weights_only=True``. The weights
alone go to ``.safetensors`` (see ``export``); ``load_model`` reads both.
"""

from __future__ import annotations

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

from shakespeare_gpt.model import GPT, GPTConfig

FORMAT = "shakespeare-gpt-1"
# The transformers library and OpenAI keep these four matrices as (in, out): the transpose of nn.Linear's.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PREFIX = "transformer."  # what transformers puts before each of OpenAI's names


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message is one line that says what to do."""


def save_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> Path:
    """Write a dict of tensors and plain values to ``path``, atomically.

    The new file takes the old one's place only once it is complete on the disk: a crash, a kill or a full
    disk leaves the old checkpoint as it was. Raises CheckpointError.
    """
    path = Path(path)
    try:
        with replacing(path) as part, open(part, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's zip writer reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({reason}): free some disk space, or save elsewhere. "
            "An earlier checkpoint of that name is untouched."
        ) from None
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for the file that takes its place once it is complete; nothing is left of a failure.

    Each writer has a name of its own, so that two at once never mix. What a kill left behind is removed when
    it is an hour old, and is surely nobody's work any more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with open(part, "r+b") as file:  # Windows writes through only what is open for writing
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Read what ``save_checkpoint`` wrote. Raises CheckpointError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}: train first (notebook 03).")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, MemoryError) as error:  # this says nothing about what is in the file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path} could not be read ({reason}): try again.") from None
    except Exception as error:  # torch raises half a dozen types for what is not a checkpoint
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): name another file; if it is the "
            "damaged checkpoint of a run, --restart starts that over."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a checkpoint of another program: name one of this project's."
        )
    return state


def to_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under transformers' names and in OpenAI's (in, out) layout; for the way back, see below."""
    return {
        PREFIX + name: (w.T if name.endswith(TRANSPOSED) else w).contiguous()
        for name, w in state.items()
    }


def from_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``to_openai``."""
    return {
        name.removeprefix(PREFIX): (w.T if name.endswith(TRANSPOSED) else w).contiguous()
        for name, w in state.items()
    }


def load_model(
    path: str | os.PathLike, device: Any = "cpu", *, vocab_size: int | None = None
) -> tuple[GPT, dict[str, Any]]:
    """Read a model, in evaluation mode and fp32, and what is known about it, from ``.pt`` or ``.safetensors``.

    Raises CheckpointError if the file is missing, damaged, or not a model of this project (with
    ``vocab_size``: with so many tokens): there are no random weights to fall back on.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        weights, config, meta = _read_safetensors(path)
    else:
        state = load_checkpoint(path)
        try:
            weights, config, meta = state["model"], state["config"], state["meta"]
        except KeyError as error:
            raise CheckpointError(
                f"{path} holds no GPT ({error} is missing): train again."
            ) from None
    try:
        if not isinstance(meta, dict):
            raise TypeError("its metadata is no table")
        if vocab_size not in (None, config["vocab_size"]):
            raise ValueError(
                f"its vocabulary has {config['vocab_size']} tokens, the tokenizer {vocab_size}"
            )
        with torch.device("meta"):
            model = GPT(GPTConfig(**config), generator=torch.Generator("cpu"))
        model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no GPT of this project ({str(error).splitlines()[0]}): export it again."
        ) from None
    return model.to(device).eval(), meta


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, int], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}: export them first (notebook 05).")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: Windows replaces no file that is still mapped.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        config, meta = json.loads(header["config"]), json.loads(header["meta"])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): export it again."
        ) from None
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{path} lacks this project's metadata: export it again with shakespeare_gpt.export."
        ) from None
    return from_openai(weights), config, meta


def safetensors_header(config: GPTConfig, meta: dict[str, Any]) -> dict[str, str]:
    """The metadata that ``load_model`` looks for: safetensors holds strings only, so each value is JSON."""
    return {"format": "pt", "config": json.dumps(asdict(config)), "meta": json.dumps(meta)}


def chosen_weights(path: str | os.PathLike | None = None) -> Path:
    """``path``, or else the newest checkpoint in ``checkpoints``. Raises CheckpointError where there is none."""
    if path:
        return Path(path)
    # Not what a kill has left behind, nor a link to nowhere.
    found = [p for p in Path("checkpoints").glob("[!.]*.pt") if p.is_file()]
    if not found:
        raise CheckpointError(
            "There is no checkpoint in checkpoints/: train first (python -m shakespeare_gpt.train), or name "
            "weights with --weights."
        )
    return max(found, key=lambda p: p.stat().st_mtime)
