"""RoAd adapters in PyTorch, in PEFT's vocabulary: mixed batches on plain and quantised layers."""

from typing import Any

from road_core import AdapterError as AdapterError
from road_core import RoadConfig as RoadConfig
from road_torch._intervention import InterventionModel as InterventionModel
from road_torch._layer import RoadLayer as RoadLayer
from road_torch._model import RoadModel as RoadModel


def __getattr__(name: str) -> Any:
    # Generation needs transformers, whose import takes seconds; adapters on a plain nn.Module don't.
    if name in ("generate", "load"):
        from road_torch import _generate

        return getattr(_generate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
