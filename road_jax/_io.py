"""Adapters on disk: converts nested dicts of arrays to and from the Flax folder format."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from road_core import Adapter, AdapterError, RoadConfig, bfloat16, read_flax, write_flax
from road_core._errors import expect
from road_jax._tree import ROAD_LEAVES, Tree, adapted_paths, dotted, flatten, unflatten


def save_adapter(directory: str | os.PathLike, adapter: Tree, config: RoadConfig, *, overwrite: bool = False) -> None:
    """Writes ``road_adapter.safetensors`` and ``road_config.json``.

    Args:
        directory: a new or empty folder; with ``overwrite``, one whose two adapter files are replaced.
        adapter: as returned by ``Road.init``; any floating dtypes, kept bit for bit. One adapter: several from
            `stack_adapters` can't be told from a stack of layers on the first axis, and would be written as one.
        config: the config that the adapter was made with.
        overwrite: see ``directory``.

    Raises:
        AdapterError: the folder already contains something, or the adapter isn't complete and finite.
    """
    write_flax(directory, to_record(adapter, config), overwrite=overwrite)


def load_adapter(directory: str | os.PathLike) -> tuple[Tree, RoadConfig]:
    """Reads what `save_adapter` wrote.

    Returns:
        The adapter as a nested dict of JAX arrays in the file's dtypes, and its config.

    Raises:
        AdapterError: the folder contains no complete adapter.
    """
    record = read_flax(directory)
    return from_record(record), record.config


def to_record(adapter: Tree, config: RoadConfig) -> Adapter:
    """Returns the framework-free record of an adapter; arrays are fetched to the host."""
    expect("config", config, RoadConfig)
    leaves = {path: np.asarray(jax.device_get(leaf)) for path, leaf in flatten(adapter).items()}
    # A name with dots is split when it is read back, and `Road.apply` joins it again, so joined names must differ.
    if len(set(map(dotted, leaves))) < len(leaves):
        raise AdapterError("adapter: expected modules whose names joined by dots differ, found some alike")
    modules = {dotted(p): (leaves[(*p, "road_theta")], leaves[(*p, "road_alpha")]) for p in adapted_paths(adapter)}
    if "" in modules:
        raise AdapterError("adapter: expected modules with names to save, found a model that is one layer by itself")
    saved = {dotted(path): leaf for path, leaf in leaves.items() if path[-1] not in ROAD_LEAVES}
    return Adapter(config, modules, saved)


def from_record(record: Adapter) -> dict[str, Any]:
    """Inverts `to_record`."""
    return from_tensors(record.tensors())


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a nested dict of JAX arrays from a file's arrays by dotted key."""
    arrays = {
        key: jnp.asarray(array.view(ml_dtypes.bfloat16) if array.dtype == bfloat16 else array)
        for key, array in tensors.items()
    }
    return unflatten({tuple(key.split(".")): array for key, array in arrays.items()})
