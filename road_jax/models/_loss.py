"""Cross-entropy over a large vocabulary, some tokens at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from road_core import AdapterError
from road_jax._transform import Road
from road_jax._tree import Tree, params_of
from road_jax.models._decoder import Decoder
from road_jax.models._mesh import gathered

# The most targets whose logits a device computes at a time. With fewer, products would be too narrow for the head's
# weights, which each part reads again.
TARGETS = 256


def cross_entropy(
    road: Road,
    variables: Mapping[str, Any],
    adapter: Tree,
    input_ids: jax.Array,
    targets: jax.Array,
    *,
    weights: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    logits_at: jax.Array | None = None,
    adapter_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of a decoder's logits, summed over targets, without ever holding all logits.

    Logits are computed for some targets at a time: the forward pass also takes their gradient, and keeps that of the
    hidden states (as Liger Kernel does, arXiv 2410.10989). The gradient is the same as of all logits at once, for
    whatever is differentiated: θ and α, also of the head, modules that are trained whole, or the base.

    Args:
        road: made from a `road_jax.models.Decoder`, on its mesh if it has one (``module.clone(mesh=mesh)``).
        variables: the base's, as returned by `load`.
        adapter: as returned by ``road.init``; an empty dict is the base alone.
        input_ids: int32 ``[batch, length]``.
        targets: int32 ``[batch, n]``, the token that is to follow at each place; below 0 where there is none.
        weights: ``[batch, n]``, what each target's loss is multiplied with; by default 1.
        attention_mask: see `Decoder`.
        logits_at: int32 ``[batch, n]``, the targets' places in ``input_ids``; by default all of them.
        adapter_ids: for stacked adapters, see ``Road.apply``.

    Returns:
        ``(loss, right)``: float32, in nats; and bool ``[batch, n]``, where a target is the likeliest token.

    Raises:
        AdapterError: ``road`` isn't made from a decoder, or an array has another shape.

    Example:
        >>> def loss(adapter, variables, ids):  # of the next tokens
        ...     total, _ = models.cross_entropy(road, variables, adapter, ids[:, :-1], ids[:, 1:])
        ...     return total / ids[:, 1:].size
    """
    if not isinstance(model := getattr(road, "model", None), Decoder):
        found = type(road if model is None else model).__name__
        raise AdapterError(f"road: expected one that transform made from a road_jax.models.Decoder, found {found}")
    places, name = (input_ids, "input_ids") if logits_at is None else (logits_at, "logits_at")
    for other, array in (("targets", targets), ("weights", weights)):
        if array is not None and jnp.shape(array) != jnp.shape(places):
            raise AdapterError(
                f"{other}: expected an array {list(jnp.shape(places))}, as {name}, found {list(jnp.shape(array))}"
            )
    targets = jnp.asarray(targets)
    weights = jnp.ones(targets.shape) if weights is None else jnp.asarray(weights, jnp.float32)
    weights = jnp.where(targets < 0, 0, weights)

    def ids(part: Tree) -> dict[str, Any]:
        return {"adapter_ids": adapter_ids} if part and adapter_ids is not None else {}

    trunk = {name: part for name, part in adapter.items() if name != "lm_head"}
    head = {name: part for name, part in adapter.items() if name == "lm_head"}
    x, embed = road.apply(
        variables, trunk, input_ids, attention_mask=attention_mask, logits_at=logits_at, method="hidden", **ids(trunk)
    )
    params = {name: part for name, part in params_of(variables).items() if name == "lm_head"}
    mesh = model.mesh
    if mesh is not None:
        # Once for all parts.
        params = gathered(params, mesh)

    def of_part(constants: Any, part: Any) -> tuple[jax.Array, jax.Array]:
        (params, head, embed), (x, targets, weights) = constants, part
        logits = road.apply({"params": params}, head, x, embed, method="head", **ids(head)).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(losses * weights), jnp.argmax(logits, axis=-1) == targets

    rows, n = targets.shape
    shares = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    parts = min(n, -(-rows * n // (shares * TARGETS)))
    size = -(-n // parts)
    fill = parts * size - n

    def cut(array: jax.Array) -> jax.Array:
        # [rows, n, …] -> [parts, rows, size, …]. Rows stay whole, since devices may share them.
        padded = jnp.pad(array, ((0, 0), (0, fill), *[(0, 0)] * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, parts, size, *array.shape[2:]), 1, 0)

    pieces = jax.tree.map(cut, (x, targets, weights))
    loss, right = _summed(of_part, (params, head, embed), pieces)
    return loss, jnp.moveaxis(right, 0, 1).reshape(rows, parts * size)[:, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(of_part: Callable, constants: Any, parts: Any) -> tuple[jax.Array, Any]:
    """Returns the sum of ``of_part(constants, part)[0]`` over the parts' first axis, and its other results stacked."""

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        loss, other = of_part(constants, part)
        return total + loss, other

    return jax.lax.scan(add, jnp.float32(0), parts)


def _forward(of_part: Callable, constants: Any, parts: Any) -> tuple[Any, Any]:
    """Computes the sum and, a part after the other, its gradient by all that is differentiated."""
    fixed, wanted = _divided(constants)
    fixed_parts, wanted_parts = _divided(parts)

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        def loss(wanted: Any, wanted_part: Any) -> tuple[jax.Array, Any]:
            return of_part(_joined(fixed, wanted), _joined(part[0], wanted_part))

        (value, other), (by_wanted, by_part) = jax.value_and_grad(loss, (0, 1), has_aux=True)(wanted, part[1])
        sums = jax.tree.map(lambda total, one: total + one.astype(jnp.float32), total[1], by_wanted)
        return (total[0] + value, sums), (other, by_part)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), wanted)
    (total, sums), (other, by_parts) = jax.lax.scan(add, (jnp.float32(0), nothing), (fixed_parts, wanted_parts))
    by_wanted = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, wanted)
    return (total, other), (by_wanted, by_parts)


def _backward(of_part: Callable, gradients: Any, cotangents: Any) -> Any:
    # None stands for what isn't differentiated.
    return jax.tree.map(lambda gradient: gradient * cotangents[0].astype(gradient.dtype), gradients)


def _is_argument(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _divided(arguments: Any) -> tuple[Any, Any]:
    """Returns two trees, of what isn't differentiated and of what is; each has None where the other has a leaf."""
    return tuple(
        jax.tree.map(
            lambda argument, wanted=wanted: argument.value if argument.perturbed == wanted else None,
            arguments,
            is_leaf=_is_argument,
        )
        for wanted in (False, True)
    )


def _joined(fixed: Any, wanted: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, fixed, wanted, is_leaf=lambda leaf: leaf is None)


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
