"""Reads the adapter from one of ``road-train``'s checkpoints. Only this input needs orbax, which imports JAX."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from road_core import Adapter, AdapterError, bfloat16
from road_core._adapter import Array, is_bfloat16
from road_core._config import config_of_run
from road_core._files import inside, read_json

# The arrays of a checkpoint may take this many bytes or, if that is more, this many for each byte of its files.
_FREE, _EXPANSION = 1 << 30, 1000


def find_step(directory: str | os.PathLike) -> Path | None:
    """Returns the folder of a run's checkpoint, or None if there is none.

    Args:
        directory: a run or its ``checkpoints`` (of either, the last step is taken), or the folder of one step.
    """
    folder = Path(directory)
    if _is_step(folder):
        return folder
    for place in (folder, folder / "checkpoints"):
        if place.is_dir() and (steps := [step for step in place.iterdir() if _is_step(step)]):
            return max(steps, key=lambda step: int(step.name))
    return None


def read_checkpoint(step: Path) -> Adapter:
    """Reads the adapter of a checkpoint, with its config from the run's ``options.json``.

    Raises:
        AdapterError: orbax isn't installed, or the run's files are broken.
    """
    step = step.absolute()
    config = config_of_run(read_json(inside(step.parents[1], "options.json")))
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise AdapterError(f"{step}: expected orbax-checkpoint to be installed, found no {error.name}") from None
    # orbax warns when a checkpoint is read without a template, but there is none here.
    logging.getLogger("absl").setLevel(logging.ERROR)
    state = step / "state"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # orbax trusts what a file says about the sizes of its arrays, and too large ones end the process.
            stored = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
            claimed = sum(map(_nbytes, ocp.tree.to_flat_dict(checkpointer.metadata(state).item_metadata.tree).values()))
            if claimed > max(_FREE, _EXPANSION * stored):
                raise ValueError(f"{claimed:.3g} bytes of arrays in {stored} bytes of files")
            tree = checkpointer.restore(state)["adapter"]
        if not isinstance(tree, Mapping):
            raise ValueError(f"{type(tree).__name__} as the adapter")
    except Exception as error:  # orbax lets errors of several libraries through
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(f"{step}: expected a checkpoint of road-train, found {reason}") from None
    leaves = dict(_leaves(tree, ()))
    modules: dict[str, tuple[Array, Array]] = {}
    saved: dict[str, Array] = {}
    for path, array in leaves.items():
        name = ".".join(path[:-1])
        if path[-1] not in ("road_theta", "road_alpha"):
            saved[".".join(path)] = array
        elif any((*path[:-1], leaf) not in leaves for leaf in ("road_theta", "road_alpha")):
            raise AdapterError(f"{step}: expected road_theta and road_alpha of {name}, found {path[-1]} alone")
        else:
            modules[name] = (leaves[*path[:-1], "road_theta"], leaves[*path[:-1], "road_alpha"])
    return Adapter(config, modules, saved)


def _is_step(folder: Path) -> bool:
    # A checkpoint that isn't complete yet has a longer name.
    return folder.name.isascii() and folder.name.isdigit() and (folder / "state" / "_METADATA").is_file()


def _nbytes(array: Any) -> int:
    """Returns the least memory that an array described by orbax, or one chunk of it, takes."""
    if getattr(array, "shape", None) is None:
        return 0
    chunk = getattr(array.storage, "chunk_shape", None) or ()
    return np.dtype(array.dtype).itemsize * max(math.prod(array.shape), math.prod(chunk))


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Array]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, (*path, str(name)))
    else:
        array = np.asarray(tree)
        yield path, array.view(bfloat16) if is_bfloat16(array.dtype) else array
