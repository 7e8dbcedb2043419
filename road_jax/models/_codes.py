"""Reads kernels in 4 or 8 bits from a checkpoint, share by share: as it stores them, or quantised while reading."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from road_core._bitsandbytes import Quantized
from road_jax._quantize import Kind, QuantizedKernel, encode, quantized_shapes

Index = tuple[slice, ...]


def read_codes(
    names: Sequence[str],
    weights: Sequence[Quantized | np.ndarray],
    kind: Kind,
    *,
    stack: tuple[int, ...],
    dtype: Any,
    shardings: Callable[[QuantizedKernel], QuantizedKernel] | None,
) -> QuantizedKernel:
    """Returns the kernel of one layer or of a stack.

    No more is read, encoded or held on the host than the part of the kernel that is on this process's devices. Weights
    that are still to be quantised are read one layer at a time.

    Args:
        names: the weights' names.
        weights: ``[out, in]``, memory-mapped; either all as bitsandbytes stores them in ``kind``, or all plain.
        kind: the kind of codes.
        stack: the kernel's stack axes, which the weights fill in order; none for one weight.
        dtype: the dtype that the kernel is computed with. Plain weights are rounded to it before they are quantised.
        shardings: returns the shardings of codes and scales, given their shapes; None puts both on the default device.

    Raises:
        AdapterError: see `encode`.
    """
    out, inputs = weights[0].shape
    shapes = quantized_shapes(kind, stack, (inputs, out), dtype)
    count, blocks = shapes.scales.shape[-2:]
    # How many numbers of the weight are in a byte of codes, in a row, and under one scale.
    packed = 2 if kind == "nf4" else 1
    row = shapes.codes.shape[-1] * packed
    block = -(-row // blocks)

    def layer(name: str, weight: Quantized | np.ndarray, rows: slice, first: int, last: int) -> tuple[Any, Any]:
        if not isinstance(weight, Quantized):
            return encode(name, weight[rows, first:last].astype(dtype), kind)
        codes = weight.codes.map().reshape(-1).view(shapes.codes.dtype).reshape(count, -1)
        scales = weight.scales().reshape(count, -1)
        return codes[rows, first // packed : -(-last // packed)], scales[rows, first // block : -(-last // block)]

    # Cached, because codes, scales and devices that hold the same part ask for it one after the other.
    @functools.cache
    def region(start: int, stop: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns codes and scales of rows start to stop, and of numbers first to last in them: whole blocks."""
        size = len(weights), stop - start
        codes = np.empty((*size, -(-(last - first) // packed)), shapes.codes.dtype)
        scales = np.empty((*size, -(-(last - first) // block)), np.float32)
        for at, (name, weight) in enumerate(zip(names, weights, strict=True)):
            codes[at], scales[at] = layer(name, weight, slice(start, stop), first, last)
        return codes.reshape(*stack, *codes.shape[1:]), scales.reshape(*stack, *scales.shape[1:])

    def share(which: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
        *lead, high, wide = index or (slice(None),) * len(shape)
        (start, stop, _), (first, last, _) = high.indices(shape[-2]), wide.indices(shape[-1])
        each = block if which else packed
        begin = first * each // block * block
        end = min(-(-last * each // block) * block, row)
        found = region(start, stop, begin, end)[which]
        return found[*lead, :, first - begin // each : last - begin // each]

    def made(which: int, shape: tuple[int, ...], where: Any) -> jax.Array:
        part = functools.partial(share, which, shape)
        return jnp.asarray(part(())) if where is None else jax.make_array_from_callback(shape, where, part)

    where = None if shardings is None else shardings(shapes)
    codes = made(0, shapes.codes.shape, where and where.codes)
    scales = made(1, shapes.scales.shape, where and where.scales)
    return dataclasses.replace(shapes, codes=codes, scales=scales)
