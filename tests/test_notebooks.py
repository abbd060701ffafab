"""The notebooks: each one runs at the smoke preset, and the committed ones are what a reader should see."""

import ast
import base64
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY

from tools.address import ADDRESS
from tools.check_notebooks import violations
from tools.execute_notebooks import fingerprint

FIRST_CELL = f"""\
import importlib.util
if not importlib.util.find_spec("shakespeare_gpt"):
    %pip install -q git+{ADDRESS}
from shakespeare_gpt.notebook import setup
preset = setup()"""
NAMES = ["01_tokenization", "02_architecture", "03_training", "04_memorization", "05_sampling", "06_space"]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|content)/[\w.-]+")


def cells(path: Path, kind: str | None = None) -> list:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if kind is None or cell.cell_type == kind]


def text_of(output) -> str:
    """All that an output shows as text; pictures left out."""
    data = output.get("data", {})
    texts = [v for k, v in data.items() if not k.startswith(("image/png", "image/jpeg"))]
    return json.dumps([texts, output.get("text", ""), output.get("traceback", "")])


def environment(**more: str) -> dict[str, str]:
    """What a kernel is started with: the smoke preset, and nothing of the tests' own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYTHONPATH")}
    return {**kept, "SHAKESPEARE_GPT_PRESET": "smoke", **more}


def run(*command: str | os.PathLike, cwd: Path, **more: str) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_clean(notebook) -> None:
    """No error, no warning, no path of the machine, in any output."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            start = cell.source[:80]
            assert output.output_type != "error", start
            assert output.get("name") != "stderr", (start, output.get("text"))
            assert not LOCAL_PATH.search(text_of(output)), (start, text_of(output)[:500])


# --- they run ---------------------------------------------------------------------------------------


@each
def test_runs_at_smoke(path, repository_copy):
    """A change of the package that breaks a notebook must not wait for a reader to find it."""
    if path.stem.startswith("04"):  # this one must train on the spot; the next finds its checkpoint
        shutil.rmtree(repository_copy / "checkpoints", ignore_errors=True)
    copy = repository_copy / "notebooks" / path.name
    before = {p.name for p in (REPOSITORY / "checkpoints").glob("*")}
    run(sys.executable, repository_copy / "tools" / "execute_notebooks.py", copy, cwd=repository_copy)
    for cell in nbformat.read(copy, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", (cell.source[:80], output.get("text"))
    assert {p.name for p in (REPOSITORY / "checkpoints").glob("*")} == before


def fresh_python(folder: Path) -> Path:
    """The Python of a new virtual environment that sees what is installed here, but not this package."""
    venv.EnvBuilder(symlinks=os.name != "nt").create(folder)
    base = {"base": str(folder), "platbase": str(folder)}
    installed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    # What such a file names is searched, but the path files in there are not read: no editable installation.
    site = Path(sysconfig.get_path("purelib", vars=base))
    (site / "installed.pth").write_text("\n".join(installed), encoding="utf-8")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test_runs_alone_as_in_colab(tmp_path, repository_copy):
    """In a fresh Colab tab there is the notebook and nothing else: its first cell must fetch the rest."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    served = tmp_path / "served"
    shutil.copytree(repository_copy, served, ignore=shutil.ignore_patterns("checkpoints", "build"))
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], cwd=served, check=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(NOTEBOOKS[0], alone)
    python = fresh_python(tmp_path / "venv")
    run(
        *(python, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done", NOTEBOOKS[0].name),
        cwd=alone,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.{served.as_uri()}.insteadOf",
        GIT_CONFIG_VALUE_0=ADDRESS,
        PIP_NO_INDEX="1",  # the requirements are installed: nothing may be fetched
        PIP_NO_BUILD_ISOLATION="0",  # pip reads this as "without isolation", and "1" as "with"
    )
    assert list((tmp_path / "venv").rglob("shakespeare_gpt/gpt2.tiktoken"))
    assert (alone / "done.ipynb").is_file()


# --- what is committed ------------------------------------------------------------------------------


def test_all_six_are_there():
    """The README and the chain of links promise six."""
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each
def test_executed_in_order(path):
    """Cells run out of order show results that nobody gets who runs the notebook."""
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= len(code) / 2


@each
def test_sources_are_those_that_ran(path):
    """A cell edited after it was run stands above an output that it never gave."""
    notebook = nbformat.read(path, as_version=4)
    stamp = notebook.metadata.get("shakespeare_gpt", {}).get("code")
    assert stamp == fingerprint(notebook), f"run: python tools/execute_notebooks.py notebooks/{path.name}"


@each
def test_outputs_are_clean(path):
    """An error, a warning or somebody's home folder in a page that is meant to be read."""
    assert_clean(nbformat.read(path, as_version=4))


@each
def test_shows_the_run_of_the_readme(path):
    """Executed with another preset, or without Tiny Shakespeare, a page shows other numbers."""
    said = "".join(text_of(output) for cell in cells(path, "code") for output in cell.outputs)
    assert "preset gpt2: " in said and "could not be downloaded" not in said


@each
def test_saved_small_and_valid(path):
    """GitHub refuses saved widget state and shows no large notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 5_000_000
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each
def test_sources_hold_no_local_path(path):
    """A path that exists on one machine only, in a cell or in the prose."""
    for cell in cells(path):
        assert not LOCAL_PATH.search(cell.source), cell.source[:80]


@each
def test_opens_in_colab_and_names_the_next(path):
    """A badge copied from the notebook before opens the wrong one."""
    all_cells = cells(path)
    slug = ADDRESS.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
    assert all_cells[0].cell_type == "markdown" and badge in all_cells[0].source
    assert all_cells[1].cell_type == "code" and all_cells[1].source == FIRST_CELL
    assert all_cells[-1].cell_type == "markdown" and "<details>" in all_cells[-1].source
    following = NAMES[NAMES.index(path.stem) + 1 :][:1]
    assert all(name in all_cells[-1].source for name in following)


@each
def test_reads_as_a_page(path):
    """Walls of code: short cells, and never more than two without prose between them."""
    kinds = "".join("c" if cell.cell_type == "code" else "m" for cell in cells(path))
    assert "ccc" not in kinds
    lengths = sorted(len(cell.source.splitlines()) for cell in cells(path, "code"))
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[-1] <= 30


@each
def test_code_opens_files_as_utf8(path):
    """On Windows ``open`` without an encoding reads the text as something else."""
    for cell in cells(path, "code"):
        source = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                keywords = {k.arg for k in node.keywords}
                binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:])
                if name in ("read_text", "write_text") or (name == "open" and not binary):
                    assert "encoding" in keywords, ast.unparse(node)


@each
def test_solutions_import_what_exists(path):
    """No test runs the solutions, so a name that has moved would be found by a reader only."""
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    for code in re.findall(r"```python\n(.*?)```", prose, re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("shakespeare_gpt"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@each
def test_is_easy_to_read(path):
    """Long cells, long paragraphs, nothing to do for the reader: nobody finishes such a notebook."""
    assert violations(path) == []


@each
def test_shows_the_present_pictures(path):
    """An attachment of last month beside the numbers of today."""
    for cell in cells(path, "markdown"):
        names = set(re.findall(r"attachment:([\w.-]+)", cell.source))
        assert names == set(cell.get("attachments", {}))
        for name in names:
            picture = (REPOSITORY / "figures" / name).read_bytes()
            assert base64.b64decode(cell.attachments[name]["image/png"]) == picture, name
