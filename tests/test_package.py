"""Installing: a wheel brings all that the command needs, and an editable installation copies nothing."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from shakespeare_gpt.data import load_text
from shakespeare_gpt.publish.export import SPACE_FILES

# What the package says of itself, from wherever it was imported.
REPORT = """
import json
from shakespeare_gpt import data, tokenizer
places = [data.__file__, data.SHIPPED, tokenizer.VOCAB_FILE]
print(json.dumps([*map(str, places), data.load_text("input").sha256]))
"""


def run(*command: str | os.PathLike, cwd: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(source: Path, folder: Path, *kind: str) -> Path:
    """Build distributions of ``source`` into ``folder``, without a network."""
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, *kind, cwd=source)
    return folder


@pytest.fixture(scope="module")
def dist(repository_copy, tmp_path_factory):
    """A folder with a wheel and an sdist, built from what a clone holds."""
    return build(repository_copy, tmp_path_factory.mktemp("dist"))


def fresh(folder: Path, dist: Path) -> Path:
    """A virtual environment in ``folder`` with the wheel, our requirements in reach; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, *dist.glob("*.whl"), cwd=folder.parent)
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python


def test_a_wheel_works_where_there_is_no_repository(dist, tiny, tmp_path):
    """The vocabulary, input.txt or the page was missing in an installation, and only there."""
    python = fresh(tmp_path / "venv", dist)
    outside = tmp_path / "outside"
    outside.mkdir()
    module, shipped, vocabulary, sha256 = json.loads(run(python, "-c", REPORT, cwd=outside))
    for path in (module, shipped, vocabulary):
        assert Path(path).resolve().is_relative_to((tmp_path / "venv").resolve()), path
    assert sha256 == load_text("input").sha256
    command = python.parent / "shakespeare-gpt"
    out = run(
        command, "export", "--weights", tiny.checkpoint, "--text", tiny.source, "--stage", "space",
        cwd=outside,
    )  # fmt: skip
    assert "model.safetensors" in out
    for name in SPACE_FILES:
        assert (outside / "space" / name).read_bytes() == (REPOSITORY / "space" / name).read_bytes()
    assert not (outside / "space" / "shakespeare_gpt" / "space").exists()


def test_an_sdist_makes_the_same_wheel(dist, tmp_path):
    """pip builds from an sdist where it finds no wheel: what that leaves out is missing."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    names = []
    for folder in (dist, build(source, tmp_path / "again", "-t", "wheel")):
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names.append(set(archive.namelist()))
    assert names[0] == names[1]
    assert {"shakespeare_gpt/input.txt", "shakespeare_gpt/space/app.py"} <= names[0]
    assert not any("/logs/" in name for name in names[0])  # a Space staged from the wheel held them


def test_an_editable_installation_uses_the_clone(repository_copy, tmp_path):
    """A copy beside the clone's own file would be the one that is read, and edits would do nothing."""
    python = fresh(tmp_path / "venv", build(repository_copy, tmp_path / "dist", "-t", "wheel:editable"))
    found = json.loads(run(python, "-c", REPORT, cwd=tmp_path))[:3]
    for path in found:
        assert Path(path).resolve().is_relative_to(repository_copy.resolve()), path
    copies = [p for p in (tmp_path / "venv").rglob("*") if p.name in ("input.txt", "app.py", "gpt2.tiktoken")]
    assert not copies


def test_requirements_are_those_of_the_one_list(dist):
    """A list of its own in pyproject.toml would soon say something else than requirements.txt."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode("utf-8")
    required = {
        line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")
    }
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()

    def parse(texts):
        found = [Requirement(text) for text in texts]
        return {(r.name.replace("_", "-").lower(), str(r.specifier)) for r in found}

    assert parse(required) == parse(line for line in lines if line and not line.startswith("#"))
