"""Quantised kernels: bitsandbytes' NF4 and int8 weights as arrays, and a product that keeps no dequantised kernel.

Codes are packed as in bitsandbytes, over the weight ``[out, in]`` in row-major order, so that the codes of a checkpoint
that it wrote are used as they are. NF4: Dettmers et al., "QLoRA" (arXiv 2305.14314). int8: the vector-wise weights of
"LLM.int8()" (arXiv 2208.07339); activations are not quantised here.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import serialization
from flax.linen.dtypes import promote_dtype
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from road_core import AdapterError
from road_core._bitsandbytes import NF4
from road_jax._tree import Path, dotted, flatten, is_cut, params_of, replace_leaves, unbox, under

Kind = Literal["nf4", "int8"]

# How many neighbours in a row of the weight share one absmax.
BLOCK = 64

_REMEDY = "(quantize's exclude leaves a layer's kernel as it is; Road.quantize takes those of nn.Dense alone)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A Dense kernel ``[in, out]`` in 4 or 8 bits; replaces the kernel in ``params``.

    If the kernel was boxed, codes and scales are boxed too.

    Attributes:
        codes: ``nf4``: uint8 ``[*stack, out, in / 2]``, two codes per byte, the first one in the high bits; ``int8``:
            int8 ``[*stack, out, in]``.
        scales: absmax in float32. ``nf4``: per block, ``[*stack, out, in / 64]``; ``int8``: per row,
            ``[*stack, out, 1]``. If 64 doesn't divide ``in``, blocks of nf4 run on from row to row, and codes and
            scales have one row of ``out · in`` instead.
        kind: ``"nf4"`` or ``"int8"``.
        shape: ``(in, out)``, without stack axes.
        dtype: the dtype of the original kernel, to which it is dequantised.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """The size of codes and scales in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def dequantize(self) -> jax.Array:
        """Returns the kernel ``[*stack, in, out]`` in its dtype, bit for bit as bitsandbytes dequantises it."""
        return jnp.swapaxes(_weight(self), -1, -2)


def _to_state(kernel: QuantizedKernel) -> dict[str, Any]:
    parts = {name: serialization.to_state_dict(getattr(kernel, name)) for name in ("codes", "scales")}
    return {**parts, "kind": kernel.kind, "shape": list(kernel.shape), "dtype": kernel.dtype}


def _from_state(kernel: QuantizedKernel, state: Any) -> QuantizedKernel:
    if not isinstance(state, Mapping) or (lacking := {"codes", "scales", "kind", "shape", "dtype"} - state.keys()):
        found = f"no {sorted(lacking)[0]}" if isinstance(state, Mapping) else type(state).__name__
        raise AdapterError(
            f"{serialization.current_path()}: expected the state of a quantised kernel, with codes, scales, kind, "
            f"shape and dtype, found {found}"
        )
    codes, scales = (serialization.from_state_dict(getattr(kernel, n), state[n], name=n) for n in ("codes", "scales"))
    inputs, out = state["shape"]
    return QuantizedKernel(codes, scales, state["kind"], (int(inputs), int(out)), state["dtype"])


serialization.register_serialization_state(QuantizedKernel, _to_state, _from_state)


def quantize(variables: Mapping[str, Any], kind: Kind, *, exclude: Collection[str] = ("lm_head",)) -> dict[str, Any]:
    """Quantises the kernels of Dense layers, plain or stacked, as bitsandbytes quantises a model's linear layers.

    Works on the host, one kernel at a time. Codes are placed where the kernel was, and boxed if it was boxed.
    `Road.apply` computes with the result, also with an empty adapter. Embeddings, norms and biases stay as they are.

    A kernel alone doesn't show whether it belongs to a Dense layer. A kernel ``[*stack, in, out]`` is taken for one if
    it has a bias ``[*stack, out]`` beside it, or if it has no bias and two axes, or three with a stack's in front. If
    other layers of a model have such kernels, use `Road.quantize`, which knows the model.

    Args:
        variables: a model's variables.
        kind: ``"nf4"`` (blocks of 64; absmax in float32, not quantised a second time) or ``"int8"`` (one scale per
            output).
        exclude: modules whose kernels are left as they are, given by the ends of their dotted paths.

    Returns:
        Variables with a `QuantizedKernel` for each such kernel.

    Raises:
        AdapterError: the kind is unknown; no module has an excluded name; a kernel isn't finite, is traced, has inputs
            that 64 doesn't divide (nf4) or shards that would cut codes; or there is nothing to quantise.

    Example:
        >>> import jax, jax.numpy as jnp, road_jax
        >>> variables = {"params": {"proj": {"kernel": jnp.ones((64, 128), jnp.bfloat16)}}}
        >>> road_jax.quantize(variables, "nf4")["params"]["proj"]["kernel"].codes.shape
        (128, 32)
    """
    leaves = flatten(params_of(variables))
    stay = excluded(leaves, exclude)
    return quantize_kernels(
        variables, kind, [path for path in leaves if path not in stay and _looks_dense(leaves, path)]
    )


def quantize_kernels(variables: Mapping[str, Any], kind: Kind, paths: Collection[Path]) -> dict[str, Any]:
    """Like `quantize`, for the kernels at the given paths, whose stack axes come first."""
    check_kind(kind)
    leaves = flatten(params_of(variables))
    # A kernel without elements has no absmax, and quantising it would save nothing.
    some = [path for path in paths if unbox(leaves[path]).size]
    found = {path: _quantized(dotted(path[:-1]), leaves[path], kind) for path in some}
    if not found:
        raise AdapterError("quantize: expected kernels of Dense layers, found none")
    return replace_leaves(variables, {("params", *path): leaf for path, leaf in found.items()})


def excluded(paths: Collection[Path], names: Collection[str]) -> set[Path]:
    """Returns the paths of the params in modules with one of these names; a string is a single name.

    Raises:
        AdapterError: no module has one of the names, other than the default ``lm_head``, which a tied model may lack.
    """
    names = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else names
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"exclude: expected names of modules, found {names!r}")
    for name in names:
        if name != "lm_head" and not any(under(path, [name]) for path in paths):
            raise AdapterError(f"exclude: expected modules of the params, found no {name!r}")
    return {path for path in paths if under(path, names)}


def check_kind(kind: Kind) -> None:
    """Refuses an unknown kind."""
    if kind not in ("nf4", "int8"):
        raise AdapterError(f"quantize: expected nf4 or int8, found {kind!r}")


def dequantize(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables with quantised kernels replaced by plain ones of the original dtype."""
    leaves = flatten(params_of(variables))
    plain = {path: _dequantized(leaf) for path, leaf in leaves.items() if isinstance(leaf, QuantizedKernel)}
    return replace_leaves(variables, {("params", *path): leaf for path, leaf in plain.items()})


def quantized_shapes(kind: Kind, stack: tuple[int, ...], shape: tuple[int, int], dtype: Any) -> QuantizedKernel:
    """Returns a quantised kernel's shapes and dtypes (``jax.ShapeDtypeStruct``) for ``shape = (in, out)``."""
    inputs, out = shape
    rows, row = (1, inputs * out) if kind == "nf4" and inputs % BLOCK else (out, inputs)
    width, stored, blocks = (row // 2, jnp.uint8, -(-row // BLOCK)) if kind == "nf4" else (row, jnp.int8, 1)
    codes: Any = jax.ShapeDtypeStruct((*stack, rows, width), stored)
    scales: Any = jax.ShapeDtypeStruct((*stack, rows, blocks), jnp.float32)
    return QuantizedKernel(codes, scales, kind, shape, jnp.dtype(dtype).name)


def encode(name: str, weight: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes and scales of a weight ``[out, in]``, as bitsandbytes computes them.

    Args:
        name: the layer's name, for errors.
        weight: in any floating dtype; for nf4 it may be only some of the columns, in whole blocks.
        kind: the kind of codes.

    Raises:
        AdapterError: a value isn't finite (for int8 in float16, from which bitsandbytes quantises), or blocks don't
            divide the inputs.
    """
    out, inputs = weight.shape
    if kind == "nf4" and inputs % BLOCK:
        raise AdapterError(f"{name}: expected inputs that blocks of {BLOCK} divide, found {inputs} {_REMEDY}")
    with np.errstate(over="ignore"):
        wide = (weight.astype(np.float16) if kind == "int8" else weight).astype(np.float32, order="C")
    blocks = wide.reshape(out, -1, BLOCK if kind == "nf4" else inputs)
    absmax = np.abs(blocks).max(axis=-1)
    if not np.isfinite(absmax).all():
        limit = " (int8: in float16)" if kind == "int8" else ""
        raise AdapterError(f"{name}: expected finite values{limit}, found some that are NaN or infinite")
    if kind == "int8":
        # A row of zeros has codes of zero, whatever its scale.
        scale = (np.float32(1) / np.where(absmax == 0, np.float32(1), absmax)) * np.float32(127)
        return np.round(wide * scale).astype(np.int8), absmax
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[..., None]
    codes = np.zeros(scaled.shape, np.uint8)
    # Takes a tenth of the time of np.searchsorted.
    for middle in (NF4[1:] + NF4[:-1]) / 2:
        codes += scaled > middle
    codes = codes.reshape(out, -1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], absmax


def dense(module: nn.Dense, kernel: QuantizedKernel, bias: jax.Array | None, inputs: jax.Array) -> jax.Array:
    """Computes what ``nn.Dense`` computes, with a quantised kernel.

    Raises:
        AdapterError: the layer isn't an ``nn.Dense``, or the kernel doesn't fit it.
    """
    if not isinstance(module, nn.Dense):
        raise not_dense(module)
    if kernel.codes.ndim != 2 or kernel.shape != (inputs.shape[-1], module.features):
        raise AdapterError(
            f"{dotted(module.path)}: expected a quantised kernel [{inputs.shape[-1]}, {module.features}], found "
            f"{list(kernel.shape)} with codes {list(kernel.codes.shape)} {_REMEDY}"
        )
    dot_general = module.dot_general_cls() if module.dot_general_cls is not None else module.dot_general
    if dot_general is None and module.promote_dtype is promote_dtype:
        # Only the kernel's dtype matters here.
        alike = jnp.zeros((), kernel.dtype)
        x, _, bias = promote_dtype(inputs, alike, bias, dtype=module.dtype)
        y = matmul(x, kernel, module.precision)
    else:
        x, plain, bias = module.promote_dtype(inputs, kernel.dequantize(), bias, dtype=module.dtype)
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        y = (dot_general or jax.lax.dot_general)(x, plain, dimensions, precision=module.precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def not_dense(module: nn.Module) -> AdapterError:
    """Returns the error for a layer that can't compute with codes."""
    return AdapterError(
        f"{dotted(module.path)}: expected a Dense layer for a quantised kernel, found {type(module).__name__} {_REMEDY}"
    )


@contextlib.contextmanager
def explained(module: nn.Module) -> Iterator[None]:
    """Explains the failure of a layer that can't use codes, whose own error would print them all."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        kernel = module.scope and module.scope.get_variable("params", "kernel")
        if isinstance(kernel, QuantizedKernel) and not isinstance(module, nn.Dense):
            raise not_dense(module) from error
        raise


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: QuantizedKernel, precision: Any = None) -> jax.Array:
    """Returns ``x @ kernel`` in the dtype of ``x``.

    The kernel gets no gradient, and the backward pass dequantises again: otherwise the dequantised kernels of all
    layers would be kept under ``nn.scan``.
    """
    return _product(x, kernel, precision)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Spec:
    """An array's sharding on a mesh with explicit axes; kept for the backward pass instead of the array."""

    axes: PartitionSpec

    @classmethod
    def of(cls, array: jax.Array) -> "_Spec":
        return cls(jax.typeof(array).sharding.spec)

    @property
    def cut(self) -> bool:
        return is_cut(self.axes)


def _product(x: jax.Array, kernel: QuantizedKernel, precision: Any) -> jax.Array:
    weight = _weight(kernel).astype(x.dtype)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)


def _forward(x: jax.Array, kernel: QuantizedKernel, precision: Any) -> tuple[jax.Array, tuple[QuantizedKernel, _Spec]]:
    # Not `matmul`, inside of which a checkpoint policy wouldn't find the product that it is to save.
    return _product(x, kernel, precision), (kernel, _Spec.of(x))


def _backward(precision: Any, kept: tuple[QuantizedKernel, _Spec], d: jax.Array) -> tuple[jax.Array, None]:
    kernel, spec = kept
    weight = _weight(kernel).astype(d.dtype)
    laid = spec.axes if any(each.cut for each in (spec, _Spec.of(d), _Spec.of(weight))) else None
    dimensions = (((d.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(d, weight, dimensions, precision=precision, out_sharding=laid), None


matmul.defvjp(_forward, _backward)


def quantized_shardings(path: str, kernel: QuantizedKernel, where: NamedSharding) -> QuantizedKernel:
    """Returns the shardings of codes and scales, for a kernel ``[*stack, in, out]`` that is to be placed at ``where``.

    Scales are sharded like their codes, except where a cut through the inputs would leave no whole blocks: there each
    share holds all scales of a row. Shapes are enough.

    Raises:
        AdapterError: the codes can't be divided like that.
    """
    *stack, inputs, outputs = filled(where.spec, len(kernel.codes.shape))
    cuts = shares(where.mesh, outputs), shares(where.mesh, inputs)
    sizes = kernel.codes.shape[-2:]
    if sizes[0] % cuts[0] or sizes[1] % cuts[1]:
        raise AdapterError(
            f"{path}: expected {kernel.kind} codes that a mesh of {cuts[0]} x {cuts[1]} shares divides, "
            f"found {sizes[0]} x {sizes[1]}"
        )
    blocks = None if kernel.scales.shape[-1] % cuts[1] else inputs
    specs = PartitionSpec(*stack, outputs, inputs), PartitionSpec(*stack, outputs, blocks)
    return jax.tree.unflatten(jax.tree.structure(kernel), [NamedSharding(where.mesh, each) for each in specs])


def filled(spec: Iterable[Any], axes: int) -> list[Any]:
    """Returns the entries of a ``PartitionSpec``, or a box's names, padded with None to this number of axes."""
    entries = [*spec]
    return entries + [None] * (axes - len(entries))


def shares(mesh: Any, entry: Any) -> int:
    """Returns the number of shares into which an entry of a ``PartitionSpec`` cuts an axis."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def _weight(kernel: QuantizedKernel) -> jax.Array:
    """Returns ``[*stack, out, in]`` in the kernel's dtype; the product with the scale is computed in float32."""
    if kernel.kind == "int8":
        # Multiplied in bitsandbytes' order, so that the last bit agrees.
        weight = kernel.codes.astype(jnp.float32) * kernel.scales * np.float32(1 / 127)
        return weight.astype(kernel.dtype)
    *stack, rows, row = kernel.codes.shape
    codes = jnp.stack([kernel.codes >> 4, kernel.codes & 15], axis=-1).reshape(*stack, rows, 2 * row)
    values = jnp.asarray(NF4)
    values = values.at[codes].get(out_sharding=spec.axes) if (spec := _Spec.of(codes)).cut else values[codes]
    # Only neighbours within a row are reshaped, so that sharded codes are dequantised in shards.
    blocks = kernel.scales.shape[-1]
    scales = jnp.broadcast_to(kernel.scales[..., None], (*stack, rows, blocks, BLOCK)).reshape(*stack, rows, 2 * row)
    return (values * scales).astype(kernel.dtype).reshape(*stack, *reversed(kernel.shape))


def _looks_dense(leaves: Mapping[Path, Any], path: Path) -> bool:
    kernel, bias = (unbox(leaves.get((*path[:-1], name))) for name in ("kernel", "bias"))
    if path[-1] != "kernel" or not isinstance(kernel, jax.Array | np.ndarray):
        return False
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return False
    if bias is None:
        return kernel.ndim in (2, 3)
    return kernel.ndim >= 2 and bias.shape == (*kernel.shape[:-2], kernel.shape[-1])


def _quantized(path: str, leaf: Any, kind: Kind) -> QuantizedKernel:
    array = unbox(leaf)
    if isinstance(array, jax.core.Tracer):
        raise AdapterError(f"{path}: expected a kernel with values to quantise, found one being traced (by jit, say)")
    kernel = _encoded(path, np.asarray(jax.device_get(array)), kind)
    where = getattr(array, "sharding", None)
    if isinstance(where, NamedSharding):
        kernel = jax.device_put(kernel, quantized_shardings(path, kernel, where))
    elif isinstance(where, SingleDeviceSharding):
        kernel = jax.device_put(kernel, where)
    if not isinstance(leaf, nn.Partitioned):
        return kernel
    # The boxes go inside, because codes have different axes than the kernel.
    *stack, inputs, outputs = filled(leaf.names, array.ndim)
    codes = leaf.replace(value=kernel.codes, names=(*stack, outputs, inputs))
    scales = leaf.replace(value=kernel.scales, names=(*stack, outputs, None))
    return dataclasses.replace(kernel, codes=codes, scales=scales)


def _dequantized(kernel: QuantizedKernel) -> Any:
    plain = unbox(kernel).dequantize()
    if not isinstance(kernel.codes, nn.Partitioned):
        return plain
    *stack, outputs, inputs = kernel.codes.names
    return kernel.codes.replace(value=plain, names=(*stack, inputs, outputs))


def _encoded(path: str, kernel: np.ndarray, kind: Kind) -> QuantizedKernel:
    *stack, inputs, out = kernel.shape
    layers = [encode(path, weight.T, kind) for weight in kernel.reshape(-1, inputs, out)]
    codes, scales = (np.stack(parts) for parts in zip(*layers, strict=True))
    shapes = quantized_shapes(kind, tuple(stack), (inputs, out), kernel.dtype)
    return dataclasses.replace(
        shapes,
        codes=jnp.asarray(codes.reshape(shapes.codes.shape)),
        scales=jnp.asarray(scales.reshape(shapes.scales.shape)),
    )
