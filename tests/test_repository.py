"""The repository as a whole: its shape, one address, versions that agree, nothing that does not belong."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

import shakespeare_gpt
from shakespeare_gpt.publish.export import SPACE_FILES
from tools.address import ADDRESS, change, files
from tools.execute_notebooks import fingerprint

INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -e ."
TEST_COMMAND = f"{INSTALL} -r requirements-dev.txt -c constraints.txt && .venv/bin/python -m pytest -q"
# Written in parts, so that this file does not hold what it looks for.
LOCAL_PATH = re.compile("/" + r"(?:work|root|home|tmp|Users)/[\w.-]+")
WEIGHTS = {".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".onnx", ".gguf"}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [p for name in done.stdout.split("\0") if name and (p := REPOSITORY / name).is_file()]


# --- the shape --------------------------------------------------------------------------------------

PACKAGE = REPOSITORY / "shakespeare_gpt"
READING_PATH = ("tokenizer", "data", "model", "presets", "train", "sample", "memorization")
# Each room, and what its modules may import: what a reader has read before, never what is built on top.
MAY_IMPORT = {
    "reading path": {"reading path", "speed"},
    "speed": {"speed", "model"},
    "runs": {"runs", "reading path", "speed"},
    "publish": {"publish", "runs", "reading path", "speed"},
    "notebook": {"notebook", "publish", "runs", "reading path", "speed"},
    "cli": {"notebook", "publish", "runs", "reading path", "speed"},
    "__main__": {"cli"},
}


def module_name(path: Path) -> str:
    """shakespeare_gpt/speed/muon.py -> speed.muon; a package's __init__.py has the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return "reading path" if module in READING_PATH else module.split(".")[0]


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def package_imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of what a file imports of the package, in functions too; (module, "") for a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: write the import in full"
            named = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for source, name in named:
            package, _, module = source.partition(".")
            if package == "shakespeare_gpt":
                inner = f"{module}.{name}".strip(".")
                found.add((inner, "") if inner in MODULES else (module, name))
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_imports_go_one_way(module):
    """The reading path could only be read with all that is built on top of it."""
    allowed = MAY_IMPORT.get(room(module))
    assert allowed, f"{MODULES[module]} is in no room: see MAY_IMPORT here, and the layout in CONTRIBUTING.md"
    for other, name in sorted(package_imports(MODULES[module])):
        if not other:  # the package itself, which holds the errors' common class
            continue
        assert other in MODULES, f"{module} imports shakespeare_gpt.{other}, which does not exist"
        where = f"{module} imports {f'{name} of {other}' if name else other}"
        assert room(other) in allowed or other in allowed, (
            f"{where}: {room(module)} may import only {', '.join(sorted(allowed))}"
        )
        assert not name.startswith("_"), f"{where}: that name is private"
        if room(module) == "reading path" and room(other) == "speed":
            assert name, f"{where}: name the function that it needs"


def test_imports_have_no_circle():
    """Two modules that import each other can only be read, tested and moved together."""
    graph = {m: {other for other, _ in package_imports(path) if other} for m, path in MODULES.items()}
    circle = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, "modules that import each other: " + " <- ".join(circle)


def test_tests_use_public_names():
    """A test that holds on to a private name has to be rewritten with every inner change."""
    for path in (REPOSITORY / "tests").glob("*.py"):
        private = [f"{module}.{name}" for module, name in package_imports(path) if name.startswith("_")]
        assert not private, (path.name, private)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_package_stays_small():
    """It had 4,454 lines, which nobody reads. Move or remove; do not raise the limits."""
    reading = {name: lines(PACKAGE / f"{name}.py") for name in READING_PATH}
    assert sum(reading.values()) <= 1_250, f"reading path: {sum(reading.values())} lines, {reading}"
    every = {name: lines(path) for name, path in MODULES.items()}
    long = {name: count for name, count in every.items() if count > 350}
    assert not long, f"files of more than 350 lines: {long}"
    assert sum(every.values()) <= 3_000, f"the package: {sum(every.values())} lines"


def test_the_space_stays_small():
    """The page was one file of 1,045 lines."""
    page = {
        name: lines(REPOSITORY / "space" / name) for name in SPACE_FILES if name.endswith((".py", ".css"))
    }
    assert len(page) == 5 and sum(page.values()) <= 750, f"{sum(page.values())} lines, {page}"
    code = {p.name for p in (REPOSITORY / "space").iterdir() if p.suffix in (".py", ".css", ".js", ".html")}
    assert code == set(page)


# --- the address ------------------------------------------------------------------------------------


def addresses(text: str) -> set[str]:
    """Every form in which a page names this project: plain links, Colab's, raw files."""
    pattern = r"(?:(?<=://github\.com/)|(?<=\.google\.com/github/)|(?<=usercontent\.com/))[\w-]+/[\w.-]+"
    found = {slug.rstrip(".").removesuffix(".git") for slug in re.findall(pattern, text)}
    return {slug for slug in found if slug.lower().endswith("shakespeare-gpt") or "OWNER" in slug}


def test_the_address_is_one():
    """A badge that still points at an old address opens somebody else's notebook."""
    slug = ADDRESS.removeprefix("https://github.com/")
    for path in tracked():
        if path.suffix in (".md", ".ipynb", ".txt", ".toml", ".html", ".cff", ".yml"):
            others = addresses(path.read_text(encoding="utf-8")) - {slug}
            assert not others, (path.name, others)
    names = {
        path.relative_to(REPOSITORY).as_posix()
        for path in files()
        if slug in path.read_text(encoding="utf-8")
    }
    assert {"tools/address.py", "README.md", "pyproject.toml", "CITATION.cff", "CONTRIBUTING.md"} <= names
    assert sum(name.startswith("notebooks/") for name in names) == 6


def test_one_command_changes_it_everywhere(repository_copy, tmp_path):
    """A command that misses a file leaves a badge behind; one that hits too much breaks a notebook."""
    copy = Path(
        shutil.copytree(
            repository_copy, tmp_path / "repo", ignore=shutil.ignore_patterns("checkpoints", "build")
        )
    )
    new, old_slug = ("https://github.com/some-one/their.gpt-2", ADDRESS.removeprefix("https://github.com/"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def address(*arguments: str) -> str:
        command = [sys.executable, "-B", "tools/address.py", *arguments]
        return subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout

    assert address().strip() == ADDRESS
    address(new + ".git")
    assert address().strip() == new
    after = {path: path.read_bytes() for path in before}
    for path, old in before.items():
        assert after[path] == old.replace(old_slug.encode(), b"some-one/their.gpt-2"), path.name
    assert (
        b"git+https://github.com/some-one/their.gpt-2" in after[copy / "notebooks" / "01_tokenization.ipynb"]
    )
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


# --- the notebooks' tool ------------------------------------------------------------------------------


def test_executed_notebooks_bring_their_pictures(tmp_path):
    """A picture in ``figures`` that another run drew shows other numbers than the notebook beside it."""
    for folder in ("tools", "notebooks", "build/figures"):
        (tmp_path / folder).mkdir(parents=True)
    tool = shutil.copy(REPOSITORY / "tools" / "execute_notebooks.py", tmp_path / "tools")
    (tmp_path / "build" / "figures" / "old.png").write_bytes(b"of another run")
    code = "from pathlib import Path\nprint(Path('../build/figures/new.png').write_bytes(b'drawn'))"
    path = tmp_path / "notebooks" / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    subprocess.run([sys.executable, tool, path], check=True, cwd=tmp_path)
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["new.png"]
    executed = nbformat.read(path, as_version=4)
    assert executed.cells[0].outputs[0].text == "5\n"
    assert executed.metadata["shakespeare_gpt"]["code"] == fingerprint(executed)
    executed.cells[0].source += "\nprint('changed')"
    assert executed.metadata["shakespeare_gpt"]["code"] != fingerprint(executed)


def test_a_new_address_does_not_make_a_notebook_stale():
    """After a fork had changed the address, every notebook would have to be executed again."""
    first = "import importlib.util\n    %pip install -q git+https://github.com/{}/shakespeare-gpt\nsetup()"
    stamps = {
        fingerprint(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(first.format(owner))]))
        for owner in ("OWNER", "somebody")
    }
    assert len(stamps) == 1


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
                p for p in pins[wanted.name] if not p.marker or p.marker.evaluate({"python_version": python})
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
    for path in PACKAGE.rglob("*.py"):
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
    waiting, seen = ["app"], set()
    page = {path.stem: path for path in (REPOSITORY / "space").glob("*.py")}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        path = page.get(name) or MODULES[name]
        for source in imported(ast.parse(path.read_text(encoding="utf-8"))):
            package, _, module = source.partition(".")
            if package in page or package == "shakespeare_gpt":
                waiting += {package if package in page else module} - seen
            else:
                assert package.lower() in names, (path.name, source)
    assert {*page, "sample", "publish.quotations", "model"} <= seen


def test_the_citation_names_this_version():
    """Whoever cites the project would cite another version of it."""
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {shakespeare_gpt.__version__}\n" in citation
    assert f"\nrepository-code: {ADDRESS}\n" in citation


def test_the_numbers_of_the_readme_are_those_of_the_log():
    """A figure that no run has reached, or that an earlier recipe did."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    notebook = (REPOSITORY / "notebooks" / "03_training.ipynb").read_text(encoding="utf-8")
    log = (REPOSITORY / "logs" / "train.log").read_text(encoding="utf-8")
    loss = re.search(r"# whole text: ([\d.]+) nats", log)[1]
    tokens = re.search(r"# (\d+) tokens, ", log)[1]
    perfect = re.search(r"# from anywhere: .* at 200 places: .* all right at (\d+)%", log)[1]
    assert f"{float(loss):.4f} nats" in readme and f"{float(loss):.4f} nats" in notebook
    assert f"{int(tokens) / 1e6:.2f} million" in readme and f"{int(tokens) / 1e6:.2f} million" in notebook
    assert f"at {perfect}%" in readme
    assert "# preset: gpt2\n" in log and " seed=0" in log


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
                r"(safe_open|fdopen|urlopen|Image\.open|webbrowser\.open)\($", source[: match.start() + 5]
            )
            assert "encoding" in after or binary or named, (path.name, match.group())


def test_readme_ci_and_workflow_run_the_same():
    """A green CI says nothing about the command that a reader types, if that is another one."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in readme if line.startswith(INSTALL)]
    assert len(commands) == 2 and commands[1] == TEST_COMMAND
    assert "notebooks/*.ipynb" in commands[0] and "nbconvert" in commands[0]
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert f"command='{TEST_COMMAND}'" in ci
    workflow = (REPOSITORY / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    for command in commands:
        assert f"        run: {command}\n" in workflow
    for step in ("check", "format --check"):
        assert f"lint {step}" in ci and f"run: ruff {step} .\n" in workflow


def test_workflows_may_do_little():
    """A workflow that may write, or an action that is whatever its branch holds today, is a way in."""
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        workflow = path.read_text(encoding="utf-8")
        assert "\npermissions:\n  contents: read\n" in workflow and ": write" not in workflow
        used = re.findall(r"uses: (\S+)", workflow)
        assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used), used


def test_pages_name_files_that_exist():
    """A link to a figure that was renamed shows a broken picture on the first page."""
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")):
        text = page.read_text(encoding="utf-8")
        links = [*re.findall(r"\]\(([^)#\s]+)", text), *re.findall(r'src="([^"]+)"', text)]
        named = [page.parent / link for link in links if "://" not in link and not link.startswith("mailto:")]
        named += [
            REPOSITORY / path for path in re.findall(r"`((?:shakespeare_gpt|tests|tools)/[\w./]+)`", text)
        ]
        missing = [str(path) for path in named if not path.exists()]
        assert not missing, f"{page.name} names files that do not exist: {missing}"
