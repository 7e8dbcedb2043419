"""Where θ and α are placed on a mesh: along the outputs that they rotate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from road_core import AdapterError, RoadConfig, output_size
from road_jax._layout import Place
from road_jax._quantize import QuantizedKernel, filled, shares
from road_jax._tree import ROAD_LEAVES, Path, Tree, dotted, flatten, params_of, unflatten


def shardings(
    adapter: Tree, variables_shardings: Tree, *, config: RoadConfig | None = None, allow_cut: bool = False
) -> Tree:
    """Returns shardings for an adapter that follow those of its layers' kernels.

    θ and α are sharded like their kernel's outputs, and their stack axis like the kernel's. They are replicated over
    mesh axes that shard a kernel's inputs (FSDP). If outputs are sharded in whole groups, the rotation adds no
    collective to a compiled program, forward or backward, except the sum of its own gradients over the data axis.

    The model isn't known here: each layer is assumed to have a ``kernel`` ``[*stack, in, *out]``, with θ's stack axes
    in front and one axis of inputs. For other kernels use `Road.shardings`, which knows the model.

    Args:
        adapter: as returned by ``Road.init``; shapes are enough (``jax.eval_shape``).
        variables_shardings: a tree of ``NamedSharding`` laid out like the model's variables, ``{"params": …}``; an
            array on a single device may have its ``SingleDeviceSharding``.
        config: the adapter's config. With it, shards that cut a group of ``config.group_size`` outputs are refused.
        allow_cut: don't refuse them. Each such layer then costs two all-gathers, a permutation and all-to-alls of its
            output, in every pass.

    Returns:
        A tree of shardings laid out like the adapter.

    Raises:
        AdapterError: a module's kernel has no sharding or one of another type, or a group is cut.

    Example:
        >>> import jax, numpy as np, road_jax
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        >>> kernel = {"params": {"proj": {"kernel": NamedSharding(mesh, P(None, "model"))}}}
        >>> adapter = {"proj": {"road_theta": np.zeros(64), "road_alpha": np.ones(64)}}
        >>> tuple(road_jax.shardings(adapter, kernel)["proj"]["road_theta"].spec)
        ('model',)
    """
    return along_kernels(adapter, variables_shardings, {}, config=config, allow_cut=allow_cut)


def along_kernels(
    adapter: Tree,
    variables_shardings: Tree,
    places: Mapping[Path, Place],
    *,
    config: RoadConfig | None,
    allow_cut: bool,
) -> Tree:
    """Like `shardings`, but uses the places of the layers that are known."""
    given = flatten(params_of(variables_shardings, "variables_shardings"))
    found = {}
    for path, leaf in flatten(adapter).items():
        if path[-1] not in ROAD_LEAVES:
            found[path] = _at(given, path)
            continue
        place, name = places.get(path[:-1]), dotted(path[:-1])
        kernel = _at(given, (*path[:-1], place.layout.kernel if place else "kernel"))
        if isinstance(kernel, QuantizedKernel):
            kernel = _plain(kernel, len(place.marks["kernel"]) if place and place.marks else len(leaf.shape) + 1)
        if isinstance(kernel, SingleDeviceSharding):
            found[path] = kernel
            continue
        if not isinstance(kernel, NamedSharding):
            raise AdapterError(f"{name}: expected a NamedSharding of its kernel, found a {type(kernel).__name__}")
        lie = _known(kernel.spec, place) if place else _assumed(kernel.spec, len(leaf.shape))
        if config is not None and not allow_cut:
            _check_whole(name, kernel, leaf.shape[lie.own], lie, config)
        entries = lie.stack | {lie.own: lie.outputs[0]}
        # If groups are cut, the shards may not be of equal size.
        even = {axis: entry for axis, entry in entries.items() if leaf.shape[axis] % shares(kernel.mesh, entry) == 0}
        found[path] = NamedSharding(kernel.mesh, _spec(even))
    return unflatten(found)


def _at(given: dict[Path, Any], path: Path) -> Any:
    if path not in given:
        raise AdapterError(f"{dotted(path)}: expected a sharding for it in variables_shardings['params'], found none")
    return given[path]


def _plain(kernel: QuantizedKernel, axes: int) -> Any:
    """Returns where a quantised kernel, with codes ``[*stack, out, in]``, would be placed if it were plain."""
    codes: Any = kernel.codes
    if not isinstance(codes, NamedSharding):
        return codes
    *stack, outputs, inputs = filled(codes.spec, axes)
    return NamedSharding(codes.mesh, PartitionSpec(*stack, inputs, outputs))


@dataclasses.dataclass(frozen=True)
class _Lie:
    """What a kernel's spec says about θ: the entry of each output axis, and of each stack axis by its index in θ."""

    own: int
    stack: dict[int, Any]
    outputs: list[Any]


def _known(spec: PartitionSpec, place: Place) -> _Lie:
    marks = place.marks or {}
    kernel, of_theta = marks[place.layout.kernel], marks["road_theta"]
    entries = filled(spec, len(kernel))
    axes = [axis for axis, size in enumerate(kernel) if not size]
    # An axis of one element is never cut, so the axis after it counts as the first.
    outputs = [
        entries[axes[axis]]
        for axis, size in zip(place.layout.kernel_axes, place.sizes, strict=True)
        if size > 1 or len(place.sizes) == 1
    ]
    stack = dict(
        zip(place.stack("road_theta"), (entries[axis] for axis in place.stack(place.layout.kernel)), strict=True)
    )
    return _Lie(of_theta.index(0), stack, outputs or [None])


def _assumed(spec: PartitionSpec, axes: int) -> _Lie:
    """Reads the spec of a kernel ``[*stack, in, *out]`` for a θ with this many axes."""
    own = axes - 1
    entries = filled(spec, own + 2)
    return _Lie(own, dict(enumerate(entries[:own])), entries[own + 1 :])


def _spec(entries: Mapping[int, Any]) -> PartitionSpec:
    sharded = {axis: entry for axis, entry in entries.items() if entry is not None}
    return PartitionSpec(*(sharded.get(axis) for axis in range(max(sharded, default=-1) + 1)))


def _check_whole(path: str, kernel: NamedSharding, size: int, lie: _Lie, config: RoadConfig) -> None:
    cost = (
        "cut groups cost two all-gathers, a permutation and all-to-alls a pass (a smaller group_size avoids them, "
        "allow_cut pays for them)"
    )
    if any(shares(kernel.mesh, entry) > 1 for entry in lie.outputs[1:]):
        raise AdapterError(
            f"{path}: expected a kernel whose outputs are sharded by the first of their axes alone, found "
            f"{kernel.spec}; {cost}; Road.shardings knows kernels that aren't [in, *out]"
        )
    shards, out = shares(kernel.mesh, lie.outputs[0]), output_size(config.variant, size)
    if out % (shards * config.group_size):
        raise AdapterError(
            f"{path}: expected {shards} shards of whole groups of {config.group_size} outputs, "
            f"found {out} outputs; {cost}"
        )
