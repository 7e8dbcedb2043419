"""A mixture's experts: MLPs of which each token takes a few (Shazeer et al., "Sparsely-gated MoE", arXiv 1701.06538).

No token is dropped. Each expert's tokens fill blocks of a fixed number of rows, and a loop over the blocks that are
there multiplies each with its expert's kernel: the arithmetic follows the choices, and the shapes don't.

Shapes: ``tokens``, ``choices`` (of each token), ``blocks``, ``rows`` (of a block).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from road_core import AdapterError
from road_jax._quantize import BLOCK, QuantizedKernel
from road_jax.models import _mesh
from road_jax.models._config import MixtureConfig

# The name of products with kernels, for checkpoint policies.
PRODUCT = "experts"

# A block has about as many rows as an expert has tokens, within these limits: more would be empty in the last one.
_ROWS = 8, 128

Kernel = jax.Array | QuantizedKernel


class Plan(NamedTuple):
    """Which tokens each block has.

    Attributes:
        tokens: int32 ``[blocks, rows]``, the token in each row; the number of tokens where there is none.
        experts: int32 ``[blocks]``, the expert of each block.
        used: int32, how many of the blocks have tokens; they come first.
        places: int32 ``[tokens, choices]``, the row of each choice, counted through all blocks.
    """

    tokens: jax.Array
    experts: jax.Array
    used: jax.Array
    places: jax.Array


def plan(chosen: jax.Array, count: int) -> Plan:
    """Returns blocks for int32 ``[tokens, choices]``, the experts of each token, of which there are ``count``."""
    tokens, choices = chosen.shape
    total = tokens * choices
    least, most = _ROWS
    rows = min(max(least, 1 << (-(-total // count) - 1).bit_length()), most)
    # One block for each expert that may have tokens is only in part filled.
    blocks = (total + min(total, count) * (rows - 1)) // rows
    order = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)
    sizes = jnp.bincount(chosen.reshape(-1), length=count).astype(jnp.int32)
    filled = -(-sizes // rows)
    # How far an expert's rows lie behind its choices, where these are sorted by expert.
    shifts = (jnp.cumsum(filled) - filled) * rows - (jnp.cumsum(sizes) - sizes)
    by_expert = jnp.arange(total, dtype=jnp.int32) + jnp.repeat(shifts, sizes, total_repeat_length=total)
    places = jnp.zeros(total, jnp.int32).at[order].set(by_expert, unique_indices=True)
    held = jnp.full(blocks * rows, tokens, jnp.int32).at[by_expert].set(order // choices, unique_indices=True)
    experts = jnp.repeat(jnp.arange(count, dtype=jnp.int32), filled, total_repeat_length=blocks)
    return Plan(held.reshape(blocks, rows), experts, jnp.sum(filled), places.reshape(chosen.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def products(
    x: jax.Array, kernel: Kernel, experts: jax.Array, used: jax.Array, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Multiplies each block with its expert's kernel.

    Args:
        x: ``[blocks, rows, in]``.
        kernel: ``[experts, in, out]``; quantised ones are dequantised block by block, and get no gradient.
        experts: int32 ``[blocks]``.
        used: int32, how many blocks count.
        axes: within `jax.shard_map`, the mesh's axes; all arguments are taken to vary along them.

    Returns:
        ``[blocks, rows, out]`` in the dtype of ``x``; zeros in the blocks that don't count.
    """
    return _products(x, kernel, experts, used, axes, transposed=False)


def _forward(
    x: jax.Array, kernel: Kernel, experts: jax.Array, used: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, Any]:
    return _products(x, kernel, experts, used, axes, transposed=False), (x, kernel, experts, used)


def _backward(axes: tuple[str, ...], kept: Any, d: jax.Array) -> tuple[jax.Array, jax.Array | None, None, None]:
    x, kernel, experts, used = kept
    dx = _products(d, kernel, experts, used, axes, transposed=True)
    if isinstance(kernel, QuantizedKernel):
        return dx, None, None, None

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total.at[experts[i]].add((x[i].T @ d[i]).astype(total.dtype))

    # This loop is left out of a compiled program that doesn't return the kernels' gradient.
    start = _varying(jnp.zeros(kernel.shape, kernel.dtype), axes)
    return dx, jax.lax.fori_loop(0, used, add, start), None, None


products.defvjp(_forward, _backward)


def _products(
    x: jax.Array, kernel: Kernel, experts: jax.Array, used: jax.Array, axes: tuple[str, ...], *, transposed: bool
) -> jax.Array:
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))

    def multiply(i: jax.Array, y: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, experts[i], keepdims=False), kernel)
        own = own.dequantize() if isinstance(own, QuantizedKernel) else own
        product = jax.lax.dot_general(x[i], own.astype(x.dtype), dimensions)
        return jax.lax.dynamic_update_index_in_dim(y, product, i, 0)

    sizes = kernel.shape[-2:]
    start = jnp.zeros((*x.shape[:2], sizes[0] if transposed else sizes[1]), x.dtype)
    return jax.lax.fori_loop(0, used, multiply, _varying(start, axes))


def _varying(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Says to `jax.shard_map` that an array's values may differ along these axes of the mesh."""
    return jax.lax.pcast(array, axes, to="varying") if axes else array


class _Kernel(nn.Module):
    """The kernels ``[experts, in, out]`` of all experts' layers of one name."""

    shape: tuple[int, int, int]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> Kernel:
        if self.has_variable("params", "kernel"):
            # A quantised one wouldn't have the shape that Flax expects.
            found = self.get_variable("params", "kernel")
            if isinstance(found, QuantizedKernel):
                return found
        return self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), self.shape, self.param_dtype)


class Experts(nn.Module):
    """``Σ weight · down(act(gate(x)) · up(x))`` over the experts that each token takes: those of greatest probability.

    Attributes:
        mixture: how many there are and how many each token takes.
        activation: act.
        dtype: the dtype of the computation.
        param_dtype: the dtype of the params.
        mesh: if given, each device computes its own rows of the batch, with its share of the experts' widths.
    """

    mixture: MixtureConfig
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: jax.Array, probabilities: jax.Array) -> jax.Array:
        """Returns ``[batch, length, hidden]`` in the dtype of ``x``.

        Args:
            x: ``[batch, length, hidden]``.
            probabilities: float32 ``[batch, length, experts]``.

        Raises:
            AdapterError: the mesh cuts blocks of nf4.
        """
        wide, narrow = (x.shape[-1], self.mixture.width), (self.mixture.width, x.shape[-1])
        kernels = {
            name: _Kernel((self.mixture.experts, *shape), self.param_dtype, name=name)()
            for name, shape in {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}.items()
        }
        mesh = self.mesh
        # shard_map has no unequal shares, which a batch may have in evaluation; XLA then places what it computes.
        if mesh is None or len(x) % (mesh.shape["data"] * mesh.shape["fsdp"]):
            return self._mixed(x, probabilities, kernels)
        places = _mesh.computed({(name, "kernel"): kernel for name, kernel in kernels.items()}, mesh)
        specs = jax.tree.map(lambda place: place.spec, {name: places[name, "kernel"] for name in kernels})
        for name, kernel in kernels.items():
            _check_blocks(f"{'.'.join(self.path)}.{name}", kernel, specs[name], mesh)
        rows = _mesh.rows_sharding(mesh).spec
        given = rows, rows, specs

        def share(*args: Any) -> jax.Array:
            x, probabilities, kernels = jax.tree.map(_everywhere, args, given)
            kernels = {name: _local(kernel) for name, kernel in kernels.items()}
            return self._mixed(x, probabilities, kernels, _mesh.AXES)[None]

        # The shares of the width give parts of the sum.
        shares = jax.shard_map(share, mesh=mesh, in_specs=given, out_specs=P("tensor", *rows))
        return jnp.sum(shares(x, probabilities, kernels), axis=0)

    def _mixed(
        self, x: jax.Array, probabilities: jax.Array, kernels: dict[str, Kernel], axes: tuple[str, ...] = ()
    ) -> jax.Array:
        m = self.mixture
        # On a mesh this must be among what is cut by hand: XLA would gather all tokens to sort them.
        weights, chosen = jax.lax.top_k(probabilities.reshape(-1, m.experts), m.choices)
        if m.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        made = plan(chosen, m.experts)

        def product(name: str, blocks: jax.Array) -> jax.Array:
            return checkpoint_name(products(blocks, kernels[name], made.experts, made.used, axes), PRODUCT)

        blocks = x.reshape(-1, x.shape[-1]).at[made.tokens].get(mode="fill", fill_value=0)
        wide = self.activation(product("gate_proj", blocks)) * product("up_proj", blocks)
        results = product("down_proj", wide).reshape(-1, x.shape[-1])[made.places]
        return jnp.sum(results.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def _everywhere(array: jax.Array, spec: P) -> jax.Array:
    """Lets a share that is the same along some of the mesh's axes count as different, as `products` takes it."""
    along = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
    return _varying(array, tuple(axis for axis in _mesh.AXES if axis not in along))


def _check_blocks(path: str, kernel: Kernel, spec: Any, mesh: Mesh) -> None:
    """Refuses shares of nf4 in which a scale is for numbers of several shares."""
    if isinstance(kernel, QuantizedKernel) and kernel.kind == "nf4":
        *_, inputs = spec.codes
        if inputs is not None and (spec.scales[-1] is None or kernel.shape[0] % BLOCK):
            raise AdapterError(
                f"{path}: expected an axis tensor that cuts {kernel.shape[0]} inputs into whole blocks of {BLOCK}, "
                f"found tensor={mesh.shape['tensor']}"
            )


def _local(kernel: Kernel) -> Kernel:
    """Gives a device's share of a quantised kernel its own shape."""
    if not isinstance(kernel, QuantizedKernel) or kernel.codes.shape[-2] == 1:
        return kernel
    *_, outputs, width = kernel.codes.shape
    return dataclasses.replace(kernel, shape=(width * (2 if kernel.kind == "nf4" else 1), outputs))
