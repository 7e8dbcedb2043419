"""Moves θ and α bit for bit, output by output, where one side orders or fuses a module's outputs differently."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert._families import LAYER, Family, Place, Row
from road_core import AdapterError, RoadConfig
from road_core._adapter import Array, from_float32, is_bfloat16

_Module = tuple[Row, int | None]


def regroup(
    modules: Sequence[tuple[Place, int | None, tuple[Array, ...]]],
    table: Family,
    side: str,
    config: RoadConfig,
    model: Mapping[str, Any] | None,
) -> tuple[dict[_Module, tuple[Array, ...]], int]:
    """Moves θ and α to the other side's order of outputs.

    A fused module is split into its parts if no group straddles two of them. Parts are fused, with those that have no
    adapter at the identity. RoPE's interleaved order and its halves differ by a permutation within each head: pairs
    move with their outputs, and the group size changes so that the same outputs are paired (`halves_group_size`).

    Args:
        modules: ``(place, layer, (θ, α))`` on one side, each with the θ of one layer.
        table: the table in which the places are.
        side: the side that the modules are on, ``"flax"`` or ``"torch"``.
        config: the variant and the group size on that side.
        model: the model's ``config.json``, for the sizes of heads.

    Returns:
        ``{(row, layer): (θ, α)}`` on the other side, with the first part's row where parts are fused, and the group
        size there.

    Raises:
        AdapterError: a group straddles two parts, sizes aren't known or don't fit, no group size on the other side
            pairs the same outputs, or the adapter has a subspace on a layer whose outputs move.
    """
    other = "torch" if side == "flax" else "flax"
    done: dict[_Module, tuple[Array, ...]] = {}
    fusing: dict[_Module, dict[Row, tuple[Array, ...]]] = {}
    sizes: dict[int, list[str]] = {}
    for place, layer, arrays in modules:
        row = place.row
        path = getattr(row, side).replace(LAYER, str(layer))
        group_size = _other_group_size(row, path, side, config.group_size, model)
        sizes.setdefault(group_size, []).append(path)
        if len(place.rows) == 1 and len(table.parts(row, other)) == 1 and not row.interleaved:
            done[row, layer] = arrays
            continue
        if config.subspace is not None:
            # On the other side the subspace would contain other blocks.
            raise AdapterError(
                f"{path}: expected an adapter of all blocks for a layer whose outputs move, "
                f"found subspace={config.subspace}"
            )
        elements = tuple(_spread(array, config.variant, config.group_size) for array in arrays)
        if row.interleaved:
            elements = tuple(_turn(array, _head_size(model, path), side) for array in elements)
        widths = _widths(place.rows, elements[0].shape[-1], path, model)
        for part, start, stop in zip(place.rows, np.cumsum([0, *widths]), np.cumsum(widths), strict=False):
            if start % group_size:
                raise AdapterError(
                    f"{path}: expected parts of whole groups of {group_size} outputs, found one that starts at output "
                    f"{start}: a group of the fused layer straddles two layers"
                )
            section = tuple(array[:, start:stop] for array in elements)
            fused = table.parts(part, other)
            fusing.setdefault((fused[0], layer), {})[part] = section
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({', '.join(paths[:2])}, …)" for size, paths in sorted(sizes.items()))
        raise AdapterError(
            f"expected one group size for all modules, found {found}: query and key are in RoPE's interleaved order "
            "on one side only, so an adapter must be on them alone or on none of them"
        )
    group_size = next(iter(sizes), config.group_size)
    for (first, layer), sections in fusing.items():
        parts = table.parts(first, other)
        path = getattr(first, other).replace(LAYER, str(layer))
        whole = _filled(parts, sections, path, config, model)
        done[first, layer] = tuple(_gather(array, config.variant, group_size) for array in whole)
    return done, group_size


def halves_group_size(group_size: int, head_size: int) -> int | None:
    """Returns the group size that pairs in halves what ``group_size`` pairs in the interleaved order, or None.

    Neighbours in the interleaved order are ``head_size / 2`` apart in halves. In a larger group, outputs at even places
    and those at odd places are paired among themselves, which gives groups half as large in each half of the head.
    Groups of an even number of heads pair whole heads, which is the same in both orders.
    """
    if group_size == 2:
        return head_size
    if head_size % group_size == 0:
        return group_size // 2
    return group_size if group_size % (2 * head_size) == 0 else None


def _other_group_size(row: Row, path: str, side: str, group_size: int, model: Mapping[str, Any] | None) -> int:
    if not row.interleaved:
        return group_size
    head = _head_size(model, path)
    if side == "flax":
        found = halves_group_size(group_size, head)
    else:
        tried = (2, 2 * group_size, group_size)
        found = next((size for size in tried if halves_group_size(size, head) == group_size), None)
    if found is None:
        raise AdapterError(
            f"{path}: expected a group size that divides the head size {head} or pairs whole heads, "
            f"found {group_size}: in the other order of RoPE's outputs no group size pairs the same ones"
        )
    return found


def _spread(array: Array, variant: str, group_size: int) -> Array:
    """Returns θ or α as ``[kinds, out]``: the values of each output, in the order of the outputs."""
    if variant == "road_1":
        pairs = array.reshape(-1, 1, group_size // 2)
        return np.broadcast_to(pairs, (len(pairs), 2, group_size // 2)).reshape(1, -1)
    if variant == "road_2":
        return array.reshape(1, -1)
    return array.reshape(-1, 2, group_size).swapaxes(0, 1).reshape(2, -1)


def _gather(array: Array, variant: str, group_size: int) -> Array:
    """Inverts `_spread`."""
    if variant == "road_1":
        return np.ascontiguousarray(array.reshape(-1, 2, group_size // 2)[:, 0]).reshape(-1)
    if variant == "road_2":
        return array.reshape(-1)
    return np.ascontiguousarray(array.reshape(2, -1, group_size).swapaxes(0, 1)).reshape(-1)


def _turn(array: Array, head_size: int, side: str) -> Array:
    """Permutes the outputs of each head, from Flax's interleaved order to PyTorch's halves or back."""
    form = (-1, head_size // 2, 2) if side == "flax" else (-1, 2, head_size // 2)
    return np.ascontiguousarray(array.reshape(len(array), *form).swapaxes(-1, -2)).reshape(array.shape)


def _widths(rows: Sequence[Row], total: int, path: str, model: Mapping[str, Any] | None) -> list[int]:
    """Returns the number of outputs of each part of a module with ``total`` outputs."""
    if any(row.interleaved for row in rows) and total % _head_size(model, path):
        raise AdapterError(f"{path}: expected outputs of whole heads of {_head_size(model, path)}, found {total}")
    if len(rows) == 1:
        return [total]
    if all(row.width == "equal" for row in rows):
        return [total // len(rows)] * len(rows)
    widths = [_known_width(row, path, model) for row in rows]
    if sum(widths) != total:
        raise AdapterError(f"{path}: expected {sum(widths)} outputs, as the model's config says, found {total}")
    return widths


def _filled(
    parts: Sequence[Row],
    sections: Mapping[Row, tuple[Array, ...]],
    path: str,
    config: RoadConfig,
    model: Mapping[str, Any] | None,
) -> tuple[Array, ...]:
    """Joins the parts of a fused module; parts without an adapter are the identity."""
    some = next(iter(sections.values()))
    dtypes = {str(array.dtype) for section in sections.values() for array in section}
    if len(dtypes) > 1:
        raise AdapterError(f"{path}: expected one dtype in all of its parts, found {', '.join(sorted(dtypes))}")
    joined: list[list[Array]] = [[], []]
    start = 0
    for part in parts:
        if part in sections:
            section = sections[part]
        else:
            width = some[0].shape[1] if part.width == "equal" else _known_width(part, path, model)
            section = tuple(_constant(value, (len(some[0]), width), some[0].dtype) for value in (0.0, 1.0))
        if start % config.group_size:
            raise AdapterError(
                f"{path}: expected parts of whole groups of {config.group_size} outputs, found one that would start at "
                f"output {start} of the fused layer"
            )
        start += section[0].shape[1]
        for arrays, array in zip(joined, section, strict=True):
            arrays.append(array)
    return tuple(np.concatenate(arrays, axis=1) for arrays in joined)


def _constant(value: float, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    exact = np.full(shape, value, np.float32)
    return from_float32(exact, dtype) if is_bfloat16(dtype) else exact.astype(dtype)


def _known_width(row: Row, path: str, model: Mapping[str, Any] | None) -> int:
    heads = "num_attention_heads" if row.width == "heads" else "num_key_value_heads"
    count = (
        _integer(model, heads, path)
        if model is None or heads in model
        else _integer(model, "num_attention_heads", path)
    )
    return count * _head_size(model, path)


def _head_size(model: Mapping[str, Any] | None, path: str) -> int:
    if model is not None and model.get("head_dim") is not None:
        size = _integer(model, "head_dim", path)
    else:
        size = _integer(model, "hidden_size", path) // _integer(model, "num_attention_heads", path)
    if size < 2 or size % 2:
        raise AdapterError(f"{path}: expected an even head size in the model's config, found {size}")
    return size


def _integer(model: Mapping[str, Any] | None, name: str, path: str) -> int:
    if model is None:
        raise AdapterError(f"{path}: expected the model's config for the sizes of its heads, found none given")
    value = model.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{path}: expected a number of at least 1 as {name} in the model's config, found {value!r}")
    return value
