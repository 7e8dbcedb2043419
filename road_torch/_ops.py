"""``torch.ops.road.rotate``: schema, fake and autograd of the rotation. No arithmetic of its own but the gradient's.

Where no gradient is wanted `RoadLayer` calls a kernel directly, for a dispatched op costs more than a decoded token's
rotation; and a compiled model traces the plain one, which inductor fuses, unless its user has named another. The op is
for the rest: it saves ``y``, the coefficients and no intermediate.
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
        index: the table's row for each of ``y``'s first axis, int64 ``[batch]``; ``[1]`` is one for all.
        kernel: the implementation's name.
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
        # The transpose of a block: partner() is its own. A table may hold far more rows than the batch names.
        kernel: str = ctx.kernel  # type: ignore[attr-defined]
        f, c = default.gather(y, first, cross, index)
        grad_y = rotate(grad, f, default.partner(c, group_size), group_size, None, kernel)
    if needs[1]:
        grad_first = _summed(grad.float() * y.float(), first, index)
    if needs[2]:
        grad_cross = _summed(grad.float() * default.partner(y, group_size).float(), cross, index)
    return grad_y, grad_first, grad_cross, None, None, None


def _summed(products: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """The gradient of coefficients. Many rows add up to one: float32, whatever the activations are."""
    if index is None:
        return products.sum_to_size(like.shape).to(like.dtype)
    rows = products.reshape(len(index), -1, like.shape[-1]).sum(1)
    return torch.zeros(like.shape, dtype=rows.dtype, device=rows.device).index_add_(0, index, rows).to(like.dtype)


rotate.register_autograd(_backward, setup_context=_save)
