"""RoAd adapters in PyTorch with PEFT's vocabulary: mixed batches on plain and quantised layers."""

from typing import TYPE_CHECKING, Any

from road_core import AdapterError as AdapterError
from road_core import RoadConfig as RoadConfig
from road_torch._intervention import InterventionModel as InterventionModel
from road_torch._layer import RoadLayer as RoadLayer
from road_torch._model import RoadModel as RoadModel

if TYPE_CHECKING:
    from road_torch._generate import generate as generate
    from road_torch._load import load as load


def __getattr__(name: str) -> Any:
    # Generation needs transformers, whose import takes seconds; adapters on a plain nn.Module don't need it.
    if name == "generate":
        from road_torch._generate import generate

        return generate
    if name == "load":
        from road_torch._load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "generate", "load"])
