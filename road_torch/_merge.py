"""Merging in closed form, and back: rows of the weight rotated in float32, rounded once, checked, then stored."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError
from road_torch._kernels import default
from road_torch._layer import RoadLayer, bare, features, is_conv1d, moved
from road_torch._routing import Pass

# Rows are widened to float32 in blocks of about this many elements: little memory, and few calls a layer.
_BLOCK = 1 << 20

# How far a row may be from where it was, relative to its norm, when it is rotated forth and back.
_WAY_BACK = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
_WAY_BACK_QUANTIZED = 0.5

# How far a merged layer with a forward of its own may be from its rotated output, relative to its norm: rounding alone,
# TF32's too. A weight that is quantised anew at each call, for less than which there is no use, is 0.01 and more away.
_SAME_OUTPUT = {torch.float64: 2e-3, torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}

# What is rotated through float32; float8 and the like have scales elsewhere.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kept:
    """A layer's weight and bias as they stand, to be put back: data, which is moved, copied and pickled with the layer.

    Args:
        base: the layer.
        quantized: whether it is one of bitsandbytes whose weight stands in 4 or 8 bits.
    """

    def __init__(self, base: Any, *, quantized: bool) -> None:
        # In a module, for what moves a model moves parameters of every kind.
        self._module = nn.Module()
        for name in ("weight", "bias"):
            if name in base._parameters:
                self._module.register_parameter(name, base._parameters[name])
        self._beside: dict[str, Any] = {}
        if quantized:
            from road_torch import _bnb

            self._beside = _bnb.beside_weight(base)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Does what the layer's ``_apply`` does."""
        self._module._apply(fn)
        self._beside = {n: moved(v, fn) if isinstance(v, Tensor) else v for n, v in self._beside.items()}

    def put_back(self, base: Any) -> None:
        """Gives the layer its weight and bias back, bit for bit."""
        for name, value in self._module._parameters.items():
            setattr(base, name, value)
        if self._beside:
            from road_torch import _bnb

            _bnb.put_beside_weight(base, self._beside)


class Inverse:
    """What rotates a layer's weight and bias back where the old ones weren't kept: exact but for rounding.

    Args:
        passes: the rotations that were applied, one after the other.
        path: of the layer.

    Raises:
        AdapterError: a block has no inverse.
    """

    def __init__(self, passes: Sequence[Pass], path: str) -> None:
        self.passes = []
        for first, cross, group_size, _ in reversed(passes):
            back = Pass(*default.inverse(first, cross, group_size), group_size)
            # One that isn't finite in float32 rotates nothing back either.
            singular = ~(back.first.isfinite() & back.cross.isfinite())
            if blocks := int((singular | default.partner(singular, group_size)).sum()) // 2:
                raise AdapterError(
                    f"{path}: expected 2x2 blocks that have an inverse where keep_weights is False, found {blocks} "
                    "without, as one of α = 0 is"
                )
            self.passes.append(back)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Does what the layer's ``_apply`` does."""
        self.passes = [Pass(moved(f, fn), moved(c, fn), size) for f, c, size, _ in self.passes]


def merge(layer: RoadLayer, names: Sequence[str], *, check: bool = True, keep: bool = True) -> float | None:
    """Rotates a layer's weight and bias, so that the base alone gives what base and adapters gave.

    Args:
        layer: one that is not merged.
        names: adapters, applied one after the other; those that the layer doesn't have are passed over.
        check: whether to refuse a result that isn't finite.
        keep: whether the old weight and bias stay beside the new ones, for `unmerge` to put back bit for bit; else it
            rotates the new ones back.

    Returns:
        For a quantised base, how far the weight moved by being quantised anew, relative to its norm; else None.

    Raises:
        AdapterError: the weight can't be rotated, or not back, or the result isn't finite; the layer is as it was.
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
    """Returns and raises what `merge` would; the layer is as it was.

    Raises:
        AdapterError: besides, a weight that isn't kept wouldn't come back.
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
    """Refuses a weight rotated forth and back of which rounding has left too little: by rows, a block being two."""
    weight = _weight(base)
    moved, size = (weight.float() - back).norm(dim=1), weight.float().norm(dim=1)
    tolerance = _WAY_BACK_QUANTIZED if _is_quantized(base) else _WAY_BACK[weight.dtype]
    # A row that isn't finite isn't near either.
    if lost := int((~(moved <= tolerance * size)).sum()):
        raise AdapterError(
            f"{path}: expected a merged weight that its blocks' inverses bring back where keep_weights is False, "
            f"found {lost} of {len(size)} rows that they don't"
        )


def unmerge(layer: RoadLayer) -> float | None:
    """Puts back what `merge` replaced, or rotates it back where that wasn't kept.

    Returns:
        For a quantised base that was rotated back, how far the weight moved by being quantised anew, relative to its
        norm; else None.
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
    """Replaces a layer's weight and bias by rotated ones; returns the old ones and what quantising anew has moved.

    ``prove`` is whether to see, of a layer with a forward of its own, that its output is the rotated one.
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
            # A new parameter, for the old one may be tied to an embedding, which must stay as it is.
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
    """True where what a layer computes may be something else than its weight times x, and bias."""
    return "forward" in base.__dict__ or not (is_conv1d(base) or type(base).forward is nn.Linear.forward)


def _sample_output(base: Any) -> Tensor:
    """What a layer gives for four rows that are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, features(base)[0], generator=generator, device="cpu", dtype=torch.float32)
    # Observers write into buffers what they saw.
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
    # One that isn't finite isn't near either.
    if not away <= _SAME_OUTPUT[base.weight.dtype]:
        raise AdapterError(
            f"{path}: expected a layer whose output is rotated with its weight and bias, found {type(base).__name__} "
            f"with a forward of its own, whose output would be {100 * away:.2g} % from the rotated one"
        )


def _weight(base: Any) -> Tensor:
    """A layer's weight as it is rotated: ``[out, in]``, a quantised one in float32."""
    if _is_quantized(base):
        from road_torch import _bnb

        return _bnb.dequantize(base)
    return base.weight.T if is_conv1d(base) else base.weight


def _requantize(path: str, base: Any, weight: Tensor, check: bool) -> float:
    """Stores a weight quantised anew; returns how far that moved it, relative to its norm."""
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
    """Old and new weight norm, for instance, compute the weight from other parameters at each call."""
    value = base._parameters.get(name)
    if value is None:
        raise AdapterError(
            f"{path}: expected a {name} to merge into that is a parameter of the layer, found {type(base).__name__} "
            "without one"
        )
    # torchao's weights say that they are floating-point, and hold something else.
    held = value.detach()
    if type(held) is not Tensor or held.dtype not in _DTYPES or held.device.type == "meta":
        raise AdapterError(
            f"{path}: expected a plain floating-point {name} to merge into, found {type(base).__name__} with "
            f"{type(held).__name__} of {held.dtype} on {held.device}"
        )


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
    return None if bias is None else _rotate_features(bias.detach(), passes).to(bias.dtype)


def _rotate_features(value: Tensor, passes: Sequence[Pass]) -> Tensor:
    """Returns the rotated ``[..., out]`` in float32."""
    value = value.float()
    for first, cross, group_size, _ in passes:
        value = default.rotate(value, first.to(value.device), cross.to(value.device), group_size)
    return value


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
