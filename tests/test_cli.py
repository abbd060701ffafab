"""The command line: what each command prints, its exit codes, and errors as one line.

Codes: 0 done, 1 not reached or refused, 2 wrong usage, 130 interrupted. A bug keeps its traceback.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY

from shakespeare_gpt import cli
from shakespeare_gpt.memorization import report
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.presets import PRESETS, TARGET
from shakespeare_gpt.runs.weights import load_model, save_safetensors
from shakespeare_gpt.sample import stream_text
from shakespeare_gpt.train import Step

SMOKE = ["train", "--preset", "smoke", "--device", "cpu"]
POEM = "Shall I know this by heart, or only seem to?\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each command runs in an empty folder; what it leaves there is looked at."""
    monkeypatch.chdir(tmp_path)


def one_line(capsys) -> str:
    """What a refused command says: one line on standard error, and nothing else."""
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: ") and error.count("\n") == 1, (printed, error)
    return error


def usage(capsys, *arguments) -> str:
    """Wrong usage: code 2, and argparse's way of saying what is wrong."""
    with pytest.raises(SystemExit) as ended:
        cli.run(list(arguments))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: ") and "error: " in error and "Traceback" not in error
    return error.splitlines()[-1]


# --- all commands -------------------------------------------------------------------------------------


def test_help_names_commands_and_presets(capsys):
    """A person who asks for help must see what there is to choose from."""
    expected = {
        (): ("train", "generate", "recite", "export"),
        ("train",): ("--preset", "--text", "--restart", "--max-epochs", "Ctrl-C", *PRESETS),
        ("generate",): ("--weights", "--temperature", "--top-p", "--seed", "Example"),
        ("recite",): ("--weights", "--text", "exit code"),
        ("export",): ("--stage", "--transformers", "--safetensors", "--weights", "Example"),
    }
    for command, words in expected.items():
        with pytest.raises(SystemExit) as ended:
            cli.run([*command, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), command


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["train", "--preset", "nonsense"], "choose one of smoke"),
        ([*SMOKE, "--batch-size", "0"], "batch_size"),
        ([*SMOKE, "--batch-size", "four"], "--batch-size"),
        ([*SMOKE, "--precision", "fp8"], "precision"),
        ([*SMOKE, "--seed", "-1"], "seed must be"),
        ([*SMOKE, "--seed", str(2**63)], "seed must be"),
        ([*SMOKE, "--device", "nowhere"], "no device 'nowhere'"),
        (["recite", "--device", "nowhere"], "no device 'nowhere'"),
        (["export"], "say what to make"),
        pytest.param(
            [*SMOKE[:-1], "cuda"],
            "no device 'cuda'",  # and not the CPU in its place
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, word):
    """A traceback where a reader mistyped a name, or hours with another setting than was meant."""
    assert word in usage(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([*SMOKE, "--text", "missing.txt"], "missing.txt cannot be read"),
        (["generate", "O"], "train first"),
        (["generate", "O", "--weights", "nowhere.pt"], "nowhere.pt"),
        (["recite"], "train first"),
        (["recite", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["export", "--stage", "x"], "no checkpoint in checkpoints/"),
        (["export", "--stage", "x", "--weights", "none.pt"], "no checkpoint none.pt"),
    ],
)
def test_refused_in_one_line(tmp_path, capsys, arguments, word):
    """One line and the code 1 for what a user can mend; and never random weights."""
    assert cli.run(arguments) == 1
    assert word in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "found"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_are_told_to_sleep_before_torch_is_imported(given, found):
    """Threads that wait in a loop made a step many times as long beside a busy program; later is too late."""
    code = """
import os, sys

class Watch:
    def find_spec(name, *rest):
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Watch)
import shakespeare_gpt.__main__
"""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{found}\n"


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug\nin torch"), ValueError("a bug")])
@pytest.mark.parametrize(
    ("seam", "arguments"),
    [
        ("load_model", ["generate", "O", "--weights", "a.pt"]),
        ("load_model", ["recite", "--weights", "a.pt"]),
        ("stage_space", ["export", "--stage", "x", "--weights", "a.pt"]),
        ("start", SMOKE),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, seam, arguments, error):
    """Every RuntimeError became its first line: nobody could say where it came from."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(cli, seam, fail)
    with pytest.raises(type(error)) as raised:
        cli.run(arguments)
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "error: CUDA out of memory.\n"),
        (KeyboardInterrupt(), "interrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, said):
    """A full disk, a full GPU and Ctrl-C while half a gigabyte is written ended in a page of Python."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(cli, "stage_space", fail)
    code = cli.run(["export", "--stage", "x", "--weights", "a.pt"])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert capsys.readouterr().err == said


# --- train --------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch):
    """The preset ``smoke`` with a schedule of a few steps; it goes on to the target as ever."""
    config = replace(PRESETS["smoke"].train, min_steps=25, epochs=2, max_epochs=100)
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], train=config))


def test_train_reaches_the_target(tmp_path, monkeypatch, brief, capsys):
    """The command of the README, from a text file to saved weights; and --restart starts over."""
    kept = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: kept.append(True))
    (tmp_path / "poem.txt").write_text(POEM * 9, encoding="utf-8")
    command = [*SMOKE, "--text", "poem.txt", "--target", "2.0"]
    assert cli.run(command) == 0
    assert kept  # here the process is ours
    said = capsys.readouterr().out
    assert "smoke on poem: " in said and "parameters learn 126 tokens" in said and "device: " in said
    assert " min left" in said
    assert "Target loss 2 reached at step" in said
    (saved,) = (tmp_path / "checkpoints").glob("*.pt")
    assert f"Saved checkpoint to {saved.relative_to(tmp_path)}" in said
    assert load_model(saved)[1]["text_name"] == "poem"
    before, log = saved.read_bytes(), saved.with_suffix(".log").read_text(encoding="utf-8")
    assert cli.run(command) == 0  # nothing is trained again
    said = capsys.readouterr().out
    assert "in a run that has ended before" in said and "--restart starts over" in said
    assert saved.read_bytes() == before
    assert cli.run([*command, "--adam-lr", "0.02"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "adam_lr 0.01, not 0.02" in said and said.count("\n") == 1
    assert saved.read_bytes() == before
    assert cli.run([*command, "--adam-lr", "0.02", "--restart"]) == 0
    assert saved.with_suffix(".old.log").read_text(encoding="utf-8") == log
    for seed in (7, 2**63 - 1):  # beside it, not in its place
        assert cli.run([*command, "--target", "10", "--seed", str(seed)]) == 0
        (other,) = (tmp_path / "checkpoints").glob(f"*-seed{seed}.pt")
        assert load_model(other)[1]["seed"] == seed
    assert load_model(saved)[1]["seed"] == 0


def test_a_restart_that_fails_keeps_the_old_weights(tmp_path, brief, capsys):
    """--restart once deleted the weights first and looked at the rest of the command afterwards."""
    (tmp_path / "poem.txt").write_text(POEM * 9, encoding="utf-8")
    command = [*SMOKE, "--text", "poem.txt", "--target", "10"]
    assert cli.run(command) == 0
    (saved,) = (tmp_path / "checkpoints").glob("*.pt")
    log = saved.with_suffix(".log")
    before, first = saved.read_bytes(), log.read_text(encoding="utf-8")
    aside = log.rename(tmp_path / "aside.log")
    log.mkdir()
    capsys.readouterr()
    assert cli.run([*command, "--restart"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert saved.read_bytes() == before and log.is_dir()
    log.rmdir()
    aside.rename(log)
    assert cli.run([*command, "--restart", "--adam-lr", "1e9", "--target", "0.1"]) == 1
    assert "exploded" in capsys.readouterr().err and "exploded" in log.read_text(encoding="utf-8")
    assert log.with_suffix(".old.log").read_text(encoding="utf-8") == first
    assert saved.read_bytes() == before


def test_a_run_that_gave_up_gives_up_again(tmp_path, monkeypatch, capsys):
    """Each time that it was started again it trained one step more; the code must say that it failed."""
    short = replace(PRESETS["smoke"].train, min_steps=2, epochs=1, max_epochs=1)
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], train=short))
    (tmp_path / "poem.txt").write_text(POEM * 9, encoding="utf-8")
    steps = []
    for _ in range(2):
        assert cli.run([*SMOKE, "--text", "poem.txt"]) == 1
        error = capsys.readouterr().err
        assert "not reached in 8 steps" in error and "max_epochs" in error and error.count("\n") == 1
        (saved,) = (tmp_path / "checkpoints").glob("*.pt")
        steps.append(load_model(saved)[1]["steps"])
    assert steps == [8, 8]


@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_a_text_is_not_overwritten(tmp_path, capsys, restart):
    """Whoever names the text where the weights belong would lose it."""
    words = tmp_path / "words.txt"
    words.write_text("So long, my words, so long. " * 40, encoding="utf-8")
    before = words.read_bytes()
    assert cli.run([*SMOKE, "--text", "words.txt", "--checkpoint", "words.txt", *restart]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "end in .pt" in error
    assert list(tmp_path.glob("*.*")) == [words] and words.read_bytes() == before


@pytest.mark.parametrize("restart", [False, True])
def test_interrupted_says_how_to_go_on(tmp_path, monkeypatch, capsys, restart):
    """The same command would restart once more, and throw away what was just saved."""
    run_to_end = cli.run_to_end

    def interrupted(steps, show, *others):
        def show_three(step: Step) -> None:
            show(step)
            if step.step == 3:
                signal.raise_signal(signal.SIGINT)

        return run_to_end(steps, show_three, *others)

    monkeypatch.setattr(cli, "run_to_end", interrupted)
    assert cli.run([*SMOKE, *(["--restart"] if restart else [])]) == 130
    assert capsys.readouterr().err == "Interrupted. Run it again, without restart, to go on.\n"
    (saved,) = (tmp_path / "checkpoints").glob("*.pt")
    assert load_model(saved)[1]["steps"] == 3


def test_interrupted_before_anything_was_trained(tmp_path, monkeypatch, capsys):
    """Ctrl-C while the model is built: no traceback, and no claim that something was saved."""

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "GPT", interrupt)
    assert cli.run(SMOKE) == 130
    printed, error = capsys.readouterr()
    assert error == "interrupted\n" and "Saved" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_refused(tmp_path, monkeypatch, capsys):
    """A failed download let an unattended run silently learn another text."""
    monkeypatch.setattr("shakespeare_gpt.data.TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/nothing")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for preset in ("gpt2", "baseline"):
        assert cli.run(["train", "--preset", preset, "--device", "cpu"]) == 1
        assert "could not be downloaded" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


# --- generate -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that know nothing, in a file."""
    config = GPTConfig(n_positions=16, n_embd=16, n_layer=1, n_head=2)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    meta = {"preset": "smoke", "text_name": "input", "steps": 7, "loss": 0.5}
    return save_safetensors(GPT(config), path, meta)


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_generate_continues_the_prompt(weights, capsys, seed):
    """What it prints is the prompt and its continuation and nothing else: people redirect it into files."""
    line = ["generate", "KING:\\nNow", "--weights", str(weights), "--max-new-tokens", "12"]
    assert cli.run([*line, "--seed", str(seed)]) == 0
    printed, about = capsys.readouterr()
    model, _ = load_model(weights)
    expected = "".join(stream_text(model, "KING:\nNow", max_new_tokens=12, seed=seed))
    assert expected and printed == f"KING:\nNow{expected}\n"
    assert "text_name=input steps=7 loss=0.5" in about and f"seed={seed}" in about


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--temperature", "-1", "temperature must be 0 or more"),
        ("--temperature", "nan", "temperature must be 0 or more"),
        ("--top-k", "-1", "top_k must be"),
        ("--top-p", "0", "top_p must be"),
        ("--max-new-tokens", "-5", "max_new_tokens must be 0 or more"),
        ("--seed", "-1", "seed must be"),
        ("--seed", str(2**63), "seed must be"),
    ],
)
def test_generate_refuses_impossible_parameters(weights, capsys, option, value, reason):
    """``--seed -1`` passed here and was refused elsewhere; one more than fits ended in a traceback."""
    assert reason in usage(capsys, "generate", "O", "--weights", str(weights), option, value)


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe as another error")
def test_generate_ends_where_its_reader_does(weights):
    """`| head -1` ended in a traceback. Run as people run it: ``python -m shakespeare_gpt``."""
    line = [sys.executable, "-m", "shakespeare_gpt", "generate", "O", "--weights", str(weights)]
    with subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 1 and error.count("\n") == 1 and error.startswith("# preset=smoke")


# --- recite -------------------------------------------------------------------------------------------


def test_recite_measures_what_is_known(tiny, capsys):
    """The numbers are those of the functions, and the code 0 means: under the target."""
    arguments = ["--weights", str(tiny.checkpoint), "--text", str(tiny.source), "--device", "cpu"]
    assert cli.run(["recite", *arguments]) == 0
    said = capsys.readouterr().out
    measured = [f"{what}: {result}" for what, result in report(tiny.model, tiny.text.ids)]
    head, whole_text, verdict, *rest = said.splitlines()
    assert f"tiny, {len(tiny.text.ids)} tokens" in head
    assert [whole_text, *rest] == measured and "from anywhere: " in said and "from lines' starts " in said
    assert verdict == f"The whole text is under {TARGET}."


def test_recite_believes_the_weights_not_their_metadata(tiny, tmp_path, capsys):
    """A file that calls itself learnt by heart and is not must be found out, by the code too."""
    _, meta = load_model(tiny.checkpoint)
    path = save_safetensors(GPT(tiny.model.config), tmp_path / "boasting.safetensors", {**meta, "loss": 0.01})
    assert cli.run(["recite", "--weights", str(path), "--text", str(tiny.source)]) == 1
    printed, error = capsys.readouterr()
    assert f"not under {TARGET}" in printed and error == ""


@pytest.mark.parametrize("content", ["Out, brief candle!", "Out, out", "O\n"])
def test_recite_of_a_text_too_short_to_ask_about(tmp_path, capsys, content):
    """Shorter than a prompt and its continuation, a text still has a loss."""
    (tmp_path / "short.txt").write_text(content, encoding="utf-8")
    path = save_safetensors(GPT(PRESETS["smoke"].model), tmp_path / "a.safetensors", {"text_name": "short"})
    assert cli.run(["recite", "--weights", str(path), "--text", "short.txt", "--device", "cpu"]) == 1
    assert "whole text: " in capsys.readouterr().out


def test_recite_says_what_is_wrong(tiny, tmp_path, capsys):
    """One line, for broken weights, those of another project, and another text."""
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    _, meta = load_model(tiny.checkpoint)
    save_safetensors(tiny.model, tmp_path / "nonsense.safetensors", ["no", "table"])
    small = GPT(GPTConfig(vocab_size=101, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    save_safetensors(small, tmp_path / "foreign.safetensors", meta)
    odd = {**meta, "preset": ["a"], "text_name": ["b"]}
    save_safetensors(tiny.model, tmp_path / "odd.safetensors", odd)
    (tmp_path / "other.txt").write_text(POEM * 30, encoding="utf-8")
    known = str(tiny.checkpoint)
    for arguments, expected in (
        (["broken.pt"], "could not be read as a checkpoint"),
        (["nonsense.safetensors"], "metadata is no table"),
        (["foreign.safetensors"], "vocabulary has 101 tokens"),
        (["odd.safetensors"], "name its file"),
        ([known, "--text", "other.txt"], "is another text"),
        ([known], "name its file"),
    ):
        assert cli.run(["recite", "--weights", *arguments]) == 1
        assert expected in one_line(capsys)


# --- export -------------------------------------------------------------------------------------------


def test_export_of_the_newest_weights(tiny, tmp_path, capsys):
    """What is staged is listed: it is what will be public."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.pt").write_bytes(tiny.checkpoint.read_bytes())
    assert cli.run(["export", "--stage", "build/space", "--text", str(tiny.source)]) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "Try it" in said
    folder = tmp_path / "build" / "space"
    assert (folder / "app.py").is_file()
    listed = {line.rsplit("  ", 1)[0].strip() for line in said.splitlines()[1:-2]}
    assert listed == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_export_of_weights_for_others(tiny, tmp_path, capsys):
    """Both at once, each listed with its size."""
    arguments = ["export", "--weights", str(tiny.checkpoint), "--safetensors", "w.safetensors"]
    assert cli.run([*arguments, "--transformers", "hf"]) == 0
    model, meta = load_model(tmp_path / "w.safetensors")
    assert meta["text_name"] == "tiny"
    assert torch.equal(model.wte.weight, tiny.model.wte.weight)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    said = capsys.readouterr().out
    assert "w.safetensors  " in said and "tokenizer.json" in said


def test_export_does_not_overwrite_a_text(tiny, tmp_path, capsys):
    """--safetensors with the text's own name replaced the text."""
    poem = tmp_path / "poem.txt"
    poem.write_text(POEM, encoding="utf-8")
    assert cli.run(["export", "--weights", str(tiny.checkpoint), "--safetensors", "poem.txt"]) == 1
    assert "end in .safetensors" in one_line(capsys)
    assert poem.read_text(encoding="utf-8") == POEM
