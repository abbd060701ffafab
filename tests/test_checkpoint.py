"""Checkpoints and weights: whole or not at all, read without running code, and refused in one line."""

import contextlib
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
from small_run import one_line

from shakespeare_gpt.data import PACKAGE
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.runs.weights import (
    FORMAT,
    CheckpointError,
    from_openai,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    replacing,
    save_checkpoint,
    save_safetensors,
    to_openai,
)

TINY = GPTConfig(vocab_size=101, n_positions=16, window=9, n_embd=24, n_layer=2, n_head=3)
META = {"preset": "tiny", "steps": 12, "loss": 0.0987, "text_name": "Märchen", "first": None}


def tiny_model(seed: int = 0) -> GPT:
    model = GPT(TINY, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.01 * i)  # biases and gains of their own
    return model


def header(config=TINY, meta=META) -> dict[str, str]:
    """What a safetensors file of ours says about its tensors."""
    sizes = config if isinstance(config, dict) else asdict(config)
    return {"config": json.dumps(sizes), "meta": json.dumps(meta)}


def tiny_state(seed: int = 0) -> dict:
    model = tiny_model(seed)
    return {"model": model.state_dict(), "config": asdict(TINY), "step": 12, "meta": META}


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


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    """Whatever is written through ``replacing``: an error, or no file at all, leaves the old one."""
    path = tmp_path / "new" / "a.bin"
    with replacing(path) as part:
        part.write_bytes(b"first")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_bytes(b"half of the sec")
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="could not be written"), replacing(path):
        pass
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path):
    """A file of half a gigabyte for each kill, hidden, until the disk is full."""
    dead, alive = tmp_path / ".a.pt.0dead.part", tmp_path / ".a.pt.a11fe.part"
    for part in (dead, alive):
        part.write_bytes(b"half a checkpoint")
    os.utime(dead, (1000, 1000))
    path = save_checkpoint(tmp_path / "a.pt", tiny_state())
    assert set(tmp_path.iterdir()) == {path, alive}


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """Two notebooks trained into one checkpoint: most reads met a damaged one."""
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
    """Weights in another layout would sample something else."""
    save_checkpoint(tmp_path / "a.pt", tiny_state())
    model, meta = load_model(tmp_path / "a.pt")
    assert_same_model(model, tiny_model())
    assert meta == META and model.config == TINY
    assert model.wte.weight.dtype == torch.float32 and model.device.type == "cpu"
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(model(ids), tiny_model()(ids))


def test_weights_without_a_window_are_read_through_their_whole_context(tmp_path):
    """Weights older than the window were trained with whole windows: they are as good as they were."""
    state = tiny_state()
    del state["config"]["window"]
    model, _ = load_model(save_checkpoint(tmp_path / "old.pt", state))
    assert model.config.sampling_window == 16 and tiny_model().config.sampling_window == 9


def test_load_model_draws_no_random_numbers(tmp_path):
    """Loading weights must not disturb anybody's random numbers, nor fall back on random weights."""
    save_checkpoint(tmp_path / "a.pt", tiny_state())
    state = torch.get_rng_state()
    load_model(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), state)


def test_safetensors_round_trip(tmp_path):
    """The Space reads this file: transposed back wrongly, a square matrix fails without an error."""
    path = tmp_path / "model.safetensors"
    assert save_safetensors(tiny_model(), path, META) == path
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


@pytest.mark.parametrize(
    "kind",
    ["missing", "truncated", "empty", "text", "zip", "list", "another program", "another format", "folder"],
)
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
        (lambda s: s["config"].update(n_layer=3), "is no readable GPT"),
        (lambda s: s["config"].update(n_embd=25), "is no readable GPT"),
        (lambda s: s["config"].update(dropout=0.1), "is no readable GPT"),
        (lambda s: s["config"].update(window=17), "is no readable GPT"),
        (lambda s: s["config"].update(window=None), "is no readable GPT"),
        (lambda s: s["model"].pop("ln_f.bias"), "is no readable GPT"),
        (lambda s: s.pop("config"), "is no readable GPT"),
        (lambda s: s.pop("meta"), "metadata is no table"),
        (lambda s: s["model"].update({"wte.weight": 3}), "is no readable GPT"),
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


KINDS = [
    "missing",
    "folder",
    "text",
    "empty",
    "truncated",
    "no metadata",
    "bad metadata",
    "no json",
    "lacking",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_safetensors_of_ours(tmp_path, kind):
    """Foreign weights without sizes and meta must be named as such, in one line."""
    path = tmp_path / "model.safetensors"
    weights = to_openai(tiny_model().state_dict())
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("these are not the weights", encoding="utf-8")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save_file(weights, path, header())
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "no metadata":
        save_file(weights, path)
    elif kind == "bad metadata":
        save_file(weights, path, {"config": json.dumps([1]), "meta": "{}"})
    elif kind == "no json":
        save_file(weights, path, {"config": "{", "meta": "{}"})
    elif kind == "lacking":
        weights.popitem()
        save_file(weights, path, header())
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert "model.safetensors" in one_line(error)


@pytest.mark.parametrize("layers", [8000, 10**9, 3, 1, 0, -1, "2", 2.5, None], ids=str)
def test_a_header_is_held_against_the_tensors_before_anything_is_built(tmp_path, monkeypatch, layers):
    """A file of 200 bytes that claimed 8,000 layers kept the loader busy for 48 seconds."""
    path = tmp_path / "model.safetensors"
    save_file(to_openai(tiny_model().state_dict()), path, header({**asdict(TINY), "n_layer": layers}))

    def build(*arguments, **options):
        raise AssertionError("a model was built")

    monkeypatch.setattr(GPT, "__init__", build)
    with pytest.raises(CheckpointError, match="is no readable GPT") as error:
        load_model(path)
    one_line(error)


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 10**12}, {"n_positions": 10**12}, {"n_embd": 3 * 10**9}], ids=str
)
def test_sizes_that_no_machine_holds_are_refused(tmp_path, sizes):
    """A header that asks for terabytes must end in one line, not in the end of the process."""
    path = tmp_path / "model.safetensors"
    save_file(to_openai(tiny_model().state_dict()), path, header({**asdict(TINY), **sizes}))
    with pytest.raises(CheckpointError, match="is no readable GPT") as error:
        load_model(path)
    one_line(error)


def test_another_vocabulary_is_refused_where_it_matters(tmp_path):
    """Weights of another tokenizer say nonsense, or ask for letters that do not exist."""
    path = save_safetensors(tiny_model(), tmp_path / "model.safetensors", META)
    assert load_model(path, vocab_size=101)[0].config == TINY
    with pytest.raises(CheckpointError, match="vocabulary has 101 tokens, not 50257") as error:
        load_model(path, vocab_size=50257)
    one_line(error)


def test_the_newest_checkpoint_is_chosen(tmp_path, monkeypatch):
    """A half-written hidden file, a dangling link, or the name's order, must not decide what is shown."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="train first"):
        newest_checkpoint()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with contextlib.suppress(OSError):  # Windows asks for a privilege
        (folder / "link.pt").symlink_to("nowhere.pt")
    with pytest.raises(CheckpointError, match="train first"):
        newest_checkpoint()
    for age, name in enumerate(["b.pt", "a.pt", "notes.txt", ".c.pt.x1.part"]):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (1000 + age, 1000 + age))
    assert newest_checkpoint().name == "a.pt"


def test_every_torch_load_is_weights_only():
    """One torch.load without weights_only anywhere opens the door again."""
    folders = (PACKAGE, PACKAGE.parent / "space", PACKAGE.parent / "benchmarks", PACKAGE.parent / "tools")
    calls = [
        (path.name, line.strip())
        for folder in folders
        for path in folder.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "torch.load(" in line
    ]
    assert calls and all("weights_only=True" in line for _, line in calls), calls
