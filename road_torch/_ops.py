"""``torch.ops.road.rotate``: schema, fake implementation and autograd of the rotation; kernels do the forward.

Without gradients `RoadLayer` calls a kernel directly, because dispatching an op costs more than rotating one decoded
token. A compiled model traces the plain PyTorch kernel, which inductor fuses, unless the user has named another one.
The op serves the remaining cases; for the backward pass it saves ``y`` and the coefficients, but no intermediates.
"""

import torch
from torch import Tensor

from road_torch import _kernels
from road_torch._kernels import default


@torch.library.custom_op("road::rotate", mutates_args=())
def rotate(
    y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None, kernel: str = "auto"
) -> Tensor:
    """Returns ``y * first + partner(y) * cross`` in the dtype of ``y``.

    Args:
        y: ``[..., out]``, any floating dtype.
        first: broadcasts against ``y``; with ``index`` a table ``[adapters, out]``. Any floating dtype.
        cross: as ``first``.
        group_size: even; divides ``out``.
        index: row of the table for each row of ``y``, int64 ``[batch]``, or ``[1]`` for one that serves all rows.
        kernel: name of the implementation.
    """
    return _kernels.choose(kernel, y.device).rotate(y, first, cross, group_size, index)


@rotate.register_fake
def _(
    y: Tensor, first: Tensor, cross: Tensor, group_size: int, index: Tensor | None = None, kernel: str = "auto"
) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    y, first, cross, group_size, index, kernel = inputs
    ctx.save_for_backward(y, first, cross, index)
    ctx.group_size, ctx.kernel = group_size, kernel  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, first, cross, index = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size: int = ctx.group_size  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_y = grad_first = grad_cross = None
    if needs[0]:
        # Multiplies by the transposed blocks: partner() is its own transpose. Coefficients are gathered, because a
        # table may have far more rows than the batch names.
        kernel: str = ctx.kernel  # type: ignore[attr-defined]
        f, c = default.gather(y, first, cross, index)
        grad_y = rotate(grad, f, default.partner(c, group_size), group_size, None, kernel)
    if needs[1]:
        grad_first = _summed(grad.float() * y.float(), first, index)
    if needs[2]:
        grad_cross = _summed(grad.float() * default.partner(y, group_size).float(), cross, index)
    return grad_y, grad_first, grad_cross, None, None, None


def _summed(products: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """Sums products into the gradient of coefficients; in float32, because many rows add up to one."""
    if index is None:
        return products.sum_to_size(like.shape).to(like.dtype)
    rows = products.reshape(len(index), -1, like.shape[-1]).sum(1)
    return torch.zeros(like.shape, dtype=rows.dtype, device=rows.device).index_add_(0, index, rows).to(like.dtype)


rotate.register_autograd(_backward, setup_context=_save)
