"""Several adapters as one: powers of their rotations, multiplied in NumPy float64 and rounded once.

Each pair of outputs is transformed by a 2x2 block. A block of road_1 is a complex number α e^{iθ}; such numbers commute
and have powers in closed form. Blocks of road_2 and road_4 are any real matrices, whose order matters.
Paper: section 4.3.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from road_core._adapter import Adapter, Array, to_float32
from road_core._config import TARGETS, VARIANTS, RoadConfig
from road_core._errors import AdapterError, expect
from road_core._reference import (
    Float64,
    check_group_size,
    coefficients,
    output_size,
    own_axis,
    parameter_size,
    subspace_mask,
)


class Part(NamedTuple):
    """One adapter's θ and α for a module, and the power to which its rotation is raised.

    Attributes:
        theta: ``[..., parameter_size]``, any real dtype.
        alpha: of the same shape.
        config: how θ and α are read: variant, group size, subspace.
        weight: the power; -1 undoes the adapter.
    """

    theta: ArrayLike
    alpha: ArrayLike
    config: RoadConfig
    weight: float = 1.0


def compose(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    axis: int = -1,
) -> Adapter:
    """Returns one adapter that applies others one after the other: ``R_n^w_n ⋯ R_1^w_1``, the first one first.

    If all adapters are road_1, ``α = Π α_i^w_i`` and ``θ = Σ w_i θ_i``, with angles as they were trained, not modulo
    2π, so that a weight of 0.5 goes half of the way; the order doesn't matter. Otherwise each pair's 2x2 blocks are
    multiplied, and the result has the largest of the variants: road_2 as angle and length, road_4 as its coefficients
    themselves. A pair that only one adapter changes keeps the bits of that adapter's θ and α, so adapters on disjoint
    subspaces compose exactly, in any order. A module that an adapter lacks is left unchanged by it.

    Args:
        adapters: of one group size, for one model and in one layout.
        weights: one per adapter, 1 by default; any real number for which the power exists. Whole numbers are always
            possible, except for negative ones of singular blocks. Others are possible for road_1 where α > 0, and for
            road_2 and road_4 where no eigenvalue of the block is real and not positive (the principal power is taken).
        names: the adapters' names in errors.
        axis: the axis of θ and α that runs over a layer's own parameters, in modules that have more than one; the
            others are stacks'.

    Returns:
        An adapter that selects the modules of all adapters, in float32, or float64 if one of them is. Its subspace is
        the smallest that contains theirs. Config fields that don't affect the function are the first adapter's;
        metadata are kept only where all agree.

    Raises:
        AdapterError: there are no adapters, the number of weights or names differs, a weight isn't finite, group sizes
            or shapes differ, ``axis`` has another size than a layer's parameters, a power doesn't exist (the error
            names the module), more than one adapter has modules saved whole, such an adapter has a weight other than 1,
            or an adapter contains weights of its base.

    Example:
        >>> half_turn = Adapter(RoadConfig(group_size=2), {"q": (np.full(4, np.pi), np.full(4, 4.0))})
        >>> theta, alpha = compose([half_turn], [0.5]).modules["q"]
        >>> bool(np.all(theta == np.pi / 2) and np.all(alpha == 2))
        True
    """
    adapters = as_list("compose: expected a list of adapters", adapters)
    weights = check_weights(weights, len(adapters))
    if names is None:
        names = [f"adapter {i + 1}" for i in range(len(adapters))]
    elif len(names := as_list("names: expected a list", names)) != len(adapters):
        raise AdapterError(f"names: expected one for each of {len(adapters)} adapters, found {len(names)}")
    for adapter, name in zip(adapters, names, strict=True):
        expect(name, adapter, Adapter)
    check_group_sizes([adapter.config for adapter in adapters], names)
    for adapter, name in zip(adapters, names, strict=True):
        adapter.check_no_base_weights(f"compose: {name}")
    owners = [(a, name, weight) for a, name, weight in zip(adapters, names, weights, strict=True) if a.modules_to_save]
    check_saved([(name, weight, next(iter(adapter.modules_to_save))) for adapter, name, weight in owners])
    saved = owners[0][0].modules_to_save if owners else {}
    variant = max((adapter.config.variant for adapter in adapters), key=VARIANTS.index)
    modules = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.modules):
        if taken := [key for key in saved if key.startswith(f"{path}.")]:
            raise AdapterError(f"{path}: expected a module that is rotated or saved whole, found both ({taken[0]})")
        having = [(a, weight) for a, weight in zip(adapters, weights, strict=True) if path in a.modules]
        shapes = {(a.config.variant, a.modules[path][0].shape) for a, _ in having}
        group_size = adapters[0].config.group_size
        owns = [own_axis(shape, axis, variant=kind, group_size=group_size, where=path) for kind, shape in shapes]
        layers = [
            (*shape[:own], output_size(kind, shape[own]), *shape[own + 1 :])
            for (kind, shape), own in zip(shapes, owns, strict=True)
        ]
        if len(set(layers)) > 1:
            found = " and ".join(f"{kind} {list(shape)}" for kind, shape in sorted(shapes))
            raise AdapterError(f"{path}: expected θ for one layer in all adapters, found {found}")
        parts, dtype = [], np.dtype(np.float32)
        for adapter, weight in having:
            theta, alpha = adapter.modules[path]
            dtype = np.result_type(dtype, *(array.dtype for array in (theta, alpha) if _wide(array)))
            theta, alpha = (np.moveaxis(_to_float(array), owns[0], -1) for array in (theta, alpha))
            parts.append(Part(theta, alpha, adapter.config, weight))
        with np.errstate(over="ignore"):
            theta, alpha = (np.moveaxis(array, -1, owns[0]) for array in compose_module(parts, variant, path))
            modules[path] = theta.astype(dtype, order="C"), alpha.astype(dtype, order="C")
    configs = [adapter.config for adapter in adapters]
    agreed = set.intersection(*(set(adapter.metadata.items()) for adapter in adapters))
    return Adapter(compose_configs(configs, list(modules), variant), modules, saved, dict(sorted(agreed)))


# Values that are too large for a float become infinite, which every user of the result refuses.
@np.errstate(over="ignore", invalid="ignore")
def compose_module(parts: Sequence[Part], variant: str, where: str) -> tuple[Float64, Float64]:
    """Composes what adapters do to one module; see `compose`.

    Args:
        parts: all of one group size and for one layer, whose own parameters are on the last axis.
        variant: the result's variant; no part may have a larger one.
        where: the module's name, for errors.

    Returns:
        θ and α of the result, each float64.

    Raises:
        AdapterError: a power doesn't exist, or a layer doesn't fit the group size or the subspace.
    """
    group_size = parts[0].config.group_size
    powers = []
    for part in parts:
        kind, subspace = part.config.variant, part.config.subspace
        theta, alpha = np.asarray(part.theta, np.float64), np.asarray(part.alpha, np.float64)
        out = output_size(kind, theta.shape[-1])
        check_group_size(out, group_size, where)
        if subspace is not None:
            mask = subspace_mask(out, variant=kind, group_size=group_size, subspace=subspace, where=where)
            theta, alpha = np.where(mask, theta, 0.0), np.where(mask, alpha, 1.0)
        if part.weight != 1 and kind == "road_1":
            check_scales(alpha, part.weight, where)
            theta, alpha = part.weight * theta, alpha**part.weight
        elif part.weight != 1:
            power = _block_power(_blocks(theta, alpha, kind, group_size), part.weight, where)
            theta, alpha = _from_blocks(power, kind)
        powers.append(_promote(theta, alpha, kind, variant, group_size))
    if variant == "road_1":
        return sum(theta for theta, _ in powers), np.prod([alpha for _, alpha in powers], axis=0)  # type: ignore[return-value]
    product = np.eye(2)
    theta = alpha = busy = np.zeros(())
    for next_theta, next_alpha in powers:
        blocks = _blocks(next_theta, next_alpha, variant, group_size)
        product = blocks @ product
        # Whether this adapter changes the pair at all, laid out like θ.
        turns = (blocks != np.eye(2)).any((-1, -2))
        turns = np.broadcast_to(
            turns[..., None, :], (*turns.shape[:-1], 2 if variant == "road_2" else 4, turns.shape[-1])
        )
        turns = turns.reshape(next_theta.shape)
        busy = busy + turns
        theta, alpha = np.where(turns, next_theta, theta), np.where(turns, next_alpha, alpha)
    several = busy > 1
    whole = _from_blocks(product, variant)
    return np.where(several, whole[0], theta), np.where(several, whole[1], np.where(busy == 0, 1.0, alpha))


def compose_configs(configs: Sequence[RoadConfig], paths: Sequence[str], variant: str) -> RoadConfig:
    """Returns the config of a composition that has these modules.

    It selects modules as the configs do if they agree, else by their combined lists, or else by the paths.
    """
    spaces = [config.subspace for config in configs]
    subspace = None
    if all(spaces):
        start, stop = min(s[0] for s in spaces if s), max(s[1] for s in spaces if s)
        subspace = None if (start, stop) == (0, 1) else (start, stop)
    saved = [name for config in configs for name in config.modules_to_save or ()]
    return dataclasses.replace(
        configs[0],
        variant=variant,
        init_weights=True,
        inference_mode=all(config.inference_mode for config in configs),
        modules_to_save=saved or None,
        subspace=subspace,
        **_choice(configs, paths),
    )


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns one weight for each of ``count`` adapters.

    Raises:
        AdapterError: no adapters, another number of weights, no list of them, or one that isn't a finite number.
    """
    if not count:
        raise AdapterError("compose: expected at least one adapter, found none")
    each = f"weights: expected one for each of {count} adapters"
    numbers = [1.0] * count if weights is None else as_list(each, weights)
    if len(numbers) != count:
        raise AdapterError(f"{each}, found {len(numbers)}")
    for number in numbers:
        if not isinstance(number, int | float | np.number) or not math.isfinite(number):
            raise AdapterError(f"weights: expected finite numbers, found {number!r}")
    return [float(number) for number in numbers]


def as_list(expected: str, values: Iterable[Any]) -> list[Any]:
    """Returns the values as a list.

    Raises:
        AdapterError: they are a single one; it begins with ``expected``, which says where and what.
    """
    try:
        # A dict or a text would become a list of its keys or letters.
        found = None if isinstance(values, Mapping | str) else list(values)
    except TypeError:
        found = None
    if found is None:
        raise AdapterError(f"{expected}, found {type(values).__name__}")
    return found


def check_group_sizes(configs: Sequence[RoadConfig], names: Sequence[str]) -> None:
    """Refuses adapters that pair outputs differently.

    Raises:
        AdapterError: two group sizes differ; the error names their adapters.
    """
    for config, name in zip(configs, names, strict=True):
        if config.group_size != configs[0].group_size:
            raise AdapterError(
                f"compose: expected adapters of one group size, found {configs[0].group_size} in {names[0]} "
                f"and {config.group_size} in {name}"
            )


def check_scales(alpha: Float64 | NDArray[np.float32], weight: float, where: str) -> None:
    """Refuses scales of road_1 that can't be raised to a weight.

    Args:
        alpha: the scales, within the subspace alone or 1 outside of it.
        weight: the power.
        where: the module, for errors.

    Raises:
        AdapterError: the weight is negative and a scale is 0, or it isn't whole and a scale isn't positive.
    """
    if weight.is_integer():
        if weight < 0 and not alpha.all():
            raise AdapterError(f"{where}: expected scales that have an inverse for weight {weight:g}, found α = 0")
    elif (least := alpha.min()) <= 0:
        raise AdapterError(f"{where}: expected positive scales for weight {weight:g}, found α = {least:g}")


def check_saved(owners: Sequence[tuple[str, float, str]]) -> None:
    """Refuses what has no composition of modules saved whole: several adapters with some, or a power of one.

    Args:
        owners: of each adapter that has such modules, the name, the weight, and the path of one of them.

    Raises:
        AdapterError: there are several, or the weight isn't 1.
    """
    if len(owners) > 1:
        raise AdapterError(
            "compose: expected one adapter at most with modules_to_save, "
            f"found {', '.join(name for name, _, _ in owners)}"
        )
    for name, weight, path in owners:
        if weight != 1:
            raise AdapterError(f"compose: expected weight 1 for {name}, which brings {path} whole, found {weight:g}")


def _choice(configs: Sequence[RoadConfig], paths: Sequence[str]) -> dict[str, Any]:
    choices = [{name: getattr(config, name) for name in TARGETS} for config in configs]
    if all(choice == choices[0] for choice in choices):
        return choices[0]
    targets = [choice.pop("target_modules") for choice in choices]
    if all(isinstance(target, list) for target in targets) and all(choice == choices[0] for choice in choices):
        return {**choices[0], "target_modules": list(dict.fromkeys(name for target in targets for name in target))}
    # Whole paths as a pattern, because in a list each would also match the ends of longer ones.
    return {**dict.fromkeys(TARGETS), "target_modules": "|".join(map(re.escape, paths))}


def _wide(array: Array) -> bool:
    return array.dtype == np.float64


def _to_float(array: Array) -> Array:
    return array if _wide(array) else to_float32(array)


def _promote(theta: Float64, alpha: Float64, old: str, new: str, group_size: int) -> tuple[Float64, Float64]:
    """Lays out θ and α of a smaller variant for a larger one: the same numbers, repeated."""
    if old == new:
        return theta, alpha
    out = output_size(old, theta.shape[-1])
    copies, wanted = 2 * theta.shape[-1] // out, 2 * parameter_size(new, out) // out

    def repeat(array: Float64) -> Float64:
        halves = array.reshape(*array.shape[:-1], -1, copies, group_size // 2)
        return np.concatenate([halves] * (wanted // copies), axis=-2).reshape(*array.shape[:-1], -1)

    return repeat(theta), repeat(alpha)


def _blocks(theta: Float64, alpha: Float64, variant: str, group_size: int) -> Float64:
    """Returns each pair's matrix, ``[..., groups, half, 2, 2]``."""
    first, second = coefficients(theta, alpha, variant=variant, group_size=group_size)
    f, s = (v.reshape(*v.shape[:-1], -1, 2, group_size // 2) for v in (first, second))
    # Not -s: arctan2 would treat -0 differently from the identity's 0.
    rows = [[f[..., 0, :], 0 - s[..., 0, :]], [s[..., 1, :], f[..., 1, :]]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _from_blocks(blocks: Float64, variant: str) -> tuple[Float64, Float64]:
    """Inverts `_blocks` for any real matrices, as road_2 or road_4."""
    first = np.stack([blocks[..., 0, 0], blocks[..., 1, 1]], axis=-2)
    second = np.stack([0 - blocks[..., 0, 1], blocks[..., 1, 0]], axis=-2)
    lead = first.shape[:-3]
    if variant == "road_2":
        theta, alpha = np.arctan2(second, first), np.hypot(first, second)
    else:
        # cos 0 and sin π/2 are 1, so that α holds the coefficients themselves.
        alpha = np.stack([first, second], axis=-3)
        theta = np.stack([np.zeros_like(first), np.full_like(first, np.pi / 2)], axis=-3)
    return theta.reshape(*lead, -1), alpha.reshape(*lead, -1)


def _block_power(blocks: Float64, weight: float, where: str) -> Float64:
    """Returns the principal power ``M^w`` of 2x2 matrices; whole powers are computed by multiplication.

    With ``r = √det M`` and eigenvalues ``r e^{±φ}`` (φ real or imaginary):
    ``M^w = r^w (sinh wφ / sinh φ · M/r − sinh (w−1)φ / sinh φ · I)``.
    """
    determinant = blocks[..., 0, 0] * blocks[..., 1, 1] - blocks[..., 0, 1] * blocks[..., 1, 0]
    if weight.is_integer():
        if weight < 0 and not determinant.all():
            raise AdapterError(
                f"{where}: expected blocks that have an inverse for weight {weight:g}, found a singular one"
            )
        return np.linalg.matrix_power(blocks, int(weight))
    mean = (blocks[..., 0, 0] + blocks[..., 1, 1]) / 2
    # ((a − d)/2)² + bc equals (trace/2)² − det, without its cancellation.
    spread = ((blocks[..., 0, 0] - blocks[..., 1, 1]) / 2) ** 2 + blocks[..., 0, 1] * blocks[..., 1, 0]
    real, width = spread >= 0, np.sqrt(np.abs(spread))
    if (bad := real & ((mean <= width) | (determinant <= 0))).any():
        least = (mean - width)[bad].min()
        raise AdapterError(
            f"{where}: expected blocks with a real power for weight {weight:g}, found one with the eigenvalue {least:g}"
        )
    r = np.sqrt(determinant)
    angle = np.where(real, np.arcsinh(width / r), np.arctan2(width, mean))

    def ratio(times: float) -> Float64:
        above = np.where(real, np.sinh(times * angle), np.sin(times * angle))
        below = np.where(real, np.sinh(angle), np.sin(angle))
        return np.where(angle == 0, times, above / np.where(angle == 0, 1.0, below))[..., None, None]

    r = r[..., None, None]
    return r**weight * (ratio(weight) * (blocks / r) - ratio(weight - 1) * np.eye(2))
