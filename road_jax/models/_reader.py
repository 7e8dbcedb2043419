"""`Reader`: a JSON object whose values are checked as they are read."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from road_core import AdapterError

INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Reader:
    """A JSON object, which is called ``where`` in errors; null counts as missing."""

    fields: Mapping[str, Any]
    where: str

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None and default is None:
            raise AdapterError(f"{self.where}: expected a field {name}, found none")
        return default if value is None else value

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = INT32) -> int:
        """Returns a whole number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise AdapterError(f"{self.where}: expected {name} to be an integer from {least} up, found {value!r:.80}")
        if value > most:
            raise AdapterError(f"{self.where}: expected {name} to be at most {most}, found {value!s:.80}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a positive number."""
        value = self._get(name, default)
        if not _is_positive(value):
            raise AdapterError(f"{self.where}: expected {name} to be a positive number, found {value!r:.80}")
        return float(value)

    def optional(self, name: str) -> float | None:
        """Returns a positive number, or None if there is none."""
        return None if self.fields.get(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> list[float]:
        """Returns a list of positive numbers."""
        values = self._get(name, None)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_positive, values)):
            found = f"{len(values)} values" if isinstance(values, list) and len(values) != count else f"{values!r:.80}"
            raise AdapterError(f"{self.where}: expected {name} to be {count} positive numbers, found {found}")
        return values

    def flag(self, name: str, *, default: bool) -> bool:
        """Returns true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise AdapterError(f"{self.where}: expected {name} to be true or false, found {value!r:.80}")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Returns a JSON object; an empty one if there is none."""
        value = self.fields.get(name) or {}
        if not isinstance(value, Mapping):
            raise AdapterError(f"{self.where}: expected {name} to be a JSON object, found {value!r:.60}")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """Returns one of several names."""
        value = self._get(name, default)
        if value not in choices:
            raise AdapterError(f"{self.where}: expected {name} to be one of {', '.join(choices)}, found {value!r:.80}")
        return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
