"""``python -m shakespeare_gpt``: see ``cli``."""

from shakespeare_gpt.cli import main

if __name__ == "__main__":
    main()
