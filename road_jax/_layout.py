"""Where a linear layer's outputs stand in its result, its kernel and its bias."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from road_core import AdapterError
from road_jax._tree import Path, unbox


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


@dataclasses.dataclass(frozen=True)
class Place:
    """What a trace shows of one linear layer.

    Attributes:
        layout: of the layer by itself.
        sizes: of its output axes, in the layout's order.
        marks: by name, the shapes of its kernel, bias and θ with 0 for the layer's own axes: what isn't 0 is a stack's.
            None if the trace was none of ``model.init``, which alone shows it.
        dense: whether the layer is an ``nn.Dense``.
    """

    layout: Layout
    sizes: tuple[int, ...]
    marks: Mapping[str, tuple[int, ...]] | None = None
    dense: bool = False

    def stack(self, leaf: str) -> tuple[int, ...]:
        """The axes of a whole array that ``nn.scan`` or ``nn.vmap`` added; only with marks."""
        return tuple(axis for axis, size in enumerate((self.marks or {})[leaf]) if size)


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

    Raises:
        AdapterError: the equation has other operands, or no result.

    Example:
        >>> import road_jax
        >>> road_jax.einsum_layout("btd,hdk->bthk", kernel="w").kernel_axes
        (-3, -1)
    """
    if not isinstance(equation, str) or not re.fullmatch(r"[^,>]*,[^,>]*->[^,>]*", equation):
        raise AdapterError(f"einsum: expected two operands and a result, as in 'btd,df->btf', found {equation!r}")
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


def mark_axes(scope: nn.module.Scope, layout: Layout) -> None:
    """Lays an empty array beside kernel, bias and θ: Flax adds a stack's axes to it as it does to them."""
    for leaf in (layout.kernel, layout.bias, "road_theta"):
        if scope.has_variable("params", leaf):
            shape = (0,) * unbox(scope.get_variable("params", leaf)).ndim
            scope.param(_MARK + leaf, lambda _, shape=shape: jnp.zeros(shape))


def marked_axes(declared: Mapping[Path, jax.Array], path: Path, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what `mark_axes` laid into the scope at a path, for `Place`."""
    marks = {leaf: declared.get((*path, _MARK + leaf)) for leaf in (layout.kernel, layout.bias, "road_theta")}
    return {leaf: mark.shape for leaf, mark in marks.items() if mark is not None}


_MARK = "road_axes_of_"


def along(array: jax.Array, axes: tuple[int, ...], function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies a function that works on one last axis to several axes, flattened in their order."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(array, axes, last)
    # Not -1, which nothing tells of an array without rows.
    lead = moved.ndim - len(axes)
    flat = moved.reshape(*moved.shape[:lead], math.prod(moved.shape[lead:]))
    return jnp.moveaxis(function(flat).reshape(moved.shape), last, axes)
