"""Where a decoder's params are placed on a mesh with the axes data, fsdp and tensor."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from road_core import AdapterError
from road_jax._quantize import QuantizedKernel, quantized_shardings
from road_jax._tree import Path, Tree, dotted, flatten, params_of, unflatten
from road_jax.models._config import DecoderConfig

# Rows of a batch are split over the first two; the second also stores a share of each weight, the third computes one.
AXES = ("data", "fsdp", "tensor")

# How the last axes of a layer's params are sharded, by the layer's name. Heads, the MLP's width and the vocabulary are
# computed in shares (Megatron-LM, arXiv 1909.08053); the hidden size remains to be stored in shares (ZeRO, arXiv
# 1910.02054).
_COLUMNS = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
_ROWS = {"kernel": P("tensor", "fsdp"), "bias": P()}
_RULES = {
    "embed_tokens": {"embedding": P("tensor", "fsdp")},
    "q_proj": _COLUMNS,
    "k_proj": _COLUMNS,
    "v_proj": _COLUMNS,
    "o_proj": _ROWS,
    "gate_proj": _COLUMNS,
    "up_proj": _COLUMNS,
    "down_proj": _ROWS,
    # The parts of a fused layer are whole again before they are used, which costs a gather of its outputs.
    "qkv_proj": _COLUMNS,
    "gate_up_proj": _COLUMNS,
    "lm_head": _COLUMNS,
}


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Returns a mesh of all devices with the axes data, fsdp and tensor.

    Args:
        sizes: the axes' sizes; axes that aren't named have size 1. By default all devices are on the data axis.

    Raises:
        AdapterError: an axis is unknown, a size isn't a whole number, or the product of the sizes isn't the number of
            devices.
    """
    count = jax.device_count()
    sizes = {"data": count} if sizes is None else sizes
    said = ",".join(f"{name}={size}" for name, size in sizes.items())
    if unknown := [name for name in sizes if name not in AXES]:
        raise AdapterError(f"mesh: expected the axes {', '.join(AXES)}, found {unknown[0]!r}")
    if wrong := [name for name, size in sizes.items() if not isinstance(size, int | np.integer)]:
        raise AdapterError(f"mesh: expected whole numbers as sizes, found {wrong[0]}={sizes[wrong[0]]!r}")
    if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
        raise AdapterError(f"mesh: expected sizes that multiply to the {count} devices, found {said}")
    return Mesh(np.asarray(jax.devices()).reshape([sizes.get(name, 1) for name in AXES]), AXES)


def check_axes(mesh: Mesh) -> None:
    """Refuses a mesh that lacks one of the axes.

    Raises:
        AdapterError: one is missing.
    """
    names = getattr(mesh, "axis_names", None)
    if names is None or any(name not in names for name in AXES):
        found = type(mesh).__name__ if names is None else ", ".join(names)
        raise AdapterError(f"mesh: expected the axes {', '.join(AXES)} (make_mesh), found {found}")


def check_mesh(config: DecoderConfig, mesh: Mesh) -> None:
    """Refuses a mesh that lacks an axis or would cut a model where it can't be cut.

    Raises:
        AdapterError: there is no axis data, fsdp or tensor, the tensor axis doesn't divide the heads, the MLP's width
            or the vocabulary, or the fsdp axis doesn't divide the hidden size.
    """
    check_axes(mesh)
    names = ("num_attention_heads", "num_key_value_heads", "vocab_size")
    sizes = [(name, getattr(config, name), "tensor") for name in names]
    mixture = config.mixture
    if mixture is None:
        sizes.append(("intermediate_size", config.intermediate_size, "tensor"))
    else:
        sizes.append(("experts' width", mixture.width, "tensor"))
        sizes.append(("shared expert's width", mixture.shared_width or 0, "tensor"))
    for name, size, axis in (*sizes, ("hidden_size", config.hidden_size, "fsdp")):
        if size % mesh.shape[axis]:
            raise AdapterError(
                f"mesh: expected an axis {axis} that divides the model's {name} {size}, found {axis}={mesh.shape[axis]}"
            )


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of ``[batch, …]``: its rows are split over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def by_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps ``[batch, …]`` sharded by the batch's rows; left to XLA, it might follow a weight's shards."""
    if mesh is None:
        return x
    # Only compiled programs can have unequal shards, so outside of one this compiles its own.
    uneven = len(x) % (mesh.shape["data"] * mesh.shape["fsdp"])
    return (_compiled_by_rows if uneven else _by_rows)(x, mesh)


def _by_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, rows_sharding(mesh))


_compiled_by_rows = jax.jit(_by_rows, static_argnums=1)


def gathered(params: Tree, mesh: Mesh, *, under: tuple[str, ...] = ()) -> Tree:
    """Returns params as they are computed with: what fsdp stores in shares is whole, also codes of quantised kernels.

    θ and α, which may be among them, stay where they are.

    Args:
        params: a module's params, within a compiled program.
        mesh: with the axes data, fsdp and tensor.
        under: the module's path, as far as the rules need it.
    """

    def pinned(path: Path, leaf: Any) -> Any:
        where = _where((*under, *path), leaf, mesh, stored=False)
        if where is None:
            return leaf
        if mesh.shape["fsdp"] > 1:
            # Otherwise XLA would lay out all layers for this gather before the loop over them, in a second copy.
            leaf = jax.lax.optimization_barrier(leaf)
        return jax.lax.with_sharding_constraint(leaf, where)

    return unflatten({path: pinned(path, leaf) for path, leaf in flatten(params).items()})


def shardings(variables: Mapping[str, Any], mesh: Mesh, *, stored: bool = True) -> Tree:
    """Returns shardings for a decoder's variables, laid out like them.

    Args:
        variables: as returned by `road_jax.models.load`; shapes are enough.
        mesh: with the axes data, fsdp and tensor (`make_mesh`).
        stored: True for how params are stored. False for how they are computed with: gathered over fsdp, so that an
            adapter along a kernel's outputs (`road_jax.shardings`) is sharded only over the tensor axis.

    Returns:
        A tree of ``NamedSharding``; norms, and whatever no rule names, are replicated. Codes and scales of a quantised
        kernel are sharded as the kernel would be.

    Raises:
        AdapterError: the mesh lacks one of the axes, or they don't divide a quantised kernel's codes.
    """
    check_axes(mesh)
    everywhere = NamedSharding(mesh, P())
    leaves = flatten(params_of(variables))
    found = {
        path: _where(path, leaf, mesh, stored=stored) or jax.tree.map(lambda _: everywhere, leaf)
        for path, leaf in leaves.items()
    }
    return {"params": unflatten(found)}


def placed(array: Any, where: NamedSharding) -> jax.Array:
    """Places an array that every process holds whole; each places its own devices' part, without communication."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def _where(path: Path, leaf: Any, mesh: Mesh, *, stored: bool) -> Any:
    """Returns the sharding of a leaf, or of a quantised kernel's codes and scales; None if no rule names it."""
    spec = _RULES.get(path[-2], {}).get(path[-1]) if len(path) > 1 else None
    if spec is None:
        return None
    kept = [axis if stored or axis != "fsdp" else None for axis in spec]
    quantized = isinstance(leaf, QuantizedKernel)
    axes = len((leaf.codes if quantized else leaf).shape)
    # Stack axes come first and are never cut.
    where = NamedSharding(mesh, P(*[None] * (axes - len(kept)), *kept) if any(kept) else P())
    return quantized_shardings(dotted(path), leaf, where) if quantized else where
