"""``python -m shakespeare_gpt`` and the command ``shakespeare-gpt``: see ``cli``."""

import os

# OpenMP's threads wait for each other in a loop before they sleep. Beside a busy program a long loop makes a
# step many times slower (docs/measurements.md), so we shorten it. It counts only before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from shakespeare_gpt.cli import main

if __name__ == "__main__":
    main()
