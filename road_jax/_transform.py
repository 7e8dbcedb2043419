"""`transform`: RoAd on any Linen model, without changing the model."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, Scope, init

from road_core import AdapterError, RoadConfig, check_group_size, parameter_size, select_modules, subspace_blocks
from road_core._errors import expect, listed
from road_jax import _merge, _quantize, _sharding
from road_jax._layout import Layout, Layouts, Place, along, einsum_layout, mark_axes, marked_axes, trailing
from road_jax._rotate import polar, rotate_polar
from road_jax._stack import as_ids, check_ids, of_rows
from road_jax._tree import (
    ROAD_LEAVES,
    Path,
    Tree,
    adapted_paths,
    as_params,
    dotted,
    flatten,
    overlay,
    params_of,
    to_dict,
    unbox,
    under,
    unflatten,
)

# The usual names of the layer that "all-linear" leaves out. PEFT asks the model for it; a Linen module can't be asked.
OUTPUT_HEADS = ("lm_head", "output_head", "embed_out", "logits_dense", "classifier", "score")

# `nn.jit` caches traces by the structure of its arguments alone, regardless of the module and of interceptors. So it
# must never see the same structure twice: leaves that are laid over params get new names in each call, and where there
# are no params yet, each call is traced in a new context, which is part of jit's cache key.
_numbers = itertools.count()
_context = jax.make_user_context()


@contextlib.contextmanager
def traced_anew() -> Iterator[Callable[[nn.Module], None]]:
    """Prevents the reuse of earlier traces; yields a function that does the same from within a jitted module."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_context(next(_numbers)))

        def forget(module: nn.Module) -> None:
            # Only the module inside is intercepted, not the jitted call itself, so the new context must outlast its
            # call.
            if module.scope is not None and any("jit(" in name for name in module.scope.debug_path):
                stack.enter_context(_context(next(_numbers)))

        yield forget


def new_names(*names: str) -> tuple[str, ...]:
    """Returns the names with a number appended that was never used before."""
    number = next(_numbers)
    return tuple(f"{name}_{number}" for name in names)


def without(result: Any, names: Collection[str], mutable: Any) -> Any:
    """Returns the result of a model's ``apply``, with the given names removed from the params that it may contain."""
    if mutable is False or "params" not in result[1]:
        return result
    params = {path: leaf for path, leaf in flatten(result[1]["params"]).items() if path[-1] not in names}
    return result[0], {**result[1], "params": unflatten(params)}


class Functions:
    """What `transform` and `intervene` make of a model. It has ``init`` and ``apply`` too, but is no model."""


@dataclasses.dataclass(frozen=True)
class Road(Functions):
    """A pair of pure functions, `init` and `apply`, with `merge` and `unmerge`; made by `transform`.

    Attributes:
        model: the Linen module, unchanged.
        config: which layers are rotated, and how.
        layers: layer types that aren't Flax's; see `transform`.
    """

    model: nn.Module
    config: RoadConfig
    layers: Layouts = dataclasses.field(default_factory=dict, hash=False)
    # What init and apply learn about each linear layer while they are traced; used by merge and shardings.
    _seen: dict[Path, Place] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def init(
        self, rng: jax.Array | Mapping[str, jax.Array], variables: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tree:
        """Returns a fresh adapter; the model is only traced for its shapes, never run.

        Args:
            rng: a key, or keys by name as Flax takes them, of which only ``params`` is used; it has no effect unless
                ``config.init_weights`` is False.
            variables: the model's variables, ``{"params": …}``.
            *args: sample inputs of the model; only their shapes and dtypes matter.
            **kwargs: further sample inputs. ``rngs`` and ``mutable`` are accepted, as in `apply`, but ignored.

        Returns:
            A nested dict that mirrors ``params``: float32 ``road_theta`` and ``road_alpha`` in place of a targeted
            layer's ``kernel`` (in a stack, with the stack axis where the layer's own params have it), and copies of the
            params of ``config.modules_to_save``.

        Raises:
            AdapterError: no layer matches, a match isn't a linear layer, the group size doesn't divide a layer's
                outputs, two layers share one scope, or ``variables`` aren't the model's.
        """
        if isinstance(rng, Mapping):
            if "params" not in rng:
                raise AdapterError(
                    f"rng: expected a key for 'params', found keys for {listed(sorted(rng)) or 'nothing'}"
                )
            rng = rng["params"]
        places: dict[Path, Place] = {}
        # Every module's name and type.
        names: dict[str, str] = {}
        mixed: dict[str, str] = {}
        normed = 0
        mark = next(_numbers) if isinstance(self.model, nn.Module) else None

        def declare(
            forget: Callable, next_fn: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            nonlocal normed
            module = context.module
            if not _is_marked(module, mark):
                return next_fn(*args, **kwargs)
            if module.scope is not None and module.path:
                names[dotted(module.path)] = type(module).__name__
            forget(module)
            is_norm = isinstance(module, nn.WeightNorm | nn.SpectralNorm)
            normed += is_norm
            try:
                result = next_fn(*args, **kwargs)
            finally:
                normed -= is_norm
            layout = _layout(context, self.layers, args, kwargs)
            # A model may call a layer on arrays of its own choice (`layer.apply`), as tied heads do: not the layer's
            # params.
            if layout is not None and module.scope.is_mutable_collection("params"):
                sizes = tuple(result.shape[axis] for axis in layout.result)
                # A norm can't compute with codes.
                dense = isinstance(module, nn.Dense) and not normed
                first = places.setdefault(module.path, Place(layout, sizes, dense=dense)).layout
                if (first.kernel, first.kernel_axes) != (layout.kernel, layout.kernel_axes):
                    mixed[dotted(module.path)] = " and ".join(
                        f"{one.kernel} with outputs at {list(one.kernel_axes)}" for one in (first, layout)
                    )
                    return result
                size = parameter_size(self.config.variant, math.prod(sizes))
                for leaf, fill in (("road_theta", jnp.zeros), ("road_alpha", jnp.ones)):
                    module.scope.param(leaf, lambda _, fill=fill: fill((size,), jnp.float32))
                mark_axes(module.scope, layout)
            return result

        def shapes(rng: jax.Array, args: Any, kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("rngs", "mutable")}
            with traced_anew() as forget, nn.intercept_methods(functools.partial(declare, forget)):
                return _init_marked(self.model, mark, rng, args, kwargs)

        traced = trace(shapes, rng, args, kwargs)
        declared = flatten(unbox(traced["params"]))
        leaves = {path: leaf for path, leaf in declared.items() if path[-1] in _FILL}
        base = flatten(unbox(params_of(variables)))
        paths = {dotted(path[:-1]): path[:-1] for path in leaves}
        linear = list(paths)
        try:
            chosen = select_modules(
                self.config,
                list(dict.fromkeys([*names, *linear])),
                # An odd number of outputs has no pairs.
                linear=[name for name in linear if math.prod(places[paths[name]].sizes) % 2 == 0],
                output_head=[name for name in linear if name.rpartition(".")[2] in OUTPUT_HEADS],
                model_type=getattr(getattr(self.model, "config", None), "model_type", None),
            )
        except AdapterError:
            stacks = [dotted(path[:-1]) for path, leaf in leaves.items() if leaf.ndim > 1]
            if self.config.layers_to_transform is None or not stacks:
                raise
            raise AdapterError(
                f"RoadConfig.layers_to_transform: expected layers with their index in their names, found {stacks[0]}, "
                "a stack, of which none can be chosen alone"
            ) from None
        for name in chosen:
            if name not in linear:
                raise AdapterError(
                    f"{name}: expected a Dense, DenseGeneral (without batch_dims) or Einsum layer, or a type that "
                    f"transform's layers declare, found {names[name]}"
                )
            if name in mixed:
                raise AdapterError(f"{name}: expected one kernel that is always used alike, found {mixed[name]}")
            # A name may contain dots, so it can't be split into a path.
            path = paths[name]
            out, kernel = math.prod(places[path].sizes), places[path].layout.kernel
            check_group_size(out, self.config.group_size, name)
            subspace_blocks(out, self.config.subspace, name)
            if (*path, kernel) not in base:
                raise AdapterError(f"{name}: expected a {kernel} in variables['params'], found none")
        for path, place in places.items():
            self._seen[path] = dataclasses.replace(place, marks=marked_axes(declared, path, place.layout))
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

        A pure function that can be used under ``jit``, ``grad``, ``vmap`` and ``pmap``. A gradient with respect to
        ``adapter`` alone computes no gradient of a kernel.

        Args:
            variables: the model's variables; kernels may be quantised by `road_jax.quantize`.
            adapter: one adapter, as returned by `init`, or several, as returned by `road_jax.stack_adapters`.
            *args: the model's inputs.
            adapter_ids: for several adapters: int32 ``[batch]``, the adapter of each row, counted from 1; 0 means none.
                Any mix of ids runs the same program.
            **kwargs: passed to ``model.apply``.

        Returns:
            What ``model.apply`` returns; every rotated output keeps its dtype.

        Raises:
            AdapterError: a part of the adapter has no layer, is used by no layer, or doesn't have the shape for its
                layer or stack; or ``adapter_ids`` are given without stacked adapters or contain an id above their
                number (under ``jit`` such a row gets the base's output instead), or a layer's output doesn't have the
                batch's rows first.
        """
        adapter_ids = None if adapter_ids is None else as_ids(adapter_ids)
        adapter = as_params(adapter, params_of(variables))
        laid = {path: new_names(*ROAD_LEAVES) for path in adapted_paths(adapter)}
        used: set[Path] = set()

        def turn(next_fn: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            layout = _layout(context, self.layers, args, kwargs)
            if layout is None:
                with _quantize.explained(module):
                    return next_fn(*args, **kwargs)
            kernel = module.scope.get_variable("params", layout.kernel)
            if isinstance(kernel, _quantize.QuantizedKernel):
                kernel, bias = unbox((kernel, module.scope.get_variable("params", "bias")))
                result = _quantize.dense(module, kernel, bias, *args, **kwargs)
            else:
                result = next_fn(*args, **kwargs)
            leaves = laid.get(module.path)
            if leaves is None or not module.scope.has_variable("params", leaves[0]):
                return result
            used.add(module.path)
            sizes = tuple(result.shape[axis] for axis in layout.result)
            self._seen.setdefault(module.path, Place(layout, sizes))
            cosines, sines = (module.scope.get_variable("params", name) for name in leaves)
            if module.path in joined and cosines.ndim == 1:
                # [size · adapters] -> [size, adapters]
                cosines, sines = (leaf.reshape(-1, joined[module.path]) for leaf in (cosines, sines))
            if cosines.ndim != (1 if adapter_ids is None else 2):
                raise _AxesError(
                    f"{dotted(module.path)}.road_theta: expected [size, adapters] (stack_adapters) with adapter_ids, "
                    f"[size] without, found {list(cosines.shape)}"
                )
            if adapter_ids is not None:
                check_ids(adapter_ids, cosines.shape[-1] - 1)
                # [size, adapters] -> [batch, size]
                cosines, sines = of_rows(cosines, adapter_ids, 1).T, of_rows(sines, adapter_ids, 0).T

            def rotate(flat: jax.Array) -> jax.Array:
                path = dotted(module.path)
                if adapter_ids is not None and (flat.ndim < 2 or flat.shape[0] != adapter_ids.shape[0]):
                    raise AdapterError(
                        f"{path}: expected an output with the {adapter_ids.shape[0]} rows of adapter_ids first, "
                        f"found shape {list(result.shape)}"
                    )
                return rotate_polar(
                    flat,
                    cosines,
                    sines,
                    path=path,
                    variant=self.config.variant,
                    group_size=self.config.group_size,
                    subspace=self.config.subspace,
                    by_row=adapter_ids is not None,
                )

            return along(result, layout.result, rotate)

        params = flatten(overlay(params_of(variables), adapter))
        if adapter_ids is not None and not laid:
            check_ids(adapter_ids, 0)
        own = {} if adapter_ids is None else self._own_axes(variables, adapter, args, kwargs)
        joined: dict[Path, int] = {}
        for path, leaves in laid.items():
            # Computed once for all layers of a stack.
            turned = polar(*(params.pop((*path, name)) for name in ROAD_LEAVES))
            if path in own:
                joined[path] = turned[0].shape[-1]
                turned = _join_last(turned[0], own[path]), _join_last(turned[1], own[path])
            params.update(zip(((*path, name) for name in leaves), turned, strict=True))
        merged = {**to_dict(variables), "params": unflatten(params)}
        # The interceptor is entered inside of whatever jits this call. If it were entered outside, a function that is
        # first traced under it would stay adapted in jit's cache.
        try:
            with nn.intercept_methods(turn):
                result = self.model.apply(merged, *args, **kwargs)
        except Exception as error:
            # Flax's error about a stack's axes doesn't name the module.
            if laid and (isinstance(error, _AxesError) or not isinstance(error, AdapterError)):
                self._explain_stacks(variables, adapter, args, kwargs, error)
            raise
        if unused := sorted(map(dotted, laid.keys() - used)):
            raise AdapterError(f"adapter: expected every module to be used by a layer, found unused {listed(unused)}")
        return without(result, set(itertools.chain(*laid.values())), kwargs.get("mutable", False))

    def merge(self, variables: Mapping[str, Any], adapter: Tree, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Rotates the kernels and biases themselves, so that the plain model computes what `apply` computes.

        In closed form, O(in · out), without an out × out matrix; in float32, rounded once to each kernel's dtype.

        Args:
            variables: the model's variables.
            adapter: as returned by `init`.
            *args: sample inputs of the model, as for `init`. They are needed only if `init` wasn't called before, and
                then only if ``layers`` are declared or a kernel's shape doesn't show which axes are outputs and which
                belong to a stack. Without them, a kernel of two axes is taken as ``[in, out]``, and a kernel of more
                axes is accepted only if nothing but its last axes can be the outputs.
            **kwargs: further sample inputs.

        Returns:
            Plain variables, of the same structure.

        Raises:
            AdapterError: a part of the adapter has no layer or the wrong shape for it, or sample inputs are needed.
        """
        adapter = as_params(adapter, params_of(variables))
        return _merge.merge(variables, adapter, self.config, self._places(variables, adapter, args, kwargs))

    def unmerge(self, variables: Mapping[str, Any], adapter: Tree, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Undoes `merge` by the inverse of each 2x2 block, in float32, rounded once.

        Args:
            variables: merged variables.
            adapter: the adapter that was merged.
            *args: as for `merge`.
            **kwargs: as for `merge`.

        Returns:
            The base's variables, up to rounding in the kernels' dtype.

        Raises:
            AdapterError: a block is singular (not checked under ``jit``), the adapter contains whole modules, or it has
                the wrong shape for a layer.
        """
        adapter = as_params(adapter, params_of(variables))
        return _merge.merge(
            variables, adapter, self.config, self._places(variables, adapter, args, kwargs), invert=True
        )

    def quantize(
        self,
        variables: Mapping[str, Any],
        kind: _quantize.Kind,
        *args: Any,
        exclude: Collection[str] = ("lm_head",),
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantises the kernels of the model's ``nn.Dense`` layers and no others, as `road_jax.quantize` does.

        Layers in ``nn.WeightNorm`` and ``nn.SpectralNorm`` are left plain.

        Args:
            variables: the model's variables.
            kind: ``"nf4"`` or ``"int8"``.
            *args: sample inputs of the model, as for `init`; not needed after a call of `init`.
            exclude: modules whose kernels are left as they are, given by the ends of their dotted paths.
            **kwargs: further sample inputs.

        Returns:
            Variables with a `QuantizedKernel` for each such kernel; the kernels of other layers stay as they are.

        Raises:
            AdapterError: as for `road_jax.quantize`; or a stack's axes don't come first in a kernel.
        """
        self._places(variables, {}, args, kwargs)
        places = {path: place for path, place in self._seen.items() if place.marks is not None}
        if not places:
            raise AdapterError("quantize: expected sample inputs of the model, or Road.init before, found none")
        leaves = flatten(params_of(variables))
        stay = _quantize.excluded(leaves, exclude)
        paths = []
        for path, place in places.items():
            kernel = leaves.get((*path, place.layout.kernel))
            if not place.dense or isinstance(kernel, _quantize.QuantizedKernel):
                continue
            if (*path, place.layout.kernel) in stay:
                continue
            if kernel is None:
                raise AdapterError(
                    f"{dotted(path)}: expected a {place.layout.kernel} in variables['params'], found none"
                )
            stack = place.stack(place.layout.kernel)
            if stack != tuple(range(len(stack))):
                raise AdapterError(
                    f"{dotted(path)}: expected a stack's axes before the kernel's own to quantise it, found them at "
                    f"{list(stack)} (exclude leaves it as it is)"
                )
            paths.append((*path, place.layout.kernel))
        return _quantize.quantize_kernels(variables, kind, paths)

    def shardings(self, adapter: Tree, variables_shardings: Tree, *, allow_cut: bool = False) -> Tree:
        """Returns shardings for an adapter that follow its layers' kernels, wherever these have their outputs.

        Like `road_jax.shardings`, but with what `init` saw of the model: θ and α are sharded like the first output axis
        of their kernel; shards of a later output axis also cut groups.

        Args:
            adapter: as returned by `init` or `road_jax.stack_adapters`; shapes are enough.
            variables_shardings: as for `road_jax.shardings`.
            allow_cut: don't refuse shards that cut a group.

        Returns:
            A tree of shardings laid out like the adapter.

        Raises:
            AdapterError: as for `road_jax.shardings`; or `init` wasn't called before (``jax.eval_shape`` of it is
                enough).
        """
        adapter = as_params(adapter, params_of(variables_shardings, "variables_shardings"))
        known = {path: self._seen[path] for path in adapted_paths(adapter) if path in self._seen}
        for path in adapted_paths(adapter):
            if path not in known or known[path].marks is None:
                raise AdapterError(f"{dotted(path)}: expected a layer that Road.init has seen before, found none")
        return _sharding.along_kernels(adapter, variables_shardings, known, config=self.config, allow_cut=allow_cut)

    def _places(self, variables: Mapping[str, Any], adapter: Tree, args: Any, kwargs: Any) -> dict[Path, Place]:
        """Returns the known places of the adapter's layers; traces the model first if there are sample inputs."""
        paths = adapted_paths(adapter)
        if args or kwargs:
            jax.eval_shape(lambda: self.init(jax.random.key(0), variables, *args, **kwargs))
        unknown = [path for path in paths if path not in self._seen]
        if unknown and (args or kwargs):
            raise AdapterError(f"{dotted(unknown[0])}: expected a linear layer of the model, found none")
        if unknown and self.layers:
            raise AdapterError(
                f"{dotted(unknown[0])}: expected sample inputs, to find the kernel of a declared layer type, found none"
            )
        return {path: self._seen[path] for path in paths if path in self._seen}

    def _own_axes(self, variables: Mapping[str, Any], adapter: Tree, args: Any, kwargs: Any) -> dict[Path, int]:
        """Finds the layer's own axis in θ of several adapters, where the adapters' axis is to be joined to it.

        In stacks whose axis Flax counts from the end, it would mistake the adapters' axis for the stack's. Outside of
        stacks, ``nn.SpectralNorm`` would take θ with a second axis for a kernel.
        """
        leaves = flatten(adapter)
        axes = {path: unbox(leaves[*path, "road_theta"]).ndim for path in adapted_paths(adapter)}
        stacks = [path for path, ndim in axes.items() if ndim > 2]
        if any(path not in self._seen or self._seen[path].marks is None for path in stacks):
            # If these inputs can't be traced, calling the model will fail anyway, or it has no such stack.
            with contextlib.suppress(Exception):
                self._places(variables, adapter, args, kwargs)
        found = {
            path: 0
            for path, ndim in axes.items()
            if ndim == 2 and not ((place := self._seen.get(path)) and place.marks and place.stack("road_theta"))
        }
        for path in stacks:
            place = self._seen.get(path)
            if place is None or place.marks is None or axes[path] != len(place.marks["road_theta"]) + 1:
                continue
            # An axis that Flax counts from the start has the same index in both.
            if (stack := place.stack("road_theta")) != place.stack(place.layout.kernel):
                found[path] = next(axis for axis in range(axes[path]) if axis not in stack)
        return found

    def _explain_stacks(
        self, variables: Mapping[str, Any], adapter: Tree, args: Any, kwargs: Any, error: Exception
    ) -> None:
        """After a failed call, names a θ, of one adapter or several, without the stack axes of its kernel.

        Raises:
            AdapterError: there is such a θ.
        """
        # The model itself may fail on these inputs.
        with contextlib.suppress(Exception):
            self._places(variables, adapter, args, kwargs)
        leaves = flatten(overlay(params_of(variables), adapter))
        for path in adapted_paths(adapter):
            place = self._seen.get(path)
            if place is None or place.marks is None:
                continue
            name = place.layout.kernel
            kernel, theta = (unbox(leaves.get((*path, leaf))) for leaf in (name, "road_theta"))
            shape = getattr(kernel.codes if isinstance(kernel, _quantize.QuantizedKernel) else kernel, "shape", ())
            if len(shape) != len(place.marks[name]):
                continue
            stack = list(zip(place.stack(name), place.stack("road_theta"), strict=False))
            if theta.ndim - len(stack) in (1, 2) and all(shape[axis] == theta.shape[at] for axis, at in stack):
                continue
            raise AdapterError(
                f"{dotted(path)}.road_theta: expected the stack axes of the layer's {name} "
                f"{list(shape)}, found {list(theta.shape)}"
            ) from error

    def _saved(self, base: Mapping[Path, Any]) -> dict[Path, Any]:
        wanted = self.config.modules_to_save or ()
        saved = {path: leaf for path, leaf in base.items() if under(path, wanted)}
        for name in wanted:
            if not any(under(path, [name]) for path in saved):
                raise AdapterError(f"RoadConfig.modules_to_save: expected modules of the params, found no {name!r}")
        for path, leaf in saved.items():
            if isinstance(leaf, _quantize.QuantizedKernel):
                raise AdapterError(f"{dotted(path)}: expected plain params to train whole, found {leaf.kind} codes")
        # A training step may donate the adapter's buffers, so these must not be the base's.
        return {path: jnp.copy(leaf) for path, leaf in saved.items()}


class _AxesError(AdapterError):
    """θ has too many or too few axes where its layer is called."""


def transform(model: nn.Module, config: RoadConfig, *, layers: Layouts | None = None) -> Road:
    """Makes the functions that train and run RoAd on a Linen model, in the style of Haiku and Optax.

    The model needs no change. ``nn.Dense``, ``nn.DenseGeneral`` and ``nn.Einsum`` are covered, plain or under
    ``nn.scan``, ``nn.remat`` and ``nn.vmap``; a layer with several output axes (heads × head_dim) is rotated over its
    flattened output. In a subclass of these layers, the parent's result is rotated before the subclass uses it.

    Args:
        model: a Linen module.
        config: which layers are adapted, and how. ``target_modules`` are matched against module paths joined by dots;
            the axis of a scanned stack doesn't appear in them.
        layers: for layer types that aren't Flax's: maps a type to a function that gets the module and the arguments of
            its call and returns the call's `Layout`, or None if the call isn't a product with a kernel; e.g.
            ``{Einsum: lambda module, equation, x: einsum_layout(equation, kernel="w")}``.

    Returns:
        A `Road` with ``init``, ``apply``, ``merge`` and ``unmerge``.

    Raises:
        AdapterError: the model isn't a Linen module, or the config isn't a `RoadConfig`.

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
    check_linen(model, "road_jax.nnx.wrap")
    expect("config", config, RoadConfig)
    return Road(model, config, layers or {})


def check_linen(model: Any, for_nnx: str) -> None:
    """Refuses what isn't a Linen module; for modules of NNX the error names the function ``for_nnx`` instead.

    Raises:
        AdapterError: it isn't one.
    """
    called = callable(getattr(model, "init", None)) and hasattr(model, "apply")
    if isinstance(model, type | Functions) or not called:
        raise AdapterError(f"model: expected a Linen module (for NNX: {for_nnx}), found {type(model).__name__}")


_FLAG = "road_model"


def _init_marked(model: nn.Module, mark: int | None, rng: jax.Array, args: Any, kwargs: Any) -> Any:
    """Like ``model.init``, but tells the model's own modules from those of a model that it initialises within itself.

    The latter may have the same paths.
    """
    if mark is None:
        return model.init(rng, *args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "capture_intermediates"}
    method = kwargs.pop("method", None) or "__call__"

    def run(scope: Scope, *args: Any, **kwargs: Any) -> Any:
        own = model.clone(parent=scope, _deep_clone=True)
        if isinstance(method, str):
            return getattr(own, method)(*args, **kwargs)
        return getattr(method, "__func__", method)(own, *args, **kwargs)

    # Lifted transforms pass flags on to their scopes.
    return init(run, DenyList("intermediates"), flags={_FLAG: mark})(rng, *args, **kwargs)[1]


def _is_marked(module: nn.Module, mark: int | None) -> bool:
    return module.scope is None or module.scope.get_flag(_FLAG, None) == mark


def _join_last(array: jax.Array, axis: int) -> jax.Array:
    """Joins the last axis to another one, within which it varies fastest."""
    near = jnp.moveaxis(array, -1, axis + 1)
    return near.reshape(*near.shape[:axis], near.shape[axis] * near.shape[axis + 1], *near.shape[axis + 2 :])


def _layout(context: nn.module.InterceptorContext, layers: Layouts, args: Any, kwargs: Any) -> Layout | None:
    """Returns the layout of a linear layer's call, or None for any other call."""
    if context.method_name != "__call__":
        return None
    for known in (layers, _FLAX):
        for kind, layout in known.items():
            # A subclass that calls its parent is intercepted twice; only the parent's own method is the product.
            if isinstance(context.module, kind) and inspect.unwrap(context.orig_method.func) is inspect.unwrap(
                kind.__call__
            ):
                return layout(context.module, *args, **kwargs)
    return None


def _of_dense_general(module: nn.DenseGeneral, *_: Any, **__: Any) -> Layout | None:
    outputs = len(_as_tuple(module.features))
    return None if module.batch_dims else trailing(outputs, outputs + len(_as_tuple(module.axis)))


def _of_einsum(module: nn.Einsum, inputs: Any = None, einsum_str: str | None = None) -> Layout | None:
    return einsum_layout(einsum_str or module.einsum_str or "")


_FLAX: Layouts = {
    nn.Dense: lambda *_, **__: trailing(1, 2),
    nn.DenseGeneral: _of_dense_general,
    nn.Einsum: _of_einsum,
}


def _as_tuple(features: int | Collection[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def is_array(leaf: Any) -> bool:
    """True for a leaf that is traced as an array, because it has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def trace(function: Callable, rng: jax.Array | None, args: Any, kwargs: Any) -> Any:
    """Like ``jax.eval_shape``, but leaves inputs that aren't arrays (flags, names) as they are."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [is_array(leaf) for leaf in leaves]
    arrays = [leaf for leaf, yes in zip(leaves, traced, strict=True) if yes]

    def call(rng: jax.Array | None, arrays: list) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            tree, [next(rest) if yes else leaf for leaf, yes in zip(leaves, traced, strict=True)]
        )
        return function(rng, args, kwargs)

    return jax.eval_shape(call, rng, arrays)


def _fill(start: float, rng: jax.Array, path: str, shape: tuple[int, ...], init_weights: bool) -> jax.Array:
    if init_weights:
        return jnp.full(shape, start, jnp.float32)
    # The values depend on the layer's path, not on the order of layers.
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    return start + 0.5 * jax.random.normal(key, shape, jnp.float32)


_FILL = {"road_theta": functools.partial(_fill, 0.0), "road_alpha": functools.partial(_fill, 1.0)}
