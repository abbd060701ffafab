"""Put pictures that no cell draws into the notebooks: ``python tools/embed_pictures.py``.

Where a markdown cell refers to ``attachment:NAME.png``, ``figures/NAME.png`` becomes its attachment.
"""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def embed(path: Path) -> bool:
    """Renew the attachments of a notebook; drop those that nobody refers to. True where it changed.

    Raises FileNotFoundError, and writes nothing, where a picture is missing.
    """
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    for cell in notebook.cells:
        cell.pop("attachments", None)
        names = re.findall(r"attachment:([\w.-]+\.png)", cell.source) if cell.cell_type == "markdown" else []
        for name in names:
            picture = ROOT / "figures" / name
            if not picture.is_file():
                raise FileNotFoundError(f"{path.name} shows {name}, but figures/{name} is missing.")
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            cell.setdefault("attachments", {})[name] = {"image/png": data}
    if notebook == nbformat.reads(before, as_version=4):
        return False
    nbformat.write(notebook, path)
    return True


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        try:
            if embed(path):
                print(f"embedded pictures in {path.name}")
        except FileNotFoundError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
