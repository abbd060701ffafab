"""A GPT-2 that learns Shakespeare by heart: the code that the notebooks share."""

__version__ = "0.1.0"
