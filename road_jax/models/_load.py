"""Loads a Linen module and its variables from a Hugging Face folder, without torch."""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from road_core import AdapterError
from road_core._adapter import is_bfloat16
from road_core._bitsandbytes import FLOATS, Quantized, fold
from road_core._errors import listed
from road_core._files import inside, read_json
from road_core._safetensors import HEAD, LANGUAGE_MODEL, Entry, has_own_head, model_name, read_entries
from road_jax._quantize import BLOCK, Kind, QuantizedKernel, check_kind, excluded
from road_jax._tree import Path as TreePath
from road_jax._tree import Tree, flatten, unflatten
from road_jax.models._codes import read_codes
from road_jax.models._config import DecoderConfig
from road_jax.models._decoder import Decoder, Remat, check_remat
from road_jax.models._mesh import check_mesh, shardings

# Flax's leaf names and PyTorch's. A kernel is a transposed weight.
_LEAVES = {"kernel": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}

# Names that a type's checkpoints have for the parts of a mixture of experts; the others have ours.
_EXPERTS = {"mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}

_NAMES = {stored: name for name, stored in FLOATS.items()}

# Buffers in old checkpoints that follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


def load(
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    scan: bool = True,
    remat: Remat = "linears",
    mesh: Mesh | None = None,
    quantize: Kind | None = None,
    exclude: Collection[str] = ("lm_head",),
) -> tuple[Decoder, dict[str, Tree]]:
    """Loads a decoder of the Llama family from ``config.json`` and safetensors, one file or an index of several.

    The model type is one of llama, mistral, ministral3, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, smollm3, olmo2,
    olmo3 and granite, or, with mixtures of experts, mixtral, qwen2_moe, qwen3_moe and olmoe. Of gemma3 and mistral3,
    which have vision, the language model alone is loaded.

    A checkpoint that bitsandbytes quantised (nf4, with or without double quantisation, or int8) is used as it is: its
    kernels become `road_jax.QuantizedKernel`, with which ``Road.apply`` computes, also with an empty adapter.

    Args:
        directory: a Hugging Face folder.
        dtype: the dtype of params and computation; None keeps the checkpoint's (its embedding's, bit for bit).
        scan: True for layers that are stacked and compiled once, False for numbered, unrolled ones.
        remat: which of a layer's activations are kept for the backward pass: ``"none"`` keeps all but
            attention's scores in rows of more than 128 tokens, ``"linears"`` the outputs of its linear layers,
            ``"full"`` only its input. The rest is recomputed.
        mesh: a mesh with the axes data, fsdp and tensor (`make_mesh`): params are placed as `shardings` says, and each
            device gets only its own share. None puts all params on the default device.
        quantize: ``"nf4"`` or ``"int8"``: quantises kernels while they are read, bit for bit as `road_jax.quantize`
            does. No device ever holds a whole plain kernel, and the host holds one layer's at a time.
        exclude: with ``quantize``, modules whose kernels are left as they are, given by the ends of their dotted paths.

    Returns:
        ``(module, variables)``: ``module.apply(variables, input_ids, attention_mask=…)`` returns logits.

    Raises:
        AdapterError: a file is missing or broken, the model type is unknown, or tensors are missing, left over or of
            another shape than the config says (all such tensors are listed). Or the mesh lacks an axis or would cut the
            model where it can't be cut, the dtype isn't a floating one, or there is nothing to quantise or something
            that can't be (`road_jax.quantize`).

    Example:
        >>> from road_jax import models
        >>> module, variables = models.load("checkpoints/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    if quantize is not None:
        check_kind(quantize)
    check_remat(remat)
    dtype = None if dtype is None else _floating(dtype)
    config = read_config(directory)
    entries = read_entries(directory)
    if config.language_model:
        entries = _without_vision(entries)
    if config.tie_word_embeddings and has_own_head(entries):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    own = dtype is None
    dtype = jnp.dtype(_dtype(entries, config, directory) if dtype is None else dtype)
    try:
        tensors = fold(entries, FLOATS.get(dtype.name, "F32"))
    except AdapterError as error:
        raise AdapterError(f"{directory}: {error}") from None
    module = Decoder(config, dtype=dtype, param_dtype=dtype, scan=scan, remat=remat)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    wanted = flatten(shapes)
    sources = {path: _sources(path, config, scan=scan) for path in wanted}
    _check(directory, config, wanted, tensors, sources, scan=scan)
    if mesh is not None:
        check_mesh(config, mesh)
    places = flatten(shardings({"params": shapes}, mesh)["params"]) if mesh is not None else {}
    kinds = _kinds(directory, sources, tensors, quantize, exclude)
    params: dict[TreePath, Any] = {}
    for path, leaf in wanted.items():
        found = [tensors[name] for name in sources[path]]
        stack = leaf.shape[: _stacks(path, scan=scan)]
        if path in kinds:
            params[path] = read_codes(
                sources[path],
                [each if isinstance(each, Quantized) else _array(each) for each in found],
                kinds[path],
                stack=stack,
                dtype=_NAMES[found[0].dtype] if own and isinstance(found[0], Quantized) else dtype,
                shardings=None if mesh is None else functools.partial(_shardings, path, mesh),
            )
        else:
            arrays = [_array(each) for each in found if isinstance(each, Entry)]
            arrays = [array.T for array in arrays] if path[-1] == "kernel" else arrays
            params[path] = _read(arrays, leaf, stack=stack, where=places.get(path))
    return module, {"params": unflatten(params)}


def read_config(directory: str | os.PathLike) -> DecoderConfig:
    """Reads a Hugging Face folder's ``config.json``.

    Raises:
        AdapterError: there is none, or it describes a model other than the decoders here.
    """
    path = inside(directory, "config.json")
    return DecoderConfig.from_hugging_face(read_json(path), str(path))


def _floating(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise AdapterError(
            f"dtype: expected a floating one such as float32, bfloat16 or float16, found {found or repr(dtype)}"
        )
    return found


def _without_vision(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the tensors of the language model and its head, by their names in the model."""
    named = {model_name(name): entry for name, entry in entries.items()}
    return {name: entry for name, entry in named.items() if name.startswith((LANGUAGE_MODEL, f"{HEAD}."))}


def _dtype(entries: Mapping[str, Entry], config: DecoderConfig, directory: str | os.PathLike) -> str:
    """Returns the embedding's dtype: no kind of quantisation changes it."""
    name = f"{LANGUAGE_MODEL if config.language_model else 'model.'}embed_tokens.weight"
    found = entries[name].dtype if name in entries else "none"
    if found not in _NAMES:
        raise AdapterError(f"{directory}: expected {name} of float32, bfloat16 or float16, found {found}")
    return _NAMES[found]


def _stacks(path: TreePath, *, scan: bool) -> int:
    """Returns how many stack axes a param has: one for the layers, and one for the experts."""
    return (scan and "layers" in path) + ("experts" in path)


def _sources(path: TreePath, config: DecoderConfig, *, scan: bool) -> list[str]:
    """Returns the names of the tensors that make up a param: one, or one for each place in its stacks, in order."""
    *names, leaf = path
    names = [*names, _LEAVES[leaf]]
    if config.mixture is not None and "mlp" in path:
        own = _EXPERTS.get(config.model_type, {})
        names = [own.get(name, name) for name in names]
    found: list[list[str]] = [[]]
    for name in names:
        found = [[*before, name] for before in found]
        count = config.num_hidden_layers if name == "layers" and scan else 0
        if name == "experts" and config.mixture is not None:
            count = config.mixture.experts
        if count:
            found = [[*before, str(number)] for before in found for number in range(count)]
    return [".".join(each) for each in found]


def _check(
    directory: str | os.PathLike,
    config: DecoderConfig,
    wanted: Mapping[TreePath, Any],
    tensors: Mapping[str, Entry | Quantized],
    sources: Mapping[TreePath, list[str]],
    *,
    scan: bool,
) -> None:
    """Checks that every param has its tensor, of the right shape and a floating dtype, and every tensor its param."""
    missing, wrong, expected = [], [], set()
    for path, leaf in wanted.items():
        shape = [*leaf.shape[_stacks(path, scan=scan) :]]
        shape = shape[::-1] if path[-1] == "kernel" else shape
        for name in sources[path]:
            expected.add(name)
            if name not in tensors:
                missing.append(name)
                continue
            tensor = tensors[name]
            if list(tensor.shape) != shape:
                wrong.append(f"{name} {list(tensor.shape)} for {shape}")
            elif isinstance(tensor, Quantized):
                if path[-1] != "kernel" or tensor.kind not in ("nf4", "int8"):
                    wrong.append(f"{name} in {tensor.kind}")
                elif tensor.kind == "nf4" and tensor.block != BLOCK:
                    wrong.append(f"{name} in blocks of {tensor.block} for {BLOCK}")
            elif tensor.dtype not in ("F32", "BF16", "F16", "F64"):
                wrong.append(f"{name} of {tensor.dtype}")
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


def _kinds(
    directory: str | os.PathLike,
    sources: Mapping[TreePath, list[str]],
    tensors: Mapping[str, Entry | Quantized],
    wish: Kind | None,
    exclude: Collection[str],
) -> dict[TreePath, Kind]:
    """Returns the kind of each quantised kernel: the stored one, or else the requested one."""
    stay = excluded(sources, exclude)
    found = {}
    plain = 0
    for path, names in sources.items():
        kinds = {getattr(tensors[name], "kind", None) for name in names}
        if len(kinds) > 1:
            raise AdapterError(
                f"{names[0]}: expected all layers of a stack to be quantised alike, found {sorted(map(str, kinds))} "
                "(scan=False keeps them apart)"
            )
        (kind,) = kinds
        if kind is None and wish is not None and path[-1] == "kernel" and path not in stay:
            kind, plain = wish, plain + 1
        if kind is not None:
            found[path] = kind
    if wish is not None and not plain:
        raise AdapterError(f"{directory}: expected plain weights to quantise, found none")
    return found


def _shardings(path: TreePath, mesh: Mesh, kernel: QuantizedKernel) -> QuantizedKernel:
    return flatten(shardings({"params": unflatten({path: kernel})}, mesh)["params"])[path]


def _array(tensor: Entry) -> np.ndarray:
    array = tensor.map()
    return array.view(ml_dtypes.bfloat16) if is_bfloat16(array.dtype) else array


def _read(arrays: list[np.ndarray], leaf: Any, *, stack: tuple[int, ...], where: NamedSharding | None) -> jax.Array:
    """Returns a param in its dtype; a stack is filled from one array after the other."""
    whole = (slice(None),) * leaf.ndim
    if where is None:
        return jnp.asarray(_share(arrays, leaf, whole, stack=stack))
    return jax.make_array_from_callback(
        leaf.shape, where, lambda index: _share(arrays, leaf, index or whole, stack=stack)
    )


def _share(arrays: list[np.ndarray], leaf: Any, index: tuple[slice, ...], *, stack: tuple[int, ...]) -> np.ndarray:
    """Reads one device's share of a param, and no more of the mapped files."""
    if not stack:
        return np.array(arrays[0][index], leaf.dtype)
    numbers = np.arange(len(arrays)).reshape(stack)[index[: len(stack)]]
    share = np.stack([arrays[n][index[len(stack) :]] for n in numbers.flat], dtype=leaf.dtype, casting="unsafe")
    return share.reshape(*numbers.shape, *share.shape[1:])
