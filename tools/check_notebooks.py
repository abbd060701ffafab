"""Count what makes a notebook easy to read: ``python tools/check_notebooks.py [NOTEBOOK ...]``.

It prints a table, then one line for each limit that a notebook breaks, and exits with 1 if there is any.
Prose is what a reader sees as text: headings and folded solutions too, but no fenced code and no picture.
"""

from __future__ import annotations

import re
import statistics
import sys
import unicodedata
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s)")  # an item of a list or a row of a table is one


def prose(source: str) -> str:
    """The text of a markdown cell, without fenced code, pictures, HTML tags and the addresses of links."""
    text = FENCE.sub("", source)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"</?\w[^<>]*>|<!--.*?-->", "", text, flags=re.DOTALL)


def words(source: str) -> int:
    """How many words of prose a markdown cell holds; a lone sign, as a table's pipe, is none."""
    return sum(any(map(str.isalnum, word)) for word in prose(source).split())


def parentheses(source: str) -> int:
    """The most parentheses in a paragraph of a markdown cell, outside inline code and formulas."""
    text = re.sub(r"(`+|\$\$?).+?\1", "", prose(source), flags=re.DOTALL)
    return max(paragraph.count("(") for paragraph in PARAGRAPH.split(text))


def columns(line: str) -> int:
    """How wide a line of code is; a Chinese character takes two columns."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)


def fenced(cell: nbformat.NotebookNode) -> str:
    """The code of a cell: all of a code cell, or what a markdown cell shows in fences."""
    return cell.source if cell.cell_type == "code" else "\n".join(FENCE.findall(cell.source))


def measure(path: Path) -> dict[str, float]:
    """All counts of a notebook by name, in the order of the table."""
    notebook = nbformat.read(path, as_version=4)
    code = [len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code"]
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    kinds = "".join("c" if cell.cell_type == "code" else " " for cell in notebook.cells)
    return {
        "code cells": len(code),
        "median lines": statistics.median(code),
        "% up to 10": 100 * sum(lines <= 10 for lines in code) / len(code),
        "most lines": max(code),
        "columns": max(columns(line) for cell in notebook.cells for line in fenced(cell).splitlines()),
        "in a row": max(map(len, kinds.split())),
        "text cells": len(text),
        "median words": statistics.median(map(words, text)),
        "most words": max(map(words, text)),
        "parentheses": max(map(parentheses, text)),
        "your turn": sum(len(re.findall(r"^#+ Your turn", source, re.MULTILINE)) for source in text),
        "widgets": int("widgets" in notebook.metadata),
    }


# (least, most) of a whole notebook's counts, and the most of a single cell's
OF_NOTEBOOK = {
    "median lines": (0, 7),
    "% up to 10": (80, 100),
    "in a row": (0, 2),
    "median words": (0, 45),
    "your turn": (2, 99),
    "widgets": (0, 0),
}
OF_CELL = {"lines": 30, "columns": 80, "words": 120, "parentheses in a paragraph": 1}


def violations(path: str | Path) -> list[str]:
    """One line for each limit that a notebook, or a cell of it, breaks."""
    path = Path(path)
    counts, found = measure(path), []
    for name, (least, most) in OF_NOTEBOOK.items():
        if not least <= counts[name] <= most:
            found.append(f"{path.name}: {name}: {counts[name]:g}, not {least} to {most}")
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        is_code, source = cell.cell_type == "code", cell.source
        of_cell = {
            "lines": len(source.splitlines()) if is_code else 0,
            "columns": max(map(columns, fenced(cell).splitlines()), default=0),
            "words": 0 if is_code else words(source),
            "parentheses in a paragraph": 0 if is_code else parentheses(source),
        }
        for name, most in OF_CELL.items():
            if of_cell[name] > most:
                start = source.strip().splitlines()[0][:40]
                found.append(f"{path.name}: cell {number} ({start}): {of_cell[name]} {name}, not {most}")
    return found


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb"))
    print(" " * 16, *measure(paths[0]), sep="  ")
    for path in paths:
        counts = measure(path).items()
        print(f"{path.stem:16}", *(f"{count:{len(name)}.0f}" for name, count in counts), sep="  ")
    broken = [line for path in paths for line in violations(path)]
    print(*broken, sep="\n", end="\n" if broken else "")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
