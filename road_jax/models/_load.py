"""From a Hugging Face folder to a Linen module and its variables, without torch."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from road_core import AdapterError
from road_core._errors import listed
from road_core._files import inside, read_json
from road_jax._quantize import BLOCK, QuantizedKernel, from_codes
from road_jax._tree import Path as TreePath
from road_jax._tree import Tree, flatten, unflatten
from road_jax.models._config import DecoderConfig
from road_jax.models._decoder import Decoder, Remat

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Flax's leaf -> PyTorch's. A kernel is a weight transposed.
_LEAVES = {"kernel": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}

# Buffers that old checkpoints hold and that follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def load(
    directory: str | os.PathLike, *, dtype: Any = None, scan: bool = True, remat: Remat = "linears"
) -> tuple[Decoder, dict[str, Tree]]:
    """Loads a decoder of the Llama family from ``config.json`` and safetensors, one file or an index of several.

    A checkpoint that bitsandbytes quantised (nf4, with or without double quantisation, or int8) is taken as it stands:
    its kernels become `road_jax.QuantizedKernel`, with which ``Road.apply`` computes, also with an empty adapter.

    Args:
        directory: a Hugging Face folder.
        dtype: of params and computation; None keeps the checkpoint's (its first floating tensor's, bit for bit).
        scan: layers stacked and compiled once, or numbered and unrolled.
        remat: what of a layer's activations is kept for the backward pass: ``"none"`` keeps all, ``"linears"`` what its
            linear layers gave, ``"full"`` nothing but what came in; the rest is computed anew.

    Returns:
        ``(module, variables)``: ``module.apply(variables, input_ids, attention_mask=…)`` gives logits.

    Raises:
        AdapterError: the folder lacks something, a file is broken, the model type is unknown, or tensors are missing,
            left over or of another shape than the config says; all of those are listed.

    Example:
        >>> from road_jax import models
        >>> module, variables = models.load("checkpoints/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    config = read_config(directory)
    with _open(directory) as tensors:
        own = dtype is None
        dtype = jnp.dtype(_dtype(tensors, directory) if dtype is None else dtype)
        module = Decoder(config, dtype=dtype, param_dtype=dtype, scan=scan, remat=remat)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        wanted = flatten(shapes)
        _check(directory, config, wanted, tensors, scan=scan)
        layers = config.num_hidden_layers if scan else None
        params = {path: _read(tensors, path, leaf, layers, own_dtype=own) for path, leaf in wanted.items()}
    return module, {"params": unflatten(params)}


def read_config(directory: str | os.PathLike) -> DecoderConfig:
    """Reads a Hugging Face folder's ``config.json``.

    Raises:
        AdapterError: there is none, or it describes another model than the decoders here.
    """
    path = inside(directory, "config.json")
    return DecoderConfig.from_hugging_face(read_json(path), str(path))


class _Tensors(Mapping[str, Any]):
    """The tensors of a checkpoint by name; each is read from its file when asked for."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> list[int]:
        return list(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._files[name].get_slice(name).get_dtype()


@contextlib.contextmanager
def _open(directory: str | os.PathLike) -> Iterator[_Tensors]:
    folder = Path(directory)
    with contextlib.ExitStack() as stack:

        def open_file(name: str) -> Any:
            path = inside(folder, name)
            try:
                return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise AdapterError(
                    f"{path}: expected a whole safetensors file, found a broken one ({reason})"
                ) from None

        if (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():
            index = read_json(inside(folder, _INDEX)).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise AdapterError(f"{folder / _INDEX}: expected a weight_map from tensors to files, found none")
            shards = {name: open_file(name) for name in sorted(set(index.values()))}
            held = {name: set(shard.keys()) for name, shard in shards.items()}
            lost = sorted(key for key, name in index.items() if key not in held[name])
            if lost:
                raise AdapterError(f"{folder / _INDEX}: expected tensors where the index says, found no {listed(lost)}")
            yield _Tensors({key: shards[name] for key, name in index.items()})
        else:
            whole = open_file(_SINGLE)
            yield _Tensors(dict.fromkeys(whole.keys(), whole))


def _dtype(tensors: _Tensors, directory: str | os.PathLike) -> str:
    """The embedding's: no kind of quantisation touches it."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    name = "model.embed_tokens.weight"
    found = tensors.dtype(name) if name in tensors else "none"
    if found not in names:
        raise AdapterError(f"{directory}: expected {name} of float32, bfloat16 or float16, found {found}")
    return names[found]


def _sources(path: TreePath, layers: int | None) -> list[str]:
    """Returns the names of the tensors that make a param: one, or one for each layer of a stack."""
    *names, leaf = path
    *names, leaf = [*names, _LEAVES[leaf]]
    if layers is None or "layers" not in names:
        return [".".join([*names, leaf])]
    at = names.index("layers") + 1
    return [".".join([*names[:at], str(layer), *names[at:], leaf]) for layer in range(layers)]


def _check(
    directory: str | os.PathLike,
    config: DecoderConfig,
    wanted: Mapping[TreePath, Any],
    tensors: _Tensors,
    *,
    scan: bool,
) -> None:
    """Every param has its tensors, of the right shape and a floating dtype, and every tensor its param."""
    layers = config.num_hidden_layers if scan else None
    missing, wrong, expected = [], [], set()
    for path, leaf in wanted.items():
        for name in _sources(path, layers):
            expected.add(name)
            if name not in tensors:
                missing.append(name)
                continue
            stacked = layers is not None and "layers" in path
            shape = list(leaf.shape[1:] if stacked else leaf.shape)
            shape = shape[::-1] if path[-1] == "kernel" else shape
            if path[-1] == "kernel" and (kind := _quantization(tensors, name)):
                expected.update(side for side in tensors if side.startswith(f"{name}."))
                expected.update(f"{name.removesuffix('weight')}{side}" for side in ("SCB", "weight_format"))
                if kind not in ("nf4", "int8"):
                    wrong.append(f"{name} in {kind}")
                elif _quantized_shape(tensors, name, kind) != shape:
                    wrong.append(f"{name} {_quantized_shape(tensors, name, kind)} for {shape}")
            elif tensors.shape(name) != shape:
                wrong.append(f"{name} {tensors.shape(name)} for {shape}")
            elif tensors.dtype(name) not in ("F32", "BF16", "F16", "F64"):
                wrong.append(f"{name} of {tensors.dtype(name)}")
    left = [name for name in tensors if name not in expected and not name.endswith(_DERIVED)]
    if config.tie_word_embeddings:
        left = [name for name in left if name != "lm_head.weight"]
    problems = [
        f"{what} {listed(names)}"
        for what, names in (("no", missing), ("another form of", wrong), ("besides", left))
        if names
    ]
    if problems:
        raise AdapterError(f"{directory}: expected the tensors that config.json describes, found {'; '.join(problems)}")


def _quantization(tensors: _Tensors, name: str) -> str | None:
    """Returns how bitsandbytes stored a weight: ``"nf4"``, ``"fp4"``, ``"int8"``, or None for a plain one."""
    state = f"{name}.quant_state.bitsandbytes__"
    kinds = [kind for kind in ("nf4", "fp4") if state + kind in tensors]
    if kinds:
        return kinds[0]
    return "int8" if f"{name.removesuffix('weight')}SCB" in tensors and tensors.dtype(name) == "I8" else None


def _state(tensors: _Tensors, name: str) -> dict[str, Any]:
    """The JSON that bitsandbytes keeps with a 4-bit weight."""
    try:
        state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
        blocks, shape, dtype = state["blocksize"], state["shape"], jnp.dtype(state["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{name}: expected bitsandbytes' quant_state, found a broken one ({error})") from None
    codes = tensors[name].nbytes * 2
    if blocks != BLOCK or len(shape) != 2 or codes != shape[0] * shape[1]:
        raise AdapterError(
            f"{name}: expected nf4 codes in blocks of {BLOCK}, found {codes} in blocks of {blocks} for shape {shape}"
        )
    return {**state, "dtype": dtype}


def _quantized_shape(tensors: _Tensors, name: str, kind: str) -> list[int]:
    return tensors.shape(name) if kind == "int8" else list(_state(tensors, name)["shape"])


def _read_quantized(
    tensors: _Tensors, sources: list[str], leaf: Any, kind: str, *, stacked: bool, own_dtype: bool
) -> QuantizedKernel:
    kinds = {_quantization(tensors, name) for name in sources}
    if kinds != {kind}:
        raise AdapterError(
            f"{sources[0]}: expected all layers of a stack to be quantised alike, found {sorted(map(str, kinds))} "
            "(scan=False keeps them apart)"
        )
    codes, scales, dtype = [], [], leaf.dtype
    for name in sources:
        if kind == "int8":
            codes.append(tensors[name])
            scales.append(tensors[f"{name.removesuffix('weight')}SCB"].reshape(-1, 1))
            continue
        state = _state(tensors, name)
        dtype = state["dtype"] if own_dtype else leaf.dtype
        absmax = tensors[f"{name}.absmax"].reshape(-1)
        if "nested_offset" in state:
            # In float32 on the host, as bitsandbytes does it: compiled, a fused multiply-add would round otherwise.
            table, outer = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.nested_absmax"]
            outer = np.repeat(outer, state["nested_blocksize"])[: len(absmax)]
            absmax = table[absmax] * outer + np.float32(state["nested_offset"])
        rows = 1 if leaf.shape[-2] % BLOCK else leaf.shape[-1]
        codes.append(tensors[name].reshape(rows, -1).view(np.uint8))
        scales.append(absmax.reshape(rows, -1))
    shape = (leaf.shape[-2], leaf.shape[-1])
    if stacked:
        return from_codes(np.stack(codes), np.stack(scales), kind=kind, shape=shape, dtype=dtype)
    return from_codes(codes[0], scales[0], kind=kind, shape=shape, dtype=dtype)


def _read(tensors: _Tensors, path: TreePath, leaf: Any, layers: int | None, *, own_dtype: bool) -> Any:
    """Returns one param in its dtype, or quantised as it is stored; a stack is filled layer by layer."""
    sources = _sources(path, layers)
    stacked = layers is not None and "layers" in path
    kind = _quantization(tensors, sources[0]) if path[-1] == "kernel" else None
    if kind is not None:
        return _read_quantized(tensors, sources, leaf, kind, stacked=stacked, own_dtype=own_dtype)
    result = np.empty(leaf.shape, leaf.dtype)
    for layer, name in enumerate(sources):
        array = tensors[name].T if path[-1] == "kernel" else tensors[name]
        if stacked:
            result[layer] = array
        else:
            result[...] = array
    return jnp.asarray(result)
