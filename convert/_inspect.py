"""The contents of an adapter folder: config, modules, sizes, angles and scales."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert._mapping import find_stacks, natural
from road_core import Adapter, AdapterError, output_size, read_flax, read_peft, to_float32
from road_core._adapter import dtype_name


@dataclasses.dataclass(frozen=True)
class Module:
    """One module, or one stack of modules.

    Attributes:
        path: the module path.
        shape: the shape of θ and of α.
        dtype: the dtype of θ.
        outputs: the layer's number of outputs.
        mean_angle: the mean magnitude of θ, in radians.
        max_angle: the greatest magnitude of θ.
        min_scale: the smallest α.
        max_scale: the greatest α.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    outputs: int
    mean_angle: float
    max_angle: float
    min_scale: float
    max_scale: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of `inspect`.

    Attributes:
        kind: ``"Flax"`` or ``"PEFT"``.
        adapter: the adapter itself.
        modules: in the order of their layers.
        axis: the axis of θ that runs over a layer's own parameters, in stacks.
    """

    kind: str
    adapter: Adapter
    modules: tuple[Module, ...]
    axis: int = -1

    @property
    def parameters(self) -> int:
        """The number of parameters in θ and α."""
        return sum(theta.size + alpha.size for theta, alpha in self.adapter.modules.values())

    @property
    def saved_parameters(self) -> int:
        """The number of parameters in modules that are saved whole."""
        return sum(array.size for array in self.adapter.modules_to_save.values())

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(array.nbytes for array in self.adapter.tensors().values())


def inspect(directory: str | os.PathLike, *, axis: int | None = None) -> Summary:
    """Reads an adapter folder of either format.

    Args:
        directory: the folder.
        axis: see `convert.compose`.

    Raises:
        AdapterError: the folder contains no complete adapter or one of each format, or ``axis`` can't be a layer's own.
    """
    kind, adapter = read_adapter(directory)
    axis = axis_of(kind, adapter) if axis is None else axis
    modules = tuple(_module(path, adapter, axis) for path in sorted(adapter.modules, key=natural))
    return Summary(kind, adapter, modules, axis)


def axis_of(kind: str, adapter: Adapter, family: str | None = None) -> int:
    """Returns the axis of θ that runs over a layer's own parameters; the last one for models that no table knows."""
    stacks = find_stacks(adapter, family) if kind == "Flax" else None
    return stacks.axis if stacks else -1


_KINDS = {"Flax": ("road_config.json", read_flax), "PEFT": ("adapter_config.json", read_peft)}


def read_adapter(directory: str | os.PathLike) -> tuple[str, Adapter]:
    """Reads an adapter folder; returns its format, ``"Flax"`` or ``"PEFT"``, and the adapter. Errors: as `inspect`."""
    folder = Path(directory)
    found = [kind for kind, (name, _) in _KINDS.items() if (folder / name).is_file()]
    if len(found) != 1:
        what = "both" if found else "neither" if folder.is_dir() else "no folder"
        raise AdapterError(f"{folder}: expected an adapter (road_config.json or adapter_config.json), found {what}")
    return found[0], _KINDS[found[0]][1](folder)


def check_apart(directory: str | os.PathLike, kind: str) -> None:
    """Refuses a folder for an adapter of one format if it has one of the other, since neither could be read then.

    Raises:
        AdapterError: it has one.
    """
    for other, (name, _) in _KINDS.items():
        if other != kind and (Path(directory) / name).exists():
            raise AdapterError(f"{directory}: expected a folder for an adapter of {kind}, found {name}, one of {other}")


def draw(adapter: Adapter, path: str | os.PathLike, *, axis: int = -1) -> None:
    """Draws where the adapter sends each output's unit vector, in one panel per kind of layer.

    Raises:
        AdapterError: ``path`` doesn't end with ``.png``, or its folder doesn't exist.
    """
    from road_core._picture import draw_rotations

    drawn(path, lambda draft: draw_rotations(adapter, draft, axis=axis))


def drawn(path: str | os.PathLike, paint: Callable[[Path], None]) -> None:
    """Calls ``paint`` for a draft beside a PNG's place and renames it; errors as for `draw`."""
    target = Path(path)
    if target.suffix.lower() != ".png" or not target.parent.is_dir():
        raise AdapterError(f"{target}: expected a name that ends with .png in a folder that exists, found another")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / "picture.png"
        paint(draft)
        draft.replace(target)


def _module(path: str, adapter: Adapter, axis: int) -> Module:
    theta, alpha = adapter.modules[path]
    own = adapter.own_axis(path, axis)
    angles, scales = np.abs(to_float32(theta)), to_float32(alpha)
    return Module(
        path=path,
        shape=theta.shape,
        dtype=dtype_name(theta.dtype),
        outputs=output_size(adapter.config.variant, theta.shape[own]),
        mean_angle=float(angles.mean(dtype=np.float64)),
        max_angle=float(angles.max()),
        min_scale=float(scales.min()),
        max_scale=float(scales.max()),
    )
