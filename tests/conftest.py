"""What all tests share: an environment of their own, few threads, and Tiny Shakespeare where it is at hand."""

import os
import shutil
from pathlib import Path

# A reader's settings must not decide what is tested. Read before anything imports the package.
TINY_SHAKESPEARE = os.environ.get("SHAKESPEARE_GPT_TINYSHAKESPEARE", "")
for name in [name for name in os.environ if name.startswith("SHAKESPEARE_GPT_")]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
os.environ.setdefault("MPLBACKEND", "Agg")
# The models here are so small that a second thread only waits, and on a busy machine for long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run: a red test stays red until it is mended. No deadlines: machines are busy.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Downloads of a test go to a folder that vanishes, and never to the reader's own cache."""
    monkeypatch.setenv("SHAKESPEARE_GPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_shakespeare_path() -> Path:
    """The copy that SHAKESPEARE_GPT_TINYSHAKESPEARE names or that lies beside the checkout; else skip."""
    named = Path(TINY_SHAKESPEARE) if TINY_SHAKESPEARE and "://" not in TINY_SHAKESPEARE else None
    for path in filter(None, (named, REPOSITORY.parent / "shared" / "tinyshakespeare.txt")):
        if path.is_file():
            return path
    pytest.skip("no copy of Tiny Shakespeare here: name one in SHAKESPEARE_GPT_TINYSHAKESPEARE")


# What git ignores, and git itself: a copy of the rest is what somebody else gets.
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "venv",
    "build",
    "checkpoints",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".ipynb*",
)


@pytest.fixture(scope="session")
def repository_copy(tmp_path_factory) -> Path:
    """The repository in a temporary folder, so that no test writes into the checkout."""
    return Path(
        shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("copy") / "repo", ignore=LEFT_OUT)
    )
