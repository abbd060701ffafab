"""A folder that Hugging Face's ``transformers`` opens: our weights, and GPT-2's tokenizer in its files."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from shakespeare_gpt.model import GPT
from shakespeare_gpt.publish.space import ExportError, list_folder, refuse_foreign_files, write_file
from shakespeare_gpt.runs.weights import save_safetensors
from shakespeare_gpt.tokenizer import END_OF_TEXT, VOCAB_SIZE, token_bytes


def byte_letters() -> dict[int, str]:
    """One printable character for each byte, as in OpenAI's vocabulary files.

    A byte that is a printable character of Latin-1 stands for itself. The other 68 (a space, a line's end,
    half of a UTF-8 character, ...) are numbered from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def recover_merges() -> list[tuple[bytes, bytes]]:
    """The 50,000 merges of GPT-2 in their order, which our vocabulary file holds only implicitly.

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


def export_transformers(model: GPT, folder: str | PathLike, meta: dict[str, Any]) -> dict[str, int]:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of ``transformers`` open.

    Weights in fp32. The ids are ours, but ``<|endoftext|>`` inside a text becomes the special token. Returns
    the files, as ``list_folder`` does. Raises ExportError, also for a vocabulary that is not GPT-2's.
    """
    folder, config, letters = Path(folder), model.config, byte_letters()
    if config.vocab_size != VOCAB_SIZE:
        raise ExportError(
            f"The model has a vocabulary of {config.vocab_size} tokens, the tokenizer {VOCAB_SIZE}: "
            "only a model with GPT-2's vocabulary can be exported for transformers."
        )

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    end = "<|endoftext|>"
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    texts = {
        "config.json": {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **asdict(config),  # vocab_size, n_positions, n_embd, n_layer, n_head
            "activation_function": "gelu_new",  # the tanh form, in their words
            "layer_norm_epsilon": model.ln_f.eps,
            "tie_word_embeddings": True,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
            "dtype": "float32",
            **ends,
        },
        "generation_config.json": {"do_sample": True, "temperature": 0.8, **ends},
        "vocab.json": {spell(token_bytes(rank)): rank for rank in range(END_OF_TEXT)} | {end: END_OF_TEXT},
        "merges.txt": "#version: 0.2\n" + "".join(f"{spell(a)} {spell(b)}\n" for a, b in recover_merges()),
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config.n_positions,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
        },
    }
    refuse_foreign_files(folder, {*texts, "model.safetensors"})
    for name, content in texts.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_file(folder / name, content.encode("utf-8"))
    save_safetensors(model, folder / "model.safetensors", meta, torch.float32)
    return list_folder(folder)
