"""From a checkpoint to files for others: safetensors, a ``transformers`` folder, a Hugging Face Space.

A ``.pt`` checkpoint is a pickle, which whoever opens it has to trust. A safetensors file holds numbers and a
header and nothing that could run, so that is what leaves the house. Weights go under the names and in the
layout of OpenAI's GPT-2, so that ``transformers`` and what is built on it read them.

From a shell: ``python -m shakespeare_gpt.export --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt.checkpoint import (
    chosen_weights,
    load_model,
    replacing,
    safetensors_header,
    to_openai,
)
from shakespeare_gpt.data import REPOSITORY, Text, load_text
from shakespeare_gpt.model import GPT
from shakespeare_gpt.tokenizer import END_OF_TEXT, VOCAB_SIZE, token_bytes, utf8_output

PACKAGE = Path(__file__).resolve().parent
SPACE = REPOSITORY / "space"  # app.py, README.md, requirements.txt
STAGED = Path("build") / "space"  # where a Space is put together unless another folder is named
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ExportError(RuntimeError):
    """An export that cannot be made; the message is one line that says what to do."""


# ---------------------------------------------------------------------------- files


def _write(path: Path, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` write a file that takes ``path``'s place only once it is complete. Raises ExportError."""
    try:
        with replacing(path) as part:
            fill(part)
            part.chmod(0o644)  # readable for whoever serves it
    except Exception as error:  # safetensors reports a full disk with an exception type of its own
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ExportError(
            f"{path} could not be written ({reason}): free some disk space or name another place. "
            "An earlier file of that name is untouched."
        ) from None
    return path


def _write_text(path: Path, text: str) -> Path:
    return _write(path, lambda part: part.write_bytes(text.encode("utf-8")))


def _write_json(path: Path, value: Any) -> Path:
    return _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def export_safetensors(
    model: GPT, path: str | os.PathLike, meta: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write a model's weights and what is known about them to ``path``, atomically.

    In fp32 ``checkpoint.load_model`` reads back exactly what was written; in bf16 the file is half as large
    and each number is rounded to 8 bits of mantissa. Raises ExportError, also for a name that ends otherwise
    than in .safetensors.
    """
    from safetensors.torch import save_file

    if Path(path).suffix != ".safetensors":  # a text or a checkpoint of that name would be replaced
        raise ExportError(f"{path} is no name for weights: let it end in .safetensors.")

    weights = {name: w.detach().cpu().to(dtype) for name, w in model.state_dict().items()}
    header = safetensors_header(model.config, meta)
    return _write(Path(path), lambda part: save_file(to_openai(weights), part, metadata=header))


# ---------------------------------------------------------------------------- for transformers


def byte_letters() -> dict[int, str]:
    """One printable character for each byte, as in OpenAI's vocabulary files.

    A byte that is a printable character of Latin-1 stands for itself, the other 68 (a space, a line's end,
    half of a UTF-8 character, ...) follow from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def recover_merges() -> list[tuple[bytes, bytes]]:
    """The 50,000 merges of GPT-2 in their order, which the file of ranks holds only implicitly.

    A token was made by one merge of two earlier ones. Encoding its bytes with the earlier tokens alone stops
    exactly there: at two parts.
    """
    tokens = [token_bytes(rank) for rank in range(END_OF_TEXT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def export_tokenizer(folder: str | os.PathLike, context: int) -> list[Path]:
    """Write GPT-2's tokenizer as ``transformers`` and ``tokenizers`` read it. Raises ExportError.

    The ids are ours, with one difference: there ``<|endoftext|>`` inside a text becomes the special token.
    """
    folder, letters = Path(folder), byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    end = "<|endoftext|>"
    vocab = {spell(token_bytes(rank)): rank for rank in range(END_OF_TEXT)} | {end: END_OF_TEXT}
    merges = [(spell(a), spell(b)) for a, b in recover_merges()]
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    return [
        _write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n"),
        _write_text(
            folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
        ),
        _write_text(
            folder / "tokenizer.json",
            json.dumps(
                {
                    "version": "1.0",
                    "truncation": None,
                    "padding": None,
                    "added_tokens": [
                        {"id": END_OF_TEXT, "content": end, "normalized": False, **special}
                    ],
                    "normalizer": None,
                    "pre_tokenizer": by_bytes,
                    "post_processor": {**by_bytes, "trim_offsets": False},
                    "decoder": by_bytes,
                    "model": {
                        "type": "BPE",
                        "dropout": None,
                        "unk_token": None,
                        "continuing_subword_prefix": "",
                        "end_of_word_suffix": "",
                        "fuse_unk": False,
                        "byte_fallback": False,
                        "ignore_merges": False,
                        "vocab": vocab,
                        "merges": [f"{a} {b}" for a, b in merges],
                    },
                },
                ensure_ascii=False,
            )
            + "\n",
        ),
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "GPT2Tokenizer",
                "model_max_length": context,
                "add_prefix_space": False,
                "bos_token": end,
                "eos_token": end,
                "unk_token": end,
                "clean_up_tokenization_spaces": False,
            },
        ),
    ]


def export_transformers(model: GPT, folder: str | os.PathLike, meta: dict[str, Any]) -> list[Path]:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of ``transformers`` open.

    Weights in fp32. Returns the files. Raises ExportError, also for a folder that holds something else and
    for a model whose vocabulary is not GPT-2's.
    """
    folder, config = Path(folder), model.config
    if config.vocab_size != VOCAB_SIZE:
        raise ExportError(
            f"The model has a vocabulary of {config.vocab_size} tokens, the tokenizer {VOCAB_SIZE}: "
            "only a model with GPT-2's vocabulary can be exported for transformers."
        )
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    ]
    _refuse_foreign(folder, {*names, "tokenizer.json", "tokenizer_config.json"})
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    return [
        _write_json(
            folder / "config.json",
            {
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "vocab_size": config.vocab_size,
                "n_positions": config.n_positions,
                "n_ctx": config.n_positions,
                "n_embd": config.n_embd,
                "n_layer": config.n_layer,
                "n_head": config.n_head,
                "n_inner": None,
                "activation_function": "gelu_new",  # transformers' name for the tanh form
                "layer_norm_epsilon": model.ln_f.eps,
                "initializer_range": 0.02,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
                "tie_word_embeddings": True,
                "use_cache": True,
                "dtype": "float32",
                "torch_dtype": "float32",  # the older name of the same
                **ends,
            },
        ),
        _write_json(
            folder / "generation_config.json", {"do_sample": True, "temperature": 0.8, **ends}
        ),
        export_safetensors(model, folder / "model.safetensors", meta),
        *export_tokenizer(folder, config.n_positions),
    ]


# ---------------------------------------------------------------------------- a Space

# What running a program or git leaves in a folder, and what never goes anywhere.
IGNORED = {"__pycache__", ".git", ".cache", ".gradio", ".venv", ".DS_Store"}


@dataclass(frozen=True)
class Staged:
    """One file of a folder that is ready to go."""

    path: str  # relative, with /
    bytes: int


def list_folder(folder: str | os.PathLike) -> list[Staged]:
    """The files of a folder that would be uploaded, by path."""
    folder, found = Path(folder), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not IGNORED.intersection(name.parts) and path.suffix != ".part":
            found.append(Staged(name.as_posix(), path.stat().st_size))
    return found


def size_text(size: int) -> str:
    """A number of bytes for a reader: 835.6 kB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def listing(files: Iterable[Staged]) -> str:
    """A table of files and their sizes, with the sum under it."""
    files = list(files)
    rows = [(file.path, size_text(file.bytes)) for file in files]
    rows.append((f"{len(files)} files", size_text(sum(file.bytes for file in files))))
    width = max(len(path) for path, _ in rows)
    return "\n".join(f"{path:<{width}}  {size:>11}" for path, size in rows)


def _refuse_foreign(folder: Path, ours: set[str]) -> None:
    """Raise ExportError if the folder holds a file that is not one of ``ours``: nobody's work is mixed up."""
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: name a folder.")
    foreign = [file.path for file in list_folder(folder) if file.path not in ours]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ExportError(
            f"{folder} holds other files ({foreign[0]}{more}): name an empty folder, or clear this one."
        )


def learnt_text(meta: dict[str, Any], source: str | os.PathLike | None = None) -> Text:
    """The text that weights with this ``meta`` learnt: ``source``, or where the preset has it from.

    A text of one's own is looked for as NAME.txt in the working directory, and taken only with the right
    SHA-256: a file of weights does not choose what of this machine is read and published. Raises ExportError
    if it is another text, TextError if it cannot be read.
    """
    from shakespeare_gpt.presets import PRESETS, TEXT_VARIABLE

    name = str(meta.get("text_name", "input"))
    chosen = source or os.environ.get(TEXT_VARIABLE)
    if not chosen and name in ("input", "tinyshakespeare"):
        chosen = name
    elif not chosen:
        chosen = Path(f"{name}.txt").absolute()
        if Path(name).name != name or not chosen.is_file() or not meta.get("text_sha256"):
            raise ExportError(
                f"The weights learnt a text called {name!r}: name its file with --text or in {TEXT_VARIABLE}."
            )
    preset = PRESETS.get(str(meta.get("preset")))
    limit = preset.max_tokens if preset is not None and chosen == preset.text else None
    text = load_text(chosen, context=1, max_tokens=limit)
    if meta.get("text_sha256") not in (None, text.sha256):
        raise ExportError(
            f"The weights learnt another text than {chosen} (its SHA-256 differs; theirs is called "
            f"{name!r}): name the right file with --text or in {TEXT_VARIABLE}."
        )
    return text


def stage_space(
    folder: str | os.PathLike,
    checkpoint: str | os.PathLike,
    text: Text | str | os.PathLike | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Staged]:
    """Put a complete Space into ``folder``: ``python app.py`` there needs nothing else of this repository.

    ``checkpoint``: a ``.pt`` or ``.safetensors`` file; ``text``: the text that it learnt (see
    ``learnt_text``). The weights go in bf16: half of fp32's download and start, and what was learnt by heart
    survives the rounding (tests and notebook 05 measure it). Returns the files. Raises ExportError,
    CheckpointError, TextError.
    """
    folder = Path(folder)
    ours = {f"shakespeare_gpt/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    ours |= {
        f"shakespeare_gpt/{path.name}": path for path in sorted(PACKAGE.glob("gpt2.tiktoken*"))
    }
    ours |= {name: SPACE / name for name in ("app.py", "README.md", "requirements.txt")}
    missing = [path for path in ours.values() if not path.is_file()]
    if missing:
        raise ExportError(
            f"{missing[0]} is missing: stage a Space from a complete clone of the repository."
        )
    _refuse_foreign(folder, {*ours, "model.safetensors", "text.txt", ".gitattributes"})
    model, meta = load_model(checkpoint, vocab_size=VOCAB_SIZE)
    if not isinstance(text, Text):
        text = learnt_text(meta, text)
    elif meta.get("text_sha256") not in (None, text.sha256):
        raise ExportError(
            f"The weights learnt another text than {text.name} (its SHA-256 differs): give the right one."
        )
    meta = {"text_name": text.name, "text_sha256": text.sha256, **meta}
    for name, path in ours.items():
        _write(folder / name, lambda part, path=path: shutil.copyfile(path, part))
    _write_text(folder / "text.txt", text.text)
    # Hugging Face keeps large files in LFS; text.txt keeps its line ends on every system.
    _write_text(
        folder / ".gitattributes",
        "*.safetensors filter=lfs diff=lfs merge=lfs -text\ntext.txt text eol=lf\n",
    )
    export_safetensors(model, folder / "model.safetensors", meta, dtype)
    return list_folder(folder)


def push(
    folder: str | os.PathLike,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> str:
    """Upload a staged folder to the Space ``USER/NAME``, made if there is none. Returns its address.

    With ``dry_run`` nothing is sent and no network is needed; print ``listing(list_folder(folder))`` for what
    would go. Raises ExportError.
    """
    check_name(name)
    folder = Path(folder)
    for file in ("app.py", "README.md", "requirements.txt", "model.safetensors", "text.txt"):
        if not (folder / file).is_file():
            raise ExportError(
                f"{folder} is no staged Space ({file} is missing): use --stage first."
            )
    url = f"https://huggingface.co/spaces/{name}"
    if dry_run:
        return url
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import get_token

    need = (
        "make one that may write at https://huggingface.co/settings/tokens, then set HF_TOKEN "
        "or run: hf auth login"
    )
    token = token or get_token()
    if not token:
        raise ExportError(f"There is no Hugging Face token: {need}")
    try:
        api = HfApi(token=token)
        _create(api, name, private)
        api.upload_folder(
            folder_path=folder,
            repo_id=name,
            repo_type="space",
            commit_message="The Space, staged by shakespeare_gpt.export",
            ignore_patterns=[f"**/{part}/**" for part in IGNORED]
            + [f"{part}/**" for part in IGNORED]
            + [".DS_Store", "**/.DS_Store", "*.part"],
        )
    except LocalTokenNotFoundError:
        raise ExportError(f"There is no Hugging Face token: {need}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = " ".join((getattr(error, "server_message", None) or "").split())
        said = f" ({status}: {said})" if said else f" ({status})"
        if status in (401, 403):
            raise ExportError(f"Hugging Face refused the token{said} for {name}: {need}") from None
        if status == 402:
            raise ExportError(
                f"Hugging Face wants a paid plan for {name}{said}: without one an account older than 30 days "
                f"may have two Gradio Spaces, on ZeroGPU. Delete one, or show yours from here: python {folder / 'app.py'}"
            ) from None
        raise ExportError(
            f"Hugging Face did not take {name}{said}: try again, or upload by hand (notebook 05)."
        ) from None
    except Exception as error:  # httpx, DNS, TLS, time-outs: a dozen types, one meaning
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"Hugging Face could not be reached ({reason}): check the network and run this again; "
            "what was already sent is not sent twice."
        ) from None
    return url


def check_name(name: str) -> None:
    """Raise ExportError for what cannot be a Space's name, by Hugging Face's own rules."""
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        raise ExportError("Uploading needs huggingface_hub: pip install huggingface_hub") from None
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if "/" in name:
            return
    raise ExportError(
        f"{name!r} is no name of a Space: it reads USER/NAME, such as ada/shakespeare-gpt."
    )


def _create(api: Any, name: str, private: bool) -> None:
    """Make the Space, unless there is one of that name: on a plain CPU, else on ZeroGPU.

    Since July 2026 Hugging Face answers 402 to a free account that asks for a Gradio Space on a CPU, but lets
    it have two on ZeroGPU once it is 30 days old (https://huggingface.co/docs/hub/spaces-zerogpu), whose CPU
    is enough for us.
    """
    from huggingface_hub.errors import HfHubHTTPError

    kind = {"repo_type": "space", "space_sdk": "gradio", "private": private, "exist_ok": True}
    try:
        api.create_repo(name, **kind)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) != 402:
            raise
        api.create_repo(name, **kind, space_hardware="zero-a10g")


# ---------------------------------------------------------------------------- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shakespeare_gpt.export",
        description="Hand a trained model on: as safetensors, to transformers, as a Hugging Face Space.",
        epilog="Example: python -m shakespeare_gpt.export --stage build/space, then: python build/space/app.py. "
        "To publish it: python -m shakespeare_gpt.export --push USER/NAME "
        "(add --dry-run to see first what would go).",
    )
    parser.add_argument(
        "--weights",
        "--checkpoint",
        dest="checkpoint",
        metavar="FILE",
        help=".pt or .safetensors (default: the newest in checkpoints/)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="the text that the weights learnt, if it is your own"
    )
    parser.add_argument(
        "--safetensors", metavar="FILE", help="write the weights and their metadata to FILE"
    )
    parser.add_argument(
        "--transformers", metavar="DIR", help="write a folder that transformers opens, in fp32"
    )
    parser.add_argument("--stage", metavar="DIR", help="put the complete Space into DIR")
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help=f"stage the Space (in {STAGED.as_posix()} unless --stage names a folder) and upload it",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: a new Space is private"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="upload nothing: list what would go, with sizes"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the weights (default: fp32 for --safetensors, bf16 for the Space, half the size)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not (args.safetensors or args.transformers or args.stage or args.push or args.dry_run):
        parser.error(
            "say what to make: --safetensors, --transformers, --stage or --push (see --help)"
        )
    utf8_output()
    try:
        _run(args)
    except (OSError, RuntimeError, ValueError) as error:  # our own errors are among these
        line = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"export: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    checkpoint = chosen_weights(args.checkpoint)
    if args.push:  # a wrong name is worth knowing before half a gigabyte is written
        check_name(args.push)
    if args.safetensors or args.transformers:
        model, meta = load_model(checkpoint)
        if args.safetensors:
            path = export_safetensors(model, args.safetensors, meta, DTYPES[args.dtype or "fp32"])
            print(f"{path}  {size_text(path.stat().st_size)}")
        if args.transformers:
            export_transformers(model, args.transformers, meta)
            print(listing(list_folder(args.transformers)))
        del model
    if args.stage or args.push or args.dry_run:
        folder = Path(args.stage or STAGED)
        files = stage_space(folder, checkpoint, args.text, dtype=DTYPES[args.dtype or "bf16"])
        print(f"The Space in {folder}, from {checkpoint}:\n{listing(files)}")
        if args.dry_run:
            print("Nothing was uploaded (--dry-run).")
        elif args.push:
            print(f"Uploaded: {push(folder, args.push, private=args.private)}")
        else:
            print(f"Try it: python {(folder / 'app.py').as_posix()}")


if __name__ == "__main__":
    sys.exit(main())
