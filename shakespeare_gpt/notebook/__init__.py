"""What the notebooks need to begin: ``setup`` and ``trained_model``."""

from shakespeare_gpt.notebook.session import load_text, setup, trained_model

__all__ = ["load_text", "setup", "trained_model"]
