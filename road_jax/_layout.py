"""Which axes of a linear layer's result, kernel and bias are its outputs."""

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
    """Describes a linear layer's call; `transform` and `nnx.wrap` need this for a layer type that isn't Flax's.

    Outputs are flattened and paired in the order in which their axes are given. Axes are those of a single layer,
    outside of scans and vmaps, and may be counted from the end.

    Attributes:
        result: the axes of the call's result that are the layer's outputs.
        kernel_axes: the same axes in the kernel.
        bias_axes: the same axes in the bias; by default its last axes.
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
        # Counted from the end, axes don't depend on a stack's axes in front.
        from_end = tuple(axis if axis < 0 else axis - self.ndim for axis in self.kernel_axes)
        object.__setattr__(self, "kernel_axes", from_end)
        if not self.bias_axes:
            object.__setattr__(self, "bias_axes", tuple(range(-len(from_end), 0)))


@dataclasses.dataclass(frozen=True)
class Place:
    """What a trace reveals about one linear layer.

    Attributes:
        layout: the layout of the layer by itself.
        sizes: the sizes of its output axes, in the layout's order.
        marks: the shapes of its kernel, bias and θ by name, with 0 for the layer's own axes: other entries are a
            stack's axes. None unless ``model.init`` was traced, which alone reveals them.
        dense: whether the layer is an ``nn.Dense`` that no norm of its params contains.
    """

    layout: Layout
    sizes: tuple[int, ...]
    marks: Mapping[str, tuple[int, ...]] | None = None
    dense: bool = False

    def stack(self, leaf: str) -> tuple[int, ...]:
        """Returns the axes that ``nn.scan`` or ``nn.vmap`` added to the array of this name; needs ``marks``."""
        return tuple(axis for axis, size in enumerate((self.marks or {})[leaf]) if size)


# Maps a layer type to a function that returns the layout of one call, or None if the call isn't a product with a
# kernel. In Linen the function gets the module and the arguments of the call, in NNX only the module.
Layouts = Mapping[type, Callable[..., Layout | None]]


def einsum_layout(equation: str, *, kernel: str = "kernel", bias: str = "bias") -> Layout | None:
    """Returns the layout of ``jnp.einsum(equation, x, kernel)``.

    The outputs are the axes of the result that come from the kernel alone. Returns None if there are none, or if the
    kernel has an ellipsis.

    Args:
        equation: with two operands, the second of which is the kernel; the first and the result may contain ``...``.
        kernel: the kernel's name among the layer's params.
        bias: the bias's name.

    Raises:
        AdapterError: the equation doesn't have two operands and a result.

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
        # Axes before an ellipsis are counted from the start, others from the end.
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
    """Returns the layout of a layer whose ``count`` output axes come last in its result, kernel and bias."""
    axes = tuple(range(-count, 0))
    return Layout(axes, axes, axes, ndim)


def mark_axes(scope: nn.module.Scope, layout: Layout) -> None:
    """Adds an empty array beside each of kernel, bias and θ; Flax gives it the same stack axes as the array itself."""
    for leaf in (layout.kernel, layout.bias, "road_theta"):
        if scope.has_variable("params", leaf):
            *lead, _ = (0,) * unbox(scope.get_variable("params", leaf)).ndim
            # nn.SpectralNorm makes a matrix of it with as many columns as there are on the last axis.
            shape = (*lead, _OWN) if lead else (0,)
            scope.param(_MARK + leaf, lambda _, shape=shape: jnp.zeros(shape))


def marked_axes(declared: Mapping[Path, jax.Array], path: Path, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Returns, for `Place`, the shapes of the arrays that `mark_axes` added to the scope at a path."""
    marks = {leaf: declared.get((*path, _MARK + leaf)) for leaf in (layout.kernel, layout.bias, "road_theta")}
    return {
        leaf: tuple(0 if size == _OWN else size for size in mark.shape)
        for leaf, mark in marks.items()
        if mark is not None
    }


_MARK = "road_axes_of_"
# Stands for a layer's own last axis, and is no stack's size. Nothing is allocated: another axis is 0.
_OWN = (1 << 31) - 1


def along(array: jax.Array, axes: tuple[int, ...], function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Applies a function that works on the last axis to several axes, flattened in the given order."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(array, axes, last)
    # Not -1, which can't be inferred if the array has no rows.
    lead = moved.ndim - len(axes)
    flat = moved.reshape(*moved.shape[:lead], math.prod(moved.shape[lead:]))
    return jnp.moveaxis(function(flat).reshape(moved.shape), last, axes)
