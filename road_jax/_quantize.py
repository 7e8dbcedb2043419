"""Quantised kernels: bitsandbytes' NF4 and int8 weights as arrays, and a product that never keeps a whole one.

The codes stand as bitsandbytes packs them, over the weight ``[out, in]`` in row-major order, so that a checkpoint that
it wrote is taken as it stands. NF4: Dettmers et al., "QLoRA" (arXiv 2305.14314). int8: the vector-wise weights of
"LLM.int8()" (arXiv 2208.07339); activations are not quantised here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from road_core import AdapterError
from road_core._bitsandbytes import NF4
from road_jax._tree import dotted, flatten, unflatten

Kind = Literal["nf4", "int8"]

# One absmax for so many neighbours in a row of the weight.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A Dense kernel ``[in, out]`` in 4 or 8 bits; stands in ``params`` where the kernel stood.

    Attributes:
        codes: ``nf4``: uint8 ``[*stack, out, in / 2]``, two codes a byte, the first one high; ``int8``: int8
            ``[*stack, out, in]``.
        scales: absmax in float32. ``nf4``: of each block, ``[*stack, out, in / 64]``; ``int8``: of each row,
            ``[*stack, out, 1]``. Where 64 doesn't divide ``in``, blocks run on from row to row, and codes and scales
            of nf4 have one row of ``out · in`` instead.
        kind: ``"nf4"`` or ``"int8"``.
        shape: ``(in, out)``, without stack axes.
        dtype: what the kernel was, and is computed with.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> jax.Array:
        """Returns the kernel ``[*stack, in, out]`` in its dtype: bit for bit what bitsandbytes computes with."""
        return jnp.swapaxes(_weight(self), -1, -2)


def quantize(variables: Mapping[str, Any], kind: Kind, *, exclude: Collection[str] = ("lm_head",)) -> dict[str, Any]:
    """Quantises the kernels of Dense layers, plain or stacked, as bitsandbytes quantises a model's linear layers.

    Works on the host, one kernel at a time. `Road.apply` computes with the result, also with an empty adapter;
    embeddings, norms and biases stay as they are.

    Args:
        variables: a model's; kernels ``[in, out]`` or ``[layers, in, out]``.
        kind: ``"nf4"`` (blocks of 64; absmax in float32, not quantised a second time) or ``"int8"`` (a scale an
            output).
        exclude: names of layers whose kernels stay.

    Returns:
        Variables with a `QuantizedKernel` for each such kernel.

    Raises:
        AdapterError: an unknown kind, a kernel that isn't finite or whose inputs 64 doesn't divide (nf4), or nothing to
            quantise.

    Example:
        >>> import jax, jax.numpy as jnp, road_jax
        >>> variables = {"params": {"proj": {"kernel": jnp.ones((64, 128), jnp.bfloat16)}}}
        >>> road_jax.quantize(variables, "nf4")["params"]["proj"]["kernel"].codes.shape
        (128, 32)
    """
    if kind not in ("nf4", "int8"):
        raise AdapterError(f"quantize: expected nf4 or int8, found {kind!r}")
    leaves = flatten(variables["params"])
    found = 0
    for path, leaf in leaves.items():
        if path[-1] != "kernel" or path[-2] in exclude or isinstance(leaf, QuantizedKernel | nn.meta.AxisMetadata):
            continue
        if leaf.ndim in (2, 3) and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[path] = _quantized(dotted(path[:-1]), np.asarray(jax.device_get(leaf)), kind)
            found += 1
    if not found:
        raise AdapterError("quantize: expected kernels of two axes, or three with a stack's, found none")
    return {**variables, "params": unflatten(leaves)}


def dequantize(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables with plain kernels in place of quantised ones, in the dtype that they had."""
    leaves = flatten(variables["params"])
    plain = {p: leaf.dequantize() if isinstance(leaf, QuantizedKernel) else leaf for p, leaf in leaves.items()}
    return {**variables, "params": unflatten(plain)}


def from_codes(
    codes: np.ndarray, scales: np.ndarray, *, kind: str, stack: tuple[int, ...], shape: tuple[int, int], dtype: Any
) -> QuantizedKernel:
    """Lays host arrays, whose numbers stand in bitsandbytes' order, out as `QuantizedKernel` describes."""
    inputs, out = shape
    rows = 1 if kind == "nf4" and inputs % BLOCK else out
    codes, scales = (array.reshape(*stack, rows, -1) for array in (codes, scales))
    return QuantizedKernel(jnp.asarray(codes), jnp.asarray(scales, jnp.float32), kind, shape, jnp.dtype(dtype).name)


def dense(module: nn.Dense, kernel: QuantizedKernel, bias: jax.Array | None, x: jax.Array) -> jax.Array:
    """What ``nn.Dense`` computes, with a quantised kernel.

    Raises:
        AdapterError: the kernel is another layer's.
    """
    path = dotted(module.path)
    if kernel.codes.ndim != 2 or kernel.shape != (x.shape[-1], module.features):
        raise AdapterError(
            f"{path}: expected a quantised kernel [{x.shape[-1]}, {module.features}], found {list(kernel.shape)} "
            f"with codes {list(kernel.codes.shape)}"
        )
    dtype = module.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    y = matmul(x.astype(dtype), kernel)
    return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


@jax.custom_vjp
def matmul(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """Returns ``x @ kernel`` in the dtype of ``x``.

    The kernel gets no gradient, and the backward pass dequantises anew: under ``nn.scan`` the dequantised kernels of
    all layers would otherwise be kept.
    """
    return _product(x, kernel)


def _product(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    weight = _weight(kernel).astype(x.dtype)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    # Not `matmul`, within which a policy of checkpointing wouldn't find the product that it keeps.
    return _product(x, kernel), kernel


def _backward(kernel: QuantizedKernel, d: jax.Array) -> tuple[jax.Array, None]:
    weight = _weight(kernel).astype(d.dtype)
    return jax.lax.dot_general(d, weight, (((d.ndim - 1,), (0,)), ((), ()))), None


matmul.defvjp(_forward, _backward)


def _weight(kernel: QuantizedKernel) -> jax.Array:
    """Returns ``[*stack, out, in]`` in the kernel's dtype; the product with the scale is in float32."""
    if kernel.kind == "int8":
        weight = kernel.codes.astype(jnp.float32) * (kernel.scales * np.float32(1 / 127))
        return weight.astype(kernel.dtype)
    *stack, rows, row = kernel.codes.shape
    values = jnp.asarray(NF4)[jnp.stack([kernel.codes >> 4, kernel.codes & 15], axis=-1)].reshape(*stack, rows, 2 * row)
    # Nothing but neighbours in a row is reshaped, so that what lies in shards is computed in shards.
    scales = jnp.repeat(kernel.scales, BLOCK, axis=-1)
    return (values * scales).astype(kernel.dtype).reshape(*stack, *reversed(kernel.shape))


def _quantized(path: str, kernel: np.ndarray, kind: str) -> QuantizedKernel:
    *stack, inputs, out = kernel.shape
    layout: Any = {"kind": kind, "stack": tuple(stack), "shape": (inputs, out), "dtype": kernel.dtype}
    weight = np.ascontiguousarray(np.swapaxes(kernel, -1, -2))
    if not np.isfinite(weight.astype(np.float32)).all():
        raise AdapterError(f"{path}: expected finite values, found some that are NaN or infinite")
    if kind == "int8":
        # bitsandbytes takes float16 weights.
        weight = weight.astype(np.float16).astype(np.float32)
        absmax = np.abs(weight).max(axis=-1)
        # A row of zeros has codes of zero, whatever its scale.
        scale = (np.float32(1) / np.where(absmax == 0, np.float32(1), absmax)) * np.float32(127)
        codes = np.round(weight * scale[..., None]).astype(np.int8)
        return from_codes(codes, absmax, **layout)
    if inputs % BLOCK:
        raise AdapterError(f"{path}: expected inputs that blocks of {BLOCK} divide, found {inputs}")
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[..., None]
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled).astype(np.uint8)
    return from_codes((codes[..., ::2] << 4) | codes[..., 1::2], absmax, **layout)
