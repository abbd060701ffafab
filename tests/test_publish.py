"""Publishing: others read what we trained, nothing private leaves this machine, and errors are one line."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from shakespeare_gpt import ShakespeareGPTError, cli
from shakespeare_gpt.data import load_text
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.presets import get_preset
from shakespeare_gpt.publish.export import (
    SPACE_FILES,
    export_transformers,
    learnt_text,
    list_folder,
    listing,
    stage_space,
)
from shakespeare_gpt.runs.weights import CheckpointError, load_model, save_safetensors
from shakespeare_gpt.sample import generate
from shakespeare_gpt.tokenizer import encode

# --- safetensors


def test_safetensors_read_back_equal(tiny, tmp_path):
    model, meta = load_model(tiny.checkpoint)
    path = save_safetensors(model, tmp_path / "new" / "m.safetensors", meta)
    again, meta_again = load_model(path)
    assert meta_again == meta
    assert again.config == model.config
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_bf16_is_half_as_large_and_keeps_what_was_learnt(tiny, tmp_path):
    model, meta = load_model(tiny.checkpoint)
    full = save_safetensors(model, tmp_path / "a.safetensors", meta)
    half = save_safetensors(model, tmp_path / "b.safetensors", meta, torch.bfloat16)
    assert half.stat().st_size < 0.51 * full.stat().st_size
    rounded, _ = load_model(half)
    assert rounded.wte.weight.dtype == torch.float32
    ids = tiny.text.ids[None, :64]
    with torch.no_grad():
        a, b = model(ids[:, :-1], ids[:, 1:]), rounded(ids[:, :-1], ids[:, 1:])
    assert abs(a - b) < 0.02


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def fail(weights, name, metadata=None):
        Path(name).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shakespeare_gpt.runs.weights.save_file", fail)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_safetensors(tiny.model, path, {})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_programmer_is_not_called_a_full_disk(tiny, tmp_path):
    with pytest.raises(TypeError):
        save_safetensors(tiny.model, tmp_path / "m.safetensors", {"a set": {1}})


def test_a_text_is_not_overwritten_by_weights(tiny, tmp_path):
    """An export to the text's own name replaced the text."""
    poem = tmp_path / "poem.txt"
    poem.write_text("My poem.", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"end in \.safetensors"):
        save_safetensors(tiny.model, poem, {})
    assert poem.read_text(encoding="utf-8") == "My poem."


# --- transformers


@pytest.fixture(scope="module")
def opened(tiny, tmp_path_factory):
    """The exported folder as transformers opens it: (our model, its model, its tokenizer, the folder)."""
    transformers = pytest.importorskip("transformers")
    model, meta = load_model(tiny.checkpoint)
    folder = tmp_path_factory.mktemp("hf") / "model"
    assert export_transformers(model, folder, meta) == list_folder(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder), folder


def test_the_weights_of_the_folder_keep_their_story(opened, tiny):
    """transformers writes weights without our metadata: ``recite`` could not open the folder's file."""
    model, meta = load_model(opened[3] / "model.safetensors")
    assert meta == load_model(tiny.checkpoint)[1]
    assert model.wte.weight.equal(opened[0].wte.weight)


def test_without_transformers_one_line_says_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    """The Space's requirements leave it out."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    command = ["export", "--weights", str(tiny.checkpoint), "--transformers", str(tmp_path / "x")]
    assert cli.run(command) == 1
    error = capsys.readouterr().err
    assert "pip install transformers" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_transformers_computes_the_same_logits(opened, tiny):
    model, theirs, _, _ = opened
    ids = tiny.text.ids[:64][None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert theirs.config.n_positions == 64
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight


def test_transformers_continues_with_the_same_words(opened):
    model, theirs, tokenizer, _ = opened
    prompt = "First Fisher:\nHaul"
    ours = list(generate(model, encode(prompt), max_new_tokens=20, temperature=0.0))
    inputs = tokenizer(prompt, return_tensors="pt")
    result = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=50256)
    assert result[0, inputs.input_ids.shape[1] :].tolist() == ours


def check_same_ids(tokenizer, text):
    ids = tokenizer(text, verbose=False).input_ids
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text


def test_same_ids_on_the_whole_of_the_play(opened):
    check_same_ids(opened[2], (REPOSITORY / "input.txt").read_text(encoding="utf-8"))


def test_same_ids_on_the_whole_of_tiny_shakespeare(opened, tiny_shakespeare_path):
    check_same_ids(opened[2], tiny_shakespeare_path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two\n\n\nlines \t",
        "naïve 🎭🌊 Ωμέγα 漢字",
        "it's we'll I'M x1y2",
        "\u00a0no\u2003break \r\n e\u0301 \ufeff\x00\x85",
        " a" * 50,
    ],
)
def test_same_ids_on_odd_texts(opened, text):
    check_same_ids(opened[2], text)


def test_transformers_ends_a_document_where_we_do(opened):
    """Programs that open the folder ask the tokenizer which token ends a text."""
    tokenizer = opened[2]
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id] == [50256]
    assert tokenizer.model_max_length == 64


def test_the_config_is_complete(opened):
    config = json.loads((opened[3] / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["activation_function"] == "gelu_new"
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 50256
    assert config["layer_norm_epsilon"] == opened[0].ln_f.eps
    assert (config["n_layer"], config["n_head"], config["n_embd"]) == (2, 2, 64)


def test_another_vocabulary_is_refused(tmp_path, capsys):
    model = GPT(GPTConfig(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    foreign = save_safetensors(model, tmp_path / "foreign.safetensors", {})
    command = ["export", "--weights", str(foreign), "--transformers", str(tmp_path / "x")]
    assert cli.run(command) == 1 and "vocabulary has 61 tokens" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="vocabulary has 61"):  # the page would refuse it
        stage_space(tmp_path / "space", foreign, tmp_path / "x.txt")


# --- the staged Space


def test_a_staged_space_is_complete(tiny, tmp_path):
    folder = tmp_path / "space"
    files = stage_space(folder, tiny.checkpoint, tiny.source)
    for name in SPACE_FILES:
        assert (folder / name).read_bytes() == (REPOSITORY / "space" / name).read_bytes()
    for path in (REPOSITORY / "shakespeare_gpt").rglob("*.py"):
        assert path.relative_to(REPOSITORY).as_posix() in files
    assert {"shakespeare_gpt/gpt2.tiktoken", "shakespeare_gpt/gpt2.tiktoken.LICENSE"} <= set(files)
    assert not any("__pycache__" in name or name.endswith((".pt", ".part")) for name in files)
    assert (folder / "text.txt").read_bytes() == tiny.text.text.encode("utf-8")
    _, meta = load_model(folder / "model.safetensors")
    assert meta["text_sha256"] == tiny.text.sha256
    assert sum(files.values()) < 10e6
    assert stage_space(folder, tiny.checkpoint, tiny.source) == files  # over itself


def test_all_files_of_the_space_are_staged():
    """A file that the page imports and that is not in the list is missing on Hugging Face only."""
    kinds = (".py", ".css", ".md", ".txt")
    here = {path.name for path in (REPOSITORY / "space").iterdir() if path.suffix in kinds}
    assert here == set(SPACE_FILES)


def test_front_matter():
    """What Hugging Face reads of the README, and that its version of Gradio is the one tested here."""
    _, matter, _ = (REPOSITORY / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = dict(re.findall(r"^(\w+): (.+)$", matter, re.MULTILINE))
    assert fields["sdk"] == "gradio"
    assert fields["app_file"] == "app.py"
    assert len(fields["short_description"]) <= 60
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={fields['sdk_version']}\n" in pins
    assert {"title", "emoji", "colorFrom", "colorTo", "python_version"} <= set(fields)


def test_the_listing_adds_up(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 999)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 1000)
    for left in ("sub/.DS_Store", ".a.1234.part", ".cache/huggingface/x", "sub/__pycache__/b.pyc"):
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left).write_bytes(b"x")
    files = list_folder(tmp_path)
    assert files == {"a": 999, "sub/b": 1000}
    assert [line.split() for line in listing(files).splitlines()] == [
        ["a", "999", "bytes"], ["sub/b", "1,000", "bytes"], ["2", "files", "1,999", "bytes"],
    ]  # fmt: skip


def test_nobodys_files_are_mixed_up(tiny, tmp_path):
    (tmp_path / "thesis.doc").write_text("mine", encoding="utf-8")
    with pytest.raises(ShakespeareGPTError, match=r"thesis\.doc.*empty folder"):
        stage_space(tmp_path, tiny.checkpoint, tiny.source)
    with pytest.raises(ShakespeareGPTError, match=r"thesis\.doc"):
        export_transformers(tiny.model, tmp_path, {})
    with pytest.raises(OSError, match=r"thesis\.doc"):  # which the command line makes one line of
        stage_space(tmp_path / "thesis.doc", tiny.checkpoint, tiny.source)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    assert (tmp_path / "thesis.doc").read_text(encoding="utf-8") == "mine"


# --- which text was learnt


def test_the_wrong_text_is_refused(tiny, tmp_path):
    with pytest.raises(ShakespeareGPTError, match=r"learnt 'tiny'; 'input' is another text: name its file"):
        stage_space(tmp_path / "s", tiny.checkpoint, "input")
    with pytest.raises(ShakespeareGPTError, match="learnt 'tiny', no text of this project: name its file"):
        stage_space(tmp_path / "s", tiny.checkpoint)
    with pytest.raises(ShakespeareGPTError, match="is another text"):
        stage_space(tmp_path / "s", tiny.checkpoint, load_text("input"))
    assert not (tmp_path / "s").exists()


def test_named_weights_come_with_their_own_text(tiny, monkeypatch, tmp_path):
    """SHAKESPEARE_GPT_WEIGHTS paired weights with whatever text had the same name."""
    from shakespeare_gpt.notebook import trained_model

    monkeypatch.setenv("SHAKESPEARE_GPT_WEIGHTS", str(tiny.checkpoint))
    monkeypatch.setenv("SHAKESPEARE_GPT_TEXT", str(tiny.source))
    assert trained_model()[1].sha256 == tiny.text.sha256
    other = tmp_path / "tiny.txt"
    other.write_text("Another text of the same name.\n" * 40, encoding="utf-8")
    monkeypatch.setenv("SHAKESPEARE_GPT_TEXT", str(other))
    with pytest.raises(ShakespeareGPTError, match="is another text"):
        trained_model()


@pytest.mark.parametrize("with_sha256", [True, False])
def test_a_file_of_weights_does_not_choose_what_is_read(tmp_path, monkeypatch, with_sha256):
    """A foreign file named a private one as its text, and the Space would have published it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.write_text("A secret.\n" * 30, encoding="utf-8")
    (tmp_path / "secret.txt").write_bytes(secret.read_bytes())
    told = {"text_sha256": load_text(secret, context=1).sha256} if with_sha256 else {}
    for name in (str(secret), str(secret.with_suffix("")), "elsewhere/secret", "secret", "secret.txt", ["x"]):
        with pytest.raises(ShakespeareGPTError, match="name its file"):
            learnt_text({"text_name": name, **told})
    assert learnt_text({"text_name": "secret", **told}, secret).name == "secret"


def test_the_text_of_a_preset_is_found():
    """``recite --text input.txt`` on weights of ``smoke`` said that theirs is called 'input'."""
    text = get_preset("smoke").load_text()
    meta = {"text_name": text.name, "text_sha256": text.sha256}
    assert learnt_text(meta).text == text.text
    for other in ("input", REPOSITORY / "input.txt"):
        with pytest.raises(
            ShakespeareGPTError, match=r"'input-page'; 'input' is another text: name no text, and unset"
        ):
            learnt_text(meta, other)


# --- the upload, which is Hugging Face's own command


def test_the_commands_of_the_upload_exist():
    """Hugging Face renames an option, and our readers' Spaces stay at home."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    commands = [line.split() for line in re.findall(r"^\.venv/bin/hf (.*)$", text, re.MULTILINE)]
    assert [words[0] for words in commands] == ["auth", "repos", "upload"]
    for words in commands:
        name = words[:1] if words[0] == "upload" else words[:2]
        asked = [sys.executable, "-m", "huggingface_hub.cli.hf", *name, "--help"]
        said = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", check=True).stdout
        assert all(word in said for word in words if word.startswith("--")), words
