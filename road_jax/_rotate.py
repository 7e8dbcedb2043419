"""The rotation in JAX: pure functions on arrays."""

import jax
import jax.numpy as jnp

from road_core import AdapterError, check_group_size, parameter_size


def coefficients(theta: jax.Array, alpha: jax.Array, *, variant: str, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Forms ``first = α cos θ`` and ``second = α sin θ`` in float32 or wider.

    Args:
        theta: angles in radians, ``[..., out/2]``, ``[..., out]`` or ``[..., 2·out]`` for road_1, road_2, road_4.
        alpha: scales, of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.

    Returns:
        ``first`` and ``second``, each ``[..., groups, 2, group_size / 2]``: axis -2 is the half of a group.
    """
    wide = jnp.promote_types(theta.dtype, jnp.float32)
    theta, alpha = theta.astype(wide), alpha.astype(wide)
    lead, half = theta.shape[:-1], group_size // 2
    if variant == "road_1":
        first, second = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
        pairs = (*lead, theta.shape[-1] // half, 1, half)
        both = (*lead, theta.shape[-1] // half, 2, half)
        return jnp.broadcast_to(first.reshape(pairs), both), jnp.broadcast_to(second.reshape(pairs), both)
    if variant == "road_2":
        first, second = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
    else:
        halves = (*lead, -1, 2, group_size)
        theta, alpha = theta.reshape(halves), alpha.reshape(halves)
        first = alpha[..., 0, :] * jnp.cos(theta[..., 0, :])
        second = alpha[..., 1, :] * jnp.sin(theta[..., 1, :])
    return first.reshape(*lead, -1, 2, half), second.reshape(*lead, -1, 2, half)


def rotate(y: jax.Array, theta: jax.Array, alpha: jax.Array, *, variant: str, group_size: int) -> jax.Array:
    """Rotates and scales the pairs of a layer's output (`road_core.rotate` is the definition).

    Args:
        y: ``[..., out]``, any floating dtype.
        theta: ``[parameter_size(variant, out)]``.
        alpha: of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.

    Returns:
        The shape and dtype of ``y``; the coefficients are formed in float32 and rounded once.
    """
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size)
    return apply_coefficients(y, first, second)


def apply_coefficients(y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Applies ``[groups, 2, half]`` coefficients to the last axis of ``y``, in the dtype of ``y``."""
    # Leading axes of one: the caller may have made rank promotion an error.
    blocks = (1,) * (y.ndim - 1) + first.shape
    first, second = first.astype(y.dtype).reshape(blocks), second.astype(y.dtype).reshape(blocks)
    halves = y.reshape(*y.shape[:-1], *first.shape[-3:])
    y0, y1 = halves[..., 0, :], halves[..., 1, :]
    upper = y0 * first[..., 0, :] - y1 * second[..., 0, :]
    lower = y1 * first[..., 1, :] + y0 * second[..., 1, :]
    return jnp.stack([upper, lower], axis=-2).reshape(y.shape)


def inverse_coefficients(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the coefficients of the inverse rotation: each block ``[[f0, −s0], [s1, f1]]`` inverted."""
    determinant = first[..., :1, :] * first[..., 1:, :] + second[..., :1, :] * second[..., 1:, :]
    return first[..., ::-1, :] / determinant, -second / determinant


def check_layer(path: str, theta: jax.Array, out: int, *, variant: str, group_size: int) -> None:
    """Refuses θ that isn't made for a layer with ``out`` outputs.

    Raises:
        AdapterError: the group size doesn't divide ``out``, or θ has another size.
    """
    check_group_size(out, group_size, path)
    expected = parameter_size(variant, out)
    if theta.shape != (expected,):
        raise AdapterError(
            f"{path}.road_theta: expected [{expected}] for {variant} on {out} outputs, found {list(theta.shape)}"
        )
