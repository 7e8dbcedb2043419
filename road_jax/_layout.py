"""Where a linear layer's outputs stand in its result, its kernel and its bias."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a linear layer's call lies: what `transform` and `nnx.wrap` must know of a layer type that isn't Flax's.

    Outputs are flattened and paired in the order in which their axes are given. Axes are those of a layer by itself,
    outside scans and vmaps, and may count from the end.

    Attributes:
        result: the axes of the call's result that are the layer's outputs.
        kernel_axes: the same axes in the kernel.
        bias_axes: the same axes in the bias; its last ones if not given.
        ndim: how many axes the kernel has.
        kernel: the kernel's name among the layer's params.
        bias: the bias's name, if the layer has one.
    """

    result: tuple[int, ...] = (-1,)
    kernel_axes: tuple[int, ...] = (-1,)
    bias_axes: tuple[int, ...] = ()
    ndim: int = 2
    kernel: str = "kernel"
    bias: str = "bias"

    def __post_init__(self) -> None:
        # From the end, a stack's axes in front don't matter.
        from_end = tuple(axis if axis < 0 else axis - self.ndim for axis in self.kernel_axes)
        object.__setattr__(self, "kernel_axes", from_end)
        if not self.bias_axes:
            object.__setattr__(self, "bias_axes", tuple(range(-len(from_end), 0)))


# From a layer type to what tells the layout of one call, or None if the call is no product with a kernel. Linen gives
# it the module and what it is called with, NNX the module alone.
Layouts = Mapping[type, Callable[..., Layout | None]]


def einsum_layout(equation: str, *, kernel: str = "kernel", bias: str = "bias") -> Layout | None:
    """Returns the layout of ``jnp.einsum(equation, x, kernel)``.

    The outputs are the result's axes that come from the kernel alone. None if there are none.

    Args:
        equation: of two operands, the second of which is the kernel; ``...`` may stand in the first and the result.
        kernel: the kernel's name among the layer's params.
        bias: the bias's name.

    Example:
        >>> import road_jax
        >>> road_jax.einsum_layout("btd,hdk->bthk", kernel="w").kernel_axes
        (-3, -1)
    """
    x, operand, result = equation.replace(" ", "").replace("...", ".").replace("->", ",").split(",")
    outputs = [axis for axis in result if axis in operand and axis not in x]
    if not outputs or "." in operand:
        return None

    def at(axis: str) -> int:
        # Before an ellipsis count from the start, else from the end.
        index = result.index(axis)
        return index if index < result.find(".") else index - len(result)

    kept = [axis for axis in result if axis in operand]
    return Layout(
        result=tuple(map(at, outputs)),
        kernel_axes=tuple(operand.index(axis) - len(operand) for axis in outputs),
        bias_axes=tuple(kept.index(axis) - len(kept) for axis in outputs),
        ndim=len(operand),
        kernel=kernel,
        bias=bias,
    )


def trailing(count: int, ndim: int) -> Layout:
    """Returns the layout of a layer whose ``count`` output axes come last everywhere."""
    axes = tuple(range(-count, 0))
    return Layout(axes, axes, axes, ndim)


def along(array: jax.Array, axes: tuple[int, ...], function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies a function that works on one last axis to several axes, flattened in their order."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(array, axes, last)
    flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
    return jnp.moveaxis(function(flat).reshape(moved.shape), last, axes)
