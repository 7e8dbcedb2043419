"""Merging in closed form: the kernels and biases themselves are rotated, in one elementwise pass each."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from road_core import AdapterError, RoadConfig, check_group_size, output_size
from road_jax._layout import Layout, Place, along
from road_jax._quantize import QuantizedKernel
from road_jax._rotate import coefficients, determinants, inverse_coefficients, rotate_blocks
from road_jax._tree import (
    ROAD_LEAVES,
    Path,
    Tree,
    adapted_paths,
    dotted,
    flatten,
    overlay,
    params_of,
    replace_leaves,
    unbox,
)

# Pairs of an array's axis and the axis of θ that belongs to the same stack, outermost first.
Stack = list[tuple[int, int]]


def merge(
    variables: Mapping[str, Any],
    adapter: Tree,
    config: RoadConfig,
    places: Mapping[Path, Place],
    *,
    invert: bool = False,
) -> dict[str, Any]:
    """Returns variables whose kernels and biases are rotated, or with ``invert`` rotated back.

    ``places`` says which axes of a layer are outputs and which belong to a stack. For layers without a place this is
    inferred, if the shapes leave only one choice.
    """
    paths = adapted_paths(adapter)
    leaves = flatten(overlay(params_of(variables), adapter))
    if invert and (whole := sorted(p for p in flatten(adapter) if p[-1] not in ROAD_LEAVES)):
        raise AdapterError(f"unmerge: expected θ and α alone, found the saved module {dotted(whole[0][:-1])}")
    for path in paths:
        theta, alpha = leaves.pop((*path, "road_theta")), leaves.pop((*path, "road_alpha"))
        name, place = dotted(path), places.get(path)
        layout = place.layout if place else Layout()
        if (*path, layout.kernel) not in leaves:
            raise AdapterError(f"{name}: expected a {layout.kernel} to merge into, found none")
        arrays = {
            leaf: _array(name, leaf, leaves[*path, leaf])
            for leaf in (layout.kernel, layout.bias)
            if (*path, leaf) in leaves
        }
        located = _locate(name, {leaf: array.shape for leaf, array in arrays.items()}, theta.shape, config, place)
        if invert:
            check_invertible(name, theta, alpha, config, located[layout.kernel][1])
        for leaf, array in arrays.items():
            new = rotate_outputs(f"{name}.{leaf}", array, theta, alpha, config, *located[leaf], invert=invert)
            old = leaves[*path, leaf]
            leaves[*path, leaf] = old.replace_boxed(new) if isinstance(old, nn.meta.AxisMetadata) else new
    return replace_leaves(variables, {("params", *path): leaf for path, leaf in leaves.items()})


def rotate_outputs(
    path: str,
    array: jax.Array,
    theta: jax.Array,
    alpha: jax.Array,
    config: RoadConfig,
    outputs: tuple[int, ...],
    stack: Stack,
    *,
    invert: bool,
) -> jax.Array:
    """Rotates a kernel or bias that θ fits; ``outputs`` are the axes of a single layer, counted from the end."""
    own = _without(array.shape, [axis for axis, _ in stack])
    check_group_size(math.prod(own[axis] for axis in outputs), config.group_size, path)

    def rotate_one(array: jax.Array, theta: jax.Array, alpha: jax.Array) -> jax.Array:
        return along(array, outputs, lambda flat: rotate(flat, theta, alpha, config, invert=invert))

    function = rotate_one
    # vmap removes the outermost axis first, so later axes are counted in what is left.
    for done, (kernel_axis, theta_axis) in reversed(list(enumerate(stack))):
        at = kernel_axis - done, theta_axis - done, theta_axis - done
        function = jax.vmap(function, in_axes=at, out_axes=at[0])
    return function(array, theta, alpha)


def rotate(array: jax.Array, theta: jax.Array, alpha: jax.Array, config: RoadConfig, *, invert: bool) -> jax.Array:
    """Rotates an array's last axis in float32, or in its own dtype if that is wider; rounds to its dtype once."""
    if jnp.finfo(array.dtype).bits > 32:
        theta, alpha = theta.astype(array.dtype), alpha.astype(array.dtype)
    first, second = coefficients(
        theta, alpha, variant=config.variant, group_size=config.group_size, subspace=config.subspace
    )
    if invert:
        first, second = inverse_coefficients(first, second)
    return rotate_blocks(array.astype(first.dtype), first, second).astype(array.dtype)


def _array(path: str, leaf: str, value: Any) -> jax.Array:
    """Takes a param out of its box, and refuses it if it can't be rotated."""
    array = unbox(value)
    if isinstance(array, QuantizedKernel):
        raise AdapterError(
            f"{path}: expected a plain kernel to merge into, found {array.kind} codes "
            "(road_jax.dequantize gives plain ones)"
        )
    if not isinstance(array, jax.Array | np.ndarray):
        found = f"a {type(array).__name__}"
    elif not jnp.issubdtype(array.dtype, jnp.floating):
        found = f"one of {array.dtype}"
    else:
        return jnp.asarray(array)
    raise AdapterError(f"{path}.{leaf}: expected a floating-point array to merge into, found {found}")


def _locate(
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    theta: tuple[int, ...],
    config: RoadConfig,
    place: Place | None,
) -> dict[str, tuple[tuple[int, ...], Stack]]:
    """Finds which axes of a kernel and a bias are outputs, and which belong to a stack."""
    layout = place.layout if place else Layout()
    kernel = shapes[layout.kernel]
    if place and place.marks is not None:
        of_theta = place.stack("road_theta")
        stacks = {leaf: list(zip(place.stack(leaf), of_theta, strict=False)) for leaf in shapes}
        outputs = {layout.kernel: layout.kernel_axes, layout.bias: layout.bias_axes}
    else:
        choices = list(_choices(kernel, theta, config.variant, layout.kernel_axes if place else None))
        if len(choices) > 1 or (not place and not choices and len(kernel) > len(theta) + 1):
            raise AdapterError(
                f"{path}.{layout.kernel}: expected sample inputs of the model, to find which of the kernel's axes are "
                f"outputs and which a stack's, found none beside shape {list(kernel)}"
            )
        if not choices:
            hint = "" if place else " (with sample inputs, a stack's axes are known wherever they are)"
            raise AdapterError(f"{path}.{layout.kernel}: {_misfit(kernel, theta)}{hint}")
        axes, stack = choices[0]
        stacks = dict.fromkeys(shapes, stack)
        # In a layer that isn't known, all of the bias's own axes are outputs.
        outputs = {layout.kernel: axes, layout.bias: layout.bias_axes if place else axes}
    for leaf, shape in shapes.items():
        if not _fits(shape, theta, config.variant, outputs[leaf], stacks[leaf]):
            raise AdapterError(f"{path}.{leaf}: {_misfit(shape, theta)}")
    return {leaf: (outputs[leaf], stacks[leaf]) for leaf in shapes}


def _choices(
    shape: tuple[int, ...], theta: tuple[int, ...], variant: str, outputs: tuple[int, ...] | None
) -> Iterator[tuple[tuple[int, ...], Stack]]:
    """Yields the combinations of outputs and stack axes that a kernel's sizes allow.

    Flax puts a stack's axis at the same index in every param of a layer, so only such axes are tried. Outputs that
    aren't known are taken to be the last axes; other axes that are possible too are yielded as further choices.
    """
    for axes in itertools.combinations(range(len(theta)), len(theta) - 1):
        stack = [(axis, axis) for axis in axes]
        own, (size,) = _without(shape, axes), _without(theta, axes)
        out = output_size(variant, size)
        options = [outputs] if outputs is not None else _last_axes(own, out)
        yield from ((option, stack) for option in options if _fits(shape, theta, variant, option, stack))


def _last_axes(shape: Sequence[int], out: int) -> list[tuple[int, ...]]:
    """Returns the axes of a single layer's kernel that can be its outputs; for ``[in, out]`` only the last."""
    count = next((n for n in range(1, len(shape) + 1) if math.prod(shape[-n:]) == out), 0)
    last = tuple(range(-count, 0))
    if not last or len(shape) <= 2:
        return [last] if last else []
    wide = [axis for axis in range(-len(shape), 0) if shape[axis] > 1]
    several = itertools.chain.from_iterable(itertools.combinations(wide, n) for n in range(1, len(wide) + 1))
    others = [axes for axes in several if math.prod(shape[axis] for axis in axes) == out]
    return [last, *(axes for axes in others if set(axes) - set(last))]


def _fits(shape: tuple[int, ...], theta: tuple[int, ...], variant: str, outputs: tuple[int, ...], stack: Stack) -> bool:
    """True if θ has the same stack axes as an array and the right size for its outputs."""
    if len(theta) != len(stack) + 1 or any(axis >= len(shape) or shape[axis] != theta[at] for axis, at in stack):
        return False
    own, (size,) = _without(shape, [axis for axis, _ in stack]), _without(theta, [at for _, at in stack])
    in_range = all(axis >= -len(own) for axis in outputs)
    return in_range and math.prod(own[axis] for axis in outputs) == output_size(variant, size)


def _without(shape: tuple[int, ...], axes: Collection[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _misfit(shape: tuple[int, ...], theta: tuple[int, ...]) -> str:
    return f"expected a kernel that θ of shape {list(theta)} fits, found {list(shape)}"


def check_invertible(path: str, theta: jax.Array, alpha: jax.Array, config: RoadConfig, stack: Stack) -> None:
    """Refuses blocks that have no inverse, if the values are known."""
    if isinstance(theta, jax.core.Tracer) or isinstance(alpha, jax.core.Tracer):
        return
    (axis,) = set(range(theta.ndim)) - {at for _, at in stack}
    theta, alpha = (jnp.moveaxis(v, axis, -1) for v in (theta, alpha))
    first, second = coefficients(
        theta, alpha, variant=config.variant, group_size=config.group_size, subspace=config.subspace
    )
    determinant = determinants(first, second)
    if singular := int((np.asarray(determinant) == 0).sum()):
        raise AdapterError(f"{path}: expected 2x2 blocks that have an inverse, found {singular} with determinant 0")
