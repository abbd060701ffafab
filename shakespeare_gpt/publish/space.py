"""A Hugging Face Space in a folder: the page, this package, the weights, and the text that they learnt."""

import shutil
from collections.abc import Collection
from os import PathLike, environ
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.data import OURS, PACKAGE, SHIPPED, Text, load_text
from shakespeare_gpt.presets import TEXT_VARIABLE
from shakespeare_gpt.runs.weights import load_model, save_safetensors
from shakespeare_gpt.tokenizer import VOCAB_SIZE

CODE = ("app.py", "model_server.py", "render.py", "theme.py", "style.css")
SPACE_FILES = (*CODE, "README.md", "requirements.txt")


class ExportError(ShakespeareGPTError):
    """An export that cannot be made."""


def list_folder(folder: str | PathLike) -> dict[str, int]:
    """The visible files of a folder, relative path -> size in bytes; no caches."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            files["/".join(parts)] = path.stat().st_size
    return files


def size_text(size: int) -> str:
    """A number of bytes for a reader: 835.6 kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def listing(files: dict[str, int]) -> str:
    """A table of what ``list_folder`` found, with the sum in its last line."""
    rows = {**files, f"{len(files)} files": sum(files.values())}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {size_text(size):>9}" for name, size in rows.items())


def refuse_foreign_files(folder: str | PathLike, ours: Collection[str]) -> None:
    """Raise ExportError if ``folder`` holds a file that we would not write: no work is mixed up with ours."""
    if foreign := [name for name in list_folder(folder) if name not in ours]:
        raise ExportError(f"{folder} holds other files ({foreign[0]}): name an empty folder.")


def learnt_text(meta: dict[str, Any], source: Text | str | PathLike | None = None) -> Text:
    """The text that weights with this ``meta`` learnt: ``source``, or a text of this project that they name.

    A file of weights does not choose what of this machine is read and published, so any other text must be
    named. Raises ExportError if it is not, or not the right one, and TextError if it cannot be read.
    """
    name, sha256 = str(meta.get("text_name", "input")), meta.get("text_sha256")
    remedy = f"it is called {name!r}; name its file, or set {TEXT_VARIABLE} to it."
    if name in OURS:
        remedy = f"it is {name!r}, which comes with this project: name no text, and unset {TEXT_VARIABLE}."
    source = source or environ.get(TEXT_VARIABLE)
    if not source and name not in OURS:
        raise ExportError(f"The weights learnt a text that does not come with this project: {remedy}")
    text = source if isinstance(source, Text) else load_text(source or name, context=1)
    if sha256 not in (None, text.sha256):
        raise ExportError(f"The weights learnt another text than {text.name} (SHA-256): {remedy}")
    return text


def stage_space(
    folder: str | PathLike, checkpoint: str | PathLike, text: Text | str | PathLike | None = None
) -> dict[str, int]:
    """Put a complete Space into ``folder``: ``python app.py`` there needs nothing else of this repository.

    checkpoint: a ``.pt`` or ``.safetensors`` file; text: see ``learnt_text``. The weights are in bf16, which
    halves the download; what was memorized survives it (notebook 6 measures that). Returns the files, as
    ``list_folder`` does. Raises ExportError, CheckpointError and TextError.
    """
    folder = Path(folder)
    sources = {name: SHIPPED / "space" / name for name in SPACE_FILES}
    for name in list_folder(PACKAGE):
        if not name.startswith(("space/", "input.txt")):  # where a wheel puts what it ships
            sources[f"shakespeare_gpt/{name}"] = PACKAGE / name
    refuse_foreign_files(folder, {*sources, "model.safetensors", "text.txt"})
    model, meta = load_model(checkpoint, vocab_size=VOCAB_SIZE)
    text = learnt_text(meta, text)
    for name, path in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    (folder / "text.txt").write_bytes(text.text.encode("utf-8"))
    save_safetensors(model, folder / "model.safetensors", meta, torch.bfloat16)
    return list_folder(folder)
