"""A very small model that knows a very short text, trained in seconds: for the tests of export and Space."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from shakespeare_gpt.checkpoint import save_checkpoint
from shakespeare_gpt.data import Text, load_text, windows
from shakespeare_gpt.model import GPT, GPTConfig

CONFIG = GPTConfig(n_positions=64, n_embd=64, n_layer=2, n_head=2)


def tiny_model(text: Text) -> tuple[GPT, int, float]:
    """A model that knows ``text``, after how many steps, with which loss.

    Nearly all of GPT-2's 50,257 tokens never occur here, and nearly all of the time would go into learning
    that. So a model of the few that do is trained and then put into the full vocabulary. The first channel
    of the final stream is held at 10, so that a row of -3 there makes every other token impossible.
    """
    kinds, ids = text.ids.unique(return_inverse=True)
    small = GPT(replace(CONFIG, vocab_size=len(kinds)), torch.Generator().manual_seed(0)).train()
    # Windows from everywhere, so that it can be taken up anywhere.
    starts = torch.arange(0, len(ids) - CONFIG.n_positions, 13)
    x = ids[starts[:, None] + torch.arange(CONFIG.n_positions)]
    y = ids[starts[:, None] + torch.arange(1, CONFIG.n_positions + 1)]
    optimizer = torch.optim.AdamW(small.parameters(), lr=5e-3, weight_decay=0.0)
    loss, steps = torch.tensor(float("inf")), 0
    while loss > 0.06 and steps < 400:
        with torch.no_grad():
            small.ln_f.weight[0], small.ln_f.bias[0] = 0.0, 10.0
        loss = small(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        small.ln_f.weight[0], small.ln_f.bias[0] = 0.0, 10.0
    state = small.state_dict()
    table = torch.zeros(CONFIG.vocab_size, CONFIG.n_embd)
    table[:, 0] = -3.0
    table[kinds] = state["wte.weight"]
    model = GPT(CONFIG).eval()
    model.load_state_dict({**state, "wte.weight": table})
    _, x, y, _ = windows(text.ids, CONFIG.n_positions)
    with torch.no_grad():
        return model, steps, model(x, y).item()


def tiny_checkpoint(folder: Path) -> tuple[Path, Path, Text]:
    """Write tiny.pt and the text that it learnt, tiny.txt, into ``folder``."""
    text = load_text("input", context=64, max_tokens=400)
    source = folder / "tiny.txt"
    source.write_bytes(text.text.encode("utf-8"))
    model, steps, loss = tiny_model(text)
    meta = {
        "preset": "own",
        "text_name": "tiny",
        "text_sha256": text.sha256,
        "steps": steps,
        "loss": loss,
        "parameters": model.num_parameters(),
        "device": "a test",
        "finished": True,
    }
    state = {"model": model.state_dict(), "config": asdict(CONFIG), "step": steps, "meta": meta}
    return save_checkpoint(folder / "tiny.pt", state), source, text
