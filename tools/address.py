"""The repository's public address, and the one command that changes it wherever it is written.

``python tools/address.py`` prints it; with an address after it, that one takes its place.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ADDRESS = "https://github.com/OWNER/shakespeare-gpt"
ROOT = Path(__file__).resolve().parent.parent
PLACES = "tools/address.py *.md *.toml *.cff docs/*.md space/*.md notebooks/*.ipynb .github/workflows/*.yml"


def files(root: Path = ROOT) -> list[Path]:
    """The files in which the address may stand."""
    return sorted(path for place in PLACES.split() for path in root.glob(place))


def change(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the address by ``new`` in all files; returns those changed. Raises ValueError."""
    new = new.strip().rstrip("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", new):
        raise ValueError(f"{new!r} is no address like https://github.com/NAME/shakespeare-gpt.")
    old, slug = (address.removeprefix("https://github.com/") for address in (ADDRESS, new))
    # Also git+https://github.com/OWNER/NAME, Colab's .../github/OWNER/NAME/blob/... and raw files.
    pattern = re.compile(rf"(github(?:usercontent)?(?:\.com)?/){re.escape(old)}(?![\w-])")
    changed = []
    for path in files(root):
        text = path.read_bytes().decode("utf-8")
        replaced = pattern.sub(rf"\g<1>{slug}", text)
        if replaced != text:
            path.write_bytes(replaced.encode("utf-8"))
            changed.append(path)
    return changed


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(ADDRESS)
    else:
        try:
            print(*change(sys.argv[1]), sep="\n")
        except ValueError as error:
            sys.exit(f"error: {error}")
