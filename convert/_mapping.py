"""Maps adapters by a table: every key once, all failures together, nothing dropped."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert._families import FAMILIES, LAYER, LAYOUTS, Family, Leaf, Place, Row, tables, unnumbered
from convert._regroup import regroup
from convert._tied import is_tied
from road_core import Adapter, AdapterError, RoadConfig, select_modules
from road_core._adapter import Array, dtype_name
from road_core._config import NOT_IN_PEFT, TARGETS
from road_core._safetensors import EMBEDDINGS, HEAD
from road_core._targets import is_all_linear

# Metadata of a converted file: what the other side's file has and this side can't express, so that the way back gives
# the same bytes. A file has one of them or neither.
FLAX_ORIGIN, TORCH_ORIGIN = "road_flax_origin", "road_torch_origin"

# In such a record: the head was saved in PyTorch only, where a tied one doesn't follow the embedding.
_TIED = "tied_head"
_HEAD_WEIGHT = f"{HEAD}.weight"

# Fields that choose modules on either side.
_CHOICES = ("modules_to_save", *TARGETS)

# One pair per key: its name before and after.
Trace = list[tuple[str, str]]

# (module path, name of a tensor that is saved whole); θ and α together have no name.
_Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class _Spot:
    """A key's path and name, as in `_Key`, and its place in the table."""

    path: str
    name: str
    place: Place
    leaf: Leaf | None

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.name else self.path


@dataclasses.dataclass(frozen=True)
class _Part(_Spot):
    """A spot with its arrays: θ and α, or a tensor that is saved whole."""

    arrays: tuple[Array, ...]

    def turned(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """Returns one layer's arrays with their axes in the other side's order."""
        return tuple(array.T for array in arrays) if self.leaf is not None and self.leaf.transposed else arrays


@dataclasses.dataclass(frozen=True)
class _Paths:
    """An adapter's modules on one side: those with θ and α, the output heads among them, and those saved whole.

    ``classifier`` tells whether the model may have a classification head, which Flax's "all-linear" leaves out and
    PEFT's doesn't; ``partial`` whether the PyTorch model has layers besides those of the Flax model.
    """

    modules: list[str]
    heads: list[str]
    saved: list[str]
    model_type: str
    classifier: bool
    partial: bool


class Stacks(NamedTuple):
    """How the layers of a Flax adapter lie.

    Attributes:
        axis: the axis of a stack's θ that runs over a layer's own parameters.
        stacked: whether there are stacks.
        numbered: whether there are layers with a path of their own.
    """

    axis: int
    stacked: bool
    numbered: bool


def find_stacks(adapter: Adapter, family_name: str | None = None) -> Stacks | None:
    """Tells how the layers of a Flax adapter lie, by the table that `map_to_torch` would take.

    Returns:
        None if no table knows every key.
    """
    origin = _read_record(adapter.metadata.get(TORCH_ORIGIN))
    choice = tables(family_name or _known(origin.get("family"), FAMILIES))
    tried = _tried(tuple(adapter.modules), tuple(adapter.modules_to_save), "flax", tuple(choice))
    # Tables of one style have their stacks on one axis, so that none of them need be named.
    known = next(((table, spots) for table, spots, lost in tried if not lost), None)
    if known is None:
        return None
    table, spots = known
    places = [spot.place for spot in spots]
    return Stacks(
        # θ of a stack has two axes.
        axis=0 if table.axis else -1,
        stacked=any(place.stacked for place in places),
        numbered=any(place.layer is not None for place in places),
    )


def join_records(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Returns the metadata about earlier conversions that hold for a composition of adapters of one format."""
    joined = {}
    for name in (FLAX_ORIGIN, TORCH_ORIGIN):
        records = [_read_record(a.metadata[name]) if name in a.metadata else None for a in adapters]
        kept: dict[str, Any] = {}
        if all(record is not None for record in records):
            found = [record or {} for record in records]
            kept = {field: value for field, value in found[0].items() if all(r.get(field) == value for r in found[1:])}
            # One without layers says nothing of the layout, one of a road_jax model nothing of the family.
            for field in ("family", "layout"):
                said = {str(record[field]) for record in found if record.get(field) is not None}
                if len(said) == 1:
                    kept[field] = said.pop()
                elif said:
                    # What else they say is meant for different models.
                    kept = {}
        # Only the one that brings an embedding says whether the head shares it.
        kept.pop(_TIED, None)
        for adapter, record in zip(adapters, records, strict=True):
            if record and _TIED in record and adapter.modules_to_save:
                kept[_TIED] = record[_TIED]
        if kept:
            joined[name] = _dump_record(kept)
    return joined


def map_to_torch(
    adapter: Adapter,
    family_name: str | None = None,
    *,
    rules: Family | None = None,
    model: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
) -> Adapter:
    """Maps a Flax adapter's paths and arrays to PyTorch's, in the form that PEFT loads.

    A stack ``model.layers.self_attn.q_proj`` with θ ``[layers, size]`` becomes ``model.layers.{i}.self_attn.q_proj``
    with θ ``[size]``; a saved kernel ``[in, out]`` becomes a weight ``[out, in]``. The bits of each number stay the
    same.

    Args:
        adapter: as returned by ``read_flax``.
        family_name: the family; None takes the first one whose table knows every key.
        rules: a table to use instead.
        model: the model's ``config.json``. Some fused layers and RoPE's interleaved order need its sizes. For an
            embedding that is saved whole, it tells whether the head shares it; if so, the head is saved beside it.
        trace: receives a line for each key: its name before and after.

    Returns:
        The adapter as ``write_peft`` takes it. If the config wouldn't select the same modules in PyTorch, it names all
        of them instead; the metadata keep what is needed for the way back.

    Raises:
        AdapterError: keys have no partner, axes don't fit, stacks are mixed with numbered layers or differ in depth, no
            group size in PyTorch gives the same groups, or the config doesn't select the adapter's modules. The error
            lists all that was found.
    """
    metadata = dict(adapter.metadata)
    origin = _read_record(metadata.pop(TORCH_ORIGIN, None))
    choice = [rules] if rules else tables(family_name or _known(origin.get("family"), FAMILIES))
    table, parts, problems = _place(adapter, "flax", choice)
    layout, mixed = _layout_of(parts, table)
    _raise([*problems, *_wrong_axes(parts), *mixed])
    rotated: list[tuple[Place, int | None, tuple[Array, ...]]] = []
    entries: dict[_Key, tuple[Array, ...]] = {}
    slices: list[tuple[int | None, tuple[Array, ...]]]
    for part in parts:
        if part.place.stacked:
            stacks = [np.moveaxis(array, table.axis, 0) for array in part.arrays]
            slices = [(layer, tuple(stack[layer] for stack in stacks)) for layer in range(len(stacks[0]))]
        else:
            slices = [(part.place.layer, part.arrays)]
        for layer, arrays in slices:
            if part.leaf is None:
                rotated.append((part.place, layer, arrays))
            else:
                path = _numbered(part.place.row.torch, layer)
                entries[path, part.leaf.torch] = part.turned(arrays)
                _note(trace, part.key, layer if part.place.stacked else None, [f"{path}.{part.leaf.torch}"])
    modules, group_size = regroup(rotated, table, "flax", adapter.config, model)
    for (row, layer), arrays in modules.items():
        entries[_numbered(row.torch, layer), ""] = arrays
    for part in parts:
        if part.leaf is None:
            layer = part.place.layer
            paths = dict.fromkeys(row.torch for row in part.place.rows)
            _note(trace, part.key, None, [p if layer is None else _numbered(p, layer) for p in paths])

    record = origin if TORCH_ORIGIN in adapter.metadata else None
    tied = False
    if table.head == HEAD and (shared := _lone_embedding(entries)):
        tied = _is_tied(".".join(shared), model, record)
        if tied:
            entries[HEAD, "weight"] = entries[shared]
            _note(trace, next(p.key for p in parts if p.place.row.torch == shared[0]), None, [_HEAD_WEIGHT])

    config = dataclasses.replace(adapter.config, group_size=group_size)
    own, partners = _paths(((p.path, p.name) for p in parts), table.find_flax, table), _torch_paths(entries, table)
    once = _restore(origin, config, own, partners, plain=False) if tied == bool(origin.get(_TIED)) else None
    if once:
        if FLAX_ORIGIN in origin:
            metadata[FLAX_ORIGIN] = str(origin[FLAX_ORIGIN])
        return _build(once, entries, metadata)
    fitted = _fit(config, own, partners, plain=True)
    changes: dict[str, Any] = {"layout": layout, "config": _changes(config, fitted), **_named(table)}
    if tied:
        changes[_TIED] = True
    metadata[FLAX_ORIGIN] = _dump_record(changes)
    return _build(fitted, entries, metadata)


def map_to_flax(
    adapter: Adapter,
    family_name: str | None = None,
    layout: str | None = None,
    layers: int | None = None,
    *,
    rules: Family | None = None,
    model: Mapping[str, Any] | None = None,
    trace: Trace | None = None,
) -> Adapter:
    """Maps a PEFT adapter's paths and arrays to Flax's: the inverse of `map_to_torch`.

    Args:
        adapter: as returned by ``read_peft``.
        family_name: the family; None takes the adapter's former family in Flax if its metadata give one, else the first
            one whose table knows every key.
        layout: one of `LAYOUTS`: ``"scanned"`` stacks the layers under one path, ``"unrolled"`` keeps one path per
            layer, the rest belong to other libraries. None takes the adapter's former layout in Flax if its metadata
            give one, else the first layout of the table that is used.
        layers: the number of layers in the model. None takes it from ``model``, or else from the adapter's last layer.
        rules: a table to use instead; ``layout`` then only says whether the layers are stacked.
        model: see `map_to_torch`.
        trace: see `map_to_torch`.

    Returns:
        The adapter as ``write_flax`` takes it.

    Raises:
        AdapterError: as for `map_to_torch`; also if layers are missing from a stack, or differ in shape or dtype.
    """
    adapter.check_no_base_weights("Flax's format")
    if layout is not None and layout not in LAYOUTS:
        raise AdapterError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    if layers is not None and layers < 1:
        raise AdapterError(f"layers: expected at least one layer, found {layers}")
    metadata = dict(adapter.metadata)
    record = metadata.pop(FLAX_ORIGIN, None)
    origin = _read_record(record)
    once = _known(origin.get("layout"), LAYOUTS)
    chosen = layout or once
    name = family_name or (_known(origin.get("family"), FAMILIES) if chosen == once else None)
    choice = [rules] if rules else tables(name, LAYOUTS[chosen][0] if chosen else None)
    adapter, tied = _without_tied_head(adapter, model, None if record is None else origin)
    table, parts, problems = _place(adapter, "torch", choice)
    chosen = chosen or next(name for name, (style, _) in LAYOUTS.items() if style == table.style)
    stacking = LAYOUTS[chosen][1]
    problems += _wrong_axes(parts)
    if table.head == HEAD and model is not None and is_tied(model):
        problems += [
            f"{part.key}: expected no head apart from the embedding, which it shares in the model (base), found one"
            for part in parts
            if part.place.row.torch == HEAD
        ]
    alone = not tied and table.head == HEAD and _lone_embedding((p.path, p.name) for p in parts)
    if alone and _is_tied(".".join(alone), model, None if record is None else origin):
        problems.append(
            f"{'.'.join(alone)}: expected {_HEAD_WEIGHT} of the same numbers beside it, found none (in Flax the head "
            "shares the embedding and follows it)"
        )
    if layers is None and model is not None:
        layers = _depth(table, model)
    numbers: dict[str, set[int]] = {}
    for part in parts:
        if part.place.layer is not None:
            numbers.setdefault(_tower(part.place.row), set()).add(part.place.layer)
    depths = {tower: layers or 1 + max(some) for tower, some in numbers.items()}
    if beyond := [p.key for p in parts if p.place.layer is not None and p.place.layer >= depths[_tower(p.place.row)]]:
        problems.append(f"expected layers 0 to {(layers or 1) - 1}, found besides {', '.join(beyond)}")
    _raise(problems)

    rotated = [(part.place, part.place.layer, part.arrays) for part in parts if part.leaf is None]
    modules, group_size = regroup(rotated, table, "torch", adapter.config, model)
    found: list[tuple[Row, Leaf | None, int | None, tuple[Array, ...]]]
    found = [(row, None, layer, arrays) for (row, layer), arrays in modules.items()]
    found += [(p.place.row, p.leaf, p.place.layer, p.turned(p.arrays)) for p in parts if p.leaf is not None]
    entries: dict[_Key, tuple[Array, ...]] = {}
    stacks: dict[tuple[Row, Leaf | None], dict[int, tuple[Array, ...]]] = {}
    for row, leaf, layer, arrays in found:
        if layer is not None and stacking:
            stacks.setdefault((row, leaf), {})[layer] = arrays
        else:
            entries[_numbered(row.flax, layer), leaf.flax if leaf else ""] = arrays
    if stacks:
        before = origin.get("config")
        some = adapter.config.layers_to_transform
        if some is None and isinstance(before, dict):
            some = before.get("layers_to_transform")
        # The last layer in the file need not be the model's last.
        doubt = None if layers is not None or some in (None, []) else f"layers_to_transform={some}"
        _raise(_unstackable(stacks, depths, doubt))
    for (row, leaf), stack in stacks.items():
        rows = [stack[layer] for layer in range(depths[_tower(row)])]
        arrays = tuple(np.stack(arrays, min(table.axis, arrays[0].ndim)) for arrays in zip(*rows, strict=True))
        entries[unnumbered(row.flax), leaf.flax if leaf else ""] = arrays
    for part in parts:
        end = f".{part.leaf.flax}" if part.leaf else ""
        paths = dict.fromkeys(row.flax for row in part.place.rows)
        layer = part.place.layer
        _note(trace, part.key, None, [(unnumbered(p) if stacking else _numbered(p, layer)) + end for p in paths])

    config = dataclasses.replace(adapter.config, group_size=group_size)
    keys = [*((p.path, p.name) for p in parts), *([(HEAD, "weight")] if tied else [])]
    if tied:
        embedding = next(p.place.row.flax for p in parts if p.key.endswith(EMBEDDINGS))
        _note(trace, _HEAD_WEIGHT, None, [f"{embedding}.embedding"])
    own, partners = _torch_paths(keys, table), _paths(entries, table.find_flax, table)
    same = once in (None, chosen) and tied == bool(origin.get(_TIED))
    if before := _restore(origin, config, own, partners, plain=True) if same else None:
        return _build(before, entries, metadata)
    fitted = _fit(config, own, partners, plain=False)
    changes: dict[str, Any] = {"config": _changes(config, fitted), **_named(table)}
    if tied:
        changes[_TIED] = True
    metadata[TORCH_ORIGIN] = _dump_record(changes if record is None else {**changes, FLAX_ORIGIN: record})
    return _build(fitted, entries, metadata)


def _lone_embedding(keys: Iterable[_Key]) -> _Key | None:
    """Returns the PyTorch key of an embedding that is saved whole; None if the head is trained separately."""
    keys = list(keys)
    if any(path == HEAD for path, _ in keys):
        return None
    return next((key for key in keys if ".".join(key).endswith(EMBEDDINGS)), None)


def _is_tied(embedding: str, model: Mapping[str, Any] | None, record: Mapping[str, Any] | None) -> bool:
    """Tells whether the head shares the embedding, by the model's config or else an earlier conversion's record."""
    tied: bool | None = None
    if model is not None:
        tied = is_tied(model)
    elif record is not None:
        tied = record.get(_TIED) is True
    if tied is None:
        raise AdapterError(
            f"{embedding}: expected a model (base) whose config.json tells whether its head shares the embedding that "
            "is saved here, found none"
        )
    return tied


def _without_tied_head(
    adapter: Adapter, model: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> tuple[Adapter, bool]:
    """Leaves out a saved head that in Flax is the embedding; tells whether there was one.

    If nothing says that the head is tied, it is kept; a Flax model without a head of its own will refuse it.
    """
    saved = dict(adapter.modules_to_save)
    embedding, head = next((name for name in saved if name.endswith(EMBEDDINGS)), None), saved.pop(_HEAD_WEIGHT, None)
    if embedding is None or head is None or not (is_tied(model) if model is not None else (record or {}).get(_TIED)):
        return adapter, False
    other = saved[embedding]
    if (head.dtype, head.shape, head.tobytes()) != (other.dtype, other.shape, other.tobytes()):
        raise AdapterError(
            f"{_HEAD_WEIGHT}: expected the numbers of {embedding}, which the model's head shares in Flax, found others"
        )
    return dataclasses.replace(adapter, modules_to_save=saved), True


def _place(adapter: Adapter, side: str, choice: Sequence[Family]) -> tuple[Family, list[_Part], list[str]]:
    """Finds each key's row; returns the table, the parts that have a row, and the problems.

    Raises:
        AdapterError: several tables of one style know every key and would treat them differently.
    """
    table, spots, problems = _search(tuple(adapter.modules), tuple(adapter.modules_to_save), side, tuple(choice))
    parts = [
        _Part(
            **vars(spot),
            arrays=(adapter.modules_to_save[spot.key],) if spot.name else adapter.modules[spot.path],
        )
        for spot in spots
    ]
    return table, parts, list(problems)


# Many adapters of one model share a single lookup. Nobody changes what is returned.
@functools.lru_cache(maxsize=16)
def _search(
    modules: tuple[str, ...], saved: tuple[str, ...], side: str, choice: tuple[Family, ...]
) -> tuple[Family, list[_Spot], list[str]]:
    tried = _tried(modules, saved, side, choice)
    fitting = [found for found in tried if not found[2]]
    if fitting:
        first = fitting[0]
        same = [
            table for table, spots, _ in fitting if table.style == first[0].style and _acts(spots) == _acts(first[1])
        ]
        others = [table for table, _, _ in fitting if table.style == first[0].style and table not in same]
        if others:
            names = ", ".join(dict.fromkeys(table.name for table in [*same, *others]))
            raise AdapterError(f"family: expected one of {names} to be named, for all of them know these modules")
        return first[0], first[1], _apart(first[1])
    table, spots, lost = min(tried, key=lambda found: len(found[2]))
    known = list(dict.fromkeys(table.name for table, _, _ in tried))
    whose = f"the family {known[0]}" if len(known) == 1 else f"one of the families {', '.join(known)}"
    return table, spots, [f"expected modules of {whose}, found without a partner: {', '.join(lost)}"]


def _tried(
    modules: Sequence[str], saved: Sequence[str], side: str, choice: Sequence[Family]
) -> list[tuple[Family, list[_Spot], list[str]]]:
    """Looks all keys up in each table, and returns with it what it knows and the keys that it doesn't know."""
    several = len({table.name for table in choice}) > 1
    return [(table, *_spots(modules, saved, table, side)) for table in choice if not (several and table.asked)]


def _acts(spots: Sequence[_Spot]) -> list[tuple[object, ...]]:
    """Returns what a table does with an adapter."""
    return [
        (row.flax, row.torch, row.interleaved, row.width, row.bias_apart, spot.leaf)
        for spot in spots
        for row in spot.place.rows
    ]


def _apart(spots: Sequence[_Spot]) -> list[str]:
    if not (keys := [spot.key for spot in spots if spot.place.row.bias_apart]):
        return []
    return [
        f"expected layers whose outputs have their bias in both frameworks, found {', '.join(keys)}: "
        "the Flax model adds their biases after the rotation, which no adapter in PyTorch does"
    ]


def _numbered(path: str, layer: int | None) -> str:
    return path.replace(LAYER, str(layer))


def _tower(row: Row) -> str:
    """Returns what comes before the layer's number: an encoder and a decoder have depths of their own."""
    return row.torch.partition(LAYER)[0]


def _depth(table: Family, model: Mapping[str, Any]) -> int | None:
    """Returns a model's number of layers by its config; None if it doesn't say or has several kinds of layers."""
    towers = {_tower(row) for row in table.rows if LAYER in row.torch}
    depth = model.get("num_hidden_layers", model.get("n_layer"))
    return depth if len(towers) == 1 and type(depth) is int and depth > 0 else None


def _known(value: object, names: Iterable[str]) -> str | None:
    return value if isinstance(value, str) and value in names else None


def _named(table: Family) -> dict[str, str]:
    """Returns the part of a record by which another library's table is found again."""
    return {} if table.style == "road" and not table.asked else {"family": table.name}


def _note(trace: Trace | None, key: str, layer: int | None, partners: Sequence[str]) -> None:
    if trace is not None:
        trace.append((key if layer is None else f"{key}[{layer}]", " + ".join(partners)))


def _spots(modules: Sequence[str], saved: Sequence[str], table: Family, side: str) -> tuple[list[_Spot], list[str]]:
    find = table.find_flax if side == "flax" else table.find_torch
    spots: list[_Spot] = []
    lost = []
    for path in modules:
        place = find(path)
        if place is None or not place.row.linear:
            lost.append(path)
        else:
            spots.append(_Spot(path, "", place, None))
    for key in saved:
        path, _, name = key.rpartition(".")
        place = find(path)
        leaf = next((leaf for leaf in place.row.leaves if getattr(leaf, side) == name), None) if place else None
        if place is None or leaf is None:
            lost.append(key)
        else:
            spots.append(_Spot(path, name, place, leaf))
    return spots, sorted(lost, key=natural)


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


def _layout_of(parts: Sequence[_Part], table: Family) -> tuple[str | None, list[str]]:
    """Returns the layout that the tensors show (None if no part is of a layer), and the problems with it."""
    stacks = [part for part in parts if part.place.stacked]
    numbered = [part for part in parts if part.place.layer is not None]
    problems = []
    if stacks and numbered:
        problems.append(
            f"expected either stacks or numbered layers, found stacks ({_listed(stacks)}) "
            f"and numbered layers ({_listed(numbered)})"
        )
    towers: dict[str, dict[int, list[_Part]]] = {}
    for part in stacks:
        axis = min(table.axis, part.arrays[0].ndim - 1)
        depths = towers.setdefault(_tower(part.place.row), {})
        depths.setdefault(part.arrays[0].shape[axis], []).append(part)
    for depths in towers.values():
        if len(depths) > 1:
            found = ", ".join(f"{depth} ({_listed(some)})" for depth, some in sorted(depths.items()))
            problems.append(f"expected one number of layers in all stacks, found {found}")
    if not (stacks or numbered):
        return None, problems
    wanted = table.style, bool(stacks)
    layout = next((name for name, form in LAYOUTS.items() if form == wanted), None)
    if layout is None:
        problems.append(f"expected numbered layers in the {table.style} layout, found stacks ({_listed(stacks)})")
    return layout, problems


def _unstackable(
    stacks: Mapping[tuple[Row, Leaf | None], Mapping[int, tuple[Array, ...]]],
    depths: Mapping[str, int],
    doubt: str | None,
) -> list[str]:
    """Returns what keeps the layers from being stacked; ``doubt`` says why some may be missing."""
    problems, missing = [], []
    for (row, leaf), stack in stacks.items():
        path = row.torch + (f".{leaf.torch}" if leaf else "")
        missing += [path.replace(LAYER, gap) for gap in _gaps(stack, depths[_tower(row)])]
        forms: dict[str, int] = {}
        for layer in sorted(stack):
            form = " and ".join(_form(array) for array in stack[layer])
            forms.setdefault(form, layer)
        if len(forms) > 1:
            found = ", ".join(f"{form} in layer {layer}" for form, layer in forms.items())
            problems.append(f"{path}: expected one shape and dtype in all layers, found {found}")
    if missing:
        listed = ", ".join(sorted(missing, key=natural))
        problems.append(f"expected every module in all {max(depths.values())} layers, missing {listed}")
    elif doubt:
        problems.append(f"expected every layer of the model, found {doubt} (if these are all, say how many there are)")
    return [f"{problem}: the scanned layout can't hold it, use the unrolled layout" for problem in problems]


def _gaps(present: Iterable[int], depth: int) -> list[str]:
    """Returns the numbers below ``depth`` that aren't present; three or more in a row as ``[first-last]``."""
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
    saved = sorted({path for path, name in keys if name}, key=natural)
    classifier = any(row.torch == "classifier" for row in table.rows)
    return _Paths(modules, heads, saved, table.model_type, classifier, table.partial)


def _fit(config: RoadConfig, own: _Paths, partners: _Paths, *, plain: bool) -> RoadConfig:
    """Returns the config that selects on the other side what ``config`` selects on its own.

    It is the same config if that does so already; otherwise it names the modules one by one. ``plain`` leaves out the
    fields that PEFT's RoAd doesn't have.

    Raises:
        AdapterError: ``config`` doesn't select the adapter's modules on its own side.
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
    if plain and (partners.partial or (partners.classifier and is_all_linear(config.target_modules))):
        same = False
    if not same or (plain and any(getattr(config, name) is not None for name in NOT_IN_PEFT)):
        changes = {**dict.fromkeys(NOT_IN_PEFT), "target_modules": partners.modules}
    names = config.modules_to_save or []
    if HEAD in own.saved and HEAD not in partners.saved:
        names = [name for name in names if not _is_named(name, HEAD)]
        changes["modules_to_save"] = names
    found = all(any(_is_named(name, path) for name in names) for path in partners.saved)
    if not found or (plain and partners.partial and partners.saved):
        changes["modules_to_save"] = partners.saved
    return dataclasses.replace(config, **changes)


def _is_named(name: str, path: str) -> bool:
    return re.search(rf"{re.escape(name)}(\.|$)", path) is not None


def _selected(config: RoadConfig, paths: _Paths) -> list[str]:
    return select_modules(
        config, paths.modules, linear=paths.modules, output_head=paths.heads, model_type=paths.model_type
    )


def _changes(before: RoadConfig, after: RoadConfig) -> dict[str, Any]:
    return {name: getattr(before, name) for name in _CHOICES if getattr(before, name) != getattr(after, name)}


def _restore(
    origin: Mapping[str, Any], config: RoadConfig, own: _Paths, partners: _Paths, *, plain: bool
) -> RoadConfig | None:
    """Returns the adapter's former config on the other side; None if it isn't known or no longer holds."""
    fields = origin.get("config")
    if not isinstance(fields, dict) or not fields.keys() <= set(_CHOICES):
        return None
    try:
        once = dataclasses.replace(config, **fields)
        # It must be rewritten to what the file says now, or someone has changed one of the two.
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
    return f"{dtype_name(array.dtype)} {list(array.shape)}"


def natural(path: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that puts layer 10 after layer 9, also where a stack's layers are in brackets."""
    names = re.split(r"[.\[\]]", path)
    return [(0, int(name)) if name.isascii() and name.isdigit() else (1, name) for name in names]
