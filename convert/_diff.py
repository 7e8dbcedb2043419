"""How two adapters differ, module by module and layer by layer."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert._inspect import axis_of, drawn, read_adapter
from convert._mapping import map_to_torch, natural
from road_core import Adapter, AdapterError, to_float32
from road_core._adapter import Array
from road_core._safetensors import HEAD


@dataclasses.dataclass(frozen=True)
class Difference:
    """The differences in one module of one layer.

    Attributes:
        path: the module path; ``path[layer]`` for a layer of a stack.
        mean_angle: the mean magnitude of the differences of θ, each wrapped to (−π, π].
        max_angle: the greatest such magnitude.
        mean_scale: the mean magnitude of the differences of α.
        max_scale: the greatest such magnitude.
    """

    path: str
    mean_angle: float
    max_angle: float
    mean_scale: float
    max_scale: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `diff`.

    Attributes:
        fields: ``{name: (first, second)}`` for the fields of the configs that differ.
        first_only: keys that only the first adapter has.
        second_only: keys that only the second adapter has.
        modules: the differences of modules that both have in the same shape, in the order of their layers.
        saved: ``{key: greatest difference}`` of tensors that are saved whole; infinite if the shapes differ.
    """

    fields: Mapping[str, tuple[Any, Any]]
    first_only: tuple[str, ...]
    second_only: tuple[str, ...]
    modules: tuple[Difference, ...]
    saved: Mapping[str, float]

    def same(self, tolerance: float = 0.0) -> bool:
        """Returns True if both are the same function, with θ, α and saved tensors equal within a tolerance."""
        numbers = [max(module.max_angle, module.max_scale) for module in self.modules] + list(self.saved.values())
        one_reading = not {"variant", "group_size"} & self.fields.keys()
        return one_reading and not (self.first_only or self.second_only) and max(numbers, default=0.0) <= tolerance


def diff(
    first: str | os.PathLike, second: str | os.PathLike, *, family: str | None = None, axis: int | None = None
) -> Comparison:
    """Compares two adapter folders. If formats or layouts differ, Flax adapters are first mapped to PyTorch's layout.

    Args:
        first: an adapter folder of either format.
        second: the other adapter folder.
        family: the model family of a Flax adapter, if formats or layouts differ.
        axis: see `convert.compose`.

    Raises:
        AdapterError: a folder contains no complete adapter, a Flax adapter can't be converted, or ``axis`` can't be a
            layer's own.
    """
    folders = (first, second)
    kinds, adapters = zip(*(read_adapter(folder) for folder in folders), strict=True)
    axes = [
        axis_of(kind, adapter, family) if axis is None else axis for kind, adapter in zip(kinds, adapters, strict=True)
    ]
    stacked = [_is_stacked(adapter) for adapter in adapters]
    if len(set(kinds)) > 1 or (kinds[0] == "Flax" and (len(set(stacked)) > 1 or (stacked[0] and len(set(axes)) > 1))):
        # The adapter in PEFT's format shows whether a head follows an embedding that was trained whole.
        model = {"tie_word_embeddings": any(f"{HEAD}.weight" in adapter.modules_to_save for adapter in adapters)}
        mapped = []
        for folder, kind, adapter in zip(folders, kinds, adapters, strict=True):
            try:
                mapped.append(map_to_torch(adapter, family, model=model) if kind == "Flax" else adapter)
            except AdapterError as error:
                raise AdapterError(f"{folder}: {error}") from None
        adapters, axes = tuple(mapped), [-1]
    return compare(*adapters, axis=axes[0])


def _is_stacked(adapter: Adapter) -> bool:
    """Tells whether a Flax adapter has stacks of layers."""
    return any(theta.ndim > 1 for theta, _ in adapter.modules.values())


def compare(first: Adapter, second: Adapter, *, axis: int = -1) -> Comparison:
    """Compares two adapters of one layout, in whose stacks ``axis`` of θ runs over a layer's own parameters."""
    configs = first.config.to_dict(), second.config.to_dict()
    fields = {
        name: (configs[0].get(name), configs[1].get(name))
        for name in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(name) != configs[1].get(name)
    }
    first, second = first.cleared(axis), second.cleared(axis)
    layers = _layers(first, axis), _layers(second, axis)
    shared = [p for p in layers[0] if p in layers[1] and layers[0][p][0].shape == layers[1][p][0].shape]
    modules = tuple(_difference(path, layers[0][path], layers[1][path]) for path in sorted(shared, key=natural))
    whole = [{**a.modules_to_save, **a.base_weights} for a in (first, second)]
    saved = {key: _greatest(array, whole[1][key]) for key, array in sorted(whole[0].items()) if key in whole[1]}
    # A module of another size counts as missing on both sides.
    mine = [
        {*layer.keys() - set(shared), *(tensors.keys() - saved.keys())}
        for layer, tensors in zip(layers, whole, strict=True)
    ]
    first_only, second_only = (tuple(sorted(keys, key=natural)) for keys in mine)
    return Comparison(fields, first_only, second_only, modules, saved)


def draw(comparison: Comparison, path: str | os.PathLike) -> None:
    """Draws the mean difference of angle and scale by module, in the order of the layers.

    Raises:
        AdapterError: ``path`` doesn't end with ``.png``, its folder doesn't exist, or the adapters share no module.
    """
    if not comparison.modules:
        raise AdapterError(f"{path}: expected modules that both adapters have, found none to draw")

    def paint(target: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        kinds: dict[str, list[tuple[int, Difference]]] = {}
        for place, module in enumerate(comparison.modules):
            kinds.setdefault(module.path.partition("[")[0].rpartition(".")[2], []).append((place, module))
        for kind, found in kinds.items():
            places = [place for place, _ in found]
            axes[0].plot(places, [m.mean_angle for _, m in found], "o-", markersize=3, linewidth=0.8, label=kind)
            axes[1].plot(places, [m.mean_scale for _, m in found], "o-", markersize=3, linewidth=0.8)
        axes[0].set_ylabel("mean |Δθ|")
        axes[1].set_ylabel("mean |Δα|")
        axes[1].set_xlabel("module, in the order of the layers")
        figure.legend(loc="outside right upper", fontsize=8)
        figure.savefig(target, dpi=120)

    drawn(path, paint)


def _layers(adapter: Adapter, axis: int) -> dict[str, tuple[Array, Array]]:
    """Returns θ and α by module, and by layer for a stack."""
    found: dict[str, tuple[Array, Array]] = {}
    for path, (theta, alpha) in adapter.modules.items():
        if theta.ndim == 1:
            found[path] = (theta, alpha)
        else:
            own = adapter.own_axis(path, axis)
            rows = zip(np.moveaxis(theta, own, -1), np.moveaxis(alpha, own, -1), strict=True)
            found.update({f"{path}[{layer}]": pair for layer, pair in enumerate(rows)})
    return found


def _difference(path: str, first: tuple[Array, Array], second: tuple[Array, Array]) -> Difference:
    theta, alpha = (np.float64(to_float32(a)) - np.float64(to_float32(b)) for a, b in zip(first, second, strict=True))
    angles = np.abs(np.remainder(theta + np.pi, 2 * np.pi) - np.pi)
    # Equal angles must give exactly 0, but the remainder rounds.
    angles, scales = np.where(theta == 0, 0.0, angles), np.abs(alpha)
    return Difference(path, float(angles.mean()), float(angles.max()), float(scales.mean()), float(scales.max()))


def _greatest(first: Array, second: Array) -> float:
    if first.shape != second.shape:
        return float("inf")
    return float(np.abs(np.float64(to_float32(first)) - np.float64(to_float32(second))).max(initial=0.0))
