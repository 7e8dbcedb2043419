"""RoAd on Flax NNX models: `wrap` puts the rotation on their linear layers."""

import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from road_core import AdapterError, RoadConfig, check_group_size, parameter_size, select_modules, subspace_blocks
from road_jax._rotate import coefficients, rotate_blocks
from road_jax._transform import OUTPUT_HEADS, einsum_outputs

_COVERED = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


class RoadParam(nnx.Variable):
    """θ or α: what is trained.

    No ``nnx.Param``, so that a filter for ``nnx.Param`` means the base alone and one for ``RoadParam`` the adapter
    alone: ``nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RoadParam))`` and
    ``nnx.Optimizer(model, tx, wrt=RoadParam)``.
    """


class RoadLayer(nnx.Module):
    """A linear layer whose output is rotated; made by `wrap`.

    Attributes:
        base: the layer, which keeps its own Variables.
        road_theta: float32 ``[*stack, parameter_size]``.
        road_alpha: of the same shape.
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``.
        group_size: even; divides the layer's outputs.
        subspace: which of the layer's blocks are rotated and trained; None is all of them.
    """

    def __init__(
        self,
        base: nnx.Module,
        theta: jax.Array,
        alpha: jax.Array,
        *,
        variant: str,
        group_size: int,
        subspace: tuple[float, float] | None = None,
    ) -> None:
        self.base = base
        self.road_theta = RoadParam(theta)
        self.road_alpha = RoadParam(alpha)
        self.variant = variant
        self.group_size = group_size
        self.subspace = subspace

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Calls the base and rotates its output, flattened over its output axes; the dtype stays."""
        y = self.base(*args, **kwargs)
        out = math.prod(y.shape[-_output_axes(self.base) :])
        first, second = coefficients(
            self.road_theta[...],
            self.road_alpha[...],
            variant=self.variant,
            group_size=self.group_size,
            subspace=self.subspace,
        )
        return rotate_blocks(y.reshape(*y.shape[: y.ndim - _output_axes(self.base)], out), first, second).reshape(
            y.shape
        )

    def __getattr__(self, name: str) -> Any:
        # A model may ask its layer for in_features, dtype and the like.
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


def wrap(model: nnx.Module, config: RoadConfig, *, rngs: nnx.Rngs | None = None) -> Any:
    """Returns a model whose targeted layers are rotated; the given one stays as it is.

    The two share the base's Variables. Layers that stand in several places stay one layer. Layers built by
    ``nnx.vmap`` (a leading axis on their kernels) get θ and α with the same leading axes.

    Args:
        model: any NNX module with ``nnx.Linear``, ``nnx.LinearGeneral`` or ``nnx.Einsum`` in it.
        config: which of them; paths are attribute names and list indices joined by dots.
        rngs: needed where ``config.init_weights`` is False.

    Raises:
        AdapterError: no layer matches, a match is no linear layer or the group size doesn't divide its outputs.

    Example:
        >>> from flax import nnx
        >>> import road_jax
        >>> model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
        >>> adapted = road_jax.nnx.wrap(model, road_jax.RoadConfig(target_modules=["layers.0"]))
        >>> nnx.state(adapted, road_jax.nnx.RoadParam)["layers"][0]["road_theta"].shape
        (32,)
    """
    modules = dict(_modules(model))
    linear = [name for name, node in modules.items() if isinstance(node, _COVERED)]
    chosen = select_modules(
        config,
        list(modules),
        linear=linear,
        output_head=[name for name in linear if name.rpartition(".")[2] in OUTPUT_HEADS],
        model_type=getattr(getattr(model, "config", None), "model_type", None),
    )
    for name in chosen:
        if name not in linear:
            kind = type(modules[name]).__name__
            raise AdapterError(f"{name}: expected nnx.Linear, nnx.LinearGeneral or nnx.Einsum, found {kind}")
    if not config.init_weights and rngs is None:
        raise AdapterError("wrap: expected rngs beside init_weights=False, found none")
    key = None if config.init_weights or rngs is None else rngs.params()
    # A layer that stands in two places has two names, and is met by one of them; the first chosen is its own.
    layers = {id(modules[name]): name for name in reversed(chosen)}
    names = {name: layers[id(node)] for name, node in modules.items() if id(node) in layers}

    def adapt(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        return _adapted(node, names[name], config, key) if name in names and isinstance(node, _COVERED) else node

    return nnx.recursive_map(adapt, model)


def unwrap(model: nnx.Module) -> Any:
    """Returns the model without the rotation: the layers that `wrap` was given."""
    return nnx.recursive_map(lambda _, node: node.base if isinstance(node, RoadLayer) else node, model)


def _adapted(node: Any, name: str, config: RoadConfig, key: jax.Array | None) -> RoadLayer:
    sizes = node.kernel[...].shape
    axes = _output_axes(node)
    inputs = _kernel_axes(node) - axes
    stack, outs = sizes[: len(sizes) - inputs - axes], _output_shape(node)
    out = math.prod(outs)
    check_group_size(out, config.group_size, name)
    subspace_blocks(out, config.subspace, name)
    shape = (*stack, parameter_size(config.variant, out))
    theta, alpha = jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)
    if key is not None:
        path_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        noise = 0.5 * jax.random.normal(path_key, (2, *shape), jnp.float32)
        theta, alpha = theta + noise[0], alpha + noise[1]
    return RoadLayer(node, theta, alpha, variant=config.variant, group_size=config.group_size, subspace=config.subspace)


def _output_axes(layer: Any) -> int:
    return len(_output_shape(layer))


def _output_shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nnx.Linear):
        return (layer.out_features,)
    if isinstance(layer, nnx.LinearGeneral):
        features = layer.out_features
        return (features,) if isinstance(features, int) else tuple(features)
    outputs = einsum_outputs(layer.einsum_str)
    if outputs is None:
        raise AdapterError(f"nnx.Einsum: expected outputs that trail the result, found {layer.einsum_str!r}")
    kernel = layer.einsum_str.replace(" ", "").partition("->")[0].split(",")[1]
    return tuple(layer.kernel_shape[kernel.index(axis)] for axis in outputs)


def _kernel_axes(layer: Any) -> int:
    """How many axes the kernel of one layer has, stack axes not counted."""
    if isinstance(layer, nnx.Linear):
        return 2
    if isinstance(layer, nnx.Einsum):
        return len(layer.kernel_shape)
    ins = (layer.in_features,) if isinstance(layer.in_features, int) else tuple(layer.in_features)
    return len(ins) + len(_output_shape(layer)) + len(layer.batch_axis or {})


def _modules(model: nnx.Module, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, nnx.Module]]:
    """Yields every module below a model by every name it has there."""
    for name, child in nnx.iter_children(model):
        if isinstance(child, nnx.Module) and id(child) not in above:
            yield f"{path}{name}", child
            yield from _modules(child, f"{path}{name}.", (*above, id(child)))
