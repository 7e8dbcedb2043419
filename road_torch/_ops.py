"""``torch.ops.road.rotate``: schema, fake and autograd of the rotation. No arithmetic of its own but the gradient's.

Where no gradient is wanted `RoadLayer` calls a kernel directly, for a dispatched op costs more than a decoded token's
rotation; and a compiled model traces the plain one, which inductor fuses. The op is for gradients: it saves ``y`` and
no intermediate.
"""

import torch
from torch import Tensor

from road_torch import _kernels
from road_torch._kernels import default


@torch.library.custom_op("road::rotate", mutates_args=())
def rotate(y: Tensor, first: Tensor, cross: Tensor, group_size: int, kernel: str = "auto") -> Tensor:
    """Returns ``y * first + partner(y) * cross`` in the dtype of ``y``.

    Args:
        y: ``[..., out]``, any floating dtype.
        first: broadcasts against ``y``; any floating dtype, rounded to that of ``y`` before the product.
        cross: as ``first``.
        group_size: even; divides ``out``.
        kernel: the implementation's name.
    """
    return _kernels.choose(kernel, y.device).rotate(y, first, cross, group_size)


@rotate.register_fake
def _(y: Tensor, first: Tensor, cross: Tensor, group_size: int, kernel: str = "auto") -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    y, first, cross, group_size, kernel = inputs
    ctx.save_for_backward(y, first, cross)
    ctx.group_size, ctx.kernel = group_size, kernel  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, first, cross = ctx.saved_tensors  # type: ignore[attr-defined]
    group_size: int = ctx.group_size  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    grad_y = grad_first = grad_cross = None
    if needs[0]:
        # The transpose of a block: partner() is its own.
        kernel: str = ctx.kernel  # type: ignore[attr-defined]
        grad_y = rotate(grad, first, default.partner(cross, group_size), group_size, kernel)
    # Many rows add up to one coefficient: float32, whatever the activations are.
    if needs[1]:
        grad_first = (grad.float() * y.float()).sum_to_size(first.shape).to(first.dtype)
    if needs[2]:
        grad_cross = (grad.float() * default.partner(y, group_size).float()).sum_to_size(cross.shape).to(cross.dtype)
    return grad_y, grad_first, grad_cross, None, None


rotate.register_autograd(_backward, setup_context=_save)
