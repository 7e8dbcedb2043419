"""The one error that bad input raises, and how it lists names."""

from collections.abc import Sequence


class AdapterError(ValueError):
    """Input that can't be used: one sentence that says where, what was expected and what was found.

    Commands print the sentence and exit with code 2; from Python it is a ``ValueError`` like any other.
    """


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
