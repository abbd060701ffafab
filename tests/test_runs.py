"""What stands around the loop: exact resumption, the log, signals, several processes."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import REPOSITORY
from small_run import CONFIG, IDS, RECIPE, assert_same_run, changed, new_model, one_line, play_process, run

from shakespeare_gpt.memorization import report, score
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import TARGET, get_preset
from shakespeare_gpt.runs.log import logged
from shakespeare_gpt.runs.run import resumable, run_to_end, start
from shakespeare_gpt.runs.weights import CheckpointError, load_checkpoint, load_model, save_checkpoint
from shakespeare_gpt.train import TargetNotReached, TrainingError, train
from tools.loss_curve import read_log


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupted: what every interrupted one must equal."""
    return run()


# --- the whole way ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset as a notebook or the command line runs it: (folder, preset, text, steps)."""
    folder, preset = tmp_path_factory.mktemp("smoke"), get_preset("smoke")
    text = preset.load_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, preset, text, list(start(preset, text, device="cpu"))


def test_smoke_learns_the_first_lines_by_heart(smoke):
    """The claim of the project in small: the mean over the whole text, measured from the saved file."""
    folder, preset, text, steps = smoke
    model, meta = load_model(folder / preset.checkpoint_path(text))
    assert score(model, text.ids).loss < TARGET
    # The run measures in its own precision, bf16 on some processors.
    assert score(model, text.ids).loss == pytest.approx(meta["loss"], rel=0.02)
    assert steps[-1].done and steps[-1].progress == 1.0
    assert not any(step.done for step in steps[:-1])
    assert meta["preset"] == "smoke" and meta["text_name"] == "input-page"
    assert meta["text_sha256"] == text.sha256
    assert meta["steps"] == len(steps) == steps[-1].step
    assert meta["tokens"] == len(steps) * 4 * 32
    assert meta["epochs"] == pytest.approx(meta["tokens"] / len(text.ids), abs=1e-3)
    assert meta["parameters"] == model.num_parameters()
    assert (meta["seed"], meta["windows"]) == (0, "moving")
    assert meta["finished"] and meta["precision"] in ("fp32", "bf16")


def test_the_log_of_a_run(smoke):
    """``step | loss | best | lr | tokens/s`` every ten steps, under what ran, over what it knows."""
    folder, preset, text, steps = smoke
    checkpoint = preset.checkpoint_path(text)
    path = folder / checkpoint.with_suffix(".log")
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: lines.index("step | loss | best | lr | tokens/s")]
    assert all(line.startswith("# ") for line in head)
    names, numbers, losses = read_log(path)
    assert {"preset", "text", "commit", "settings", "versions", "device"} <= set(names)
    assert names["precision"] == steps[-1].state.precision
    assert names["preset"] == "smoke" and text.sha256 in names["text"]
    assert f"batch_size={preset.train.batch_size}" in names["settings"]
    last = steps[-1].step
    assert numbers == [*range(10, last, 10), last]
    assert losses == pytest.approx([steps[n - 1].loss for n in numbers], abs=1e-6)
    rows = [line.split(" | ") for line in lines if re.match(r"\d+ \| ", line)]
    for row, n in zip(rows, numbers, strict=True):
        assert float(row[2]) == pytest.approx(min(s.loss for s in steps[:n]), abs=1e-6)
        assert float(row[3]) == pytest.approx(steps[n - 1].lr, rel=1e-3)
    measured = [step for step in steps if step.text_loss is not None]
    assert sum("mean over the whole text" in line for line in lines) == len(measured) > 0
    assert sum("the first batch under the target" in line for line in lines) == 1
    end = lines.index(f"Target loss 0.099999 reached at step {last}")
    assert lines[end + 1] == f"Saved checkpoint to {checkpoint.as_posix()}"
    model, _ = load_model(folder / checkpoint)
    known = [f"# {what}: {result}" for what, result in itertools.islice(report(model, text.ids), 2)]
    assert lines[end + 2 : end + 4] == known
    assert all(
        re.match(r"# from (anywhere|lines' starts).* after \d+ tokens", line) for line in lines[end + 3 :]
    )
    assert len(lines) == end + 7


def test_a_finished_run_is_not_trained_again(smoke, monkeypatch):
    """Running the notebook again must load the result, and must not spoil the log of the run."""
    folder, preset, text, steps = smoke
    monkeypatch.chdir(folder)
    log = preset.checkpoint_path(text).with_suffix(".log")
    before = log.read_bytes()
    model = GPT(preset.model)
    (again,) = start(preset, text, model, device="cpu")
    expected = steps[-1]
    assert again.done and again.step == expected.step and again.text_loss == expected.text_loss
    assert (again.loss, again.lr, again.progress) == (expected.loss, expected.lr, 1.0)
    assert again.history.losses == expected.history.losses
    assert score(model, text.ids).loss < TARGET
    assert log.read_bytes() == before


def test_another_text_or_seed_gets_another_checkpoint(tmp_path):
    """One file name for two texts: the second run would be refused, or recite the first."""
    preset, names = get_preset("smoke"), set()
    for content in ("One fine line.\n" * 99, "One fine line!\n" * 99):
        (tmp_path / "poem.txt").write_text(content, encoding="utf-8")
        text = preset.load_text(tmp_path / "poem.txt")
        names |= {preset.checkpoint_path(text), preset.checkpoint_path(text, seed=7)}
    assert len(names) == 4


# --- exact resumption -------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[1], [37, 80], [71, 72, 73], "last but one"], ids=str)
def test_interrupted_equals_uninterrupted(tmp_path, whole, stops):
    """Momentum, schedule, order of the windows or evaluations lost at a resume: another run than before."""
    path = tmp_path / "a.pt"
    for stop in [whole[1].step - 1] if stops == "last but one" else stops:
        _, step = run(stop_after=stop, checkpoint=path)
        assert step.step == stop and load_checkpoint(path)["meta"]["steps"] == stop
    assert_same_run(run(checkpoint=path), whole)


@pytest.mark.parametrize(
    "settings, window, stops",
    [
        ({}, 8, [3, 4, 23, 24, 25]),  # before and after a batch of fixed windows
        ({"fixed_every": 2, "batch_size": 3}, 5, [8, 41]),  # within an epoch of either kind
        ({}, 0, [22]),
        ({"windows": "fixed"}, 8, [23]),
        ({"windows": "sequential"}, 8, [23]),
    ],
    ids=str,
)
def test_resuming_is_exact_for_every_order(tmp_path, settings, window, stops):
    """An order drawn from a generator whose state is not saved would differ after a resume."""
    config, path = changed(**settings, target=2.5), tmp_path / "a.pt"

    def model():
        return new_model(replace(CONFIG, window=window))

    for stop in stops:
        run(config, stop_after=stop, checkpoint=path, model=model())
    assert_same_run(run(config, checkpoint=path, model=model()), run(config, model=model()))


def test_killed_between_two_saves(tmp_path, whole):
    """SIGKILL gives no chance to save: the run goes on from its last save, to the same end."""
    path, copy = tmp_path / "a.pt", tmp_path / "b.pt"
    with closing(resumable(new_model(), IDS, RECIPE, path, device="cpu", save_every=0.0)) as steps:
        for step in steps:
            if step.step == 20:
                copy.write_bytes(path.read_bytes())
                break
    # Weights are saved when the next step has proved them.
    assert load_checkpoint(copy)["meta"]["steps"] == 19
    assert_same_run(run(checkpoint=copy), whole)


def test_saving_changes_nothing(tmp_path, whole):
    """A save that draws random numbers or touches the weights would make runs depend on the clock."""
    assert_same_run(run(checkpoint=tmp_path / "a.pt", save_every=0.0), whole)


def test_what_a_caller_noted_on_the_way_is_kept(tmp_path):
    """Notebook 3 shows what the model said on the way: a run made in two parts must not lose the first."""
    path, config = tmp_path / "a.pt", changed(target=3.0)

    def noted(stop=None):
        with closing(resumable(new_model(), IDS, config, path, device="cpu")) as steps:
            for step in steps:
                if step.state is not None:
                    step.history.samples.append((step.step, f"said at {step.step}"))
                if step.step == stop:
                    break
        return step.history.samples

    expected = [(n, f"said at {n}") for n in (1, 2, 3)]
    assert noted(stop=3) == expected
    last = noted()
    assert last[:3] == expected and [n for n, _ in last] == list(range(1, len(last) + 1))
    # The run has ended: its last step comes once more, with what was noted before it was saved.
    assert noted() == last[:-1]


def test_resuming_keeps_the_precision(tmp_path, monkeypatch):
    """Precision is measured at the start: a busy machine may measure otherwise when the run goes on."""
    config, path = changed(precision="auto", target=3.0), tmp_path / "a.pt"

    def measured(precision):
        def best_precision(device, asked):
            return (precision if asked == "auto" else asked), "so it was measured"

        for module in ("runs.run", "train"):
            monkeypatch.setattr(f"shakespeare_gpt.{module}.best_precision", best_precision)

    measured("bf16")
    expected = run(config)
    assert expected[1].state.precision == "bf16"
    run(config, stop_after=9, checkpoint=path)
    measured("fp32")
    assert_same_run(run(config, checkpoint=path), expected)


@pytest.mark.parametrize("stop", [3, 23])
def test_fp16_with_a_scaler(tmp_path, monkeypatch, stop):
    """A T4 trains in fp16: skipped steps and the scale must survive an interruption."""
    # So large that the first gradients overflow, and growing so often that others do.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**28, growth_interval=9)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    config, path = changed(precision="fp16", target=2.5), tmp_path / "a.pt"
    expected = run(config)
    run(config, stop_after=stop, checkpoint=path)
    scale = load_checkpoint(path)["scaler"]["scale"]
    assert (2.0**10 < scale < 2.0**28) if stop == 23 else scale == 2.0**25
    assert_same_run(run(config, checkpoint=path), expected)


@pytest.mark.parametrize("save_every, saved", [(0.0, 7), (300.0, None)])
def test_an_update_cut_in_half_is_not_saved(tmp_path, whole, monkeypatch, save_every, saved):
    """A second Ctrl-C acts at once, perhaps between two optimizers: half an update must not be kept."""
    path, calls, original = tmp_path / "a.pt", [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # Muon has already moved its part
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, save_every=save_every)
    assert (load_checkpoint(path)["meta"]["steps"] if path.exists() else None) == saved
    assert_same_run(run(checkpoint=path), whole)


def test_a_consumer_that_fails_loses_nothing(tmp_path, whole):
    """An error in the plot of a notebook must not cost the training so far."""
    path = tmp_path / "a.pt"

    def draw(step):
        1 / (step.step - 9)

    with pytest.raises(ZeroDivisionError):
        run_to_end(resumable(new_model(), IDS, RECIPE, path, device="cpu"), draw)
    assert load_checkpoint(path)["meta"]["steps"] == 9
    assert_same_run(run(checkpoint=path), whole)


@pytest.mark.parametrize("at", [11, 12], ids=["before fixed windows", "before moving windows"])
def test_nan_keeps_the_last_good_checkpoint(tmp_path, whole, monkeypatch, at):
    """What an update has ruined shows at the next loss only: saved before that, it replaces good weights."""
    path, model, calls, original = tmp_path / "a.pt", new_model(), [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                model.h[1].mlp.c_fc.weight[3, 3] = float("nan")

    with monkeypatch.context() as patch, pytest.raises(TrainingError) as error:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(model=model, checkpoint=path, save_every=0.0)
    message = one_line(error)
    assert f"exploded at step {at + 1} " in message and f"of step {at - 1}." in message
    assert str(path) in message
    assert all(w.isfinite().all() for w in load_checkpoint(path)["model"].values())
    assert_same_run(run(checkpoint=path), whole)


@pytest.mark.parametrize("what", ["seed", "text", "size", "rate", "foreign"])
def test_checkpoint_of_another_run_is_refused(tmp_path, what):
    """Going on from another run's state gives numbers that belong to neither."""
    path, config, ids, model = tmp_path / "a.pt", RECIPE, IDS.clone(), new_model()
    run(stop_after=2, checkpoint=path)
    if what == "seed":
        config = changed(seed=1)
    elif what == "text":
        ids[7] = (ids[7] + 1) % 97
    elif what == "size":
        model = new_model(replace(CONFIG, n_layer=1))
    elif what == "rate":
        config = changed(muon_lr=0.03)
    elif what == "foreign":
        save_checkpoint(path, {"weights": model.state_dict()})
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as error:
        run(config, ids, model=model, checkpoint=path)
    assert "restart" in one_line(error) and path.read_bytes() == before
    named = {
        "seed": "seed 0, not 1",
        "text": "text 300 tokens",
        "size": "n_layer 2, not 1",
        "rate": "muon_lr 0.02, not 0.03",
        "foreign": "vocab_size None, not 97",
    }
    assert named[what] in one_line(error)


def test_a_setting_younger_than_the_checkpoint(tmp_path):
    """Muon's momentum was fixed at another value before it was a setting."""
    path = tmp_path / "a.pt"
    run(stop_after=7, checkpoint=path)
    state = load_checkpoint(path)
    del state["fingerprint"]["momentum"]
    save_checkpoint(path, state)
    with pytest.raises(CheckpointError, match=r"momentum None, not 0\.9: restart"):
        run(checkpoint=path)


# --- a run that does not get there --------------------------------------------------------------------


def test_gives_up_and_can_go_on(tmp_path):
    """A run that did not get there keeps what it has learnt, and goes on when it is given more epochs."""
    path = tmp_path / "a.pt"
    short = changed(min_steps=1, epochs=2, max_epochs=3, target=1e-6)
    with pytest.raises(TargetNotReached, match="max_epochs"):
        run(short, checkpoint=path)
    state = load_checkpoint(path)
    assert state["meta"]["steps"] == 15 and not state["meta"]["finished"]  # 19 windows in batches of 4
    with pytest.raises(TargetNotReached, match="19 steps"):
        run(replace(short, max_epochs=4), checkpoint=path)
    assert load_checkpoint(path)["history"]["losses"][:15] == state["history"]["losses"]


def test_a_run_that_gave_up_is_not_trained_further(tmp_path):
    """Each time that it was started again it trained one step more, at the schedule's last rate."""
    path, config = tmp_path / "a.pt", changed(min_steps=1, epochs=2, max_epochs=3, target=1e-6)
    for _ in range(3):
        with pytest.raises(TargetNotReached, match="15 steps") as error:
            run(config, checkpoint=path)
        state = load_checkpoint(path)
        assert (state["meta"]["steps"], len(state["history"]["losses"])) == (15, 15)
    assert f"last batch {state['history']['losses'][-1]:.4f}" in one_line(error)


def test_unfinished_weights_do_not_boast_of_earlier_ones(tmp_path):
    """The mean of an earlier step stood in the file as that of the weights beside it."""
    path = tmp_path / "a.pt"
    with closing(resumable(new_model(), IDS, changed(target=1e-6), path, device="cpu")) as steps:
        for step in steps:
            if step.history.text and step.text_loss is None:
                break
    assert step.history.text[-1][0] < step.step
    meta = load_model(path)[1]
    assert meta["loss"] is None and not meta["finished"]


# --- the log ----------------------------------------------------------------------------------------


def test_log_of_a_resumed_run_goes_on(tmp_path):
    """A log that starts over at each resume shows the last hour of a run of ten."""
    path, log = tmp_path / "a.pt", tmp_path / "new" / "a.log"
    for stop, commit in ((20, "older"), (None, "newer")):
        steps = resumable(new_model(), IDS, RECIPE, path, device="cpu")
        with closing(logged(steps, log, {"preset": "tiny", "commit": commit}, path, IDS)) as steps:
            for step in steps:
                if step.step == stop:
                    break
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# preset: tiny", "# commit: older"]
    at = lines.index("# resumed at step 21")  # from there on it was other code, and the log says so
    assert "# commit: newer" in lines[at - 3 : at] and lines[at - 4].startswith("20 | ")
    assert lines.count("step | loss | best | lr | tokens/s") == 1
    assert read_log(log)[1] == [*range(10, step.step, 10), step.step]


def test_a_failed_run_says_why_in_its_log(tmp_path):
    """A log that just ends looks like a killed run's."""
    config, log = changed(epochs=1, max_epochs=1, min_steps=1, target=1e-9), tmp_path / "a.log"
    with pytest.raises(TrainingError) as error:
        list(logged(train(new_model(), IDS, config, device="cpu"), log, {}, tmp_path / "a.pt", IDS))
    assert log.read_text(encoding="utf-8").endswith(f"# {error.value}\n")


def test_weights_without_their_log_are_loaded(tmp_path):
    """Whoever brings only the file of a finished run met an AttributeError."""
    path, log = tmp_path / "a.pt", tmp_path / "b.log"
    run(checkpoint=path)
    steps = logged(resumable(new_model(), IDS, RECIPE, path, device="cpu"), log, {}, path, IDS)
    assert [step.done for step in steps] == [True]


def test_a_run_that_starts_over_keeps_the_earlier_log(tmp_path):
    """The weights of the earlier run stay until the first save, so its log must too."""
    log, head = tmp_path / "a.log", {"preset": "tiny"}
    for _ in range(2):
        steps = train(new_model(), IDS, RECIPE, device="cpu")
        with closing(logged(steps, log, head, tmp_path / "a.pt", IDS)) as steps:
            for _ in range(10):
                next(steps)
        text = log.read_text(encoding="utf-8")
        assert text.count("# preset") == 1 and "resumed" not in text
    assert (tmp_path / "a.old.log").read_text(encoding="utf-8").startswith("# preset: tiny")


@pytest.mark.parametrize("name", ["folder.log", "below/a.log"])
def test_a_log_that_cannot_be_written_costs_nothing(tmp_path, name):
    """A restart whose log failed had already put one step's weights in the place of the trained ones."""
    path, log = tmp_path / "a.pt", tmp_path / name
    run(stop_after=20, checkpoint=path)
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "below").write_text("a file, no folder", encoding="utf-8")
    before = {p.name: p.is_file() and p.read_bytes() for p in tmp_path.iterdir()}
    steps = resumable(new_model(), IDS, RECIPE, path, device="cpu", restart=True)
    with pytest.raises((CheckpointError, OSError)):
        next(logged(steps, log, {}, path, IDS))
    assert {p.name: p.is_file() and p.read_bytes() for p in tmp_path.iterdir()} == before


# --- signals ----------------------------------------------------------------------------------------

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_training_leaves_signals_alone(tmp_path, order):
    """After ``next(train(...))`` a Ctrl-C vanished; closed in another order, dead handlers stayed."""
    before = handlers()
    config, preset = changed(target=1e-6), get_preset("smoke")
    steps = resumable(new_model(), IDS, config, tmp_path / "a.pt", device="cpu")
    runs = [
        logged(steps, tmp_path / "a.log", {}, tmp_path / "a.pt", IDS),
        start(preset, preset.load_text(), checkpoint=tmp_path / "b.pt", device="cpu"),
    ]
    for steps in runs:
        next(steps)
        assert handlers() == before
    for number in order:
        runs[number].close()
        assert handlers() == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_waits_for_the_step_in_hand(tmp_path, whole, number):
    """Ctrl-C and a kill end the run between two steps, with all that was learnt saved."""
    path, before = tmp_path / "a.pt", handlers()

    def show(step):
        if step.step == 5:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match=r"^Interrupted\. Run it again, without restart, to go on\.$"):
        run_to_end(resumable(new_model(), IDS, RECIPE, path, device="cpu"), show)
    assert handlers() == before
    assert load_checkpoint(path)["meta"]["steps"] == 5
    model = new_model()
    step = run_to_end(resumable(model, IDS, RECIPE, path, device="cpu"), lambda step: None)
    assert_same_run((model, step), whole)


def test_a_second_signal_acts_at_once():
    """A step may take a minute: whoever presses twice does not want to wait for it."""
    before, seen = handlers(), []

    def show(step):
        signal.raise_signal(signal.SIGINT)
        seen.append(step)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal waited")

    with pytest.raises(KeyboardInterrupt):
        run_to_end(train(new_model(), IDS, RECIPE, device="cpu"), show)
    assert len(seen) == 1 and handlers() == before


def test_a_run_in_another_thread_ends_too():
    """Only the main thread may set signal handlers: a web page that trains would fail at the start."""
    ended = []

    def work():
        ended.append(
            run_to_end(train(new_model(), IDS, changed(target=4.0), device="cpu"), lambda step: None)
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended and ended[0].done


# --- more than one process --------------------------------------------------------------------------


def test_processes_must_train_the_same(tmp_path, monkeypatch):
    """A text downloaded here and not there: weights that drift apart."""
    play_process(monkeypatch, 1, 2, lambda view: [({**view[0], "text": "another"}, view[1]), view])
    with pytest.raises(TrainingError, match="same settings and text") as error:
        next(resumable(new_model(), IDS, RECIPE, tmp_path / "a.pt", device="cpu"))
    one_line(error)


def test_the_first_process_chooses_the_precision(tmp_path, monkeypatch):
    """bf16 found fast here and not there: each would round in its own way."""
    monkeypatch.setattr("shakespeare_gpt.runs.run.best_precision", lambda *_: ("fp32", "it is busy"))

    def others(value):
        return [(value[0], "bf16") if type(value) is tuple else value, value]

    play_process(monkeypatch, 1, 2, others)
    config = changed(precision="auto")
    with closing(resumable(new_model(), IDS, config, tmp_path / "a.pt", device="cpu")) as steps:
        assert next(steps).state.precision == "bf16"
    assert not list(tmp_path.iterdir())  # only the first one saves


def test_all_processes_stop_as_one(monkeypatch):
    """Ctrl-C reaches them at different moments: one that stops alone leaves the others waiting for ever."""
    seen = []
    play_process(monkeypatch, 0, 2, lambda value: [value, len(seen) == 5])  # the second one had the signal
    with pytest.raises(KeyboardInterrupt):
        run_to_end(train(new_model(), IDS, RECIPE, device="cpu"), seen.append)
    assert [step.step for step in seen] == [1, 2, 3, 4, 5]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to a group of processes")
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["alone", "torchrun"])
def test_command_line_survives_signals(tmp_path, launcher):
    """A kill or Ctrl-C leaves a checkpoint, and the same command goes on with the same numbers.

    With two processes both must stop after the same step, or one waits for the other for ever.
    """
    path, log = tmp_path / "deep" / "a.pt", tmp_path / "deep" / "a.log"
    command = [sys.executable, *launcher, "-m", "shakespeare_gpt", "train", "--preset", "smoke"]
    command += ["--target", "1e-6", "--checkpoint", str(path), "--device", "cpu", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    histories = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        ) as process:
            try:
                for line in process.stdout:  # the first progress line says that it is under way
                    if line.startswith("step "):
                        break
                # As a terminal does: to every process of the command.
                os.killpg(process.pid, number)
                _, error = process.communicate(timeout=300)  # only against a deadlock
            finally:
                process.kill()
        assert process.returncode == 130 if not launcher else process.returncode != 0
        assert error.count("Interrupted. Run it again, without restart, to go on.\n") == 1
        if not launcher:
            assert "Traceback" not in error
        histories.append(load_checkpoint(path)["history"]["losses"])
        assert set(path.parent.iterdir()) == {path, log}
    first, second = histories
    assert 0 < len(first) < len(second)
    assert second[: len(first)] == first
    assert f"# resumed at step {len(first) + 1}" in log.read_text(encoding="utf-8")
    assert not (tmp_path / "checkpoints").exists()
    # One process and two train the same, and one can go on where two stopped.
    preset = get_preset("smoke")
    text, config = preset.load_text(), replace(preset.train, target=1e-6, precision="fp32")
    with closing(train(GPT(preset.model), text.ids, config, device="cpu")) as steps:
        alone = [next(steps).loss for _ in range(min(15, len(second)))]
    assert second[: len(alone)] == pytest.approx(alone, abs=1e-4)
    assert set(load_checkpoint(path)["model"]) == set(GPT(preset.model).state_dict())
    with closing(start(preset, text, config=config, checkpoint=path, device="cpu")) as steps:
        assert next(steps).step == len(second) + 1


def test_two_processes_reach_the_target_as_one(tmp_path):
    """The end, where all believe what the first one measured, and one of the two writes what it knows."""
    (tmp_path / "poem.txt").write_text("Shall I know this by heart, or only seem to?\n" * 9, encoding="utf-8")
    command = [sys.executable, *TORCHRUN, "-m", "shakespeare_gpt", "train", "--preset", "smoke"]
    command += ["--text", "poem.txt", "--target", "1.0", "--device", "cpu", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run([*command, "--checkpoint", "a.pt"], **options, timeout=300)  # against a deadlock
    assert done.returncode == 0, done.stderr
    model, meta = load_model(tmp_path / "a.pt")
    assert done.stdout.count(f"Target loss 1 reached at step {meta['steps']}\n") == 1
    preset = get_preset("smoke")
    text, config = (
        preset.load_text(tmp_path / "poem.txt"),
        replace(preset.train, target=1.0, precision="fp32"),
    )
    assert score(model, text.ids).loss == pytest.approx(meta["loss"], abs=1e-5) and meta["loss"] < 1.0
    *_, alone = train(GPT(preset.model), text.ids, config, device="cpu")
    assert meta["steps"] == alone.step and meta["tokens"] == alone.history.tokens
    assert load_checkpoint(tmp_path / "a.pt")["history"]["losses"] == pytest.approx(
        alone.history.losses, abs=0.01
    )
    assert (tmp_path / "a.log").read_text(encoding="utf-8").count("# from anywhere: after ") == 1
