"""How a notebook begins: where it works, what it prints, and a model that knows its text."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from conftest import REPOSITORY

from shakespeare_gpt.data import OURS
from shakespeare_gpt.model import GPTConfig
from shakespeare_gpt.notebook import setup, trained_model
from shakespeare_gpt.presets import PRESETS, Preset, TrainConfig
from shakespeare_gpt.runs.run import start
from shakespeare_gpt.runs.weights import load_checkpoint

QUICK = Preset(
    name="quick",
    about="learns nearly nothing at once",
    model=GPTConfig(n_layer=1, n_head=1, n_embd=16, n_positions=32, window=16),
    train=TrainConfig(batch_size=4, min_steps=20, adam_lr=1e-2, precision="fp32", target=9.5),
    text="input-page",
)


def test_setup_says_what_it_runs_on(monkeypatch, capsys):
    """A reader on the wrong device or preset notices it after an hour."""
    kept = []
    monkeypatch.setattr("shakespeare_gpt.notebook.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setenv("SHAKESPEARE_GPT_PRESET", "smoke")
    monkeypatch.chdir(REPOSITORY / "notebooks")
    with matplotlib.rc_context():
        assert setup() is PRESETS["smoke"]
    assert Path.cwd() == REPOSITORY  # so that the checkpoints are those of the command line
    assert kept == [True]  # the kernel's process is the notebook's own
    said = capsys.readouterr().out
    assert "torch" in said and "precision " in said and ", because " in said
    assert f"preset smoke: {PRESETS['smoke'].about}" in said
    monkeypatch.setenv("SHAKESPEARE_GPT_TEXT", "mine.txt")
    with matplotlib.rc_context():
        setup()
    assert "preset smoke: on mine.txt" in capsys.readouterr().out


def test_a_model_is_trained_on_the_spot_and_then_loaded(tmp_path, monkeypatch, capsys):
    """A reader who skipped notebook 3, or interrupted it, needs weights in 4 and 5 all the same."""
    monkeypatch.chdir(tmp_path)
    text = QUICK.load_text()
    with closing(start(QUICK, text, device="cpu")) as steps:
        next(steps)
    path = QUICK.checkpoint_path(text)
    assert not load_checkpoint(path)["meta"]["finished"]
    model, text_again, meta = trained_model(QUICK, "cpu")
    assert text_again.sha256 == text.sha256 == meta["text_sha256"] and meta["finished"]
    assert model.config == QUICK.model
    assert f"reached at step {meta['steps']}" in capsys.readouterr().out
    written = path.stat().st_mtime_ns
    again = trained_model(QUICK, "cpu")
    assert path.stat().st_mtime_ns == written and capsys.readouterr().out == ""
    assert again[2] == meta and again[0].wte.weight.equal(model.wte.weight)


def test_the_weights_are_those_of_the_presets_seed(tmp_path, monkeypatch):
    """A preset with seed 1 was trained, and then seed 0's file was looked for."""
    monkeypatch.chdir(tmp_path)
    seeded = replace(QUICK, train=replace(QUICK.train, seed=1))
    assert trained_model(seeded, "cpu")[2]["seed"] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_a_text_that_exists(name):
    """A preset with a text of its author's own machine."""
    assert PRESETS[name].text in OURS
