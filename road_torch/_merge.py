"""Merging in closed form: rows of the weight rotated in float32, rounded once, checked, and only then stored."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from road_core import AdapterError
from road_torch._kernels import default
from road_torch._layer import RoadLayer, is_conv1d
from road_torch._routing import Pass

# Rows are widened to float32 in blocks of about this many elements: little memory, and few calls a layer.
_BLOCK = 1 << 20


def merge(layer: RoadLayer, names: Sequence[str], *, check: bool = True) -> float | None:
    """Rotates a layer's weight and bias, so that the base alone gives what base and adapters gave.

    Args:
        layer: one that is not merged.
        names: adapters, applied one after the other; those that the layer doesn't have are passed over.
        check: whether to refuse a result that isn't finite.

    Returns:
        For a quantised base, how far the weight moved by being quantised anew, relative to its norm; else None.

    Raises:
        AdapterError: the weight can't be rotated, or the result isn't finite; the layer is as it was.
    """
    base, path = layer.base_layer, layer.module_path
    with torch.inference_mode(False), torch.no_grad():
        passes = layer.passes(names)
        if not passes:
            return None
        if type(base).__module__.startswith("bitsandbytes."):
            from road_torch import _bnb

            if _bnb.is_quantized(base):
                return _merge_quantized(layer, passes, names, check)
        weight = base.weight
        # torchao's weights say that they are floating-point, and hold something else.
        held = weight.detach() if isinstance(weight, Tensor) else weight
        if type(held) is not Tensor or not held.is_floating_point() or held.device.type == "meta":
            raise AdapterError(
                f"{path}: expected a plain floating-point weight to merge into, found {type(base).__name__} with "
                f"{type(held).__name__} of {getattr(held, 'dtype', None)} on {getattr(held, 'device', None)}"
            )
        rows = weight.T if is_conv1d(base) else weight
        merged = _rotate_rows(rows, passes)
        bias = _bias(base, passes)
        if check:
            _check_finite(path, merged, bias)
        old_weight, old_bias = base.weight, getattr(base, "bias", None)

        def undo() -> None:
            base.weight, base.bias = old_weight, old_bias

        # A new parameter, for the old one may be tied to an embedding, which must stay as it is.
        base.weight = _like(old_weight, merged.T.contiguous() if is_conv1d(base) else merged)
        if bias is not None:
            base.bias = _like(base.bias, bias)
    _done(layer, names, undo)
    return None


def unmerge(layer: RoadLayer) -> None:
    """Puts back, bit for bit, what `merge` replaced."""
    if layer.merged_adapters:
        layer.unmerged()
        layer.unmerged = None
        layer.merged_adapters = []


def _merge_quantized(layer: RoadLayer, passes: Sequence[Pass], names: Sequence[str], check: bool) -> float:
    from road_torch import _bnb

    base = layer.base_layer
    merged = _rotate_rows(_bnb.dequantize(base), passes)
    bias = _bias(base, passes)
    if check:
        _check_finite(layer.module_path, merged, bias)
    restore, old_bias = _bnb.requantize(base, merged), base.bias
    error = (_bnb.dequantize(base) - merged).norm() / merged.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if check and not torch.isfinite(error):
        restore()
        raise AdapterError(f"{layer.module_path}: expected a merged weight that can be quantised, found it too large")
    if bias is not None:
        base.bias = _like(base.bias, bias)

    def undo() -> None:
        restore()
        base.bias = old_bias

    _done(layer, names, undo)
    return float(error)


def _done(layer: RoadLayer, names: Sequence[str], undo: Callable[[], None]) -> None:
    layer.unmerged = undo
    layer.merged_adapters = [name for name in names if name in layer.road_theta]


def _rotate_rows(weight: Tensor, passes: Sequence[Pass]) -> Tensor:
    """Returns the rotated weight ``[out, in]`` in its dtype; the arithmetic is in float32."""
    dtype = weight.dtype
    for first, cross, group_size, _ in passes[:-1]:
        weight = _rotate_rows_once(weight, first, cross, group_size, torch.float32)
    first, cross, group_size, _ = passes[-1]
    return _rotate_rows_once(weight, first, cross, group_size, dtype)


def _rotate_rows_once(weight: Tensor, first: Tensor, cross: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    half = group_size // 2
    halves = weight.reshape(-1, 2, half, weight.shape[-1])
    f, c = (v.to(weight.device).view(-1, 2, half, 1) for v in (first, cross))
    out = torch.empty(halves.shape, dtype=dtype, device=weight.device)
    step = max(1, _BLOCK // max(1, group_size * weight.shape[-1]))
    for start in range(0, len(halves), step):
        block = slice(start, start + step)
        w = halves[block].float()
        # In place where no rounding follows.
        into = torch.mul(w, f[block], out=out[block] if dtype == torch.float32 else None)
        into[:, 0].addcmul_(w[:, 1], c[block, 0])
        into[:, 1].addcmul_(w[:, 0], c[block, 1])
        if dtype != torch.float32:
            out[block] = into
    return out.view(weight.shape)


def _bias(base: nn.Module, passes: Sequence[Pass]) -> Tensor | None:
    bias = getattr(base, "bias", None)
    if bias is None:
        return None
    value = bias.detach().float()
    for first, cross, group_size, _ in passes:
        value = default.rotate(value, first.to(value.device), cross.to(value.device), group_size)
    return value.to(bias.dtype)


def _check_finite(path: str, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        # One pass: a NaN anywhere is the least and the greatest value. Counting them takes ten times as long.
        if value is not None and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            wrong = int((~torch.isfinite(value)).sum())
            raise AdapterError(
                f"{path}.{name}: expected finite values after merging, found {wrong} that are NaN or infinite"
            )


def _like(old: Tensor, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)
