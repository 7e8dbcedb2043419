"""The rotation as one Triton kernel: gathers coefficients by row, rotates in float32, rounds once, in one pass over y.

Each pair of outputs is read once and written once, in place if wanted. A program rotates several tokens of one row and
keeps the row's coefficients in registers meanwhile. So in bfloat16 a pair moves 8 bytes of ``y``, and up to ROWS tokens
share the 16 bytes of its float32 coefficients; read anew for each token, these would be twice as many bytes as ``y``'s.

Coefficients are rounded to the dtype of ``y``, as in the other implementations. A product of two numbers in bfloat16 or
float16 is exact in float32. So in these dtypes a row's result has the same bits whether its coefficients come from a
table or were gathered and rounded beforehand.

The kernel runs on GPUs, and on a CPU only if ``TRITON_INTERPRET=1`` was set before Triton was imported.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel

from road_torch._kernels import default

# Other dtypes are left to plain PyTorch; float64 would be computed in float32 here.
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))

# Bytes of each half that a program rotates per row, and how many of these a thread loads at once, the most that it can.
BLOCK, VECTOR = 2048, 16

# Triton compiles for addresses that are multiples of this, or for any.
ALIGNED = 16

# Maximum number of rows per program. Fewer are taken where this would leave fewer programs than PROGRAMS, which is
# somewhat more than the largest GPUs run at once.
ROWS, PROGRAMS = 16, 2048


@triton.jit
def _load(row, start, pairs, half: tl.constexpr, tiled: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first and the second elements of ``block`` pairs."""
    if tiled:
        place = 2 * start + tl.arange(0, 2 * block)
        both = tl.load(row + place, mask=place < 2 * pairs)
        # The halves of a group become the last axis.
        first, second = tl.split(tl.permute(tl.reshape(both, (block // half, 2, half)), (0, 2, 1)))
    else:
        pair = start + tl.arange(0, block)
        low = pair // half * (2 * half) + pair % half
        first = tl.load(row + low, mask=pair < pairs)
        second = tl.load(row + low + half, mask=pair < pairs)
    return first, second


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    row, first, second, start, pairs, half: tl.constexpr, tiled: tl.constexpr, block: tl.constexpr
):
    """Stores what `_load` would return."""
    first = first.to(row.dtype.element_ty)
    second = second.to(row.dtype.element_ty)
    if tiled:
        place = 2 * start + tl.arange(0, 2 * block)
        both = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (2 * block,))
        tl.store(row + place, both, mask=place < 2 * pairs)
    else:
        pair = start + tl.arange(0, block)
        low = pair // half * (2 * half) + pair % half
        tl.store(row + low, first, mask=pair < pairs)
        tl.store(row + low + half, second, mask=pair < pairs)


# Numbers that change with the length of a prompt aren't specialised on: each would be compiled anew.
@triton.jit(do_not_specialize=["repeats", "chunks", "rows"])
def rotate_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations in its own way
    y,
    result,
    first,
    cross,
    index,
    pairs,
    stride,
    repeats,
    chunks,
    rows,
    half: tl.constexpr,
    indexed: tl.constexpr,
    tiled: tl.constexpr,
    block: tl.constexpr,
):
    """Rotates one block of pairs in several rows of ``y``.

    Args:
        y: ``[sources · repeats, 2 · pairs]``, contiguous.
        result: same shape as ``y``; may be ``y`` itself.
        first: coefficients, in rows of ``2 · pairs``.
        cross: as ``first``.
        index: int64, the row of ``first`` for each ``repeats`` rows of ``y``; unused unless ``indexed``.
        pairs: number of pairs in a row.
        stride: distance between rows of ``first``; 0 if one row serves all.
        repeats: number of successive rows of ``y`` that share coefficients.
        chunks: number of programs that these are divided among.
        rows: maximum number of rows per program.
        half: half of the group size.
        indexed: whether there is an index.
        tiled: whether both halves are loaded together, because a half by itself is narrower than a thread's load; only
            possible if ``half`` is a power of two.
        block: pairs per program, a power of two.
    """
    program = tl.program_id(0)
    source = (program // chunks).to(tl.int64)
    before = program % chunks * rows
    start = tl.program_id(1) * block
    begin = (source * repeats + before) * (2 * pairs)
    y += begin
    result += begin
    if indexed:
        source = tl.load(index + source)
    dtype: tl.constexpr = y.dtype.element_ty
    first0, first1 = _load(first + source * stride, start, pairs, half, tiled, block)
    cross0, cross1 = _load(cross + source * stride, start, pairs, half, tiled, block)
    first0 = first0.to(dtype).to(tl.float32)
    first1 = first1.to(dtype).to(tl.float32)
    cross0 = cross0.to(dtype).to(tl.float32)
    cross1 = cross1.to(dtype).to(tl.float32)
    end = tl.minimum(before + rows, repeats)
    # Not a range, as Triton 3.6 interprets none up to a tensor with newer versions of NumPy.
    while before < end:
        y0, y1 = _load(y, start, pairs, half, tiled, block)
        y0 = y0.to(tl.float32)
        y1 = y1.to(tl.float32)
        # As torch.addcmul does it on a GPU. Left to the compiler, which products are fused could vary between launches.
        result0 = tl.fma(y1, cross0, y0 * first0)
        result1 = tl.fma(y0, cross1, y1 * first1)
        _store(result, result0, result1, start, pairs, half, tiled, block)
        y += 2 * pairs
        result += 2 * pairs
        before += 1


def rotate(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Returns ``y * first + partner(y) * cross``.

    Args:
        y: ``[..., out]``, any floating dtype; the result has the same dtype. What the kernel can't compute with
            (float64, subclasses of tensors, anything within a transform) is rotated in plain PyTorch.
        first: ``[out]`` or ``[batch, 1, …, out]``; with ``index`` a table ``[adapters, out]``. Any floating dtype.
        cross: as ``first``.
        group_size: even; divides ``out``.
        index: row of the table for each row of ``y``, int64 ``[batch]``, or ``[1]`` for one that serves all rows.
    """
    if not _takes(y):
        return default.rotate(y, first, cross, group_size, index)
    y = y.contiguous()
    result = torch.empty_like(y)
    _launch(y, result, first.contiguous(), cross.contiguous(), group_size, index)
    return result


def rotate_(y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Tensor:
    """Like `rotate`, but overwrites ``y``, which must be contiguous."""
    if not _takes(y):
        return default.rotate_(y, first, cross, group_size, index)
    _launch(y, y, first.contiguous(), cross.contiguous(), group_size, index)
    return y


def prepare_(first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Prepares `rotate_` for outputs of one dtype on one device; arguments are as in `rotate`.

    Everything that doesn't depend on the output is done once, as it takes longer than a GPU needs to rotate one decoded
    token.
    """
    first, cross = first.contiguous(), cross.contiguous()
    # One object, because several threads may use it at once: an output's size and device, and how to launch for it.
    known: tuple[int, int, _Direct] | None = None

    def rotate_(y: Tensor) -> Tensor:
        nonlocal known
        if not _takes(y):
            return default.rotate_(y, first, cross, group_size, index)
        same, address = known, y.data_ptr()
        if same is not None and same[0] == y.numel() and address % ALIGNED == 0:
            _, device, (launch, arguments) = same
            if torch.cuda.current_device() == device:
                launch(address, address, *arguments)
            else:
                with torch.cuda.device(device):
                    launch(address, address, *arguments)
            return y
        direct = _launch(y, y, first, cross, group_size, index)
        if direct is not None:
            known = y.numel(), y.get_device(), direct
        return y

    return rotate_


def launch_once(device: torch.device) -> None:
    """Compiles and launches the kernel on a tensor of two elements; raises what Triton raises if it can't."""
    # The first call may be one with fake tensors, or within a transform. Their tensors couldn't be launched on.
    with _disable_current_modes(), torch._C._DisableFuncTorch():
        y = torch.ones(2, device=device)
        _launch(y, y, y, y, 2, None)


def _takes(y: Tensor) -> bool:
    # A subclass may hold no memory of its own, or only a part of the tensor that it stands for.
    return type(y) is Tensor and y.dtype in DTYPES and not default.transformed()


# A compiled kernel's own launcher, and its arguments after the addresses of ``y`` and ``result``.
_Direct = tuple[Callable[..., object], tuple[Any, ...]]

# Kernels that Triton compiled for aligned tensors, by all else that it specialises on; None if they can't be launched
# directly. Finding them in here takes a fraction of the time that Triton's own search takes.
_compiled: dict[tuple[Any, ...], CompiledKernel | None] = {}


def _launch(
    y: Tensor, result: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None
) -> _Direct | None:
    """Launches the kernel on contiguous tensors; returns how it was launched if that was done directly."""
    out, half, width = y.shape[-1], group_size // 2, y.element_size()
    total, pairs, indexed = y.numel() // out, out // 2, index is not None
    if not total:
        return None
    sources = first.numel() // out if index is None else len(index)
    stride = 0 if index is None and sources == 1 else out
    # Plain arithmetic, because Triton's functions for it take microseconds.
    block = min(BLOCK // width, 1 << (pairs - 1).bit_length())
    tiled = half * width < VECTOR and half & (half - 1) == 0
    repeats, blocks = total // sources, -(-pairs // block)
    rows = max(1, min(ROWS, repeats, total * blocks // PROGRAMS))
    chunks = -(-repeats // rows)
    # Only the first axis of a grid may be long.
    grid = (sources * chunks, blocks, 1)
    tensors = (y, result, first, cross, first if index is None else index)
    numbers = (pairs, stride, repeats, chunks, rows, half, indexed, tiled, block)

    addresses = [tensor.data_ptr() for tensor in tensors]
    key = (y.device, y.dtype, first.dtype, cross.dtype, pairs, stride, half, indexed)
    aligned = not any(address % ALIGNED for address in addresses) and total < 1 << 31
    with torch.cuda.device_of(y):
        if aligned and (compiled := _compiled.get(key)) is not None:
            try:
                launch = compiled[grid]
                launch(*addresses, *numbers)
                return launch, (*addresses[2:], *numbers)
            except TypeError:
                # The launcher of another version of Triton takes other arguments.
                _compiled[key] = None
        compiled = rotate_kernel[grid](
            *tensors, *numbers, num_warps=max(1, block * width // (32 * VECTOR)), enable_fp_fusion=False
        )
    if aligned and _launches_directly(compiled):
        _compiled.setdefault(key, compiled)
    return None


def _launches_directly(compiled: Any) -> bool:
    """True for a compiled kernel whose own launcher takes the function's arguments, with addresses for tensors.

    The interpreter has none, and kernels of other backends depend on more than the alignment of tensors.
    """
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return version >= (3, 6) and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"
