"""What is published: a complete Hugging Face Space, or a folder that ``transformers`` opens."""

import shutil
from collections.abc import Collection
from dataclasses import asdict
from os import PathLike, environ
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.data import OURS, PACKAGE, SHIPPED, Text, load_text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import TEXT_VARIABLE
from shakespeare_gpt.runs.weights import load_model, save_safetensors
from shakespeare_gpt.tokenizer import VOCAB_FILE, VOCAB_SIZE, WORD_PATTERN

CODE = ("app.py", "model_server.py", "render.py", "theme.py", "style.css")
SPACE_FILES = (*CODE, "README.md", "requirements.txt")
END_TOKEN = "<|endoftext|>"


def list_folder(folder: str | PathLike) -> dict[str, int]:
    """The visible files of a folder, relative path -> size in bytes; no caches."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            files["/".join(parts)] = path.stat().st_size
    return files


def listing(files: dict[str, int]) -> str:
    """A table of what ``list_folder`` found, with the sum in its last line."""
    rows = {**files, f"{len(files)} files": sum(files.values())}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {size:>11,} bytes" for name, size in rows.items())


def refuse_foreign_files(folder: str | PathLike, ours: Collection[str]) -> None:
    """Refuse a ``folder`` that holds a file that we would not write: no work is mixed up with ours."""
    if foreign := [name for name in list_folder(folder) if name not in ours]:
        raise ShakespeareGPTError(f"{folder} holds other files ({foreign[0]}): name or make an empty folder.")


def learnt_text(meta: dict[str, Any], source: Text | str | PathLike | None = None) -> Text:
    """The text that weights with this ``meta`` learnt: ``source``, or a text of this project that they name.

    A file of weights does not choose what of this machine is read and published, so any other text must be
    named. Raises ShakespeareGPTError if it is not, or not the right one.
    """
    name, remedy = str(meta.get("text_name", "input")), f"name its file, or set {TEXT_VARIABLE} to it"
    source = source or environ.get(TEXT_VARIABLE)
    if not source and name not in OURS:
        raise ShakespeareGPTError(f"The weights learnt {name!r}, no text of this project: {remedy}.")
    text = source if isinstance(source, Text) else load_text(source or name, context=1)
    if meta.get("text_sha256") not in (None, text.sha256):
        remedy = f"name no text, and unset {TEXT_VARIABLE}" if source and name in OURS else remedy
        raise ShakespeareGPTError(f"The weights learnt {name!r}; {text.name!r} is another text: {remedy}.")
    return text


def stage_space(
    folder: str | PathLike, checkpoint: str | PathLike, text: Text | str | PathLike | None = None
) -> dict[str, int]:
    """Put a complete Space into ``folder``: ``python app.py`` there needs nothing else of this repository.

    checkpoint: a ``.pt`` or ``.safetensors`` file; text: see ``learnt_text``. The weights are in bf16, which
    halves the download; what was memorized survives it (notebook 6 measures that). Returns the files, as
    ``list_folder`` does. Raises ShakespeareGPTError.
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


def export_transformers(model: GPT, folder: str | PathLike, meta: dict[str, Any]) -> dict[str, int]:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of ``transformers`` open.

    The weights are in fp32, with ``meta``, so that ``load_model`` reads them too. The ids are ours, but
    ``<|endoftext|>`` inside a text becomes the special token. Returns the files, as ``list_folder`` does.
    """
    try:
        from transformers import GPT2Config, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        raise ShakespeareGPTError("The transformers library is missing: pip install transformers") from None
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    refuse_foreign_files(folder, files)
    GPT2Config(architectures=["GPT2LMHeadModel"], **asdict(model.config)).save_pretrained(folder)
    converter = TikTokenConverter(str(VOCAB_FILE), WORD_PATTERN, extra_special_tokens=[END_TOKEN])
    settings = {"bos_token": END_TOKEN, "eos_token": END_TOKEN, "model_max_length": model.config.n_positions}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **settings)
    tokenizer.save_pretrained(folder)
    save_safetensors(model, Path(folder) / "model.safetensors", meta)
    return list_folder(folder)
