"""Merging and unmerging in closed form: a weight's rows are rotated in float32, rounded once, checked and stored."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError
from road_torch._kernels import default
from road_torch._layer import RoadLayer, bare, features, is_conv1d, moved
from road_torch._routing import Pass

# Rows are widened to float32 in blocks of about this many elements, to use little memory in few calls per layer.
_BLOCK = 1 << 20

# Largest error of a row after rotating it forth and back, relative to its norm.
_WAY_BACK = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
_WAY_BACK_QUANTIZED = 0.5

# For merged layers with a forward of their own: largest distance of the output from the rotated one, relative to its
# norm. It allows only for rounding, including TF32's. With weights that are quantised again at each call, the distance
# is at least 0.01 in any practical format.
_SAME_OUTPUT = {torch.float64: 2e-3, torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}

# Dtypes that are rotated in float32; float8 and the like are left out, because their scales are stored elsewhere.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kept:
    """A layer's current weight and bias, kept to be restored; they are moved, copied and pickled with the layer.

    Args:
        base: the layer.
        quantized: whether it is a bitsandbytes layer with a 4-bit or 8-bit weight.
    """

    def __init__(self, base: Any, *, quantized: bool) -> None:
        # In a module, because nn.Module._apply moves parameters of every kind.
        self._module = nn.Module()
        for name in ("weight", "bias"):
            if name in base._parameters:
                self._module.register_parameter(name, base._parameters[name])
        self._beside: dict[str, Any] = {}
        if quantized:
            from road_torch import _bnb

            self._beside = _bnb.beside_weight(base)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies the function of the layer's ``_apply``."""
        self._module._apply(fn)
        self._beside = {n: moved(v, fn) if isinstance(v, Tensor) else v for n, v in self._beside.items()}

    def put_back(self, base: Any) -> None:
        """Restores the layer's weight and bias, bit for bit."""
        for name, value in self._module._parameters.items():
            setattr(base, name, value)
        if self._beside:
            from road_torch import _bnb

            _bnb.put_beside_weight(base, self._beside)


class Inverse:
    """Rotations that undo a merge where the old weight and bias weren't kept; exact up to rounding.

    Args:
        passes: the rotations that were applied, in order.
        path: the layer's path, for errors.

    Raises:
        AdapterError: a 2x2 block has no inverse.
    """

    def __init__(self, passes: Sequence[Pass], path: str) -> None:
        self.passes = []
        for first, cross, group_size, _ in reversed(passes):
            back = Pass(*default.inverse(first, cross, group_size), group_size)
            # An inverse that isn't finite in float32 is of no use either.
            singular = ~(back.first.isfinite() & back.cross.isfinite())
            if blocks := int((singular | default.partner(singular, group_size)).sum()) // 2:
                raise AdapterError(
                    f"{path}: expected 2x2 blocks that have an inverse where keep_weights is False, found {blocks} "
                    "without, as one of α = 0 is"
                )
            self.passes.append(back)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies the function of the layer's ``_apply``."""
        self.passes = [Pass(moved(f, fn), moved(c, fn), size) for f, c, size, _ in self.passes]


def merge(layer: RoadLayer, names: Sequence[str], *, check: bool = True, keep: bool = True) -> float | None:
    """Rotates a layer's weight and bias, so that the base alone returns what the adapted layer returned.

    Args:
        layer: a layer without merged adapters.
        names: adapters, applied in order; names that the layer doesn't have are skipped.
        check: whether to refuse a result that isn't finite.
        keep: whether to keep the old weight and bias, so that `unmerge` restores them bit for bit. If False, `unmerge`
            rotates the new ones back.

    Returns:
        For a quantised base, the error from quantising the weight again, relative to its norm; else None.

    Raises:
        AdapterError: the weight can't be rotated, the rotation can't be undone although ``keep`` is False, or the
            result isn't finite; the layer is left unchanged.
    """
    with torch.inference_mode(False), torch.no_grad():
        passes = layer.passes(names)
        if not passes:
            return None
        inverse = None if keep else Inverse(passes, layer.module_path)
        kept, error = _rotate(layer, passes, check, prove=True)
    layer.unmerged = inverse or kept
    layer.merged_adapters = [name for name in names if name in layer.road_theta]
    return error


def attempt(layer: RoadLayer, names: Sequence[str], *, check: bool = True, keep: bool = True) -> float | None:
    """Tries `merge` and undoes it: returns and raises what `merge` would, and leaves the layer unchanged.

    Raises:
        AdapterError: as in `merge`; or, if ``keep`` is False, rounding would leave too little of the weight to restore.
    """
    base: Any = bare(layer.base_layer)
    with torch.inference_mode(False), torch.no_grad():
        inverse, back = None if keep else Inverse(layer.passes(names), layer.module_path), None
        try:
            error = merge(layer, names, check=check)
            if inverse is not None and inverse.passes:
                back = _rotate_rows(_weight(base).float(), inverse.passes)
        finally:
            unmerge(layer)
        if back is not None:
            _check_back(layer.module_path, base, back)
    return error


def _check_back(path: str, base: Any, back: Tensor) -> None:
    """Refuses a weight that rotating forth and back doesn't restore, by row (each 2x2 block mixes two of them)."""
    weight = _weight(base)
    moved, size = (weight.float() - back).norm(dim=1), weight.float().norm(dim=1)
    tolerance = _WAY_BACK_QUANTIZED if _is_quantized(base) else _WAY_BACK[weight.dtype]
    # Written so that a row that isn't finite counts as lost.
    if lost := int((~(moved <= tolerance * size)).sum()):
        raise AdapterError(
            f"{path}: expected a merged weight that its blocks' inverses bring back where keep_weights is False, "
            f"found {lost} of {len(size)} rows that they don't"
        )


def unmerge(layer: RoadLayer) -> float | None:
    """Restores the weight and bias that `merge` kept, or rotates the merged ones back.

    Returns:
        For a quantised base that was rotated back, the error from quantising the weight again, relative to its norm;
        else None.
    """
    error = None
    if layer.merged_adapters:
        if isinstance(layer.unmerged, Inverse):
            with torch.inference_mode(False), torch.no_grad():
                _, error = _rotate(layer, layer.unmerged.passes, check=False, prove=False)
        else:
            layer.unmerged.put_back(bare(layer.base_layer))
        layer.unmerged = None
        layer.merged_adapters = []
    return error


def _rotate(layer: RoadLayer, passes: Sequence[Pass], check: bool, *, prove: bool) -> tuple[Kept, float | None]:
    """Replaces a layer's weight and bias by rotated ones; returns the old ones and the error from quantising again.

    With ``prove``, a layer with a forward of its own is called to check that its output really is rotated.
    """
    base: Any = bare(layer.base_layer)
    path = layer.module_path
    quantized = _is_quantized(base)
    if not quantized:
        _check_plain(path, base, "weight")
    if getattr(base, "bias", None) is not None:
        _check_plain(path, base, "bias")
    rotated, bias = _rotate_rows(_weight(base), passes), _bias(base, passes)
    if check:
        _check_finite(path, rotated, bias)
    prove = prove and not quantized and _has_own_forward(base)
    expected = _rotate_features(_sample_output(base), passes) if prove else None
    kept, error = Kept(base, quantized=quantized), None
    try:
        if quantized:
            error = _requantize(path, base, rotated, check)
        else:
            # A new parameter, because the old one may be tied to an embedding, which must not change.
            base.weight = _like(base.weight, rotated.T.contiguous() if is_conv1d(base) else rotated)
        if bias is not None:
            base.bias = _like(base.bias, bias)
        if expected is not None:
            _check_output(path, base, expected)
    except BaseException:
        kept.put_back(base)
        raise
    return kept, error


def _has_own_forward(base: nn.Module) -> bool:
    """True if a layer may compute something other than the product with its weight plus its bias."""
    return "forward" in base.__dict__ or not (is_conv1d(base) or type(base).forward is nn.Linear.forward)


def _sample_output(base: Any) -> Tensor:
    """Returns a layer's output for four fixed random rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, features(base)[0], generator=generator, device="cpu", dtype=torch.float32)
    # Observers record their inputs in buffers; the forward gets copies of these.
    buffers = [(module, dict(module._buffers)) for module in base.modules()]
    try:
        for module, own in buffers:
            module._buffers.update({name: value if value is None else value.clone() for name, value in own.items()})
        return base.forward(x.to(base.weight))
    finally:
        for module, own in buffers:
            module._buffers.clear()
            module._buffers.update(own)


def _check_output(path: str, base: Any, expected: Tensor) -> None:
    found = _sample_output(base)
    away = float((found.float() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    # Written so that an output that isn't finite is refused.
    if not away <= _SAME_OUTPUT[base.weight.dtype]:
        raise AdapterError(
            f"{path}: expected a layer whose output is rotated with its weight and bias, found {type(base).__name__} "
            f"with a forward of its own, whose output would be {100 * away:.2g} % from the rotated one"
        )


def _weight(base: Any) -> Tensor:
    """Returns a layer's weight in the form in which it is rotated: ``[out, in]``, dequantised to float32."""
    if _is_quantized(base):
        from road_torch import _bnb

        return _bnb.dequantize(base)
    return base.weight.T if is_conv1d(base) else base.weight


def _requantize(path: str, base: Any, weight: Tensor, check: bool) -> float:
    """Quantises a weight and stores it; returns the error from quantising, relative to the weight's norm."""
    from road_torch import _bnb

    _bnb.requantize(base, weight)
    error = (_bnb.dequantize(base) - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
    if check and not torch.isfinite(error):
        raise AdapterError(f"{path}: expected a merged weight that can be quantised, found it too large")
    return float(error)


def _is_quantized(base: nn.Module) -> bool:
    if not type(base).__module__.startswith("bitsandbytes."):
        return False
    from road_torch import _bnb

    return _bnb.is_quantized(base)


def _check_plain(path: str, base: Any, name: str) -> None:
    """Refuses a tensor that can't be merged into: not a plain floating-point parameter of the layer, or offloaded.

    Weight norm, for instance, computes the weight from other parameters at each call.
    """
    value = base._parameters.get(name)
    if value is None:
        raise AdapterError(
            f"{path}: expected a {name} to merge into that is a parameter of the layer, found {type(base).__name__} "
            "without one"
        )
    # torchao's weights claim to be floating-point, but hold something else.
    held = value.detach()
    if type(held) is not Tensor or held.dtype not in _DTYPES or held.device.type == "meta":
        raise AdapterError(
            f"{path}: expected a plain floating-point {name} to merge into, found {type(base).__name__} with "
            f"{type(held).__name__} of {held.dtype} on {held.device}"
        )


def _rotate_rows(weight: Tensor, passes: Sequence[Pass]) -> Tensor:
    """Returns the rotated weight ``[out, in]`` in its dtype, computed in float32."""
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
        # In place if no rounding follows.
        into = torch.mul(w, f[block], out=out[block] if dtype == torch.float32 else None)
        into[:, 0].addcmul_(w[:, 1], c[block, 0])
        into[:, 1].addcmul_(w[:, 0], c[block, 1])
        if dtype != torch.float32:
            out[block] = into
    return out.view(weight.shape)


def _bias(base: nn.Module, passes: Sequence[Pass]) -> Tensor | None:
    bias = getattr(base, "bias", None)
    return None if bias is None else _rotate_features(bias.detach(), passes).to(bias.dtype)


def _rotate_features(value: Tensor, passes: Sequence[Pass]) -> Tensor:
    """Rotates values ``[..., out]`` in float32."""
    value = value.float()
    for first, cross, group_size, _ in passes:
        value = default.rotate(value, first.to(value.device), cross.to(value.device), group_size)
    return value


def _check_finite(path: str, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        # One pass is enough: with a NaN, minimum and maximum are NaN. Counting takes ten times as long.
        if value is not None and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            wrong = int((~torch.isfinite(value)).sum())
            raise AdapterError(
                f"{path}.{name}: expected finite values after merging, found {wrong} that are NaN or infinite"
            )


def _like(old: Tensor, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)
