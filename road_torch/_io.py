"""Parameters of `RoadLayer` ⇄ `road_core.Adapter`."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from road_core import Adapter, RoadConfig, bfloat16
from road_torch._layer import RoadLayer


def to_tensor(array: np.ndarray) -> Tensor:
    """Returns a float32 tensor with the values of an array of `Adapter`."""
    if array.dtype == bfloat16 or array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array, np.float32))


def to_adapter(layers: Iterable[RoadLayer], name: str, config: RoadConfig) -> Adapter:
    """Collects an adapter's θ and α, float32, from the layers that have it."""
    modules = {
        layer.module_path: (
            layer.road_theta[name].detach().cpu().numpy().copy(),
            layer.road_alpha[name].detach().cpu().numpy().copy(),
        )
        for layer in layers
        if name in layer.road_theta
    }
    return Adapter(config, modules)
