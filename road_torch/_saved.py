"""`SavedModule`: a module of which each adapter may bring its own trained copy (``modules_to_save``)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError
from road_torch._layer import whole
from road_torch._routing import BASE, HOOKED, LOCAL, Name, Routing, Shared, parts


class SavedModule(nn.Module):
    """Calls an adapter's copy of a module, or the original for adapters without a copy.

    In a mixed batch each copy is called with its own rows. This requires that the module takes one tensor whose first
    axis is the batch and returns one, as heads, embeddings and norms do.

    Args:
        original_module: the base's module.
        module_path: its path, for error messages.
        shared: state shared by all layers of the model.
        stray: why the module doesn't see the batch's rows in order; None if it does.

    Attributes:
        modules_to_save: the copies by adapter name.
    """

    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(self, original_module: nn.Module, module_path: str, shared: Shared, stray: str | None = None) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.module_path = module_path
        self._shared = shared
        self._stray = stray
        self.train(original_module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the copies of the rows' adapters or of the active adapter, or the original."""
        routing = self._routing()
        if not routing.batch or self._shared.off:
            return self.current(routing)(*args, **kwargs)
        kinds = self._kinds(routing)
        if len(set(kinds)) == 1:
            return self._copy_for(kinds[0])(*args, **kwargs)
        if self._stray is not None:
            raise AdapterError(
                f"{self.module_path}: expected a module that sees the batch's rows in order for adapter_names, "
                f"found {self._stray}"
            )
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise AdapterError(
                f"{self.module_path}: expected a call with one tensor, whose rows can go to the adapters' own modules, "
                f"found {len(args)} arguments and {len(kwargs)} by name; give rows with one such module alone"
            )
        x = args[0]
        repeats = routing.repeats(x, self.module_path, remedy="")
        kinds = [kind for kind in kinds for _ in range(repeats)]
        result = None
        for kind in dict.fromkeys(kinds):
            rows = routing.index([i for i, other in enumerate(kinds) if other == kind], 1, x.device)
            y = self._copy_for(kind)(x[rows])
            if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(rows):
                raise AdapterError(
                    f"{self.module_path}: expected a module that gives one tensor with a row for each that it gets, "
                    f"found {type(y).__name__}; give rows with one such module alone"
                )
            if result is None:
                result = y.new_empty(len(x), *y.shape[1:])
            result = result.index_copy(0, rows, y)
        return result

    def current(self, routing: Routing | None = None) -> nn.Module:
        """Returns the module that a plain call uses."""
        if self._shared.off:
            return self.original_module
        names: Sequence[Name] = self._shared.merged or (self._shared.plain if routing is None else routing).used
        return self._copy_for(next((n for n in names if isinstance(n, str) and n in self.modules_to_save), BASE))

    def __getattr__(self, name: str) -> Any:
        """Looks up attributes such as ``weight``, which models read, in the module that the call uses."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Accelerate's hooks on the module are not the wrapper's.
            if (
                name in HOOKED
                or "modules_to_save" not in self.__dict__.get("_modules", {})
                or "_shared" not in self.__dict__
            ):
                raise
            routing = self._routing()
            kinds = set() if self._shared.off else set(self._kinds(routing))
            if len(kinds) == 1:
                return getattr(self._copy_for(kinds.pop()), name)
            value = getattr(self.current(routing), name)
            if not kinds or not isinstance(value, Tensor):
                return value
            several = value.detach().as_subclass(_OfSeveral)
            several.path = f"{self.module_path}.{name}"
            return several

    def _routing(self) -> Routing:
        routing = LOCAL.routing
        return self._shared.plain if routing is None or routing.shared is not self._shared else routing

    def _kinds(self, routing: Routing) -> list[str]:
        """Returns, for each row of a mixed batch, the adapter whose copy it gets, or `BASE`."""
        return [
            next((part for part, _ in parts(name) if part in self.modules_to_save), BASE)
            for name in routing.names or ()
        ]

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of an adapter's copy by state-dict key; empty if it has no copy.

        Raises:
            AdapterError: accelerate has offloaded them.
        """
        state = self.modules_to_save[name].state_dict() if name in self.modules_to_save else {}
        for key, value in state.items():
            if value.is_meta:
                raise AdapterError(
                    f"{self.module_path}.{key}: expected the values of {name!r} in memory, found that accelerate "
                    "took them away"
                )
        return state

    def copy_again(self, name: str) -> nn.Module:
        """Copies an adapter's copy, for another adapter.

        Raises:
            AdapterError: accelerate has offloaded its tensors.
        """
        self.state_of(name)
        with torch.inference_mode(False), torch.no_grad():
            new = copy.deepcopy(self.modules_to_save[name])
            # FSDP, which gathers what it shards, doesn't know the new tensors.
            for part in new.modules():
                for key, value in part._parameters.items():
                    if value is not None and (gathered := whole(value)) is not value:
                        part._parameters[key] = nn.Parameter(gathered)
        return new

    def _copy_for(self, name: str) -> nn.Module:
        if name == BASE:
            return self.original_module
        module = self.modules_to_save[name]
        if torch.is_grad_enabled() and any(p.requires_grad and p.is_meta for p in module.parameters()):
            raise AdapterError(
                f"{self.module_path}: expected the copy of {name!r} on a device to be trained, found that accelerate "
                "took it away"
            )
        return module


class _OfSeveral(Tensor):
    """A tensor that differs from row to row of a call: its shape, dtype and device can be read, but no values."""

    path = ""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        looks = func.__name__ in ("__get__", "size", "dim", "numel", "element_size", "is_floating_point", "__len__")
        result = super().__torch_function__(func, types, args, kwargs or {}) if looks else None
        if looks and not isinstance(result, Tensor):
            return result
        path = next((one.path for one in (*args, *(kwargs or {}).values()) if isinstance(one, cls)), "modules_to_save")
        raise AdapterError(
            f"{path}: expected a module that is called, found a model that computes with its tensor itself, of which "
            "each row of adapter_names has another; give rows with one such module alone"
        )


def saved_modules(model: nn.Module) -> Iterator[SavedModule]:
    """Yields the model's modules that adapters have copies of, each once."""
    return (module for module in model.modules() if isinstance(module, SavedModule))


def copy_of(path: str, module: nn.Module, tensors: Mapping[str, Tensor] | None, *, strict: bool) -> nn.Module:
    """Copies a module for an adapter.

    Args:
        path: the module's path.
        module: the original.
        tensors: values by state-dict key, cast to the module's floating dtypes. Without a value, a tensor keeps the
            original's.
        strict: whether ``tensors``, if given, must have a value for every key.

    Raises:
        AdapterError: the module can't be trained whole, or a tensor is missing, unknown, or has a wrong shape or kind
            of dtype.
    """
    state = module.state_dict()
    wrong = _untrainable(module)
    if wrong is not None or not state or type(module).forward is nn.Module.forward:
        raise AdapterError(
            f"{path}: expected a module for modules_to_save that is called and has floating-point weights, found "
            f"{type(module).__name__}{wrong or ''}"
        )
    if tensors is not None:
        if extra := [key for key in tensors if key not in state]:
            raise AdapterError(f"{path}: expected only tensors of the module ({', '.join(state)}), found {extra[0]}")
        if strict and (missing := [key for key in state if key not in tensors]):
            raise AdapterError(f"{path}: expected a value for every tensor of the module, found none for {missing[0]}")
        for key, value in tensors.items():
            if value.shape != state[key].shape:
                raise AdapterError(f"{path}.{key}: expected shape {list(state[key].shape)}, found {list(value.shape)}")
            if value.is_floating_point() != state[key].is_floating_point():
                raise AdapterError(f"{path}.{key}: expected {state[key].dtype}, found {value.dtype}")
    with torch.inference_mode(False), torch.no_grad():
        new = copy.deepcopy(module)
        for key, value in (tensors or {}).items():
            new.state_dict()[key].copy_(value)
    return new


def _untrainable(module: nn.Module) -> str | None:
    """Describes a state-dict entry that can't be trained: quantised codes or a non-tensor. Returns None if all can."""
    # Not floating-point, but fine: counts, positions and masks, which are buffers of modules that aren't linear.
    kept = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if not hasattr(part, "out_features")
        for name in part._buffers
    }
    for key, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            return f" with {key}, a {type(value).__name__}"
        if not value.is_floating_point() and key not in kept:
            return f" with {key} of {value.dtype}"
    return None
