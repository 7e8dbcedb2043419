"""Adapter -> Adapter through a table: every key once, all failures together, nothing dropped."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert._families import FAMILIES, LAYER, LINEAR, Family, Leaf, Place, Row, family
from road_core import Adapter, AdapterError, RoadConfig, select_modules
from road_core._adapter import Array, is_bfloat16

SCANNED, UNROLLED = "scanned", "unrolled"
LAYOUTS = (SCANNED, UNROLLED)

# Metadata of a converted file: what the other side's file has that this side can't say, so that the way back gives
# the same bytes. A file has the one of them or neither.
FLAX_ORIGIN, TORCH_ORIGIN = "road_flax_origin", "road_torch_origin"

# PEFT's RoAd warns about these and doesn't obey them.
_NOT_IN_PEFT = ("exclude_modules", "layers_to_transform", "layers_pattern")
_CHOICES = ("target_modules", "modules_to_save", *_NOT_IN_PEFT)


# (module path, name of a tensor that is saved whole); θ and α together have no name.
_Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class _Part:
    """What stands at one place: θ and α, or a tensor that is saved whole."""

    path: str
    name: str
    place: Place
    leaf: Leaf | None
    arrays: tuple[Array, ...]

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.name else self.path

    def turned(self) -> tuple[Array, ...]:
        """The arrays with the other side's order of axes."""
        if self.leaf is not None and self.leaf.transposed:
            return tuple(np.swapaxes(array, -1, -2) for array in self.arrays)
        return self.arrays


@dataclasses.dataclass(frozen=True)
class _Paths:
    """The modules of an adapter on one side: those with θ and α, the output heads of them, those saved whole."""

    modules: list[str]
    heads: list[str]
    saved: list[str]
    model_type: str


def map_to_torch(adapter: Adapter, family_name: str | None = None) -> Adapter:
    """Maps a Flax adapter's paths and arrays to PyTorch's, in the form that PEFT loads.

    A stack ``model.layers.self_attn.q_proj`` with θ ``[layers, size]`` becomes ``model.layers.{i}.self_attn.q_proj``
    with θ ``[size]``; a saved kernel ``[in, out]`` becomes a weight ``[out, in]``. The bits of each number stay.

    Args:
        adapter: as ``read_flax`` gives it.
        family_name: the table to use; None takes the first that knows every key.

    Returns:
        The adapter as ``write_peft`` takes it. Where the config's choice of modules wouldn't choose the same ones in
        PyTorch, it names them all; the metadata keep what is needed for the way back.

    Raises:
        AdapterError: keys without a partner, axes that don't fit, stacks beside numbered layers, stacks of different
            depth, or a config that doesn't choose the adapter's modules: all that was found, in one sentence.
    """
    table, parts, problems = _place(adapter, "flax", family_name)
    layout, mixed = _layout_of(parts)
    _raise([*problems, *_wrong_axes(parts), *mixed])
    entries: dict[_Key, tuple[Array, ...]] = {}
    for part in parts:
        name, arrays = part.leaf.torch if part.leaf else "", part.turned()
        if part.place.stacked:
            for layer in range(len(arrays[0])):
                entries[part.place.torch(layer), name] = tuple(array[layer] for array in arrays)
        else:
            entries[part.place.torch(), name] = arrays

    own, partners = _paths(((p.path, p.name) for p in parts), table.find_flax, table), _torch_paths(entries, table)
    metadata = dict(adapter.metadata)
    origin = _read_record(metadata.pop(TORCH_ORIGIN, None))
    if config := _restore(origin, adapter.config, own, partners, plain=False):
        if FLAX_ORIGIN in origin:
            metadata[FLAX_ORIGIN] = str(origin[FLAX_ORIGIN])
    else:
        config = _fit(adapter.config, own, partners, plain=True)
        metadata[FLAX_ORIGIN] = _dump_record({"layout": layout, "config": _changes(adapter.config, config)})
    return _build(config, entries, metadata)


def map_to_flax(
    adapter: Adapter, family_name: str | None = None, layout: str | None = None, layers: int | None = None
) -> Adapter:
    """Maps a PEFT adapter's paths and arrays to Flax's: the inverse of `map_to_torch`.

    Args:
        adapter: as ``read_peft`` gives it.
        family_name: the table to use; None takes the first that knows every key.
        layout: ``"scanned"`` stacks the layers under one path, ``"unrolled"`` keeps a path a layer. None takes the
            layout that the adapter once had in Flax, where its metadata tell, else ``"scanned"``.
        layers: how many layers the model has. None takes the last one that the adapter has.

    Returns:
        The adapter as ``write_flax`` takes it.

    Raises:
        AdapterError: as `map_to_torch`; also layers that are missing from a stack, or that differ in shape or dtype.
    """
    if layout is not None and layout not in LAYOUTS:
        raise AdapterError(f"layout: expected {' or '.join(LAYOUTS)}, found {layout!r}")
    if layers is not None and layers < 1:
        raise AdapterError(f"layers: expected at least one layer, found {layers}")
    table, parts, problems = _place(adapter, "torch", family_name)
    problems += _wrong_axes(parts)
    numbers = [part.place.layer for part in parts if part.place.layer is not None]
    depth = layers or 1 + max(numbers, default=-1)
    if beyond := [part.key for part in parts if part.place.layer is not None and part.place.layer >= depth]:
        problems.append(f"expected layers 0 to {depth - 1}, found besides {', '.join(beyond)}")
    _raise(problems)

    metadata = dict(adapter.metadata)
    record = metadata.pop(FLAX_ORIGIN, None)
    origin = _read_record(record)
    once = origin.get("layout")
    chosen = layout or (once if once in LAYOUTS else SCANNED)
    entries: dict[_Key, tuple[Array, ...]] = {}
    stacks: dict[tuple[Row, Leaf | None], dict[int, _Part]] = {}
    for part in parts:
        if part.place.layer is not None and chosen == SCANNED:
            stacks.setdefault((part.place.row, part.leaf), {})[part.place.layer] = part
        else:
            entries[part.place.flax(), part.leaf.flax if part.leaf else ""] = part.turned()
    if stacks:
        before = origin.get("config")
        choice = adapter.config.layers_to_transform
        if choice is None and isinstance(before, dict):
            choice = before.get("layers_to_transform")
        # The last layer that the file has need not be the model's last.
        doubt = None if layers is not None or choice in (None, []) else f"layers_to_transform={choice}"
        _raise(_unstackable(stacks, depth, doubt))
    for (_, leaf), stack in stacks.items():
        path = stack[0].place.flax(stacked=True)
        rows = [stack[layer].turned() for layer in range(depth)]
        entries[path, leaf.flax if leaf else ""] = tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))

    own, partners = _torch_paths(((p.path, p.name) for p in parts), table), _paths(entries, table.find_flax, table)
    same = once in (None, chosen)
    if config := _restore(origin, adapter.config, own, partners, plain=True) if same else None:
        return _build(config, entries, metadata)
    config = _fit(adapter.config, own, partners, plain=False)
    changes: dict[str, Any] = {"config": _changes(adapter.config, config)}
    metadata[TORCH_ORIGIN] = _dump_record(changes if record is None else {**changes, FLAX_ORIGIN: record})
    return _build(config, entries, metadata)


def _place(adapter: Adapter, side: str, name: str | None) -> tuple[Family, list[_Part], list[str]]:
    """Finds each key's row. Returns the table, the parts that have one, and what is wrong."""
    tried = []
    for table in [family(name)] if name is not None else FAMILIES.values():
        tried.append((table, *_parts(adapter, table, side)))
        if not tried[-1][2]:
            break
    table, parts, lost = min(tried, key=lambda found: len(found[2]))
    whose = f"the family {table.name}" if name is not None else f"one of the families {', '.join(FAMILIES)}"
    problems = [f"expected modules of {whose}, found without a partner: {', '.join(lost)}"] if lost else []
    return table, parts, problems


def _parts(adapter: Adapter, table: Family, side: str) -> tuple[list[_Part], list[str]]:
    find = table.find_flax if side == "flax" else table.find_torch
    parts, lost = [], []
    for path, arrays in adapter.modules.items():
        place = find(path)
        if place is None or place.row.leaves is not LINEAR:
            lost.append(path)
        else:
            parts.append(_Part(path, "", place, None, arrays))
    for key, array in adapter.modules_to_save.items():
        path, _, name = key.rpartition(".")
        place = find(path)
        leaf = next((leaf for leaf in place.row.leaves if getattr(leaf, side) == name), None) if place else None
        if place is None or leaf is None:
            lost.append(key)
        else:
            parts.append(_Part(path, name, place, leaf, (array,)))
    return parts, sorted(lost, key=natural)


def _wrong_axes(parts: Iterable[_Part]) -> list[str]:
    problems = []
    for part in parts:
        expected = (part.leaf.axes if part.leaf else 1) + part.place.stacked
        shape = part.arrays[0].shape
        if len(shape) != expected or 0 in shape:
            first = ", the first that of the layers" if part.place.stacked else ""
            axes = "one axis" if expected == 1 else f"{expected} axes{first}"
            problems.append(f"{part.key}: expected {axes}, found shape {list(shape)}")
    return problems


def _layout_of(parts: Sequence[_Part]) -> tuple[str | None, list[str]]:
    """Tells the layout by the tensors, None where no part is of a layer, and what is wrong with it."""
    stacks = [part for part in parts if part.place.stacked]
    numbered = [part for part in parts if part.place.layer is not None]
    problems = []
    if stacks and numbered:
        problems.append(
            f"expected either stacks or numbered layers, found stacks ({_listed(stacks)}) "
            f"and numbered layers ({_listed(numbered)})"
        )
    depths: dict[int, list[_Part]] = {}
    for part in stacks:
        depths.setdefault(part.arrays[0].shape[0], []).append(part)
    if len(depths) > 1:
        found = ", ".join(f"{depth} ({_listed(some)})" for depth, some in sorted(depths.items()))
        problems.append(f"expected one number of layers in all stacks, found {found}")
    return (SCANNED if stacks else UNROLLED if numbered else None), problems


def _unstackable(
    stacks: Mapping[tuple[Row, Leaf | None], Mapping[int, _Part]], depth: int, doubt: str | None
) -> list[str]:
    """Returns what keeps the layers from being stacked; ``doubt`` is why they may not be all."""
    problems, missing = [], []
    for (row, leaf), stack in stacks.items():
        path = row.torch + (f".{leaf.torch}" if leaf else "")
        missing += [path.replace(LAYER, gap) for gap in _gaps(stack, depth)]
        forms: dict[str, int] = {}
        for layer in sorted(stack):
            form = " and ".join(_form(array) for array in stack[layer].arrays)
            forms.setdefault(form, layer)
        if len(forms) > 1:
            found = ", ".join(f"{form} in layer {layer}" for form, layer in forms.items())
            problems.append(f"{path}: expected one shape and dtype in all layers, found {found}")
    if missing:
        problems.append(
            f"expected every module in all {depth} layers, missing {', '.join(sorted(missing, key=natural))}"
        )
    elif doubt:
        problems.append(f"expected every layer of the model, found {doubt} (if these are all, say how many there are)")
    return [f"{problem}: the scanned layout can't hold it, use the unrolled layout" for problem in problems]


def _gaps(present: Iterable[int], depth: int) -> list[str]:
    """Returns the numbers below ``depth`` that aren't present; three and more in a row as ``[first-last]``."""
    gaps = []
    start = 0
    for end in [*sorted(present), depth]:
        gaps += [f"[{start}-{end - 1}]"] if end - start > 2 else [str(number) for number in range(start, end)]
        start = end + 1
    return gaps


def _torch_paths(keys: Iterable[_Key], table: Family) -> _Paths:
    return _paths(keys, table.find_torch, table)


def _paths(keys: Iterable[_Key], find: Callable[[str], Place | None], table: Family) -> _Paths:
    keys = list(keys)
    modules = sorted((path for path, name in keys if not name), key=natural)
    heads = [path for path in modules if (place := find(path)) and place.row.torch == table.head]
    return _Paths(modules, heads, sorted({path for path, name in keys if name}, key=natural), table.name)


def _fit(config: RoadConfig, own: _Paths, partners: _Paths, *, plain: bool) -> RoadConfig:
    """Returns the config that chooses on the other side what ``config`` chooses on its own.

    It is the same config where that is so already; else it names the modules one by one. ``plain`` keeps out the
    fields that PEFT's RoAd doesn't have.

    Raises:
        AdapterError: ``config`` doesn't choose the adapter's modules on its own side.
    """
    chosen = set(_selected(config, own))
    if left := [path for path in own.modules if path not in chosen]:
        raise AdapterError(
            f"expected a config that chooses every module of the adapter, found none of "
            f"{', '.join(left)} in target_modules={config.target_modules!r}"
        )
    changes: dict[str, Any] = {}
    try:
        same = _selected(config, partners) == partners.modules
    except AdapterError:
        same = False
    if not same or (plain and any(getattr(config, name) is not None for name in _NOT_IN_PEFT)):
        changes = {**dict.fromkeys(_NOT_IN_PEFT), "target_modules": partners.modules}
    names = config.modules_to_save or []
    if not all(any(re.search(rf"{re.escape(name)}(\.|$)", path) for name in names) for path in partners.saved):
        changes["modules_to_save"] = partners.saved
    return dataclasses.replace(config, **changes)


def _selected(config: RoadConfig, paths: _Paths) -> list[str]:
    return select_modules(
        config, paths.modules, linear=paths.modules, output_head=paths.heads, model_type=paths.model_type
    )


def _changes(before: RoadConfig, after: RoadConfig) -> dict[str, Any]:
    return {name: getattr(before, name) for name in _CHOICES if getattr(before, name) != getattr(after, name)}


def _restore(
    origin: Mapping[str, Any], config: RoadConfig, own: _Paths, partners: _Paths, *, plain: bool
) -> RoadConfig | None:
    """Returns the config that the adapter once had on the other side; None where it isn't known or no longer holds."""
    fields = origin.get("config")
    if not isinstance(fields, dict) or not fields.keys() <= set(_CHOICES):
        return None
    try:
        once = dataclasses.replace(config, **fields)
        # What it was rewritten to must be what the file says now, or someone has changed the one or the other.
        return once if _fit(once, partners, own, plain=plain) == config else None
    except AdapterError:
        return None


def _dump_record(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, ensure_ascii=False)


def _read_record(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise AdapterError(f"metadata: expected a JSON object as the record of a conversion, found {text!r:.60}")
    return fields


def _build(config: RoadConfig, entries: Mapping[_Key, tuple[Array, ...]], metadata: Mapping[str, str]) -> Adapter:
    modules = {path: (arrays[0], arrays[1]) for (path, name), arrays in entries.items() if not name}
    saved = {f"{path}.{name}": arrays[0] for (path, name), arrays in entries.items() if name}
    return Adapter(config, modules, saved, metadata)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise AdapterError("; ".join(problems))


def _listed(parts: Iterable[_Part]) -> str:
    return ", ".join(sorted((part.key for part in parts), key=natural))


def _form(array: Array) -> str:
    return f"{'bfloat16' if is_bfloat16(array.dtype) else array.dtype.name} {list(array.shape)}"


def natural(path: str) -> list[tuple[int, int | str]]:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(name)) if name.isascii() and name.isdigit() else (1, name) for name in path.split(".")]
