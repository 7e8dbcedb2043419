"""A mixture's experts: MLPs of which each token takes a few (Shazeer et al., "Sparsely-gated MoE", arXiv 1701.06538).

No token is dropped. An expert's tokens fill blocks of a fixed number of rows. A loop over the experts that have tokens,
and within it one over their blocks, multiplies each block with its expert's kernel: the arithmetic follows the choices,
and the shapes don't.

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

# A block has about half as many rows as an expert has tokens, within these limits: of more, more would be empty.
_ROWS = 8, 128

Kernel = jax.Array | QuantizedKernel


class Order(NamedTuple):
    """Which blocks are whose.

    Attributes:
        starts: int32 ``[experts]``, the first of each expert's blocks.
        ends: int32 ``[experts]``, the block after its last one.
        busy: int32 ``[experts]``, the experts, those that have blocks first.
        used: int32, how many have blocks.
    """

    starts: jax.Array
    ends: jax.Array
    busy: jax.Array
    used: jax.Array


class Plan(NamedTuple):
    """Which choice has which row.

    Attributes:
        choices: int32 ``[blocks, rows]``, the choice in each row, counted through all tokens; the number of choices
            where there is none.
        places: int32 ``[tokens, choices]``, the row of each choice, counted through all blocks.
        order: whose the blocks are.
    """

    choices: jax.Array
    places: jax.Array
    order: Order


def plan(chosen: jax.Array, experts: int) -> Plan:
    """Returns the blocks for int32 ``[tokens, choices]``: which of the experts each token takes."""
    tokens, choices = chosen.shape
    total = tokens * choices
    least, most = _ROWS
    rows = min(max(least, 1 << max((total // experts).bit_length() - 2, 0)), most)
    # One block for each expert that may have tokens is only in part filled.
    blocks = (total + min(total, experts) * (rows - 1)) // rows
    by_expert = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)
    sizes = jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32)
    filled = -(-sizes // rows)
    ends = jnp.cumsum(filled)
    # How far an expert's rows lie behind its choices, where these are sorted by expert.
    shifts = (ends - filled) * rows - (jnp.cumsum(sizes) - sizes)
    at = jnp.arange(total, dtype=jnp.int32) + jnp.repeat(shifts, sizes, total_repeat_length=total)
    places = jnp.zeros(total, jnp.int32).at[by_expert].set(at, unique_indices=True)
    of_rows = jnp.full(blocks * rows, total, jnp.int32).at[at].set(by_expert, unique_indices=True)
    busy = jnp.argsort(filled == 0, stable=True).astype(jnp.int32)
    order = Order(ends - filled, ends, busy, jnp.sum(filled > 0, dtype=jnp.int32))
    return Plan(of_rows.reshape(blocks, rows), places.reshape(chosen.shape), order)


# Each of the next two is the other's transpose, but for the sum over choices. Told so, JAX gathers in the backward pass
# too; else it would scatter, row by row.


@jax.custom_vjp
def spread(x: jax.Array, made: Plan) -> jax.Array:
    """Lays tokens ``[tokens, hidden]`` into blocks ``[blocks, rows, hidden]``, with zeros in empty rows."""
    return x.at[made.choices // made.places.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def collect(blocks: jax.Array, made: Plan) -> jax.Array:
    """Takes the choices ``[tokens, choices, hidden]`` from the rows of blocks ``[blocks, rows, hidden]``."""
    return blocks.reshape(-1, blocks.shape[-1])[made.places]


def _spread_back(made: Plan, d: jax.Array) -> tuple[jax.Array, None]:
    return jnp.sum(collect(d, made), axis=1), None


def _collect_back(made: Plan, d: jax.Array) -> tuple[jax.Array, None]:
    return d.reshape(-1, d.shape[-1]).at[made.choices].get(mode="fill", fill_value=0), None


spread.defvjp(lambda x, made: (spread(x, made), made), _spread_back)
collect.defvjp(lambda blocks, made: (collect(blocks, made), made), _collect_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def products(x: jax.Array, kernel: Kernel, order: Order, axes: tuple[str, ...] = ()) -> jax.Array:
    """Multiplies each block with its expert's kernel.

    Args:
        x: ``[blocks, rows, in]``.
        kernel: ``[experts, in, out]``; quantised ones are dequantised one by one, and get no gradient.
        order: whose the blocks are.
        axes: within `jax.shard_map`, the mesh's axes; all arguments are taken to vary along them.

    Returns:
        ``[blocks, rows, out]`` in the dtype of ``x``; zeros in blocks that are nobody's.
    """
    return _products(x, kernel, order, axes, transposed=False)


def _forward(x: jax.Array, kernel: Kernel, order: Order, axes: tuple[str, ...]) -> tuple[jax.Array, Any]:
    return _products(x, kernel, order, axes, transposed=False), (x, kernel, order)


def _backward(axes: tuple[str, ...], kept: Any, d: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    x, kernel, order = kept
    dx = _products(d, kernel, order, axes, transposed=True)
    if isinstance(kernel, QuantizedKernel):
        return dx, None, None

    def of_expert(expert: jax.Array, kernels: jax.Array) -> jax.Array:
        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + (x[i].T @ d[i]).astype(total.dtype)

        total = jax.lax.fori_loop(order.starts[expert], order.ends[expert], add, jnp.zeros_like(kernels[0]))
        return jax.lax.dynamic_update_index_in_dim(kernels, total, expert, 0)

    # These loops are left out of a compiled program that doesn't return the kernels' gradient.
    return dx, _over_busy(of_expert, order, _varying(jnp.zeros(kernel.shape, kernel.dtype), axes)), None


products.defvjp(_forward, _backward)


def _products(x: jax.Array, kernel: Kernel, order: Order, axes: tuple[str, ...], *, transposed: bool) -> jax.Array:
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))

    def of_expert(expert: jax.Array, y: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, expert, keepdims=False), kernel)
        own = (own.dequantize() if isinstance(own, QuantizedKernel) else own).astype(x.dtype)

        def multiply(i: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(y, jax.lax.dot_general(x[i], own, dimensions), i, 0)

        return jax.lax.fori_loop(order.starts[expert], order.ends[expert], multiply, y)

    size = kernel.shape[-2 if transposed else -1]
    return _over_busy(of_expert, order, _varying(jnp.zeros((*x.shape[:2], size), x.dtype), axes))


def _over_busy(of_expert: Callable[[jax.Array, jax.Array], jax.Array], order: Order, start: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, order.used, lambda i, y: of_expert(order.busy[i], y), start)


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
        param_dtype: the dtype of the params.
        mesh: if given, each device computes its own rows of the batch, with its share of the experts' widths.
    """

    mixture: MixtureConfig
    activation: Callable[[jax.Array], jax.Array]
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
        params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
        places = _mesh.shardings({"params": params}, mesh, stored=False)["params"]
        specs = {name: jax.tree.map(lambda place: place.spec, places[name]["kernel"]) for name in kernels}
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
            return checkpoint_name(products(blocks, kernels[name], made.order, axes), PRODUCT)

        blocks = spread(x.reshape(-1, x.shape[-1]), made)
        wide = self.activation(product("gate_proj", blocks)) * product("up_proj", blocks)
        results = collect(product("down_proj", wide), made).astype(jnp.float32)
        return jnp.sum(results * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)


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
