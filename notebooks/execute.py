"""Execute notebooks as they are committed: ``python notebooks/execute.py notebooks/*.ipynb``.

Each is run from top to bottom in a fresh kernel and written back without saved widget state and timings,
and with a fingerprint of its code, by which a test sees that no cell was changed after it was executed.
SHAKESPEARE_GPT_PRESET and the other variables act as always; the figures go to ``figures``. ``--to FOLDER``
writes the notebooks elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

import nbformat


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all code cells, but for the line that holds the repository's address."""
    lines = [
        line
        for cell in notebook.cells
        if cell.cell_type == "code"
        for line in [*cell.source.split("\n"), "---"]
        if not line.startswith("REPOSITORY = ")
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks as they are committed.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: in place")
    options = parser.parse_args()
    os.environ.setdefault("SHAKESPEARE_GPT_FIGURES", "figures")
    for path in options.notebooks:
        target = path
        if options.to:
            options.to.mkdir(parents=True, exist_ok=True)
            target = options.to / path.name
        execute(path, target)
        print(f"executed {target}")


if __name__ == "__main__":
    main()
