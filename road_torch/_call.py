"""How a `RoadModel` is called: its signature, the number of rows, and methods that take no adapter names."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from road_core import AdapterError
from road_torch._layer import bare
from road_torch._routing import exporting

if TYPE_CHECKING:
    from road_torch._model import RoadModel

# Names that models give to arguments whose first axis is the batch.
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "inputs",
    "input_features",
    "pixel_values",
    "input_values",
    "decoder_input_ids",
)


class Forward:
    """Descriptor for `RoadModel.forward`. Bound to a model, its signature includes the base's arguments.

    Hugging Face's Trainer keeps only the dataset columns that occur in this signature.
    """

    def __init__(self, function: Callable[..., Any], model: "RoadModel | None" = None) -> None:
        self._function = function
        self._model = model

    def __get__(self, model: "RoadModel | None", owner: type) -> Callable[..., Any]:
        if model is None:
            return self._function
        if exporting():
            # torch.export accepts no function that is excluded from tracing; it traces one choice of adapters anyway.
            return functools.partial(inspect.unwrap(self._function), model)
        return Forward(self._function, model)

    # If this were traced, every value of adapter_names would be guarded.
    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        # Accelerate wraps this and binds it again, so that a copy of the model calls itself, not the original.
        @functools.wraps(self._function)
        def function(*args: Any, **kwargs: Any) -> Any:
            return self._function(*args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = self.__signature__.parameters.values()
        function.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return function

    @property
    def __code__(self) -> types.CodeType:
        # torch.export names its graph after it.
        return self._function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        base = inspect.signature(self._model.base_model.forward)  # type: ignore[union-attr]
        parameters = [p for p in base.parameters.values() if p.name != "adapter_names"]
        place = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
        parameters.insert(place, inspect.signature(self._function).parameters["adapter_names"])
        return inspect.Signature(parameters)


def of_base(base: Any, name: str) -> Any:
    """Returns an attribute of the base; methods that would silently ignore ``adapter_names`` refuse them instead."""
    value = getattr(base, name)
    if inspect.ismethod(value) and (value.__self__ is base or value.__self__ is bare(base)):
        return types.MethodType(_without_names(value.__func__), value.__self__)
    return value


@functools.lru_cache(maxsize=256)
def _without_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a method refuse ``adapter_names`` if it takes any keyword and would silently ignore this one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return function
    if all(p.kind is not p.VAR_KEYWORD for p in parameters) or any(p.name == "adapter_names" for p in parameters):
        return function

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                f"adapter_names: expected a call of the model or its generate, found {function.__name__}, which "
                "follows the active adapters"
            )
        return function(*args, **kwargs)

    return method


def batch_sizes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """Returns possible numbers of rows of a call: one if a named input tells it, none if there are no tensors."""
    named = [kwargs[name] for name in _INPUTS if name in kwargs]
    for values in (args, named, kwargs.values()):
        if found := [len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0]:
            return found[:1] if values is named else found
    return []
