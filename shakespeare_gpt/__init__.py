"""A GPT-2 that learns Shakespeare by heart: the code that the notebooks share."""

__version__ = "0.2.0"


class ShakespeareGPTError(Exception):
    """What a user can mend; the message is one line that says what happened and what to do."""


class UsageError(ShakespeareGPTError, ValueError):
    """A setting that does not exist, or is out of range."""
