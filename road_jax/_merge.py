"""Merging in closed form: kernels and biases are rotated themselves, one elementwise pass each."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from road_core import AdapterError, RoadConfig, check_group_size, output_size
from road_jax._quantize import QuantizedKernel
from road_jax._rotate import coefficients, determinants, inverse_coefficients, rotate_blocks
from road_jax._tree import ROAD_LEAVES, Tree, adapted_paths, dotted, flatten, overlay, unflatten


def merge(variables: Mapping[str, Any], adapter: Tree, config: RoadConfig, *, invert: bool = False) -> dict[str, Any]:
    """Returns variables whose kernels and biases are rotated, or with ``invert`` turned back."""
    paths = adapted_paths(adapter)
    leaves = flatten(overlay(variables["params"], adapter))
    if invert and (whole := sorted(p for p in flatten(adapter) if p[-1] not in ROAD_LEAVES)):
        raise AdapterError(f"unmerge: expected θ and α alone, found the saved module {dotted(whole[0][:-1])}")
    for path in paths:
        theta, alpha = leaves.pop((*path, "road_theta")), leaves.pop((*path, "road_alpha"))
        name = dotted(path)
        if invert:
            _check_invertible(name, theta, alpha, config)
        for leaf in ("kernel", "bias"):
            if (*path, leaf) in leaves:
                old = leaves[(*path, leaf)]
                if isinstance(old, QuantizedKernel):
                    raise AdapterError(
                        f"{name}: expected a plain kernel to merge into, found {old.kind} codes "
                        "(road_jax.dequantize gives plain ones)"
                    )
                new = _rotate_outputs(f"{name}.{leaf}", nn.meta.unbox(old), theta, alpha, config, invert)
                leaves[(*path, leaf)] = old.replace_boxed(new) if isinstance(old, nn.meta.AxisMetadata) else new
            elif leaf == "kernel":
                raise AdapterError(f"{name}: expected a kernel to merge into, found none")
    return {**variables, "params": unflatten(leaves)}


def _rotate_outputs(
    path: str, array: jax.Array, theta: jax.Array, alpha: jax.Array, config: RoadConfig, invert: bool
) -> jax.Array:
    """Rotates a kernel ``[*stack, *in, *out]`` or bias ``[*stack, *out]`` along its outputs."""
    stack = _stack_axes(path, array.shape, theta.shape, config.variant)

    def rotate_one(array: jax.Array, theta: jax.Array, alpha: jax.Array) -> jax.Array:
        out = output_size(config.variant, theta.shape[-1])
        check_group_size(out, config.group_size, path)
        axes = next(n for n in range(1, array.ndim + 1) if math.prod(array.shape[-n:]) == out)
        first, second = coefficients(
            theta, alpha, variant=config.variant, group_size=config.group_size, subspace=config.subspace
        )
        if invert:
            first, second = inverse_coefficients(first, second)
        flat = array.reshape(*array.shape[: array.ndim - axes], out).astype(first.dtype)
        return rotate_blocks(flat, first, second).reshape(array.shape).astype(array.dtype)

    function = rotate_one
    for kernel_axis, theta_axis in reversed(stack):
        function = jax.vmap(function, in_axes=(kernel_axis, theta_axis, theta_axis), out_axes=kernel_axis)
    return function(array, theta, alpha)


def _stack_axes(path: str, shape: tuple[int, ...], theta: tuple[int, ...], variant: str) -> list[tuple[int, int]]:
    """Finds the axes that ``nn.scan`` or ``nn.vmap`` added, as pairs (kernel's axis, θ's axis), outermost first.

    Flax puts a stack axis at one index in every param of a layer, which is what is looked for. Index 0 is the usual
    one and is preferred where sizes alone leave a choice.
    """
    extra = len(theta) - 1
    for axes in itertools.combinations(range(len(theta)), extra):
        size = next(n for axis, n in enumerate(theta) if axis not in axes)
        rest = [n for axis, n in enumerate(shape) if axis not in axes]
        fits = all(axis < len(shape) and shape[axis] == theta[axis] for axis in axes)
        out = output_size(variant, size)
        if fits and any(math.prod(rest[-n:]) == out for n in range(1, len(rest) + 1)):
            # vmap removes the outermost first, so that later indices count what is left.
            return [(axis - done, axis - done) for done, axis in enumerate(axes)]
    raise AdapterError(f"{path}: expected a kernel that θ of shape {list(theta)} fits, found {list(shape)}")


def _check_invertible(path: str, theta: jax.Array, alpha: jax.Array, config: RoadConfig) -> None:
    if isinstance(theta, jax.core.Tracer) or isinstance(alpha, jax.core.Tracer):
        return
    # Stack axes don't matter here where they lead; elsewhere θ's own axis must come last.
    axis = next((a for a, n in reversed(list(enumerate(theta.shape))) if _divides(config, n)), -1)
    theta, alpha = (jnp.moveaxis(v, axis, -1) for v in (theta, alpha))
    first, second = coefficients(
        theta, alpha, variant=config.variant, group_size=config.group_size, subspace=config.subspace
    )
    determinant = determinants(first, second)
    if singular := int((np.asarray(determinant) == 0).sum()):
        raise AdapterError(f"{path}: expected 2x2 blocks that have an inverse, found {singular} with determinant 0")


def _divides(config: RoadConfig, size: int) -> bool:
    return output_size(config.variant, size) % config.group_size == 0
