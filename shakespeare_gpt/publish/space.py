"""A Hugging Face Space in a folder: the page, this package, the weights, and the text that they learnt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike, environ
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.data import SHIPPED, Text, load_text
from shakespeare_gpt.presets import PRESETS, TEXT_VARIABLE
from shakespeare_gpt.runs.checkpoint import replacing
from shakespeare_gpt.runs.weights import load_model, save_safetensors
from shakespeare_gpt.tokenizer import VOCAB_SIZE

PACKAGE = Path(__file__).resolve().parents[1]
CODE = ("app.py", "model_server.py", "render.py", "theme.py", "style.css")
SPACE_FILES = (*CODE, "README.md", "requirements.txt")
# What programs leave in a folder and nobody wants to publish.
IGNORED = {"__pycache__", ".git", ".cache", ".gradio", ".venv", ".DS_Store"}
# Hugging Face keeps large files in LFS; text.txt keeps its line ends on every system.
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\ntext.txt text eol=lf\n"


class ExportError(ShakespeareGPTError):
    """An export that cannot be made; the message is one line that says what to do."""


def list_folder(folder: str | PathLike) -> dict[str, int]:
    """The files of a folder that are meant to be published: relative path -> size in bytes."""
    found = {p.relative_to(folder): p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()}
    kept = [p for p in sorted(found) if p.suffix != ".part" and IGNORED.isdisjoint(p.parts)]
    return {path.as_posix(): found[path] for path in kept}


def size_text(size: int) -> str:
    """A number of bytes for a reader: 835.6 kB."""
    thousands = (len(str(size)) - 1) // 3
    return f"{size / 1000**thousands:.1f} {'kMG'[thousands - 1]}B" if thousands else f"{size} bytes"


def listing(files: Mapping[str, int]) -> str:
    """A table of what ``list_folder`` found, with the sum in its last line."""
    rows = [*files.items(), (f"{len(files)} files", sum(files.values()))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {size_text(size):>11}" for name, size in rows)


def refuse_foreign_files(folder: Path, ours: Collection[str]) -> None:
    """Raise ExportError if ``folder`` holds a file that we would not write: no work is mixed up with ours."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: name a folder.")
    if foreign := [name for name in list_folder(folder) if name not in ours]:
        raise ExportError(f"{folder} holds other files ({foreign[0]}): name an empty folder.")


def write_file(path: Path, content: bytes) -> None:
    """Write a file that takes ``path``'s place only once it is complete."""
    with replacing(path) as part:
        part.write_bytes(content)


def learnt_text(meta: Mapping[str, Any], source: Text | str | PathLike | None = None) -> Text:
    """The text that weights with this ``meta`` learnt: ``source``, or where their preset has it from.

    A text of one's own is looked for as NAME.txt in the working directory, and taken only with the right
    SHA-256: a file of weights does not choose what of this machine is read and published. Raises ExportError
    if it is another text, TextError if it cannot be read.
    """
    name, sha256 = str(meta.get("text_name", "input")), meta.get("text_sha256")
    remedy = f"it is called {name!r}; name its file, or set {TEXT_VARIABLE} to it."
    chosen = source or environ.get(TEXT_VARIABLE)
    if not chosen and name in ("input", "tinyshakespeare"):
        chosen = name
    elif not chosen:
        chosen = Path(f"{name}.txt").absolute()
        if Path(name).name != name or not chosen.is_file() or not sha256:
            raise ExportError(f"The weights learnt a text that is not here: {remedy}")
    preset = PRESETS.get(str(meta.get("preset")))
    # ``smoke`` learns only the beginning of a text, whichever way that was named: the SHA-256 tells.
    for cut in (preset.max_tokens if preset else None, None):
        text = chosen if isinstance(chosen, Text) else load_text(chosen, context=1, max_tokens=cut)
        if sha256 in (None, text.sha256):
            return text
    raise ExportError(f"The weights learnt another text than {text.name} (SHA-256): {remedy}")


def stage_space(
    folder: str | PathLike,
    checkpoint: str | PathLike,
    text: Text | str | PathLike | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, int]:
    """Put a complete Space into ``folder``: ``python app.py`` there needs nothing else of this repository.

    checkpoint: a ``.pt`` or ``.safetensors`` file; text: see ``learnt_text``. bf16 halves the download, and
    what was memorized survives it (notebook 5 measures that). Returns the files, as ``list_folder`` does.
    Raises ExportError, CheckpointError and TextError.
    """
    folder, space = Path(folder), SHIPPED / "space"
    sources = {name: space / name for name in SPACE_FILES}
    for path in [*sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.glob("gpt2.tiktoken*"))]:
        if space not in path.parents:  # where a wheel was installed it lies in the package
            sources[f"shakespeare_gpt/{path.relative_to(PACKAGE).as_posix()}"] = path
    refuse_foreign_files(folder, {*sources, "model.safetensors", "text.txt", ".gitattributes"})
    model, meta = load_model(checkpoint, vocab_size=VOCAB_SIZE)
    text = learnt_text(meta, text)
    for name, path in sources.items():
        write_file(folder / name, path.read_bytes())
    write_file(folder / "text.txt", text.text.encode("utf-8"))
    write_file(folder / ".gitattributes", ATTRIBUTES)
    meta = {"text_name": text.name, "text_sha256": text.sha256, **meta}
    save_safetensors(model, folder / "model.safetensors", meta, dtype)
    return list_folder(folder)
