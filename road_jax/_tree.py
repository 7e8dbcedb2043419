"""Nested dicts of arrays, and how an adapter is laid over params."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from road_core import AdapterError
from road_core._errors import listed

ROAD_LEAVES = ("road_theta", "road_alpha")

# A nested dict with arrays as leaves. JAX has no narrower type for it.
Tree = Any
Path = tuple[str, ...]


def to_dict(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns plain nested dicts with the same leaves; a FrozenDict is a Mapping too."""
    return {k: to_dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def flatten(tree: Mapping[str, Any], what: str = "adapter") -> dict[Path, Any]:
    """Returns ``{path: leaf}``.

    Raises:
        AdapterError: the tree, called ``what`` in the error, isn't a nested dict or has a quantised kernel in pieces.
    """
    if not isinstance(tree, Mapping):
        raise AdapterError(f"{what}: expected a nested dict of arrays, found {type(tree).__name__}")
    leaves = traverse_util.flatten_dict(to_dict(tree))
    for path in leaves:
        if path[-2:] == ("kernel", "codes") and (*path[:-1], "scales") in leaves:
            raise AdapterError(
                f"{dotted(path[:-1])}: expected an array or a QuantizedKernel, found a dict of codes and scales, as a "
                "checkpoint gives that is restored without a target (give it the quantised variables, or their shapes)"
            )
    return leaves


def params_of(variables: Mapping[str, Any], what: str = "variables") -> Mapping[str, Any]:
    """Returns the params of a model's variables.

    Raises:
        AdapterError: there are none.
    """
    params = variables.get("params") if isinstance(variables, Mapping) else None
    if isinstance(params, Mapping):
        return params
    names = listed(list(map(str, variables))) or "nothing" if isinstance(variables, Mapping) else ""
    found = f"one with {names}" if names else type(variables).__name__
    raise AdapterError(f"{what}: expected a dict with params under 'params', found {found}")


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves))


def replace_leaves(tree: Mapping[str, Any], leaves: Mapping[Path, Any], path: Path = ()) -> Any:
    """Returns a tree of the same structure, FrozenDicts included, with other leaves at the given paths."""
    items = {
        name: replace_leaves(node, leaves, (*path, name))
        if isinstance(node, Mapping)
        else leaves.get((*path, name), node)
        for name, node in tree.items()
    }
    return FrozenDict(items) if isinstance(tree, FrozenDict) else items


def adapted_paths(adapter: Mapping[str, Any]) -> list[Path]:
    """Returns the paths of the modules that have θ and α.

    Raises:
        AdapterError: a name isn't a string, or one of the two is missing, isn't a floating-point array, or differs in
            shape from the other.
    """
    leaves = flatten(adapter)
    found = {path[:-1] for path in leaves if path[-1] in ROAD_LEAVES}
    for name in itertools.chain(*found):
        if not isinstance(name, str):
            raise AdapterError(f"adapter: expected strings as names, found {name!r}")
    paths = sorted(found)
    for path in paths:
        for name in ROAD_LEAVES:
            if (*path, name) not in leaves:
                raise AdapterError(f"{dotted(path)}: expected road_theta and road_alpha, found no {name}")
            check_floating((*path, name), leaves[*path, name])
        theta, alpha = (list(unbox(leaves[*path, name]).shape) for name in ROAD_LEAVES)
        if theta != alpha:
            raise AdapterError(
                f"{dotted(path)}: expected road_theta and road_alpha of one shape, found {theta} and {alpha}"
            )
    return paths


def check_floating(path: Path, leaf: Any) -> None:
    """Refuses a θ or α that can't be computed with; a ``jax.ShapeDtypeStruct`` is accepted too.

    Raises:
        AdapterError: it isn't an array, or its dtype isn't floating-point.
    """
    dtype = getattr(unbox(leaf), "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise AdapterError(
            f"{dotted(path)}: expected an array of floating-point numbers, found {dtype or type(leaf).__name__}"
        )


def overlay(params: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Lays an adapter over params: θ and α beside their kernels, saved modules in place of the base's and in its boxes.

    Raises:
        AdapterError: the adapter has a module that params lack; the error lists what only one of the two has.
    """
    base, leaves = flatten(params), flatten(adapter)
    folders = {path[:n] for path in base for n in range(len(path))}
    lost = sorted(
        {
            # A top-level entry is in no module.
            dotted(path[:-1] or path)
            for path in leaves
            if (path[:-1] not in folders if path[-1] in ROAD_LEAVES else path not in base)
        }
    )
    if lost:
        rest = sorted({dotted(path[:-1]) for path in base} - {dotted(path[:-1]) for path in leaves})
        raise AdapterError(
            f"adapter: expected modules of the model's params, found besides {listed(lost)}, "
            f"where params have besides {listed(rest) if rest else 'none'}"
        )
    boxed = {
        path: base[path].replace_boxed(leaf)
        for path, leaf in leaves.items()
        if isinstance(base.get(path), nn.meta.AxisMetadata) and not isinstance(leaf, nn.meta.AxisMetadata)
    }
    return unflatten({**base, **leaves, **boxed})


def as_params(adapter: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the adapter with its paths split as in params; read from a file, a name with a dot is split in two."""
    folders = {dotted(path[:n]): path[:n] for path in flatten(params) for n in range(len(path))}
    leaves = flatten(adapter).items()
    return unflatten({(*folders.get(dotted(path[:-1]), path[:-1]), path[-1]): leaf for path, leaf in leaves})


def unbox(tree: Tree) -> Tree:
    """Returns the tree without Flax's boxes. Applies no sharding constraint, because the boxes may hold only shapes."""

    def content(leaf: Any) -> Any:
        if isinstance(leaf, nn.Partitioned):
            return leaf.unbox(apply_constraint=False)
        return leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf

    return jax.tree.map(content, tree, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def under(path: Path, names: Iterable[str]) -> bool:
    """True for params of modules whose dotted paths end with one of the names, as PEFT matches ``modules_to_save``."""
    return any(dotted(path[:n]).endswith(name) for n in range(1, len(path)) for name in names)


def is_cut(spec: PartitionSpec) -> bool:
    """True if an array whose type has this spec is sharded on a mesh with explicit axes."""
    return any(axis is not None for axis in spec)


def dotted(path: Path) -> str:
    """Returns a path's names joined by dots."""
    return ".".join(map(str, path))
