"""RoAd in NumPy float64: the definition that every other implementation is tested against.

Paper: "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability"
(arXiv 2409.00119), sections 3.1 and 3.2. The paper pairs neighbours; here, as in PEFT, element ``i`` of a group of
``g`` outputs is paired with element ``i + g/2``. ``group_size=2`` is the paper's pairing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from road_core._config import VARIANTS
from road_core._errors import AdapterError

Float64 = NDArray[np.float64]
Subspace = tuple[float, float] | None


def parameter_size(variant: str, out: int) -> int:
    """Returns the number of θ, and of α, in a layer with ``out`` outputs: out/2, out or 2·out."""
    if variant not in VARIANTS:
        raise AdapterError(f"variant: expected one of {', '.join(VARIANTS)}, found {variant!r}")
    return {"road_1": out // 2, "road_2": out, "road_4": 2 * out}[variant]


def output_size(variant: str, size: int) -> int:
    """Returns the number of outputs of a layer that has ``size`` θ: the inverse of `parameter_size`."""
    if variant not in VARIANTS:
        raise AdapterError(f"variant: expected one of {', '.join(VARIANTS)}, found {variant!r}")
    return {"road_1": 2 * size, "road_2": size, "road_4": size // 2}[variant]


def check_group_size(out: int, group_size: int, where: str) -> None:
    """Refuses a group size that doesn't divide a layer's outputs; ``where`` names the layer.

    Raises:
        AdapterError: ``out`` isn't a multiple of ``group_size``, or ``group_size`` isn't even.
    """
    if group_size < 2 or group_size % 2:
        raise AdapterError(f"{where}: expected an even group_size from 2 up, found {group_size}")
    if out % group_size:
        raise AdapterError(f"{where}: expected a number of outputs that group_size {group_size} divides, found {out}")


def own_axis(shape: Sequence[int], axis: int, *, variant: str, group_size: int, where: str) -> int:
    """Returns the axis of θ and α that runs over a layer's own parameters, counted from the start; others are stacks'.

    Args:
        shape: of θ. If it has one axis, that one is returned.
        axis: the axis that is meant where there are more; may be negative.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides the layer's outputs.
        where: the layer, for errors.

    Raises:
        AdapterError: there is no such axis, or its size isn't that of a layer's parameters; if another axis has such a
            size, the error names it.
    """
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise AdapterError(f"axis: expected a whole number, found {axis!r:.60}")
    if len(shape) == 1:
        axis = 0
    if not -len(shape) <= axis < len(shape):
        raise AdapterError(f"{where}: expected an axis of θ {list(shape)}, found axis={axis}")
    outs = [output_size(variant, size) for size in shape]
    sizes = zip(outs, shape, strict=True)
    fitting = [out > 0 and out % group_size == 0 and parameter_size(variant, out) == size for out, size in sizes]
    if fitting[axis]:
        return int(axis) % len(shape)
    if any(fitting):
        other = fitting.index(True)
        raise AdapterError(
            f"{where}: expected outputs that group_size {group_size} divides on axis {axis} of θ {list(shape)}, found "
            f"{outs[axis]} there and {outs[other]} on axis {other}: say axis={other} if the others are stacks'"
        )
    check_group_size(outs[axis], group_size, where)
    raise AdapterError(f"{where}: expected θ for whole groups of {group_size} outputs, found {shape[axis]}")


def subspace_blocks(out: int, subspace: Subspace, where: str = "subspace") -> tuple[int, int]:
    """Returns the index of a layer's first block in a subspace, and the index after the last one.

    Blocks are counted as road_1 counts its θ: pair ``p`` of group ``k`` is block ``k g/2 + p``. Of ``n = out/2``
    blocks, the subspace ``(start, stop)`` contains those from ``round(start n)`` up to, but not including,
    ``round(stop n)``; so (0, 0.5) and (0.5, 1) have no block in common and together contain all. ``None`` means every
    block.

    Paper: section 4.3, where halves of the blocks are trained separately.

    Raises:
        AdapterError: the layer, called ``where`` in the error, is so small that no block is in the subspace.
    """
    n = out // 2
    start, stop = subspace or (0, 1)
    first, last = round(start * n), round(stop * n)
    if first == last:
        raise AdapterError(
            f"{where}: expected a subspace that takes in at least one of {n} blocks, found ({start}, {stop})"
        )
    return first, last


def subspace_mask(
    out: int, *, variant: str, group_size: int, subspace: Subspace, where: str = "subspace"
) -> NDArray[np.bool_]:
    """Returns which θ and α of a layer belong to a subspace; see `subspace_blocks`.

    Args:
        out: the layer's number of outputs.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.
        subspace: fractions of the blocks, ``0 <= start < stop <= 1``.
        where: the layer's name, for errors.

    Returns:
        bool ``[parameter_size(variant, out)]``.

    Raises:
        AdapterError: ``group_size`` doesn't divide ``out``, or the layer is so small that no block is in the subspace.
    """
    check_group_size(out, group_size, where)
    first, last = subspace_blocks(out, subspace, where)
    blocks = np.zeros(out // 2, bool)
    blocks[first:last] = True
    copies = 2 * parameter_size(variant, out) // out
    return np.broadcast_to(blocks.reshape(-1, 1, group_size // 2), (out // group_size, copies, group_size // 2)).ravel()


def coefficients(
    theta: ArrayLike, alpha: ArrayLike, *, variant: str, group_size: int, subspace: Subspace = None
) -> tuple[Float64, Float64]:
    """Computes ``first = α cos θ`` and ``second = α sin θ``, one of each per output.

    Args:
        theta: angles in radians, ``[..., out/2]``, ``[..., out]`` or ``[..., 2·out]`` for road_1, road_2, road_4.
        alpha: scales, of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.
        subspace: outside of it θ = 0 and α = 1, whatever the arrays contain; see `subspace_mask`.

    Returns:
        ``first`` and ``second``, each float64 ``[..., out]``.

    Raises:
        AdapterError: the shapes differ, ``group_size`` doesn't divide ``out``, or the subspace contains no block.
    """
    theta, alpha = np.asarray(theta, np.float64), np.asarray(alpha, np.float64)
    if theta.shape != alpha.shape or theta.ndim == 0:
        raise AdapterError(f"alpha: expected the shape of theta, {list(theta.shape)}, found {list(alpha.shape)}")
    lead, size = theta.shape[:-1], theta.shape[-1]
    out = output_size(variant, size)
    check_group_size(out, group_size, "theta")
    if subspace is not None:
        mask = subspace_mask(out, variant=variant, group_size=group_size, subspace=subspace)
        theta, alpha = np.where(mask, theta, 0.0), np.where(mask, alpha, 1.0)
    if variant == "road_1":
        pairs = (*lead, out // group_size, group_size // 2)
        theta, alpha = (np.concatenate([v.reshape(pairs)] * 2, axis=-1) for v in (theta, alpha))
        first, second = alpha * np.cos(theta), alpha * np.sin(theta)
    elif variant == "road_2":
        first, second = alpha * np.cos(theta), alpha * np.sin(theta)
    else:
        halves = (*lead, out // group_size, 2, group_size)
        theta, alpha = theta.reshape(halves), alpha.reshape(halves)
        first = alpha[..., 0, :] * np.cos(theta[..., 0, :])
        second = alpha[..., 1, :] * np.sin(theta[..., 1, :])
    return first.reshape(*lead, out), second.reshape(*lead, out)


def rotate(
    y: ArrayLike, theta: ArrayLike, alpha: ArrayLike, *, variant: str, group_size: int, subspace: Subspace = None
) -> Float64:
    """Rotates and scales the pairs of a layer's output: ``y * first + rotate_half(y) * second``.

    With ``i < g/2`` in a group, ``y'[i] = first[i] y[i] − second[i] y[i + g/2]`` and
    ``y'[i + g/2] = second[i + g/2] y[i] + first[i + g/2] y[i + g/2]``.

    Args:
        y: ``[..., out]``, any real dtype.
        theta: see `coefficients`; leading axes broadcast against those of ``y``.
        alpha: see `coefficients`.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.
        subspace: see `coefficients`.

    Returns:
        A float64 array with the shape of ``y``.

    Raises:
        AdapterError: the shapes don't match.

    Example:
        >>> rotate([1.0, 0.0], [np.pi / 2], [2.0], variant="road_1", group_size=2).round(6).tolist()
        [0.0, 2.0]
    """
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size, subspace=subspace)
    return _apply(np.asarray(y, np.float64), first, second, group_size)


def merge(
    weight: ArrayLike, theta: ArrayLike, alpha: ArrayLike, *, variant: str, group_size: int, subspace: Subspace = None
) -> Float64:
    """Rotates the rows of a weight ``[out, in]`` (or the entries of a bias ``[out]``), so that ``(R W) x = R (W x)``.

    Returns:
        A float64 array with the shape of ``weight``.
    """
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size, subspace=subspace)
    return np.moveaxis(_apply(np.moveaxis(np.asarray(weight, np.float64), 0, -1), first, second, group_size), -1, 0)


def unmerge(
    weight: ArrayLike, theta: ArrayLike, alpha: ArrayLike, *, variant: str, group_size: int, subspace: Subspace = None
) -> Float64:
    """Undoes `merge` with the inverse of each 2x2 block.

    Returns:
        A float64 array with the shape of ``weight``.

    Raises:
        AdapterError: a block is singular (because a scale is 0, say) and has no inverse.
    """
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size, subspace=subspace)
    first, second = inverse(first, second, group_size=group_size)
    return np.moveaxis(_apply(np.moveaxis(np.asarray(weight, np.float64), 0, -1), first, second, group_size), -1, 0)


def inverse(first: ArrayLike, second: ArrayLike, *, group_size: int) -> tuple[Float64, Float64]:
    """Returns the coefficients of the inverse rotation, in the same form.

    A block ``[[f0, −s0], [s1, f1]]`` has the determinant ``f0 f1 + s0 s1``, and its inverse is
    ``[[f1, s0], [−s1, f0]]`` divided by that.

    Raises:
        AdapterError: a block is singular.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    f, s = (v.reshape(*v.shape[:-1], -1, 2, group_size // 2) for v in (first, second))
    determinant = f[..., :1, :] * f[..., 1:, :] + s[..., :1, :] * s[..., 1:, :]
    if not np.all(determinant):
        block = int(np.flatnonzero(determinant.reshape(-1) == 0)[0])
        raise AdapterError(f"unmerge: expected blocks that have an inverse, found block {block} with determinant 0")
    return (f[..., ::-1, :] / determinant).reshape(first.shape), (-s / determinant).reshape(first.shape)


def _apply(y: Float64, first: Float64, second: Float64, group_size: int) -> Float64:
    out = first.shape[-1]
    if y.ndim == 0 or y.shape[-1] != out:
        raise AdapterError(f"y: expected a last axis of {out}, found shape {list(y.shape)}")
    halves = y.reshape(*y.shape[:-1], out // group_size, 2, group_size // 2)
    rotated = np.stack([-halves[..., 1, :], halves[..., 0, :]], axis=-2).reshape(y.shape)
    return y * first + rotated * second
