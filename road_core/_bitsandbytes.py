"""Weights that bitsandbytes stores in a checkpoint in 4 or 8 bits, and their values, in NumPy."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from road_core._adapter import Array, from_float32, to_float32
from road_core._errors import AdapterError
from road_core._safetensors import DTYPES, Entry

# bitsandbytes' own tables; it doesn't use the one in the file.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
_TABLES = {"nf4": NF4, "fp4": np.concatenate([_FP4, -_FP4])}

# The names of the dtypes of weights in configs and in bitsandbytes, and safetensors' names for them.
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_STATE = ".quant_state.bitsandbytes__"

# A state is one line of JSON; a larger one is refused.
_LARGEST_STATE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight ``[out, in]`` in 4 or 8 bits; used in place of a plain tensor's `Entry`.

    Attributes:
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        shape: the weight's shape.
        dtype: safetensors' name of the dtype to which it is dequantised.
        block: how many neighbours share a scale; for int8 a row.
        codes: ``out · in / 2`` bytes, two codes in each, the first one in the high bits; int8: ``[out, in]``.
        absmax: each block's greatest magnitude, or with ``nested`` its code.
        nested: the table and the scales of these codes, how many of them share a scale, and the offset that is added.
    """

    kind: str
    shape: tuple[int, int]
    dtype: str
    block: int
    codes: Entry
    absmax: Entry
    nested: tuple[Entry, Entry, int, np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """The size in bytes once dequantised."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def scales(self, blocks: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.float32]:
        """Returns the absmax of blocks in float32, rounded as bitsandbytes does it."""
        absmax = self.absmax.map().reshape(-1)
        if self.nested is None:
            return to_float32(absmax[blocks])
        table, outer, size, offset = self.nested
        blocks = np.arange(absmax.size)[blocks]
        return table.map().reshape(-1)[absmax[blocks]] * outer.map().reshape(-1)[blocks // size] + offset

    def __getitem__(self, rows: NDArray[np.intp] | slice) -> Array:
        """Returns rows bit for bit as bitsandbytes dequantises them: 4-bit weights in ``dtype``, int8 in float32."""
        out, inputs = self.shape
        index = np.arange(out)[rows]
        unit = math.gcd(inputs, self.block)
        scales = self.scales((index[:, None] * inputs + np.arange(0, inputs, unit)) // self.block)
        codes = self.codes.map().reshape(-1).view(np.uint8).reshape(out, -1)[rows]
        if self.kind == "int8":
            values = codes.view(np.int8).astype(np.float32)
        else:
            values = _TABLES[self.kind][np.stack([codes >> 4, codes & 15], axis=-1)]
        wide = (values.reshape(len(index), -1, unit) * scales[..., None]).reshape(len(index), inputs)
        # int8: multiplied in bitsandbytes' order, so that the last bit agrees.
        return wide * np.float32(1 / 127) if self.kind == "int8" else from_float32(wide, DTYPES[self.dtype])


def fold(entries: Mapping[str, Entry], dtype: str) -> dict[str, Entry | Quantized]:
    """Returns a checkpoint's tensors, with one entry for each quantised weight and none for the tensors it consists of.

    Args:
        entries: the tensors of all shards.
        dtype: safetensors' name of the dtype to which int8 weights are dequantised; the others store their own.

    Raises:
        AdapterError: a quantised weight lacks a part, or its parts don't match.
    """
    folded: dict[str, Entry | Quantized] = dict(entries)
    for name, entry in entries.items():
        weight, mark, kind = name.partition(_STATE)
        if mark and kind in _TABLES:
            folded[weight] = _four_bits(entries, weight, kind)
            sides = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{_STATE[1:]}{kind}")
            for side in sides:
                folded.pop(f"{weight}.{side}", None)
        elif name.endswith(".SCB") and (weight := f"{name.removesuffix('SCB')}weight") in entries:
            if entries[weight].dtype != "I8":
                continue
            folded[weight] = _eight_bits(entries, weight, entry, dtype)
            for side in ("SCB", "weight_format"):
                folded.pop(f"{weight.removesuffix('weight')}{side}", None)
    return folded


def _four_bits(entries: Mapping[str, Entry], name: str, kind: str) -> Quantized:
    try:
        packed = entries[f"{name}{_STATE}{kind}"]
        if packed.nbytes > _LARGEST_STATE:
            raise ValueError(f"{packed.nbytes} bytes are too many")
        state = json.loads(packed.map().tobytes())
        shape, block = tuple(map(_size, state["shape"])), _size(state["blocksize"])
        codes, absmax, dtype = entries[name], entries[f"{name}.absmax"], FLOATS[state["dtype"]]
        if len(shape) != 2 or shape[1] % 2 or codes.nbytes * 2 != math.prod(shape):
            raise ValueError(f"{codes.nbytes * 2} codes for shape {list(shape)}")
        blocks, nested = -(-codes.nbytes * 2 // block), None
        if "nested_offset" in state:
            table, outer = entries[f"{name}.nested_quant_map"], entries[f"{name}.nested_absmax"]
            size = _size(state["nested_blocksize"])
            nested = table, outer, size, np.float32(state["nested_offset"])
            _check_side(table, 256, "F32")
            _check_side(outer, -(-blocks // size), "F32")
        _check_side(absmax, blocks, "U8" if nested else "F32")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{name}: expected bitsandbytes' {kind} parts, found broken ones ({error!s:.200})") from None
    return Quantized(kind, (shape[0], shape[1]), dtype, block, codes, absmax, nested)


def _eight_bits(entries: Mapping[str, Entry], name: str, scales: Entry, dtype: str) -> Quantized:
    codes, form = entries[name], entries.get(f"{name.removesuffix('weight')}weight_format")
    try:
        if len(codes.shape) != 2:
            raise ValueError(f"codes of shape {list(codes.shape)}")
        _check_side(scales, codes.shape[0], "F32")
        # 0 stands for plain rows; other values were layouts for old GPUs.
        if form is not None and (form.nbytes > 8 or any(form.map().tobytes())):
            raise ValueError("a weight_format other than rows")
    except ValueError as error:
        raise AdapterError(f"{name}: expected bitsandbytes' int8 parts, found broken ones ({error})") from None
    return Quantized("int8", (codes.shape[0], codes.shape[1]), dtype, codes.shape[1], codes, scales)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 40:
        raise ValueError(f"a size of {value!r:.80}")
    return value


def _check_side(entry: Entry, count: int, dtype: str) -> None:
    if entry.dtype != dtype or math.prod(entry.shape) != count:
        raise ValueError(f"{entry.dtype} {list(entry.shape)} for {count} of {dtype}")
