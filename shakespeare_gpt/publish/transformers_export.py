"""A folder that Hugging Face's ``transformers`` opens: our weights, and GPT-2's tokenizer in its format."""

from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from shakespeare_gpt.model import GPT
from shakespeare_gpt.publish.space import ExportError, list_folder, refuse_foreign_files
from shakespeare_gpt.runs.weights import save_safetensors
from shakespeare_gpt.tokenizer import VOCAB_FILE, VOCAB_SIZE, WORD_PATTERN

END = "<|endoftext|>"


def export_transformers(model: GPT, folder: str | PathLike, meta: dict[str, Any]) -> dict[str, int]:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of ``transformers`` open.

    The weights are in fp32, with ``meta``, so that ``load_model`` reads them too. The ids are ours, but
    ``<|endoftext|>`` inside a text becomes the special token. Returns the files, as ``list_folder`` does.
    Raises ExportError, also for a vocabulary that is not GPT-2's.
    """
    try:
        from transformers import GPT2Config, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        raise ExportError("The transformers library is missing: pip install transformers") from None
    if model.config.vocab_size != VOCAB_SIZE:
        raise ExportError(f"A vocabulary of {model.config.vocab_size} tokens is not GPT-2's {VOCAB_SIZE}.")
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    refuse_foreign_files(folder, files)
    GPT2Config(architectures=["GPT2LMHeadModel"], **asdict(model.config)).save_pretrained(folder)
    converter = TikTokenConverter(str(VOCAB_FILE), WORD_PATTERN, extra_special_tokens=[END])
    settings = {"bos_token": END, "eos_token": END, "model_max_length": model.config.n_positions}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **settings)
    tokenizer.save_pretrained(folder)
    save_safetensors(model, Path(folder) / "model.safetensors", meta)
    return list_folder(folder)
