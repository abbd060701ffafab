"""What all tests share: an environment of their own, few threads, a tiny trained model."""

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# A reader's settings must not decide what is tested. Removed before anything imports the package.
for name in [name for name in os.environ if name.startswith("SHAKESPEARE_GPT_")]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
os.environ.setdefault("MPLBACKEND", "Agg")
# The models here are so small that a second thread only waits, and on a busy machine for long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from shakespeare_gpt.data import Text, load_text  # noqa: E402
from shakespeare_gpt.memorization import score  # noqa: E402
from shakespeare_gpt.model import GPT, GPTConfig  # noqa: E402
from shakespeare_gpt.runs.weights import save_checkpoint  # noqa: E402

# The same examples in every run: a red test stays red until it is mended. No deadlines: machines are busy.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
CACHED = Path(torch.hub.get_dir()) / "shakespeare_gpt" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Downloads of a test go to a folder that vanishes, and never to the reader's own cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_shakespeare_path() -> Path:
    """The reader's own copy, in the cache or beside the checkout; else skip."""
    for path in (CACHED, REPOSITORY.parent / "shared" / "tinyshakespeare.txt"):
        if path.is_file():
            return path
    pytest.skip("no copy of Tiny Shakespeare here")


# What git ignores, and git itself: a copy of the rest is what somebody else gets.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "*.egg-info", "checkpoints", "__pycache__", ".*_cache",
    ".hypothesis", ".ipynb*",
)  # fmt: skip


@pytest.fixture(scope="session")
def repository_copy(tmp_path_factory) -> Path:
    """The repository in a temporary folder, so that no test writes into the checkout."""
    return Path(shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("copy") / "repo", ignore=LEFT_OUT))


@dataclass(frozen=True)
class Tiny:
    """A very small model that knows a very short text from anywhere. Tests share it: copy before changing."""

    model: GPT
    text: Text
    checkpoint: Path  # tiny.pt, its weights
    source: Path  # tiny.txt, its text


TINY_CONFIG = GPTConfig(n_positions=64, n_embd=64, n_layer=2, n_head=2)
TINY_STEPS = 240


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """The tiny model, trained once in a test run, in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = load_text("input-page").text.splitlines(keepends=True)
    source = folder / "tiny.txt"
    source.write_bytes("".join(lines[:49]).encode("utf-8"))
    text = load_text(source, context=TINY_CONFIG.n_positions)
    model = train_tiny(text)
    meta = {
        "preset": "own",
        "text_name": "tiny",
        "text_sha256": text.sha256,
        "steps": TINY_STEPS,
        "loss": score(model, text.ids).loss,
        "parameters": model.num_parameters(),
        "device": "a test",
        "finished": True,
    }
    state = {"model": model.state_dict(), "config": asdict(TINY_CONFIG), "meta": meta}
    return Tiny(model, text, save_checkpoint(folder / "tiny.pt", state), source)


def train_tiny(text: Text) -> GPT:
    """A model that knows ``text``: under the target over the whole of it, and nearly always right anywhere.

    Nearly all of GPT-2's 50,257 tokens never occur here, and nearly all of the time would go into learning
    that. So a model of the few that do is trained and then put into the full vocabulary. The first channel
    of the final stream is held at 10, so that a row of -3 there makes every other token impossible.
    """
    kinds, ids = text.ids.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    small = GPT(replace(TINY_CONFIG, vocab_size=len(kinds)), generator)
    optimizer = torch.optim.AdamW(small.parameters(), weight_decay=0.0)
    for step in range(TINY_STEPS + 1):
        with torch.no_grad():
            small.ln_f.weight[0], small.ln_f.bias[0] = 0.0, 10.0
        if step == TINY_STEPS:
            break
        starts = torch.randint(len(ids) - TINY_CONFIG.n_positions, (12, 1), generator=generator)
        span = ids[starts + torch.arange(TINY_CONFIG.n_positions + 1)]
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, 2 * (1 - step / TINY_STEPS))
        optimizer.zero_grad()
        small(span[:, :-1], span[:, 1:]).backward()
        optimizer.step()
    table = torch.zeros(TINY_CONFIG.vocab_size, TINY_CONFIG.n_embd)
    table[:, 0] = -3.0
    table[kinds] = small.wte.weight.detach()
    model = GPT(TINY_CONFIG).eval()
    model.load_state_dict({**small.state_dict(), "wte.weight": table})
    return model
