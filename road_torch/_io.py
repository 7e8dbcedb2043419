"""Converts between parameters of `RoadLayer` and `SavedModule` and `road_core.Adapter`."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from road_core import Adapter, RoadConfig, bfloat16
from road_torch._layer import RoadLayer, on_cpu
from road_torch._saved import SavedModule


def to_tensor(array: np.ndarray) -> Tensor:
    """Converts an array of `Adapter` to a tensor; floats become float32, integers and bools keep their dtype."""
    if array.dtype == bfloat16 or array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else array.dtype))


def to_array(tensor: Tensor) -> np.ndarray:
    """Converts a tensor to an array for `Adapter`; bfloat16 is kept bit for bit."""
    tensor = on_cpu(tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def to_adapter(
    layers: Iterable[RoadLayer],
    saved: Iterable[SavedModule],
    name: str,
    config: RoadConfig,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Collects an adapter from a model: its θ and α in float32, and its copies of modules in their dtypes."""
    modules = {
        layer.module_path: (
            to_array(layer.road_theta[name]),
            to_array(layer.road_alpha[name]),
        )
        for layer in layers
        if name in layer.road_theta
    }
    tensors = {}
    for module in saved:
        for key, value in module.state_of(name).items():
            tensors[f"{module.module_path}.{key}"] = to_array(value)
    base = {path: to_array(value) for path, value in (base_weights or {}).items()}
    return Adapter(config, modules, tensors, base_weights=base)
