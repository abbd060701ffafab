"""``python -m shakespeare_gpt`` and the command ``shakespeare-gpt``: see ``cli``."""

import os

# Threads that wait in a loop take the cores from what runs beside them, and from each other: beside one busy
# program a step took ten times as long. It counts only if it is set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from shakespeare_gpt.cli import main

if __name__ == "__main__":
    main()
