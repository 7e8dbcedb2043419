"""Composes several adapters into one: `road_core.compose` on pytrees, traceable."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from road_core import AdapterError, RoadConfig, output_size, parameter_size, subspace_mask
from road_core._compose import as_list, check_group_sizes, compose_configs
from road_core._config import VARIANTS
from road_core._errors import expect
from road_core._reference import own_axis
from road_jax._rotate import coefficients, within
from road_jax._tree import ROAD_LEAVES, Tree, adapted_paths, dotted, flatten, unflatten

Weight = float | jax.Array

# The four entries of each pair's matrix [[a, b], [c, d]], each [..., groups, half].
_Blocks = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class _Part(NamedTuple):
    theta: jax.Array
    alpha: jax.Array
    config: RoadConfig
    weight: Weight


def compose(
    adapters: Sequence[Tree],
    configs: Sequence[RoadConfig],
    weights: Sequence[Weight] | None = None,
    *,
    variant: str | None = None,
    axis: int = -1,
) -> tuple[Tree, RoadConfig]:
    """Returns one adapter that applies others one after the other: ``R_n^w_n ⋯ R_1^w_1``, the first one first.

    A pure function of the adapters, for use under ``jit`` and ``grad``; see `road_core.compose` for the formulas.
    Computes in float32, or in float64 if one of the adapters is. Blocks that are in only one adapter's subspace keep
    that adapter's θ and α unchanged.

    Args:
        adapters: trees as returned by `Road.init`; they may adapt different modules.
        configs: the adapters' configs, all of one group size.
        weights: one per adapter; 1 by default. For adapters of road_1 any number where α > 0, also as an array that is
            traced or learned; for road_2 and road_4 only whole numbers (`road_core.compose` takes others too).
        variant: the result's variant, if it is to be a larger one than needed: adapters can be stacked only if they
            have the same variant.
        axis: the axis of θ and α that runs over a layer's own parameters, in modules that have more than one; the
            others are stacks'. With ``nn.scan(…, variable_axes={"params": 1})`` it is 0.

    Returns:
        The adapter, and a config that selects the modules of all adapters.

    Raises:
        AdapterError: there isn't a list of adapters with a config for each, group sizes or shapes differ, ``axis`` has
            another size than a layer's parameters, a weight can't be used, more than one adapter contains whole
            modules, or a power doesn't exist (not checked under ``jit``, where the values are then not finite).

    Example:
        >>> import jax.numpy as jnp, road_jax
        >>> config = road_jax.RoadConfig(group_size=2)
        >>> adapter = {"proj": {"road_theta": jnp.array([1.0]), "road_alpha": jnp.array([4.0])}}
        >>> both, config = road_jax.compose([adapter, adapter], [config, config], [1, -0.5])
        >>> both["proj"]["road_theta"].tolist(), both["proj"]["road_alpha"].tolist()
        ([0.5], [2.0])
    """
    adapters = as_list("compose: expected a list of adapters", adapters)
    configs = as_list("compose: expected a list of configs, one for each adapter", configs)
    if not adapters or len(configs) != len(adapters):
        raise AdapterError(
            f"compose: expected adapters, and a config for each, found {len(adapters)} and {len(configs)}"
        )
    each = f"weights: expected one for each of {len(adapters)} adapters"
    numbers: list[Weight] = [1.0] * len(adapters) if weights is None else as_list(each, weights)
    if len(numbers) != len(adapters):
        raise AdapterError(f"{each}, found {len(numbers)}")
    names = [f"adapter {i + 1}" for i in range(len(adapters))]
    for name, config in zip(names, configs, strict=True):
        expect(f"config of {name}", config, RoadConfig)
    check_group_sizes(configs, names)
    needed = max((config.variant for config in configs), key=VARIANTS.index)
    chosen = variant or needed
    if chosen not in VARIANTS or VARIANTS.index(chosen) < VARIANTS.index(needed):
        raise AdapterError(f"compose: expected a variant that holds {needed}, found {chosen!r}")
    trees = [flatten(adapter) for adapter in adapters]
    leaves = dict(_saved(trees, numbers, names))
    modules: dict[tuple[str, ...], list[_Part]] = {}
    for adapter, tree, config, weight in zip(adapters, trees, configs, numbers, strict=True):
        for path in adapted_paths(adapter):
            theta, alpha = (jnp.asarray(tree[(*path, name)]) for name in ROAD_LEAVES)
            modules.setdefault(path, []).append(_Part(theta, alpha, config, weight))
    for path, parts in modules.items():
        if any(leaf[: len(path)] == path for leaf in leaves if leaf[-1] not in ROAD_LEAVES):
            raise AdapterError(f"{dotted(path)}: expected a module that is rotated or saved whole, found both")
        leaves[(*path, "road_theta")], leaves[(*path, "road_alpha")] = _compose_module(
            parts, chosen, axis, dotted(path)
        )
    config = compose_configs(configs, list(map(dotted, modules)), chosen)
    return unflatten(leaves), config


def _saved(trees: Sequence[Mapping], weights: Sequence[Weight], names: Sequence[str]) -> Mapping[tuple[str, ...], Any]:
    owners = []
    for tree, weight, name in zip(trees, weights, names, strict=True):
        if saved := {path: leaf for path, leaf in tree.items() if path[-1] not in ROAD_LEAVES}:
            owners.append(name)
            if isinstance(weight, jax.Array) or weight != 1:
                first = dotted(next(iter(saved))[:-1])
                raise AdapterError(f"compose: expected weight 1 for {name}, which brings {first} whole, found {weight}")
            found = saved
    if len(owners) > 1:
        raise AdapterError(f"compose: expected one adapter at most with modules saved whole, found {', '.join(owners)}")
    return found if owners else {}


def _compose_module(parts: Sequence[_Part], variant: str, axis: int, where: str) -> tuple[jax.Array, jax.Array]:
    group_size = parts[0].config.group_size
    dtype = functools.reduce(jnp.promote_types, [v.dtype for part in parts for v in part[:2]], jnp.float32)
    owns = [
        own_axis(part.theta.shape, axis, variant=part.config.variant, group_size=group_size, where=where)
        for part in parts
    ]
    found = " and ".join(f"{p.config.variant} {list(p.theta.shape)}" for p in parts)
    # What follows has a layer's own parameters on the last axis.
    parts = [
        part._replace(theta=jnp.moveaxis(part.theta, own, -1), alpha=jnp.moveaxis(part.alpha, own, -1))
        for part, own in zip(parts, owns, strict=True)
    ]
    layers = [(*p.theta.shape[:-1], output_size(p.config.variant, p.theta.shape[-1])) for p in parts]
    if len({*zip(owns, layers, strict=True)}) > 1:
        raise AdapterError(f"{where}: expected θ and α for one layer in all adapters, found {found}")
    out = layers[0][-1]
    theta, alpha = _compose_last(parts, variant, out, dtype, where)
    return jnp.moveaxis(theta, -1, owns[0]), jnp.moveaxis(alpha, -1, owns[0])


def _compose_last(
    parts: Sequence[_Part], variant: str, out: int, dtype: Any, where: str
) -> tuple[jax.Array, jax.Array]:
    group_size = parts[0].config.group_size
    powers, masks = [], []
    for part in parts:
        kind, subspace = part.config.variant, part.config.subspace
        masks.append(subspace_mask(out, variant=variant, group_size=group_size, subspace=subspace, where=where))
        theta, alpha = (v.astype(dtype) for v in part[:2])
        theta, alpha = within(theta, alpha, variant=kind, group_size=group_size, subspace=subspace)
        theta, alpha = _power(theta, alpha, part, where)
        powers.append((_promote(theta, kind, variant, group_size), _promote(alpha, kind, variant, group_size)))
    if variant == "road_1":
        return sum(theta for theta, _ in powers), math.prod(alpha for _, alpha in powers)  # type: ignore[return-value]
    several = np.sum(masks, axis=0) > 1
    theta, alpha = jnp.zeros_like(powers[0][0]), jnp.ones_like(powers[0][1])
    lead = (1,) * (theta.ndim - 1)
    for mask, (one, other) in zip(masks, powers, strict=True):
        here = mask.reshape(*lead, -1)
        theta, alpha = jnp.where(here, one, theta), jnp.where(here, other, alpha)
    if several.any():
        product = functools.reduce(_then, (_blocks(one, other, variant, group_size) for one, other in powers))
        here = several.reshape(*lead, -1)
        whole = _from_blocks(product, variant)
        theta, alpha = jnp.where(here, whole[0], theta), jnp.where(here, whole[1], alpha)
    return theta, alpha


def _power(theta: jax.Array, alpha: jax.Array, part: _Part, where: str) -> tuple[jax.Array, jax.Array]:
    kind, weight = part.config.variant, part.weight
    if isinstance(weight, jax.Array):
        if kind != "road_1" or weight.ndim:
            raise AdapterError(f"weights: expected a number for an adapter of {kind}, found an array {weight.shape}")
        if isinstance(weight, jax.core.Tracer):
            weight = weight.astype(theta.dtype)
            return theta * weight, alpha**weight
        # Its value is known, so it is checked like a number.
        weight = weight.item()
    if not isinstance(weight, int | float | np.number) or not math.isfinite(weight):
        raise AdapterError(f"weights: expected finite numbers, found {weight!r}")
    if weight == 1:
        return theta, alpha
    whole = float(weight).is_integer()
    if kind == "road_1":
        least = (jnp.abs(alpha) if whole else alpha).min()
        # Under jit an array that isn't traced may give one that is.
        if not isinstance(least, jax.core.Tracer) and least <= 0 and (weight < 0 or not whole):
            raise AdapterError(f"{where}: expected scales that have the power {weight:g}, found α = {least:g}")
        return theta * float(weight), alpha ** (int(weight) if whole else float(weight))
    if not whole:
        raise AdapterError(
            f"weights: expected whole numbers for an adapter of {kind}, found {weight:g} (road_core.compose takes it)"
        )
    step = _blocks(theta, alpha, kind, part.config.group_size)
    if weight < 0:
        a, b, c, d = step
        determinant = a * d - b * c
        if not isinstance(determinant, jax.core.Tracer) and bool((determinant == 0).any()):
            raise AdapterError(
                f"{where}: expected blocks that have an inverse for weight {weight:g}, found a singular one"
            )
        step = d / determinant, -b / determinant, -c / determinant, a / determinant
    power = (jnp.ones_like(step[0]), jnp.zeros_like(step[0]), jnp.zeros_like(step[0]), jnp.ones_like(step[0]))
    left = abs(int(weight))
    while left:
        if left % 2:
            power = _then(power, step)
        step, left = _then(step, step), left // 2
    return _from_blocks(power, kind)


def _promote(values: jax.Array, old: str, new: str, group_size: int) -> jax.Array:
    """Lays out θ or α of a smaller variant for a larger one: the same numbers, repeated."""
    out = output_size(old, values.shape[-1])
    copies = parameter_size(new, out) // values.shape[-1]
    groups = values.reshape(*values.shape[:-1], out // group_size, -1)
    return jnp.concatenate([groups] * copies, axis=-1).reshape(*values.shape[:-1], -1)


def _blocks(theta: jax.Array, alpha: jax.Array, variant: str, group_size: int) -> _Blocks:
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size)
    return first[..., 0, :], -second[..., 0, :], second[..., -1, :], first[..., -1, :]


def _from_blocks(blocks: _Blocks, variant: str) -> tuple[jax.Array, jax.Array]:
    """Inverts `_blocks` for any real matrices, as road_2 or road_4."""
    a, b, c, d = blocks
    first, second = jnp.stack([a, d], axis=-2), jnp.stack([-b, c], axis=-2)
    if variant == "road_2":
        theta, alpha = jnp.arctan2(second, first), jnp.hypot(first, second)
    else:
        theta = jnp.stack([jnp.zeros_like(first), jnp.full_like(first, math.pi / 2)], axis=-3)
        alpha = jnp.stack([first, second], axis=-3)
    shape = (*a.shape[:-2], -1)
    return theta.reshape(shape), alpha.reshape(shape)


def _then(before: _Blocks, after: _Blocks) -> _Blocks:
    """Returns the matrix product ``after @ before``."""
    (a, b, c, d), (e, f, g, h) = before, after
    return e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d
