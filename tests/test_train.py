"""The loop: what is read and when it is measured, the settings, and every way in which a run can end."""

import re
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from small_run import (
    CONFIG,
    EASY,
    IDS,
    RECIPE,
    assert_same_run,
    changed,
    new_model,
    one_line,
    play_process,
    run,
)
from torch.nn import functional as F

from shakespeare_gpt.data import WindowOrder
from shakespeare_gpt.memorization import score
from shakespeare_gpt.presets import PRESETS, TARGET, TrainConfig, get_preset
from shakespeare_gpt.runs.log import end_line
from shakespeare_gpt.speed import devices
from shakespeare_gpt.train import (
    History,
    Plan,
    TargetNotReached,
    TrainingError,
    learning_rate,
    new_state,
    train,
)

# --- how a run ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stops_on_the_whole_text_only(precision):
    """One batch under the target is luck; the claim is the mean over every token."""
    config = changed(batch_size=1, epochs=8, target=0.9, precision=precision)
    model, step = run(config, EASY)
    assert step.done and step.text_loss < 0.9
    near = 1e-9 if precision == "fp32" else 0.02  # the loop may measure in its own precision
    assert score(model, EASY).loss == pytest.approx(step.text_loss, rel=near)
    # At the schedule's end and then once an epoch of 15 steps; never before, however good a batch was.
    assert step.history.first_batch < 8 * 15
    measured = [number for number, _ in step.history.text]
    assert measured == list(range(8 * 15, step.step + 1, 15)) and len(measured) > 1
    assert all(value >= 0.9 for _, value in step.history.text[:-1])
    assert step.progress == 1.0 and step.seconds_left == 0.0
    assert end_line(step) == f"Target loss 0.9 reached at step {step.step}"


@pytest.mark.parametrize(
    "in_bf16, in_fp32, reported, asked",
    [
        (0.5, None, 0.5, ["bf16"]),
        (0.05, None, 0.05, ["bf16"]),
        (0.0999, 0.1001, 0.1001, ["bf16", "fp32"]),
        (0.1001, 0.0999, 0.0999, ["bf16", "fp32"]),
    ],
)
def test_full_precision_decides_near_the_target(monkeypatch, in_bf16, in_fp32, reported, asked):
    """The training's precision is off by a thousandth: no run ends, or goes on, because of it."""
    measured, values = [], {"bf16": in_bf16, "fp32": in_fp32}

    def measure(model, ids, precision="fp32"):
        measured.append(precision)
        return SimpleNamespace(loss=values[precision])

    monkeypatch.setattr("shakespeare_gpt.train.score", measure)
    config = changed(epochs=1, min_steps=1, precision="bf16", target=TARGET)
    with closing(train(new_model(), IDS, config, device="cpu")) as steps:
        step = next(step for step in steps if step.text_loss is not None)
    assert (step.text_loss, measured) == (reported, asked)
    assert step.done == (reported < TARGET)


def test_stop_on_batch_is_the_baselines_rule():
    """The baseline is compared by the first batch under the target: it must stop there."""
    config = changed(batch_size=1, min_steps=100, target=0.3, stop_on="batch")
    model, step = run(config, EASY)
    assert step.done and step.loss < 0.3
    assert all(loss >= 0.3 for loss in step.history.losses[:-1])
    assert step.step == step.history.first_batch
    assert score(model, EASY).loss > 0.3


def test_gives_up_after_max_epochs():
    """A run that cannot get there must end, and say what to do."""
    config = changed(min_steps=1, epochs=2, max_epochs=3, target=1e-6)
    with pytest.raises(TargetNotReached, match="in 15 steps") as error:  # 19 windows in batches of 4
        run(config)
    assert "max_epochs" in one_line(error)


@pytest.mark.parametrize("rates", [{"muon_lr": 1e6, "adam_lr": 1e4}, {"adam_lr": 1e30}], ids=str)
def test_absurd_rates_stop_the_run(rates):
    """An exploding loss trained on for hours is an hour lost and a checkpoint ruined."""
    with pytest.raises(TrainingError) as error:
        run(changed(**rates))
    assert "exploded" in one_line(error) and "adam_lr" in str(error.value)


def test_text_shorter_than_a_batch():
    """Two windows cannot fill a batch of four: training must still be possible, and count its tokens."""
    ids = IDS[:30]
    model, step = run(ids=ids)
    assert step.done and score(model, ids).loss < RECIPE.target
    assert step.history.tokens == step.step * 2 * 16


def test_one_window():
    """The shortest text that is allowed at all."""
    _, step = run(ids=IDS[:17])
    assert step.done


# --- what a step is ---------------------------------------------------------------------------------


def test_steps_say_what_happened():
    """A plot or a log of other numbers than the run's own."""
    config, seen = changed(target=1e-6), []
    with closing(train(new_model(), IDS, config, device="cpu")) as steps:
        for step in steps:
            seen.append(step.loss)
            assert step.step == len(seen) and step.history.losses == seen
            assert step.best == min(seen) and step.target == 1e-6
            assert step.history.tokens == step.step * 4 * 16
            assert step.progress == pytest.approx(min(0.99, step.step / 72))  # of the schedule
            assert step.tokens_per_second > 0 and step.seconds_left > 0 and not step.done
            rate = config.muon_lr * learning_rate(step.step - 1, 72, config)
            assert step.lr == pytest.approx(rate)
            assert (step.text_loss is not None) == (step.step in (72, 77))
            if step.step == 80:
                break
    assert not step.history.samples


def test_the_first_step_is_plain_gradient_descent():
    """Loss, clipping and update of one step, against torch's own AdamW and nothing of ours."""
    config = changed(optimizer="adamw", adam_lr=0.01, grad_clip=0.05, warmup_steps=0, windows="sequential")
    model, expected = new_model(), new_model()
    with closing(train(model, IDS, config, device="cpu")) as steps:
        step = next(steps)
    x = IDS[:64].view(4, 16)
    logits = expected(x)
    loss = F.cross_entropy(logits.flatten(0, 1), IDS[1:65])
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05) > 0.05
    torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0).step()
    assert step.loss == pytest.approx(loss.item(), abs=1e-5)
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        # Adam's first step is the rate times the gradient's sign: near 0 that is rounding.
        assert (mine - theirs).abs().mean() < 1e-4, name
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_before_update_sees_weights_that_the_loss_has_proved():
    """Saved after an update that ruined them, weights replace good ones: see the tests of runs."""
    model, seen = new_model(), []

    def note(state):
        seen.append((state.step, state.model.wte.weight.detach().clone()))

    with closing(train(model, IDS, RECIPE, device="cpu", before_update=note)) as steps:
        next(steps)
        after_one = model.wte.weight.detach().clone()
        next(steps)
    assert [step for step, _ in seen] == [0, 1]
    assert torch.equal(seen[1][1], after_one) and not torch.equal(seen[0][1], after_one)


def test_training_touches_nothing_of_the_process(monkeypatch):
    """``mallopt`` stayed set after a library call: freed gigabytes stayed with the process."""
    calls, real = [], devices.ctypes.CDLL

    class Library:
        def __init__(self, *arguments, **options):
            self.library = real(*arguments, **options)

        def __getattr__(self, name):
            if name == "mallopt":
                return lambda *arguments: calls.append(arguments)
            return getattr(self.library, name)

    monkeypatch.setattr(devices.ctypes, "CDLL", Library)
    with closing(train(new_model(), IDS, RECIPE, device="cpu")) as steps:
        next(steps)
    assert calls == []
    devices.keep_freed_memory()
    assert len(calls) == 2


def test_random_numbers_of_others_do_not_matter():
    """A draw from the global generator ties the run to whatever ran before it."""
    expected = run()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert_same_run(run(), expected)
    assert torch.equal(torch.get_rng_state(), state)


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, dtype", [("fp32", torch.float32), ("auto", torch.bfloat16)])
def test_fp32_holds_for_muon_too(monkeypatch, asked, dtype):
    """On a CPU with bf16 two processes differed from one: each rounded the updates in its own way."""
    monkeypatch.setattr(
        "shakespeare_gpt.train.best_precision",
        lambda _, asked: ("bf16" if asked == "auto" else asked, "it is fast"),
    )
    config = changed(precision=asked)
    muon = new_state(new_model(), IDS, config, config.precision).optimizers[0]
    assert muon.param_groups[0]["dtype"] == dtype


def test_an_overflow_in_fp16_moves_nothing(monkeypatch):
    """AdamW's gradient made the norm infinite: Muon went on with what clipping had left of its own."""
    model, real, weights = new_model(), torch.amp.GradScaler.unscale_, []

    def unscale(scaler, optimizer):
        if isinstance(optimizer, torch.optim.AdamW) and len(weights) == 3:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        real(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    with closing(train(model, IDS, changed(precision="fp16"), device="cpu")) as steps:
        for _ in range(5):
            next(steps)
            weights.append({k: v.clone() for k, v in model.state_dict().items()})
    moved = [any(not a[k].equal(b[k]) for k in a) for a, b in pairwise(weights)]
    assert moved == [True, True, False, True]
    assert all(v.isfinite().all() for v in weights[-1].values())


# --- the schedule, the optimizers, the settings -----------------------------------------------------


def test_learning_rate_shape():
    """A schedule that never comes down, or starts at its peak, learns half as fast."""
    config = changed(warmup_steps=10, final_lr=0.05)
    rates = [learning_rate(step, 100, config) for step in range(150)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:101]))
    assert rates[55] == pytest.approx(0.525)  # half-way down the line
    assert rates[100:] == pytest.approx([0.05] * 50)


def test_learning_rate_can_be_constant():
    """The baseline's rate is constant and has no warm-up."""
    config = PRESETS["baseline"].train
    assert {learning_rate(step, 1000, config) for step in (0, 1, 500, 999, 2000)} == {1.0}
    assert learning_rate(0, 1, config) == 1.0


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_trained_once(kind):
    """A parameter in no optimizer never learns; one in two is moved twice."""
    model = new_model()
    optimizers = new_state(model, IDS, changed(optimizer=kind), "fp32").optimizers
    groups = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(groups) == len({id(p) for p in groups}) == len(list(model.parameters()))
    if kind == "muon":
        orthogonalized = {id(p) for g in optimizers[0].param_groups for p in g["params"]}
        names = {n for n, p in model.named_parameters() if id(p) in orthogonalized}
        assert names == {n for n in model.state_dict() if re.search(r"c_(attn|proj|fc)\.weight$", n)}


IMPOSSIBLE = (
    {"windows": "random"},
    {"windows": "shifted"},
    {"optimizer": "sgd"},
    {"precision": "int8"},
    {"stop_on": "luck"},
    {"batch_size": 0},
    {"max_epochs": float("inf")},
    {"target": float("nan")},
    {"adam_lr": float("inf")},
    {"seed": -1},
    {"seed": 2**63},
    {"fixed_every": 0},
)


@pytest.mark.parametrize("settings", IMPOSSIBLE, ids=str)
def test_impossible_settings(settings):
    """A mistyped setting taken for the default trains something else."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainConfig(**settings)


def test_the_largest_seed_works():
    """A run with the seed 2^63 - 1 ended in "Overflow when unpacking long long"."""
    config = changed(seed=2**63 - 1, target=4.0)
    first, second = (run(config, model=new_model(seed=config.seed)) for _ in range(2))
    assert_same_run(first, second)


def test_presets_by_name_and_by_the_variable(monkeypatch):
    """A preset that does not exist must not become the default's hours of training."""
    assert get_preset("smoke") is PRESETS["smoke"]
    monkeypatch.setenv("SHAKESPEARE_GPT_PRESET", "baseline")
    assert get_preset().name == "baseline" and get_preset("mini").name == "mini"
    with pytest.raises(ValueError, match="choose one of smoke, mini, gpt2, baseline") as error:
        get_preset("nonsense")
    one_line(error)
    # The window is how it is read, not what it is: the architecture is the one that is compared.
    assert replace(PRESETS["gpt2"].model, window=0) == PRESETS["baseline"].model
    assert all(preset.name == name for name, preset in PRESETS.items())


# --- the mean over the whole text -------------------------------------------------------------------


@pytest.mark.parametrize("n", [17, 18, 32, 33, 34, 160, 300])
def test_a_score_is_the_mean_over_every_token(n):
    """A mean of windows' means counts the last window's overlap twice: another number than claimed."""
    model, ids, T = new_model(seed=4), IDS[:n], 16
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # far from uniform
        losses = []
        for target in range(1, n):
            start = min((target - 1) // T * T, n - 1 - T)
            logits = model(ids[None, start:target])[0, -1]
            losses.append(F.cross_entropy(logits, ids[target]).item())
    expected = sum(losses) / (n - 1)
    assert score(model, ids).loss == pytest.approx(expected, abs=1e-5)


# --- several processes, as far as one can play them ---------------------------------------------------


def test_all_processes_believe_the_first_ones_evaluation(monkeypatch):
    """Two processors round differently: one that stops a step earlier leaves the others waiting."""
    config = changed(epochs=1, min_steps=1)
    play_process(monkeypatch, 1, 2, lambda loss: [1.0, loss])
    with closing(train(new_model(), IDS, config, device="cpu")) as steps:
        step = next(step for step in steps if step.text_loss is not None)
    assert step.text_loss == 1.0 and step.done


@pytest.mark.parametrize("kind", ["moving", "fixed"])
def test_the_shares_of_a_batch_are_the_batch(kind, monkeypatch):
    """Shares that overlap: two GPUs learn the same windows and call it twice the speed."""
    losses, config = [], changed(windows=kind)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        play_process(monkeypatch, rank, world)
        with closing(train(new_model(), IDS, config, device="cpu")) as steps:
            losses.append(next(steps).loss)  # divided by the number of processes: a share of the mean
    assert losses[1] + losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert losses[1] != losses[2]


def test_batch_that_cannot_be_shared(monkeypatch):
    """Three processes and a batch of four: a remainder dropped silently changes the recipe."""
    play_process(monkeypatch, 0, 3)
    with pytest.raises(TrainingError, match="3 processes") as error:
        next(train(new_model(), IDS, RECIPE, device="cpu"))
    one_line(error)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_step_has_work_for_every_process(world, monkeypatch):
    """A share of no windows: its mean is NaN, and all processes stop."""
    play_process(monkeypatch, 0, world)
    for window in (0, 3, 5, 16):
        plan = Plan(300, replace(CONFIG, window=window), RECIPE)
        for step in range(8):
            starts, length = plan.batch(step)
            assert len(starts) % world == 0 and len(starts) >= world
            assert 0.8 * 64 <= len(starts) * length <= 64  # about as many tokens in each kind of batch


# --- what is read, and when it is measured ------------------------------------------------------------


def test_a_plan_counts_in_whole_epochs():
    """``epochs`` of a schedule that ends early, or late, is another recipe than the preset says."""
    plan = Plan(300, CONFIG, RECIPE)
    assert (plan.batch_size, plan.steps_per_epoch) == (4, 19 / 4)
    assert (plan.steps, plan.max_steps) == (72, 475)
    short = Plan(17, CONFIG, replace(RECIPE, min_steps=200))
    assert (short.batch_size, short.steps, short.max_steps) == (1, 200, 800)


def read(config, steps: int) -> list[tuple[list[int], int]]:
    plan = Plan(300, CONFIG, config)
    return [(starts.tolist(), length) for starts, length in map(plan.batch, range(steps))]


@pytest.mark.parametrize("every", [1, 2, 4])
def test_moving_and_fixed_windows_in_turn(every):
    """A turn left out, or windows of one kind skipped while the other is read."""
    mixed = read(changed(fixed_every=every), 40 * every)
    turns = [length for _, length in mixed]
    assert turns == ([8] * (every - 1) + [16]) * 40
    fixed = [starts for starts, length in mixed if length == 16]
    assert fixed == [starts for starts, _ in read(changed(windows="fixed"), 40)]
    order = WindowOrder(300, 8, "moving", RECIPE.seed)
    moving = [starts for starts, length in mixed if length == 8]
    assert moving == [order.batch(number, 8).tolist() for number in range(len(moving))]


@pytest.mark.parametrize("kind", ["fixed", "sequential"])
def test_one_kind_of_windows_alone(kind):
    """The lesson of notebook 3, and the baseline, need whole windows at their usual places only."""
    batches = read(changed(windows=kind), 19)
    assert {length for _, length in batches} == {16}
    met = [start for starts, _ in batches for start in starts]
    epochs = [met[i : i + 19] for i in range(0, len(met), 19)]
    assert all(sorted(epoch) == [*range(0, 288, 16), 283] for epoch in epochs)
    assert (epochs[0] == sorted(epochs[0])) == (kind == "sequential")


def test_short_windows_are_as_long_as_sampling_looks_back():
    """Trained at one length and sampled at another, a model recites a third as far."""
    for window, length in ((0, 16), (5, 5), (16, 16)):
        model = replace(CONFIG, window=window)
        assert Plan(300, model, RECIPE).batch(0)[1] == model.sampling_window == length


def test_the_whole_text_is_measured_at_the_schedules_end():
    """A run that stops early has not brought its rates down; and the baseline stops by its batches."""
    plan, history = Plan(300, CONFIG, RECIPE), History()
    assert [step for step in range(1, 90) if plan.evaluates_at(step, history)] == [72, 77, 82, 87]
    by_batch = Plan(300, CONFIG, changed(stop_on="batch"))
    assert not by_batch.evaluates_at(72, history)
    assert by_batch.evaluates_at(3, History(first_batch=3))
