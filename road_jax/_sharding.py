"""Where θ and α stand on a mesh: along the outputs that they rotate."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from road_core import AdapterError, RoadConfig, output_size
from road_jax._quantize import QuantizedKernel
from road_jax._tree import ROAD_LEAVES, Path, Tree, dotted, flatten, unflatten


def shardings(
    adapter: Tree, variables_shardings: Tree, *, config: RoadConfig | None = None, allow_cut: bool = False
) -> Tree:
    """Returns shardings for an adapter that follow those of its layers' kernels.

    θ and α are sharded as their kernel's outputs, and their stack axis as the kernel's; over axes that shard a kernel's
    inputs (FSDP) they are replicated. With outputs in whole groups the rotation then adds no collective to a compiled
    program, forward or backward, but the sum of its own gradients over the data axis.

    Args:
        adapter: as ``Road.init`` gives it; shapes are enough (``jax.eval_shape``).
        variables_shardings: a tree of ``NamedSharding`` laid out like the model's variables, ``{"params": …}``.
        config: of the adapter. With it, shards that cut a group of ``config.group_size`` outputs are refused.
        allow_cut: don't refuse them. Each such layer then pays two all-gathers, a permutation and all-to-alls of its
            output, in every pass.

    Returns:
        A tree of ``NamedSharding`` laid out like the adapter.

    Raises:
        AdapterError: a module has no kernel among the shardings, or a group is cut.

    Example:
        >>> import jax, numpy as np, road_jax
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        >>> kernel = {"params": {"proj": {"kernel": NamedSharding(mesh, P(None, "model"))}}}
        >>> adapter = {"proj": {"road_theta": np.zeros(64), "road_alpha": np.ones(64)}}
        >>> tuple(road_jax.shardings(adapter, kernel)["proj"]["road_theta"].spec)
        ('model',)
    """
    given = flatten(variables_shardings["params"])
    found = {}
    for path, leaf in flatten(adapter).items():
        if path[-1] not in ROAD_LEAVES:
            found[path] = _at(given, path)
            continue
        kernel = _plain(_at(given, (*path[:-1], "kernel")), len(leaf.shape))
        found[path] = _along_outputs(kernel, len(leaf.shape))
        if config is not None and not allow_cut:
            _check_whole(dotted(path[:-1]), kernel.mesh, found[path].spec, leaf.shape[-1], config)
    return unflatten(found)


def quantized_shardings(path: str, kernel: QuantizedKernel, where: NamedSharding) -> QuantizedKernel:
    """Returns where codes and scales stand, for a kernel ``[*stack, in, out]`` that is to stand at ``where``.

    Scales lie with their codes; where a cut through the inputs would leave no whole blocks, each share has a row's all.
    Shapes are enough.

    Raises:
        AdapterError: the codes can't be divided so.
    """
    spec: list[Any] = [*where.spec, *[None] * (len(kernel.codes.shape) - len(where.spec))]
    *stack, inputs, outputs = spec
    shares = _shares(where.mesh, outputs), _shares(where.mesh, inputs)
    sizes = kernel.codes.shape[-2:]
    if sizes[0] % shares[0] or sizes[1] % shares[1]:
        raise AdapterError(
            f"{path}: expected {kernel.kind} codes that a mesh of {shares[0]} x {shares[1]} shares divides, "
            f"found {sizes[0]} x {sizes[1]}"
        )
    blocks = None if kernel.scales.shape[-1] % shares[1] else inputs
    specs = PartitionSpec(*stack, outputs, inputs), PartitionSpec(*stack, outputs, blocks)
    return jax.tree.unflatten(jax.tree.structure(kernel), [NamedSharding(where.mesh, each) for each in specs])


def _at(given: dict[Path, Any], path: Path) -> NamedSharding:
    if path not in given:
        raise AdapterError(f"{dotted(path)}: expected a sharding for it in variables_shardings['params'], found none")
    return given[path]


def _plain(kernel: Any, axes: int) -> NamedSharding:
    """A kernel's sharding; of a quantised one, whose codes stand as ``[*stack, out, in]``, as if it were plain."""
    if not isinstance(kernel, QuantizedKernel):
        return kernel
    codes: Any = kernel.codes
    spec: list[Any] = [*codes.spec, *[None] * (axes + 1 - len(codes.spec))]
    *stack, outputs, inputs = spec
    return NamedSharding(codes.mesh, PartitionSpec(*stack, inputs, outputs))


def _along_outputs(kernel: NamedSharding, axes: int) -> NamedSharding:
    """Of a kernel ``[*stack, *in, *out]``, for θ ``[*stack, size]`` of so many axes."""
    spec = tuple(kernel.spec)
    stack, rest = spec[: axes - 1], spec[axes - 1 :]
    # Outputs are flattened in order, so the first of their axes that is sharded lies along θ.
    outputs = next((entry for entry in rest[1:] if entry is not None), None)
    entries = [*stack, *[None] * (axes - 1 - len(stack)), outputs]
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(kernel.mesh, PartitionSpec(*entries))


def _check_whole(path: str, mesh: Any, spec: PartitionSpec, size: int, config: RoadConfig) -> None:
    entry = spec[-1] if len(spec) else None
    shards = _shares(mesh, entry)
    out = output_size(config.variant, size)
    if out % (shards * config.group_size):
        raise AdapterError(
            f"{path}: expected {shards} shards of whole groups of {config.group_size} outputs, found {out} outputs; "
            "cut groups cost two all-gathers, a permutation and all-to-alls a pass (a smaller group_size avoids them, "
            "allow_cut pays for them)"
        )


def _shares(mesh: Any, entry: Any) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)
