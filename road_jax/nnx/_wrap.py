"""`wrap`: rotates the outputs of the linear layers of an NNX model."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib

from road_core import (
    AdapterError,
    RoadConfig,
    check_group_size,
    parameter_size,
    select_modules,
    subspace_blocks,
)
from road_core._errors import expect
from road_jax import _merge
from road_jax._layout import Layout, Layouts, along, einsum_layout, trailing
from road_jax._rotate import polar, rotate_polar
from road_jax._stack import as_ids, check_ids, of_rows
from road_jax._transform import OUTPUT_HEADS
from road_jax._tree import ROAD_LEAVES, Tree, adapted_paths, dotted, flatten, unflatten


class RoadParam(nnx.Variable):
    """θ or α, the variables that are trained.

    Not an ``nnx.Param``, so that a filter for ``nnx.Param`` selects the base alone and one for ``RoadParam`` the
    adapter alone: ``nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RoadParam))`` and
    ``nnx.Optimizer(model, tx, wrt=RoadParam)``.
    """


class SavedParam(RoadParam):
    """A param of ``config.modules_to_save``, trained whole beside θ and α."""


class CallInput(RoadParam):
    """An input for the rows of one call, laid beside θ so that every transform of the model passes it on.

    It is a `RoadParam` with θ's stack axes, so that it goes wherever a model's scan takes θ.
    """


@contextlib.contextmanager
def during_call(inputs: Sequence[tuple[nnx.Module, dict[str, Any]]]) -> Iterator[None]:
    """Sets attributes of modules during a call; before and after it they are None.

    Raises:
        AdapterError: they are set by another call, which only a second thread can do.
    """
    if any(vars(module)[name] is not None for module, values in inputs for name in values):
        raise AdapterError("model: expected one call at a time outside of nnx.jit, found another one under way")
    # Bypasses nnx's setattr, which refuses a model from outside of the function being traced.
    try:
        for module, values in inputs:
            vars(module).update(values)
        yield
    finally:
        for module, values in inputs:
            vars(module).update(dict.fromkeys(values))


class Around(nnx.Module):
    """Takes a module's place and has its attributes too: a model may ask its layer for in_features.

    Attributes that a subclass sets before ``base`` are its own; others that the base has are set and deleted there.
    """

    base: nnx.Module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_of_base(name):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_base(name):
            delattr(self.base, name)
        else:
            super().__delattr__(name)

    def _is_of_base(self, name: str) -> bool:
        own = vars(self)
        return "base" in own and name not in own and not name.startswith("_") and hasattr(self.base, name)


class Rotated(Around):
    """A layer or block to which `apply` passes the rows' ids."""

    @property
    def lead(self) -> tuple[int, ...]:
        """The stack axes of θ in the model."""
        raise NotImplementedError


class RoadLayer(Rotated):
    """A linear layer whose output is rotated; made by `wrap`.

    Attributes:
        base: the layer, which keeps its own Variables.
        road_theta: float32 ``[*stack, parameter_size]``.
        road_alpha: of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides the layer's outputs.
        layout: which axes of the base's result, kernel and bias are outputs.
        subspace: which of the layer's blocks are rotated and trained; None means all.
        merged: True while the rotation is merged into the base's kernel; see `merge`.
        road_ids: the adapter of each row, while `apply` calls the model.
    """

    def __init__(
        self,
        base: nnx.Module,
        theta: jax.Array,
        alpha: jax.Array,
        *,
        variant: str,
        group_size: int,
        layout: Layout,
        subspace: tuple[float, float] | None = None,
    ) -> None:
        self.road_theta = RoadParam(theta)
        self.road_alpha = RoadParam(alpha)
        self.variant = variant
        self.group_size = group_size
        self.layout = layout
        self.subspace = subspace
        self.merged = False
        self.road_ids = nnx.data(None)
        self.base = base

    @property
    def lead(self) -> tuple[int, ...]:
        return _one_shape(self)[:-1]

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Calls the base and rotates its output, flattened over its output axes; keeps its dtype."""
        y = self.base(*args, **kwargs)
        return y if self.merged else along(y, self.layout.result, self._rotate)

    def _rotate(self, y: jax.Array) -> jax.Array:
        theta, alpha = self.road_theta[...], self.road_alpha[...]
        return rotate(y, theta, alpha, self.road_ids, self.variant, self.group_size, self.subspace)


def rotate(
    y: jax.Array,
    theta: jax.Array,
    alpha: jax.Array,
    row_ids: CallInput | None,
    variant: str,
    group_size: int,
    subspace: tuple[float, float] | None,
) -> jax.Array:
    """Rotates ``[..., out]`` by θ and α ``[size]``, or ``[size, adapters]`` chosen by the rows' ids."""
    size = parameter_size(variant, y.shape[-1])
    axes = 1 if row_ids is None else 2
    if theta.ndim > axes and theta.shape[-axes] == size != theta.shape[0]:
        raise AdapterError(
            f"road_theta: expected one layer's of size {size}, found shape {list(theta.shape)} of a whole stack; "
            "StateAxes of the model's scan or vmap must name RoadParam beside nnx.Param (docs/jax.md)"
        )
    cosines, sines = polar(theta, alpha)
    ids = None if row_ids is None else row_ids[...]
    if ids is not None:
        if y.ndim < 2 or y.shape[0] != ids.shape[0] or cosines.ndim != 2:
            raise AdapterError(
                f"adapter_ids: expected several adapters (set_adapter of stack_adapters) and outputs with the "
                f"{ids.shape[0]} rows first, found theta {list(theta.shape)} and outputs {list(y.shape)}"
            )
        # [size, adapters] -> [batch, size]
        cosines, sines = of_rows(cosines, ids, 1).T, of_rows(sines, ids, 0).T
    elif cosines.ndim != 1:
        raise AdapterError(
            f"road_theta: expected one axis where the layer is called without adapter_ids, "
            f"found shape {list(theta.shape)}"
        )
    return rotate_polar(
        y,
        cosines,
        sines,
        path="nnx",
        variant=variant,
        group_size=group_size,
        subspace=subspace,
        by_row=ids is not None,
    )


def wrap(model: nnx.Module, config: RoadConfig, *, rngs: nnx.Rngs | None = None, layers: Layouts | None = None) -> Any:
    """Returns a model whose targeted layers are rotated; the given model isn't changed.

    The two share the base's Variables, except for those of ``config.modules_to_save``: of these the new model gets
    copies, which are trained whole (`SavedParam`). A layer that is used in several places stays one layer. Layers built
    by ``nnx.vmap`` (a leading axis on their kernels) get θ and α with the same leading axes.

    Args:
        model: any NNX module that contains ``nnx.Linear``, ``nnx.LinearGeneral`` or ``nnx.Einsum``.
        config: which of these layers are rotated, and how; paths are attribute names and list indices joined by dots.
        rngs: needed if ``config.init_weights`` is False.
        layers: for layer types that aren't Flax's: maps a type to a function that gets the layer and returns its
            `road_jax.Layout`; e.g. ``{Einsum: lambda layer: einsum_layout(layer.einsum_str, kernel="w")}``. Takes
            precedence over Flax's own types, and is also needed for a subclass of one whose ``__call__`` isn't its
            parent's.

    Raises:
        AdapterError: no layer matches, a match isn't a linear layer or is in ``nnx.WeightNorm`` or
            ``nnx.SpectralNorm``, the group size doesn't divide its outputs, the model is adapted already or isn't an
            NNX module, or the config isn't a `RoadConfig`.

    Example:
        >>> from flax import nnx
        >>> import road_jax
        >>> model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
        >>> adapted = road_jax.nnx.wrap(model, road_jax.RoadConfig(target_modules=["layers.0"]))
        >>> nnx.state(adapted, road_jax.nnx.RoadParam)["layers"][0]["road_theta"].shape
        (32,)
    """
    if not isinstance(model, nnx.Pytree | dict | list):
        raise AdapterError(
            f"model: expected an NNX module (for Linen: road_jax.transform), found {type(model).__name__}"
        )
    expect("config", config, RoadConfig)
    if rngs is not None:
        expect("rngs", rngs, nnx.Rngs)
    for path, node in nodes_of(model):
        if isinstance(node, Around):
            raise AdapterError(
                f"wrap: expected a model that isn't adapted, found {type(node).__name__} at "
                f"{dotted(path) or 'its top'} (unwrap first; wrap before intervene)"
            )
    modules = dict(modules_of(model))
    if isinstance(model, nnx.Module) and _layout(model, layers or {}) is not None:
        # The model itself is a linear layer; its name is empty.
        modules[""] = model
    known = {name: layout for name, node in modules.items() if (layout := _layout(node, layers or {})) is not None}
    linear = list(known)
    chosen = select_modules(
        config,
        list(modules),
        # An odd number of outputs has no pairs.
        linear=[name for name in linear if _outputs(modules[name], known[name]) % 2 == 0],
        output_head=[name for name in linear if name.rpartition(".")[2] in OUTPUT_HEADS],
        model_type=getattr(getattr(model, "config", None), "model_type", None),
    )
    for name in chosen:
        if name not in known:
            raise AdapterError(
                f"{name}: expected nnx.Linear, nnx.LinearGeneral or nnx.Einsum, or a type that wrap's layers declare, "
                f"found {type(modules[name]).__name__}"
            )
    refuse_tuples(model, {name: modules[name] for name in chosen})
    normed = _normed(model)
    for name in chosen:
        if (norm := normed.get(id(modules[name]))) is not None:
            raise AdapterError(
                f"{name}: expected a layer in no norm of its params, found one in {norm}, which looks them up by their "
                "paths (exclude_modules leaves the layer out)"
            )
    if not config.init_weights and rngs is None:
        raise AdapterError("wrap: expected rngs beside init_weights=False, found none")
    key = None if config.init_weights or rngs is None else rngs.params()
    # A layer in two places has two names and is visited by one of them; the first that is chosen is its own.
    first = {id(modules[name]): name for name in reversed(chosen)}
    names = {name: first[id(node)] for name, node in modules.items() if id(node) in first}
    saved = _saved(modules, config)
    # nnx.SpectralNorm skips whatever isn't an nnx.Param.
    if any(normed.get(variable) == "nnx.SpectralNorm" for variable in saved):
        raise AdapterError(
            f"RoadConfig.modules_to_save: expected modules without nnx.SpectralNorm, found {config.modules_to_save} "
            "with params in one"
        )

    def adapt(path: tuple, node: Any) -> Any:
        _replace_params(node, lambda variable: saved.get(id(variable), variable))
        name = ".".join(map(str, path))
        if name not in names or not isinstance(node, nnx.Module):
            return node
        return _adapted(node, names[name], known[names[name]], config, key)

    return nnx.recursive_map(adapt, model)


def unwrap(model: nnx.Module) -> Any:
    """Returns the model without the rotation: the layers that `wrap` was given, merged if they are.

    What `intervene` put around blocks is removed too.

    Modules that were trained whole (``config.modules_to_save``) keep their trained values.
    """

    def strip(_: tuple, node: Any) -> Any:
        _replace_params(node, lambda v: nnx.Param(v[...]) if isinstance(v, SavedParam) else v)
        return node.base if isinstance(node, Around) else node

    return nnx.recursive_map(strip, model)


def apply(model: nnx.Module, *args: Any, adapter_ids: jax.Array | None = None, **kwargs: Any) -> Any:
    """Calls a wrapped or intervened model that holds several adapters, each row of the batch with its own.

    Call it inside ``nnx.jit`` with the ids as an argument: any mix of ids runs the same program. During the call the
    ids are stored in the rotated layers, so that the model's own ``nnx.jit``, ``nnx.remat``, ``nnx.scan`` and stacks
    pass them on; an ``nnx.vmap`` over the batch itself doesn't.

    Args:
        model: as returned by `wrap`, with adapters from `road_jax.stack_adapters` put in by `set_adapter`; or as
            returned by `intervene`, with `set_intervention`.
        *args: the model's inputs.
        adapter_ids: int32 ``[batch]``, the adapter of each row, counted from 1; 0 means none.
        **kwargs: passed to the model.

    Returns:
        What the model returns.

    Raises:
        AdapterError: a layer's outputs don't have the batch's rows first, the model holds only one adapter, an id is
            above their number (under ``jit`` such a row gets the base's output instead), or another thread is calling
            the same model.
    """
    if adapter_ids is None:
        return model(*args, **kwargs)
    given = as_ids(adapter_ids)
    rotated = [node for _, node in nnx.iter_graph(model) if isinstance(node, Rotated)]
    if not rotated:
        raise AdapterError("adapter_ids: expected a model that wrap or intervene gave, found one without adapters")
    for node in rotated:
        # A single adapter is refused during the call.
        if len(several := node.road_theta.shape[len(node.lead) :]) == 2:
            check_ids(given, several[-1] - 1)
    ids = jnp.asarray(given)
    inputs = [(node, {"road_ids": CallInput(jnp.broadcast_to(ids, (*node.lead, *ids.shape)))}) for node in rotated]
    with during_call(inputs):
        return model(*args, **kwargs)


def get_adapter(model: nnx.Module) -> Tree:
    """Returns a wrapped model's adapter in the form that `road_jax.save_adapter` and `stack_adapters` take.

    Returns:
        A nested dict by attribute names and list indices, with ``road_theta`` and ``road_alpha`` for each rotated
        layer, and the params of modules that were trained whole.
    """
    return unflatten({path: variable[...] for path, variable in _trained(model).items()})


def set_adapter(model: nnx.Module, adapter: Tree) -> None:
    """Puts an adapter into a wrapped model, in place.

    Args:
        model: as returned by `wrap`.
        adapter: as returned by `get_adapter` or `road_jax.load_adapter`; or several of them from
            `road_jax.stack_adapters`, for `apply`.

    Raises:
        AdapterError: the two don't have the same modules or shapes, θ or α doesn't have a floating dtype, or the model
            is merged.
    """
    layers = _layers(model)
    _expect_unmerged(layers)
    held = _trained(model)
    # Read from a file, a name with a dot is split in two.
    paths = {dotted(path): path for path in held}
    given = {paths.get(dotted(path), path): leaf for path, leaf in flatten(adapter).items()}
    adapted_paths(adapter)
    lacking, spare = (sorted(map(dotted, a.keys() - b.keys())) for a, b in ((held, given), (given, held)))
    if lacking or spare:
        raise AdapterError(
            f"set_adapter: expected the model's modules, found no {', '.join(lacking[:3]) or '—'} "
            f"but {', '.join(spare[:3]) or 'nothing'} besides"
        )
    # Stacked adapters have one more axis, the last. The model may already hold some.
    for path, leaf in given.items():
        expected = _one_shape(layers[path[:-1]]) if path[-1] in ROAD_LEAVES else held[path].shape
        if leaf.shape != expected and (path[-1] not in ROAD_LEAVES or leaf.shape[:-1] != expected):
            raise AdapterError(f"{dotted(path)}: expected shape {list(expected)}, found {list(leaf.shape)}")
    for path, leaf in given.items():
        held[path].set_value(jnp.asarray(leaf))


def merge(model: nnx.Module) -> None:
    """Rotates the kernels and biases of a wrapped model themselves, in place, so that its layers need no rotation.

    In closed form, in float32, rounded once to each kernel's dtype. θ and α are kept for `unmerge`; `unwrap` then
    returns the plain merged model. Whatever shares the base's Variables, such as the model that was given to `wrap`, is
    merged too.

    Raises:
        AdapterError: the model is merged already or holds several adapters, a kernel is quantised, or a kernel or bias
            is also used elsewhere, where it would be rotated too. Nothing is changed then.
    """
    _merge_in_place(model, invert=False)


def unmerge(model: nnx.Module) -> None:
    """Undoes `merge` by the inverse of each 2x2 block, in place and up to rounding.

    Raises:
        AdapterError: the model isn't merged, or a block is singular. Nothing is changed then.
    """
    _merge_in_place(model, invert=True)


def _merge_in_place(model: nnx.Module, *, invert: bool) -> None:
    layers = _layers(model)
    if not invert:
        _expect_unmerged(layers)
    users: dict[int, list[str]] = {}
    for path, node in nodes_of(model):
        for variable in vars(node).values() if isinstance(node, nnx.Module) else ():
            if isinstance(variable, nnx.Variable):
                users.setdefault(id(variable), []).append(dotted(path) or "the model")
    for path, layer in layers.items():
        theta, alpha = layer.road_theta[...], layer.road_alpha[...]
        if invert and not layer.merged:
            raise AdapterError(f"{dotted(path)}: expected a merged layer, found one that isn't")
        if theta.shape != _one_shape(layer):
            raise AdapterError(f"{dotted(path)}: expected one adapter to merge, found theta {list(theta.shape)}")
        for variable in (variable for variable, _ in _arrays(layer)):
            value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
            if not isinstance(variable, nnx.Variable) or not isinstance(value, jax.Array | np.ndarray):
                raise AdapterError(
                    f"{dotted(path)}: expected a plain {layer.layout.kernel} to merge into, "
                    f"found {type(value).__name__}"
                )
            if len(others := users[id(variable)]) > 1:
                raise AdapterError(
                    f"{dotted(path)}: expected params of its own to merge into, found {others} share one"
                )
        if invert:
            _merge.check_invertible(dotted(path), theta, alpha, _config(layer), _stack(theta))
    for path, layer in layers.items():
        theta, alpha = layer.road_theta[...], layer.road_alpha[...]
        for variable, axes in _arrays(layer):
            rotated = _merge.rotate_outputs(
                dotted(path), variable[...], theta, alpha, _config(layer), axes, _stack(theta), invert=invert
            )
            variable.set_value(rotated)
        layer.merged = not invert


def _expect_unmerged(layers: dict[tuple[str, ...], RoadLayer]) -> None:
    if merged := [dotted(path) for path, layer in layers.items() if layer.merged]:
        raise AdapterError(f"{merged[0]}: expected a layer that isn't merged, found a merged one (unmerge first)")


def _config(layer: RoadLayer) -> RoadConfig:
    return RoadConfig(variant=layer.variant, group_size=layer.group_size, subspace=layer.subspace)


def _stack(theta: jax.Array) -> list[tuple[int, int]]:
    """Returns a stack's axes, which come first in every array."""
    return [(axis, axis) for axis in range(theta.ndim - 1)]


def _arrays(layer: RoadLayer) -> list[tuple[nnx.Variable, tuple[int, ...]]]:
    """Returns a layer's kernel and bias, each with the axes that are its outputs."""
    layout = layer.layout
    bias = getattr(layer.base, layout.bias, None)
    arrays = [(getattr(layer.base, layout.kernel), layout.kernel_axes)]
    return [*arrays, (bias, layout.bias_axes)] if isinstance(bias, nnx.Variable) else arrays


def _one_shape(layer: RoadLayer) -> tuple[int, ...]:
    """Returns the shape of one adapter's θ."""
    kernel = getattr(layer.base, layer.layout.kernel)
    out = math.prod(kernel.shape[axis] for axis in layer.layout.kernel_axes)
    return (*kernel.shape[: len(kernel.shape) - layer.layout.ndim], parameter_size(layer.variant, out))


def _layers(model: nnx.Module) -> dict[tuple[str, ...], RoadLayer]:
    """Returns a wrapped model's rotated layers, each by its first name."""
    found = {path: node for path, node in nodes_of(model) if isinstance(node, RoadLayer)}
    if not found:
        raise AdapterError("model: expected layers that wrap has adapted, found none")
    return found


def _trained(model: nnx.Module) -> dict[tuple[str, ...], nnx.Variable]:
    """Returns θ, α and saved params by their paths, each once."""
    found: dict[tuple[str, ...], nnx.Variable] = {}
    for path, layer in _layers(model).items():
        found |= {(*path, name): getattr(layer, name) for name in ROAD_LEAVES}
    return found | {path: node for path, node in nodes_of(model) if isinstance(node, SavedParam)}


def _saved(modules: dict[str, nnx.Module], config: RoadConfig) -> dict[int, SavedParam]:
    """Returns copies of the params of ``modules_to_save``, by the ids of the originals."""
    copies: dict[int, SavedParam] = {}
    for wanted in config.modules_to_save or ():
        chosen = [module for name, module in modules.items() if name.endswith(wanted)]
        nodes = [node for module in chosen for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]
        params = [v for node in nodes for v in vars(node).values() if isinstance(v, nnx.Param)]
        if not params:
            raise AdapterError(f"RoadConfig.modules_to_save: expected modules with params, found no {wanted!r}")
        copies |= {id(v): SavedParam(jnp.copy(v[...])) for v in params if id(v) not in copies}
    return copies


def _replace_params(node: Any, function: Callable[[nnx.Variable], nnx.Variable]) -> None:
    """Replaces a module's own Variables, which ``nnx.recursive_map`` would overwrite instead."""
    for name, variable in list(vars(node).items()) if isinstance(node, nnx.Module) else ():
        if isinstance(variable, nnx.Variable) and (new := function(variable)) is not variable:
            setattr(node, name, new)


def _adapted(node: Any, name: str, layout: Layout, config: RoadConfig, key: jax.Array | None) -> RoadLayer:
    sizes = getattr(node, layout.kernel).shape
    if len(sizes) < layout.ndim:
        raise AdapterError(f"{name}: expected a {layout.kernel} of {layout.ndim} axes, found shape {list(sizes)}")
    out = _outputs(node, layout)
    declared = getattr(node, "out_features", out)
    stack, bias = sizes[: len(sizes) - layout.ndim], getattr(node, layout.bias, None)
    if (
        math.prod((declared,) if isinstance(declared, int) else declared) != out
        or (isinstance(node, nnx.Linear) and layout.kernel == "kernel" and sizes[-2] != node.in_features)
        or (isinstance(bias, nnx.Variable) and bias.shape[: len(stack)] != stack)
    ):
        raise AdapterError(f"{name}: expected stack axes first, found a {layout.kernel} of shape {list(sizes)}")
    check_group_size(out, config.group_size, name)
    subspace_blocks(out, config.subspace, name)
    shape = (*stack, parameter_size(config.variant, out))
    theta, alpha = jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)
    if key is not None:
        path_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        noise = 0.5 * jax.random.normal(path_key, (2, *shape), jnp.float32)
        theta, alpha = theta + noise[0], alpha + noise[1]
    return RoadLayer(
        node,
        theta,
        alpha,
        variant=config.variant,
        group_size=config.group_size,
        layout=layout,
        subspace=config.subspace,
    )


def _outputs(node: Any, layout: Layout) -> int:
    """Returns a layer's number of outputs; a kernel of too few axes has those that it has."""
    sizes = getattr(node, layout.kernel).shape
    return math.prod(sizes[axis] for axis in layout.kernel_axes if -axis <= len(sizes))


def _normed(model: nnx.Module) -> dict[int, str]:
    """Returns the names of norms that change their layers' kernels from outside, by the ids of all that is in them."""
    norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.WeightNorm | nnx.SpectralNorm)]
    return {id(node): f"nnx.{type(norm).__name__}" for norm in norms for _, node in nnx.iter_graph(norm.layer_instance)}


def _layout(node: nnx.Module, layers: Layouts) -> Layout | None:
    """Returns the layout of a linear layer's arrays, or None for other modules."""
    for known in (layers, _FLAX):
        for kind, layout in known.items():
            # What a subclass's own call does isn't known.
            if isinstance(node, kind) and type(node).__call__ is kind.__call__:
                return layout(node)
    return None


def _of_linear_general(layer: nnx.LinearGeneral) -> Layout:
    ins, outs = (1 if isinstance(n, int) else len(n) for n in (layer.in_features, layer.out_features))
    return trailing(outs, ins + outs + len(layer.batch_axis or {}))


_FLAX: Layouts = {
    nnx.Linear: lambda _: trailing(1, 2),
    nnx.LinearGeneral: _of_linear_general,
    nnx.Einsum: lambda layer: einsum_layout(layer.einsum_str),
}


def nodes_of(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every module and Variable once, by its first path in the model before `wrap` and `intervene`."""
    around = {path for path, node in nnx.iter_graph(model) if isinstance(node, Around)}
    for path, node in nnx.iter_graph(model):
        steps = (step for at, step in enumerate(path) if step != "base" or path[:at] not in around)
        yield tuple(map(str, steps)), node


def modules_of(model: nnx.Module, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every module below a model by every name it has there."""
    # nnx.iter_children leaves out what is in plain lists, tuples and dicts.
    for name, child in graphlib.get_node_impl(model).node_dict(model).items():
        if id(child) in above or isinstance(child, nnx.Variable) or not graphlib.is_node(child):
            continue
        if isinstance(child, nnx.Module):
            yield f"{path}{name}", child
        yield from modules_of(child, f"{path}{name}.", (*above, id(child)))


def refuse_tuples(model: nnx.Module, chosen: Mapping[str, nnx.Module]) -> None:
    """Refuses modules, by their names, whose place can't be taken by another.

    Raises:
        AdapterError: one is an element of a tuple.
    """
    fixed = {id(child) for _, node in nnx.iter_graph(model) if isinstance(node, tuple) for child in node}
    for name, node in chosen.items():
        if id(node) in fixed:
            raise AdapterError(f"{name}: expected a module in an attribute, a list or a dict, found one in a tuple")
