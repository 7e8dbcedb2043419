"""`transform`: RoAd on any Linen model, without a change to the model."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from road_core import AdapterError, RoadConfig, check_group_size, parameter_size, select_modules
from road_jax import _merge, _quantize
from road_jax._rotate import blocks, check_layer, polar, rotate_blocks, rotate_rows
from road_jax._tree import ROAD_LEAVES, Path, Tree, adapted_paths, dotted, flatten, overlay, to_dict, unflatten

# The usual names of the layer that "all-linear" leaves out: PEFT asks the model for it, a Linen module can't be asked.
OUTPUT_HEADS = ("lm_head", "output_head", "embed_out", "logits_dense", "classifier", "score")


@dataclasses.dataclass(frozen=True)
class Road:
    """A pair of pure functions, `init` and `apply`, with `merge` and `unmerge`; made by `transform`.

    Attributes:
        model: the Linen module, unchanged.
        config: which layers are rotated, and how.
    """

    model: nn.Module
    config: RoadConfig

    def init(self, rng: jax.Array, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tree:
        """Returns a fresh adapter; the model is only traced for its shapes, never run.

        Args:
            rng: a key; it decides nothing unless ``config.init_weights`` is False.
            variables: the model's variables, ``{"params": …}``.
            *args: sample inputs of the model; shapes and dtypes are all that counts.
            **kwargs: more of them.

        Returns:
            A nested dict that mirrors ``params``: float32 ``road_theta`` and ``road_alpha`` where a targeted layer's
            ``kernel`` stands (a stacked layer's have the stack axis where its own params have it), and copies of the
            params of ``config.modules_to_save``.

        Raises:
            AdapterError: no layer matches, a match is no linear layer, the group size doesn't divide a layer's
                outputs, or ``variables`` aren't the model's.
        """
        outs: dict[Path, int] = {}
        names: dict[str, None] = {}

        def declare(next_fn: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            if module.path:
                names[dotted(module.path)] = None
            result = next_fn(*args, **kwargs)
            if (axes := _output_axes(context)) is not None:
                out = outs[module.path] = math.prod(result.shape[-axes:])
                size = parameter_size(self.config.variant, out)
                for leaf, fill in (("road_theta", jnp.zeros), ("road_alpha", jnp.ones)):
                    module.scope.param(leaf, lambda _, fill=fill: fill((size,), jnp.float32))
            return result

        def shapes(rng: jax.Array, args: Any, kwargs: Any) -> Any:
            with nn.intercept_methods(declare):
                return self.model.init(rng, *args, **kwargs)

        traced = trace(shapes, rng, args, kwargs)
        leaves = {p: leaf for p, leaf in flatten(nn.meta.unbox(traced["params"])).items() if p[-1] in _FILL}
        base = flatten(nn.meta.unbox(variables["params"]))
        linear = [dotted(path[:-1]) for path in leaves if path[-1] == "road_theta"]
        chosen = select_modules(
            self.config,
            list(dict.fromkeys([*names, *linear])),
            linear=linear,
            output_head=[name for name in linear if name.rpartition(".")[2] in OUTPUT_HEADS],
            model_type=getattr(getattr(self.model, "config", None), "model_type", None),
        )
        for name in chosen:
            path = tuple(name.split("."))
            if name not in linear:
                raise AdapterError(f"{name}: expected a Dense, DenseGeneral or Einsum layer, found another module")
            check_group_size(outs[path], self.config.group_size, name)
            if (*path, "kernel") not in base:
                raise AdapterError(f"{name}: expected a kernel in variables['params'], found none")
        adapter = {
            path: _FILL[path[-1]](rng, dotted(path), leaf.shape, self.config.init_weights)
            for path, leaf in sorted(leaves.items())
            if dotted(path[:-1]) in set(chosen)
        }
        return unflatten({**adapter, **self._saved(base)})

    def apply(
        self,
        variables: Mapping[str, Any],
        adapter: Tree,
        *args: Any,
        adapter_ids: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model with every adapted layer's output rotated.

        A pure function: ``jit``, ``grad``, ``vmap`` and ``pmap`` it freely. A gradient over ``adapter`` alone computes
        no gradient of a kernel.

        Args:
            variables: the model's variables; kernels may be quantised by `road_jax.quantize`.
            adapter: as `init` gives it; or several of them, as `road_jax.stack_adapters` lays them together.
            *args: the model's inputs.
            adapter_ids: for several adapters: int32 ``[batch]``, which of them each row gets, counted from 1; 0 for
                none. Any mix is the same program.
            **kwargs: passed to ``model.apply``.

        Returns:
            What ``model.apply`` returns; every rotated output keeps its dtype.

        Raises:
            AdapterError: a part of the adapter has no layer, was used by no layer, or has another layer's shape;
                or there are ``adapter_ids`` and a layer whose output doesn't have the batch's rows first.
        """
        expected = set(adapted_paths(adapter))
        used: set[Path] = set()

        def turn(next_fn: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            axes = _output_axes(context)
            if axes is None:
                return next_fn(*args, **kwargs)
            kernel = module.scope.get_variable("params", "kernel")
            if isinstance(kernel, _quantize.QuantizedKernel):
                if not isinstance(module, nn.Dense):
                    raise AdapterError(f"{dotted(module.path)}: expected a Dense layer for a quantised kernel")
                result = _quantize.dense(module, kernel, module.scope.get_variable("params", "bias"), *args, **kwargs)
            else:
                result = next_fn(*args, **kwargs)
            if not module.scope.has_variable("params", "road_theta"):
                return result
            used.add(module.path)
            cosines, sines = (module.scope.get_variable("params", name) for name in ROAD_LEAVES)
            if adapter_ids is not None:
                # [size, adapters] -> [batch, size]
                cosines, sines = (jnp.take(table, adapter_ids, axis=-1).T for table in (cosines, sines))
            shape, path = result.shape, dotted(module.path)
            flat = result.reshape(*shape[: len(shape) - axes], math.prod(shape[-axes:])) if axes > 1 else result
            variant, group_size = self.config.variant, self.config.group_size
            check_layer(path, cosines.shape[-1], flat.shape[-1], variant=variant, group_size=group_size)
            first, second = blocks(cosines, sines, variant=variant, group_size=group_size)
            if adapter_ids is None:
                return rotate_blocks(flat, first, second).reshape(shape)
            if flat.ndim < 2 or len(flat) != len(adapter_ids):
                raise AdapterError(
                    f"{path}: expected an output with the {len(adapter_ids)} rows of adapter_ids first, "
                    f"found shape {list(shape)}"
                )
            return rotate_rows(flat, first, second).reshape(shape)

        params = flatten(overlay(variables["params"], adapter))
        for path in expected:
            theta, alpha = ((*path, name) for name in ROAD_LEAVES)
            # From here on the two names hold α cos θ and α sin θ, formed once for all layers of a stack.
            params[theta], params[alpha] = polar(params[theta], params[alpha])
        merged = {**to_dict(variables), "params": unflatten(params)}
        # The context stands inside whatever jits this call: a function that was first traced within it from outside
        # would stay adapted.
        with nn.intercept_methods(turn):
            result = self.model.apply(merged, *args, **kwargs)
        if unused := sorted(map(dotted, expected - used)):
            listed = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
            raise AdapterError(f"adapter: expected every module to be used by a layer, found unused {listed}")
        return result

    def merge(self, variables: Mapping[str, Any], adapter: Tree) -> dict[str, Any]:
        """Rotates kernels and biases themselves, so that the plain model gives what `apply` gave.

        Closed form, O(in · out) and in float32, rounded once to each kernel's dtype; no out × out matrix.

        Args:
            variables: the model's variables.
            adapter: as `init` gives it.

        Returns:
            Plain variables.

        Raises:
            AdapterError: a part of the adapter has no layer or another layer's shape.
        """
        return _merge.merge(variables, adapter, self.config)

    def unmerge(self, variables: Mapping[str, Any], adapter: Tree) -> dict[str, Any]:
        """Undoes `merge` by the inverse of each 2x2 block, in float32, rounded once.

        Args:
            variables: merged variables.
            adapter: the adapter that was merged.

        Returns:
            The base's variables, up to rounding in the kernels' dtype.

        Raises:
            AdapterError: a block is singular (not found under ``jit``), the adapter holds whole modules, or it has
                another layer's shape.
        """
        return _merge.merge(variables, adapter, self.config, invert=True)

    def _saved(self, base: Mapping[Path, Any]) -> dict[Path, Any]:
        wanted = self.config.modules_to_save or ()
        saved = {
            path: leaf
            for path, leaf in base.items()
            if any(dotted(path[:n]).endswith(name) for n in range(1, len(path)) for name in wanted)
        }
        for name in wanted:
            if not any(dotted(path[:n]).endswith(name) for path in saved for n in range(1, len(path))):
                raise AdapterError(f"RoadConfig.modules_to_save: expected modules of the params, found no {name!r}")
        return saved


def transform(model: nn.Module, config: RoadConfig) -> Road:
    """Makes the functions that train and run RoAd on a Linen model, in the style of Haiku and Optax.

    The model needs no change. ``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Einsum`` are covered, plain or under
    ``nn.scan``, ``nn.remat`` and ``nn.vmap``; a layer with several output axes (heads × head_dim) is rotated over its
    flattened output.

    Args:
        model: a Linen module.
        config: which layers, and how. ``target_modules`` are matched against module paths joined by dots; a scanned
            stack's axis has no name in them.

    Returns:
        `Road`: ``init``, ``apply``, ``merge`` and ``unmerge``.

    Example:
        >>> import jax, jax.numpy as jnp, road_jax
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32)))
        >>> road = road_jax.transform(model, road_jax.RoadConfig(target_modules=["layers_0"]))
        >>> adapter = road.init(jax.random.key(1), variables, jnp.ones((1, 32)))
        >>> jax.tree.map(jnp.shape, adapter)
        {'layers_0': {'road_alpha': (64,), 'road_theta': (64,)}}
        >>> bool((road.apply(variables, adapter, jnp.ones((1, 32))) == model.apply(variables, jnp.ones((1, 32)))).all())
        True
    """
    return Road(model, config)


def _output_axes(context: nn.module.InterceptorContext) -> int | None:
    """How many trailing axes of the result are the layer's outputs; None for what isn't a linear layer's call."""
    module = context.module
    if context.method_name != "__call__":
        return None
    if isinstance(module, nn.Dense):
        return 1
    if isinstance(module, nn.DenseGeneral):
        return None if module.batch_dims else len(_as_tuple(module.features))
    if isinstance(module, nn.Einsum):
        outputs = einsum_outputs(module.einsum_str or "")
        return len(outputs) if outputs else None
    return None


def einsum_outputs(einsum_str: str) -> str | None:
    """Returns the axes of an einsum layer's result that come from its kernel, where they trail; else None."""
    x, kernel, result = einsum_str.replace("->", ",").replace(" ", "").split(",")
    outputs = "".join(axis for axis in result if axis in kernel and axis not in x)
    return outputs if outputs and result.endswith(outputs) else None


def _as_tuple(features: int | Collection[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def trace(function: Callable, rng: jax.Array, args: Any, kwargs: Any) -> Any:
    """Like ``jax.eval_shape``, with inputs that aren't arrays (flags, names) left as they are."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]

    def call(rng: jax.Array, arrays: list) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            tree, [next(rest) if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
        )
        return function(rng, args, kwargs)

    return jax.eval_shape(call, rng, arrays)


def _fill(start: float, rng: jax.Array, path: str, shape: tuple[int, ...], init_weights: bool) -> jax.Array:
    if init_weights:
        return jnp.full(shape, start, jnp.float32)
    # The path, not the order of layers, decides the values.
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    return start + 0.5 * jax.random.normal(key, shape, jnp.float32)


_FILL = {"road_theta": functools.partial(_fill, 0.0), "road_alpha": functools.partial(_fill, 1.0)}
