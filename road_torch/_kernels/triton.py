"""The rotation as one Triton kernel: gathers coefficients by row, rotates in float32, rounds once, in one pass over y.

Each pair of outputs is read once and written once, in place if wanted. The kernel runs on GPUs, and on a CPU only if
``TRITON_INTERPRET=1`` was set before Triton was imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Maximum number of pairs per program.
BLOCK = 1024


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations in its own way
    y,
    result,
    first,
    cross,
    index,
    pairs,
    repeats,
    stride,
    half: tl.constexpr,
    indexed: tl.constexpr,
    block: tl.constexpr,
):
    """Rotates one block of pairs in one row of ``y``.

    Args:
        y: ``[rows, 2 · pairs]``, contiguous.
        result: same shape as ``y``; may be ``y`` itself.
        first: coefficients, in rows of ``2 · pairs``.
        cross: as ``first``.
        index: int64, the row of ``first`` for each ``repeats`` rows of ``y``; unused unless ``indexed``.
        pairs: number of pairs in a row.
        repeats: number of successive rows of ``y`` that share coefficients.
        stride: distance between rows of ``first``; 0 if one row serves all.
        half: half of the group size.
        indexed: whether there is an index.
        block: pairs per program, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * block + tl.arange(0, block)
    mask = pair < pairs
    low = pair // half * (2 * half) + pair % half
    high = low + half
    source = row // repeats
    if indexed:
        source = tl.load(index + source)
    y += row * 2 * pairs
    result += row * 2 * pairs
    first += source * stride
    cross += source * stride
    y0 = tl.load(y + low, mask=mask).to(tl.float32)
    y1 = tl.load(y + high, mask=mask).to(tl.float32)
    first0 = tl.load(first + low, mask=mask).to(tl.float32)
    first1 = tl.load(first + high, mask=mask).to(tl.float32)
    cross0 = tl.load(cross + low, mask=mask).to(tl.float32)
    cross1 = tl.load(cross + high, mask=mask).to(tl.float32)
    tl.store(result + low, (y0 * first0 + y1 * cross0).to(result.dtype.element_ty), mask=mask)
    tl.store(result + high, (y1 * first1 + y0 * cross1).to(result.dtype.element_ty), mask=mask)


def rotate(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Returns ``y * first + partner(y) * cross``.

    Args:
        y: ``[..., out]``, any floating dtype up to float32; the result has the same dtype.
        first: ``[out]`` or ``[batch, 1, …, out]``; with ``index`` a table ``[adapters, out]``. Any such dtype.
        cross: as ``first``.
        group_size: even; divides ``out``.
        index: row of the table for each row of ``y``, int64 ``[batch]``, or ``[1]`` for one that serves all rows.
    """
    y = y.contiguous()
    return _launch(y, torch.empty_like(y), first, cross, group_size, index)


def rotate_(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Like `rotate`, but overwrites ``y``, which must be contiguous."""
    return _launch(y, y, first, cross, group_size, index)


def _launch(y: Tensor, result: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None) -> Tensor:
    out = y.shape[-1]
    rows = y.numel() // out
    if not rows:
        return result
    first, cross = first.contiguous(), cross.contiguous()
    sources = first.numel() // out if index is None else len(index)
    stride = 0 if index is None and sources == 1 else out
    block = min(BLOCK, triton.next_power_of_2(out // 2))
    # Only the first axis of a grid may be long.
    grid = (rows, triton.cdiv(out // 2, block))
    with torch.cuda.device_of(y):
        rotate_kernel[grid](
            y,
            result,
            first,
            cross,
            first if index is None else index,
            out // 2,
            rows // sources,
            stride,
            half=group_size // 2,
            indexed=index is not None,
            block=block,
        )
    return result
