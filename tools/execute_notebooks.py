"""Execute notebooks as they are committed: ``python tools/execute_notebooks.py notebooks/*.ipynb``.

Each runs from top to bottom in a fresh kernel, with the package of this clone. It is written back without
widget state and timings, and with a fingerprint of its code, by which a test sees that no cell was changed
afterwards. The pictures that it drew go from ``build/figures`` to ``figures``. With ``--to FOLDER`` nothing
here changes: the notebooks go there, and the pictures stay where they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all code cells, but for the line that holds the repository's address."""
    lines = [
        line
        for cell in notebook.cells
        if cell.cell_type == "code"
        for line in [*cell.source.split("\n"), "---"]
        if not line.lstrip().startswith("%pip install")
    ]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def join_streams(cell: nbformat.NotebookNode) -> None:
    """Make one output of what a cell printed: a busy kernel sends it in pieces."""
    joined = []
    for output in cell.get("outputs", []):
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            joined.append(output)
    if cell.cell_type == "code":
        cell.outputs = joined


def execute(path: Path, target: Path) -> None:
    """Run a notebook in its own folder and write it, stamped, to ``target``; an error in a cell is raised."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,  # the training cell of a large preset takes as long as it takes
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.resolve().parent)}},
    ).execute()
    for cell in notebook.cells:
        join_streams(cell)
    notebook.metadata.pop("widgets", None)  # widget state that GitHub refuses to show
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["shakespeare_gpt"] = {"code": fingerprint(notebook)}
    nbformat.validate(notebook)
    nbformat.write(notebook, target)


def pictures() -> dict[Path, int]:
    """The pictures that notebooks have drawn here, and when."""
    drawn = [p for p in (ROOT / "build" / "figures").glob("*") if p.suffix in (".png", ".gif")]
    return {path: path.stat().st_mtime_ns for path in drawn}


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks as they are committed.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: in place")
    options = parser.parse_args()
    others = [path for path in [os.environ.get("PYTHONPATH")] if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    for path in options.notebooks:
        target, before = path, pictures()
        if options.to:
            options.to.mkdir(parents=True, exist_ok=True)
            target = options.to / path.name
        execute(path, target)
        print(f"executed {target}")
        for picture, when in pictures().items():
            if not options.to and before.get(picture) != when:
                (ROOT / "figures").mkdir(exist_ok=True)
                print(f"drew {shutil.copy(picture, ROOT / 'figures')}")


if __name__ == "__main__":
    main()
