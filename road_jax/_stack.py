"""Several adapters in one tree, for batches whose rows each choose their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from road_core import AdapterError, RoadConfig
from road_core._compose import as_list
from road_core._errors import expect
from road_jax._compose import compose
from road_jax._tree import ROAD_LEAVES, Tree, check_floating, dotted, flatten, is_cut, unflatten


def stack_adapters(adapters: Sequence[Tree], *, configs: Sequence[RoadConfig] | None = None, axis: int = -1) -> Tree:
    """Combines adapters of one variant and group size, for ``Road.apply(..., adapter_ids=…)``.

    A Road applies its own config's subspace to all adapters of a stack. So give ``configs`` if theirs aren't all the
    same, and apply the stack with a Road whose config has no subspace.

    Args:
        adapters: trees as returned by `Road.init`; they may adapt different modules.
        configs: the adapters' configs. Each adapter is set to the identity outside of its own subspace.
        axis: with ``configs``, the axis of θ and α that runs over a layer's own parameters; see `road_jax.compose`.

    Returns:
        A tree with the modules of all adapters and one more axis, the last: index 0 is the identity, and adapter ``i``
        is at index ``i + 1`` (the identity in modules that it lacks). float32, or float64 if one of the adapters is.

    Raises:
        AdapterError: there are no adapters, their shapes, variants or group sizes differ, or one contains modules that
            were trained whole.

    Example:
        >>> import jax.numpy as jnp, road_jax
        >>> adapter = {"proj": {"road_theta": jnp.zeros(32), "road_alpha": jnp.ones(32)}}
        >>> road_jax.stack_adapters([adapter, adapter])["proj"]["road_theta"].shape
        (32, 3)
    """
    if isinstance(adapters, Mapping):
        raise AdapterError("stack_adapters: expected a list of adapters, found a dict")
    if not adapters:
        raise AdapterError("stack_adapters: expected at least one adapter, found none")
    trees = [flatten(adapter) for adapter in adapters]
    for i, tree in enumerate(trees):
        if saved := [path for path in tree if path[-1] not in ROAD_LEAVES]:
            raise AdapterError(
                f"stack_adapters: expected θ and α alone, found the saved module {dotted(saved[0][:-1])} in adapter {i}"
            )
        for path, leaf in tree.items():
            check_floating(path, leaf)
    if configs is not None:
        pairs = zip(adapters, _check_alike(configs, len(trees)), strict=True)
        trees = [flatten(compose([adapter], [config], axis=axis)[0]) for adapter, config in pairs]
    stacked = {}
    for path in sorted({path for tree in trees for path in tree}):
        shapes = {tree[path].shape for tree in trees if path in tree}
        if len(shapes) > 1:
            raise AdapterError(
                f"{dotted(path)}: expected one shape in all adapters, of one variant and for one model, "
                f"found {sorted(map(list, shapes))}"
            )
        leaves = [jnp.asarray(tree[path]) if path in tree else None for tree in trees]
        wide = any(leaf is not None and jnp.finfo(leaf.dtype).bits > 32 for leaf in leaves)
        identity = jnp.full(shapes.pop(), float(path[-1] == "road_alpha"), jnp.float64 if wide else jnp.float32)
        rows = [identity if leaf is None else leaf.astype(identity.dtype) for leaf in (None, *leaves)]
        stacked[path] = jnp.stack(rows, axis=-1)
    return unflatten(stacked)


def _check_alike(configs: Sequence[RoadConfig], count: int) -> list[RoadConfig]:
    """Returns the configs of ``count`` adapters as a list, if adapters with these may be stacked."""
    each = f"stack_adapters: expected a config for each of {count} adapters"
    configs = as_list(each, configs)
    if len(configs) != count:
        raise AdapterError(f"{each}, found {len(configs)}")
    for i, config in enumerate(configs):
        expect(f"config of adapter {i}", config, RoadConfig)
        if (config.variant, config.group_size) != (configs[0].variant, configs[0].group_size):
            raise AdapterError(
                "stack_adapters: expected adapters of one variant and group size, found "
                f"{configs[0].variant} and {configs[0].group_size} in adapter 0, "
                f"{config.variant} and {config.group_size} in adapter {i}"
            )
    return configs


def as_ids(adapter_ids: Any) -> jax.Array:
    """Returns ids as an array; values that are known stay known, also within ``jit``.

    Raises:
        AdapterError: they aren't whole numbers, one per row.
    """
    if not isinstance(adapter_ids, jax.Array | np.ndarray):
        if isinstance(adapter_ids, list | tuple) and not adapter_ids:
            # NumPy would make an empty list an array of floats.
            adapter_ids = np.zeros(0, np.int32)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(adapter_ids))
        adapter_ids = (jnp if traced else np).asarray(adapter_ids)
    if adapter_ids.ndim != 1 or not jnp.issubdtype(adapter_ids.dtype, jnp.integer):
        raise AdapterError(
            f"adapter_ids: expected whole numbers [batch], found {adapter_ids.dtype} {list(adapter_ids.shape)}"
        )
    return adapter_ids


def of_rows(table: jax.Array, adapter_ids: jax.Array, identity: float) -> jax.Array:
    """Returns each row's slice of ``[..., adapters]``, rows last; the identity for 0 and ids beyond the adapters.

    The values at index 0 aren't used: they get no gradient, and a step with weight decay may change them.
    """
    most = min(table.shape[-1] - 1, jnp.iinfo(adapter_ids.dtype).max)
    adapted = jnp.asarray((adapter_ids > 0) & (adapter_ids <= most))
    places = jnp.where(adapted, adapter_ids, 0)
    spec = PartitionSpec(*jax.typeof(table).sharding.spec[:-1], *jax.typeof(places).sharding.spec)
    if is_cut(spec):
        # On a mesh with explicit axes, a gather must be told the sharding of its result.
        rows = table.at[..., places].get(mode="clip", out_sharding=spec)
    else:
        rows = jnp.take(table, places, axis=-1, mode="clip")
    return jnp.where(adapted.reshape((1,) * (table.ndim - 1) + adapted.shape), rows, identity)


def check_ids(adapter_ids: jax.Array, count: int) -> None:
    """Refuses ids beyond ``count`` adapters, if their values are known.

    Raises:
        AdapterError: an id isn't between 0 and ``count``.
    """
    if isinstance(adapter_ids, jax.core.Tracer) or not getattr(adapter_ids, "is_fully_addressable", True):
        return
    ids = np.asarray(adapter_ids)
    if wrong := ids[(ids < 0) | (ids > count)].tolist():
        raise AdapterError(f"adapter_ids: expected numbers from 0 to {count}, found {wrong[0]}")
