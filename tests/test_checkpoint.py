"""Checkpoints: whole or not at all, read without running code, and refused in one line."""

import errno
import json
import os
import pickle
import threading
import zipfile
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from shakespeare_gpt import checkpoint as module
from shakespeare_gpt.checkpoint import (
    FORMAT,
    CheckpointError,
    chosen_weights,
    from_openai,
    load_checkpoint,
    load_model,
    safetensors_header,
    save_checkpoint,
    to_openai,
)
from shakespeare_gpt.model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=101, n_positions=16, n_embd=24, n_layer=2, n_head=3)
META = {"preset": "tiny", "steps": 12, "loss": 0.0987, "text_name": "Märchen", "first": None}


def tiny_model(seed: int = 0) -> GPT:
    model = GPT(TINY, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.01 * i)  # biases and gains of their own
    return model


def tiny_state(seed: int = 0) -> dict:
    model = tiny_model(seed)
    return {"model": model.state_dict(), "config": asdict(TINY), "step": 12, "meta": META}


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    return message


def assert_same_model(model: GPT, expected: GPT) -> None:
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- there and back ---------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """A dtype, a tuple or a None lost on the way makes a resumed run another one."""
    state = {
        **tiny_state(),
        "optimizers": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}],
        "half": torch.arange(5).to(torch.bfloat16),
        "empty": None,
    }
    path = save_checkpoint(tmp_path / "new" / "folder" / "a.pt", state)
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    loaded = load_checkpoint(path)
    assert loaded["format"] == FORMAT and loaded["meta"] == META and loaded["empty"] is None
    assert loaded["optimizers"] == state["optimizers"]
    assert loaded["half"].dtype == torch.bfloat16 and torch.equal(loaded["half"], state["half"])
    assert all(torch.equal(loaded["model"][k], v) for k, v in state["model"].items())


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path):
    """A file of half a gigabyte for each kill, hidden, until the disk is full."""
    dead, alive = tmp_path / ".a.pt.0dead.part", tmp_path / ".a.pt.a11fe.part"
    for part in (dead, alive):
        part.write_bytes(b"half a checkpoint")
    os.utime(dead, (1000, 1000))
    path = save_checkpoint(tmp_path / "a.pt", tiny_state())
    assert set(tmp_path.iterdir()) == {path, alive}


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """Two notebooks trained into one checkpoint: with a common unfinished file most reads met a damaged one."""
    path, failures = save_checkpoint(tmp_path / "a.pt", tiny_state()), []

    def write(value):
        try:
            for _ in range(20):
                save_checkpoint(path, {"value": torch.full((20_000,), value)})
        except CheckpointError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        load_checkpoint(path)
    assert not failures
    assert len(set(load_checkpoint(path)["value"].tolist())) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("trouble", [PermissionError(errno.EACCES, "denied"), MemoryError()])
def test_trouble_with_reading_is_no_reason_to_delete(tmp_path, monkeypatch, trouble):
    """A good file was called unreadable, and the advice was to delete it."""
    path = save_checkpoint(tmp_path / "a.pt", tiny_state())

    def load(*args, **kwargs):
        raise trouble

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert "try again" in one_line(error) and "delete" not in str(error.value)


def test_load_model(tmp_path):
    """Weights in another layout, or a model left in training mode, would sample something else."""
    save_checkpoint(tmp_path / "a.pt", tiny_state())
    model, meta = load_model(tmp_path / "a.pt")
    assert_same_model(model, tiny_model())
    assert meta == META and model.config == TINY and not model.training
    assert model.wte.weight.dtype == torch.float32 and model.device.type == "cpu"
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(model(ids), tiny_model()(ids))


def test_load_model_draws_no_random_numbers(tmp_path):
    """Loading weights must not disturb anybody's random numbers, nor fall back on random weights."""
    save_checkpoint(tmp_path / "a.pt", tiny_state())
    state = torch.get_rng_state()
    load_model(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), state)


def test_safetensors_round_trip(tmp_path):
    """The Space reads this file: transposed back wrongly, a square matrix fails without an error."""
    path = tmp_path / "model.safetensors"
    save_file(to_openai(tiny_model().state_dict()), path, safetensors_header(TINY, META))
    model, meta = load_model(path)
    assert_same_model(model, tiny_model())
    assert meta == META


def test_openai_layout():
    """transformers keeps four matrices a layer as (in, out), and none of the others."""
    ours = tiny_model().state_dict()
    theirs = to_openai(ours)
    assert theirs["transformer.h.1.attn.c_attn.weight"].shape == (24, 72)
    assert theirs["transformer.h.1.mlp.c_proj.weight"].shape == (96, 24)
    assert theirs["transformer.wte.weight"].shape == (101, 24)
    square = "h.0.attn.c_proj.weight"
    assert torch.equal(theirs["transformer." + square], ours[square].T)
    assert all(w.is_contiguous() for w in theirs.values())  # safetensors refuses views
    back = from_openai(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


# --- whole or not at all ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["first", "replacing"])
@pytest.mark.parametrize("failure", ["disk full", "torch", "interrupt"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, when, failure):
    """A full disk or a kill in the middle of a write must not cost the run its last good checkpoint."""
    path = tmp_path / "a.pt"
    if when == "replacing":
        save_checkpoint(path, {"step": 1})
    before = path.read_bytes() if path.exists() else None
    errors = {
        "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "torch": RuntimeError("[enforce fail at inline_container.cc:603]\nunexpected pos 64 vs 0"),
        "interrupt": KeyboardInterrupt(),
    }

    def fail(state, file):
        file.write(b"half a checkpoint" * 1000)
        file.flush()
        raise errors[failure]

    monkeypatch.setattr(torch, "save", fail)
    if failure == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"step": 2})
    else:
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(path, {"step": 2})
        assert path.name in one_line(error)
        if failure == "disk full":
            assert "No space left" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == (["a.pt"] if before else [])
    if before:
        assert path.read_bytes() == before


def test_folder_that_cannot_be_made(tmp_path):
    """A checkpoint path below a file: one line, not a traceback after an hour of training."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "file" / "a.pt", {})
    one_line(error)


# --- refused ----------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it creates a file: code that a checkpoint from anywhere could run."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("kind", ["plain pickle", "torch file"])
@pytest.mark.parametrize("read", [load_checkpoint, load_model])
def test_code_in_a_checkpoint_is_never_run(tmp_path, kind, read):
    """A .pt file is a pickle: read without weights_only, it can run anything."""
    target, path = tmp_path / "executed", tmp_path / "a.pt"
    state = {"format": FORMAT, **tiny_state(), "bomb": Bomb(target)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path)
    with pytest.raises(CheckpointError) as error:
        read(path)
    one_line(error)
    assert not target.exists()


def damaged(path, kind):
    if kind == "truncated":
        save_checkpoint(path, tiny_state())
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are not the weights", encoding="utf-8")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "hello")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "another program":
        torch.save(tiny_model().state_dict(), path)
    elif kind == "another format":
        torch.save({**tiny_state(), "format": "shakespeare-gpt-0"}, path)
    elif kind == "folder":
        path.mkdir()


KINDS = ["missing", "truncated", "empty", "text", "zip", "list", "another program"]


@pytest.mark.parametrize("kind", [*KINDS, "another format", "folder"])
def test_what_is_no_checkpoint(tmp_path, kind):
    """Each library has its own error for a file that is none: a reader gets one line."""
    path = tmp_path / "a.pt"
    damaged(path, kind)
    for read in (load_checkpoint, load_model):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert "a.pt" in one_line(error)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: s["config"].update(n_layer=3), "holds no GPT"),
        (lambda s: s["config"].update(n_embd=25), "holds no GPT"),
        (lambda s: s["config"].update(dropout=0.1), "holds no GPT"),
        (lambda s: s["model"].pop("ln_f.bias"), "holds no GPT"),
        (lambda s: s.pop("config"), "config"),
        (lambda s: s.pop("meta"), "meta"),
        (lambda s: s["model"].update({"wte.weight": 3}), "holds no GPT"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, word):
    """Weights missing or too many, loaded anyway, would babble from random ones."""
    state = tiny_state()
    change(state)
    save_checkpoint(tmp_path / "a.pt", state)
    with pytest.raises(CheckpointError, match=word) as error:
        load_model(tmp_path / "a.pt")
    one_line(error)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "empty", "truncated", "no metadata", "bad metadata", "lacking"]
)
def test_what_is_no_safetensors_of_ours(tmp_path, kind):
    """Foreign weights without sizes and meta must be named as such, in one line."""
    path = tmp_path / "model.safetensors"
    weights = to_openai(tiny_model().state_dict())
    if kind == "text":
        path.write_text("these are not the weights", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save_file(weights, path, safetensors_header(TINY, META))
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "no metadata":
        save_file(weights, path)
    elif kind == "bad metadata":
        save_file(weights, path, {"config": json.dumps([1]), "meta": "{}"})
    elif kind == "lacking":
        weights.popitem()
        save_file(weights, path, safetensors_header(TINY, META))
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert "model.safetensors" in one_line(error)


def test_the_newest_checkpoint_is_chosen(tmp_path, monkeypatch):
    """A half-written hidden file, a dangling link, or the name's order, must not decide what is shown."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="train first"):
        chosen_weights()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "link.pt").symlink_to("nowhere.pt")
    with pytest.raises(CheckpointError, match="train first"):
        chosen_weights()
    for age, name in enumerate(["b.pt", "a.pt", "notes.txt", ".c.pt-x1.pt"]):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1000 + age, 1000 + age))
    assert chosen_weights().name == "a.pt"
    assert chosen_weights("x/y.pt") == module.Path("x/y.pt")


def test_every_torch_load_is_weights_only():
    """One torch.load without weights_only anywhere opens the door again."""
    package = module.Path(module.__file__).parent
    calls = [
        (path.name, line.strip())
        for folder in (package, package.parent / "space", package.parent / "benchmarks")
        for path in folder.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "torch.load(" in line
    ]
    assert calls and all("weights_only=True" in line for _, line in calls), calls
