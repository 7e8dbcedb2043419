"""The rotation in JAX: pure functions on arrays.

A layer's coefficients have the shape ``[groups, 1 or 2, half]`` with ``half = group_size / 2``: for each group, one row
for its first half and one for its second, or a single row if both halves share it (road_1).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from road_core import AdapterError, check_group_size, output_size, parameter_size, subspace_mask
from road_core._reference import Subspace
from road_jax._tree import check_floating, is_cut


def polar(theta: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``α cos θ`` and ``α sin θ``, element by element, in float32 or wider.

    Compute them once for a whole stack, outside of the loop over its layers. Otherwise XLA fuses them into the product
    beside them and computes each cosine again for every row of the batch.
    """
    wide = theta.dtype if jnp.finfo(theta.dtype).bits > 32 else jnp.float32
    theta, alpha = theta.astype(wide), alpha.astype(wide)
    return alpha * jnp.cos(theta), alpha * jnp.sin(theta)


def blocks(cosines: jax.Array, sines: jax.Array, *, variant: str, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Reshapes the results of `polar` to ``first`` and ``second``.

    Args:
        cosines: α cos θ; ``[..., out/2]``, ``[..., out]`` or ``[..., 2·out]`` for road_1, road_2, road_4.
        sines: α sin θ; of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.

    Returns:
        ``first`` and ``second``, each ``[..., groups, 1 or 2, half]``.
    """
    lead, half = cosines.shape[:-1], group_size // 2
    if variant == "road_4":
        quarters = (*lead, cosines.shape[-1] // (4 * half), 2, 2, half)
        return cosines.reshape(quarters)[..., 0, :, :], sines.reshape(quarters)[..., 1, :, :]
    rows = 1 if variant == "road_1" else 2
    shape = (*lead, cosines.shape[-1] // (rows * half), rows, half)
    return cosines.reshape(shape), sines.reshape(shape)


def within(
    theta: jax.Array, alpha: jax.Array, *, variant: str, group_size: int, subspace: Subspace
) -> tuple[jax.Array, jax.Array]:
    """Replaces θ by 0 and α by 1 outside of a subspace, so that gradients there are exactly 0.

    Sines and cosines may be given for θ and α. The last axis is the layer's own; see `road_core.subspace_mask`.
    """
    if subspace is None:
        return theta, alpha
    out = output_size(variant, theta.shape[-1])
    mask = subspace_mask(out, variant=variant, group_size=group_size, subspace=subspace)
    mask = mask.reshape((1,) * (theta.ndim - 1) + mask.shape)
    return jnp.where(mask, theta, jnp.zeros_like(theta)), jnp.where(mask, alpha, jnp.ones_like(alpha))


def coefficients(
    theta: jax.Array, alpha: jax.Array, *, variant: str, group_size: int, subspace: Subspace = None
) -> tuple[jax.Array, jax.Array]:
    """Computes a layer's ``first`` and ``second`` in float32 or wider; see `blocks` and `road_core.coefficients`."""
    theta, alpha = within(theta, alpha, variant=variant, group_size=group_size, subspace=subspace)
    return blocks(*polar(theta, alpha), variant=variant, group_size=group_size)


def rotate(
    y: jax.Array,
    theta: jax.Array,
    alpha: jax.Array,
    *,
    variant: str,
    group_size: int,
    subspace: Subspace = None,
) -> jax.Array:
    """Rotates and scales the pairs of a linear layer's output, for models that are plain functions of params.

    A model that isn't a Flax module calls this after each product that is to be adapted, and takes θ and α like its
    other params. Computes ``y * first + rotate_half(y) * second``, see `road_core.rotate`. Differentiable in reverse
    mode only: ``jax.jvp`` isn't supported.

    Args:
        y: ``[..., out]``, any floating dtype.
        theta: ``[out/2]``, ``[out]`` or ``[2·out]`` for road_1, road_2, road_4; coefficients are computed in float32.
        alpha: of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.
        subspace: ``y`` is unchanged outside of it; see `road_core.subspace_blocks`.

    Returns:
        An array with the shape and dtype of ``y``.

    Raises:
        AdapterError: the sizes don't match.

    Example:
        >>> import jax.numpy as jnp, road_jax
        >>> def dense(params, x):
        ...     y = x @ params["w"]
        ...     return road_jax.rotate(y, params["theta"], params["alpha"], variant="road_1", group_size=2)
        >>> params = {"w": jnp.eye(2), "theta": jnp.array([jnp.pi / 2]), "alpha": jnp.array([2.0])}
        >>> abs(dense(params, jnp.array([[1.0, 0.0]]))).round(5).tolist()
        [[0.0, 2.0]]
    """
    for name, array in (("y", y), ("theta", theta), ("alpha", alpha)):
        check_floating((name,), array)
    if theta.ndim != 1 or alpha.shape != theta.shape:
        raise AdapterError(
            f"theta and alpha: expected one axis and one shape, found {list(theta.shape)} and {list(alpha.shape)}"
        )
    check_layer("rotate", len(theta), y.shape[-1], variant=variant, group_size=group_size)
    return rotate_blocks(y, *coefficients(theta, alpha, variant=variant, group_size=group_size, subspace=subspace))


def rotate_blocks(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Applies the rotation with coefficients laid out by `blocks`.

    ``y'0 = first0 y0 − second0 y1`` and ``y'1 = first1 y1 + second1 y0``, for the halves y0 and y1 of each group.
    Differentiable in reverse mode. Apart from the coefficients, the only residual is ``y``, which the layer that
    follows would keep without an adapter too.

    Args:
        y: ``[..., out]``, any floating dtype.
        first: ``[groups, 1 or 2, half]``, float32.
        second: of the same shape.

    Returns:
        An array with the shape and dtype of ``y``; the coefficients are rounded to this dtype once.
    """
    # Within shard_map, a replicated operand's gradient must be summed over the devices that vary: the cast's transpose.
    varying = frozenset().union(*(_varying(v) for v in (y, first, second)))
    y, first, second = (
        jax.lax.pcast(v, tuple(missing), to="varying") if (missing := varying - _varying(v)) else v
        for v in (y, first, second)
    )
    return _rotate_blocks(y, first, second)


@jax.custom_vjp
def _rotate_blocks(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    # Leading axes of size 1, because the caller may have made rank promotion an error.
    shape = (1,) * (y.ndim - 1) + first.shape
    return _turn(y, first.reshape(shape), second.reshape(shape))


def _varying(array: jax.Array) -> frozenset:
    """Returns the mesh axes along which ``shard_map`` knows an array to vary."""
    return jax.typeof(array).manual_axis_type.varying


def rotate_rows(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Like `rotate_blocks`, but each row of the batch has its own coefficients.

    Args:
        y: ``[batch, ..., out]``, any floating dtype.
        first: ``[batch, groups, 1 or 2, half]``, float32.
        second: of the same shape.
    """
    shape = y.shape[:1] + (1,) * (y.ndim - 2) + first.shape[1:]
    return _turn(y, first.reshape(shape), second.reshape(shape))


def rotate_polar(
    y: jax.Array,
    cosines: jax.Array,
    sines: jax.Array,
    *,
    path: str,
    variant: str,
    group_size: int,
    subspace: Subspace,
    by_row: bool,
) -> jax.Array:
    """Rotates a layer's output by α cos θ and α sin θ, each ``[size]``, or ``[batch, size]`` with ``by_row``.

    Raises:
        AdapterError: as for `check_layer`.
    """
    check_layer(path, cosines.shape[-1], y.shape[-1], variant=variant, group_size=group_size)
    sines, cosines = within(sines, cosines, variant=variant, group_size=group_size, subspace=subspace)
    first, second = blocks(cosines, sines, variant=variant, group_size=group_size)
    return rotate_rows(y, first, second) if by_row else rotate_blocks(y, first, second)


def _unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as one that XLA compiles separately in a program for CPU.

    Otherwise XLA fuses the joined halves into the operations that follow, and computes these element by element instead
    of in vectors; a gated activation takes ten times as long. A call that isn't inlined isn't fused, whereas an
    optimization barrier is removed before fusion.
    """

    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*operands: jax.Array) -> Any:
        with set_xla_metadata(inlineable="false"):
            return compiled(*operands)

    return call


def _turn(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Applies the formula of `rotate_blocks`; coefficients ``[..., groups, 1 or 2, half]`` broadcast over rows."""
    return jax.lax.platform_dependent(y, first, second, cpu=_unfused_formula, default=_formula)


def _formula(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    first, second = first.astype(y.dtype), second.astype(y.dtype)
    y0, y1 = _halves(y, first)
    upper = y0 * first[..., 0, :] - y1 * second[..., 0, :]
    lower = y1 * first[..., -1, :] + y0 * second[..., -1, :]
    return jnp.stack([upper, lower], axis=-2).reshape(y.shape)


_unfused_formula = _unfused(_formula)


def _forward(y: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Naming the residuals makes them differ from the operands. Of a residual that is an operand JAX (0.10) keeps only
    # the position, and it miscounts these if a scan moves `_turn`'s choice of platform out of its loop. Second
    # derivatives would then fail, or silently be wrong.
    return _rotate_blocks(y, first, second), checkpoint_name((y, first, second), "road_residuals")


def _backward(residuals: tuple[jax.Array, ...], d: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    y, first, second = residuals
    # The transpose of [[f0, −s0], [s1, f1]] is the rotation by f and by the other half's s, negated.
    dy = _rotate_blocks(d, first, -second[..., ::-1, :])
    # All branches are traced on every platform, and folding joins axes, which fails if they are sharded by type.
    if is_cut(jax.typeof(d).sharding.spec) or 0 in d.shape:
        dfirst, dsecond = _plain_sums(d, y, first)
        return dy, _as_laid(dfirst, first), _as_laid(dsecond, first)
    return dy, *jax.lax.platform_dependent(d, y, first, cpu=_folded_sums, default=_plain_sums)


def _as_laid(array: jax.Array, like: jax.Array) -> jax.Array:
    """Reshards an array like another if the mesh has explicit axes: coefficients may be whole, outputs sharded."""
    spec = jax.typeof(like).sharding.spec
    return array if jax.typeof(array).sharding.spec == spec else jax.sharding.reshard(array, spec)


def _products(d: jax.Array, y: jax.Array, first: jax.Array) -> list[jax.Array]:
    """Returns terms ``[..., groups, half]`` that sum over rows to the gradients of ``first``, then of ``second``."""
    (y0, y1), (d0, d1) = _halves(y, first), _halves(d, first)
    # The coefficients are real even if the output is complex: their gradient is the real part of complex products.
    dtype = y.dtype if jnp.iscomplexobj(y) else first.dtype
    y0, y1, d0, d1 = (v.astype(dtype) for v in (y0, y1, d0, d1))
    if first.shape[-2] == 1:
        return [v.real.astype(first.dtype) for v in (d0 * y0 + d1 * y1, d1 * y0 - d0 * y1)]
    return [v.real.astype(first.dtype) for v in (d0 * y0, d1 * y1, -d0 * y1, d1 * y0)]


def _plain_sums(d: jax.Array, y: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _by_coefficient([jnp.sum(p, axis=tuple(range(p.ndim - 2))) for p in _products(d, y, first)])


@_unfused
def _folded_sums(d: jax.Array, y: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Like `_plain_sums`, in a quarter to a third of the time on CPU, where XLA sums rows one column at a time."""
    # Eight neighbouring rows are added as whole arrays; the rest is a product with ones.
    # Groups stay outermost, so that the sums are sharded where groups are.
    # If the number of rows is only known when the program runs (`jax.export`), no rows are folded.
    rows = y.shape[-2] if y.ndim > 1 else 1
    fold = math.gcd(8, rows) if isinstance(rows, int) else 1
    d, y = (v.reshape(*v.shape[:-2], -1, fold, v.shape[-1]) for v in (d, y))
    parts = [_products(d[..., i, :], y[..., i, :], first) for i in range(fold)]
    together = jnp.stack([functools.reduce(jnp.add, rows) for rows in zip(*parts, strict=True)], axis=-2)
    flat = together.reshape(-1, math.prod(together.shape[-3:]))
    sums = jnp.dot(jnp.ones(flat.shape[0], flat.dtype), flat, precision="highest").reshape(together.shape[-3:])
    return _by_coefficient([sums[:, i] for i in range(sums.shape[1])])


def _by_coefficient(sums: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    half = len(sums) // 2
    return jnp.stack(sums[:half], axis=-2), jnp.stack(sums[half:], axis=-2)


_rotate_blocks.defvjp(_forward, _backward)


def _halves(y: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    groups, _, half = first.shape[-3:]
    pairs = y.reshape(*y.shape[:-1], groups, 2, half)
    return pairs[..., 0, :], pairs[..., 1, :]


def inverse_coefficients(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the coefficients of the inverse rotation: each block ``[[f0, −s0], [s1, f1]]`` inverted."""
    determinant = determinants(first, second)
    return first[..., ::-1, :] / determinant, -second / determinant


def determinants(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the determinant of each block, ``[..., groups, 1, half]``."""
    return first[..., :1, :] * first[..., -1:, :] + second[..., :1, :] * second[..., -1:, :]


def check_layer(path: str, size: int, out: int, *, variant: str, group_size: int) -> None:
    """Refuses θ of a size that doesn't fit a layer with ``out`` outputs.

    Raises:
        AdapterError: the group size doesn't divide ``out``, or θ has the wrong size.
    """
    check_group_size(out, group_size, path)
    expected = parameter_size(variant, out)
    if size != expected:
        raise AdapterError(f"{path}.road_theta: expected [{expected}] for {variant} on {out} outputs, found [{size}]")
