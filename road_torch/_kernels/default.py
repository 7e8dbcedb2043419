"""The rotation in plain PyTorch, for any device and floating dtype; inductor can fuse it.

The second coefficient carries the sign of its half here, so that one product serves both halves:

    y' = y * first + partner(y) * cross,    cross = concat(-second[:g/2], second[g/2:]) in each group of g

with ``partner(y) = concat(y[g/2:], y[:g/2])``. Term by term this is ``y * first + rotate_half(y) * second``.
"""

import functools
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from road_core import output_size, subspace_blocks

# Up to this many elements, calls cost more than arithmetic, and gathering by an index is the cheapest way to swap
# halves; for larger tensors, copying whole slices is.
SMALL = 1 << 15

# Up to this many elements, memory for the swapped halves is kept for the call's later layers.
LARGE = 1 << 21

# From HUGE bytes on, the allocator requests memory from the system each time, page by page. So on a CPU, outputs of
# this size are rotated in parts of PART elements.
HUGE, PART = 1 << 25, 1 << 20


def coefficients(
    theta: Tensor, alpha: Tensor, variant: str, group_size: int, subspace: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Forms ``first = α cos θ`` and ``cross = ∓α sin θ`` in float32, or in float64 if θ and α are float64.

    Args:
        theta: ``[..., out/2]``, ``[..., out]`` or ``[..., 2·out]`` for road_1, road_2, road_4; any floating dtype.
        alpha: of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides ``out``.
        subspace: the part of each layer's 2x2 blocks to rotate; other blocks are the identity and get no gradient. See
            `road_core.subspace_blocks`.

    Returns:
        ``first`` and ``cross``, each ``[..., out]``.
    """
    lead, half = theta.shape[:-1], group_size // 2
    theta, alpha = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (theta, alpha))
    theta, alpha = cleared(theta, alpha, variant, group_size, subspace)
    if variant == "road_4":
        # [..., groups, cosine or sine coefficients, half of the group, element]
        theta, alpha = (v.reshape(*lead, -1, 2, 2, half) for v in (theta, alpha))
        first = alpha[..., 0, :, :] * theta[..., 0, :, :].cos()
        second = alpha[..., 1, :, :] * theta[..., 1, :, :].sin()
    else:
        # road_1 has one θ per pair, the same for both halves.
        theta, alpha = (v.reshape(*lead, -1, 1 if variant == "road_1" else 2, half) for v in (theta, alpha))
        first, second = alpha * theta.cos(), alpha * theta.sin()
        if variant == "road_1":
            first, second = (v.expand(*v.shape[:-2], 2, half) for v in (first, second))
    cross = torch.stack((-second[..., 0, :], second[..., 1, :]), dim=-2)
    return first.reshape(*lead, -1), cross.reshape(*lead, -1)


def cleared(
    theta: Tensor, alpha: Tensor, variant: str, group_size: int, subspace: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Returns θ and α with 0 and 1 outside of the subspace, where they get no gradient; see `coefficients`."""
    if subspace is None:
        return theta, alpha
    out = output_size(variant, theta.shape[-1])
    start, stop = subspace_blocks(out, subspace)
    block = torch.arange(out // 2, device=theta.device).view(-1, 1, group_size // 2)
    inside = (block >= start) & (block < stop)
    pairs = (*theta.shape[:-1], out // group_size, 2 * theta.shape[-1] // out, group_size // 2)
    theta = torch.where(inside, theta.reshape(pairs), 0.0).reshape(theta.shape)
    alpha = torch.where(inside, alpha.reshape(pairs), 1.0).reshape(alpha.shape)
    return theta, alpha


def transformed() -> bool:
    """True within ``torch.func`` transforms and forward-mode differentiation, which support plain operations only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def partner(y: Tensor, group_size: int) -> Tensor:
    """Swaps the halves of each group: ``y`` is ``[..., out]``, and so is the result."""
    return y.reshape(-1, 2, group_size // 2).roll(1, 1).view(y.shape)


def gather(y: Tensor, first: Tensor, cross: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns coefficients that broadcast against ``y``; with an index, a table's rows are gathered for each batch row.

    Gathered coefficients have shape ``[batch, 1, …, out]``.
    """
    if index is not None:
        shape = (len(index), *[1] * (y.ndim - 2), y.shape[-1]) if y.ndim > 1 else y.shape
        first, cross = first[index].view(shape), cross[index].view(shape)
    return first, cross


def rotate(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Returns ``y * first + partner(y) * cross``.

    Args:
        y: ``[..., out]``, any floating dtype; the result has the same dtype.
        first: broadcasts against ``y``; with ``index`` a table ``[adapters, out]``.
        cross: as ``first``.
        group_size: even; divides ``out``.
        index: row of the table for each row of ``y``, int64 ``[batch]``, or ``[1]`` for one that serves all rows.
    """
    first, cross = (table.to(y.dtype) for table in gather(y, first, cross, index))
    return torch.addcmul(y * first, partner(y, group_size), cross)


def rotate_(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Like `rotate`, but overwrites ``y``, which must be contiguous."""
    if index is not None or first.dtype is not y.dtype:
        first, cross = (table.to(y.dtype) for table in gather(y, first, cross, index))
    if y.nbytes >= HUGE and y.device.type == "cpu" and not transformed():
        return _rotate_in_parts_(y, first, cross, group_size)
    # A subclass might leave an index of its own kind, such as a fake one, for all later calls.
    if y.numel() > SMALL or type(y) is not Tensor:
        other = partner(y, group_size)
    else:
        other = torch.index_select(y.view(-1, 2, group_size // 2), 1, _swap(y.device)).view(y.shape)
    return y.mul_(first).addcmul_(other, cross)


def _rotate_in_parts_(y: Tensor, first: Tensor, cross: Tensor, group_size: int) -> Tensor:
    out = y.shape[-1]
    # Outputs [1 or batch, tokens, out], and the coefficients of each row.
    tables = [table.view(-1, 1, out) for table in (first, cross)]
    rows = y.view(len(tables[0]), -1, out)
    scratch = y.new_empty(max(PART, out))
    several = max(1, PART // (rows.shape[1] * out))
    for some, f, c in zip(rows.split(several), *(table.split(several) for table in tables), strict=True):
        for part in some.split(max(1, PART // out), dim=1):
            prepare_(f, c, group_size, scratch[: part.numel()].view(part.shape))(part)
    return y


def prepare_(first: Tensor, cross: Tensor, group_size: int, scratch: Tensor) -> Callable[[Tensor], Tensor]:
    """Prepares `rotate_` for outputs shaped like ``scratch``, so that a call does nothing but the operations.

    Args:
        first: in the dtype of ``scratch``; broadcasts against it.
        cross: as ``first``.
        group_size: even; divides ``out``.
        scratch: contiguous memory that the returned function overwrites.
    """
    shape = (-1, 2, group_size // 2)
    pairs, swap, select = scratch.view(shape), _swap(scratch.device), torch.index_select
    upper, lower = pairs.unbind(1)

    def rotate_(y: Tensor) -> Tensor:
        select(y.view(shape), 1, swap, out=pairs)
        return y.mul_(first).addcmul_(scratch, cross)

    def rotate_by_slices_(y: Tensor) -> Tensor:
        y0, y1 = y.view(shape).unbind(1)
        upper.copy_(y1)
        lower.copy_(y0)
        return y.mul_(first).addcmul_(scratch, cross)

    return rotate_ if scratch.numel() <= SMALL else rotate_by_slices_


@functools.cache
def _swap(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([1, 0], device=device)


def compose(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor], group_size: int) -> tuple[Tensor, Tensor]:
    """Returns the coefficients of rotation ``first`` followed by ``then``, both of one group size, in closed form."""
    (f, c), (g, d) = first, then
    return g * f + d * partner(c, group_size), g * c + d * partner(f, group_size)


def inverse(first: Tensor, cross: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Returns the coefficients of the inverse rotation, formed in float64; not finite if a block has no inverse."""
    f, c = first.double(), cross.double()
    determinant = f * partner(f, group_size) - c * partner(c, group_size)
    return (partner(f, group_size) / determinant).to(first.dtype), (-c / determinant).to(cross.dtype)
