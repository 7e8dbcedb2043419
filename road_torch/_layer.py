"""`RoadLayer`: any linear base, and the rotation of its output."""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_core import AdapterError, RoadConfig
from road_torch import _ops
from road_torch._bank import BASE, Bank
from road_torch._kernels import default

# One rotation of a layer's output: first, cross, group_size. Adapters of several group sizes need one each.
Pass = tuple[Tensor, Tensor, int]


class Shared:
    """What all layers of a model look at.

    Attributes:
        active: the adapters that a plain call applies, one after the other.
        off: True while adapters are disabled.
        configs: of every adapter.
        merged: the adapters that stand in the base's weights, in the order in which they were applied.
        rows: each adapter's row in the layers' banks; 0 stays free for the identity.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.off = False
        self.merged: tuple[str, ...] = ()
        self.configs: dict[str, RoadConfig] = {}
        self.rows: dict[str, int] = {}

    def new_row(self) -> int:
        """Returns the lowest row that no adapter has."""
        used = set(self.rows.values())
        return next(row for row in range(1, len(used) + 2) if row not in used)


class Routing:
    """Which adapter each row of a batch gets, for the time of one call.

    Layers keep here what they gathered, so that nothing of it outlives the call.

    Attributes:
        shared: of the model that was called; layers of another one take no notice.
        names: one a row.
        plans: what each layer gathered.
        scratch: memory that layers use one after the other, by its shape, dtype and device.
    """

    def __init__(self, shared: Shared, names: Sequence[str]) -> None:
        self.shared = shared
        self.names = tuple(names)
        self.used = tuple(name for name in dict.fromkeys(self.names) if name != BASE)
        self.plans: dict[nn.Module, Plan] = {}
        self.scratch: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
        self._indices: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = {}

    def indices(self, repeats: int, device: torch.device) -> list[tuple[int, Tensor]]:
        """Returns ``(group size, rows of the bank)`` for each group size in use, int64 ``[batch]``."""
        key = (repeats, device)
        if key not in self._indices:
            sizes = {name: self.shared.configs[name].group_size for name in self.used}
            found = []
            for size in dict.fromkeys(sizes.values()):
                rows = [self.shared.rows[name] if sizes.get(name) == size else 0 for name in self.names]
                with torch.inference_mode(False):
                    found.append((size, torch.tensor(rows, device=device).repeat_interleave(repeats)))
            self._indices[key] = found
        return self._indices[key]


class Plan:
    """The rotations that a layer applies, ready for one dtype; of a routing, for one shape.

    A plan is made for the device that its first output was on: who moves a layer moves it through ``_apply``, which
    drops the plan, and a routing lives for one call.
    """

    __slots__ = ("changes", "dtype", "passes", "scratch", "shape", "sources", "versions")

    def __init__(self, y: Tensor, passes: list[Pass], sources: Sequence[Tensor] = (), changes: int = 0) -> None:
        self.dtype = y.dtype
        self.passes = passes
        self.sources = sources
        self.versions = [source._version for source in sources]
        self.changes = changes
        self.shape: torch.Size | None = None
        self.scratch: Tensor | None = None

    def outdated(self, changes: int) -> bool:
        """True where θ or α were replaced or written to."""
        return changes != self.changes or [source._version for source in self.sources] != self.versions


_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

_ROUTING: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("road_torch_routing", default=None)


class routed:  # noqa: N801 - a context manager, and so lean because it stands around every call
    """While it is open, the calls of this thread or task on this model follow a routing."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    def __enter__(self) -> Routing:
        self._token = _ROUTING.set(self._routing)
        return self._routing

    def __exit__(self, *error: object) -> None:
        _ROUTING.reset(self._token)


class _Parameters(nn.ParameterDict):
    """θ or α by adapter. They keep their dtype when the model is cast, and count how often one is replaced."""

    def __init__(self, changes: list[int]) -> None:
        super().__init__()
        self.changes = changes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.changes[0] += 1
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Parameters":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class RoadLayer(nn.Module):
    """A linear layer whose output is rotated: ``y * first + rotate_half(y) * second``, in the dtype of ``y``.

    The base may be anything whose last output axis is the features': ``nn.Linear``, ``Conv1D``, layers of bitsandbytes
    and others. Only its output is touched.

    Args:
        base_layer: the layer that is wrapped.
        module_path: its path, for error messages.
        shared: what all layers of the model look at.

    Attributes:
        road_theta: θ of each adapter, float32.
        road_alpha: α of each adapter, float32.
        merged_adapters: those that now stand in the base's weight.
    """

    base_layer: Any
    road_theta: "_Parameters"
    road_alpha: "_Parameters"

    def __init__(self, base_layer: nn.Module, module_path: str, shared: Shared) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base_layer)
        self.module_path = module_path
        self.base_layer = base_layer
        self._changes = [0]
        self.road_theta = _Parameters(self._changes)
        self.road_alpha = _Parameters(self._changes)
        self.merged_adapters: list[str] = []
        # What unmerging puts back.
        self.unmerged: Any = None
        self._shared = shared
        self._plan: Plan | None = None
        self._bank: Bank | None = None
        # These give a tensor that nobody else holds, so it may be overwritten.
        kind = type(base_layer)
        self._gives_new = kind is nn.Linear or is_conv1d(base_layer) or kind.__module__.startswith("bitsandbytes.")
        # Experts see a choice of the tokens: which row of the batch a token came from can't be known there.
        self._is_expert = "experts" in module_path.split(".")
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight; models look at its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def adapters(self) -> list[str]:
        """The adapters that this layer has."""
        return list(self.road_theta)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the base layer and rotates what it gives."""
        # Decoding calls this hundreds of times a token: every attribute counts. self.base_layer would go the long way
        # through nn.Module.__getattr__.
        base: Any = self._modules["base_layer"]
        y: Tensor = base(x, *args, **kwargs)
        shared = self._shared
        if shared.off or shared.merged:
            return y
        if _is_compiling():
            return self._differentiable(y, None)
        routing = _ROUTING.get()
        if routing is not None and routing.shared is shared:
            plan = routing.plans.get(self)
            if plan is None or plan.shape != y.shape or plan.dtype is not y.dtype:
                plan = self._plan_routed(y, routing, plan)
        else:
            routing, plan = None, self._plan
            if plan is None or plan.dtype is not y.dtype or plan.outdated(self._changes[0]):
                plan = self._plan = self._plan_active(y)
        if not plan.passes:
            return y
        if _is_grad_enabled():
            if any(source.requires_grad for source in plan.sources):
                return self._differentiable(y, routing)
            if y.requires_grad:
                for first, cross, group_size in plan.passes:
                    y = _ops.rotate(y, first, cross, group_size)
                return y
        if self._gives_new and not base._forward_hooks and y.is_contiguous():
            for first, cross, group_size in plan.passes:
                y = default.rotate_(y, first, cross, group_size, plan.scratch)
            return y
        for first, cross, group_size in plan.passes:
            y = default.rotate(y, first, cross, group_size)
        return y

    def add(self, name: str, theta: Tensor, alpha: Tensor) -> None:
        """Takes an adapter's θ and α, which are known to fit."""
        device = _device(self.base_layer)
        with torch.inference_mode(False):
            for parameters, values in ((self.road_theta, theta), (self.road_alpha, alpha)):
                copy = values.detach().to(device, torch.float32, copy=True)
                parameters[name] = nn.Parameter(copy, requires_grad=False)

    def remove(self, name: str) -> None:
        """Forgets an adapter."""
        if name in self.road_theta:
            del self.road_theta[name], self.road_alpha[name]
            if self._bank is not None:
                self._bank.clear(self._shared.rows[name])
            self.forget()

    def forget(self) -> None:
        """Drops what was prepared for plain calls, because which adapters are active has changed."""
        self._plan = None

    def passes(self, names: Sequence[str], *, device: torch.device | None = None) -> list[Pass]:
        """Returns float32 rotations that amount to these adapters one after the other, each ``[out]``.

        Neighbours of one group size become one rotation.
        """
        found: list[Pass] = []
        for name in names:
            if name not in self.road_theta:
                continue
            config = self._shared.configs[name]
            theta, alpha = self.road_theta[name], self.road_alpha[name]
            then = default.coefficients(theta, alpha, config.variant, config.group_size)
            if found and found[-1][2] == config.group_size:
                before = found.pop()
                then = default.compose((before[0], before[1]), then, config.group_size)
            found.append((then[0].to(device), then[1].to(device), config.group_size))
        return found

    def _plan_active(self, y: Tensor) -> Plan:
        names = [name for name in self._shared.active if name in self.road_theta]
        with torch.inference_mode(False), torch.no_grad():
            passes = [(f.to(y.dtype), c.to(y.dtype), size) for f, c, size in self.passes(names, device=y.device)]
        sources = [parameters[name] for name in names for parameters in (self.road_theta, self.road_alpha)]
        return Plan(y, passes, sources, self._changes[0])

    def _plan_routed(self, y: Tensor, routing: Routing, old: Plan | None) -> Plan:
        """Gathers each row's coefficients, once a call; for another shape of as many rows only the memory changes."""
        before = old.shape if old is not None and old.dtype is y.dtype else None
        if old is not None and before and before[0] == len(y) and len(before) == y.ndim:
            plan = old
        else:
            names = [name for name in routing.used if name in self.road_theta]
            sources = [parameters[name] for name in names for parameters in (self.road_theta, self.road_alpha)]
            plan = routing.plans[self] = Plan(y, self._gather(y, routing, names), sources)
        plan.shape, plan.scratch = y.shape, None
        if y.numel() <= default.SMALL:
            # Layers run one after the other, so those of one size can share it.
            key = (y.shape, y.dtype, y.device)
            if key not in routing.scratch:
                with torch.inference_mode(False):
                    routing.scratch[key] = torch.empty_like(y, memory_format=torch.contiguous_format)
            plan.scratch = routing.scratch[key]
        return plan

    def _gather(self, y: Tensor, routing: Routing, names: Sequence[str]) -> list[Pass]:
        repeats = self._repeats(y, routing)
        if not names:
            return []
        bank = self._bank
        if bank is None or bank.first.device != y.device:
            bank = self._bank = Bank(self.out_features, y.device)
        bank.reserve(max(self._shared.rows.values()))
        sizes = set()
        for name in names:
            config = self._shared.configs[name]
            sizes.add(config.group_size)
            row = self._shared.rows[name]
            bank.update(row, self.road_theta[name], self.road_alpha[name], config.variant, config.group_size)
        shape = (len(y), *[1] * (y.ndim - 2), self.out_features)
        passes: list[Pass] = []
        with torch.inference_mode(False), torch.no_grad():
            for size, index in routing.indices(repeats, y.device):
                if size in sizes:
                    first, cross = (table[index].to(y.dtype).view(shape) for table in (bank.first, bank.cross))
                    passes.append((first, cross, size))
        return passes

    def _repeats(self, y: Tensor, routing: Routing) -> int:
        """How many rows of ``y`` in a row belong to one name: beams, returned sequences, flattened tokens."""
        if self._is_expert:
            raise AdapterError(
                f"{self.module_path}: expected a layer that sees the batch's rows in order for adapter_names, "
                "found an expert, to which tokens are routed"
            )
        repeats, rest = divmod(len(y) if y.ndim > 1 else 0, len(routing.names))
        if rest or not repeats:
            raise AdapterError(
                f"{self.module_path}: expected a multiple of the {len(routing.names)} rows that adapter_names has, "
                f"found an output of shape {list(y.shape)}"
            )
        return repeats

    def _differentiable(self, y: Tensor, routing: Routing | None) -> Tensor:
        """The rotation with gradients for ``y``, θ and α, nothing prepared."""
        rotate = default.rotate if torch.compiler.is_compiling() else _ops.rotate
        if routing is None:
            for first, cross, size in self.passes(self._shared.active):
                y = rotate(y, first.to(y.dtype), cross.to(y.dtype), size)
            return y
        repeats = self._repeats(y, routing)
        names = [name for name in routing.used if name in self.road_theta]
        for size in dict.fromkeys(self._shared.configs[name].group_size for name in names):
            here = [name for name in names if self._shared.configs[name].group_size == size]
            first, cross = (torch.stack(v) for v in zip(*(self.passes([name])[0][:2] for name in here), strict=True))
            first = torch.cat((torch.ones_like(first[:1]), first))
            cross = torch.cat((torch.zeros_like(cross[:1]), cross))
            rows = [here.index(name) + 1 if name in here else 0 for name in routing.names]
            index = torch.tensor(rows, device=y.device).repeat_interleave(repeats)
            shape = (len(y), *[1] * (y.ndim - 2), self.out_features)
            y = rotate(y, first[index].view(shape), cross[index].view(shape), size)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoadLayer":
        # Tables and plans stand where the parameters stood.
        self._bank = self._plan = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Names the adapters."""
        return f"adapters={self.adapters}"


def features(module: Any) -> tuple[int, int]:
    """Returns ``(in_features, out_features)`` of a linear layer.

    Raises:
        TypeError: the module isn't known to be linear.
    """
    if is_conv1d(module):
        rows, columns = module.weight.shape
        return rows, columns
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise TypeError(type(module).__name__)
    return sizes[0], sizes[1]  # type: ignore[return-value]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``, a linear layer with its weight as ``[in, out]``; imports nothing."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def layers(model: nn.Module) -> Iterator[RoadLayer]:
    """Yields the model's adapted layers, each once."""
    return (module for module in model.modules() if isinstance(module, RoadLayer))


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")
