"""A conversion table of the user's own, for a model that no built-in table knows."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert._families import EMBEDDING, LINEAR, NORM, Family, Row
from road_core import AdapterError

_KINDS = {"linear": LINEAR, "norm": NORM, "embedding": EMBEDDING}
_WIDTHS = ("equal", "heads", "kv_heads")


def read_rules(path: str | os.PathLike) -> Family:
    """Reads a table from TOML, or from JSON of the same form.

    ``rows`` is a list of tables with ``flax`` and ``torch``, the paths on the two sides with ``{layer}`` for a layer's
    number, and optionally ``kind`` (``"linear"``, ``"norm"``, ``"embedding"``), ``interleaved`` and ``width``, which
    mean the same as the attributes of `Row`. The file may also have ``family``, ``head`` and ``axis``.

    Raises:
        AdapterError: the file can't be read, a field is unknown or wrong, or two rows match one path.

    Example:
        >>> text = '[[rows]]\\nflax = "h_{layer}.wq"\\ntorch = "model.layers.{layer}.self_attn.q_proj"'
        >>> _table(tomllib.loads(text)).find_flax("h_3.wq").row.torch
        'model.layers.{layer}.self_attn.q_proj'
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        fields = json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(
            f"{path}: expected rules in TOML or JSON, found a file that can't be read ({reason})"
        ) from None
    try:
        return _table(fields)
    except (AdapterError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None


def _table(fields: object) -> Family:
    fields = _fields(fields, {"family": str, "head": str, "axis": int, "rows": list}, "the file")
    rows = tuple(_row(row, f"rows[{i}]") for i, row in enumerate(fields.get("rows", [])))
    if not rows:
        raise AdapterError("expected at least one row, found none")
    axis = fields.get("axis", 0)
    if axis < 0:
        raise AdapterError(f"axis: expected a number from 0 up, found {axis}")
    table = Family(fields.get("family", "rules"), rows, fields.get("head", "lm_head"), axis=axis)
    for row in rows:
        # Builds the indices, which refuse rows that match the same path.
        table.find_flax(row.flax), table.parts(row, "torch")
    return table


def _row(row: object, where: str) -> Row:
    types = {"flax": str, "torch": str, "kind": str, "interleaved": bool, "width": str}
    fields = _fields(row, types, where)
    for name in ("flax", "torch"):
        if not fields.get(name):
            raise AdapterError(f"{where}: expected a path as {name}, found none")
    for name, known in (("kind", tuple(_KINDS)), ("width", _WIDTHS)):
        if name in fields and fields[name] not in known:
            raise AdapterError(f"{where}.{name}: expected one of {', '.join(known)}, found {fields[name]!r}")
    kind, width = fields.get("kind", "linear"), fields.get("width")
    interleaved = fields.get("interleaved", False)
    # Tensors of layers that are split or permuted can't be converted whole.
    leaves = () if width or interleaved else _KINDS[kind]
    return Row(fields["flax"], fields["torch"], leaves, kind == "linear", interleaved, width)


def _fields(value: object, types: Mapping[str, type], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: expected a table, found {type(value).__name__}")
    for name, found in value.items():
        if name not in types:
            raise AdapterError(f"{where}: expected {', '.join(types)}, found {name!r}")
        if type(found) is not types[name]:
            raise AdapterError(f"{where}.{name}: expected {types[name].__name__}, found {found!r:.60}")
    return value
