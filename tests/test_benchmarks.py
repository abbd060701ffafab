"""The benchmarks run, on tiny settings and without any word about their times."""

import csv
import itertools
from pathlib import Path

import gradio as gr
import pytest

from benchmarks import recipes, sampling, space_load, train_step

NUMBERS = itertools.count()


def here(function, argument):
    """Stands in for a new process, which takes seconds to import PyTorch."""
    return function(argument)


def test_train_step_prints_a_row_for_each_kind_of_step(monkeypatch, capsys):
    """All kinds of steps train, and each gets its row and its share of the matrix rate."""
    monkeypatch.setattr(train_step, "in_new_process", here)
    assert train_step.main(["--preset", "smoke", "--quick"]) == 0
    printed = capsys.readouterr().out
    for row in (train_step.THEIRS, train_step.OURS, train_step.RECIPE):
        assert f"| {row} | 2 | 1 | " in printed


def test_train_step_shows_what_it_has_when_it_is_interrupted(monkeypatch, capsys):
    """Minutes of measuring are not lost: the rows measured so far are printed."""
    speeds = iter([100.0, 150.0])

    def measured(function, job):
        if (speed := next(speeds, None)) is None:
            raise KeyboardInterrupt
        return speed

    monkeypatch.setattr(train_step, "in_new_process", measured)
    assert train_step.main(["--preset", "smoke", "--batch-size", "4", "--steps", "1"]) == 130
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| transformers, AdamW")]
    assert rows[0].startswith(f"| {train_step.THEIRS} | 4 | 1 | 100 | 1.00 |")


def test_train_step_reports_a_process_that_was_killed():
    """A measurement that the system ended for its memory is an error in one line, not an endless wait."""
    with pytest.raises(RuntimeError, match="out of memory"):
        train_step.in_new_process(exit, 1)


def test_flops_of_a_token():
    """GPT-2 small: six operations for each of its 124M matrix weights, and attention."""
    small = train_step.get_preset("gpt2").model
    assert train_step.flops_per_token(small) == pytest.approx(6 * 123.5e6 + 14.2e6, rel=1e-3)


def test_sampling_measures_every_way(tiny, capsys):
    """Passages that the weights know are written in all ways, and the draft changes no token."""
    options = [
        "--weights",
        str(tiny.checkpoint),
        "--text",
        str(tiny.source),
        "--tokens",
        "12",
        "--turns",
        "1",
    ]
    assert sampling.main([*options, "--kinds", "fp32", "bf16", "--prompts", "3"]) == 0
    printed = capsys.readouterr().out
    for way in (
        "uncached, fp32",
        "cached, bf16",
        "cached with a draft, fp32",
        "transformers' generate, fp32",
    ):
        assert f"| {way} | " in printed
    assert "fp32: 3 of 3 prompts give the same 12 tokens" in printed


def test_sampling_says_what_is_wrong_in_one_line(capsys):
    """transformers has no sliding window, so a benchmark that asks for more ends before it measures."""
    assert sampling.main(["--preset", "smoke"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("at most 32 tokens: ask for fewer")


def test_recipes_writes_one_row_for_each_run(tmp_path, capsys):
    """A run is named by what differs from its preset; a second call measures only what is new."""
    options = ["--quick", "--out", str(tmp_path)]
    for _ in range(2):
        assert recipes.main(["gpt2,seed=3,epochs=1", *options, "--to-the-end"]) == 0
    assert recipes.main(["gpt2,muon_lr=0.5,adam_lr=0.9", *options]) == 0
    rows = list(csv.DictReader((tmp_path / "recipes.csv").open(newline="", encoding="utf-8")))
    assert [row["run"] for row in rows] == [
        "smoke,seed=3,epochs=1 to the end",
        "smoke,muon_lr=0.5,adam_lr=0.9",
    ]
    first, exploded = rows
    assert (first["seed"], first["muon_lr"], first["text"]) == ("3", "0.02", "input-page")
    assert 0 < float(first["whole_text"]) < 11 and int(first["tokens"]) == int(first["steps"]) * 4 * 32
    assert exploded["note"].startswith("The loss exploded") and not exploded["whole_text"]
    assert not list(tmp_path.glob("*.pt"))
    assert "which the table holds already" in capsys.readouterr().err


def test_recipes_knows_the_table_of_the_search():
    """New rows can be added to the table in logs/, and a setting that does not exist is refused."""
    with open(Path(__file__).parent.parent / "logs" / "recipes.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == recipes.COLUMNS
    with pytest.raises(ValueError, match="speed=3"):
        recipes.parse_run("gpt2,speed=3")
    assert recipes.parse_run("gpt2,share_unseen=False")[1].share_unseen is False


@pytest.fixture
def space(request):
    """A page with the Space's two endpoints, which writes as its parameter says."""
    write = request.param

    def generate(prompt: str, length: int, temperature: float, top_k: int, top_p: float, seed: int) -> dict:
        if len(prompt) > 2000:
            raise gr.Error("This prompt has too many characters.", print_exception=False)
        return {"text": write(seed)}

    def recite(line: int, tokens: int) -> dict:
        return {"recited": str(line)}

    with gr.Blocks(analytics_enabled=False) as page:
        gr.api(generate, api_name="generate")
        gr.api(recite, api_name="recite")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield address
    page.close()


@pytest.mark.parametrize("space", [str], indirect=True, ids=["sound"])
def test_space_load_counts_the_answers(space, capsys):
    """Every request of every client is answered with its own text."""
    assert space_load.main([space, "--clients", "2", "--seconds", "1"]) == 0
    assert "| answered | " in capsys.readouterr().out


@pytest.mark.parametrize("space", [lambda seed: str(next(NUMBERS))], indirect=True, ids=["mixed"])
def test_space_load_finds_texts_that_were_mixed(space, capsys):
    """The same seed must give the same text; a page that does not do so fails."""
    assert space_load.main([space, "--clients", "2", "--seconds", "1"]) == 1
    assert "| wrong answer | " in capsys.readouterr().out
