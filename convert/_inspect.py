"""What an adapter folder holds: config, modules, sizes, angles and scales."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert._mapping import natural
from road_core import Adapter, AdapterError, output_size, read_flax, read_peft, to_float32
from road_core._adapter import dtype_name


@dataclasses.dataclass(frozen=True)
class Module:
    """One module, or one stack of them.

    Attributes:
        path: its module path.
        shape: of θ, and of α.
        dtype: of θ.
        outputs: of the layer.
        mean_angle: the mean magnitude of θ, in radians.
        max_angle: the greatest.
        min_scale: the least α.
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
    """What `inspect` found.

    Attributes:
        kind: ``"Flax"`` or ``"PEFT"``.
        adapter: all of it.
        modules: in the order of their layers.
    """

    kind: str
    adapter: Adapter
    modules: tuple[Module, ...]

    @property
    def parameters(self) -> int:
        """How many numbers θ and α are."""
        return sum(theta.size + alpha.size for theta, alpha in self.adapter.modules.values())

    @property
    def saved_parameters(self) -> int:
        """How many numbers the modules are that were saved whole."""
        return sum(array.size for array in self.adapter.modules_to_save.values())

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(array.nbytes for array in self.adapter.tensors().values())


def inspect(directory: str | os.PathLike) -> Summary:
    """Reads an adapter folder of either format.

    Raises:
        AdapterError: the folder holds no whole adapter, or one of each format.
    """
    kind, adapter = read_adapter(directory)
    modules = tuple(_module(path, adapter) for path in sorted(adapter.modules, key=natural))
    return Summary(kind, adapter, modules)


_KINDS = {"Flax": ("road_config.json", read_flax), "PEFT": ("adapter_config.json", read_peft)}


def read_adapter(directory: str | os.PathLike) -> tuple[str, Adapter]:
    """Reads an adapter folder of either format and says of which, ``"Flax"`` or ``"PEFT"``; errors as `inspect`."""
    folder = Path(directory)
    found = [kind for kind, (name, _) in _KINDS.items() if (folder / name).is_file()]
    if len(found) != 1:
        what = "both" if found else "neither" if folder.is_dir() else "no folder"
        raise AdapterError(f"{folder}: expected an adapter (road_config.json or adapter_config.json), found {what}")
    return found[0], _KINDS[found[0]][1](folder)


def check_apart(directory: str | os.PathLike, kind: str) -> None:
    """Refuses a folder for an adapter of one format where one of the other stands, since none could be read then.

    Raises:
        AdapterError: that.
    """
    for other, (name, _) in _KINDS.items():
        if other != kind and (Path(directory) / name).exists():
            raise AdapterError(f"{directory}: expected a folder for an adapter of {kind}, found {name}, one of {other}")


def draw(adapter: Adapter, path: str | os.PathLike) -> None:
    """Draws where the adapter sends each output's unit vector, one panel a kind of layer.

    Raises:
        AdapterError: ``path`` doesn't end with ``.png``, or its folder isn't there.
    """
    from road_core._picture import draw_rotations

    drawn(path, lambda draft: draw_rotations(adapter, draft))


def drawn(path: str | os.PathLike, paint: Callable[[Path], None]) -> None:
    """Has a PNG painted beside its place and renames it; errors as `draw`."""
    target = Path(path)
    if target.suffix.lower() != ".png" or not target.parent.is_dir():
        raise AdapterError(f"{target}: expected a name that ends with .png in a folder that exists, found another")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / "picture.png"
        paint(draft)
        draft.replace(target)


def _module(path: str, adapter: Adapter) -> Module:
    theta, alpha = adapter.modules[path]
    angles, scales = np.abs(to_float32(theta)), to_float32(alpha)
    return Module(
        path=path,
        shape=theta.shape,
        dtype=dtype_name(theta.dtype),
        outputs=output_size(adapter.config.variant, theta.shape[-1]),
        mean_angle=float(angles.mean(dtype=np.float64)),
        max_angle=float(angles.max()),
        min_scale=float(scales.min()),
        max_scale=float(scales.max()),
    )
