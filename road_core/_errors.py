"""The error that all bad input raises, and how it lists names."""

from collections.abc import Sequence


class AdapterError(ValueError):
    """Input that can't be used: one sentence that says where, what was expected and what was found.

    Commands print the sentence and exit with code 2; from Python it is a ``ValueError`` like any other.
    """


def expect(where: str, value: object, kind: type) -> None:
    """Refuses a value of another type.

    Raises:
        AdapterError: the value isn't a ``kind``.
    """
    if not isinstance(value, kind):
        raise AdapterError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names as text, with the number of further ones."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
