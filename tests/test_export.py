"""Export: what others read is what we trained, nothing half-written stays, and errors are one line."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_play import tiny_checkpoint

from shakespeare_gpt import export, plots
from shakespeare_gpt.checkpoint import CheckpointError, load_model
from shakespeare_gpt.data import load_text
from shakespeare_gpt.export import ExportError
from shakespeare_gpt.generate import generate
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.tokenizer import encode, token_bytes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint, the file of its text, the text)"""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def opened(tiny, tmp_path_factory):
    """The exported folder as transformers opens it: (our model, its model, its tokenizer, the folder)."""
    transformers = pytest.importorskip("transformers")
    model, meta = load_model(tiny[0])
    folder = tmp_path_factory.mktemp("hf") / "model"
    export.export_transformers(model, folder, meta)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


# --- safetensors


def test_safetensors_read_back_equal(tiny, tmp_path):
    model, meta = load_model(tiny[0])
    path = export.export_safetensors(model, tmp_path / "new" / "m.safetensors", meta)
    again, meta_again = load_model(path)
    assert meta_again == meta
    assert again.config == model.config
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_bf16_is_half_as_large_and_keeps_what_was_learnt(tiny, tmp_path):
    model, meta = load_model(tiny[0])
    full = export.export_safetensors(model, tmp_path / "a.safetensors", meta)
    half = export.export_safetensors(model, tmp_path / "b.safetensors", meta, torch.bfloat16)
    assert half.stat().st_size < 0.51 * full.stat().st_size
    rounded, _ = load_model(half)
    assert rounded.wte.weight.dtype == torch.float32
    ids = tiny[2].ids[None, :64]
    with torch.no_grad():
        a, b = model(ids[:, :-1], ids[:, 1:]), rounded(ids[:, :-1], ids[:, 1:])
    assert abs(a - b) < 0.02


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tiny, tmp_path, monkeypatch):
    model, meta = load_model(tiny[0])
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def fail(weights, name, metadata=None):
        Path(name).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ExportError, match="No space left") as caught:
        export.export_safetensors(model, path, meta)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_programmer_is_not_called_a_full_disk(tiny, tmp_path):
    model, _ = load_model(tiny[0])
    with pytest.raises(TypeError):
        export.export_safetensors(model, tmp_path / "m.safetensors", {"a set": {1}})


# --- transformers


def test_every_byte_has_a_letter_of_its_own():
    letters = export.byte_letters()
    assert sorted(letters) == list(range(256))
    assert len(set(letters.values())) == 256
    assert letters[ord("A")] == "A"
    assert letters[ord(" ")] == "\u0120"  # the sign that GPT-2's vocabulary is known by
    assert letters[ord("\n")] == "\u010a"
    assert not any(c.isspace() for c in letters.values())


def test_merges_are_recovered_in_their_order():
    merges = export.recover_merges()
    assert len(merges) == 50_000
    assert merges[0] == (b" ", b"t")  # GPT-2's first: Ġ t
    assert [a + b for a, b in merges] == [token_bytes(i) for i in range(256, 50_256)]


def test_transformers_computes_the_same_logits(opened, tiny):
    model, theirs, _, _ = opened
    ids = tiny[2].ids[:64][None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert theirs.config.n_positions == 64
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight


def test_transformers_goes_on_with_the_same_words(opened):
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
    check_same_ids(opened[2], (ROOT / "input.txt").read_text(encoding="utf-8"))


def test_same_ids_on_the_whole_of_tiny_shakespeare(opened, tiny_shakespeare_path):
    check_same_ids(opened[2], tiny_shakespeare_path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text", ["", " ", "  two\n\n\nlines \t", "naïve 🎭🌊 Ωμέγα 漢字", "it's we'll I'M x1y2"]
)
def test_same_ids_on_odd_texts(opened, text):
    check_same_ids(opened[2], text)


def test_the_slow_files_say_the_same_as_the_fast_one(opened, tmp_path):
    """vocab.json and merges.txt alone, as older readers take them."""
    from tokenizers import ByteLevelBPETokenizer

    folder = opened[3]
    slow = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    assert slow.encode(text).ids == encode(text)


def test_the_config_is_complete(opened):
    config = json.loads((opened[3] / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["activation_function"] == "gelu_new"
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 50256
    assert config["layer_norm_epsilon"] == opened[0].ln_f.eps


def test_another_vocabulary_is_refused(tmp_path):
    model = GPT(GPTConfig(vocab_size=61, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ExportError, match="vocabulary of 61"):
        export.export_transformers(model, tmp_path / "x", {})
    export.export_safetensors(model, tmp_path / "foreign.safetensors", {})
    with pytest.raises(
        CheckpointError, match="vocabulary has 61"
    ):  # the staged page would refuse it
        export.stage_space(tmp_path / "space", tmp_path / "foreign.safetensors", tmp_path / "x.txt")


# --- the staged Space


def test_a_staged_space_is_complete(tiny, tmp_path):
    checkpoint, source, text = tiny
    folder = tmp_path / "space"
    (ROOT / "shakespeare_gpt" / "__pycache__").mkdir(exist_ok=True)
    files = {file.path: file.bytes for file in export.stage_space(folder, checkpoint, source)}
    for name in ("app.py", "README.md", "requirements.txt"):
        assert (folder / name).read_bytes() == (ROOT / "space" / name).read_bytes()
    for name in ("model.py", "generate.py", "recite.py", "gpt2.tiktoken", "gpt2.tiktoken.LICENSE"):
        assert f"shakespeare_gpt/{name}" in files
    assert not any("__pycache__" in name or name.endswith((".pt", ".part")) for name in files)
    assert (folder / "text.txt").read_bytes() == text.text.encode("utf-8")
    assert "*.safetensors filter=lfs" in (folder / ".gitattributes").read_text(encoding="utf-8")
    _, meta = load_model(folder / "model.safetensors")
    assert meta["text_sha256"] == text.sha256
    assert sum(files.values()) < 10e6
    again = export.stage_space(folder, checkpoint, source)  # over itself
    assert {file.path: file.bytes for file in again} == files


def test_front_matter():
    """What Hugging Face reads of the README, and that its version of Gradio is the one tested here."""
    _, matter, _ = (ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in matter.strip().splitlines())
    assert fields["sdk"] == "gradio"
    assert fields["app_file"] == "app.py"
    assert len(fields["short_description"]) <= 60
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={fields['sdk_version']}\n" in pins
    assert {"title", "emoji", "colorFrom", "colorTo", "python_version"} <= set(fields)


def test_nobodys_files_are_mixed_up(tiny, tmp_path):
    (tmp_path / "thesis.doc").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"thesis\.doc.*empty folder"):
        export.stage_space(tmp_path, tiny[0], tiny[1])
    with pytest.raises(ExportError, match=r"thesis\.doc"):
        export.export_transformers(load_model(tiny[0])[0], tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    with pytest.raises(ExportError, match="is a file"):
        export.stage_space(tmp_path / "thesis.doc", tiny[0], tiny[1])


def test_the_wrong_text_is_refused(tiny, tmp_path):
    with pytest.raises(ExportError, match="learnt another text"):
        export.stage_space(tmp_path / "s", tiny[0], "input")
    with pytest.raises(ExportError, match=r"called 'tiny'.*--text"):
        export.stage_space(tmp_path / "s", tiny[0])
    with pytest.raises(ExportError, match="learnt another text"):
        export.stage_space(tmp_path / "s", tiny[0], load_text("input"))
    assert not (tmp_path / "s").exists()


def test_named_weights_come_with_their_own_text(tiny, monkeypatch, tmp_path):
    """SHAKESPEARE_GPT_WEIGHTS paired weights with whatever text had the same name."""
    checkpoint, source, text = tiny
    monkeypatch.setenv("SHAKESPEARE_GPT_WEIGHTS", str(checkpoint))
    monkeypatch.setenv("SHAKESPEARE_GPT_TEXT", str(source))
    assert plots.trained_model()[1].sha256 == text.sha256
    other = tmp_path / "tiny.txt"
    other.write_text("Another text of the same name.\n" * 40, encoding="utf-8")
    monkeypatch.setenv("SHAKESPEARE_GPT_TEXT", str(other))
    with pytest.raises(export.ExportError, match="learnt another text"):
        plots.trained_model()


@pytest.mark.parametrize("with_sha256", [True, False])
def test_a_file_of_weights_does_not_choose_what_is_read(tmp_path, monkeypatch, with_sha256):
    """A foreign file named a private one as its text, and the Space would have published it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere" / "secret.txt"
    secret.write_text("A secret.\n" * 30, encoding="utf-8")
    (tmp_path / "own.txt").write_text("My own text.\n" * 30, encoding="utf-8")
    told = {}
    if with_sha256:
        told["text_sha256"] = load_text(secret, context=1).sha256
    for name in (str(secret), str(secret.with_suffix("")), "elsewhere/secret", "~/secret", ["x"]):
        with pytest.raises(ExportError, match="name its file with --text"):
            export.learnt_text({"text_name": name, **told})
    for sha256 in (told, {"text_sha256": None}):  # without a SHA-256, or with that of another text
        with pytest.raises(ExportError):
            export.learnt_text({"text_name": "own", **sha256})
    sha256 = load_text("own.txt", context=1).sha256
    assert export.learnt_text({"text_name": "own", "text_sha256": sha256}).name == "own"


def test_a_text_is_not_overwritten_by_weights(tiny, tmp_path, capsys):
    """--safetensors with the text's own name replaced the text."""
    poem = tmp_path / "poem.txt"
    poem.write_text("My poem.", encoding="utf-8")
    assert export.main(["--weights", str(tiny[0]), "--safetensors", str(poem)]) == 1
    assert poem.read_text(encoding="utf-8") == "My poem."
    assert "end in .safetensors" in capsys.readouterr().err


def test_interrupted_is_no_traceback(tiny, monkeypatch):
    """Ctrl-C while half a gigabyte is written ended in a page of Python."""

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "load_model", interrupt)
    assert export.main(["--weights", str(tiny[0]), "--stage", "x"]) == 130


def test_the_text_of_a_preset_is_found():
    from shakespeare_gpt.presets import get_preset

    text = get_preset("smoke").load_text()
    meta = {"preset": "smoke", "text_name": "input", "text_sha256": text.sha256}
    assert export.learnt_text(meta).text == text.text
    assert export.learnt_text(meta, "input").text == text.text


# --- the command line and the upload


def test_the_command_line_stages_and_lists(tiny, tmp_path, monkeypatch, capsys, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.pt").write_bytes(tiny[0].read_bytes())
    arguments = ["--push", "ada/play", "--dry-run", "--text", str(tiny[1])]
    assert export.main(arguments) == 0
    output = capsys.readouterr().out
    assert "model.safetensors" in output
    assert "Nothing was uploaded" in output
    assert (tmp_path / "build" / "space" / "app.py").is_file()
    for line in output.splitlines()[1:-2]:
        name, size = line.rsplit("  ", 1)
        assert (
            export.size_text((tmp_path / "build/space" / name.strip()).stat().st_size)
            == size.strip()
        )


def test_the_command_line_exports(tiny, tmp_path, capsys):
    weights, folder = tmp_path / "w.safetensors", tmp_path / "hf"
    arguments = ["--checkpoint", str(tiny[0]), "--safetensors", str(weights)]
    assert export.main([*arguments, "--transformers", str(folder)]) == 0
    assert load_model(weights)[1]["text_name"] == "tiny"
    assert (folder / "tokenizer.json").is_file()
    assert "tokenizer.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "x"], "There is no checkpoint in checkpoints/"),
        (["--stage", "x", "--checkpoint", "none.pt"], "There is no checkpoint none.pt"),
        (["--push", "nobody", "--checkpoint", "none.pt"], "USER/NAME"),
        (["--push", "ada/my--space", "--checkpoint", "none.pt"], "USER/NAME"),
        (["--push", "ada/a/b", "--checkpoint", "none.pt"], "USER/NAME"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_is_for_a_person():
    result = subprocess.run(
        [sys.executable, "-m", "shakespeare_gpt.export", "--help"],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    for word in ("--stage", "--push", "--dry-run", "--transformers", "--safetensors", "Example"):
        assert word in result.stdout


@pytest.fixture
def staged(tiny, tmp_path):
    export.stage_space(tmp_path / "space", tiny[0], tiny[1])
    return tmp_path / "space"


def test_push_needs_a_token_and_says_so(staged, monkeypatch, no_network):
    monkeypatch.setattr("huggingface_hub.utils.get_token", lambda: None)
    with pytest.raises(ExportError, match=r"no Hugging Face token.*settings/tokens"):
        export.push(staged, "ada/play")
    assert export.push(staged, "ada/play", dry_run=True).endswith("/spaces/ada/play")


def test_push_without_a_network_is_one_line(staged, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # meet the real error
    with pytest.raises(ExportError, match="could not be reached") as caught:
        export.push(staged, "ada/play", token="hf_x")
    assert "\n" not in str(caught.value)


def test_push_wants_a_staged_folder(tmp_path):
    with pytest.raises(ExportError, match="no staged Space"):
        export.push(tmp_path, "ada/play", token="hf_x")


@pytest.mark.parametrize("room", [True, False])
def test_push_with_a_free_account(staged, monkeypatch, room):
    """Since July 2026 a free account gets no Gradio Space on a CPU, and two on ZeroGPU."""
    from huggingface_hub.errors import HfHubHTTPError

    asked = []

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, **options):
            asked.append(options.get("space_hardware"))
            if not room or not options.get("space_hardware"):
                raise HfHubHTTPError(
                    "402", response=SimpleNamespace(status_code=402, headers={}, request=None),
                    server_message="Subscribe\nto PRO",
                )  # fmt: skip

        def upload_folder(self, **options):
            asked.append("uploaded")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    if room:
        export.push(staged, "ada/play", token="t")
        assert asked == [None, "zero-a10g", "uploaded"]
    else:
        with pytest.raises(ExportError, match=r"\(402: Subscribe to PRO\).*app\.py"):
            export.push(staged, "ada/play", token="t")
        assert asked == [None, "zero-a10g"]


def test_push_makes_a_gradio_space_and_uploads(staged, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert export.push(staged, "ada/play", token="t") == "https://huggingface.co/spaces/ada/play"
    (_, token), (_, name, made), (_, sent) = calls
    assert (token, name) == ("t", "ada/play")
    assert made["repo_type"] == sent["repo_type"] == "space"
    assert made["space_sdk"] == "gradio"
    assert made["exist_ok"] is True
    assert Path(sent["folder_path"]) == staged
    # What the hub's own filter leaves of a folder that has been run is what the dry run lists.
    from huggingface_hub.utils import filter_repo_objects

    (staged / "shakespeare_gpt" / "__pycache__").mkdir()
    (staged / "shakespeare_gpt" / "__pycache__" / "x.pyc").write_bytes(b"x")
    for folder in (staged, staged / "shakespeare_gpt"):  # of macOS
        (folder / ".DS_Store").write_bytes(b"x")
    everything = [p.relative_to(staged).as_posix() for p in staged.rglob("*") if p.is_file()]
    kept = filter_repo_objects(everything, ignore_patterns=sent["ignore_patterns"])
    assert sorted(kept) == [file.path for file in export.list_folder(staged)]
