"""Where θ and α stand on a mesh: along the outputs that they rotate."""

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

    θ and α are sharded as their kernel's outputs, and their stack axis as the kernel's; over axes that shard a kernel's
    inputs (FSDP) they are replicated. With outputs in whole groups the rotation then adds no collective to a compiled
    program, forward or backward, but the sum of its own gradients over the data axis.

    No layer is known here: each is taken to have a ``kernel`` ``[*stack, in, *out]``, with θ's stack axes in front and
    one axis of inputs. `Road.shardings` knows how a model's kernels lie; take that one for others.

    Args:
        adapter: as ``Road.init`` gives it; shapes are enough (``jax.eval_shape``).
        variables_shardings: a tree of ``NamedSharding`` laid out like the model's variables, ``{"params": …}``; what
            lies on a single device may have its ``SingleDeviceSharding``.
        config: of the adapter. With it, shards that cut a group of ``config.group_size`` outputs are refused.
        allow_cut: don't refuse them. Each such layer then pays two all-gathers, a permutation and all-to-alls of its
            output, in every pass.

    Returns:
        A tree of shardings laid out like the adapter.

    Raises:
        AdapterError: a module has no kernel among the shardings, one of another kind, or a group is cut.

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
    """`shardings`, with the places of layers that are known."""
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
        # Where groups are cut, shares may not come out even.
        even = {axis: entry for axis, entry in entries.items() if leaf.shape[axis] % shares(kernel.mesh, entry) == 0}
        found[path] = NamedSharding(kernel.mesh, _spec(even))
    return unflatten(found)


def _at(given: dict[Path, Any], path: Path) -> Any:
    if path not in given:
        raise AdapterError(f"{dotted(path)}: expected a sharding for it in variables_shardings['params'], found none")
    return given[path]


def _plain(kernel: QuantizedKernel, axes: int) -> Any:
    """Where a quantised kernel of so many axes, with codes ``[*stack, out, in]``, would stand as a plain one."""
    codes: Any = kernel.codes
    if not isinstance(codes, NamedSharding):
        return codes
    *stack, outputs, inputs = filled(codes.spec, axes)
    return NamedSharding(codes.mesh, PartitionSpec(*stack, inputs, outputs))


@dataclasses.dataclass(frozen=True)
class _Lie:
    """What a kernel's spec says of θ: the entry of each of its outputs, and of the stack axes by their place in θ."""

    own: int
    stack: dict[int, Any]
    outputs: list[Any]


def _known(spec: PartitionSpec, place: Place) -> _Lie:
    marks = place.marks or {}
    kernel, of_theta = marks[place.layout.kernel], marks["road_theta"]
    entries = filled(spec, len(kernel))
    axes = [axis for axis, size in enumerate(kernel) if not size]
    # An axis of one element is never cut, and what comes behind it is as if it came first.
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
    """Of a kernel ``[*stack, in, *out]``, for θ of so many axes."""
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
