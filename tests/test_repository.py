"""The repository as a whole: one address, versions that agree, nothing that does not belong in it."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from shakespeare_gpt.address import ADDRESS, change, files

INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt"
TEST_COMMAND = (
    f"{INSTALL} -r requirements-dev.txt -c constraints.txt && .venv/bin/python -m pytest -q"
)
# Written in parts, so that this file does not hold what it looks for.
LOCAL_PATH = re.compile("/" + r"(?:work|root|home|tmp|Users)/[\w.-]+")
WEIGHTS = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".onnx", ".gguf"}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [p for name in done.stdout.split("\0") if name and (p := REPOSITORY / name).is_file()]


# --- the address ------------------------------------------------------------------------------------


def addresses(text: str) -> set[str]:
    """Every form in which a page names this project: plain links, Colab's, raw files."""
    pattern = (
        r"(?:(?<=://github\.com/)|(?<=\.google\.com/github/)|(?<=usercontent\.com/))[\w-]+/[\w.-]+"
    )
    found = {slug.rstrip(".").removesuffix(".git") for slug in re.findall(pattern, text)}
    return {slug for slug in found if slug.lower().endswith("shakespeare-gpt") or "OWNER" in slug}


def test_the_address_is_one():
    """A badge that still points at an old address opens somebody else's notebook."""
    slug = ADDRESS.removeprefix("https://github.com/")
    for path in tracked():
        if path.suffix in (".md", ".ipynb", ".txt", ".toml", ".html"):
            others = addresses(path.read_text(encoding="utf-8")) - {slug}
            assert not others, (path.name, others)
    for path in files():
        if "space" not in path.parts:  # the Space's page may do without
            assert slug in path.read_text(encoding="utf-8"), path.name


def test_one_command_changes_it_everywhere(repository_copy, tmp_path):
    """A command that misses a file leaves a badge behind; one that hits too much breaks a notebook."""
    copy = Path(
        shutil.copytree(
            repository_copy,
            tmp_path / "repo",
            ignore=shutil.ignore_patterns("checkpoints", "build"),
        )
    )
    new, old_slug = (
        "https://github.com/some-one/their.gpt-2",
        ADDRESS.removeprefix("https://github.com/"),
    )
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def address(*arguments: str) -> str:
        command = [sys.executable, "-B", "-m", "shakespeare_gpt.address", *arguments]
        return subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout

    assert address().strip() == ADDRESS
    address(new + ".git")
    assert address().strip() == new
    after = {path: path.read_bytes() for path in before}
    for path, old in before.items():
        assert after[path] == old.replace(old_slug.encode(), b"some-one/their.gpt-2"), path.name
    assert sum(after[path] != before[path] for path in before) >= 2
    address(ADDRESS)  # and back
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "bad", ["shakespeare", "https://github.com/me", "https://example.org/a/b", "", 'x"y']
)
def test_no_address_changes_nothing(bad, tmp_path):
    """A mistyped address would be written into every file before anybody saw it."""
    (tmp_path / "README.md").write_text(ADDRESS, encoding="utf-8")
    with pytest.raises(ValueError, match="no address"):
        change(bad, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == ADDRESS


# --- versions ---------------------------------------------------------------------------------------


def requirements(name: str) -> list[Requirement]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_every_requirement():
    """An unpinned requirement is another one tomorrow; a pin outside the range cannot be installed."""
    pins = {}
    for pin in requirements("constraints.txt"):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        pins.setdefault(pin.name, []).append(pin)
    ranges = [*requirements("requirements.txt"), *requirements("requirements-dev.txt")]
    assert {r.name for r in ranges} == set(pins)
    for wanted in ranges:
        for pin in pins[wanted.name]:
            assert wanted.specifier.contains(str(pin.specifier)[2:]), (wanted, pin)
        for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
            fitting = [
                p
                for p in pins[wanted.name]
                if not p.marker or p.marker.evaluate({"python_version": python})
            ]
            assert len(fitting) == 1, (wanted.name, python)


def test_imports_are_required():
    """A package that happens to be installed here is missing on a fresh machine."""
    names = {r.name.replace("-", "_").lower() for r in requirements("requirements.txt")}
    names |= set(sys.stdlib_module_names) | {
        "shakespeare_gpt",
        "numpy",
        "ipython",
        "pil",
    }  # of matplotlib, jupyter
    for path in (REPOSITORY / "shakespeare_gpt").glob("*.py"):
        pattern = r"^\s*(?:import|from) +([A-Za-z_]\w*)"
        imported = set(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))
        found = {name for name in imported if name.lower() not in names}
        assert not found, (path.name, found)


def imported(node: ast.AST) -> set[str]:
    """The modules that are imported as a file is: not those inside functions."""
    names = set()
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names.add(part.module)
        elif not isinstance(part, ast.FunctionDef):
            names |= imported(part)
    return names


def test_what_the_space_imports_is_required_there():
    """A Space installs its own short list: one import more, and no Space starts any longer."""
    names = {r.name.replace("-", "_").lower() for r in requirements("space/requirements.txt")}
    names |= set(sys.stdlib_module_names) | {"spaces"}  # Hugging Face's own, where there is one
    waiting, seen = [REPOSITORY / "space" / "app.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path.name)
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            package, _, module = name.partition(".")
            if package != "shakespeare_gpt":
                assert package.lower() in names, (path.name, name)
            elif module and f"{module}.py" not in seen:
                waiting.append(REPOSITORY / "shakespeare_gpt" / f"{module}.py")
    assert {"app.py", "generate.py", "recite.py", "model.py"} <= seen


# --- what lies in it --------------------------------------------------------------------------------


def test_no_weights_and_nothing_large():
    """Weights in git make every clone half a gigabyte, for ever."""
    for path in tracked():
        assert path.suffix not in WEIGHTS, path.name
        assert path.stat().st_size < 5_000_000, path.name


def test_no_local_paths():
    """A path of one machine, in a log or in a page, helps nobody and tells too much."""
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        if path.suffix != ".ipynb":  # see test_notebooks: there pictures are text
            found = LOCAL_PATH.search(text)
            assert not found, (path.name, found)


def test_files_are_opened_as_utf8():
    """On Windows ``open`` without an encoding reads the text as something else."""
    call = re.compile(r"(?:\bopen|\.read_text|\.write_text)\((?!\s*\))[^\n]*|\.read_text\(\)")
    for path in [p for p in tracked() if p.suffix == ".py" and "tests" not in p.parts]:
        source = path.read_text(encoding="utf-8")
        for match in call.finditer(source):
            after = source[match.start() : match.start() + 300]
            binary = re.search(r"""["'][rwa]\+?b["']""", after)
            named = re.search(
                r"(safe_open|fdopen|urlopen|Image\.open|webbrowser\.open)\($",
                source[: match.start() + 5],
            )
            assert "encoding" in after or binary or named, (path.name, match.group())


def test_the_code_is_tidy():
    """ruff finds names that do not exist, and keeps one style."""
    for arguments in (["check", "-q"], ["format", "--check", "-q"]):
        command = [sys.executable, "-m", "ruff", *arguments, "."]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_readme_and_ci_run_the_same():
    """A green CI says nothing about the command that a reader types, if that is another one."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert TEST_COMMAND in readme
    assert (
        f"command='{TEST_COMMAND}'"
        in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    )
    commands = [line for line in readme if line.startswith(INSTALL)]
    assert len(commands) == 2 and commands[1] == TEST_COMMAND
    assert "notebooks/*.ipynb" in commands[0] and "nbconvert" in commands[0]


def test_readme_names_files_that_exist():
    """A link to a figure that was renamed shows a broken picture on the first page."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)#\s]+)\)", readme), *re.findall(r'src="([^"]+)"', readme)]
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert local and not [link for link in local if not (REPOSITORY / link).exists()]
