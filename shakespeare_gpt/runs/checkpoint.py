"""Checkpoints on disk: written whole or not at all, read without unpickling code.

A checkpoint is a dict of tensors and plain values in a ``.pt`` file, read with ``weights_only=True``.
"""

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from shakespeare_gpt import ShakespeareGPTError

FORMAT = "shakespeare-gpt-3"


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
    except (OSError, MemoryError) as error:  # this says nothing about what is in the file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CheckpointError(f"{path} could not be read ({reason}): try again.") from None
    except Exception as error:  # torch raises half a dozen types for what is not a checkpoint
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): name another file, or restart "
            "the run that it belongs to."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of the project: train again.")
    return state


def newest_checkpoint() -> Path:
    """The newest checkpoint in ``checkpoints``. Raises CheckpointError where there is none."""
    found = [p for p in Path("checkpoints").glob("*.pt") if p.is_file()]  # a link may lead nowhere
    if not found:
        raise CheckpointError(
            "There is no checkpoint in checkpoints/: train first (notebook 3), or name a file of weights."
        )
    return max(found, key=lambda p: p.stat().st_mtime)
