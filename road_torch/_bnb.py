"""Weights of bitsandbytes layers: dequantised to the values that the layer computes with, and quantised again."""

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from torch import Tensor, nn


def is_quantized(base: nn.Module) -> bool:
    """True for a layer with a 4-bit or 8-bit weight; ``Linear8bitLt`` can also hold a plain one."""
    if isinstance(base, bnb.nn.Linear4bit):
        return base.weight.quant_state is not None
    return isinstance(base, bnb.nn.Linear8bitLt) and base.weight.dtype == torch.int8


def dequantize(base: Any) -> Tensor:
    """Returns a quantised layer's weight, float32 ``[out, in]``."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        codes, scales = _int8_state(base)
        return bnb.functional.int8_vectorwise_dequant(codes, scales)
    weight, state = _unpacked(base)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight, state)


def unpack_before_saving(base: nn.Module) -> None:
    """Registers a hook so that calling ``state_dict`` doesn't change what a layer computes.

    Otherwise it would, after the first forward on a CPU with AVX-512 BF16: bitsandbytes' own unpacking leaves absmax
    transposed or quantises it again. The hook stays with the layer, because a merged model is saved without wrappers.
    """
    if isinstance(base, bnb.nn.Linear4bit) and _unpack not in base._state_dict_pre_hooks.values():
        base.register_state_dict_pre_hook(_unpack)


def _unpack(base: Any, prefix: str, keep_vars: bool) -> None:
    if is_quantized(base):
        base.weight.data, state = _unpacked(base)
        base.weight.quant_state = base.quant_state = state


def _unpacked(base: Any) -> tuple[Tensor, Any]:
    """Returns the codes in standard order and a matching copy of their state, with the same values as in the layer."""
    weight, state = base.weight.data, copy.copy(base.weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        # The nibbles are tiled, and absmax is transposed bfloat16, which must not be quantised a second time.
        absmax, state.original_nested = state.absmax.T.reshape(-1).float().contiguous(), False
        weight, state = _convert_weight_packed_for_cpu_inverse(weight, state)
        state.absmax = absmax
    return weight, state


def requantize(base: Any, weight: Tensor) -> None:
    """Quantises a float32 weight ``[out, in]`` in the same way as the old one, and stores it."""
    old = base.weight
    if isinstance(base, bnb.nn.Linear8bitLt):
        new = bnb.nn.Int8Params(weight.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
        base.weight = new.to(old.device)
        base.state.CB = base.state.SCB = None
        return
    state = old.quant_state
    dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
    base.weight = bnb.nn.Params4bit(
        weight.to(dtype),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=base,
    ).to(old.device)


def beside_weight(base: Any) -> dict[str, Any]:
    """Returns a quantised layer's state that belongs to its weight but isn't in the parameter, to be put back later."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        if base.weight.CB is not None:
            base.init_8bit_state()
        return {"CB": base.state.CB, "SCB": base.state.SCB}
    return {"quant_state": base.quant_state}


def put_beside_weight(base: Any, values: Mapping[str, Any]) -> None:
    """Puts back what `beside_weight` returned."""
    holder = base.state if isinstance(base, bnb.nn.Linear8bitLt) else base
    for name, value in values.items():
        setattr(holder, name, value)


def _int8_state(base: Any) -> tuple[Tensor, Tensor]:
    """Returns codes and scales, which move from the weight to the layer's state at the first forward."""
    if base.state.CB is not None:
        return base.state.CB, base.state.SCB
    if base.weight.CB is not None:
        return base.weight.CB, base.weight.SCB
    return base.weight.data, base.weight.SCB if base.weight.SCB is not None else base.state.SCB
