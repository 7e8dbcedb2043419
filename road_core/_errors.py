"""The one error that bad input raises, and how it lists names."""

from collections.abc import Sequence


class AdapterError(ValueError):
    """Input that can't be used: one sentence that says where, what was expected and what was found.

    Commands print the sentence and exit with code 2; from Python it is a ``ValueError`` like any other.
    """


def expect(where: str, value: object, kind: type) -> None:
    """Refuses what is of another type.

    Raises:
        AdapterError: it is.
    """
    if not isinstance(value, kind):
        raise AdapterError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
