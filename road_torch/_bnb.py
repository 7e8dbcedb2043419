"""Weights of bitsandbytes' layers: dequantised as the layer computes with them, and quantised anew."""

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from torch import Tensor, nn


def is_quantized(base: nn.Module) -> bool:
    """True for a layer whose weight stands in 4 or 8 bits; ``Linear8bitLt`` can also hold a plain one."""
    if isinstance(base, bnb.nn.Linear4bit):
        return base.weight.quant_state is not None
    return isinstance(base, bnb.nn.Linear8bitLt) and base.weight.dtype == torch.int8


def dequantize(base: Any) -> Tensor:
    """Returns a quantised layer's weight, float32 ``[out, in]``."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        codes, scales = _int8_state(base)
        return codes.float() * (scales.float() / 127.0)[:, None]
    weight, state = base.weight.data, copy.copy(base.weight.quant_state)
    if not getattr(state, "packing_format_for_cpu", False):
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(weight, state)
    # After the first forward on a CPU with AVX-512 BF16 the nibbles lie in tiles, and absmax is transposed bfloat16.
    # The library's inverse would quantise absmax anew; the function of the layer is the one with absmax as it stands.
    absmax = state.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False
    weight, state = _convert_weight_packed_for_cpu_inverse(weight, state)
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight, absmax, state.blocksize, state.quant_type, list(state.shape), torch.float32
    )


def requantize(base: Any, weight: Tensor) -> None:
    """Stores a float32 weight ``[out, in]``, quantised as the old one was."""
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
    """Returns what a quantised layer holds of its weight beside the parameter itself, for `put_beside_weight`."""
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
    """The codes and scales, which move from the weight to the layer's state at the first forward."""
    if base.state.CB is not None:
        return base.state.CB, base.state.SCB
    if base.weight.CB is not None:
        return base.weight.CB, base.weight.SCB
    return base.weight.data, base.weight.SCB if base.weight.SCB is not None else base.state.SCB
