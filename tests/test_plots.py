"""The pictures of the notebooks: what they show, not how they look."""

from contextlib import closing

from PIL import Image, ImageOps
from small_run import IDS, changed, new_model

from shakespeare_gpt.notebook import plots
from shakespeare_gpt.runs.weights import load_checkpoint, save_checkpoint
from shakespeare_gpt.train import train
from tools.learning_animation import draw, moments

PLAY = (
    "Ennor:\nWho keeps that lamp tonight above our grey cold bay,\nand why does nobody answer?\n\n"
    "Rowse:\nAsk <i>Maddern & 'his' clever daughter instead; my pilot boat wants tar.\n"
)


def test_watching_ends_with_the_last_step(capsys):
    with closing(train(new_model(), IDS, changed(target=4.0), device="cpu")) as steps:
        step = plots.watch(steps)
    assert step.done
    assert capsys.readouterr().out.splitlines()[-1] == f"Target loss 4 reached at step {step.step}"
    axes = plots.loss_figure(step).axes[0]
    assert f"step {step.step} " in axes.get_title(loc="left") + axes.get_title()
    curve = axes.lines[0].get_ydata()
    assert list(curve) == step.history.losses


def test_a_notebook_updates_one_picture(monkeypatch):
    """A picture for each update, or none at the end: what is saved must be the last state, once."""
    calls = []

    class Handle:
        def display(self, figure):
            calls.append(("display", figure))

        def update(self, figure):
            calls.append(("update", figure))

    monkeypatch.setattr(plots, "DisplayHandle", Handle)
    with closing(train(new_model(), IDS, changed(target=4.0), device="cpu")) as steps:
        step = plots.watch(steps, every=0.0)
    assert [kind for kind, _ in calls] == ["display"] + ["update"] * (step.step - 1)
    axes = calls[-1][1].axes[0]
    assert f"step {step.step} " in axes.get_title(loc="left") + axes.get_title()


# --- tools/learning_animation.py ----------------------------------------------------------------------


def test_the_animation_is_drawn_from_a_checkpoint(tiny, tmp_path):
    """A run is saved before its last sample is taken: the animation ended with a text half learnt."""
    state = load_checkpoint(tiny.checkpoint)
    state["history"] = {"samples": [(1, " the the"), (100, " the sea")]}
    path = save_checkpoint(tmp_path / "run.pt", state)
    samples, prompt, truth = moments(path, str(tiny.source))
    assert [step for step, _ in samples] == [1, 100, state["meta"]["steps"]]
    assert samples[-1][1][:20] == truth[:20]
    assert f"\n\n{prompt}{truth}" in tiny.text.text  # a speech, and how it goes on


def test_the_animation_shows_where_it_goes_wrong(tmp_path):
    """Lines left out at the end once hid the only mistake: the picture was all green."""
    truth = "".join(f"line {i}\n" for i in range(14))
    stills = []
    for slip in ("x", "y"):  # as many characters right, so only the slip itself differs
        draw([(2, f"{truth[:-3]}{slip}\n")], "So it began:\n", truth, tmp_path / f"{slip}.gif")
        stills.append((tmp_path / f"{slip}.png").read_bytes())
    assert stills[0] != stills[1]


def test_the_animation_keeps_every_frame_inside(tmp_path):
    """An untrained model writes one endless line, in every script: the first frame ran off the edge."""
    prompt, truth = "Enter\n", "a ghost, with $5 and\n\n50 %.\n"
    noise = "".join(chr(33 + i % 300) + "\t 幽霊 $" for i in range(150))
    samples = [(1, noise), (20, "a ghost, with a\n" * 9), (300, truth)]
    draw(samples, prompt, truth, tmp_path / "new" / "learning.gif")
    with Image.open(tmp_path / "new" / "learning.gif") as animation:
        assert animation.n_frames == 3
        for i in range(3):
            animation.seek(i)
            ink = ImageOps.invert(animation.convert("L")).point(lambda level: level > 64 and 255).getbbox()
            assert ink[0] >= 20 and ink[2] <= animation.width - 20, (i, ink)
            assert ink[1] >= 20 and ink[3] <= animation.height - 10, (i, ink)
    with Image.open(tmp_path / "new" / "learning.png") as still:
        assert still.size == animation.size
